"""Steps: what they keep, how they fail, and that one run costs the others little."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from highway_dsl import TimeoutPolicy, TriggerRule, WorkflowBuilder

from cas.errors import RunEnded, StoreFull
from cas.records import COMPLETED, FAILED, RUNNING, WAITING, PendingUpload, Step, Subscription
from cas.totals import values_of
from cas.uploads import UploadRequest
from tests.workflows.running import ACTOR, TENANT, Bench, bench, scratch, until
from workflows import step_values
from workflows.definitions import Definition, Retry
from workflows.engine.database import Database
from workflows.engine.outcomes import Again, delay_s
from workflows.engine.runner import Runner
from workflows.engine.spots import Execution
from workflows.engine.work import Work
from workflows.events import Events
from workflows.run_log import RunLog
from workflows.run_view import RunView
from workflows.tools import Calling


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    with scratch() as folder, bench(Path(folder)) as made:
        made.start()
        yield made


def submitted(made: Bench, tasks: dict[str, Any], **inputs: Any) -> str:
    """A run of a workflow of highway_dsl's JSON, with what its builder does not offer."""
    named = {name: {"task_id": name, **task} for name, task in tasks.items()}
    text = msgspec.json.encode({"name": "w", "tasks": named}).decode()
    return made.workflows.runs(TENANT, ACTOR).submit(Definition.parse(text), inputs).run_id


def result(view: RunView, task: str) -> Any:
    (step,) = (step for step in view.steps if (step.step_id, step.iteration) == (task, ""))
    raw = view.value(step)
    return None if raw is None else msgspec.json.decode(raw)


def runner_of(made: Bench) -> Runner:
    assert made._runner is not None
    return made._runner


# --- failures


@pytest.mark.parametrize(
    ("first_s", "factor", "failures", "after_s"),
    [
        (1.0, 2.0, 3, 8.0),
        (1.0, 2.0, 10_000, 86_400.0),
        (1.0, 1e200, 2, 86_400.0),
        (0.0, 1e200, 2, 0.0),
        (0.0, float("inf"), 2, 0.0),
        (-1.0, 2.0, 1, 0.0),
    ],
)
def test_a_delay_has_an_end(first_s: float, factor: float, failures: int, after_s: float) -> None:
    assert delay_s(Retry(9, first_s, factor), failures) == after_s


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Unspeakable(), "Unspeakable: it cannot be told"),
        (ValueError("odd \ud800 text"), "ValueError: odd ? text"),
        (SystemExit(3), "it exited with 3"),
        (KeyboardInterrupt("by me"), "KeyboardInterrupt: by me"),
        (GeneratorExit(), "GeneratorExit: "),
        (asyncio.CancelledError("by you"), "CancelledError: by you"),
    ],
)
@pytest.mark.parametrize("limited", [False, True])
def test_whatever_a_tool_raises_fails_its_step_and_calls_it_no_more(
    shared: Bench, error: BaseException, told: str, limited: bool
) -> None:
    calls = []

    def raises(calling: Calling) -> None:
        calls.append(calling.run)
        raise error

    tool = f"t.{type(error).__name__.lower()}{int(limited)}"
    shared.registry.add(tool, raises)
    flow = WorkflowBuilder(name="failing")
    flow.task("one", tool)
    if limited:
        flow.timeout(timedelta(seconds=60))
    view = shared.run(flow)
    assert view.run.status == FAILED
    assert told in view.run.error
    assert calls == [view.run.run_id]
    until(
        lambda: not runner_of(shared)._steps.database._queue._shares._places._holders, "its place"
    )


