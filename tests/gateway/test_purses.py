"""What a process takes ahead of the shared counters lets nobody pass too often."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.clock import DAY_US, SECOND_US
from cas.config import LimitSettings, Rate
from gateway import limits
from gateway.counters import Counters, SharedTable
from gateway.errors import TooManyRequests
from gateway.limits import INNOCENT_US, PURSE_US, PURSES_MAX, Guesses, Limit
from tests.clocks import HandClock

AMOUNT, AHEAD = 40, 10


@contextmanager
def two(clock: HandClock, amount: int = AMOUNT) -> Iterator[tuple[Limit, Limit]]:
    """One limit as two processes hold it: purses of their own over one shared table."""
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-") as folder,
        pytest.MonkeyPatch.context() as at,
    ):
        at.setattr(limits, "monotonic_us", clock.now_us)
        table = SharedTable(Path(folder), clock.now_us)
        try:
            one, other = (
                Limit(Counters(table, clock.now_us), "tenant", "bytes", amount, DAY_US, ahead=AHEAD)
                for _ in range(2)
            )
            yield one, other
        finally:
            table.close()


def passes(limit: Limit, cost: int = 1) -> bool:
    try:
        limit.take("a", cost)
    except TooManyRequests:
        return False
    return True


pauses = st.sampled_from([0, 0, 0, 1, PURSE_US // 2, PURSE_US, 3 * PURSE_US])
takings = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 12), pauses), max_size=80)


@given(takings)
def test_never_more_pass_than_the_amount(takings: list[tuple[int, int, int]]) -> None:
    clock = HandClock()
    with two(clock) as processes:
        passed = 0
        for which, cost, pause_us in takings:
            clock.advance(pause_us)
            passed += cost * passes(processes[which], cost)
            assert passed <= processes[0].count("a") <= AMOUNT


@given(st.lists(st.tuples(st.integers(0, 1), pauses), min_size=2 * AMOUNT, max_size=3 * AMOUNT))
def test_nobody_is_refused_more_than_what_is_taken_ahead_too_early(
    takings: list[tuple[int, int]],
) -> None:
    clock = HandClock()
    with two(clock) as processes:
        passed = 0
        for which, pause_us in takings:
            clock.advance(pause_us)
            if passes(processes[which]):
                passed += 1
            else:
                assert passed >= AMOUNT - AHEAD


def test_who_comes_to_one_process_has_the_whole_amount(clock: HandClock) -> None:
    with two(clock) as (one, _):
        assert [passes(one) for _ in range(AMOUNT + 1)] == [True] * AMOUNT + [False]


def test_what_was_taken_ahead_and_not_spent_is_given_back(clock: HandClock) -> None:
    with two(clock) as (one, other):
        assert passes(one)
        assert passes(one)  # the second within a second takes ahead
        assert one.count("a") == 2 + AHEAD
        assert passes(one)
        assert one.count("a") == 2 + AHEAD  # and the third is paid from it
        clock.advance(PURSE_US - 1)
        assert passes(one)
        clock.advance(1)
        assert passes(one)
        assert other.count("a") == 5
        clock.advance(PURSE_US)
        assert all(passes(other) for _ in range(AMOUNT - 5))
        assert not passes(other)


def test_the_first_in_a_while_takes_nothing_ahead(clock: HandClock) -> None:
    with two(clock) as (one, _):
        for number in range(1, 4):
            assert passes(one)
            assert one.count("a") == number
            clock.advance(PURSE_US)


def test_a_flood_of_names_keeps_no_more_purses_than_there_may_be(clock: HandClock) -> None:
    with two(clock) as (one, _):
        passes(one), passes(one)
        counted = one.count("a")
        for number in range(PURSES_MAX):
            one._purses[f"{number}"] = limits.Purse(clock.now_us() + PURSE_US)
        one.take("another")
        assert len(one._purses) == 1
        # What was in the purses that went stays counted: the safe side.
        assert passes(one)
        assert one.count("a") == counted + 1


# --- who has not guessed is not looked up each time


def guessing(clock: HandClock, counters: Counters) -> Guesses:
    each, everybody = Rate(3, 60 * SECOND_US), Rate(100, 60 * SECOND_US)
    return Guesses(counters, LimitSettings(guesses=each, all_guesses=everybody))


def test_an_innocent_address_is_believed_for_a_moment_and_then_looked_at(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "monotonic_us", clock.now_us)
    counters = Counters(None, clock.now_us)
    one, other = guessing(clock, counters), guessing(clock, counters)  # two processes
    one.refuse("a")
    for _ in range(3):
        other.note("a")
    with pytest.raises(TooManyRequests):
        other.refuse("a")
    clock.advance(INNOCENT_US - 1)
    one.refuse("a")  # not yet told
    clock.advance(1)
    with pytest.raises(TooManyRequests):
        one.refuse("a")
    one.refuse("b")


def test_the_first_guess_ends_the_belief_at_once(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "monotonic_us", clock.now_us)
    guesses = guessing(clock, Counters(None, clock.now_us))
    for _ in range(3):
        guesses.refuse("a")
        guesses.note("a")
    with pytest.raises(TooManyRequests):
        guesses.refuse("a")


def test_a_flood_of_innocents_is_forgotten_in_time(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "monotonic_us", clock.now_us)
    guesses = guessing(clock, Counters(None, clock.now_us))
    for number in range(PURSES_MAX + 10):
        guesses.refuse(f"{number}")
    assert len(guesses._innocent_until_us) == 10
