"""The engine: workflows of highway_dsl on stabilize, each operator and what follows from it."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from highway_dsl import JoinMode, TimeoutPolicy, WorkflowBuilder
from stabilize.models.workflow import Workflow
from stabilize.persistence.sqlite import SqliteWorkflowStore
from stabilize.queue.messages import Message, StartWorkflow
from stabilize.queue.sqlite import SqliteQueue

from cas.catalog import Transaction
from cas.events import subscription_id
from cas.identifiers import new_id
from cas.records import (
    CANCELLED,
    COMPLETED,
    FAILED,
    QUEUED,
    SKIPPED,
    WAITING,
    Mark,
    Run,
    RunText,
    Step,
)
from cas.restored import RESTORED_TIME, accept
from tests.workflows.running import ACTOR, TENANT, Bench, bench, scratch, until
from workflows.definitions import Definition
from workflows.engine import work
from workflows.engine.database import Database, _Queue
from workflows.engine.plan import Plan
from workflows.engine.shares import Places, Shares
from workflows.engine.spots import FORK, Execution, Spot
from workflows.engine.steps import Steps
from workflows.run_log import RunLog
from workflows.run_view import RunView
from workflows.tools import Calling, Waiting
from workflows.tools.registry import raw


def keyed(builder: WorkflowBuilder, task: str, key: str) -> Definition:
    """Its definition with a correlation key, which the builder does not write down."""
    value = msgspec.json.decode(builder.build().to_json())
    value["tasks"][task]["correlation_key"] = key
    return Definition.parse(msgspec.json.encode(value).decode())


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    """One runner for all stories that leave it as it is."""
    with scratch() as folder, bench(Path(folder)) as made:
        made.start()
        yield made


def results(view: RunView) -> dict[str, Any]:
    return {
        f"{step.step_id}#{step.iteration}".rstrip("#"): msgspec.json.decode(raw)
        for step in view.steps
        if step.status == COMPLETED and (raw := view.value(step)) is not None
    }


def statuses(view: RunView) -> dict[str, str]:
    return {f"{step.step_id}#{step.iteration}".rstrip("#"): step.status for step in view.steps}


def test_steps_run_one_after_the_other_and_see_the_results_before_them(shared: Bench) -> None:
    flow = WorkflowBuilder(name="line")
    flow.task("one", "t.say", kwargs={"what": {"n": 1, "who": "{{name}}"}}, result_key="first")
    flow.task("two", "t.say", args=["{{first.who}} has {{first}}"])
    flow.task("three", "t.say", args=["{{one.n}}"])
    view = shared.run(flow, name="ann")
    assert (view.run.status, view.run.error) == (COMPLETED, "")
    assert results(view) == {
        "one": {"n": 1, "who": "ann"},
        "two": 'ann has {"n":1,"who":"ann"}',
        "three": 1,
    }


# --- waits


def test_a_step_sleeps_until_its_event_comes(shared: Bench) -> None:
    flow = WorkflowBuilder(name="waiting")
    flow.task("wait", "t.wait", kwargs={"name": "{{event}}"}, result_key="came")
    flow.task("last", "t.say", args=["{{came.n}}"])
    run = shared.submit(flow, event="late")
    step = shared.until_status(run, "wait", WAITING)
    assert msgspec.json.decode(shared.view(run).value(step) or b"") == {"name": "late"}
    until(lambda: shared.view(run).run.status == WAITING)
    assert shared.view(run).variables["came"] == {"name": "late"}
    assert shared.events.emit("late", {"n": 7}).delivered_to == 1
    view = shared.ended(run)
    assert results(view) == {"wait": {"n": 7}, "last": 7}
    assert [step.attempts for step in view.steps] == [1, 1]


def test_an_event_that_came_before_the_wait_is_found(shared: Bench) -> None:
    shared.events.emit("early", 1, hold_us=60_000_000)
    flow = WorkflowBuilder(name="waiting")
    flow.wait_for_event("wait", "early")
    assert results(shared.run(flow)) == {"wait": 1}


def test_a_wait_whose_time_is_over_fails_the_run(shared: Bench) -> None:
    flow = WorkflowBuilder(name="waiting")
    flow.task("wait", "t.wait", kwargs={"name": "never", "timeout_s": 0.2})
    flow.task("after", "t.say")
    view = shared.run(flow)
    assert view.run.status == FAILED
    assert "timed out" in view.run.error
    assert statuses(view) == {"wait": FAILED}


def test_a_wait_for_a_time_takes_that_long(shared: Bench) -> None:
    flow = WorkflowBuilder(name="timer")
    flow.wait("nap", timedelta(seconds=0.3))
    flow.wait("past", "2020-01-01T00:00:00Z")
    flow.task("last", "t.say", args=["awake"])
    view = shared.run(flow)
    assert results(view) == {"nap": None, "past": None, "last": "awake"}
    nap = view.steps[0]
    assert (nap.ended_at or 0) - nap.started_at >= 300_000


def test_one_run_wakes_another_with_an_event(shared: Bench) -> None:
    waits = WorkflowBuilder(name="waits")
    waits.wait_for_event("wait", "from {{who}}", timeout_seconds=60)
    run = shared.submit(waits, who="bob")
    shared.until_status(run, "wait", WAITING)
    emits = WorkflowBuilder(name="emits")
    emits.emit_event("emit", "from {{who}}", payload={"by": "{{who}}"})
    assert results(shared.run(emits, who="bob"))["emit"]["delivered_to"] == 1
    assert results(shared.ended(run)) == {"wait": {"by": "bob"}}


def test_one_run_wakes_another_with_the_event_of_its_key(shared: Bench) -> None:
    runs = shared.workflows.runs(TENANT, ACTOR)
    waits = WorkflowBuilder(name="waits")
    waits.wait_for_event("wait", "keyed", timeout_seconds=60)
    definition = keyed(waits, "wait", "order_{{order}}")
    run = runs.submit(definition, {"order": 7}).run_id
    shared.until_status(run, "wait", WAITING)
    shown = {"event_name": "keyed", "correlation_key": "order_7"}
    assert shared.view(run).variables["wait"] == shown
    emits = WorkflowBuilder(name="emits")
    emits.emit_event("emit", "keyed", payload={"of": "{{order}}"})
    for order in (8, 7):
        emit = runs.submit(keyed(emits, "emit", "order_{{order}}"), {"order": order}).run_id
        assert results(shared.ended(emit))["emit"]["delivered_to"] == (order == 7)
    assert results(shared.ended(run)) == {"wait": {"of": 7}}
    later = runs.submit(definition, {"order": 8}).run_id
    assert results(shared.ended(later)) == {"wait": {"of": 8}}


def test_a_key_that_a_template_leaves_empty_is_none(shared: Bench) -> None:
    waits = WorkflowBuilder(name="waits")
    waits.wait_for_event("wait", "keyless", timeout_seconds=60)
    runs = shared.workflows.runs(TENANT, ACTOR)
    run = runs.submit(keyed(waits, "wait", "{{key}}"), {"key": None}).run_id
    shared.until_status(run, "wait", WAITING)
    assert shared.events.emit("keyless", 1).delivered_to == 1
    assert results(shared.ended(run)) == {"wait": 1}


def test_a_template_may_name_the_run(shared: Bench) -> None:
    view = shared.run(WorkflowBuilder(name="named").task("say", "t.say", args=["of-{{run_id}}"]))
    assert results(view) == {"say": f"of-{view.run.run_id}"}


# --- foreach


def test_the_items_of_a_foreach_run_at_once_and_keep_their_order(shared: Bench) -> None:
    together = threading.Barrier(3, timeout=60)

    def meet(calling: Calling, item: int) -> dict[str, int]:
        together.wait()
        return {"square": item * item}

    shared.registry.add("t.meet", meet)
    flow = WorkflowBuilder(name="loop")
    flow.foreach("each", "{{numbers}}", lambda body: body.task("one", "t.meet", args=["{{item}}"]))
    flow.task("last", "t.say", args=["{{each.results}}"])
    view = shared.run(flow, numbers=[3, 1, 2])
    squares = [{"square": 9}, {"square": 1}, {"square": 4}]
    found = results(view)
    assert found["each"] == {"results": squares, "count": 3}
    assert found["last"] == squares
    assert sorted(step.iteration for step in view.steps if step.step_id == "one") == ["0", "1", "2"]


def test_a_foreach_over_nothing_has_no_results(shared: Bench) -> None:
    flow = WorkflowBuilder(name="loop")
    flow.foreach("each", "{{numbers}}", lambda body: body.task("one", "t.say", args=["{{item}}"]))
    assert results(shared.run(flow, numbers=[])) == {"each": {"results": [], "count": 0}}


def test_a_body_of_several_tasks_sees_its_own_item_alone(shared: Bench) -> None:
    flow = WorkflowBuilder(name="loop")
    flow.foreach(
        "each",
        "{{names}}",
        lambda body: body.task("a", "t.say", args=["{{item}}!"], result_key="loud").task(
            "b", "t.say", args=["{{index}} {{loop.index}}/{{loop.length}} {{loud}}"]
        ),
    )
    view = shared.run(flow, names=["ann", "bob"])
    assert results(view)["each"]["results"] == ["0 1/2 ann!", "1 2/2 bob!"]


def test_a_foreach_in_a_foreach_counts_both(shared: Bench) -> None:
    flow = WorkflowBuilder(name="loops")
    flow.foreach(
        "rows",
        "{{table}}",
        lambda row: row.foreach(
            "cells", "{{item}}", lambda cell: cell.task("cell", "t.say", args=["<{{item}}>"])
        ),
    )
    view = shared.run(flow, table=[[1, 2], [], [3]])
    found = results(view)["rows"]["results"]
    assert [row["results"] for row in found] == [["<1>", "<2>"], [], ["<3>"]]
    assert sorted(s.iteration for s in view.steps if s.step_id == "cell") == ["0.0", "0.1", "2.0"]


def test_one_item_that_fails_fails_the_foreach_after_the_others_have_ended(shared: Bench) -> None:
    def odd(calling: Calling, item: int) -> int:
        if item % 2:
            raise ValueError(f"{item} is odd")
        return item

    shared.registry.add("t.odd", odd)
    flow = WorkflowBuilder(name="loop")
    flow.foreach("each", "{{numbers}}", lambda body: body.task("one", "t.odd", args=["{{item}}"]))
    view = shared.run(flow, numbers=[2, 3, 4])
    assert view.run.status == FAILED
    assert "item 1: one: ValueError: 3 is odd" in view.run.error
    assert {k: v for k, v in statuses(view).items() if k.startswith("one")} == {
        "one#0": COMPLETED, "one#1": FAILED, "one#2": COMPLETED,
    }  # fmt: skip


def test_items_sleep_each_for_its_own_event(shared: Bench) -> None:
    flow = WorkflowBuilder(name="loop")
    flow.foreach(
        "each",
        "{{names}}",
        lambda body: body.task("one", "t.wait", kwargs={"name": "for {{item}}"}),
    )
    run = shared.submit(flow, names=["x", "y"])
    shared.until_status(run, "one", WAITING, "0")
    shared.until_status(run, "one", WAITING, "1")
    shared.events.emit("for y", "Y")
    shared.until_status(run, "one", COMPLETED, "1")
    shared.events.emit("for x", "X")
    assert results(shared.ended(run))["each"]["results"] == ["X", "Y"]


def test_a_foreach_has_the_time_its_policy_gives_it(shared: Bench) -> None:
    flow = WorkflowBuilder(name="loop")
    flow.foreach(
        "each",
        "{{names}}",
        lambda body: body.task("one", "t.wait", kwargs={"name": "no {{item}}"}),
        timeout_policy=TimeoutPolicy(timeout=timedelta(hours=1)),
    )
    run = shared.submit(flow, names=["x", "y"])
    shared.until_status(run, "each", WAITING)
    shared.until_status(run, "one", WAITING, "0")
    shared.end_the_time(run, "each!time")
    view = shared.ended(run)
    assert view.run.error == "each: foreach: it took longer than 3600 s"
    assert statuses(view)["one#0"] == CANCELLED


def test_more_items_than_allowed_are_refused(root: Path) -> None:
    with bench(root, items_max=2) as made:
        made.start()
        flow = WorkflowBuilder(name="loop")
        flow.foreach("each", "{{ns}}", lambda body: body.task("one", "t.say", args=["{{item}}"]))
        view = made.run(flow, ns=[1, 2, 3])
        assert "items_max" in view.run.error
        assert not made.calls


def test_the_items_of_a_loop_whose_time_is_over_go_on_no_more(shared: Bench) -> None:
    works, go = threading.Event(), threading.Event()

    def hold(calling: Calling) -> str:
        works.set()
        go.wait(60)
        return "too late"

    shared.registry.add("t.hold", hold)
    flow = WorkflowBuilder(name="over")
    flow.foreach(
        "each",
        "{{names}}",
        lambda body: (
            body.task("ask", "t.wait", args=["over {{item}}"])
            .task("one", "t.hold")
            .task("two", "t.say", args=["gone on"])
        ),
        timeout_policy=TimeoutPolicy(timeout=timedelta(hours=1)),
    )
    flow.task("clean", "t.wait", args=["over clean"], trigger_rule="all_done")
    run = shared.submit(flow, names=["x", "y"])
    shared.until_status(run, "ask", WAITING, "0")
    shared.until_status(run, "ask", WAITING, "1")
    shared.until_status(run, "each", WAITING)
    shared.events.emit("over x", 1)
    assert works.wait(60)
    shared.end_the_time(run, "each!time")
    shared.until_status(run, "clean", WAITING)
    view = shared.view(run)
    assert statuses(view) | {"each": FAILED} == {
        "each": FAILED, "ask#0": COMPLETED, "one#0": CANCELLED, "ask#1": CANCELLED,
        "clean": WAITING,
    }  # fmt: skip
    until(lambda: shared.view(run).run.status == WAITING)
    assert shared.events.emit("over y", 1, hold_us=60_000_000).delivered_to == 0
    go.set()
    other = WorkflowBuilder(name="other")
    other.task("one", "t.say", args=["meanwhile"])
    other.task("two", "t.say", args=["meanwhile"])
    assert shared.run(other).run.status == COMPLETED
    shared.events.emit("over clean", 1)
    assert shared.ended(run).run.status == COMPLETED
    assert statuses(shared.view(run))["one#0"] == CANCELLED
    assert shared.calls["gone on"] == 0


def test_a_body_that_ends_in_a_choice_comes_to_what_was_chosen(shared: Bench) -> None:
    flow = WorkflowBuilder(name="ends")
    flow.foreach(
        "each",
        "{{ns}}",
        lambda body: body.condition(
            "big",
            "{{item}} > 1",
            if_true=lambda yes: yes.task("yes", "t.say", args=["big {{item}}"]),
            if_false=lambda no: no.task("no", "t.say", args=["small {{item}}"]),
        ),
    )
    flow.parallel(
        "fork",
        branches={
            "choice": lambda b: b.condition(
                "any",
                "{{each.count}} > 1",
                if_true=lambda yes: yes.task("many", "t.say", args=["many"]),
                if_false=lambda no: no.task("few", "t.say", args=["few"]),
            ),
            "both": lambda b: b.task("p", "t.say", args=["P"]).task(
                "q", "t.say", args=["Q"], dependencies=[]
            ),
        },
    )
    found = results(shared.run(flow, ns=[1, 2]))
    assert found["each"] == {"results": ["small 1", "big 2"], "count": 2}
    assert found["fork"] == {"choice": "many", "both": {"p": "P", "q": "Q"}}


# --- conditions, branches, rules


def _choice() -> WorkflowBuilder:
    flow = WorkflowBuilder(name="choice")
    flow.condition(
        "big",
        "{{n}} > 3",
        if_true=lambda yes: yes.task("yes", "t.say", args=["big"], result_key="said"),
        if_false=lambda no: no.task("no", "t.say", args=["small"], result_key="said"),
    )
    flow.task("last", "t.say", args=["{{said}}"], dependencies=["yes", "no"])
    return flow


@pytest.mark.parametrize(("n", "said", "left_out"), [(5, "big", "no"), (3, "small", "yes")])
def test_a_condition_leads_one_way(shared: Bench, n: int, said: str, left_out: str) -> None:
    view = shared.run(_choice(), n=n)
    assert view.run.status == COMPLETED, view
    assert results(view)["last"] == said
    assert statuses(view)[left_out] == SKIPPED


def test_what_follows_a_way_not_taken_is_left_out_too(shared: Bench) -> None:
    flow = WorkflowBuilder(name="choice")
    flow.condition(
        "big",
        "{{n}} > 3",
        if_true=lambda yes: yes.task("a", "t.say").task("b", "t.say"),
        if_false=lambda no: no.task("c", "t.say"),
    )
    view = shared.run(flow, n=1)
    assert view.run.status == COMPLETED, view
    assert statuses(view) == {"big": COMPLETED, "a": SKIPPED, "b": SKIPPED, "c": COMPLETED}


def test_branches_run_at_once_and_come_together(shared: Bench) -> None:
    together = threading.Barrier(2, timeout=60)

    def both(calling: Calling, what: str) -> str:
        together.wait()
        return what

    shared.registry.add("t.both", both)
    flow = WorkflowBuilder(name="branches")
    flow.parallel(
        "fork",
        branches={
            "left": lambda b: b.task("l1", "t.both", args=["L"]).task(
                "l2", "t.say", args=["{{l1}}l"]
            ),
            "right": lambda b: b.task("r1", "t.both", args=["R"]),
        },
    )
    flow.task("last", "t.say", args=["{{l2}}{{r1}} {{fork.left}}"], dependencies=["fork"])
    view = shared.run(flow)
    assert view.run.status == COMPLETED, view
    assert results(view)["fork"] == {"left": "Ll", "right": "R"}
    assert results(view)["last"] == "LlR Ll"


def test_a_task_that_runs_in_any_case_takes_up_a_failure(shared: Bench) -> None:
    flow = WorkflowBuilder(name="cleanup")
    flow.task("work", "t.fail")
    flow.task("clean", "t.say", trigger_rule="all_done")
    view = shared.run(flow)
    assert statuses(view) == {"work": FAILED, "clean": COMPLETED}
    assert view.run.status == COMPLETED


def test_a_failure_that_also_stops_something_fails_the_run(shared: Bench) -> None:
    flow = WorkflowBuilder(name="cleanup")
    flow.task("work", "t.fail", kwargs={"why": "broken"})
    flow.task("next", "t.say", dependencies=["work"])
    flow.task("clean", "t.say", dependencies=["work"], trigger_rule="all_done")
    view = shared.run(flow)
    assert statuses(view) == {"work": FAILED, "next": SKIPPED, "clean": COMPLETED}
    assert (view.run.status, view.run.error) == (FAILED, "work: OSError: broken")


def test_the_first_success_is_enough_where_the_rule_says_so(shared: Bench) -> None:
    flow = WorkflowBuilder(name="race")
    flow.task("slow", "t.wait", kwargs={"name": "slow"}, dependencies=[])
    flow.task("broken", "t.fail", dependencies=[])
    flow.task("fast", "t.wait", kwargs={"name": "fast"}, dependencies=[])
    flow.task("first", "t.say", dependencies=["slow", "broken", "fast"], trigger_rule="one_success")
    run = shared.submit(flow)
    shared.until_status(run, "slow", WAITING)
    shared.until_status(run, "fast", WAITING)
    shared.until_status(run, "broken", FAILED)
    assert shared.step(run, "first") is None
    shared.events.emit("fast", 1)
    shared.until_status(run, "first", COMPLETED)
    shared.events.emit("slow", 1)
    assert shared.ended(run).run.status == COMPLETED


def early(made: Bench, rule: str) -> str:
    """A run with a parallel that may begin before all that is before it has ended."""
    flow = WorkflowBuilder(name="early")
    flow.task("slow", "t.wait", kwargs={"name": f"slow {rule}"}, dependencies=[])
    flow.task("fast", "t.wait", kwargs={"name": f"fast {rule}"}, dependencies=[])
    flow.parallel(
        "fork",
        branches={"only": lambda b: b.task("in", "t.say", args=["inside"])},
        dependencies=["slow", "fast"],
    )
    definition = msgspec.json.decode(flow.build().to_json())
    definition["tasks"]["fork"]["trigger_rule"] = rule
    text = msgspec.json.encode(definition).decode()
    run = made.workflows.runs(TENANT, ACTOR).submit(Definition.parse(text), {}).run_id
    made.until_status(run, "slow", WAITING)
    made.until_status(run, "fast", WAITING)
    until(lambda: sleeps(made, run, 3))
    return run


@pytest.mark.parametrize("rule", ["one_success", "one_done"])
def test_a_parallel_begins_as_early_as_its_rule_says(shared: Bench, rule: str) -> None:
    run = early(shared, rule)
    shared.events.emit(f"fast {rule}", 1)
    shared.until_status(run, "fork", COMPLETED)
    assert statuses(shared.view(run))["slow"] == WAITING
    shared.events.emit(f"slow {rule}", 1)
    assert results(shared.ended(run))["fork"] == {"only": "inside"}


def test_a_parallel_that_nobody_rang_for_is_rung_for_by_the_next_runner(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(root) as made:
        made.start()
        run = early(made, "one_done")
        ring = Database.ring

        def lost(database: Database, execution: Execution, spot: Spot) -> None:
            if spot.role != FORK:
                ring(database, execution, spot)

        with monkeypatch.context() as losing:
            losing.setattr(Database, "ring", lost)
            made.events.emit("fast one_done", 1)
            made.until_status(run, "fast", COMPLETED)
            until(lambda: sleeps(made, run, 2))
            made.stop()
        made.start()
        made.until_status(run, "fork", COMPLETED)


def test_a_parallel_whose_beginning_was_cut_short_is_shown_to_wait(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.steps._TROUBLE_S", 0.05)
    wait, tried = RunLog.wait, []

    def cut(log: RunLog, step_id: str, *args: Any) -> Step:
        if step_id == "cut":
            tried.append(step_id)
            if len(tried) == 1:
                raise OSError("cut short")
        return wait(log, step_id, *args)

    monkeypatch.setattr(RunLog, "wait", cut)
    flow = WorkflowBuilder(name="cut")
    flow.parallel("cut", branches={"only": lambda b: b.task("in", "t.wait", args=["cut go"])})
    run = shared.submit(flow)
    shared.until_status(run, "in", WAITING)
    shared.until_status(run, "cut", WAITING)
    shared.events.emit("cut go", 1)
    assert shared.ended(run).run.status == COMPLETED


# --- failures


def test_a_failed_step_fails_the_run_and_ends_what_waits(shared: Bench) -> None:
    flow = WorkflowBuilder(name="broken")
    flow.task("waits", "t.wait", kwargs={"name": "forever"}, dependencies=[])
    flow.task("go", "t.wait", kwargs={"name": "go"}, dependencies=[])
    flow.task("broken", "t.fail", dependencies=["go"])
    flow.task("after", "t.say", dependencies=["broken"])
    run = shared.submit(flow)
    shared.until_status(run, "waits", WAITING)
    shared.until_status(run, "go", WAITING)
    shared.events.emit("go", 1)
    view = shared.ended(run)
    assert (view.run.status, view.run.error) == (FAILED, "broken: OSError: no")
    assert statuses(view) == {"waits": CANCELLED, "go": COMPLETED, "broken": FAILED}


def test_a_step_is_tried_again_as_its_policy_says(shared: Bench) -> None:
    flow = WorkflowBuilder(name="again")
    flow.task("flaky", "t.fail", kwargs={"why": "flaky", "until_attempt": 3})
    flow.retry(max_retries=2, delay=timedelta(seconds=0.05), backoff_factor=2.0)
    view = shared.run(flow)
    assert results(view) == {"flaky": "flaky"}
    assert view.steps[0].attempts == 3
    assert shared.calls["flaky"] == 3


def test_a_step_is_tried_no_more_often_than_its_policy_says(shared: Bench) -> None:
    flow = WorkflowBuilder(name="again")
    flow.task("hopeless", "t.fail", kwargs={"why": "hopeless"})
    flow.retry(max_retries=2, delay=timedelta(seconds=0.05), backoff_factor=1.0)
    view = shared.run(flow)
    assert view.run.status == FAILED
    assert shared.calls["hopeless"] == 3


def test_a_step_has_the_time_its_policy_gives_it(shared: Bench) -> None:
    over = threading.Event()

    def hang(calling: Calling) -> str:
        over.wait(60)
        return "too late"

    shared.registry.add("t.hang", hang)
    flow = WorkflowBuilder(name="slow")
    flow.task("slow", "t.hang")
    flow.timeout(timedelta(seconds=0.2))
    view = shared.run(flow)
    over.set()
    assert view.run.error == "slow: t.hang: it took longer than 0.2 s"
    assert statuses(shared.view(view.run.run_id)) == {"slow": FAILED}


def test_an_unknown_name_in_a_template_fails_the_step_and_says_so(shared: Bench) -> None:
    flow = WorkflowBuilder(name="typo")
    flow.task("one", "t.say", args=["{{nobody.here}}"])
    view = shared.run(flow, name="ann")
    assert view.run.status == FAILED
    assert "nothing is named 'nobody'; there are name" in view.run.error


def test_a_result_that_is_too_long_is_refused(root: Path) -> None:
    with bench(root, result_max=1024) as made:
        made.start()
        flow = WorkflowBuilder(name="long")
        flow.task("one", "t.say", args=["x" * 2000])
        assert "result_max" in made.run(flow).run.error


@pytest.mark.parametrize("where", ["result", "shown", "then"])
def test_what_holds_itself_is_no_result(shared: Bench, where: str) -> None:
    """Such as a tree whose members know what they are in."""
    root: dict[str, Any] = {"name": "root"}
    root["children"] = [{"name": name, "parent": root} for name in "abc"]

    def tree(calling: Calling) -> Any:
        if where == "result":
            return root
        shown = root if where == "shown" else None
        return Waiting("t.tree", "tree", None, 0.0, shown, lambda claimed: root)

    def at_once(calling: Calling) -> Waiting:
        return Waiting("t.tree", "tree of then", then=lambda claimed: root)

    shared.registry.add(f"t.tree_{where}", at_once if where == "then" else tree)
    shared.events.emit("tree of then", 1, hold_us=60_000_000)
    flow = WorkflowBuilder(name="tree")
    flow.task("one", f"t.tree_{where}")
    error = shared.run(flow).run.error
    assert "more than 100 levels, as what holds itself has" in error
    assert ("shows" in error) == (where == "shown")


def test_a_result_that_is_endless_when_it_is_written_is_refused(shared: Bench) -> None:
    def endless(calling: Calling) -> Any:
        value: list[Any] = []
        for _ in range(60):
            value = [value, value]
        return value

    shared.registry.add("t.endless", endless)
    flow = WorkflowBuilder(name="endless")
    flow.task("one", "t.endless")
    assert "bytes, more than the 1048576 of [workflows] result_max" in shared.run(flow).run.error


def test_a_step_cannot_read_more_than_its_share(shared: Bench) -> None:
    """A list of empty lists is a twentieth of its objects; joined with itself it doubles."""
    calls: list[Any] = []
    shared.registry.add("t.wide", lambda calling: [[]] * 80_000)
    shared.registry.add("t.take", lambda calling, what: calls.append(what))
    flow = WorkflowBuilder(name="doubled")
    flow.task("a", "t.wide")
    for one, two in zip("abc", "bcd", strict=True):
        for name in (two, f"{two}2"):
            before = [one] if one == "a" else [one, f"{one}2"]
            flow.join(name, before, JoinMode.ALL_SUCCESS, dependencies=[])
    flow.task("test", "t.take", args=["{{d is defined}}"], dependencies=["d", "d2"])
    flow.task("read", "t.take", args=["{{d}}"], dependencies=["test"])
    error = shared.run(flow).run.error
    assert calls == [True]
    assert "read: workflow 'd': its " in error
    assert "as objects" in error


def test_what_is_put_together_has_a_limit(shared: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "TOGETHER_BYTES_MAX", 1000)
    for kind in ("join", "parallel", "foreach"):
        flow = WorkflowBuilder(name=kind)
        if kind == "join":
            flow.task("a", "t.say", args=["x" * 600], dependencies=[])
            flow.task("b", "t.say", args=["x" * 600], dependencies=[])
            flow.join("all", ["a", "b"], JoinMode.ALL_SUCCESS, dependencies=[])
        elif kind == "parallel":
            flow.parallel(
                "all",
                {
                    "l": lambda branch: branch.task("a", "t.say", args=["x" * 600]),
                    "r": lambda branch: branch.task("b", "t.say", args=["x" * 600]),
                },
            )
        else:
            flow.foreach("all", "{{ns}}", lambda body: body.task("a", "t.say", args=["x" * 600]))
        error = shared.run(flow, ns=[1, 2]).run.error
        assert f"all: {kind}: the results that it puts together have more than 1000 bytes" in error


def test_a_tool_that_fills_in_itself_may_change_what_it_is_given(shared: Bench) -> None:
    """Another attempt is given what the definition says."""
    seen: list[Any] = []

    @raw
    def change(calling: Calling, words: list[str], **more: Any) -> int:
        seen.append((list(words), dict(more["of"])))
        words.append("again")
        more["of"].clear()
        if calling.attempt < 2:
            raise OSError("once")
        return calling.attempt

    shared.registry.add("t.change", change)
    flow = WorkflowBuilder(name="changed")
    flow.task("one", "t.change", args=[["{{x}}"]], kwargs={"of": {"a": "{{y}}"}}).retry(
        max_retries=1, delay=timedelta(0)
    )
    assert shared.run(flow).run.status == COMPLETED
    assert seen == [(["{{x}}"], {"a": "{{y}}"})] * 2


@pytest.mark.parametrize(("levels", "status"), [(100, COMPLETED), (101, FAILED)])
def test_a_result_that_is_nested_too_deep_is_refused(
    shared: Bench, levels: int, status: str
) -> None:
    """Else who reads it later, with less of the stack left, would fail."""
    flow = WorkflowBuilder(name="deep")
    flow.task("one", "t.say", args=["{{deep}}"])
    deep: Any = []
    for _ in range(levels - 1):
        deep = [deep]
    view = shared.run(flow, deep=deep)
    assert view.run.status == status
    assert ("more than 100 levels" in view.run.error) == (status == FAILED)


def test_a_cancelled_run_wakes_no_more(shared: Bench) -> None:
    flow = WorkflowBuilder(name="cancelled")
    flow.task("wait", "t.wait", kwargs={"name": "cancelled"})
    flow.task("after", "t.say", args=["after cancel"])
    run = shared.submit(flow)
    shared.until_status(run, "wait", WAITING)
    shared.cancel(run)

    def nobody_waits() -> bool:
        return shared.events.emit("cancelled", 1, hold_us=1_000_000).delivered_to == 0

    until(nobody_waits)
    assert statuses(shared.view(run)) == {"wait": CANCELLED}
    assert shared.calls["after cancel"] == 0


def test_many_runs_at_once_all_end(shared: Bench) -> None:
    flow = WorkflowBuilder(name="many")
    flow.task("one", "t.say", args=["{{n}}"])
    flow.task("two", "t.wait", kwargs={"name": "many {{n}}"})
    flow.task("three", "t.say", args=["{{two}}"])
    runs = [shared.submit(flow, n=n) for n in range(20)]
    for n, run in enumerate(runs):
        shared.until_status(run, "two", WAITING)
        shared.events.emit(f"many {n}", n)
    assert [results(shared.ended(run))["three"] for run in runs] == list(range(20))


def test_nothing_runs_before_a_restored_store_was_looked_at(root: Path) -> None:
    def restored(txn: Transaction) -> None:
        txn.insert(Mark(RESTORED_TIME, "2026-01-01T00:00:00Z"))

    with bench(root) as made:
        made.store.catalog.write(restored, actor="test")
        told: list[str] = []
        made.start(say=told.append)
        flow = WorkflowBuilder(name="patient")
        flow.task("one", "t.say", args=["early"])
        run = made.submit(flow)
        until(lambda: bool(told))
        assert "restored as of 2026-01-01" in told[0]
        assert made.view(run).run.status == QUEUED
        accept(made.store.catalog, actor="test")
        assert made.ended(run).run.status == COMPLETED


# --- runners that come and go, clocks that step, and very many runs


def waiting(made: Bench, event: str) -> str:
    """A run that waits for an event, and says then what came."""
    flow = WorkflowBuilder(name="waiting")
    flow.task("wait", "t.wait", kwargs={"name": event})
    flow.task("last", "t.say", args=["{{wait}}"])
    run = made.submit(flow)
    if made.runs:
        made.until_status(run, "wait", WAITING)
        until(lambda: sleeps(made, run))
    return run


def asked(made: Bench, question: str, *values: str) -> list[Any]:
    """From the engine's own database, as it is at this moment."""
    with closing(sqlite3.connect(made.store.root / "workflows" / "engine.db")) as database:
        found = [one for (one,) in database.execute(question, values)]
        database.commit()
        return found


