"""Runs and their steps as JSON: what the API answers and what the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import msgspec

from cas.clock import rfc3339
from cas.errors import NotFound
from cas.forms import shown_time
from cas.records import COMPLETED, ENDED, Run, Step
from workflows.run_view import RunView, Told


class StepForm(TypedDict):
    """One step. `iteration` is "" outside of loops, else the item's number from 0; `shown` is
    what others need while it waits, such as the link of an upload, and `value_bytes` is the
    length of either as JSON. A result that is too large to be told is `{"truncated": true,
    "size_bytes": n, "result_url": path}`: there it is told whole."""

    step: str
    iteration: str
    status: str
    attempts: int
    started_at: str
    ended_at: str | None
    result: Any
    shown: Any
    value_bytes: int | None
    error: str


class RunForm(TypedDict):
    """A run without its steps, as in a listing."""

    run_id: str
    name: str
    status: str
    created_at: str
    created_by: str
    started_at: str | None
    ended_at: str | None
    error: str


class WholeRunForm(RunForm):
    """A run: its inputs, its steps in the order in which they began, and its variables, which
    are the inputs and the results of steps by their `result_key`, or else their name. Of more
    than 1,000 steps the earliest in loops are left out; they are in the listing of its steps.
    `trouble` says why nobody carries it out at this moment, where nobody does."""

    inputs: dict[str, Any]
    steps: list[StepForm]
    steps_truncated: bool
    variables: dict[str, Any]
    trouble: list[str]


class StepsForm(TypedDict):
    """A page of a run's steps, by name and iteration; `next_cursor` asks for the next."""

    steps: list[StepForm]
    next_cursor: str | None


class RunsForm(TypedDict):
    """A page of runs, newest first; `next_cursor` asks for the next. `trouble` says why nobody
    carries runs out at this moment, where nobody does."""

    runs: list[RunForm]
    next_cursor: str | None
    trouble: list[str]


def run_form(run: Run) -> RunForm:
    return {
        "run_id": run.run_id,
        "name": run.name,
        "status": run.status,
        "created_at": rfc3339(run.created_at),
        "created_by": run.created_by,
        "started_at": shown_time(run.started_at),
        "ended_at": shown_time(run.ended_at),
        "error": run.error,
    }


def whole_run(view: RunView, trouble: Callable[[], list[str]] = list) -> WholeRunForm:
    """`trouble` says why nobody carries runs out; of one that has ended that is no matter."""
    return {
        **run_form(view.run),
        "inputs": view.inputs,
        "steps": _step_forms(view.steps_told, view.told),
        "steps_truncated": len(view.steps_told) < len(view.steps),
        "variables": view.variables_told,
        "trouble": [] if view.run.status in ENDED else trouble(),
    }


def steps_page(view: RunView, cursor: str | None, limit: int) -> StepsForm:
    """Some of a run's steps."""
    page = view.page(cursor, limit)
    return {
        "steps": _step_forms(page.items, view.told_among(page.items)),
        "next_cursor": page.next_cursor,
    }


def one_step(view: RunView, step_id: str, iteration: str = "") -> StepForm:
    """One step of a run; raises NotFound where it is not there, or has not begun."""
    step = view.step(step_id, iteration)
    if step is None:
        raise NotFound("step", step_id)
    return _step_form(step, view.told_of(step))


def plain(form: Mapping[str, Any]) -> dict[str, Any]:
    """A form as plain values: in those above, values of runs are JSON that is only passed on."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(form))
    return found


def _step_forms(steps: list[Step], told: dict[tuple[str, str], Told]) -> list[StepForm]:
    return [_step_form(step, told.get((step.step_id, step.iteration))) for step in steps]


def _step_form(step: Step, value: Told | None) -> StepForm:
    done = step.status == COMPLETED
    return {
        "step": step.step_id,
        "iteration": step.iteration,
        "status": step.status,
        "attempts": step.attempts,
        "started_at": rfc3339(step.started_at),
        "ended_at": shown_time(step.ended_at),
        "result": value if done else None,
        "shown": None if done else value,
        "value_bytes": step.value_bytes,
        "error": step.error,
    }
