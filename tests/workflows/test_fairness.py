"""Fairness: one tenant's workflows leave places for those of others."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import pytest
from highway_dsl import WorkflowBuilder
from stabilize.queue.messages import Message, RunTask, StartWorkflow, WorkflowLevel

from cas.errors import RunEnded
from cas.records import CANCELLED, COMPLETED, ENDED, Run
from tests.workflows.running import ACTOR, Bench, bench, until
from workflows.definitions import Definition
from workflows.engine.database import _BESIDE, _TABLE, Database, _Queue, _Recovery
from workflows.engine.shares import Shares
from workflows.engine.spots import Execution, Spot
from workflows.engine.stages import Stage
from workflows.engine.steps import Steps
from workflows.runs import Runs
from workflows.tools import Calling

# --- places


@pytest.mark.parametrize(("places", "most"), [(1, 1), (2, 1), (3, 2), (4, 3), (16, 12)])
def test_a_tenant_has_three_quarters_of_the_places_at_most(places: int, most: int) -> None:
    shares = Shares(places)
    for call in range(20):
        shares.wait("a", call)
    assert [shares.next() for _ in range(most + 1)] == [*range(most), None]
    shares.wait("b", 100)
    assert shares.next() == (100 if places > most else None)
    shares.leave(0)
    assert shares.next() == most


def test_places_go_to_who_has_the_fewest_and_to_the_first_of_his() -> None:
    shares = Shares(4)
    for call in range(10):
        shares.wait("a", call)
        shares.wait("b", 10 + call)
    assert [shares.next() for _ in range(5)] == [0, 10, 1, 11, None]
    shares.wait("c", 20)
    shares.wait("c", 21)
    shares.leave(10)
    assert shares.next() == 20
    shares.leave(0)
    assert shares.next() == 2  # as few as the two others, and it waits for longest
    shares.leave(20)
    assert shares.next() == 21


def test_one_place_goes_round() -> None:
    shares = Shares(1)
    given = []
    for tenant, calls in (("a", [1, 2, 3, 4]), ("b", [11, 12]), ("c", [21])):
        for call in calls:
            shares.wait(tenant, call)
    while (call := shares.next()) is not None:  # type: ignore[assignment]
        given.append(call)
        shares.leave(call)
        if call == 2:
            shares.wait("d", 31)
    assert given == [1, 11, 21, 2, 12, 3, 31, 4]


def test_to_leave_twice_gives_no_second_place() -> None:
    shares = Shares(1)
    shares.wait("a", 1)
    shares.wait("a", 2)
    shares.wait("a", 3)
    assert shares.next() == 1
    shares.leave(1)
    shares.leave(1)
    shares.leave(3)
    assert (shares.next(), shares.next()) == (2, None)


# --- runs


@final
class Works:
    """A tool that works until it is let go, and what it was called for."""

    def __init__(self) -> None:
        self.called: list[str] = []  # "<tenant> <what>", in the order of the calls
        self.most: Counter[str] = Counter()  # at once, by tenant
        self._at_work: Counter[str] = Counter()
        self._go: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def __call__(self, calling: Calling, what: Any) -> Any:
        name, tenant = f"{calling.tenant_id} {what}", calling.tenant_id
        with self._lock:
            self.called.append(name)
            self._at_work[tenant] += 1
            self.most[tenant] = max(self.most[tenant], self._at_work[tenant])
            let_go = self._of(name)
        let_go.wait(60)
        with self._lock:
            self._at_work[tenant] -= 1
        return what

    def let_go(self, *names: str) -> None:
        with self._lock:
            for name in names:
                self._of(name).set()

    def _of(self, name: str) -> threading.Event:
        return self._go.setdefault(name, threading.Event())


def runs_of(made: Bench, tenant: str) -> Runs:
    return made.workflows.runs(tenant, ACTOR)


def submit(made: Bench, tenant: str, flow: WorkflowBuilder, **inputs: Any) -> Run:
    return runs_of(made, tenant).submit(Definition.parse(flow.build().to_json()), inputs)


def loop() -> WorkflowBuilder:
    flow = WorkflowBuilder(name="loop")
    flow.foreach("each", "{{whats}}", lambda body: body.task("one", "t.work", args=["{{item}}"]))
    return flow


def names(tenant: str, number: int) -> list[str]:
    return [f"{tenant} {what}" for what in range(number)]


def until_ended(made: Bench, run: Run) -> Run:
    runs = runs_of(made, run.tenant_id)
    until(lambda: runs.get(run.run_id).run.status in ENDED, "the end of a run")
    return runs.get(run.run_id).run


@contextmanager
def working(root: Path, concurrency: int) -> Iterator[tuple[Bench, Works]]:
    with bench(root, concurrency=concurrency) as made:
        works = Works()
        made.registry.add("t.work", works)
        made.start()
        try:
            yield made, works
        finally:
            works.let_go(*(name for tenant in "abc" for name in names(tenant, 100)))


def test_a_long_loop_of_one_tenant_leaves_room_for_the_others(root: Path) -> None:
    with working(root, 4) as (made, works):
        long = submit(made, "a", loop(), whats=list(range(30)))
        until(lambda: len(works.called) == 3)
        works.let_go("b 0", "b 1")
        assert until_ended(made, submit(made, "b", loop(), whats=[0, 1])).status == COMPLETED
        works.let_go(*names("a", 30))
        assert until_ended(made, long).status == COMPLETED
        assert works.most["a"] == 3
        assert Counter(works.called) == Counter([*names("a", 30), *names("b", 2)])


def test_who_comes_last_is_next_where_two_others_have_all_places(root: Path) -> None:
    with working(root, 4) as (made, works):
        submit(made, "a", loop(), whats=list(range(10)))
        until(lambda: len(works.called) == 3)
        submit(made, "b", loop(), whats=list(range(10)))
        until(lambda: len(works.called) == 4)
        last = submit(made, "c", loop(), whats=[0])
        # The step has begun, but for its place: nothing else of the run is left to be done.
        until(lambda: waiting(made) == {"a": 7, "b": 9, "c": 1})
        works.let_go(works.called[0])
        until(lambda: len(works.called) == 5)
        assert works.called[4] == "c 0"
        works.let_go("c 0")
        assert until_ended(made, last).status == COMPLETED


def test_what_calls_no_tool_needs_no_place(root: Path) -> None:
    with working(root, 1) as (made, works):
        submit(made, "a", loop(), whats=[0, 1])
        until(lambda: len(works.called) == 1)
        flow = WorkflowBuilder(name="cheap")
        flow.emit_event("say", "said", payload={"n": 1})
        flow.wait("nap", 0)
        flow.foreach("each", "{{ns}}", lambda body: body.emit_event("each_said", "x{{item}}"))
        assert until_ended(made, submit(made, "b", flow, ns=[1, 2, 3])).status == COMPLETED
        assert len(works.called) == 1


def test_one_place_is_enough_and_tenants_take_turns(root: Path) -> None:
    with working(root, 1) as (made, works):
        first = submit(made, "a", loop(), whats=list(range(4)))
        until(lambda: len(works.called) == 1)
        second = submit(made, "b", loop(), whats=[0])
        until(lambda: waiting(made) == {"a": 3, "b": 1})
        works.let_go(*names("a", 4), *names("b", 1))
        assert until_ended(made, first).status == COMPLETED
        assert until_ended(made, second).status == COMPLETED
        assert works.most == {"a": 1, "b": 1}
        assert [name[0] for name in works.called] == ["a", "a", "b", "a", "a"]
        assert Counter(works.called) == Counter([*names("a", 4), "b 0"])


def test_the_calls_of_a_run_that_ended_leave_the_line(root: Path) -> None:
    with working(root, 1) as (made, works):
        long = submit(made, "a", loop(), whats=list(range(30)))
        until(lambda: waiting(made) == {"a": 29} and bool(works.called))
        runs_of(made, "a").cancel(long.run_id)
        flow = WorkflowBuilder(name="next")
        flow.task("next", "t.work", args=["after"])
        after = submit(made, "a", flow)
        works.let_go(works.called[0], "a after")
        assert until_ended(made, after).status == COMPLETED
        assert until_ended(made, long).status == CANCELLED
        assert works.called[1:] == ["a after"]


def test_calls_that_waited_when_the_runner_stopped_are_made_by_the_next_one(root: Path) -> None:
    with working(root, 1) as (made, works):
        run = submit(made, "a", loop(), whats=list(range(5)))
        until(lambda: waiting(made) == {"a": 4} and bool(works.called))
        stopping = threading.Thread(target=made.stop)
        runner = made._runner
        assert runner is not None
        stopping.start()
        until(lambda: runner._steps.database._processor._stopping)
        works.let_go(works.called[0])
        stopping.join()
        assert len(works.called) == 1
        works.let_go(*names("a", 5))
        made.start()
        assert until_ended(made, run).status == COMPLETED
        assert Counter(works.called) == Counter(names("a", 5))


def waiting(made: Bench) -> dict[str, int]:
    """How many calls of each tenant wait for a place."""
    runner = made._runner
    assert runner is not None
    database = runner._steps._kit._database
    return {} if database is None else database.waiting()


# --- what calls no tool


def begun(made: Database, tenant: str, number: int) -> None:
    """So many executions of a tenant, each with a message that is due."""
    for run in names(tenant, number):
        made.begin(Execution(run), tenant, [Stage(Spot(run, "one"), [])])


def whose(made: Database, message: Message) -> str:
    """The run that a message is of: "<tenant> <what>"."""
    assert isinstance(message, WorkflowLevel)
    return made._store.retrieve_execution_summary(message.execution_id).application


def recovered(made: Database) -> None:
    """Nothing is queued but what stabilize's own look for what stands still has queued."""
    made._queue.clear()
    _Recovery(made._store, made._queue, lambda: None).recover_pending_workflows()


