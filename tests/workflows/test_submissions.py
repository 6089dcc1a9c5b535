"""Submissions: the same is refused here as by a server, before anything is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from highway_dsl import WorkflowBuilder

from cas.errors import InvalidRequest, InvalidWorkflow, TooLarge
from tests.workflows.running import ACTOR, TENANT, Bench, bench
from workflows.notation import LEVELS_MAX
from workflows.runs_cli import LocalRuns
from workflows.submissions import INPUTS_BYTES_MAX, read_submission

TOOL = "tools.storage.store"


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
    assert read_submission(definition(), {}, [TOOL], {}).name == "example"
    with pytest.raises(InvalidWorkflow, match="because"):
        read_submission(definition(), {}, [TOOL], {TOOL: "because"})
