"""Events commit with the change they speak of, or not at all (invariant 6)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.catalog import Transaction
from cas.config import Settings, Size, StoreSettings
from cas.events import append_event
from cas.records import Event, Mark
from cas.store import Store
from tests.clocks import START_US, HandClock


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        yield store


def events(store: Store, tenant: str = "acme", name: str = "it happened") -> list[Event]:
    with store.catalog.read() as snapshot:
        return snapshot.range(Event, "name", (tenant, name))


def test_an_event_is_found_by_tenant_and_name_in_order(store: Store, clock: HandClock) -> None:
    for number in range(3):
        clock.advance(1000)
        store.catalog.write(
            lambda txn, number=number: append_event(  # type: ignore[misc]
                txn, "acme", "it happened", {"number": number, "name": "ä"}, "key"
            )
        )
    store.catalog.write(lambda txn: append_event(txn, "other", "it happened", {}))
    found = events(store)
    assert [json.loads(event.payload)["number"] for event in found] == [0, 1, 2]
    assert json.loads(found[0].payload)["name"] == "ä"
    assert found[0].created_at == START_US + 1000
    assert found[0].correlation_key == "key"
    assert found[0].expires_at is None
    assert len(events(store, "other")) == 1
    assert events(store, "acme", "it") == []


def test_an_event_goes_with_its_change(store: Store) -> None:
    def change(txn: Transaction) -> None:
        txn.insert(Mark("changed", "yes"))
        append_event(txn, "acme", "it happened", {})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.catalog.write(change)
    assert events(store) == []
    with store.catalog.read() as snapshot:
        assert snapshot.get(Mark, "changed") is None