def sleeps(made: Bench, run: str, many: int = 1) -> bool:
    return asked(
        made,
        "SELECT count(*) FROM stage_executions s JOIN pipeline_executions e"
        " ON s.execution_id = e.id WHERE e.application = ? AND s.status = 'SUSPENDED'",
        run,
    ) == [many]


def carried(made: Bench) -> set[str]:
    """The runs that the engine's database holds."""
    return set(asked(made, "SELECT application FROM pipeline_executions"))


def _has_failed(made: Bench, run: str) -> bool:
    (found,) = [one for one in made.workflows.runs(TENANT, ACTOR).list().items if one.run_id == run]
    return found.status == FAILED and "no plan can be made of it" in found.error


def copies_of(
    made: Bench, run: str, many: int = 1, *, definition: bytes | None = None, **changes: Any
) -> list[str]:
    """Copies of a run, submitted in one transaction."""

    def insert(txn: Transaction) -> list[str]:
        first, text = txn.get(Run, run), txn.get(RunText, run)
        assert first is not None
        assert text is not None
        copies = [
            msgspec.structs.replace(first, run_id=new_id(txn.now_us), **changes)
            for _ in range(many)
        ]
        for copy in copies:
            txn.insert(copy)
            txn.insert(RunText(copy.run_id, definition or text.definition, text.inputs))
        return [copy.run_id for copy in copies]

    return made.store.catalog.write(insert, actor="test")


