"""How far targets have come: what counts as stalled, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cas.background import Background, Heartbeat, TargetState
from cas.clock import HOUR_US, SECOND_US
from cas.config import ReplicatorSettings, Settings, StoreSettings, TargetSettings
from cas.mirrored import Mirrored, mirrored_of, shown_age
from cas.records import Replica
from cas.replicas import Done, Failed, due, register, settle
from cas.store import Store
from tests.clocks import HandClock

PLACE = "folder /far"
WELL = TargetState("far", PLACE, probed=True, canary_worked=True, rows_per_s=2.0, bytes_per_s=4.0)


def background(*states: TargetState, silent_us: int = 0) -> Background:
    return Background(True, silent_us, Heartbeat(1, 0, 0, [], list(states)))


@pytest.fixture
def settings(root: Path) -> Settings:
    far = TargetSettings("far", "folder", root.parent / "far")
    return Settings(
        store=StoreSettings(root=root),
        replicator=ReplicatorSettings(targets=("far",)),
        targets=(far,),
    )


def with_backlog(store: Store, files: int) -> None:
    register(store.catalog, [("far", PLACE)])
    for number in range(files):
        store.files("acme", "ada").put(b"%d" % number, name=f"n{number}")


def rows(store: Store) -> list[Replica]:
    with store.catalog.read() as snapshot:
        return due(snapshot, "far", store.now_us(snapshot))


def only(found: list[Mirrored]) -> Mirrored:
    (mirrored,) = found
    return mirrored


def test_a_target_that_nobody_has_met_is_told_and_not_hidden(
    root: Path, settings: Settings
) -> None:
    with Store.open(root, settings) as store:
        target = only(mirrored_of(store, background()))
    assert (target.name, target.place, target.state, target.stalled) == ("far", "", None, ())


def test_the_backlog_is_what_waits_and_is_caught_up_at_the_rate_there_is(
    root: Path, settings: Settings, clock: HandClock
) -> None:
    with Store.open(root, settings, clock=clock) as store:
        with_backlog(store, 3)
        clock.advance(60 * SECOND_US)
        target = only(mirrored_of(store, background(WELL)))
        assert (target.backlog.rows, target.backlog.size_bytes) == (3, 3)
        assert target.backlog.oldest_us == 60 * SECOND_US
        assert target.catch_up_s == 1.5
        assert only(mirrored_of(store, background())).catch_up_s is None
        settle(store.catalog, [Done(row) for row in rows(store)])
        target = only(mirrored_of(store, background(WELL)))
        assert (target.backlog.rows, target.backlog.oldest_us, target.catch_up_s) == (0, 0, 0.0)


def test_a_target_stalls_by_its_oldest_copy_whoever_says_all_is_well(
    root: Path, settings: Settings, clock: HandClock
) -> None:
    with Store.open(root, settings, clock=clock) as store:
        with_backlog(store, 1)
        clock.advance(HOUR_US)
        assert only(mirrored_of(store, background(WELL))).stalled == ()
        clock.advance(SECOND_US)
        (why,) = only(mirrored_of(store, background(WELL))).stalled
        assert why == "target far is stalled: 1 copy waits, the oldest for 60 min"
        assert only(mirrored_of(store, background())).stalled == (why,)


def test_a_copy_that_is_refused_for_good_says_so_though_all_others_succeed(
    root: Path, settings: Settings, clock: HandClock
) -> None:
    with Store.open(root, settings, clock=clock) as store:
        with_backlog(store, 1)
        (bad,) = rows(store)
        settle(store.catalog, [Failed(bad, "EntityTooLarge", clock.now_us() + HOUR_US)])
        clock.advance(HOUR_US + SECOND_US)
        with_backlog(store, 2)
        (why,) = only(mirrored_of(store, background(WELL))).stalled
        assert why.endswith(f"the oldest for 60 min, {bad.digest.hex()}: EntityTooLarge")
        down = msgspec.structs.replace(WELL, down="nobody answers")
        (why,) = only(mirrored_of(store, background(down))).stalled
        assert why.endswith(": nobody answers")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"behind_us": HOUR_US + 1}, "its metadata is 60 min behind"),
        ({"canary_us": HOUR_US + 1}, "no canary came back for 60 min"),
        ({"canary_us": HOUR_US + 1, "canary_error": "changed"}, "60 min: changed"),
        ({"behind_us": HOUR_US + 1, "down": "no answer"}, "behind: no answer"),
        ({"fenced": "another node ships"}, "gets nothing from here: another node ships"),
    ],
)
def test_each_age_alone_is_enough(
    root: Path, settings: Settings, change: dict[str, int | str], words: str
) -> None:
    state = TargetState(**{"name": "far", "place": PLACE, "probed": True, **change})  # type: ignore[arg-type]
    with Store.open(root, settings) as store:
        (why,) = only(mirrored_of(store, background(state))).stalled
    assert words in why


def test_between_two_canaries_the_last_one_may_be_as_old_as_their_interval(
    root: Path, settings: Settings
) -> None:
    rare = Settings(
        store=settings.store,
        replicator=ReplicatorSettings(targets=("far",), canary_every=settings.store.grace),
        targets=settings.targets,
    )
    state = TargetState("far", PLACE, probed=True, canary_us=HOUR_US * 5)
    with Store.open(root, rare) as store:
        assert only(mirrored_of(store, background(state))).stalled == ()


def test_ages_go_on_while_the_process_says_nothing(root: Path, settings: Settings) -> None:
    state = TargetState("far", PLACE, probed=True, canary_us=HOUR_US, behind_us=HOUR_US)
    with Store.open(root, settings) as store:
        found = only(mirrored_of(store, background(state, silent_us=SECOND_US)))
    assert len(found.stalled) == 2


@pytest.mark.parametrize(
    ("age_us", "shown"),
    [(0, "0 s"), (119 * SECOND_US, "119 s"), (HOUR_US, "60 min"), (47 * HOUR_US, "47 h")],
)
def test_ages_are_told_as_people_tell_them(age_us: int, shown: str) -> None:
    tell: Callable[[int], str] = shown_age
    assert tell(age_us) == shown
