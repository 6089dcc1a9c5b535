"""The drill: what it proves, when it is due, and how it ends."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import pytest
from click.testing import CliRunner

from cas.cli import main
from cas.config import ReplicatorSettings, Settings
from cas.replicas import register
from cas.restored import drilled, last_drill
from replicator.bandwidth import SendingStopped
from replicator.drilling import Drill, DrillFailed, DrillUnderWay, drill
from replicator.gathering import HistoryBroken
from replicator.loop import Loop
from replicator.targets import HEAD, OBJECTS, object_key
from tests.clocks import HandClock
from tests.replicator.shippers import (
    NAME,
    Shipping,
    contents,
    filled,
    folder_target,
    shipping,
)

_WEEK_S = 7 * 86_400.0


@final
class Watched:
    """A target that calls a test before it opens an object, and passes all else on."""

    def __init__(self, place: Path, before: Callable[[str], None]) -> None:
        self._target = folder_target(place)
        self._before = before

    def get(self, key: str, **more: Any) -> Any:
        self._before(key)
        return self._target.get(key, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


@final
class Hours:
    """A monotonic clock that a test moves, together with the other one."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self._s = 1000.0

    def __call__(self) -> float:
        return self._s

    def advance(self, hours: float) -> None:
        self._s += hours * 3600
        self._clock.advance(int(hours * 3_600_000_000))


def last(node: Shipping) -> str | None:
    with node.catalog.read() as snapshot:
        return last_drill(snapshot, NAME)


def step(job: Drill, node: Shipping) -> None:
    """What the loop does at each look."""
    with node.catalog.read() as snapshot:
        now_us = node.store.now_us(snapshot)
    assert asyncio.run(job.step(now_us)) is False


def every(seconds: float) -> Settings:
    return Settings(replicator=ReplicatorSettings(drill_every=int(seconds * 1_000_000)))  # type: ignore[arg-type]


# --- what it proves