FRESH: Final[dict[str, Any]] = {"status": QUEUED, "started_at": None}


def test_all_open_runs_are_carried_however_many(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.catalog._PAGE", 2)
    monkeypatch.setattr("workflows.engine.runner._NEW", 2)
    with bench(root) as made:
        first = waiting(made, "go")
        early = [first, *copies_of(made, first, 6, **FRESH)]
        made.start()
        for run in early:
            made.until_status(run, "wait", WAITING)
        late = copies_of(made, early[0], 7, **FRESH)
        for run in late:
            made.until_status(run, "wait", WAITING)
        # A round of the runner: it lets go of the one that has ended, and of no other.
        made.cancel(early[0])
        until(lambda: early[0] not in carried(made), "it lets go")
        assert carried(made) == {*early[1:], *late}
        for _ in range(2):
            made.events.emit("go", 1, hold_us=3_600_000_000)
        for run in early[1:] + late:
            assert made.ended(run).run.status == COMPLETED


def test_a_plan_that_cannot_be_read_for_a_moment_fails_no_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.05)
    plan_of = Steps.plan_of
    tried: list[str] = []

    def plans(steps: Steps, run: Run) -> Plan:
        tried.append(run.run_id)
        if len(tried) == 1:
            raise OSError("input/output error")
        return plan_of(steps, run)

    monkeypatch.setattr(Steps, "plan_of", plans)
    with bench(root) as made:
        made.start()
        flow = WorkflowBuilder(name="patient")
        flow.task("one", "t.say")
        view = made.run(flow)
    assert (view.run.status, view.run.error) == (COMPLETED, "")
    assert len(tried) > 1


