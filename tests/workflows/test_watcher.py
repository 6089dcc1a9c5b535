"""Whoever waits is woken: by another process, by time, for what came before, and never too late.

A doorbell may ring twice or for nothing. Not once is what must not be.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cas.catalog import Transaction
from cas.catalog.snapshot import LmdbSnapshot
from cas.clock import HOUR_US, SECOND_US, SystemClock
from cas.config import Settings, Size, StoreSettings
from cas.dating import date_all
from cas.errors import CatalogClosed
from cas.events import claim, drop, post, subscribe
from cas.records import Mark, Subscription
from cas.store import Store
from tests.clocks import KEEP_US, HandClock
from tests.workflows.neighbour import PATIENCE_S, Neighbour, until
from workflows.events import Events
from workflows.watcher import Watcher, _Look

SETTINGS = Settings(store=StoreSettings(min_free=Size(0)))


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        yield store


@pytest.fixture
def watcher(store: Store) -> Iterator[Watcher]:
    watcher = Watcher(store.catalog)
    yield watcher
    watcher.close()


def wait(
    store: Store, step: str, name: str = "paid", timeout_us: int | None = None
) -> Subscription:
    return store.catalog.write(
        lambda txn: subscribe(txn, "acme", "run-1", step, name, None, timeout_us)
    )


def happens(store: Store, name: str = "paid") -> None:
    store.catalog.write(
        lambda txn: post(txn, "acme", name, b"1", None, hold_us=HOUR_US, keep_us=KEEP_US)
    )


def change(
    store: Store, wait: Subscription, act: Callable[[Transaction, Subscription], object]
) -> None:
    def run(txn: Transaction) -> None:
        found = txn.get(Subscription, wait.subscription_id)
        assert found is not None
        act(txn, found)

    store.catalog.write(run)


class Bell:
    """Counts its rings, and can be waited for."""

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __call__(self) -> None:
        self._rings.put(None)

    def heard(self) -> None:
        """Wait for a ring, and take it."""
        self._rings.get(timeout=PATIENCE_S)

    @property
    def silent(self) -> bool:
        return self._rings.empty()


# --- one wait


def test_a_wait_rings_when_its_event_comes(store: Store, watcher: Watcher) -> None:
    mine, other = Bell(), Bell()
    watcher.watch(wait(store, "a").subscription_id, mine)
    watcher.watch(wait(store, "b", "unpaid").subscription_id, other)
    happens(store)
    mine.heard()
    assert other.silent


def test_what_was_decided_before_rings_at_once(
    store: Store, watcher: Watcher, clock: HandClock
) -> None:
    told, taken, over = (wait(store, step, step, HOUR_US) for step in ("told", "taken", "over"))
    gone = wait(store, "gone", "gone")
    happens(store, "told")
    happens(store, "taken")
    change(store, taken, lambda txn, one: claim(txn, one, KEEP_US))
    change(store, gone, drop)
    clock.advance(HOUR_US)
    for one in (told, taken, over, gone):
        bell = Bell()
        watcher.watch(one.subscription_id, bell)
        assert not bell.silent


def test_a_wait_rings_when_its_time_is_over(
    store: Store, watcher: Watcher, clock: HandClock
) -> None:
    bells = [Bell() for _ in range(3)]
    for hours, bell in enumerate(bells, start=1):
        one = wait(store, f"{hours}", timeout_us=hours * HOUR_US)
        watcher.watch(one.subscription_id, bell)
    for number, bell in enumerate(bells):
        assert bell.silent
        clock.advance(HOUR_US)
        bell.heard()
        assert all(later.silent for later in bells[number + 1 :])


def test_a_wait_whose_clock_was_wrong_rings_when_it_is_dated_and_over(
    store: Store, watcher: Watcher, clock: HandClock
) -> None:
    clock.trusted = False
    right_us = clock.now_us()
    clock.time_us = 0
    one = wait(store, "a", timeout_us=HOUR_US)
    bell = Bell()
    watcher.watch(one.subscription_id, bell)
    clock.time_us = right_us + 2 * HOUR_US
    assert bell.silent
    assert date_all(store.catalog).workflows == 1
    clock.advance(HOUR_US)
    bell.heard()


def test_a_wait_that_another_claimed_or_cancelled_rings(store: Store, watcher: Watcher) -> None:
    """Before this process looked: only its record tells."""
    taken, gone = wait(store, "a", "taken"), wait(store, "b", "gone")
    bells = Bell(), Bell()
    for one, bell in zip((taken, gone), bells, strict=True):
        watcher.watch(one.subscription_id, bell)

    def at_once(txn: Transaction) -> None:
        post(txn, "acme", "taken", b"1", None, keep_us=KEEP_US)
        found = txn.get(Subscription, taken.subscription_id)
        assert found is not None
        claim(txn, found, keep_us=KEEP_US)

    store.catalog.write(at_once)
    change(store, gone, drop)
    for bell in bells:
        bell.heard()


def test_many_watch_one_wait_and_each_ends_its_own(store: Store, watcher: Watcher) -> None:
    one = wait(store, "a")
    first, second = Bell(), Bell()
    unwatch = watcher.watch(one.subscription_id, first)
    watcher.watch(one.subscription_id, second)
    unwatch()
    unwatch()
    happens(store)
    second.heard()
    assert first.silent


def test_waits_that_share_a_microsecond_are_all_rung_for(store: Store, watcher: Watcher) -> None:
    """The clock stands still, as it may for long: time alone tells nothing apart."""
    for number in range(30):
        bell = Bell()
        watcher.watch(wait(store, f"{number}", f"{number}").subscription_id, bell)
        happens(store, f"{number}")
        bell.heard()


def test_a_ring_that_fails_keeps_no_other_from_ringing(
    store: Store, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    bell = Bell()
    one = wait(store, "a")
    watcher.watch(one.subscription_id, broken)
    watcher.watch(one.subscription_id, bell)
    with caplog.at_level(logging.ERROR, "workflows.watcher"):
        happens(store)
        bell.heard()
    assert "ZeroDivisionError" in caplog.text


def test_a_wait_rings_that_begins_after_its_end(store: Store, clock: HandClock) -> None:
    """Its commit took so long: watched by another, and by the look at news alone."""
    watcher = Watcher(store.catalog)
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    watcher.watch_all(lambda wait: heard.put(wait.step))
    first = wait(store, "first", timeout_us=HOUR_US)
    clock.advance(2 * HOUR_US)
    assert heard.get(timeout=PATIENCE_S) == first.step
    ended_us = clock.now_us() - HOUR_US

    def late(txn: Transaction) -> None:
        made = subscribe(txn, "acme", "run-1", "late", "paid", None, HOUR_US)
        txn.replace(msgspec.structs.replace(made, expires_at=ended_us, open_until=ended_us))

    store.catalog.write(late)
    while heard.get(timeout=PATIENCE_S) != "late":
        pass
    watcher.close()


def test_a_look_costs_what_is_new(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what was delivered or over before, while nobody claims it."""
    watcher = Watcher(store.catalog)
    look = _Look(watcher)
    for number in range(30):
        wait(store, f"{number}", f"{number}", SECOND_US)
        wait(store, f"told-{number}", "told")
    happens(store, "told")
    read = 0
    real = LmdbSnapshot._led_to

    def counting(self: LmdbSnapshot, *words: Any) -> Any:
        nonlocal read
        read += 1
        return real(self, *words)

    monkeypatch.setattr(LmdbSnapshot, "_led_to", counting)

    def looked() -> int:
        nonlocal read
        read = 0
        look.again()
        return read

    assert looked() >= 60
    assert looked() == 0
    clock.advance(SECOND_US)
    assert looked() == 30
    for number in range(3):
        clock.advance(1)
        store.catalog.write(lambda txn, number=number: txn.insert(Mark(f"{number}", "")))  # type: ignore[misc]
        assert looked() == 0
        wait(store, f"new-{number}", "never")
        assert looked() == 1
    watcher.close()


