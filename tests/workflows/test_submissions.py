"""Submissions: the same is refused here as by a server, before anything is recorded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from highway_dsl import JoinMode, TriggerRule, WorkflowBuilder

from cas.errors import InvalidRequest, InvalidWorkflow, TooLarge
from tests.workflows.running import ACTOR, TENANT, Bench, bench
from workflows.notation import LEVELS_MAX
from workflows.runs_cli import LocalRuns
from workflows.submissions import INPUTS_BYTES_MAX, read_submission
from workflows.tools import Registry, built_in

TOOL = "tools.storage.store"
Build = Callable[[WorkflowBuilder], object]


@pytest.fixture
def made(memory: Path) -> Iterator[Bench]:
    with bench(memory) as made:
        yield made


def definition(tool: str = TOOL) -> str:
    builder = WorkflowBuilder(name="example")
    builder.task("keep", tool, kwargs={"name": "n", "data": "{{text}}"})
    return str(builder.build().to_json())


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def test_what_a_command_submits_here_has_the_limits_that_a_server_has(made: Bench) -> None:
    runs = LocalRuns(made.store, made.workflows, TENANT, ACTOR)
    with pytest.raises(TooLarge) as refused:
        runs.submit(definition(), {"text": "x" * INPUTS_BYTES_MAX})
    assert refused.value.limit_bytes == INPUTS_BYTES_MAX
    with pytest.raises(InvalidWorkflow, match="too deep"):
        runs.submit(definition(), {"text": nested(LEVELS_MAX)})
    with pytest.raises(InvalidWorkflow, match="no tool"):
        runs.submit(definition("no.such.tool"), {})
    assert runs.list(None, None, 10)["runs"] == []
    fits = "x" * (INPUTS_BYTES_MAX - len('{"text":""}'))
    run_id = runs.submit(definition(), {"text": fits})["run_id"]
    assert runs.get(run_id)["inputs"] == {"text": fits}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "no JSON"),
        (float("inf"), "no JSON"),
        (float("-inf"), "no JSON"),
        ("\ud800", "half of a surrogate pair"),
        (10**5000, "no JSON"),
        (object(), "no JSON"),
        ({(1, 2): 3}, "no JSON"),
    ],
    ids=["nan", "infinite", "negative", "surrogate", "digits", "object", "key"],
)
def test_inputs_that_cannot_be_kept_are_refused_and_not_changed(
    made: Bench, value: Any, reason: str
) -> None:
    runs = LocalRuns(made.store, made.workflows, TENANT, ACTOR)
    with pytest.raises(InvalidRequest, match=reason) as refused:
        runs.submit(definition(), {"text": [{"within": value}]})
    assert refused.value.field == "inputs"
    assert runs.list(None, None, 10)["runs"] == []


def test_a_tool_that_is_barred_is_refused_with_the_reason() -> None:
    assert read_submission(definition(), {"text": "x"}, built_in(), {}).name == "example"
    with pytest.raises(InvalidWorkflow, match="because"):
        read_submission(definition(), {"text": "x"}, built_in(), {TOOL: "because"})


# --- what people would do their part for in vain


def tools() -> Registry:
    registry = built_in()
    registry.add("t.say", lambda calling, what=None, *more: what)
    return registry


def submitted(build: Build, **inputs: Any) -> None:
    """What it builds is taken."""
    builder = WorkflowBuilder(name="example")
    build(builder)
    read_submission(builder.build().to_json(), inputs, tools(), {})


def refused(build: Build, **inputs: Any) -> str:
    with pytest.raises(InvalidWorkflow) as caught:
        submitted(build, **inputs)
    return str(caught.value)


def say(builder: WorkflowBuilder, text: str, name: str = "a", **fields: Any) -> WorkflowBuilder:
    return builder.task(name, "t.say", args=[text], **fields)


def test_a_tool_is_called_with_what_it_takes() -> None:
    told = refused(lambda b: b.task("a", TOOL, kwargs={"name": "n", "content": "x"}))
    assert told.startswith("workflow 'a': tools.storage.store: missing a required argument: 'data'")
    assert "it is called with (name, data, content_type=None" in told
    in_a_body = lambda b: b.foreach("l", "{{xs}}", lambda f: f.task("a", TOOL))  # noqa: E731
    assert "workflow 'a': tools.storage.store: missing" in refused(in_a_body, xs=[])
    ask = {"model": "gpt-4", "prompt": "{{x}}", "provider": "ollama"}
    told = refused(lambda b: b.task("a", "tools.llm.call", kwargs=ask), x="y")
    assert "unexpected keyword argument 'provider'; it is called with (model, prompt" in told


def test_a_tool_of_another_package_is_not_loaded_and_not_judged() -> None:
    registry = tools()
    load = lambda: pytest.fail("it was loaded")  # noqa: E731
    registry.add_lazily("tools.acme.translate", load, foreign=True)
    builder = WorkflowBuilder(name="example")
    builder.task("a", "tools.acme.translate", args=["Dear {{customer}}"], kwargs={"to": "en"})
    assert read_submission(builder.build().to_json(), {}, registry, {}).name == "example"


@pytest.mark.parametrize(
    "text",
    [
        "{{verdcit.status}}", "'{{verdcit}}' and more", "{{verdict ~ verdcit}}",
        "{{verdict.x | default(verdcit)}}", "{{verdcit == 1 or verdict}}", "{{item}}", "{{index}}",
    ],
)  # fmt: skip
def test_a_name_that_nothing_has_is_refused(text: str) -> None:
    told = refused(lambda b: say(say(b, "x", "ask", result_key="verdict"), text))
    assert f"workflow 'a': {text}: nothing is named '" in told
    assert ("did you mean 'verdict'" in told) == ("verdcit" in text)


@pytest.mark.parametrize(
    "build",
    [
        lambda b: b.wait("a", "{{odd}}"),
        lambda b: b.wait_for_event("a", "x {{odd}}"),
        lambda b: b.emit_event("a", "x", payload={"y": ["{{odd}}"]}),
        lambda b: b.foreach("a", "{{odd}}", lambda f: say(f, "x", "b")),
        lambda b: b.foreach("l", "{{xs}}", lambda f: say(f, "{{odd}}")),
        lambda b: b.parallel("p", {"one": lambda f: say(f, "{{odd}}")}),
        lambda b: b.task("a", "tools.shell.run", args=["echo '{{odd}}'"]),
        lambda b: b.condition("a", "{{odd}} > 1", lambda f: say(f, "x", "y"), nothing),
        lambda b: say(b.condition("if", "1 > 0", lambda f: say(f, "x", "y"), nothing), "{{odd}}"),
    ],
)
def test_a_name_that_nothing_has_is_found_wherever_it_stands(build: Build) -> None:
    assert "workflow 'a': " in refused(build, xs=[1])
    submitted(build, xs=[1], odd=2)


def nothing(builder: WorkflowBuilder) -> WorkflowBuilder:
    return builder


@pytest.mark.parametrize(
    "text",
    [
        "{{given}}", "{{own}}", "{{before}}", "{{key}}", "{{a}}", "{{later}}", "{{l.results}}",
        "{{in_branch}} {{of_branch}}", "{{p_results}} {{p_fork_data}} {{p_join}}", "{{run_id}}",
        "{{odd | default('')}} {{odd.x.y | default}}", "{{odd is defined and odd.x}}",
        "{{given and odd}}", "{{'{{odd}}'}}", "{% set odd = 1 %} {% for odd in given %}", "{{ 7 }}",
        "{{true and none}}",
    ],
)  # fmt: skip
def test_what_a_run_may_come_to_know_is_taken(text: str) -> None:
    builder = WorkflowBuilder(name="example")
    say(builder, "x", "before", result_key="key")
    say(builder, text)
    builder.foreach("l", "{{given}}", lambda f: say(f, f"{text} {{{{item}}}} {{{{before}}}}", "b"))
    branch = lambda f: say(f, text, "in_branch", result_key="of_branch")  # noqa: E731
    say(builder.parallel_with_join("p", {"one": branch}), text, "later")
    builder.workflow.set_variables({"own": 1})
    read_submission(builder.build().to_json(), {"given": [1]}, tools(), {})


def test_names_of_loops_are_known_inside_of_them() -> None:
    def inner(builder: WorkflowBuilder) -> WorkflowBuilder:
        say(builder, "{{item}} {{index}} {{loop.length}} {{x}} {{outer}} {{rx}}", "y")
        return say(builder, "{{y}} {{inner.count}}", "z", result_key="rz")

    def body(builder: WorkflowBuilder) -> WorkflowBuilder:
        say(builder, "{{item.one}}", "x", result_key="rx")
        return builder.foreach("inner", "{{x}}", inner)

    def whole(text: str) -> Build:
        return lambda b: say(b.foreach("outer", "{{xs}}", body), text)

    submitted(whole("{{outer.results}}"), xs=[])
    for name in ("rx", "z", "inner", "item"):
        assert f"nothing is named '{name}'" in refused(whole(f"{{{{{name}}}}}"), xs=[])


def test_what_only_some_runs_come_to_may_name_what_only_they_are_given() -> None:
    def by_card(builder: WorkflowBuilder) -> WorkflowBuilder:
        say(builder, "{{card}}", "charge", result_key="paid")
        builder.foreach("l", "{{cards}}", lambda f: say(f, "{{card}}", "each"))
        return builder.parallel("p", {"one": lambda f: say(f, "{{card}}", "branch")})

    def pay(builder: WorkflowBuilder) -> None:
        by_bank = lambda f: say(f, "{{iban}}", "transfer", result_key="paid")  # noqa: E731
        builder.condition("by", "{{kind}} == 'card'", by_card, by_bank)
        builder.join("j", ["charge", "transfer"], JoinMode.ALL_SUCCESS)
        say(builder, "{{paid}} {{receipt_to}}", "tell")

    submitted(pay, kind="card", card=1)
    submitted(pay, kind="bank", iban=1)


def test_a_task_may_fail_for_want_of_a_name_where_somebody_takes_that_up() -> None:
    def first_of_two(builder: WorkflowBuilder) -> None:
        say(builder, "{{pager}}", "page", dependencies=[])
        say(builder, "paged", "told", dependencies=["page"])
        say(builder, "{{mail}}", "post", dependencies=[])
        builder.join("j", ["told", "page", "post"], JoinMode.ANY_OF, dependencies=[])

    submitted(first_of_two, mail="x")

    def branches(builder: WorkflowBuilder) -> None:
        builder.parallel("p", {"one": lambda f: say(f, "{{pager}}", "page")})
        say(builder, "whatever", trigger_rule=TriggerRule.ALL_DONE)

    submitted(branches)


def test_many_loops_and_many_inputs_cost_no_memory_for_each_pair_of_them() -> None:
    builder = WorkflowBuilder(name="example")
    for number in range(100):
        builder.foreach(f"l{number}", "{{xs}}", lambda f, n=number: say(f, "{{item}}", f"t{n}"))
    text = builder.build().to_json()
    inputs = {f"{number}": 0 for number in range(20_000)} | {"xs": [1]}
    read_submission(text, {"xs": [1]}, tools(), {})  # what is loaded once is loaded
    tracemalloc.start()
    try:
        read_submission(text, inputs, tools(), {})
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 30 << 20  # a set of all names for each loop would be above 100 MiB
