"""What a heartbeat tells of each target: ages that no clock's error reaches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.background import Heartbeat, JobState, TargetState
from cas.clock import HOUR_US, SECOND_US
from cas.config import TargetSettings
from cas.store import Store
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.probe import Profile
from replicator.signs import Signs
from tests.clocks import HandClock


class Ticks:
    """A clock that only goes forward, when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, clock=clock) as store:
        yield store


@pytest.fixture
def link(tmp_path: Path) -> Link:
    place = tmp_path / "far"
    return Link(FolderTarget("far", place), TargetSettings("far", "folder", place), Profile())


def write(store: Store) -> int:
    """One more frame; returns its number."""
    store.files("acme", "ada").put(b"%d" % store.catalog.position().seq, name="n")
    return store.catalog.position().seq


def state(signs: Signs) -> TargetState:
    (found,) = signs.states()
    return found


def test_metadata_is_behind_from_the_first_frame_that_is_not_there(
    store: Store, link: Link, ticks: Ticks
) -> None:
    signs = Signs(store, [link], None, now_s=ticks)
    link.shipped_seq = store.catalog.position().seq
    assert state(signs).behind_us == 0
    ticks.now += 10_000  # an idle store is not behind, however old its last frame is
    first = write(store)
    assert state(signs).behind_us == 1
    ticks.now += 7
    second = write(store)
    assert state(signs).behind_us == 7 * SECOND_US
    link.shipped_seq = first
    state(signs)  # which finds `second` lacking, since now
    ticks.now += 3
    assert state(signs).behind_us == 3 * SECOND_US
    link.shipped_seq = second
    assert state(signs).behind_us == 0


def test_a_canary_that_never_came_back_counts_from_the_start(
    store: Store, link: Link, ticks: Ticks
) -> None:
    signs = Signs(store, [link], None, now_s=ticks)
    ticks.now += 90
    found = state(signs)
    assert (found.canary_us, found.canary_worked) == (90 * SECOND_US, False)
    link.canary_at_s = ticks.now - 5
    found = state(signs)
    assert (found.canary_us, found.canary_worked) == (5 * SECOND_US, True)


def test_a_process_that_is_started_again_and_again_does_not_look_well(
    store: Store, link: Link, ticks: Ticks, clock: HandClock
) -> None:
    before = TargetState(
        "far",
        link.target.place,
        probed=True,
        behind_us=HOUR_US,
        canary_us=2 * HOUR_US,
        canary_worked=True,
    )
    beat = Heartbeat(1, 0, clock.now_us() - HOUR_US, [], [before])
    write(store)
    found = state(Signs(store, [link], beat, now_s=ticks))
    assert (found.behind_us, found.canary_us) == (2 * HOUR_US, 3 * HOUR_US)
    assert found.canary_worked


def test_a_clock_that_jumps_neither_hides_a_stall_nor_makes_one(
    store: Store, link: Link, ticks: Ticks, clock: HandClock
) -> None:
    signs = Signs(store, [link], None, now_s=ticks)
    link.canary_at_s = ticks.now
    for jump_us in (87_600 * HOUR_US, -2 * 87_600 * HOUR_US):
        clock.advance(jump_us)
        assert state(signs).canary_us == 0


def test_what_failed_on_its_account_is_told_where_no_copy_did(store: Store, link: Link) -> None:
    signs = Signs(store, [link], None)
    jobs = [
        JobState("ship far", 1.0, failures=1, last_error="no HEAD"),
        JobState("reach far", 1.0, failures=0, last_error="long ago"),
        JobState("ship near", 1.0, failures=1, last_error="another's"),
    ]
    assert signs.states(jobs)[0].last_error == "no HEAD"
    link.last_error = "a copy's"
    assert signs.states(jobs)[0].last_error == "a copy's"


def test_a_fence_that_was_not_asked_yet_is_none(store: Store, link: Link) -> None:
    signs = Signs(store, [link], None)
    assert state(signs).fenced == ""
    link.fenced = "another node ships"
    assert state(signs).fenced == "another node ships"
