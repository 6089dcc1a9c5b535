"""Counters that several processes share: exact, bounded, and never in the way."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.strategies import SlidingWindowCounterRateLimiter

from cas.clock import SECOND_US
from gateway import counters
from gateway.counter_folder import CounterFolder
from gateway.counters import RETRY_US, Counters, Key, SharedTable, Window
from tests.clocks import HandClock
from tests.conftest import CHECKOUT

PERIOD_S = 60
PERIOD_US = PERIOD_S * SECOND_US


@pytest.fixture
def shared(root: Path, clock: HandClock) -> SharedTable:
    return SharedTable(root, clock.now_us, entries_max=50)


@pytest.fixture
def counted(shared: SharedTable, clock: HandClock) -> Counters:
    return Counters(shared, clock.now_us)


def take(counted: Counters, who: str, limit: int = 3, cost: int = 1) -> bool:
    limiter = SlidingWindowCounterRateLimiter(counted)
    return limiter.hit(item("address", limit), who, cost=cost)


def item(whose: str, limit: int) -> RateLimitItemPerSecond:
    return RateLimitItemPerSecond(limit, PERIOD_S, whose)


def key(who: str, limit: int = 3) -> str:
    return item("address", limit).key_for(who)


# --- counting


def test_so_many_pass_and_one_more_does_not(counted: Counters) -> None:
    assert [take(counted, "a") for _ in range(4)] == [True, True, True, False]
    assert take(counted, "b")


def test_a_refusal_counts_for_nothing(counted: Counters, clock: HandClock) -> None:
    for _ in range(100):
        take(counted, "a")
    assert counted.count(key("a"), PERIOD_S) == 3
    clock.advance(2 * PERIOD_US)
    assert take(counted, "a")


def test_what_was_counted_before_weighs_less_the_longer_ago_it_is(
    counted: Counters, clock: HandClock
) -> None:
    assert all(take(counted, "a", 60) for _ in range(60))
    clock.advance(PERIOD_US)
    assert not take(counted, "a", 60)
    clock.advance(PERIOD_US // 2)
    assert [take(counted, "a", 60) for _ in range(31)] == [True] * 30 + [False]


def test_the_strategies_of_the_package_read_what_they_wrote(
    counted: Counters, clock: HandClock
) -> None:
    limiter = SlidingWindowCounterRateLimiter(counted)
    limit = item("tenant", 10)
    assert limiter.hit(limit, "a", cost=9)
    assert limiter.test(limit, "a")
    assert not limiter.test(limit, "a", cost=2)
    assert limiter.get_window_stats(limit, "a").remaining == 1
    clock.advance(PERIOD_US + PERIOD_US // 2)
    assert limiter.get_window_stats(limit, "a").remaining == 6
    limiter.clear(limit, "a")
    assert limiter.get_window_stats(limit, "a").remaining == 10


def test_what_is_charged_counts_beyond_the_limit_and_can_be_given_back(
    counted: Counters, clock: HandClock
) -> None:
    counted.charge(key("a"), PERIOD_S, 10)
    assert counted.count(key("a"), PERIOD_S) == 10
    counted.charge(key("a"), PERIOD_S, -9)
    assert [take(counted, "a") for _ in range(3)] == [True, True, False]
    clock.advance(PERIOD_US)  # what is given back was taken in the window before
    counted.charge(key("a"), PERIOD_S, -10)
    assert counted.count(key("a"), PERIOD_S) == 0


windows = st.builds(Window, st.just(0), st.integers(0, 2 << 40), st.integers(0, 2 << 40))


@given(windows, st.integers(0, 2 * PERIOD_US), st.integers(1, 1 << 40), st.data())
def test_the_told_wait_is_long_enough_and_not_too_long(
    window: Window, now_us: int, limit: int, data: st.DataObject
) -> None:
    cost = data.draw(st.integers(1, limit))

    def passes(at_us: int) -> bool:
        return window.at(at_us, PERIOD_US).weight(at_us, PERIOD_US) + cost <= limit

    wait_us = window.at(now_us, PERIOD_US).wait_us(now_us, PERIOD_US, limit, cost)
    assert 0 <= wait_us <= 2 * PERIOD_US
    assert passes(now_us + wait_us)
    assert wait_us == 0 or not passes(now_us + wait_us - 1)


# --- several processes


def _take_many(folder: Path, who: str, limit: int, tries: int) -> int:
    counted = Counters(SharedTable(folder, counters.monotonic_us))
    limiter = SlidingWindowCounterRateLimiter(counted)
    daily = RateLimitItemPerSecond(limit, 86_400, "address")
    return sum(limiter.hit(daily, who) for _ in range(tries))


def test_processes_together_take_exactly_the_limit(root: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        took = processes.starmap(_take_many, [(root, "a", 1000, 800)] * 2)
    assert sum(took) == 1000
    assert _take_many(root, "a", 1000, 1) == 0


def test_one_killed_in_the_middle_of_a_step_stops_nobody(root: Path, clock: HandClock) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from gateway.counters import Key, SharedTable\n"
        "def step(window, now_us):\n"
        "    print('held', flush=True); time.sleep(600)\n"
        "SharedTable(Path(sys.argv[1]), lambda: 1).change(Key(b'a', bytes(16), 1), step)\n"
    )
    command = [sys.executable, "-c", code, str(root)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "held\n"
        victim.send_signal(signal.SIGKILL)
    assert take(Counters(SharedTable(root, clock.now_us), clock.now_us), "a")


# --- bounds


def test_what_has_ended_is_removed_as_others_come(
    counted: Counters, shared: SharedTable, clock: HandClock
) -> None:
    for number in range(40):
        take(counted, f"old {number}")
    assert shared.entries() == 40
    clock.advance(2 * PERIOD_US)
    for number in range(10):
        take(counted, f"new {number}")
    assert shared.entries() == 10


def test_one_that_goes_on_is_not_removed_when_its_first_window_has_ended(
    counted: Counters, clock: HandClock
) -> None:
    for _ in range(5):
        clock.advance(PERIOD_US)
        assert all(take(counted, "a", 100) for _ in range(40))
        take(counted, f"at {clock.now_us()}")
    assert counted.count(key("a", 100), PERIOD_S) == 80


def test_a_flood_of_addresses_displaces_the_oldest_of_them_and_no_tenant(
    counted: Counters, shared: SharedTable, clock: HandClock
) -> None:
    limiter = SlidingWindowCounterRateLimiter(counted)
    assert limiter.hit(item("tenant", 1), "a")
    assert limiter.hit(item("everybody", 1), "")
    for number in range(500):
        clock.advance(1)
        take(counted, f"address {number}")
    assert shared.entries() == 50 + 2
    assert counted.count(key("address 449"), PERIOD_S) == 0
    assert counted.count(key("address 450"), PERIOD_S) == 1
    assert not limiter.hit(item("tenant", 1), "a")
    assert not limiter.hit(item("everybody", 1), "")


def test_the_files_stay_small_under_a_flood(
    counted: Counters, root: Path, clock: HandClock
) -> None:
    for number in range(3_000):
        clock.advance(1000)
        take(counted, f"address {number}")
    assert (root / "data.mdb").stat().st_size < 1 << 20


# --- when they fail


def test_a_full_environment_leaves_each_process_its_own_counts(
    root: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counters, "MAP_BYTES", 64 * 1024)
    counted = Counters(SharedTable(root, clock.now_us), clock.now_us)
    with caplog.at_level(logging.ERROR):
        for number in range(2_000):
            assert take(counted, f"address {number}")
    assert [take(counted, "a") for _ in range(4)] == [True, True, True, False]
    assert len(caplog.records) == 1  # not one for each request
    assert "counts for itself" in caplog.text
    assert not counted.check()


def test_a_value_of_another_making_is_survived_and_tried_again(
    shared: SharedTable, counted: Counters, clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    place = Key.of(key("a"), PERIOD_S)
    with shared._env.begin(write=True) as txn:
        txn.put(place.space + b"e" + place.name, b"garbage")
    with caplog.at_level(logging.ERROR):
        assert [take(counted, "a") for _ in range(4)] == [True, True, True, False]
    assert not counted.check()
    clock.advance(RETRY_US)
    assert counted.check()
    assert take(counted, "b")
    assert shared.entries() == 1


def test_a_process_alone_forgets_the_oldest(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "OWN_ENTRIES_MAX", 10)
    alone = Counters(None, clock.now_us)
    for number in range(30):
        assert take(alone, f"address {number}", limit=1)
    assert take(alone, "address 0", limit=1)
    assert not take(alone, "address 29", limit=1)


def test_a_file_that_is_no_environment_is_survived(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "data.mdb").write_bytes(b"not LMDB" * 4096)
    with caplog.at_level(logging.ERROR):
        counted = Counters.open(root)
    assert [take(counted, "a") for _ in range(4)] == [True, True, True, False]
    assert "counts for itself" in caplog.text


# --- where they are


def test_a_server_begins_anew_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    first = CounterFolder(root, tmp_path)
    assert first.path.parent == tmp_path
    assert first.path.stat().st_mode & 0o777 == 0o700
    assert _take_many(first.path, "a", 1, 2) == 1
    os.close(first._lock)  # as when the server is killed
    second = CounterFolder(root, tmp_path)
    assert second.path == first.path
    assert _take_many(second.path, "a", 1, 2) == 1
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_two_servers_of_one_root_count_together(root: Path, tmp_path: Path) -> None:
    first = CounterFolder(root, tmp_path)
    assert _take_many(first.path, "a", 1, 1) == 1
    second = CounterFolder(root, tmp_path)
    first.close()
    assert _take_many(second.path, "a", 1, 1) == 0
    second.close()


@pytest.mark.parametrize("kind", ["file", "link", "open to others"])
def test_a_name_that_somebody_took_is_not_used(root: Path, tmp_path: Path, kind: str) -> None:
    ours = CounterFolder(root, tmp_path)
    ours.close()
    if kind == "file":
        ours.path.write_bytes(b"")
    elif kind == "link":
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(mode=0o700)
        ours.path.symlink_to(elsewhere)
    else:
        ours.path.mkdir()
        ours.path.chmod(0o777)
    again = CounterFolder(root, tmp_path)
    assert again.path == root / "limits"
    again.close()


def test_without_memory_they_are_in_root(root: Path) -> None:
    folder = CounterFolder(root, root / "no such folder")
    assert folder.path == root / "limits"
    folder.close()
    assert not folder.path.exists()
