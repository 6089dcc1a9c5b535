"""Verdicts: whether a task may begin, by its rule and by what became of those before it.

    done      it completed
    failed    it failed for good
    dead      no way led to it: a condition chose another one, here or further up
    blocked   something before it failed
    None      it has not ended

What is dead counts for nothing: after the two ways of a condition come together again, the
one that was taken decides. Where nothing but dead ends lead to a task, it is dead too; and so
is one that is in a way that was not taken, whatever its rule is and whatever else it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final, Self, final

import msgspec

from cas.records import CANCELLED, COMPLETED, FAILED, SKIPPED, Step
from workflows.definitions import (
    ALL_DONE,
    CONDITION,
    NONE_FAILED,
    ONE_DONE,
    ONE_SUCCESS,
    Task,
)
from workflows.engine.plan import TOLERANT, Plan
from workflows.engine.spots import Spot, outside
from workflows.run_log import RunLog

OVER: Final = (COMPLETED, FAILED, SKIPPED)  # of a step that has ended, and was not cancelled


class State(StrEnum):
    """What became of a task."""

    DONE = "done"
    FAILED = "failed"
    DEAD = "dead"
    BLOCKED = "blocked"


class Verdict(StrEnum):
    """Whether a task may begin."""

    BEGIN = "begin"
    NOT_YET = "not yet"
    DEAD = "dead"
    BLOCKED = "blocked"


@final
class Judge:
    """Judges the tasks of one level, by the steps of one of its iterations.

    Each is looked at once, when it is asked for: a judge is for one moment.
    """

    def __init__(
        self,
        plan: Plan,
        step_of: Callable[[str], Step | None],
        result_of: Callable[[str], bytes | None],
    ) -> None:
        """Both are told the task's name; `result_of` gives the JSON that it came to."""
        self._plan = plan
        self._step_of = step_of
        self._result_of = result_of
        self._steps: dict[str, Step | None] = {}

    @classmethod
    def at(cls, plan: Plan, log: RunLog, spot: Spot) -> Self:
        """A judge of the level, and the iteration of it, that a spot is in."""
        return cls(
            plan,
            lambda name: log.step(name, spot.iteration),
            lambda name: log.result(name, spot.iteration),
        )

    def verdict(self, task: Task) -> Verdict:
        """Whether it may begin."""
        ways = [self._edge(condition, way) for condition, way in self._plan.ways_around(task)]
        if ways and all(way in (None, State.DEAD) for way in ways):
            return Verdict.NOT_YET if None in ways else Verdict.DEAD
        edges = [self._edge(before, task) for before in self._plan.ways_into(task)]
        if not edges:
            parallel = self._plan.parallel_of[task.task_id]
            return self._verdict_within(self._plan.tasks[parallel]) if parallel else Verdict.BEGIN
        rule = task.trigger_rule
        if rule == ONE_SUCCESS and State.DONE in edges:
            return Verdict.BEGIN
        if rule == ONE_DONE and (State.DONE in edges or State.FAILED in edges):
            return Verdict.BEGIN
        if None in edges:
            return Verdict.NOT_YET
        if rule == NONE_FAILED:
            broken = State.FAILED in edges or State.BLOCKED in edges
            return Verdict.BLOCKED if broken else Verdict.BEGIN
        if all(edge is State.DEAD for edge in edges):
            return Verdict.DEAD
        if rule == ALL_DONE:
            return Verdict.BEGIN
        if rule in (ONE_SUCCESS, ONE_DONE):
            return Verdict.BLOCKED
        broken = State.FAILED in edges or State.BLOCKED in edges
        return Verdict.BLOCKED if broken else Verdict.BEGIN

    def state(self, task: Task) -> State | None:
        """What became of it."""
        step = self._step(task.task_id)
        if step is None:
            return None
        if step.status == COMPLETED:
            return State.DONE
        if step.status == FAILED:
            return State.FAILED
        if step.status == SKIPPED:
            return State.BLOCKED if step.error else State.DEAD
        return None

    def why_blocked(self, task: Task) -> str:
        """What failed, or was left out by a failure, before a task that is blocked."""
        around = self._plan.parallel_of[task.task_id]
        before = [*self._plan.ways_into(task), *([self._plan.tasks[around]] if around else [])]
        broken = [one.task_id for one in before if self.state(one) in (State.FAILED, State.BLOCKED)]
        return f"{', '.join(broken)} did not succeed"

    def unforgiven(self, tasks: Iterable[Task]) -> list[Step]:
        """The failures among `tasks` that nobody took up, in the order in which they began.

        A failure is taken up where a task began in spite of it, and none is left out by it.
        """
        found: list[Step] = []
        for task in tasks:
            if self.state(task) is not State.FAILED:
                continue
            after = [self._plan.tasks[name] for name in self._plan.dependents[task.task_id]]
            states = [(other, self.state(other)) for other in after]
            taken_up = any(
                other.trigger_rule in TOLERANT and state in (State.DONE, State.FAILED)
                for other, state in states
            )
            if not taken_up or any(state is State.BLOCKED for _, state in states):
                step = self._step(task.task_id)
                found += [step] if step is not None else []
        return sorted(found, key=lambda step: step.started_at)

    def _step(self, name: str) -> Step | None:
        if name not in self._steps:
            self._steps[name] = self._step_of(name)
        return self._steps[name]

    def _edge(self, before: Task, task: Task) -> State | None:
        """What became of one that `task` depends on, as `task` sees it."""
        state = self.state(before)
        if state is not State.DONE or before.operator != CONDITION:
            return state
        if task.task_id not in (before.if_true, before.if_false):
            return state
        held = msgspec.json.decode(self._result_of(before.task_id) or b"null")
        chosen = before.if_true if held else before.if_false
        return State.DONE if chosen == task.task_id else State.DEAD

    def _verdict_within(self, parallel: Task) -> Verdict:
        """Of a task that a branch begins with."""
        step = self._step(parallel.task_id)
        if step is None:
            return Verdict.NOT_YET
        if step.status != SKIPPED:
            return Verdict.BEGIN
        return Verdict.BLOCKED if self.state(parallel) is State.BLOCKED else Verdict.DEAD


def is_loop_over(plan: Plan, log: RunLog, spot: Spot) -> bool:
    """Whether a loop that a spot is in has ended: its time was over, for instance."""
    level, iteration = plan.level_of_spot(spot), spot.iteration
    while level:
        iteration = outside(iteration)
        loop = log.step(level, iteration)
        if loop is not None and loop.status in (*OVER, CANCELLED):
            return True
        level = plan.level_of[level]
    return False
