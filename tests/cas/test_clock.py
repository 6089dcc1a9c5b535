"""Catalog time never goes back, and believes no wild clock (invariant 10)."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.clock import DAY_US, SLACK_US, Reading, SystemClock, advance, believable, read, rfc3339
from tests.clocks import HandClock

GAP_US = 30 * DAY_US
times = st.integers(0, 1 << 55)


@given(times, times, st.booleans())
def test_time_never_goes_back(now_us: int, last_us: int, trusted: bool) -> None:
    after = advance(HandClock(now_us, trusted), last_us, GAP_US)
    assert after >= last_us
    assert after in (now_us, last_us)


@pytest.mark.parametrize(
    ("now_us", "last_us", "trusted", "after"),
    [
        (100 * DAY_US, 0, False, 100 * DAY_US),  # the first reading of all
        (100 * DAY_US, 99 * DAY_US, False, 100 * DAY_US),
        (100 * DAY_US, 101 * DAY_US, False, 101 * DAY_US),  # behind: time stands still
        (100 * DAY_US, 101 * DAY_US, True, 101 * DAY_US),
        (131 * DAY_US, 101 * DAY_US, False, 131 * DAY_US),
        (131 * DAY_US + 1, 101 * DAY_US, False, 101 * DAY_US),  # far ahead, and nobody vouches
        (131 * DAY_US + 1, 101 * DAY_US, True, 131 * DAY_US + 1),
    ],
)
def test_time_goes_on_when_the_clock_is_believable(
    now_us: int, last_us: int, trusted: bool, after: int
) -> None:
    assert advance(HandClock(now_us, trusted), last_us, GAP_US) == after


@pytest.mark.parametrize(
    ("behind_us", "trusted", "believed"),
    [(0, False, True), (SLACK_US, False, True), (SLACK_US + 1, False, False), (DAY_US, True, True)],
)
def test_terms_are_counted_from_a_time_that_is_right_or_too_late_at_worst(
    behind_us: int, trusted: bool, believed: bool
) -> None:
    last_us = 100 * DAY_US
    reading = read(HandClock(last_us - behind_us, trusted), last_us, GAP_US)
    assert reading == Reading(last_us, believed)


@given(times, times)
def test_what_is_believed_unsynchronised_is_believed_synchronised(
    now_us: int, last_us: int
) -> None:
    if believable(now_us, last_us, GAP_US, synchronised=False):
        assert believable(now_us, last_us, GAP_US, synchronised=True)


def test_the_system_clock_is_the_systems() -> None:
    clock = SystemClock()
    before = time.time_ns() // 1000
    assert before <= clock.now_us() <= time.time_ns() // 1000
    assert clock.synchronised() in (True, False)


def test_times_are_shown_as_rfc_3339() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00Z"
    assert rfc3339(20_454 * DAY_US + 1_999_999) == "2026-01-01T00:00:01Z"