# --- all waits, and commits


def test_the_runner_hears_of_every_wait(store: Store, watcher: Watcher, clock: HandClock) -> None:
    told, over = wait(store, "told", "told"), wait(store, "over", "over", HOUR_US)
    happens(store, "told")
    clock.advance(HOUR_US)
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    unwatch = watcher.watch_all(lambda wait: heard.put(wait.step))
    before: set[str] = set()
    while not {told.step, over.step} <= before:
        before.add(heard.get(timeout=PATIENCE_S))
    for number in range(5):
        wait(store, f"{number}", f"{number}")
        happens(store, f"{number}")
    late = wait(store, "late", "late", SECOND_US)
    clock.advance(SECOND_US)
    expected = {f"{number}" for number in range(5)} | {late.step}
    found: set[str] = set()
    while not expected <= found:
        found.add(heard.get(timeout=PATIENCE_S))
    unwatch()
    bell = Bell()
    watcher.watch(wait(store, "last", "last").subscription_id, bell)
    while not heard.empty():
        heard.get()
    happens(store, "last")
    bell.heard()
    assert heard.empty()


def test_commits_ring(store: Store, watcher: Watcher) -> None:
    bell = Bell()
    unwatch = watcher.watch_commits(bell)
    bell.heard()  # whatever was before
    for number in range(3):
        store.catalog.write(lambda txn, number=number: txn.insert(Mark(f"{number}", "")))  # type: ignore[misc]
        bell.heard()
    unwatch()


