"""Stages: a level of a plan as stabilize carries it.

Each task is a stage that stabilize begins when those that it depends on have ended, in
whatever way: what follows from that is judged by `verdicts`. A parallel is two stages, around
those of its branches; a level ends with a stage of its own, which says what became of it.

Of those that a task depends on, stabilize is told only the ones that suffice (`Plan.awaited`):
all that a stage names is read anew with every step of its level. Each stage ends well, and after
those before it, so a task begins at the same moment as if all of them were named.
"""

from __future__ import annotations

from typing import NamedTuple, final

from cas.records import Run
from workflows.definitions import EARLY, PARALLEL, TASK, Task
from workflows.engine.plan import Plan, branch_tasks
from workflows.engine.spots import END, FORK, STEP, Spot


@final
class Stage(NamedTuple):
    """One of them."""

    spot: Spot
    before: list[str]  # the identifiers of those before it
    tenant: str = ""  # whose place it takes (`shares`); "": it calls no tool, and needs none


def stages_of(plan: Plan, run: Run, level: str, iteration: str) -> list[Stage]:
    """The stages of a level, or of one item of it."""
    found: list[Stage] = []
    end = Spot(run.run_id, level, iteration, END)
    _take(plan, found, run.tenant_id, end, plan.level(level), None)
    found.append(Stage(end, _last(plan, end, plan.level(level))))
    return found


def begins_as(task: Task) -> str:
    """The role of the stage that a task begins with, and is rung for until it has begun."""
    return FORK if task.operator == PARALLEL else STEP


def _take(
    plan: Plan, found: list[Stage], tenant: str, near: Spot, tasks: list[Task], fork: str | None
) -> None:
    """Add the stages of tasks in the same level as `near`; `fork` is where their branch begins."""
    for task in tasks:
        spot = Spot(near.run, task.task_id, near.iteration)
        # Nobody, where it sleeps until one of those that it depends on rings.
        names = plan.awaited(task)
        before = [Spot(near.run, name, near.iteration).stage_id for name in names]
        if fork is not None and not before:
            before = [fork]
        if task.operator == PARALLEL:
            opening = Spot(near.run, task.task_id, near.iteration, FORK)
            found.append(Stage(opening, before))
            before = [opening.stage_id]
            for branch in task.branches.values():
                _take(plan, found, tenant, near, branch, opening.stage_id)
            before += _last(plan, near, branch_tasks(task))
        found.append(Stage(spot, before, tenant if task.operator == TASK else ""))


def _last(plan: Plan, near: Spot, tasks: list[Task]) -> list[str]:
    """Those among `tasks` that nobody else waits for to the end."""
    return [
        Spot(near.run, task.task_id, near.iteration).stage_id
        for task in tasks
        if all(plan.tasks[name].trigger_rule in EARLY for name in plan.dependents[task.task_id])
    ]
