"""Runs and their steps as JSON: what the API answers and what the command line prints."""

from __future__ import annotations

import json
from typing import Any, TypedDict

from cas.clock import rfc3339
from cas.records import COMPLETED, Run, Step
from workflows.runs import RunView


class StepForm(TypedDict):
    """One step. `iteration` is "" outside of loops, else the item's number from 0; `shown` is
    what others need while it waits, such as the link of an upload. A result that is too large
    to be told is `{"truncated": true, "size_bytes": n}`."""

    step: str
    iteration: str
    status: str
    attempts: int
    started_at: str
    ended_at: str | None
    result: Any
    shown: Any
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
    are the inputs and the results of steps by their `result_key`, or else their name."""

    inputs: dict[str, Any]
    steps: list[StepForm]
    variables: dict[str, Any]


class RunsForm(TypedDict):
    """A page of runs, newest first; `next_cursor` asks for the next."""

    runs: list[RunForm]
    next_cursor: str | None


def run_form(run: Run) -> RunForm:
    return {
        "run_id": run.run_id,
        "name": run.name,
        "status": run.status,
        "created_at": rfc3339(run.created_at),
        "created_by": run.created_by,
        "started_at": _time(run.started_at),
        "ended_at": _time(run.ended_at),
        "error": run.error,
    }


def whole_run(view: RunView) -> WholeRunForm:
    return {
        **run_form(view.run),
        "inputs": json.loads(view.run.inputs),
        "steps": [step_form(step, view) for step in view.steps],
        "variables": view.variables,
    }


def step_form(step: Step, view: RunView) -> StepForm:
    value = view.told.get((step.step_id, step.iteration))
    done = step.status == COMPLETED
    return {
        "step": step.step_id,
        "iteration": step.iteration,
        "status": step.status,
        "attempts": step.attempts,
        "started_at": rfc3339(step.started_at),
        "ended_at": _time(step.ended_at),
        "result": value if done else None,
        "shown": None if done else value,
        "error": step.error,
    }


def _time(at_us: int | None) -> str | None:
    return None if at_us is None else rfc3339(at_us)
