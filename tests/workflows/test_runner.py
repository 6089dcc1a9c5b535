"""A runner for some runs alone, as a command line has one: it touches no others, and makes way."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from highway_dsl import WorkflowBuilder

from cas.alone import is_held
from cas.records import COMPLETED, QUEUED, RUNNING, WAITING
from cas.runner import FOR_ALL, PLACE
from tests.workflows.running import DEADLINE_S, Bench, bench, until
from workflows.engine.database import FILE
from workflows.engine.runner import FOLDER, Runner
from workflows.tools import Calling

HOLD_US = 3_600_000_000


@pytest.fixture
def made(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.05)
    monkeypatch.setattr("workflows.engine.runner._PLACE_POLL_S", 0.01)
    with bench(root) as opened:
        yield opened


def saying(*words: str) -> WorkflowBuilder:
    """One step for each word, one after the other."""
    builder = WorkflowBuilder(name="says")
    for word in words:
        builder.task(word, "t.say", kwargs={"what": word})
    return builder


def waiting(name: str) -> WorkflowBuilder:
    builder = WorkflowBuilder(name="waits")
    builder.task("wait", "t.wait", kwargs={"name": name})
    builder.task("then", "t.say", kwargs={"what": name})
    return builder


@contextmanager
def only(
    made: Bench, *runs: str, say: Callable[[str], None] = lambda told: None
) -> Iterator[tuple[Runner, threading.Thread]]:
    """A runner for these alone, and the thread that it is in."""
    runner = Runner(made.store, made.workflows, registry=made.registry, only=runs, say=say)
    thread = threading.Thread(target=runner.run, name="some")
    thread.start()
    try:
        yield runner, thread
    finally:
        runner.stop()
        thread.join()


def status(made: Bench, run: str) -> str:
    return made.view(run).run.status


def holding(made: Bench) -> tuple[threading.Event, threading.Event]:
    """A tool `t.hold`: what it sets when it is called, and what it ends at."""
    begun, go = threading.Event(), threading.Event()

    def hold(calling: Calling) -> str:
        made.calls["hold"] += 1
        begun.set()
        assert go.wait(DEADLINE_S)
        return "held"

    made.registry.add("t.hold", hold)
    return begun, go


def held() -> WorkflowBuilder:
    builder = WorkflowBuilder(name="holds")
    builder.task("hold", "t.hold")
    builder.task("then", "t.say", kwargs={"what": "after"})
    return builder


def queued(made: Bench, run: str) -> int:
    """How many messages of a run the engine has still to handle."""
    with closing(sqlite3.connect(made.store.root / FOLDER / FILE)) as connection:
        (count,) = connection.execute(
            "SELECT count(*) FROM queue_messages JOIN pipeline_executions execution "
            "ON execution.id = json_extract(payload, '$.execution_id') WHERE application = ?",
            (run,),
        ).fetchone()
    return int(count)


def test_what_is_open_beside_it_stays_as_it_is(
    made: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New, given what it waits for, or cut off in a step: for the next runner of all."""
    begun, go = holding(made)
    monkeypatch.setattr("workflows.engine.runner._STOP_S", 0.0)
    made.start()
    given, cut = made.submit(waiting("given")), made.submit(held())
    made.until_status(given, "wait", WAITING)
    assert begun.wait(DEADLINE_S)
    made.stop()  # which leaves the call of the tool
    try:
        new = made.submit(saying("new"))
        mine = made.submit(saying("one", "two"))
        with only(made, mine):
            until(lambda: status(made, mine) == COMPLETED, "the end of its own")
            made.events.emit("given", "{}")  # rings at whoever carries it out
            later = made.submit(saying("later"))
        # The cut off step was due before anything of its own.
        assert queued(made, cut)
        assert made.calls == {"one": 1, "two": 1, "hold": 1}
        assert [status(made, run) for run in (new, later)] == [QUEUED, QUEUED]
        assert status(made, cut) == RUNNING
    finally:
        go.set()
    made.start()
    for run in (given, cut, new, later):
        assert made.ended(run).run.status == COMPLETED
    assert {made.calls[word] for word in ("given", "after", "new", "later")} == {1}


def test_it_answers_for_its_own_runs_alone(made: Bench) -> None:
    """Nothing is rung for that sleeps in another run, whose event has come meanwhile."""
    made.start()
    other = made.submit(waiting("never"))
    made.until_status(other, "wait", WAITING)
    made.stop()
    mine = made.submit(waiting("mine"))
    with only(made, mine) as (runner, _):
        made.until_status(mine, "wait", WAITING)
        assert runner._steps.database.runs() == {mine}
        made.events.emit("never", "{}", hold_us=HOLD_US)
        made.events.emit("mine", "{}", hold_us=HOLD_US)
        until(lambda: status(made, mine) == COMPLETED, "the end of its own")
    assert made.calls == {"mine": 1}
    assert status(made, other) == WAITING
    made.start()
    assert made.ended(other).run.status == COMPLETED


def test_it_makes_way_for_a_runner_of_all_when_its_steps_have_ended(made: Bench) -> None:
    begun, go = holding(made)
    mine = made.submit(held())
    told: list[str] = []
    try:
        with only(made, mine) as (runner, thread):
            assert begun.wait(DEADLINE_S)
            other = made.submit(saying("other"))
            made.start(told.append)
            until(lambda: runner._steps.database._processor.is_stopping, "that it rests")
            assert thread.is_alive()
            assert made.calls == {"hold": 1}
            assert [line.startswith("Waiting: another runner") for line in told] == [True]
            go.set()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
            assert runner.left == 0
            for run in (mine, other):
                assert made.ended(run).run.status == COMPLETED
    finally:
        go.set()
    assert made.calls == {"hold": 1, "after": 1, "other": 1}


def test_it_does_not_begin_where_a_runner_of_all_is_there(made: Bench) -> None:
    made.start()
    until(lambda: is_held(made.store.root / PLACE), "its place")
    told: list[str] = []
    with only(made, made.submit(waiting("x")), say=told.append) as (_, thread):
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert told == []


def test_a_second_one_waits_and_says_so(made: Bench) -> None:
    first, second = made.submit(waiting("first")), made.submit(saying("second"))
    told: list[str] = []
    with only(made, first):
        made.until_status(first, "wait", WAITING)
        assert not is_held(made.store.root / FOR_ALL)
        with only(made, second, say=told.append):
            until(lambda: bool(told), "that it waits")
            assert "another command" in told[0]
            assert "`blobcask workflow serve` would carry out all" in told[0]
            assert status(made, second) == QUEUED
    with only(made, second, first):
        until(lambda: status(made, second) == COMPLETED, "the end of the second")