def test_a_run_of_which_no_plan_can_be_made_fails_alone(root: Path) -> None:
    with bench(root) as made:
        made.start()
        good, bad = waiting(made, "go"), waiting(made, "go")
        made.stop()
        never = copies_of(made, good, definition=b"{}", **FRESH)[0]

        def spoil(txn: Transaction) -> None:
            text = txn.get(RunText, bad)
            assert text is not None
            txn.replace(msgspec.structs.replace(text, definition=b"no JSON"))

        made.store.catalog.write(spoil, actor="test")
        file = root / "workflows" / "engine.db"
        before = file.stat().st_ino
        made.start()
        for run in (bad, never):
            until(partial(_has_failed, made, run))
        made.events.emit("go", 1)
        assert made.ended(good).run.status == COMPLETED
        assert file.stat().st_ino == before


def test_runs_that_ended_while_no_runner_ran_are_forgotten(root: Path) -> None:
    with bench(root) as made:
        made.start()
        ended, goes_on = waiting(made, "never"), waiting(made, "never")
        made.stop()
        made.cancel(ended)
        assert carried(made) == {ended, goes_on}
        made.start()
        until(lambda: carried(made) == {goes_on})


@pytest.mark.parametrize("claimed", [False, True])
def test_an_engine_that_is_older_than_the_catalog_goes_on(
    root: Path, tmp_path: Path, claimed: bool
) -> None:
    """After a power cut: its last commits are not synced."""
    with bench(root) as made:
        made.start()
        run = waiting(made, "first")
        flow = WorkflowBuilder(name="two")
        flow.task("one", "t.wait", kwargs={"name": "first"})
        flow.task("two", "t.wait", kwargs={"name": "second"})
        other = made.submit(flow)
        made.until_status(other, "one", WAITING)
        until(lambda: sleeps(made, other))
        made.stop()
        shutil.copytree(root / "workflows", tmp_path / "older")
        made.events.emit("first", 1)
        if claimed:  # and killed before the step was finished
            for each, step in ((run, "wait"), (other, "one")):
                wait = subscription_id(TENANT, each, step)
                assert made.workflows.events(TENANT, ACTOR).claim(wait) is not None
        else:
            made.start()
            made.until_status(other, "two", WAITING)
            assert made.ended(run).run.status == COMPLETED
            made.stop()
        shutil.rmtree(root / "workflows")
        shutil.move(tmp_path / "older", root / "workflows")
        made.start()
        made.until_status(other, "two", WAITING)
        made.events.emit("second", 2)
        assert made.ended(other).run.status == COMPLETED
        assert made.ended(run).run.status == COMPLETED