@pytest.mark.parametrize("queued", [lambda made: None, recovered])
def test_tenants_take_turns_however_much_one_has_to_do(
    root: Path, queued: Callable[[Database], None]
) -> None:
    with database(root) as made:
        begun(made, "b", 20)
        begun(made, "a", 2)
        begun(made, "c", 1)
        queued(made)
        order = []
        for _ in range(7):
            message = given(made)
            order.append(whose(made, message)[0])
            made._queue.ack(message)
        assert order == ["a", "b", "c", "a", "b", "b", "b"]


def test_a_tenant_that_does_much_at_once_leaves_places_for_others(root: Path) -> None:
    with database(root) as made:
        begun(made, "a", 20)
        first = [given(made) for _ in range(_BESIDE * 3 // 4)]
        assert made._queue.poll_one() is None
        begun(made, "b", 1)
        assert whose(made, given(made)) == "b 0"
        made._queue.ack(first[0])
        assert whose(made, given(made))[0] == "a"


def test_who_has_nothing_due_is_passed_over(root: Path) -> None:
    with database(root) as made:
        begun(made, "a", 1)
        begun(made, "b", 2)
        later = given(made)
        made._queue.reschedule(later, timedelta(hours=1))
        assert [whose(made, given(made)) for _ in range(2)] == ["b 0", "b 1"]


def test_what_is_sent_to_a_forgotten_execution_is_dropped(root: Path) -> None:
    with database(root) as made:
        begun(made, "a", 2)
        message = given(made)
        forgotten = Execution(whose(made, message))
        made.forget(forgotten)
        # By who was at work for it: as its last deed.
        made._queue.push(StartWorkflow(execution_id=forgotten.identifier))
        assert whose(made, given(made)) == "a 1"
        assert made._queue.poll_one() is None
        assert made._queue.size() == 1  # the one at work


def test_nothing_begins_for_a_run_that_was_forgotten(root: Path) -> None:
    ended: list[str] = []

    def check() -> None:
        if ended:
            raise RunEnded(CANCELLED)

    with database(root) as made:
        run = Execution("run")
        made.begin(run, "a", [Stage(Spot("run", "one"), [])], check)
        ended.append("run")
        made.forget_run("run")
        with pytest.raises(RunEnded):
            made.begin(run, "a", [Stage(Spot("run", "one"), [])], check)
        assert not made.runs()


# --- the file


def test_a_file_that_was_large_is_given_back_in_portions(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.database._SPARE", 10)
    monkeypatch.setattr("workflows.engine.database._GIVEN", 50)
    with database(root) as made:
        connection = made._store._get_connection()

        def pages(which: str) -> int:
            (number,) = connection.execute(f"PRAGMA {which}").fetchone()
            return int(number)

        connection.execute("CREATE TABLE large AS SELECT zeroblob(1000000) AS bytes")
        large = pages("page_count")
        connection.execute("DROP TABLE large")
        connection.commit()
        portions = len(list(made.forgetting("any")))
        assert portions >= 200_000 // 4096
        assert pages("freelist_count") == 10
        assert pages("page_count") < large - 200


def test_a_file_of_another_release_is_made_anew(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with database(root) as made:
        begun(made, "a", 1)
        connection = made._store._get_connection()
        connection.execute("PRAGMA user_version = 0")
    with database(root) as made:
        assert not made.runs()
    assert "of another release" in caplog.text


def test_a_look_for_what_stands_still_beats(root: Path) -> None:
    with database(root) as made:
        begun(made, "a", 3)
        beats: list[str] = []
        recovery = _Recovery(made._store, made._queue, lambda: beats.append("beat"))
        recovery.recover_pending_workflows()
        assert len(beats) == 3


# --- what cannot be read


@contextmanager
def database(root: Path) -> Iterator[Database]:
    """One that is not started: nobody asks for its messages but the test."""
    made = Database(root, Steps.__new__(Steps), 1, lambda place: None)
    try:
        yield made
    finally:
        made.close(0.0)


def given(made: Database) -> Message:
    """The next message that is given out."""
    found: list[Message] = []

    def came() -> bool:
        with suppress(sqlite3.Error):  # the processor looks again
            message = made._queue.poll_one()
            found.extend([message] if message else [])
        return bool(found)

    until(came, "a message")
    return found[0]


def test_a_call_that_could_not_be_read_once_is_given_out_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database(root) as made:
        queue = made._queue
        begun = Stage(Spot("run", "one"), [], "acme")
        made.begin(Execution("run"), "acme", [begun])
        stage = made._store.retrieve(Execution("run").identifier).stages[0]
        queue.clear()
        queue.push(RunTask(stage_id=stage.id, task_id=stage.tasks[0].id))
        tried: list[int] = []
        read = _Queue._message

        def reads(self: _Queue, row: sqlite3.Row) -> Message | None:
            tried.append(row["id"])
            if len(tried) == 1:
                raise sqlite3.OperationalError("disk I/O error")
            return read(self, row)

        monkeypatch.setattr(_Queue, "_message", reads)
        assert isinstance(given(made), RunTask)
        assert len(tried) == 2
        assert made.waiting() == {}


def test_a_message_that_cannot_be_put_away_is_looked_at_again(root: Path) -> None:
    with database(root) as made:
        connection = made._queue._get_connection()
        connection.execute(f"ALTER TABLE {_TABLE}_dlq RENAME TO away")
        made._queue.push(RunTask(stage_id="s", task_id="t"))
        connection.execute(f"UPDATE {_TABLE} SET message_type = 'Unheard'")
        connection.commit()
        with pytest.raises(sqlite3.OperationalError):
            made._queue.poll_one()
        assert made._queue.size() == 1
        connection.execute(f"ALTER TABLE away RENAME TO {_TABLE}_dlq")
        connection.commit()

        def put_away() -> bool:
            assert made._queue.poll_one() is None
            return made._queue.dlq_size() == 1

        until(put_away)
        assert made._queue.size() == 0


def test_a_large_run_is_forgotten_in_pages_with_a_beat_for_each_part(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.database._PAGE", 2)
    monkeypatch.setattr("workflows.engine.database._FORGOTTEN", 1)
    with database(root) as made:
        for run in ("one", "two"):
            for number in range(5):
                item = Spot(run, "task", str(number))
                made.begin(Execution(run, "each", str(number)), "acme", [Stage(item, [])])
        connection = made._store._get_connection()
        connection.execute("UPDATE stage_executions SET status = 'SUSPENDED'")
        connection.commit()
        assert {spot.item for spot in made.sleeping("one")} == set(range(5))
        beats: list[str] = []
        made.forget_run("one", lambda: beats.append("beat"))
        assert len(beats) >= 5
        assert made.runs() == {"two"}
        assert list(made.sleeping("one")) == []
        assert len(list(made.sleeping("two"))) == 5
        assert made._queue.size() == 5
