"""Definitions: what highway_dsl writes is read as it was meant, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from highway_dsl import JoinMode, WorkflowBuilder

from cas.clock import SECOND_US
from cas.errors import InvalidWorkflow, OperatorUnsupported, TooLarge
from tests.workflows.running import bench
from workflows.definitions import (
    DEFINITION_BYTES_MAX,
    NESTING_MAX,
    TASKS_MAX,
    TEMPLATE_BYTES_MAX,
    Definition,
    Retry,
    Task,
)
from workflows.notation import YAML_BYTES_MAX

Build = Callable[[WorkflowBuilder], object]


def written(build: Build, name: str = "example") -> str:
    builder = WorkflowBuilder(name=name)
    build(builder)
    return str(builder.build().to_json())


def parsed(build: Build) -> Definition:
    return Definition.parse(written(build))


def refused(build: Build) -> InvalidWorkflow:
    with pytest.raises(InvalidWorkflow) as caught:
        parsed(build)
    return caught.value


def changed(build: Build, **fields: Any) -> str:
    """The definition with other fields than the builder writes."""
    return json.dumps({**json.loads(written(build)), **fields})


def one_task(builder: WorkflowBuilder) -> None:
    builder.task("a", "tools.storage.store", kwargs={"name": "n", "data": "{{x}}"}, result_key="r")


# --- reading


def test_a_task_keeps_what_it_calls_and_what_it_waits_for() -> None:
    definition = parsed(lambda b: b.task("a", "t.one", args=[1, "{{x}}"]).task("b", "t.two"))
    assert definition.name == "example"
    assert definition.tasks["a"] == Task("a", "task", [], function="t.one", args=[1, "{{x}}"])
    assert definition.tasks["b"].dependencies == ["a"]


def layers(width: int, count: int) -> dict[str, Any]:
    """Joins each of which waits for all of the layer before."""
    names = [[f"t{layer}_{number}" for number in range(width)] for layer in range(count)]
    return {
        name: {
            "task_id": name,
            "operator_type": "join",
            "join_tasks": names[layer - 1] if layer else [],
            "join_mode": "all_of",
        }
        for layer, row in enumerate(names)
        for name in row
    }


def text_of(tasks: dict[str, Any]) -> str:
    return json.dumps({"name": "d", "tasks": tasks})


def test_who_waits_for_whom_has_a_limit() -> None:
    assert len(Definition.parse(text_of(layers(30, 4))).tasks) == 120
    with pytest.raises(InvalidWorkflow, match=r"3600 dependencies.* more than 3000; .* one join"):
        Definition.parse(text_of(layers(30, 5)))
    branch = {"name": "b", "tasks": layers(30, 5)}
    fork = {
        "task_id": "fork",
        "operator_type": "parallel",
        "branches": {"b": list(layers(30, 5))},
        "branch_workflows": {"b": branch},
    }
    with pytest.raises(InvalidWorkflow, match="3600 dependencies"):
        Definition.parse(text_of({"fork": fork}))


def test_what_follows_from_others_does_not_count_as_a_dependency() -> None:
    names = [f"t{number}" for number in range(300)]
    tasks = {
        name: {
            "task_id": name,
            "operator_type": "join",
            "join_tasks": names[:number],
            "join_mode": "all_of",
        }
        for number, name in enumerate(names)
    }
    assert len(Definition.parse(text_of(tasks)).tasks["t299"].dependencies) == 299


def test_yaml_and_json_mean_the_same() -> None:
    builder = WorkflowBuilder(name="example")
    builder.task("a", "t.one").wait("pause", timedelta(minutes=5)).emit_event("tell", "done")
    workflow = builder.build()
    assert Definition.parse(workflow.to_yaml()) == Definition.parse(workflow.to_json())


def test_what_was_parsed_is_read_again_without_highway_dsl() -> None:
    definition = parsed(lambda b: b.foreach("each", "{{xs}}", lambda f: f.task("one", "t")))
    assert Definition.from_json(definition.to_json()) == definition


def test_the_tasks_of_a_loop_are_in_its_body_alone() -> None:
    definition = parsed(
        lambda b: (
            b.task("first", "t")
            .foreach("each", "{{xs}}", lambda f: f.task("x", "t").task("y", "t"))
            .task("last", "t")
        )
    )
    assert list(definition.tasks) == ["first", "each", "last"]
    each = definition.tasks["each"]
    assert [(task.task_id, task.dependencies) for task in each.body] == [("x", []), ("y", ["x"])]
    assert definition.tasks["last"].dependencies == ["each"]


def test_a_loop_in_a_loop_has_a_body_of_its_own() -> None:
    definition = parsed(
        lambda b: b.foreach(
            "outer",
            "{{xs}}",
            lambda f: f.task("x", "t").foreach("inner", "{{item}}", lambda g: g.task("y", "t")),
        )
    )
    assert list(definition.tasks) == ["outer"]
    x, inner = definition.tasks["outer"].body
    assert (x.task_id, inner.task_id, inner.dependencies) == ("x", "inner", ["x"])
    assert [task.task_id for task in inner.body] == ["y"]


def test_branches_hold_their_tasks_and_who_waits_for_one_waits_for_the_parallel() -> None:
    definition = parsed(
        lambda b: b.parallel(
            "split",
            {
                "left": lambda f: f.task("l1", "t").task("l2", "t"),
                "right": lambda f: f.task("r", "t"),
            },
        ).join("meet", ["l2", "r"], JoinMode.ALL_OF)
    )
    split = definition.tasks["split"]
    assert {name: [t.task_id for t in tasks] for name, tasks in split.branches.items()} == {
        "left": ["l1", "l2"],
        "right": ["r"],
    }
    assert definition.tasks["meet"].dependencies == ["split"]
    assert definition.tasks["meet"].trigger_rule == "all_done"


def test_the_task_that_waits_for_branches_is_a_join() -> None:
    definition = parsed(
        lambda b: b.parallel_with_join("split", {"one": lambda f: f.task("x", "t")})
    )
    join = definition.tasks["split_join"]
    assert (join.operator, join.dependencies) == ("join", ["split"])
    assert join.result_key == "split_results"


def test_waits_are_seconds_times_or_templates() -> None:
    at = datetime(2030, 1, 2, 3, 4, tzinfo=UTC)
    definition = parsed(
        lambda b: b.wait("a", timedelta(hours=1, seconds=2)).wait("b", at).wait("c", "{{later}}")
    )
    tasks = definition.tasks
    assert tasks["a"].wait_for == 3602
    assert datetime.fromisoformat(str(tasks["b"].wait_for)) == at
    assert tasks["c"].wait_for == "{{later}}"


@pytest.mark.parametrize(
    "wait_for",
    [timedelta(days=3), timedelta(days=1, hours=12), timedelta(days=400), timedelta(seconds=0.5)],
)
def test_waits_of_any_length_are_as_long_as_they_say(wait_for: timedelta) -> None:
    tasks = parsed(lambda b: b.wait("a", wait_for).wait("b", "90")).tasks
    assert tasks["a"].wait_for == wait_for.total_seconds()
    assert tasks["b"].wait_for == 90


def test_policies_become_seconds() -> None:
    def build(builder: WorkflowBuilder) -> None:
        builder.task("a", "t").retry(max_retries=2, delay=timedelta(seconds=3), backoff_factor=1.5)
        builder.timeout(timeout=timedelta(minutes=1))
        builder.wait_for_event("b", "paid", timeout_seconds=90)

    tasks = parsed(build).tasks
    assert tasks["a"].retry == Retry(2, 3.0, 1.5)
    assert tasks["a"].timeout_s == 60
    assert tasks["b"].timeout_s == 90


def test_a_condition_leads_to_tasks_of_its_own_level() -> None:
    definition = parsed(
        lambda b: b.condition(
            "ask", "{{x}} > 3", lambda f: f.task("yes", "t"), lambda f: f.task("no", "t")
        )
    )
    ask = definition.tasks["ask"]
    assert (ask.condition, ask.if_true, ask.if_false) == ("{{x}} > 3", "yes", "no")


@pytest.mark.parametrize("written_as", ["to_json", "to_yaml"])
def test_a_loop_in_a_way_waits_for_the_condition_and_its_body_for_nothing(written_as: str) -> None:
    builder = WorkflowBuilder(name="example")
    builder.task("before", "t").condition(
        "ask",
        "1 > 0",
        lambda yes: yes.task("first", "t").foreach(
            "each", "{{xs}}", lambda f: f.task("x", "t").foreach("in", "{{item}}", two_tasks)
        ),
        lambda no: no.foreach("other", "{{xs}}", lambda f: f.task("z", "t")),
    )
    definition = Definition.parse(getattr(builder.build(), written_as)())
    each, other = definition.tasks["each"], definition.tasks["other"]
    assert (each.dependencies, other.dependencies) == (["first", "ask"], ["ask"])
    (x, inner), (z,) = each.body, other.body
    assert (x.dependencies, inner.dependencies, z.dependencies) == ([], ["x"], [])
    assert [task.dependencies for task in inner.body] == [[], ["y1"]]


def two_tasks(builder: WorkflowBuilder) -> WorkflowBuilder:
    return builder.task("y1", "t").task("y2", "t")


@pytest.mark.parametrize("written_as", ["to_json", "to_yaml"])
def test_what_comes_after_a_condition_alone_is_of_no_way(written_as: str) -> None:
    builder = WorkflowBuilder(name="example")
    builder.condition("ask", "1 > 0", lambda f: f.task("yes", "t"), lambda f: f.task("no", "t"))
    builder.task("next", "t")
    definition = Definition.parse(getattr(builder.build(), written_as)())
    assert definition.tasks["next"].dependencies == ["ask"]


def test_conditions_in_ways_and_what_follows_them_are_taken() -> None:
    definition = parsed(
        lambda b: (
            b.task("start", "t")
            .condition(
                "outer",
                "1 > 0",
                lambda yes: (
                    yes.task("a", "t")
                    .condition("in", "1 > 0", two_tasks, lambda f: f.task("c", "t"))
                    .task("d", "t")
                ),
                lambda no: no.condition("only", "1 > 0", a_loop, lambda f: f.task("e", "t")),
            )
            .task("after", "t")
            .join("meet", ["a", "e"], JoinMode.ALL_OF, dependencies=["outer", "start"])
        )
    )
    assert definition.tasks["d"].dependencies == ["in", "outer"]
    assert definition.tasks["y2"].dependencies == ["y1", "in", "outer"]
    assert definition.tasks["each"].dependencies == ["only", "outer"]
    assert definition.tasks["each"].body[0].dependencies == []


def a_loop(builder: WorkflowBuilder) -> WorkflowBuilder:
    return builder.foreach("each", "{{xs}}", lambda f: f.task("x", "t"))


def test_results_are_known_by_their_keys_but_not_those_of_loops() -> None:
    definition = parsed(
        lambda b: b.parallel("p", {"one": lambda f: f.task("x", "t", result_key="rx")}).foreach(
            "each", "{{xs}}", lambda f: f.task("y", "t", result_key="ry")
        )
    )
    assert definition.result_key("x") == "rx"
    assert definition.result_key("y") is None
    assert definition.result_key("nobody") is None


# --- refusing


def test_an_operator_that_is_not_carried_is_named() -> None:
    with pytest.raises(OperatorUnsupported) as caught:
        parsed(lambda b: b.while_loop("again", "{{x}}", lambda f: f.task("a", "t")))
    assert (caught.value.value, caught.value.operator) == ("again", "while")


def test_an_operator_in_a_body_or_a_branch_is_named_too() -> None:
    for build in (
        lambda b: b.foreach("each", "{{xs}}", lambda f: f.switch("choose", "{{x}}", {"1": "a"})),
        lambda b: b.parallel("p", {"one": lambda f: f.switch("choose", "{{x}}", {"1": "a"})}),
    ):
        with pytest.raises(OperatorUnsupported) as caught:
            parsed(build)
        assert caught.value.operator == "switch"


def test_what_would_run_otherwise_than_it_says_is_refused() -> None:
    assert "schedule" in refused_text(changed(one_task, schedule="0 * * * *"))
    assert "deadline_seconds" in refused_text(changed(one_task, deadline_seconds=5))
    task = json.loads(written(one_task))
    task["tasks"]["a"]["on_failure_task_id"] = "b"
    assert "on_failure_task_id" in refused_text(json.dumps(task))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it has no tasks"),
        ("[]", "it has no tasks"),
        ("{}", "it has no tasks"),
        ('{"tasks": {"a": 5}}', "it has no operator_type"),
        ('{"tasks": {"a": {"operator_type": []}}}', "it has no operator_type"),
        ('{"name": "x", "tasks": {}}', "it has no tasks"),
        ('{"name": 7, "tasks": {}}', "argument of type 'int'"),
        ('{"name": "x", "tasks": {"a": {"operator_type": "task"}}}', "Field required"),
        ('{"broken', "not valid JSON"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: [", "not valid YAML"),
        ("[" * 100_000, "too deep"),
        ("a: " + "[" * 50_000, "too deep"),
        ('{"name": "x", "variables": {"a": ' + "[" * 250 + "]" * 250 + "}}", "too deep"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!python/object/apply:os.getpid []", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("null: 1", "no JSON value"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: b\n" + "# a remark\n" * 12_000, "YAML may have 131072 bytes"),
    ],
)
def test_what_is_no_workflow_is_refused_with_the_reason(text: str, reason: str) -> None:
    assert reason in refused_text(text)


def test_a_definition_has_a_limit() -> None:
    with pytest.raises(TooLarge):
        Definition.parse(" " * (DEFINITION_BYTES_MAX + 1))


def test_tasks_depend_on_what_is_there_and_in_no_circle() -> None:
    assert "which is not there" in str(refused(lambda b: b.task("a", "t", dependencies=["b"])))
    circle = lambda b: b.task("a", "t", dependencies=["b"]).task("b", "t", dependencies=["a"])  # noqa: E731
    assert "depends on itself" in str(refused(circle))


def test_two_tasks_of_one_name_are_told_as_that() -> None:
    twice = refused(lambda b: b.task("a", "t").task("a", "t"))
    assert (twice.value, "two tasks were given one name" in twice.reason) == ("a", True)
    around = refused(lambda b: b.task("a", "t").task("b", "t").task("a", "t"))
    assert "(a after b after a)" in around.reason or "(b after a after b)" in around.reason


def with_fields(task: str, **fields: Any) -> str:
    """One of each operator, one of them with fields that the builder does not write."""
    value = json.loads(written(one_of_each))
    value["tasks"][task].update(fields)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("task", "fields", "told"),
    [
        ("emit_event", {"depends_on": ["a"]}, "'depends_on'; did you mean 'dependencies'"),
        ("wait_for_event", {"timeout_second": 5}, "'timeout_second'; did you mean 'timeout_sec"),
        ("join", {"retry": {"max_retries": 3}}, "'retry'; did you mean 'retry_policy'"),
        ("wait", {"timeout_policy": {"timeout": "PT1S", "at_once": True}}, "'at_once'; there are "),
        ("emit_event", {"retry_policy": {"max_retrys": 3}}, "'max_retrys'; did you mean 'max_ret"),
    ],
)
def test_a_field_that_nobody_knows_is_named(task: str, fields: dict[str, Any], told: str) -> None:
    assert f"workflow '{task}': there is no field {told}" in refused_text(
        with_fields(task, **fields)
    )


def test_fields_that_nobody_knows_are_found_at_the_top_and_in_branches_and_bodies() -> None:
    assert "'timout'" in refused_text(changed(one_task, timout=5))
    wrong = {"max_retries": 2, "wait": "PT1S"}
    assert "no field 'wait'" in refused_text(changed(one_task, default_retry_policy=wrong))
    value = json.loads(written(one_of_each))
    value["tasks"]["parallel"]["branch_workflows"]["one"]["tasks"]["b"]["retries"] = 3
    assert "workflow 'b': there is no field 'retries'" in refused_text(json.dumps(value))
    value = json.loads(nested(2, {"task_id": "z", "operator_type": "task", "function": "t"}))
    value["tasks"]["l"]["loop_body"][0]["loop_body"][0]["depends_on"] = ["l0"]
    assert "workflow 'z': there is no field 'depends_on'" in refused_text(json.dumps(value))


@pytest.mark.parametrize("empty", [None, False, "", [], {}])
def test_a_field_of_a_later_highway_dsl_that_says_nothing_is_passed_over(empty: Any) -> None:
    assert Definition.parse(with_fields("join", of_the_future=empty)) == parsed(one_of_each)
    assert Definition.parse(changed(one_of_each, of_the_future=empty)) == parsed(one_of_each)


def test_events_of_operators_may_have_a_correlation_key() -> None:
    for name in ("wait_for_event", "emit_event"):
        for key, found in (("order_1", "order_1"), ("{{order}}", "{{order}}"), ("", None)):
            tasks = Definition.parse(with_fields(name, correlation_key=key)).tasks
            assert tasks[name].correlation_key == found
        assert "correlation_key: 1 to" in refused_text(with_fields(name, correlation_key="a\n"))
        assert "correlation_key: a text" in refused_text(with_fields(name, correlation_key=7))
        assert "{{ a" in refused_text(with_fields(name, correlation_key="{{ a"))


def test_a_time_for_branches_that_would_not_be_kept_is_refused() -> None:
    def join(**given: Any) -> Definition:
        return parsed(lambda b: b.parallel_with_join("p", {"one": two_tasks}, **given))

    assert join() == join(timeout_seconds=300)
    with pytest.raises(InvalidWorkflow, match="'p_join': timeout_seconds of branches is not"):
        join(timeout_seconds=1)


def test_a_template_that_cannot_be_read_is_named_with_its_task() -> None:
    odd = refused(lambda b: b.task("a", "t").task("b", "t", kwargs={"x": ["{{ y + }}"]}))
    assert odd.value == "b"
    condition = refused(
        lambda b: b.condition(
            "ask", "{{x}} >", lambda f: f.task("yes", "t"), lambda f: f.task("no", "t")
        )
    )
    assert condition.value == "ask"


def choice_with(dependencies: list[str]) -> Build:
    """A condition with a way of two tasks, the second of which depends on these."""

    def way(builder: WorkflowBuilder) -> WorkflowBuilder:
        return builder.task("pay", "t").task("book", "t", dependencies=list(dependencies))

    return lambda b: (
        b.task("amount", "t")
        .task("other", "t", dependencies=[])
        .condition("big", "1 > 0", way, lambda f: f.task("no", "t"), dependencies=["amount"])
    )


@pytest.mark.parametrize("dependencies", [["amount"], ["other"], ["amount", "other"]])
def test_a_task_that_may_be_of_either_way_is_refused(dependencies: list[str]) -> None:
    odd = refused(choice_with(dependencies))
    assert odd.value == "book"
    assert "the condition 'big'" in odd.reason


def two_ways(name: str) -> Callable[[WorkflowBuilder], WorkflowBuilder]:
    return lambda b: b.condition(
        name,
        "1 > 0",
        lambda f: f.task(f"{name}_yes", "t"),
        lambda f: f.task(f"{name}_no", "t"),
        dependencies=[],
    )


def test_a_join_of_conditions_is_of_no_way() -> None:
    definition = parsed(
        lambda b: (
            two_ways("second")(two_ways("first")(b.task("a", "t")))
            .join("both", ["a", "first", "second"], JoinMode.ALL_SUCCESS, dependencies=[])
            .join("after", ["a", "first"], JoinMode.ALL_SUCCESS)
        )
    )
    assert definition.tasks["both"].joined == ["a", "first", "second"]
    assert definition.tasks["after"].joined == ["a", "first"]
    assert Definition.from_json(definition.to_json()) == definition
    odd = refused(
        lambda b: two_ways("second")(two_ways("first")(b)).task(
            "both", "t", dependencies=["first", "second"]
        )
    )
    assert (odd.value, "join_tasks" in odd.reason) == ("both", True)


def test_who_depends_on_the_inner_condition_alone_is_of_no_way() -> None:
    definition = parsed(
        lambda b: b.condition(
            "urgent", "1 > 0", lambda f: f.task("page", "t"), two_ways("big")
        ).task("done", "t", dependencies=["page", "big"])
    )
    assert definition.tasks["big"].dependencies == ["urgent"]
    assert set(definition.tasks["done"].dependencies) == {"page", "big"}


def test_a_task_that_comes_after_its_way_may_depend_on_more() -> None:
    definition = parsed(choice_with(["other", "pay"]))
    assert definition.tasks["book"].dependencies == ["other", "pay", "big"]


def nested(levels: int, innermost: dict[str, Any]) -> str:
    task = innermost
    for number in range(levels):
        task = {
            "task_id": f"l{number}",
            "operator_type": "foreach",
            "items": "[1]",
            "loop_body": [task],
        }
    return json.dumps({"name": "deep", "tasks": {"l": task}})


@pytest.mark.parametrize("levels", [NESTING_MAX, 45])
def test_what_is_wrong_in_many_loops_is_found_at_once(levels: int) -> None:
    # Tried class by class this took twice as long for each loop: forever with 45 of them.
    wrong = {"task_id": "z", "operator_type": "task", "function": 5}
    told = refused_text(nested(levels, wrong))
    assert ("'z': function: Input" in told) == (levels == NESTING_MAX)


def test_loops_and_branches_have_a_limit_in_each_other() -> None:
    task = {"task_id": "z", "operator_type": "task", "function": "t"}
    assert len(list(Definition.parse(nested(NESTING_MAX, task)).everything())) == NESTING_MAX + 1
    assert f"more than {NESTING_MAX} loops" in refused_text(nested(NESTING_MAX + 1, task))


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        ({"task_id": "z", "operator_type": "task"}, "'z': function: Field required"),
        ({"task_id": "z", "operator_type": "task", "function": 5}, "'z': function: Input"),
        ({"task_id": "z", "operator_type": "wait_for_event"}, "'z': event_name: Field"),
        ({"operator_type": "join", "join_tasks": []}, "task_id: Field required"),
        ({"task_id": "z"}, "'z': it has no operator_type"),
        ({"task_id": "z", "operator_type": "foreach", "items": "x", "loop_body": {}}, "no list"),
        ({"task_id": "z", "operator_type": "parallel", "branch_workflows": []}, "not those"),
        ({"task_id": "z", "operator_type": "parallel", "branches": {"a": ["b"]}}, "has no tasks"),
        (5, "it has no operator_type"),
    ],
)
def test_what_is_wrong_in_a_body_is_refused_by_name(inner: Any, reason: str) -> None:
    loop = {"task_id": "l", "operator_type": "foreach", "items": "[1]", "loop_body": [inner]}
    assert reason in refused_text(json.dumps({"name": "wrong", "tasks": {"l": loop}}))


def test_a_task_of_a_body_that_is_repeated_otherwise_is_refused() -> None:
    value = json.loads(written(lambda b: b.foreach("each", "{{xs}}", two_tasks)))
    value["tasks"]["y1"]["function"] = "another"
    assert "'y1': it is written twice" in refused_text(json.dumps(value))
    value["tasks"]["y1"]["is_internal_loop_task"] = False
    assert "'y1': two tasks have this name" in refused_text(json.dumps(value))


def test_a_branch_has_what_it_says_and_nothing_of_its_own() -> None:
    branches = lambda b: b.parallel("p", {"one": lambda f: f.task("x", "t")})  # noqa: E731
    for field, odd, reason in (
        ("variables", {"a": 1}, "variables of a branch"),
        ("deadline_seconds", 5, "deadline_seconds is not supported"),
        (
            "tasks",
            {"x": {"task_id": "x", "operator_type": "task"}},
            "'x': function: Field required",
        ),
    ):
        value = json.loads(written(branches))
        value["tasks"]["p"]["branch_workflows"]["one"][field] = odd
        assert reason in refused_text(json.dumps(value))
    value = json.loads(written(branches))
    value["tasks"]["p"]["branch_workflows"]["two"] = {}
    assert "not those of its branches" in refused_text(json.dumps(value))


def one_of_each(builder: WorkflowBuilder) -> None:
    builder.foreach("foreach", "{{xs}}", lambda f: f.task("x", "t"))
    builder.wait_for_event("wait_for_event", "paid").wait("wait", "5")
    builder.condition("condition", "1 > 0", lambda f: f.task("y", "t"), lambda f: f.task("n", "t"))
    builder.parallel_with_join("parallel", {"one": lambda f: f.task("b", "t")})
    builder.join("join", ["parallel"], JoinMode.ALL_OF).emit_event("emit_event", "done")


@pytest.mark.parametrize(
    "name",
    ["foreach", "wait_for_event", "wait", "condition", "parallel", "parallel_join", "join"],
)
def test_a_retry_that_would_not_be_followed_is_refused(name: str) -> None:
    value = json.loads(written(one_of_each))
    value["tasks"][name]["retry_policy"] = {"max_retries": 0}
    Definition.parse(json.dumps(value))
    value["tasks"][name]["retry_policy"] = {"max_retries": 1}
    reason = f"a retry of {name.removeprefix('parallel_')} is not supported"
    assert reason in refused_text(json.dumps(value))


def test_retries_are_of_tasks_and_of_events_that_are_emitted() -> None:
    value = json.loads(written(one_of_each))
    value["default_retry_policy"] = {"max_retries": 2, "delay": "PT1S", "backoff_factor": 1}
    value["tasks"]["emit_event"]["retry_policy"] = value["default_retry_policy"]
    found = {
        task.task_id for task in Definition.parse(json.dumps(value)).everything() if task.retry
    }
    assert found == {"x", "y", "n", "b", "emit_event"}


@pytest.mark.parametrize("name", ["", "e" * 256, "a\nb"])
def test_an_event_has_a_name_that_events_can_have(name: str) -> None:
    for build in (lambda b: b.wait_for_event("a", name), lambda b: b.emit_event("a", name)):
        assert "event_name: 1 to 255 printable characters" in str(refused(build))


@pytest.mark.parametrize("name", ["upload_x", "approval_x", "webhook_x"])
def test_an_event_of_the_store_is_waited_for_and_not_emitted(name: str) -> None:
    parsed(lambda b: b.wait_for_event("a", name))
    parsed(lambda b: b.emit_event("a", "{{name}}"))
    assert "the store's own" in str(refused(lambda b: b.emit_event("a", name)))


@pytest.mark.parametrize("until", ["2045-01-01T00:00:00Z", "2045-01-01T00:00:00"])
def test_a_wait_until_a_time_that_no_wait_lasts_to_is_refused(until: str) -> None:
    definition = parsed(lambda b: b.foreach("each", "{{xs}}", lambda f: f.wait("a", until)))
    definition.check_times(at_us(2036))
    with pytest.raises(InvalidWorkflow, match="up to ten years"):
        definition.check_times(at_us(2034))


def test_it_is_refused_when_a_run_is_submitted(tmp_path: Path) -> None:
    flow = WorkflowBuilder(name="example").wait("a", "2999-01-01T00:00:00Z")
    with bench(tmp_path) as store, pytest.raises(InvalidWorkflow, match="up to ten years"):
        store.submit(flow)


def at_us(year: int) -> int:
    return round(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * SECOND_US


def test_a_timeout_that_would_not_be_kept_is_refused() -> None:
    reason = str(refused(lambda b: b.parallel("p", {"x": lambda f: f.task("a", "t")}, timeout=5)))
    assert "a timeout of parallel" in reason


def test_no_two_tasks_have_one_name_wherever_they_are() -> None:
    twice = refused(lambda b: b.task("x", "t").parallel("p", {"one": lambda f: f.task("x", "t")}))
    assert twice.value == "x"


@pytest.mark.parametrize("name", ["a/b", "a#1", "a:b", "a!time", ".", "..", "x" * 201])
def test_a_name_that_could_not_be_asked_for_is_refused(name: str) -> None:
    assert "a name " in str(refused(lambda b: b.task(name, "t")))


def test_a_definition_has_so_many_tasks_at_most() -> None:
    def build(builder: WorkflowBuilder) -> None:
        for number in range(TASKS_MAX + 1):
            builder.task(f"t{number}", "t")

    assert str(TASKS_MAX) in str(refused(build))


def test_tools_that_are_not_there_are_named() -> None:
    definition = parsed(lambda b: b.foreach("each", "{{xs}}", lambda f: f.task("one", "t.odd")))
    definition.check_tools(["t.odd"])
    with pytest.raises(InvalidWorkflow, match=r"'t\.odd'; there are t\.even"):
        definition.check_tools(["t.even"])
    misspelt = parsed(lambda b: b.task("one", "tools.storage.request_uplaod"))
    with pytest.raises(InvalidWorkflow, match=r"; did you mean 'tools\.storage\.request_upload'"):
        misspelt.check_tools(["tools.storage.request_upload", "tools.storage.store"])
    with pytest.raises(InvalidWorkflow, match=r"'one': t\.odd: not on Sundays"):
        definition.check_tools(["t.odd"], {"t.odd": "not on Sundays"})


@pytest.mark.parametrize("where", ["name", "variables", "data", "key"])
def test_half_a_character_is_refused_wherever_it_stands(where: str) -> None:
    value = json.loads(written(one_task))
    match where:
        case "name":
            value["name"] = "\ud800"
        case "variables":
            value["variables"] = {"deep": [{"x": "a\udc00"}]}
        case "data":
            value["tasks"]["a"]["kwargs"]["data"] = "\ud800"
        case "key":
            value["tasks"]["a"]["kwargs"]["\ud800"] = 1
    assert "half of a surrogate pair" in refused_text(json.dumps(value))
    assert "half of a surrogate pair" in refused_text(json.dumps(value, ensure_ascii=False))
    refused_text("name: \ud800")


def test_yaml_at_its_limit_is_read_in_no_time() -> None:
    head = "name: n\nvariables:\n  x: ["
    text = head + "1," * ((YAML_BYTES_MAX - len(head) - 60) // 2) + "1]\n"
    text += "tasks: {t: {operator_type: task, task_id: t, function: f}}\n"
    assert len(text) <= YAML_BYTES_MAX + 20
    text = text.replace("1,", "", 20)
    began = time.process_time()
    definition = Definition.parse(text)
    assert time.process_time() - began < 5  # 0.4 s with libyaml on a slow machine
    assert len(definition.variables["x"]) > 60_000


def test_yaml_is_read_without_libyaml_too() -> None:
    program = """
