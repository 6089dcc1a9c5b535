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
from cas.errors import KeyReused, TooManyKept
from cas.events import NO_LIMIT, Room
from cas.once import CLIENT_KEYS_US, OnceKey, once, remembered, step_key
from cas.records import KEY_BYTES, Mark, Once
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.totals import kept_of
from tests.audit import audit
from tests.clocks import KEEP_US, START_US, HandClock


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        yield store
        audit(store)


def count(
    store: Store,
    key: OnceKey | None,
    tenant: str = "acme",
    fails: bool = False,
    room: Room | None = None,
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

        done = once(txn, tenant, key, act, room=room)
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


# --- long names


def test_a_long_name_is_kept_as_its_digest(store: Store) -> None:
    long = OnceKey("events", "n" * 65, b"asked")
    assert count(store, long) == ("1", True)
    assert count(store, long) == ("1", False)
    assert count(store, OnceKey("events", "n" * 64)) == ("2", True)
    assert count(store, OnceKey("events", "n" * 255)) == ("3", True)
    # A name that is spelt as the digest of another one is its own.
    assert count(store, OnceKey("events", long.kept_name)) == ("4", True)
    with pytest.raises(KeyReused) as reused:
        count(store, msgspec.structs.replace(long, asked=b"another"))
    assert reused.value.key == long.name, "it is told as it was sent"
    with store.catalog.read() as snapshot:
        kept = snapshot.range(Once, "")
        found = remembered(snapshot, "acme", long)
    assert max(len(key.name) for key in kept) <= 71
    assert found is not None
    assert found.result == "1"


def test_the_name_of_a_step_is_kept_as_it_is(store: Store) -> None:
    """Its run may have begun under a version that knew no other way."""
    key = step_key("run-1", "s" * 200, "emit")
    count(store, key)
    with store.catalog.read() as snapshot:
        assert snapshot.get(Once, "acme", "run:run-1", f"{'s' * 200}/emit") is not None
    assert count(store, key) == ("1", False)


# --- how much is kept


def kept(store: Store) -> int:
    with store.catalog.read() as snapshot:
        return kept_of(snapshot, "acme")


def test_keys_of_events_count_for_the_tenant_and_have_a_limit(
    store: Store, clock: HandClock
) -> None:
    room = Room(kept_bytes_max=2 * KEY_BYTES)
    for name in ("a", "b" * 250):
        count(store, OnceKey("events", name), room=room)
    assert kept(store) == 2 * KEY_BYTES
    with pytest.raises(TooManyKept) as refused:
        count(store, OnceKey("events", "c"), room=room)
    facts = refused.value
    assert (facts.limit_bytes, facts.kept_bytes, facts.needed_bytes) == (1024, 1024, KEY_BYTES)
    # One that is known is answered as ever; a step's goes with its run, and what makes something
    # that stays has other limits.
    assert count(store, OnceKey("events", "a"), room=room) == ("1", False)
    assert count(store, step_key("run-1", "a", "event"), room=room) == ("3", True)
    assert count(store, OnceKey("uploads", "a")) == ("4", True)
    assert count(store, None, room=room) == ("5", True)
    assert count(store, OnceKey("events", "c"), tenant="other", room=room) == ("6", True)
    assert kept(store) == 2 * KEY_BYTES

    clock.advance(CLIENT_KEYS_US)
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, clock.time_us, keep_us=KEEP_US)
    execute_sweep(store.catalog, plan)
    assert kept(store) == 0
    assert count(store, OnceKey("events", "c"), room=room) == ("7", True)


def test_without_a_limit_keys_of_events_are_counted_all_the_same(store: Store) -> None:
    count(store, OnceKey("events", "a"), room=NO_LIMIT)
    assert kept(store) == KEY_BYTES