def test_a_clock_that_steps_on_begins_nothing_twice(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a pause of the process: what is at work stays leased."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=400)

    goes_on = threading.Event()

    def slow(calling: Calling) -> int:
        shared.calls["slow"] += 1
        goes_on.wait(60)
        return calling.attempt

    shared.registry.add("t.slow", slow)
    flow = WorkflowBuilder(name="slow")
    flow.task("slow", "t.slow")
    flow.task("last", "t.say", args=["{{slow}}"])
    run = shared.submit(flow)
    until(lambda: shared.calls["slow"] == 1)
    monkeypatch.setattr("stabilize.queue.sqlite.queue.datetime", Later)
    other = WorkflowBuilder(name="other")
    other.task("one", "t.say", args=["meanwhile"])
    assert shared.run(other).run.status == COMPLETED  # so the queue was looked at, many times
    goes_on.set()
    assert results(shared.ended(run)) == {"slow": 1, "last": 1}
    assert shared.calls["slow"] == 1


def test_a_clock_that_was_put_back_while_no_runner_ran_delays_nothing(root: Path) -> None:
    with bench(root) as made:
        made.start()
        flow = WorkflowBuilder(name="again")
        flow.task("flaky", "t.fail", kwargs={"why": "once", "until_attempt": 2})
        flow.retry(max_retries=1, delay=timedelta(seconds=1), backoff_factor=1.0)
        run = made.submit(flow)
        until(lambda: made.calls["once"] == 1)
        made.stop()
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        asked(made, "UPDATE queue_messages SET deliver_at = ? RETURNING id", tomorrow)
        made.start()
        assert made.ended(run).run.status == COMPLETED


def test_failures_are_counted_whatever_becomes_of_the_engines_database(root: Path) -> None:
    with bench(root) as made:
        made.start()
        flow = WorkflowBuilder(name="again")
        flow.task("one", "t.fail", kwargs={"why": "hopeless"})
        flow.retry(max_retries=1, delay=timedelta(seconds=0.5), backoff_factor=1.0)
        run = made.submit(flow)
        until(lambda: made.calls["hopeless"] == 1)
        made.stop()
        shutil.rmtree(root / "workflows")
        made.start()
        assert made.ended(run).run.status == FAILED
        assert made.calls["hopeless"] == 2


def test_a_delay_goes_on_whatever_becomes_of_the_engines_database(root: Path) -> None:
    with bench(root) as made:
        made.start()
        flow = WorkflowBuilder(name="again")
        flow.task("one", "t.fail", kwargs={"why": "once"})
        flow.retry(max_retries=1, delay=timedelta(hours=1))
        run = made.submit(flow)

        def delayed() -> bool:
            """The engine knows that the next attempt is far off."""
            contexts = asked(made, "SELECT context FROM stage_executions")
            return any(msgspec.json.decode(one).get("after_s", 0.0) > 3000.0 for one in contexts)

        until(lambda: made.calls["once"] == 1)
        until(delayed)
        made.stop()
        shutil.rmtree(root / "workflows")
        other = WorkflowBuilder(name="other")
        other.task("one", "t.say")
        made.start()
        assert made.run(other).run.status == COMPLETED
        until(delayed)
        assert made.calls["once"] == 1
        step = made.step(run, "one")
        assert step is not None
        assert (step.attempts, step.failures) == (1, 1)


def test_a_ring_that_fails_delays_no_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 600.0)
    with bench(root) as made:
        made.start()
        bad, good = waiting(made, "bad"), waiting(made, "good")
        ring, tried = Database.ring, []

        def broken(database: Database, execution: Execution, spot: Spot) -> None:
            if execution.run == bad:
                tried.append(spot)
                raise OSError("its own trouble")
            ring(database, execution, spot)

        monkeypatch.setattr(Database, "ring", broken)
        made.events.emit("bad", 1)
        until(lambda: bool(tried))
        made.events.emit("good", 1)
        assert made.ended(good).run.status == COMPLETED
        assert len(tried) == 1  # it comes again later, and nobody waits for that