import sys
sys.modules["yaml._yaml"] = None
from cas.errors import InvalidWorkflow
from workflows.notation import read_notation
import yaml
assert not yaml.__with_libyaml__
assert read_notation("a: [1, {b: c}]") == {"a": [1, {"b": "c"}]}
for odd in ("a: &x [1]\\nb: *x", "a: " + "[" * 50_000, "a: !!bool x"):
    try:
        read_notation(odd)
    except InvalidWorkflow as error:
        print(error.reason)
"""
    words = [sys.executable, "-c", program]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 3
    assert "aliases are not taken" in said[0]
    assert said[1] == "too deep"


def test_templates_of_a_definition_have_a_limit_together() -> None:
    long = "{{" + "a." * 7000 + "a}}"

    def build(builder: WorkflowBuilder) -> None:
        for number in range(20):
            builder.task(f"t{number}", "t", args=[f"{number}{long}"])

    assert f"more than {TEMPLATE_BYTES_MAX} bytes of templates" in str(refused(build))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"max_retries": -1}, "max_retries: 0 to 1000"),
        ({"max_retries": 1001}, "max_retries: 0 to 1000"),
        ({"max_retries": 10**40}, "max_retries: 0 to 1000"),
        ({"delay": "PT-1S"}, ""),
        ({"delay": "-PT1S"}, "delay of retries: 0 to 86400 seconds"),
        ({"delay": "P2D"}, "delay of retries: 0 to 86400 seconds"),
        ({"delay": 1e300}, ""),
        ({"backoff_factor": 0.5}, "backoff_factor: 1 to 100"),
        ({"backoff_factor": 101}, "backoff_factor: 1 to 100"),
        ({"backoff_factor": float("nan")}, "no JSON value"),
        ({"backoff_factor": float("inf")}, "no JSON value"),
    ],
)
def test_retries_have_limits(policy: dict[str, Any], reason: str) -> None:
    given = {"max_retries": 2, "delay": "PT1S", "backoff_factor": 2, **policy}
    of_task = json.loads(written(one_task))
    of_task["tasks"]["a"]["retry_policy"] = given
    assert reason in refused_text(json.dumps(of_task))
    assert reason in refused_text(changed(one_task, default_retry_policy=given))


@pytest.mark.parametrize("timeout", ["PT0S", "-PT1S", "P4000D", 1e300])
def test_timeouts_have_limits(timeout: Any) -> None:
    value = json.loads(written(one_task))
    value["tasks"]["a"]["timeout_policy"] = {"timeout": timeout}
    assert "time" in refused_text(json.dumps(value))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_are_none_are_refused_and_not_kept_as_null(number: str) -> None:
    for text in (changed(one_task, variables={"x": 7}), changed(one_task, variables={"x": [7]})):
        assert "no JSON value" in refused_text(text.replace("7", number))
    assert "no JSON value" in refused_text("name: w\ntasks: {}\nvariables: {x: .nan}")


@pytest.mark.parametrize("seconds", [0, -1, 10**9, 10**400])
def test_waits_for_events_have_limits(seconds: int) -> None:
    build = lambda b: b.wait_for_event("a", "paid", timeout_seconds=seconds)  # noqa: E731
    assert "up to ten years" in str(refused(build))


@pytest.mark.parametrize("wait_for", [timedelta(days=4000), timedelta(days=-1), "-1", "inf"])
def test_waits_have_limits(wait_for: Any) -> None:
    assert "a wait takes" in str(refused(lambda b: b.wait("a", wait_for)))


def test_a_wait_for_nothing_that_is_a_time_is_refused() -> None:
    assert "a wait takes seconds" in str(refused(lambda b: b.wait("a", "tomorrow")))


def refused_text(text: str) -> str:
    with pytest.raises(InvalidWorkflow) as caught:
        Definition.parse(text)
    return str(caught.value)
