"""Pages of records: all of them once, and no page is too long for who sends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cas.catalog import Transaction
from cas.clock import SECOND_US
from cas.config import Settings, Size, StoreSettings
from cas.identifiers import new_id
from cas.listing import PAGE_BYTES_MAX, PAGE_MAX, newest
from cas.records import Run
from cas.store import Store
from tests.clocks import START_US


@pytest.fixture
def store(memory: Path) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings) as store:
        yield store


def keep(store: Store, *sizes: int) -> list[Run]:
    """Runs whose records have about so many bytes, the newest first."""

    def change(txn: Transaction) -> list[Run]:
        made = [
            Run(new_id(START_US + at * SECOND_US), "t", "x" * size, "queued", START_US, "ann")
            for at, size in enumerate(sizes)
        ]
        for one in made:
            txn.insert(one)
        return made

    return store.catalog.write(change, actor="ann", request_id="")[::-1]


def pages(store: Store, limit: int = PAGE_MAX) -> list[list[Run]]:
    """All of them, page by page."""
    found: list[list[Run]] = []
    cursor: str | None = None
    while True:
        with store.catalog.read() as snapshot:
            page = newest(snapshot, Run, "tenant", ("t",), cursor, limit)
        found.append(page.items)
        cursor = page.next_cursor
        if cursor is None:
            return found


def size_of(page: list[Run]) -> int:
    return sum(len(msgspec.msgpack.encode(one)) for one in page)


def test_a_page_of_long_records_ends_early_and_the_next_goes_on(store: Store) -> None:
    """Else a page of a thousand is as long as its longest records allow, and lies in memory for
    as long as its reader takes."""
    kept = keep(store, *[PAGE_BYTES_MAX // 7] * 20)
    found = pages(store)
    assert [len(page) for page in found] == [6, 6, 6, 2]
    assert all(size_of(page) <= PAGE_BYTES_MAX for page in found)
    assert [one for page in found for one in page] == kept


def test_a_record_that_is_longer_than_a_page_is_a_page(store: Store) -> None:
    kept = keep(store, 10, 2 * PAGE_BYTES_MAX, 2 * PAGE_BYTES_MAX, 10)
    found = pages(store)
    assert [len(page) for page in found] == [1, 1, 1, 1]
    assert [one for page in found for one in page] == kept


@pytest.mark.parametrize(("count", "lengths"), [(0, [0]), (3, [3]), (4, [3, 1]), (6, [3, 3])])
def test_a_page_has_as_many_as_were_asked_for_and_the_last_one_says_so(
    store: Store, count: int, lengths: list[int]
) -> None:
    kept = keep(store, *[10] * count)
    found = pages(store, limit=3)
    assert [len(page) for page in found] == lengths
    assert [one for page in found for one in page] == kept