def test_others_go_on_while_a_run_that_ended_is_forgotten(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.05)
    forgetting, begun, done = Database.forgetting, threading.Event(), threading.Event()

    def large(database: Database, run: str) -> Iterator[None]:
        begun.set()
        while not done.is_set():
            yield
        yield from forgetting(database, run)

    monkeypatch.setattr(Database, "forgetting", large)
    with bench(root) as made:
        made.start()
        made.cancel(waiting(made, "never"))
        assert begun.wait(60)
        other = waiting(made, "go")
        made.events.emit("go", 1)
        assert made.ended(other).run.status == COMPLETED
        done.set()
        runner = made._runner
        assert runner is not None
        until(lambda: not runner._steps.database.runs(), "all is forgotten")


def test_a_run_that_cannot_be_forgotten_delays_no_other(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.05)
    monkeypatch.setattr("workflows.engine.runner._LATER_S", 0.05)
    forgetting, tried, mended = Database.forgetting, threading.Event(), threading.Event()
    bad: list[str] = []

    def damaged(database: Database, run: str) -> Iterator[None]:
        if run in bad and not mended.is_set():
            tried.set()
            raise sqlite3.DatabaseError("database disk image is malformed")
        yield from forgetting(database, run)

    monkeypatch.setattr(Database, "forgetting", damaged)
    with bench(root) as made:
        made.start()
        bad.append(waiting(made, "never"))
        made.cancel(bad[0])
        assert tried.wait(60)
        other = waiting(made, "go")
        made.events.emit("go", 1)
        assert made.ended(other).run.status == COMPLETED
        runner = made._runner
        assert runner is not None
        until(lambda: runner._steps.database.runs() == set(bad), "the others are forgotten")
        mended.set()
        until(lambda: not runner._steps.database.runs(), "all is forgotten")


