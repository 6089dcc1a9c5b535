"""Runs as JSON: what steps came to is passed on as it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from highway_dsl import WorkflowBuilder

from cas.catalog import Transaction
from cas.listing import PAGE_BYTES_MAX
from cas.records import COMPLETED, FAILED, RESULT, Step, StepValue
from tests.clocks import START_US
from tests.workflows.running import Bench, bench
from workflows import step_values
from workflows.forms import one_step, plain, steps_page, whole_run


@pytest.fixture
def made(memory: Path) -> Iterator[Bench]:
    with bench(memory) as made:
        yield made


def test_values_of_a_run_are_passed_on_and_not_read(made: Bench) -> None:
    """As plain values they would take 25 times their text."""
    builder = WorkflowBuilder(name="example")
    builder.task("say", "t.say", args=["{{text}}"], result_key="said")
    builder.workflow.set_variables({"greeting": "hello"})
    made.start()
    view = made.run(builder, text=[[]])
    kept = msgspec.Raw(b"[[]]")
    form = whole_run(view)
    assert form["steps"][0]["result"] == kept
    assert form["inputs"] == {"text": kept}
    assert form["variables"] == {"greeting": "hello", "text": kept, "said": kept}
    assert one_step(view, "say")["result"] == kept
    assert steps_page(view, None, 10)["steps"][0]["result"] == kept
    assert plain(form)["variables"] == {"greeting": "hello", "text": [[]], "said": [[]]}
    assert view.variables == plain(form)["variables"]


def test_a_page_of_steps_with_long_errors_ends_early_and_the_next_goes_on(made: Bench) -> None:
    builder = WorkflowBuilder(name="example")
    builder.task("say", "t.say")
    run = made.submit(builder)
    names = [f"step-{number}" for number in range(7)]

    def change(txn: Transaction) -> None:
        for name in names:
            error = "x" * (PAGE_BYTES_MAX // 4)
            txn.insert(Step(run, name, "", FAILED, 1, START_US, START_US, error=error))

    made.store.catalog.write(change, actor="", request_id="")
    found: list[list[str]] = []
    cursor: str | None = None
    while cursor is not None or not found:
        form = steps_page(made.view(run), cursor, 1000)
        found.append([step["step"] for step in form["steps"]])
        cursor = form["next_cursor"]
    assert found == [names[:3], names[3:6], names[6:]]


def test_values_count_to_the_page_that_tells_them(made: Bench) -> None:
    """Those that are too large to be told are told where they are read, and count for nothing."""
    builder = WorkflowBuilder(name="example")
    builder.task("say", "t.say")
    run = made.submit(builder)
    quarter = b'"' + b"x" * (PAGE_BYTES_MAX // 4) + b'"'
    values = [quarter, quarter, b'"' + b"x" * PAGE_BYTES_MAX + b'"', quarter, quarter, quarter]
    names = [f"step-{number}" for number in range(len(values))]

    def change(txn: Transaction) -> None:
        for name, value in zip(names, values, strict=True):
            step_values.put(txn, StepValue(run, RESULT, name, "", value))
            txn.insert(Step(run, name, "", COMPLETED, 1, START_US, START_US, len(value)))

    made.store.catalog.write(change, actor="", request_id="")
    view = made.view(run)
    first = steps_page(view, None, 1000)
    rest = steps_page(view, first["next_cursor"], 1000)
    pages = [[step["step"] for step in page["steps"]] for page in (first, rest)]
    assert pages == [names[:4], names[4:]]
    assert rest["next_cursor"] is None
    shown = [step["result"] for step in plain(first)["steps"]]
    assert shown.pop(2)["truncated"]
    assert shown == [quarter[1:-1].decode()] * 3
    # With its run each is told twice, as a result and as a variable.
    assert len(msgspec.json.encode(whole_run(view))) < 2 * PAGE_BYTES_MAX + 10_000