@pytest.mark.parametrize("error", [GeneratorExit(), asyncio.CancelledError()])
def test_whatever_the_runners_own_part_raises_its_step_begins_again(
    shared: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("workflows.engine.steps._TROUBLE_S", 0.05)
    tried: list[str] = []
    flow = WorkflowBuilder(name="odd")
    flow.task("one", "t.say", args=["odd"])
    monkeypatch.setattr(RunLog, "finish", once(error, RunLog.finish, tried))
    assert shared.run(flow).run.status == COMPLETED
    assert len(tried) > 1


def test_a_machine_without_a_thread_for_a_moment_fails_no_step(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.steps._TROUBLE_S", 0.05)
    start = threading.Thread.start
    refused: list[threading.Thread] = []

    def starts(thread: threading.Thread) -> None:
        if thread.name.startswith("limited") and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starts)
    shared.calls["threaded"] = 0
    flow = WorkflowBuilder(name="threaded")
    flow.task("one", "t.say", args=["threaded"])
    flow.timeout(timedelta(seconds=60))
    view = shared.run(flow)
    assert (view.run.status, view.run.error) == (COMPLETED, "")
    assert (len(refused), shared.calls["threaded"]) == (1, 1)


def test_a_tenant_with_too_many_late_calls_is_told_of(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workflows.engine.attempts.LATE_MAX", 1)
    goes_on = threading.Event()
    with bench(root) as made:
        made.registry.add("t.late", lambda calling: goes_on.wait(60))
        made.start()
        for tool, limit_s in (("t.late", 0.05), ("t.say", 60)):
            flow = WorkflowBuilder(name="limited")
            flow.task("one", tool)
            flow.timeout(timedelta(seconds=limit_s))
            run = made.submit(flow)
            if tool == "t.late":
                assert made.ended(run).run.status == FAILED
        try:
            until(lambda: "tenant acme begins no calls" in caplog.text)
            assert runner_of(made)._steps.late() == 1
        finally:
            goes_on.set()
        assert made.ended(run).run.status == COMPLETED


def test_of_a_loop_whose_time_is_over_nothing_is_kept(shared: Bench) -> None:
    flow = WorkflowBuilder(name="limited")
    flow.foreach("each", "{{ns}}", lambda body: body.wait_for_event("never", "never comes"))
    flow.workflow.tasks["each"].timeout_policy = TimeoutPolicy(timeout=timedelta(seconds=0.05))
    flow.wait_for_event("after", "later", trigger_rule=TriggerRule.ALL_DONE)
    run = shared.submit(flow, ns=[1, 2])
    shared.until_status(run, "after", WAITING)
    assert [spot for spot in runner_of(shared)._steps._kit.items._left if spot.run == run] == []
    shared.cancel(run)
    shared.ended(run)


def items_begun(monkeypatch: pytest.MonkeyPatch, on_begun: Callable[[int], None]) -> list[str]:
    """The items of loops, as they begin; `on_begun` is told how many have."""
    begun: list[str] = []
    begin = Database.begin

    def begins(database: Database, execution: Execution, *more: Any) -> None:
        begin(database, execution, *more)
        if execution.level:
            begun.append(execution.iteration)
            on_begun(len(begun))

    monkeypatch.setattr(Database, "begin", begins)
    return begun


def test_a_loop_begins_its_items_in_portions_and_is_one_attempt(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.work._STAGES_AT_ONCE", 4)  # of two items
    portions: list[int] = []
    begin_items = Work._begin_items

    def begins(work: Work, unbegun: deque[int]) -> None:
        before = len(unbegun)
        begin_items(work, unbegun)
        portions.append(before - len(unbegun))

    monkeypatch.setattr(Work, "_begin_items", begins)
    flow = WorkflowBuilder(name="portions")
    flow.foreach("each", "{{ns}}", lambda body: body.task("one", "t.say", args=["{{item}}"]))
    run = shared.submit(flow, ns=[1, 2, 3, 4, 5])
    view = shared.ended(run)
    step = shared.step(run, "each")
    assert step is not None
    assert (view.run.status, step.attempts) == (COMPLETED, 1)
    assert portions[:3] == [2, 2, 1]
    assert sum(portions) == 5


def test_a_run_that_was_cancelled_begins_no_more_items_and_is_forgotten(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(root) as made:
        begun = items_begun(monkeypatch, lambda number: made.cancel(run) if number == 3 else None)
        flow = WorkflowBuilder(name="large")
        flow.foreach("each", "{{ns}}", lambda body: body.wait_for_event("never", "never"))
        run = made.submit(flow, ns=list(range(50)))
        made.start()
        made.ended(run)
        database = runner_of(made)._steps.database
        until(lambda: not database.runs() and database._queue.size() == 0, "it is forgotten")
        assert begun == ["0", "1", "2"]


def test_no_items_begin_while_the_disk_is_nearly_full(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workflows.engine.steps._TROUBLE_S", 0.05)
    with bench(root) as made:
        begun = items_begun(monkeypatch, lambda number: None)
        flow = WorkflowBuilder(name="large")
        flow.foreach("each", "{{ns}}", lambda body: body.task("one", "t.say"))
        run = made.submit(flow, ns=[1, 2])
        with monkeypatch.context() as scarce:
            scarce.setattr(made.store.blobs, "_min_free_bytes", 1 << 60)
            made.start()
            until(lambda: "step each of" in caplog.text, "it begins again")
            assert begun == []
        assert made.ended(run).run.status == COMPLETED
        assert begun == ["0", "1"]


def test_a_loop_ends_while_the_disk_is_nearly_full(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = WorkflowBuilder(name="waits")
    flow.foreach("each", "{{ns}}", lambda body: body.wait_for_event("one", "go {{item}}"))
    flow.workflow.tasks["each"].timeout_policy = TimeoutPolicy(timeout=timedelta(hours=1))
    for status in (COMPLETED, FAILED):
        with bench(root / status) as made:
            run = made.submit(flow, ns=[1, 2])
            made.start()
            made.until_status(run, "each", WAITING)
            monkeypatch.setattr(made.store.blobs, "_min_free_bytes", 1 << 60)
            if status == COMPLETED:
                for number in (1, 2):
                    made.events.emit(f"go {number}", 1, hold_us=60_000_000)
            else:
                made.end_the_time(run, "each!time")
            assert made.ended(run).run.status == status


def test_a_loop_that_cannot_begin_for_want_of_room_ends_in_its_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.steps._TROUBLE_S", 0.05)
    flow = WorkflowBuilder(name="large")
    flow.foreach("each", "{{ns}}", lambda body: body.task("one", "t.say"))
    flow.workflow.tasks["each"].timeout_policy = TimeoutPolicy(timeout=timedelta(seconds=0.2))
    with bench(root) as made:
        monkeypatch.setattr(made.store.blobs, "_min_free_bytes", 1 << 60)
        run = made.submit(flow, ns=[1, 2])
        made.start()
        ended = made.ended(run).run
        assert (ended.status, "longer than 0.2 s" in ended.error) == (FAILED, True)


def test_the_loops_of_a_run_have_so_many_steps_together(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.run_log.STEPS_MAX", 10)

    def body(each: WorkflowBuilder) -> WorkflowBuilder:
        each.task("one", "t.say")
        return each.foreach("inner", "{{ms}}", lambda inner: inner.task("two", "t.say"))

    flow = WorkflowBuilder(name="nested")
    flow.foreach("each", "{{ns}}", body)
    assert shared.run(flow, ns=[1, 2], ms=[1, 2, 3]).run.status == COMPLETED
    refused = shared.run(flow, ns=[1, 2, 3, 4, 5, 6], ms=[1])
    assert "each: the loops of this run would have 12 of 10 steps together" in refused.run.error
    refused = shared.run(flow, ns=[1], ms=list(range(9)))
    assert "inner: the loops of this run would have 11 of 10 steps together" in refused.run.error


def test_no_run_begins_anew_beside_a_step_of_it(root: Path) -> None:
    works, go = threading.Event(), threading.Event()

    def work(calling: Calling) -> str:
        works.set()
        go.wait(60)
        return "done"

    with bench(root) as made:
        made.registry.add("t.work", work)
        made.start()
        flow = WorkflowBuilder(name="work")
        flow.task("one", "t.work")
        flow.wait_for_event("after", "later")
        run = made.submit(flow)
        assert works.wait(60)
        steps, record = runner_of(made)._steps, made.view(run).run
        with steps.at_work.one(run), pytest.raises(Again):
            steps.anew(record)
        go.set()
        made.until_status(run, "after", WAITING)
        until(lambda: steps.at_work.of(run) == 0)
        with steps.at_work.one(run):
            steps.anew(record)
        made.events.emit("later", 1)
        assert made.ended(run).run.status == COMPLETED


def test_a_failure_that_cannot_be_written_is_written_later(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, tried = RunLog.fail, []

    def full_once(log: RunLog, *args: Any) -> Step:
        tried.append(args)
        if len(tried) == 1:
            raise OSError("no space")
        return fail(log, *args)

    monkeypatch.setattr(RunLog, "fail", full_once)
    flow = WorkflowBuilder(name="failing")
    flow.task("one", "t.fail", args=["written late"])
    assert "written late" in shared.run(flow).run.error
    assert (len(tried), shared.calls["written late"]) == (2, 1)


def once(error: BaseException, act: Callable[..., Any], tried: list[str]) -> Callable[..., Any]:
    """`act`, which fails the first time."""

    def act_later(*args: Any, **kwargs: Any) -> Any:
        tried.append(act.__name__)
        if len(tried) == 1:
            raise error
        return act(*args, **kwargs)

    return act_later


FULL = StoreFull(0, 0, Path("/"))
FULL_TOO = sqlite3.OperationalError("database or disk is full")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (Events, "subscribe", FULL),
        (Events, "claim", FULL),
        (Events, "emit", FULL),
        (RunLog, "record_items", FULL),
        (RunLog, "wait", OSError("disk quota exceeded")),
        (Database, "begin", FULL_TOO),
    ],
)
def test_a_disk_that_is_full_for_a_moment_fails_no_step(
    shared: Bench, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception
) -> None:
    monkeypatch.setattr("workflows.engine.steps._TROUBLE_S", 0.05)
    flow = WorkflowBuilder(name="patient")
    flow.foreach("each", "{{ns}}", lambda body: body.task("one", "t.say", args=["patient"]))
    flow.wait_for_event("go", "patient go")
    flow.emit_event("tell", "patient told")
    shared.calls["patient"] = 0
    if name != "wait":
        shared.events.emit("patient go", 1, hold_us=60_000_000)
    tried: list[str] = []
    if name == "begin":  # of the items, not of the run
        begin = Database.begin

        def begin_items(database: Database, execution: Execution, *more: Any) -> None:
            if execution.level:
                tried.append(name)
                if len(tried) == 1:
                    raise error
            begin(database, execution, *more)

        monkeypatch.setattr(Database, "begin", begin_items)
    else:
        monkeypatch.setattr(owner, name, once(error, getattr(owner, name), tried))
    run = shared.submit(flow, ns=[1, 2])
    if name == "wait":
        until(lambda: len(tried) > 1, "another try")
        shared.events.emit("patient go", 1, hold_us=60_000_000)
    view = shared.ended(run)
    assert (view.run.status, view.run.error) == (COMPLETED, "")
    assert len(tried) > 1
    assert shared.calls["patient"] == 2


@pytest.mark.parametrize(("max_retries", "status"), [(0, FAILED), (1, COMPLETED)])
def test_a_full_disk_that_a_tool_meets_is_a_failure_that_may_pass(
    shared: Bench, max_retries: int, status: str
) -> None:
    calls = []

    def stores(calling: Calling) -> str:
        calls.append(calling.attempt)
        if len(calls) == 1:
            raise StoreFull(0, 0, Path("/"))
        return "stored"

    shared.registry.add(f"t.stores{max_retries}", stores)
    flow = WorkflowBuilder(name="stores")
    flow.task("one", f"t.stores{max_retries}")
    flow.retry(max_retries=max_retries, delay=timedelta(0))
    assert shared.run(flow).run.status == status
    assert calls == [1, 2][: max_retries + 1]


def test_a_step_is_not_tried_again_beside_an_attempt_that_goes_on(shared: Bench) -> None:
    first_ended, second = threading.Event(), threading.Event()
    beside: list[int] = []

    def slow(calling: Calling) -> str:
        if calling.attempt > 1:
            if not first_ended.is_set():
                beside.append(calling.attempt)
            second.set()
            return "after"
        second.wait(1.0)  # so long it might come, and must not
        first_ended.set()
        return "too late"

    shared.registry.add("t.slow_twice", slow)
    flow = WorkflowBuilder(name="slow")
    flow.task("one", "t.slow_twice")
    flow.timeout(timedelta(seconds=0.25))
    # A slow machine may need some attempts until one ends within that time.
    flow.retry(max_retries=100, delay=timedelta(0))
    assert result(shared.run(flow), "one") == "after"
    assert not beside


def test_a_command_that_fails_is_tried_again(root: Path) -> None:
    tries = root / "tries"
    with bench(root / "store", allow_shell=True) as made:
        made.start()
        flow = WorkflowBuilder(name="flaky")
        command = f"sh -c 'echo x >> {tries}; test $(wc -l < {tries}) -ge 3 && echo at last'"
        flow.task("one", "tools.shell.run", kwargs={"command": command})
        flow.retry(max_retries=2, delay=timedelta(0))
        assert result(made.run(flow), "one")["stdout"] == "at last"
        absent = WorkflowBuilder(name="absent")
        absent.task("one", "tools.shell.run", kwargs={"command": "no-such-program"})
        absent.retry(max_retries=2, delay=timedelta(0))
        view = made.run(absent)
        assert "cannot be run" in view.run.error
        step = view.step("one")
        assert step is not None
        assert (step.status, step.attempts) == (FAILED, 1)  # another attempt would find none, too


def test_a_condition_compares_what_a_command_says(root: Path) -> None:
    with bench(root / "store", allow_shell=True) as made:
        made.start()
        flow = WorkflowBuilder(name="says")
        flow.task("ask", "tools.shell.run", args=["echo '200'"], result_key="status")
        flow.condition(
            "ok",
            condition="{{status.stdout}} == '200'",
            if_true=lambda way: way.task("yes", "t.say", args=["yes"]),
            if_false=lambda way: way.task("no", "t.say", args=["no"]),
        )
        view = made.run(flow)
        assert (result(view, "yes"), made.calls["no"]) == ("yes", 0)


def test_a_command_ends_with_the_time_of_its_step(root: Path) -> None:
    with bench(root / "store", allow_shell=True) as made:
        made.start()
        told = root / "pid"
        command = f"sh -c 'echo $$ > {told}.new; mv {told}.new {told}; sleep 600; true'"
        for limit_s in (2, 30):  # the longer one where it was too short to begin
            flow = WorkflowBuilder(name="command")
            flow.task("one", "tools.shell.run", kwargs={"command": command})
            flow.timeout(timedelta(seconds=limit_s))
            view = made.run(flow)
            assert "took" in view.run.error
            if told.exists():
                break
        gone = Path("/proc", told.read_text().strip())
        until(lambda: not gone.exists())


# --- waits


@pytest.mark.parametrize("until", ["PT60S", "{{then}}"])
def test_a_wait_that_its_policy_cuts_short_fails(shared: Bench, until: str) -> None:
    wait = {"operator_type": "wait", "wait_for": until, "timeout_policy": {"timeout": "PT0.2S"}}
    view = shared.ended(submitted(shared, {"nap": wait}, then="2999-01-01T00:00:00Z"))
    assert view.run.error == "nap: wait: it would have taken longer than 0.2 s"


def test_a_wait_within_its_policy_completes(shared: Bench) -> None:
    wait = {"operator_type": "wait", "wait_for": "PT0.1S", "timeout_policy": {"timeout": "PT60S"}}
    past = {**wait, "wait_for": "2020-01-01T00:00:00Z"}
    assert shared.ended(submitted(shared, {"a": wait, "b": past})).run.status == COMPLETED


@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "1e300", 10**400, "soon", True])
def test_a_wait_takes_a_number_of_seconds(shared: Bench, seconds: Any) -> None:
    wait = {"operator_type": "wait", "wait_for": "{{seconds}}"}
    view = shared.ended(submitted(shared, {"nap": wait}, seconds=seconds))
    assert view.run.status == FAILED
    assert "a wait takes" in view.run.error


# --- what is known


def test_the_items_of_a_loop_are_those_of_its_beginning(shared: Bench) -> None:
    flow = WorkflowBuilder(name="loop")
    flow.foreach(
        "loop",
        "{{files}}",
        lambda body: body.task("x", "t.wait", args=["items go"]).task(
            "y", "t.say", args=["{{item}} {{loop.length}}"]
        ),
        dependencies=[],
    )
    flow.task("go", "t.wait", args=["change files"], dependencies=[])
    flow.task("other", "t.say", args=[["p", "q", "r", "s"]], dependencies=["go"])
    definition = msgspec.json.decode(flow.build().to_json())
    definition["tasks"]["other"]["result_key"] = "files"
    run = submitted(shared, definition["tasks"], files=["a", "b", "c"])
    for number in "012":
        shared.until_status(run, "x", WAITING, number)
    shared.until_status(run, "go", WAITING)
    shared.events.emit("change files", 1)
    shared.until_status(run, "other", COMPLETED)
    shared.events.emit("items go", 1)
    view = shared.ended(run)
    assert view.run.status == COMPLETED, view
    assert result(view, "loop") == {"results": ["a 3", "b 3", "c 3"], "count": 3}


def test_what_a_step_shows_is_no_value_of_that_name(shared: Bench) -> None:
    flow = WorkflowBuilder(name="shadows")
    flow.task("ask", "t.wait", args=["shadow go"], result_key="who", dependencies=[])
    flow.task("go", "t.wait", args=["shadow first"], dependencies=[])
    flow.task("early", "t.say", args=["{{who}} {{ask.name}}"], dependencies=["go"])
    flow.task("late", "t.say", args=["{{who}}"], dependencies=["ask"])
    run = shared.submit(flow, who="ann")
    shared.until_status(run, "ask", WAITING)
    shared.until_status(run, "go", WAITING)
    assert shared.view(run).variables["who"] == "ann"
    shared.events.emit("shadow first", 1)
    shared.until_status(run, "early", COMPLETED)
    shared.events.emit("shadow go", "bob")
    view = shared.ended(run)
    assert (result(view, "early"), result(view, "late")) == ("ann shadow go", "bob")
    assert view.variables["who"] == "bob"


# --- how much


def test_the_results_of_a_run_have_a_limit_together(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_values, "VALUES_BYTES_MAX", 5000)
    flow = WorkflowBuilder(name="much")
    flow.foreach("each", "{{ns}}", lambda body: body.task("one", "t.say", args=["x" * 1000]))
    view = shared.run(flow, ns=list(range(8)))
    assert view.run.status == FAILED
    assert any("of 5000; store them as files" in step.error for step in view.steps)
    ended = [step.status for step in view.steps if step.step_id == "one"]
    assert (ended.count(COMPLETED), ended.count(FAILED)) == (4, 4)
    with shared.store.catalog.read() as snapshot:
        assert 4000 < values_of(snapshot, view.run.run_id) <= 5000


def test_where_the_results_of_a_run_have_no_room_no_further_tool_is_called(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_values, "VALUES_BYTES_MAX", 5000)
    flow = WorkflowBuilder(name="much")
    flow.task("much", "t.say", args=["y" * 5000])
    flow.task("clean", "t.say", args=["clean up"], dependencies=["much"], trigger_rule="all_done")
    flow.emit_event("tell", "told", dependencies=["clean"], trigger_rule="all_done")
    view = shared.run(flow)
    assert view.run.status == FAILED
    found = {step.step_id: step.error for step in view.steps}
    assert "store them as files" in found["much"]
    assert found["clean"].startswith("t.say: not begun")
    assert "not begun" in found["tell"]
    assert shared.calls["clean up"] == 0


def test_a_step_reads_only_the_results_that_it_names(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    result_of = RunLog.result

    def counted(log: RunLog, step_id: str, iteration: str = "") -> bytes | None:
        read.append(step_id)
        return result_of(log, step_id, iteration)

    monkeypatch.setattr(RunLog, "result", counted)
    flow = WorkflowBuilder(name="frugal")
    flow.task("a", "t.say", args=["A"])
    flow.task("b", "t.say", args=["B"], result_key="second")
    flow.task("c", "t.say", args=["{{second}} {{second}}"])
    view = shared.run(flow)
    assert (result(view, "c"), read) == ("B B", ["b"])


# --- the end of a run, while a tool works


def test_what_a_tool_begins_after_the_end_of_its_run_is_refused(shared: Bench) -> None:
    works, go, refused = threading.Event(), threading.Event(), threading.Event()

    def late(calling: Calling) -> Any:
        works.set()
        go.wait(60)
        try:
            calling.place.request_upload(UploadRequest("x", run=calling.run), calling.key("up"))
        except RunEnded:
            refused.set()
            raise
        return None

    shared.registry.add("t.late", late)
    flow = WorkflowBuilder(name="late")
    flow.task("one", "t.late")
    run = shared.submit(flow)
    assert works.wait(60)
    shared.cancel(run)
    go.set()
    assert refused.wait(60)
    with shared.store.catalog.read() as snapshot:
        uploads = snapshot.range(PendingUpload, "")
        assert run not in {upload.workflow_run_id for upload in uploads}


def test_nothing_is_kept_of_a_run_that_was_cancelled_while_its_tools_worked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, go = threading.Semaphore(0), threading.Event()

    def slow(calling: Calling) -> str:
        works.release()
        go.wait(60)
        return "too late"

    monkeypatch.setattr("workflows.engine.runner._STOP_S", 60.0)
    with bench(root) as made:
        made.registry.add("t.slow", slow)
        made.start()
        flow = WorkflowBuilder(name="slow")
        flow.task("one", "t.slow")
        cancelled = [made.submit(flow) for _ in range(3)]
        for _ in cancelled:
            assert works.acquire(timeout=60)
        for run in cancelled:
            made.cancel(run)
        runner = made._runner
        assert runner is not None
        until(lambda: not runner._known)  # it has let go of them
        go.set()
        made.stop()  # waits for those at work
        assert not runner._steps._kit.unwritten
        with made.store.catalog.read() as snapshot:
            assert snapshot.range(Subscription, "") == []


def test_a_wait_of_a_run_that_ended_meanwhile_ends_too(root: Path) -> None:
    """The run ends after its step asked whether it may begin."""
    with bench(root) as made:

        def ends_first(calling: Calling) -> Any:
            made.workflows.runs(TENANT, ACTOR).cancel(calling.run)
            return made.registry.tool("t.wait")(calling, "nobody asks")

        made.registry.add("t.ends_first", ends_first)
        made.start()
        flow = WorkflowBuilder(name="ends")
        flow.task("one", "t.ends_first")
        run = made.submit(flow)
        made.ended(run)

        def no_waits() -> bool:
            with made.store.catalog.read() as snapshot:
                return not snapshot.range(Subscription, "run", (TENANT, run))

        made.stop()
        until(no_waits)


def test_a_parallel_and_a_join_keep_their_results_as_they_are(shared: Bench) -> None:
    flow = WorkflowBuilder(name="branches")
    flow.parallel(
        "fork",
        branches={
            "left": lambda b: b.task("l", "t.say", args=[{"a": [1, None]}]),
            "right": lambda b: b.wait("r", timedelta(0)),
        },
    )
    flow.task("last", "t.say", args=["{{fork}}"], dependencies=["fork"])
    view = shared.run(flow)
    assert result(view, "last") == {"left": {"a": [1, None]}, "right": None}
    assert RUNNING not in {step.status for step in view.steps}