def test_an_item_that_ended_for_nothing_is_rung_for_until_its_loop_begins_it_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.05)
    with bench(root) as made:
        made.start()
        flow = WorkflowBuilder(name="items")
        flow.foreach("each", "{{ns}}", lambda body: body.wait_for_event("one", "go {{item}}"))
        run = made.submit(flow, ns=[0, 1])
        made.until_status(run, "each", WAITING)
        runner = made._runner
        assert runner is not None
        database = runner._steps.database
        until(lambda: len(list(database.sleeping(run))) == 3, "the loop and its items sleep")
        ring, tried = Database.ring, []

        def broken_once(database: Database, execution: Execution, spot: Spot) -> None:
            if spot.task == "each":
                tried.append(spot)
                if len(tried) == 1:
                    raise sqlite3.OperationalError("database or disk is full")
            ring(database, execution, spot)

        monkeypatch.setattr(Database, "ring", broken_once)
        connection = database._store._get_connection()
        connection.execute(
            "UPDATE pipeline_executions SET status = 'SUCCEEDED', end_time = 1 WHERE id = ?",
            (Execution(run, "each", "0").identifier,),
        )
        connection.commit()
        made.events.emit("go 0", 1, hold_us=60_000_000)
        made.events.emit("go 1", 1, hold_us=60_000_000)
        assert made.ended(run).run.status == COMPLETED
        assert len(tried) > 1


