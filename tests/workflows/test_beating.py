"""The runner's sign of life: how it is told, and what others make of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from highway_dsl import WorkflowBuilder

from cas.alone import Alone
from cas.beats import SILENT_US_MAX, last_beat, write_beat
from cas.catalog import Transaction
from cas.clock import SECOND_US
from cas.records import QUEUED, RUNNING, WAITING, Mark
from cas.restored import RESTORED_TIME, accept
from cas.runner import PLACE, STATUS, RunnerBeat, RunnerState, runner_of
from cas.store import Store
from tests.clocks import HandClock
from tests.workflows.running import Bench, bench, until
from workflows.engine.beating import AtWork, Beating
from workflows.engine.runner import Runner
from workflows.tools import Calling

NONE_RUNS = ["no runner runs: workflows wait"]


@pytest.fixture
def made(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench whose runner beats at each turn of its loop."""
    monkeypatch.setattr("workflows.engine.beating.BEAT_S", 0.0)
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.05)
    with bench(root) as opened:
        yield opened


def flow(tool: str, **kwargs: Any) -> WorkflowBuilder:
    builder = WorkflowBuilder(name="one")
    builder.task("one", tool, kwargs=kwargs)
    return builder


@contextmanager
def held(store: Store, beat: RunnerBeat) -> Iterator[None]:
    """As if a runner had the place, and had told this."""
    alone = Alone(store.root / PLACE)
    try:
        assert alone.take()
        write_beat(store.root / STATUS, beat)
        yield
    finally:
        alone.close()


def beat_of(store: Store) -> RunnerBeat:
    state = runner_of(store)
    return state.beat or RunnerBeat(0, 0, 0)


# --- what is told


def test_steps_at_work_are_counted_with_the_age_of_the_oldest() -> None:
    now_s = 0.0
    at_work = AtWork(lambda: now_s)
    assert at_work.told() == (0, 0)
    with at_work.one():
        now_s = 2.0
        with at_work.one():
            now_s = 5.0
            assert at_work.told() == (2, 5 * SECOND_US)
        second = at_work.one()
        with second:
            assert at_work.told() == (2, 5 * SECOND_US)
        assert at_work.told() == (1, 5 * SECOND_US)
    with pytest.raises(OSError, match="no"), at_work.one():
        raise OSError("no")
    assert at_work.told() == (0, 0)


def test_steps_at_work_are_counted_by_run() -> None:
    at_work = AtWork()
    with at_work.one("a"), at_work.one("b"), at_work.one("a"):
        assert (at_work.of("a"), at_work.of("b"), at_work.of("c")) == (2, 1, 0)
    assert at_work.of("a") == 0


def test_a_beat_is_written_when_it_is_due(root: Path, clock: HandClock) -> None:
    now_s = 0.0
    with Store.open(root, clock=clock) as store:
        late = 0
        beating = Beating(store, AtWork(lambda: now_s), lambda: now_s, lambda: late)
        began_us = clock.now_us()
        beating.beat(waits=True)
        first = RunnerBeat(os.getpid(), began_us, began_us, waits=True)
        assert beat_of(store) == first
        now_s = 4.9
        beating.beat(3)
        assert beat_of(store) == first
        now_s = 5.0
        clock.advance(5 * SECOND_US)
        beating.failed()
        beating.failed()
        late = 7
        beating.beat(3)
        told = RunnerBeat(os.getpid(), began_us, clock.now_us(), runs=3, failures=2, late=7)
        assert beat_of(store) == told
        now_s = 10.0
        beating.looked()
        beating.beat(3)
        assert (beat_of(store).failures, beat_of(store).only) == (0, None)
        now_s = 15.0
        beating.beat(3, only=2)
        assert beat_of(store).only == 2
        assert not (root / "runner.new").exists()


