"""What is done under a key is done once, and remembered with it or not at all (invariants 6
and 14)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cas.catalog import Transaction
from cas.clock import DAY_US
from cas.config import Settings, Size, StoreSettings
from cas.errors import KeyReused
from cas.once import CLIENT_KEYS_US, OnceKey, once, step_key
from cas.records import Mark, Once
from cas.store import Store
from tests.clocks import START_US, HandClock


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        yield store


def count(
    store: Store, key: OnceKey | None, tenant: str = "acme", fails: bool = False
) -> tuple[str, bool]:
    """Count one further under a key; what comes of it is the number."""

    def change(txn: Transaction) -> tuple[str, bool]:
        def act() -> str:
            found = txn.get(Mark, "count")
            made = Mark("count", str(int(found.value) + 1 if found else 1))
            if found:
                txn.replace(made)
            else:
                txn.insert(made)
            return made.value

        done = once(txn, tenant, key, act)
        if fails:
            raise ZeroDivisionError
        return done

    return store.catalog.write(change)


def test_the_repetition_is_told_what_came_of_the_first(store: Store) -> None:
    key = OnceKey("events", "name", b"asked")
    assert count(store, key) == ("1", True)
    assert count(store, key) == ("1", False)
    assert count(store, None) == ("2", True)
    assert count(store, key) == ("1", False)


def test_keys_of_others_are_other_keys(store: Store) -> None:
    key = OnceKey("events", "name")
    assert count(store, key) == ("1", True)
    assert count(store, key, tenant="other") == ("2", True)
    assert count(store, OnceKey("uploads", "name")) == ("3", True)
    assert count(store, step_key("run-1", "sum#2", "emit")) == ("4", True)
    assert count(store, step_key("run-2", "sum#2", "emit")) == ("5", True)


def test_a_key_is_for_one_question(store: Store) -> None:
    key = OnceKey("events", "name", b"one")
    count(store, key)
    for other in (b"another", b""):
        with pytest.raises(KeyReused) as reused:
            count(store, msgspec.structs.replace(key, asked=other))
        assert reused.value.key == "name"
    assert count(store, key) == ("1", False)


def test_what_failed_left_no_key(store: Store) -> None:
    key = OnceKey("events", "name")
    with pytest.raises(ZeroDivisionError):
        count(store, key, fails=True)
    assert count(store, key) == ("1", True)


def test_how_long_it_is_remembered(store: Store, clock: HandClock) -> None:
    count(store, OnceKey("events", "a client's"))
    count(store, step_key("run-1", "a", "step's"))
    clock.advance(DAY_US)
    with store.catalog.read() as snapshot:
        kept = {key.name: key.expires_at for key in snapshot.range(Once, "")}
    assert kept == {"a client's": START_US + CLIENT_KEYS_US, "a/step's": None}