def test_a_ring_that_failed_comes_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.engine.runner._ROUND_S", 0.1)
    with bench(root) as made:
        made.start()
        run = waiting(made, "go")
        ring, tried = Database.ring, []

        def broken_once(database: Database, execution: Execution, spot: Spot) -> None:
            tried.append(spot)
            if len(tried) == 1:
                raise OSError("its own trouble")
            ring(database, execution, spot)

        monkeypatch.setattr(Database, "ring", broken_once)
        made.events.emit("go", 1)
        assert made.ended(run).run.status == COMPLETED


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[tuple[_Queue, list[float]]]:
    """A queue, and by how much the wall clock was put back since."""
    back_s = [0.0]
    url = f"sqlite:///{tmp_path / 'engine.db'}"
    store = SqliteWorkflowStore(url, create_tables=True)
    made = _Queue(url, lambda place: None, Shares(1), Places(1), lambda: time.time() - back_s[0])
    made._create_table()
    begun = Workflow.create(application="run", name="run", stages=[])
    begun.id = "x"
    store.store(begun)
    yield made, back_s
    made.close()
    store.close()


def test_a_clock_that_is_put_back_delays_nothing(queue: tuple[_Queue, list[float]]) -> None:
    made, back_s = queue
    made.push(StartWorkflow(execution_type="PIPELINE", execution_id="x"), timedelta(minutes=10))
    assert made.poll_one() is None
    back_s[0] = 600.0
    until(lambda: made.poll_one() is not None)


def test_a_message_that_could_not_be_given_back_is_given_back_later(
    queue: tuple[_Queue, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = queue

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    made.push(StartWorkflow(execution_type="PIPELINE", execution_id="x"))
    message = made.poll_one()
    assert message is not None
    with monkeypatch.context() as broken:
        broken.setattr(SqliteQueue, "reschedule", full)
        with pytest.raises(sqlite3.OperationalError):
            made.reschedule(message, timedelta(0))
    again: list[Message | None] = []

    def came() -> bool:
        again.append(made.poll_one())
        return again[-1] is not None

    until(came)
    assert again[-1] is not None
    assert again[-1].message_id == message.message_id
