"""Definitions: what highway_dsl writes is read as it was meant, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from highway_dsl import JoinMode, WorkflowBuilder

from cas.errors import InvalidWorkflow, OperatorUnsupported, TooLarge
from workflows.definitions import (
    DEFINITION_BYTES_MAX,
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


def test_a_template_that_cannot_be_read_is_named_with_its_task() -> None:
    odd = refused(lambda b: b.task("a", "t").task("b", "t", kwargs={"x": ["{{ y + }}"]}))
    assert odd.value == "b"
    condition = refused(
        lambda b: b.condition(
            "ask", "{{x}} >", lambda f: f.task("yes", "t"), lambda f: f.task("no", "t")
        )
    )
    assert condition.value == "ask"


def test_a_timeout_that_would_not_be_kept_is_refused() -> None:
    reason = str(refused(lambda b: b.parallel("p", {"x": lambda f: f.task("a", "t")}, timeout=5)))
    assert "a timeout of parallel" in reason


def test_no_two_tasks_have_one_name_wherever_they_are() -> None:
    twice = refused(lambda b: b.task("x", "t").parallel("p", {"one": lambda f: f.task("x", "t")}))
    assert twice.value == "x"


def test_a_definition_has_so_many_tasks_at_most() -> None:
    def build(builder: WorkflowBuilder) -> None:
        for number in range(TASKS_MAX + 1):
            builder.task(f"t{number}", "t")

    assert str(TASKS_MAX) in str(refused(build))


def test_tools_that_are_not_there_are_named() -> None:
    definition = parsed(lambda b: b.foreach("each", "{{xs}}", lambda f: f.task("one", "t.odd")))
    definition.check_tools(["t.odd"])
    with pytest.raises(InvalidWorkflow, match=r"t\.odd"):
        definition.check_tools(["t.even"])


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
        ({"backoff_factor": float("nan")}, "backoff_factor: 1 to 100"),
        ({"backoff_factor": float("inf")}, "backoff_factor: 1 to 100"),
    ],
)
def test_retries_have_limits(policy: dict[str, Any], reason: str) -> None:
    given = {"max_retries": 2, "delay": "PT1S", "backoff_factor": 2, **policy}
    of_task = json.loads(written(one_task))
    of_task["tasks"]["a"]["retry_policy"] = given
    assert reason in refused_text(json.dumps(of_task))
    assert reason in refused_text(changed(one_task, default_retry_policy=given))


@pytest.mark.parametrize("timeout", ["PT0S", "-PT1S", "P4000D", 1e300, float("inf")])
def test_timeouts_have_limits(timeout: Any) -> None:
    value = json.loads(written(one_task))
    value["tasks"]["a"]["timeout_policy"] = {"timeout": timeout}
    assert "time" in refused_text(json.dumps(value))


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