def test_a_drill_succeeds_and_leaves_nothing_but_its_mark(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        promised = filled(node)
        node.ship_all()
        before = contents(place)
        made = drill(node.store, node.target)
        assert made.files == len(promised)
        assert made.blobs > 0
        assert contents(place) == before
        assert not (root / "drill").exists()
        assert last(node) is not None


def test_a_drill_fails_where_bytes_are_missing_or_wrong(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        file = node.put(b"one")
        node.ship_all()
        path = place / object_key(file.checksum_sha256)
        path.write_bytes(b"One")
        with pytest.raises(DrillFailed, match="other bytes"):
            drill(node.store, node.target)
        path.unlink()
        with pytest.raises(DrillFailed, match="lacks"):
            drill(node.store, node.target)
        assert last(node) is None


def test_a_drill_fails_where_the_history_is_broken(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        for path in (place / "journal").rglob("*.log"):
            path.unlink()
        with pytest.raises(HistoryBroken):
            drill(node.store, node.target)


def test_a_drill_with_one_target_says_nothing_of_another(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        drilled(node.catalog, "other", "2026-01-01T00:00:00Z", actor="test")
        assert last(node) is None


# --- one at a time


def test_two_drills_at_once_do_not_spoil_each_other(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        refused: list[str] = []

        def meanwhile(key: str) -> None:
            if key != HEAD and not refused:
                with pytest.raises(DrillUnderWay) as second:
                    drill(node.store, folder_target(place))
                refused.append(str(second.value))

        target: Any = Watched(place, meanwhile)
        drill(node.store, target)
        assert refused == ["another drill is under way on this store"]
        assert not (root / "drill").exists()


def test_what_a_killed_drill_left_is_no_hindrance(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        left = root / "drill" / "work" / "catalog"
        left.mkdir(parents=True)
        (left / "rubbish").write_bytes(b"x")
        drill(node.store, node.target)
        assert not (root / "drill").exists()


# --- when it is due


def test_a_drill_is_due_a_while_after_the_start_and_then_once_an_interval(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock, settings=every(_WEEK_S)) as node:
        node.put(b"one")
        node.ship_all()
        node.link.fenced = ""
        hours = Hours(clock)
        job = Drill(node.store, node.link, now_s=hours)
        step(job, node)
        assert last(node) is None  # the start is busy enough
        hours.advance(1)
        step(job, node)
        first = last(node)
        assert first is not None
        for _ in range(5 * 24):
            hours.advance(1)
            step(job, node)
        assert last(node) == first
        for _ in range(2 * 24):
            hours.advance(1)
            step(job, node)
        assert last(node) != first


def test_a_process_that_is_started_every_day_does_its_drills(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock, settings=every(_WEEK_S)) as node:
        node.put(b"one")
        node.ship_all()
        node.link.fenced = ""
        hours = Hours(clock)
        times = set()
        for _ in range(16):
            job = Drill(node.store, node.link, now_s=hours)
            for _ in range(8):
                step(job, node)
                hours.advance(1)
            times.add(last(node))
            hours.advance(16)
        assert len(times) == 3


def test_a_drill_that_fails_is_not_repeated_before_a_day_is_over(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock, settings=every(_WEEK_S)) as node:
        node.put(b"one")
        node.ship_all()
        node.link.fenced = ""
        tried: list[float] = []
        hours = Hours(clock)

        def count(key: str) -> None:
            if key == HEAD:
                tried.append(hours())

        for path in (place / "journal").rglob("*.log"):
            path.unlink()
        node.link.target = Watched(place, count)
        job = Drill(node.store, node.link, now_s=hours)
        for _ in range(50):
            try:
                step(job, node)
            except DrillFailed:
                pass
            hours.advance(1)
        assert [round((later - tried[0]) / 3600) for later in tried] == [0, 24, 48]


# --- how it ends


@pytest.mark.parametrize("what", [OBJECTS, "journal/"])
def test_a_stop_ends_a_drill_in_the_middle(
    root: Path, place: Path, clock: HandClock, what: str
) -> None:
    with shipping(root, place, clock) as node:
        for number in range(20):
            node.put(b"%d" % number)
        node.ship_all()
        stop = threading.Event()
        read: list[str] = []

        def stop_there(key: str) -> None:
            read.append(key)
            if key.startswith(what):
                stop.set()

        target: Any = Watched(place, stop_there)
        with pytest.raises(SendingStopped):
            drill(node.store, target, stop=stop)
        assert read[-1].startswith(what)
        assert sum(key.startswith(what) for key in read) == 1
        assert last(node) is None
        assert not (root / "drill").exists()


def test_a_loop_that_is_told_to_stop_ends_its_drill(
    root: Path, place: Path, clock: HandClock
) -> None:
    async def story(node: Shipping) -> None:
        stop = asyncio.Event()
        running = asyncio.get_running_loop()
        told = threading.Event()
        read: list[str] = []

        def stop_the_loop(key: str) -> None:
            if key.startswith(OBJECTS):
                read.append(key)
                running.call_soon_threadsafe(stop.set)
                assert told.wait(60)

        node.link.target = Watched(place, stop_the_loop)
        job = Drill(node.store, node.link, now_s=iter(range(0, 10**9, 10_000)).__next__)
        job.interval_s = 0.0
        tell = job.stop

        def stopped() -> None:
            tell()
            told.set()

        job.stop = stopped  # type: ignore[method-assign]
        await Loop([job], clock.now_us).run(stop)
        assert told.is_set()
        assert len(read) == 1

    with shipping(root, place, clock) as node:
        for number in range(20):
            node.put(b"%d" % number)
        node.ship_all()
        node.link.fenced = ""
        asyncio.run(story(node))


# --- told to people


def test_the_status_tells_of_the_last_drill_with_each_target(
    root: Path, place: Path, clock: HandClock, tmp_path: Path
) -> None:
    ini = tmp_path / "config.ini"
    ini.write_text(
        "[replicator]\ntargets = away, second\n"
        f"[target:away]\nkind = folder\npath = {place}\n"
        f"[target:second]\nkind = folder\npath = {tmp_path / 'second'}\n"
    )
    with shipping(root, place, clock) as node:
        register(node.catalog, [(NAME, node.target.place), ("second", "folder second")])
        node.put(b"one")
        node.ship_all()
    runner, common = CliRunner(), ["--config", str(ini), "--root", str(root), "--json"]
    done = runner.invoke(main, ["restore", "--drill", "--from", "away", *common])
    assert done.exit_code == 0, done.output
    told = json.loads(runner.invoke(main, ["replicate", "status", *common]).stdout)
    drills = {target["name"]: target["last_successful_drill"] for target in told["targets"]}
    assert drills["second"] is None
    assert drills["away"].startswith("20")