def test_it_rests_while_nobody_waits(store: Store, watcher: Watcher) -> None:
    def looks() -> int:
        return counted

    others = threads()
    counted = 0
    real = store.catalog.last_commit

    def counting() -> int:
        nonlocal counted
        counted += 1
        return real()

    store.catalog.last_commit = counting  # type: ignore[method-assign]
    assert not threads() - others
    unwatch = watcher.watch(wait(store, "a").subscription_id, lambda: None)
    until(lambda: looks() > 3)
    unwatch()
    until(lambda: _rests(looks))
    bell = Bell()
    watcher.watch(wait(store, "b").subscription_id, bell)
    happens(store)
    bell.heard()


def threads() -> set[threading.Thread]:
    """The watchers' threads of this process; other tests may have left theirs."""
    return {thread for thread in threading.enumerate() if thread.name == "watcher"}


def _rests(looks: Callable[[], int]) -> bool:
    before = looks()
    time.sleep(0.1)  # ten looks of one who does not
    return looks() == before


# --- two processes


def test_an_event_of_another_process_wakes_within_a_moment(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the look at what is new, and not by the one at all that is watched."""
    monkeypatch.setattr("workflows.watcher._RECHECK_S", 3600.0)
    root = memory / "store"
    with Store.open(root, SETTINGS) as store, Neighbour(root) as neighbour:
        watcher = Watcher(store.catalog)
        events = Events(store.catalog, watcher, SETTINGS.events, tenant_id="acme", actor="we")
        for number in range(20):
            bell = Bell()
            one = events.subscribe("run-1", f"{number}", f"event-{number}")
            unwatch = watcher.watch(one.subscription_id, bell)
            emitted = neighbour.ask("emit", f"event-{number}", number)
            assert emitted["delivered_to"] == 1
            bell.heard()
            unwatch()
            claimed = events.claim(one.subscription_id)
            assert claimed is not None
            assert claimed.payload == number
        watcher.close()


def test_two_processes_wait_for_each_other(memory: Path) -> None:
    root = memory / "store"
    with Store.open(root, SETTINGS) as store, Neighbour(root) as neighbour:
        watcher = Watcher(store.catalog)
        events = Events(store.catalog, watcher, SETTINGS.events, tenant_id="acme", actor="we")
        with ThreadPoolExecutor(1) as pool:
            for number in range(10):
                asking = pool.submit(neighbour.ask, "wait", "ping", None, 30)
                events.emit("ping", number, hold_us=HOUR_US)
                assert asking.result(PATIENCE_S) == number
        watcher.close()


def test_a_process_that_is_killed_while_it_waits_loses_nothing(memory: Path) -> None:
    root = memory / "store"
    with Store.open(root, SETTINGS) as store:
        watcher = Watcher(store.catalog)
        events = Events(store.catalog, watcher, SETTINGS.events, tenant_id="acme", actor="we")
        with Neighbour(root) as neighbour:
            wait_id = neighbour.ask("subscribe", "run-1", "a", "paid", "key")[0]
            events.emit("paid", "in time", "key")
        with Neighbour(root) as neighbour:
            assert neighbour.ask("claim", wait_id) is True
        claimed = events.wait("paid", "key", run="run-1", step="a")
        assert claimed.payload == "in time"
        watcher.close()


# --- its own end


def test_closing_rings_for_all_and_ends_the_thread(store: Store, watcher: Watcher) -> None:
    others = threads()
    one, commits = Bell(), Bell()
    watcher.watch(wait(store, "a").subscription_id, one)
    watcher.watch_commits(commits)
    (thread,) = threads() - others
    watcher.close()
    watcher.close()
    assert not thread.is_alive()
    one.heard()
    commits.heard()
    with pytest.raises(CatalogClosed):
        watcher.watch("a", one)
    with pytest.raises(CatalogClosed):
        watcher.watch_all(lambda _: None)
    with pytest.raises(CatalogClosed):
        watcher.watch_commits(commits)


def test_closing_from_a_ring(store: Store, watcher: Watcher) -> None:
    closed = threading.Event()

    def close() -> None:
        watcher.close()
        closed.set()

    watcher.watch(wait(store, "a").subscription_id, close)
    happens(store)
    assert closed.wait(PATIENCE_S)


def test_a_store_that_closes_first_wakes_all(memory: Path) -> None:
    store = Store.open(memory / "store", SETTINGS, clock=SystemClock())
    watcher = Watcher(store.catalog)
    bell = Bell()
    others = threads()
    watcher.watch(wait(store, "a").subscription_id, bell)
    (thread,) = threads() - others
    store.close()
    bell.heard()
    thread.join(PATIENCE_S)
    # Nobody would be rung any more.
    with pytest.raises(CatalogClosed):
        watcher.watch_commits(bell)
    with pytest.raises(CatalogClosed):
        watcher.watch_all(lambda _: None)
    assert watcher.closed
    watcher.close()
    watcher.close()


def test_a_catalog_that_fails_for_a_moment_is_tried_again(
    store: Store,
    watcher: Watcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("workflows.watcher._AFTER_ERROR_S", 0.01)
    bell = Bell()
    watcher.watch(wait(store, "a").subscription_id, bell)
    failed = threading.Event()
    real = store.catalog.read
    broken = [True] * 3

    def read() -> object:
        if threading.current_thread().name == "watcher" and broken:
            broken.pop()
            failed.set()
            raise OSError("no")
        return real()

    monkeypatch.setattr(store.catalog, "read", read)
    happens(store)
    assert failed.wait(PATIENCE_S)
    bell.heard()
    assert "tries again" in caplog.text


def test_a_read_that_fails_is_made_again_for_who_was_to_be_told(
    store: Store, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All readers' places taken for a moment: what was there before must still be told."""
    before = wait(store, "first")
    happens(store)
    failures = [2]
    time_of = store.catalog.time

    def failing() -> Any:
        if failures[0] and threading.current_thread().name == "watcher":
            failures[0] -= 1
            raise OSError("no place for another reader")
        return time_of()

    monkeypatch.setattr(store.catalog, "time", failing)
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    unwatch = watcher.watch_all(lambda wait: heard.put(wait.subscription_id))
    assert heard.get(timeout=PATIENCE_S) == before.subscription_id
    assert failures == [0]
    unwatch()