def test_a_beat_that_cannot_be_written_is_logged_and_no_error(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.open(root) as store:
        (root / "runner.new").mkdir()
        Beating(store, AtWork()).beat()
        assert "no sign of life" in caplog.text
        assert runner_of(store).beat is None


def test_what_a_killed_runner_left_is_written_over(root: Path) -> None:
    beat = RunnerBeat(1, 2, 3)
    path = root / STATUS
    (root / "runner.new").write_text("half")
    write_beat(path, beat)
    assert last_beat(path, RunnerBeat) == beat
    path.write_text("half")
    assert last_beat(path, RunnerBeat) is None


# --- what others make of it


def test_nothing_is_missed_where_no_run_is_open(root: Path) -> None:
    with bench(root) as made:
        assert runner_of(made.store) == RunnerState(
            False, None, None, {QUEUED: 0, RUNNING: 0, WAITING: 0}
        )
        assert runner_of(made.store).trouble() == []
        run = made.submit(flow("t.say"))
        assert runner_of(made.store).open[QUEUED] == 1
        assert runner_of(made.store).trouble() == NONE_RUNS
        made.cancel(run)
        assert runner_of(made.store).trouble() == []


def test_a_runner_that_is_silent_or_fails_is_told(root: Path) -> None:
    with bench(root) as made:
        now_us = made.store.clock.now_us()
        with held(made.store, RunnerBeat(1, 0, now_us - SILENT_US_MAX - 9 * SECOND_US)):
            (told,) = runner_of(made.store).trouble()
            assert told.startswith("the runner is silent for ")
        with held(made.store, RunnerBeat(1, 0, now_us, failures=2)):
            assert runner_of(made.store).trouble() == []
        with held(made.store, RunnerBeat(1, 0, now_us, failures=3)):
            told = "the runner failed 3 times in a row to look for work"
            assert runner_of(made.store).trouble() == [told]


def test_a_runner_for_some_runs_leaves_others_waiting(root: Path) -> None:
    with bench(root) as made:
        now_us = made.store.clock.now_us()
        made.submit(flow("t.say"))
        with held(made.store, RunnerBeat(1, 0, now_us, only=1)):
            assert runner_of(made.store).trouble() == []  # its own
            made.submit(flow("t.say"))
            (told,) = runner_of(made.store).trouble()
            assert told == "only runs that a command line carries out go on: other workflows wait"
            assert runner_of(made.store).for_all is None
        with held(made.store, of_all := RunnerBeat(1, 0, now_us, barred={"t.say": "no"})):
            assert runner_of(made.store).trouble() == []
            assert runner_of(made.store).for_all == of_all
        assert runner_of(made.store).for_all is None


def test_a_runner_that_starts_is_not_silent(root: Path) -> None:
    with bench(root) as made:
        made.submit(flow("t.say"))
        alone = Alone(root / PLACE)
        try:
            assert alone.take()
            assert runner_of(made.store).trouble() == []
        finally:
            alone.close()


# --- the runner


def test_a_runner_tells_what_it_has_taken_up_and_what_is_at_work(made: Bench) -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(calling: Calling) -> None:
        begun.set()
        assert go.wait(60)

    made.registry.add("t.hold", hold)
    made.start()
    try:
        run = made.submit(flow("t.hold"))
        assert begun.wait(60)
        until(lambda: beat_of(made.store).steps == 1, "a beat that tells of the step")
        beat = beat_of(made.store)
        assert (beat.pid, beat.runs, beat.waits) == (os.getpid(), 1, False)
        assert (beat.only, list(beat.barred)) == (None, ["tools.shell.run"])
        assert beat.oldest_step_us > 0
        assert runner_of(made.store).open == {QUEUED: 0, RUNNING: 1, WAITING: 0}
    finally:
        go.set()
    made.ended(run)
    until(lambda: beat_of(made.store).steps == 0 == beat_of(made.store).runs, "a beat without")
    made.stop()
    assert not runner_of(made.store).held
    assert not any(runner_of(made.store).open.values())


def test_a_loop_that_is_stuck_is_silent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its process lives, and does the steps of other runs."""
    stuck, go = threading.Event(), threading.Event()

    def take_up(runner: Runner) -> None:
        stuck.set()
        assert go.wait(60)

    clock = HandClock()
    monkeypatch.setattr("workflows.engine.beating.BEAT_S", 0.0)
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.05)
    monkeypatch.setattr(Runner, "_take_up", take_up)
    with bench(root) as made:
        monkeypatch.setattr(made.store, "clock", clock)
        made.start()
        try:
            assert stuck.wait(60)
            assert runner_of(made.store).trouble() == []
            clock.advance(SILENT_US_MAX + SECOND_US)
            assert runner_of(made.store).trouble() == ["the runner is silent for 61 s"]
        finally:
            go.set()
        until(lambda: runner_of(made.store).trouble() == [], "a sign of life")


def test_a_runner_whose_looks_fail_tells_so(
    made: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def look(runner: Runner, database: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_round", look)
        made.start()
        until(lambda: runner_of(made.store).trouble() != [], "trouble")
        (told,) = runner_of(made.store).trouble()
        assert told.startswith("the runner failed ")
        assert "disk" not in told
    until(lambda: runner_of(made.store).trouble() == [], "that it looks again")


def test_a_restored_store_that_is_not_accepted_is_no_silence(made: Bench) -> None:
    def mark(txn: Transaction) -> None:
        txn.insert(Mark(RESTORED_TIME, "2026-01-01T00:00:00Z"))

    made.store.catalog.write(mark, actor="test")
    made.start()
    until(lambda: beat_of(made.store).waits, "that it waits")
    assert runner_of(made.store).trouble() == []
    run = made.submit(flow("t.say"))
    assert runner_of(made.store).trouble() == [
        "workflows wait until the restored store is accepted"
    ]
    accept(made.store.catalog, actor="test")
    made.ended(run)
    until(lambda: not beat_of(made.store).waits, "that it works")
    assert runner_of(made.store).trouble() == []
