"""Scope: what the templates of one step see.

The inputs and results of the run; inside of a loop also `item`, `index` (from 0), `loop` and
the results of the same item's tasks, the inner loop's before the outer one's. Under a name that
has no value otherwise, what a step shows that waits.

A value is read when a template names it: of all that a run knows, most templates name little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import msgspec

from cas.errors import InvalidWorkflow
from cas.records import COMPLETED, RUNNING, WAITING, Step
from workflows import templates
from workflows.definitions import Task
from workflows.engine.plan import Plan
from workflows.engine.spots import Spot, inside, outside
from workflows.run_log import RunLog

_OF_ITEMS = ("item", "index", "loop")


@final
@dataclass(frozen=True, slots=True)
class _Level:
    """The run, or one item of a loop in it."""

    name: str  # "" or the loop's
    iteration: str  # its tasks'
    number: int = 0  # of the item


@final
class Scope(Mapping[str, Any]):
    """What the step at a spot sees, by name."""

    def __init__(self, plan: Plan, log: RunLog, spot: Spot) -> None:
        self._plan = plan
        self._log = log
        self._found: dict[str, Any] = {}
        self._given: dict[str, Any] | None = None  # inputs and variables
        self._levels = [_Level("", "")]
        numbers = [int(number) for number in spot.iteration.split(".")] if spot.iteration else []
        for loop, number in zip(plan.loops_around(spot.task), numbers, strict=True):
            iteration = inside(self._levels[-1].iteration, number)
            self._levels.append(_Level(loop.task_id, iteration, number))

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            read = self._reader(name)
            if read is None:
                raise KeyError(name)
            self._found[name] = read()
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found or (isinstance(name, str) and self._reader(name) is not None)

    def __iter__(self) -> Iterator[str]:
        names = set(self._inputs)
        for level in self._levels:
            names |= self._plan.named(level.name).keys()
            names |= set(_OF_ITEMS) if level.name else set()
        return (name for name in names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _reader(self, name: str) -> Callable[[], Any] | None:
        """What reads the value with this name; None where nothing has it."""
        log = self._log
        for level in reversed(self._levels):
            step = self._step(level, name, (COMPLETED,))
            if step is not None:
                return partial(_decoded, partial(log.result, step.step_id, step.iteration))
            if level.name and name in _OF_ITEMS:
                return partial(self._of_item, level, name)
        if name in self._inputs:
            return partial(self._inputs.get, name)
        for level in reversed(self._levels):
            step = self._step(level, name, (WAITING, RUNNING))
            if step is not None:
                return partial(_decoded, partial(log.shown, step.step_id, step.iteration))
        return None

    def _step(self, level: _Level, name: str, states: tuple[str, ...]) -> Step | None:
        """The step whose value has this name: of several, the one that began last."""
        tasks = self._plan.named(level.name).get(name, ())
        steps = [self._log.step(task, level.iteration) for task in tasks]
        found = [
            step
            for step in steps
            if step is not None and step.status in states and step.value_bytes is not None
        ]
        return max(found, key=lambda step: (step.started_at, step.step_id), default=None)

    def _of_item(self, level: _Level, name: str) -> Any:
        if name == "index":
            return level.number
        if name == "item":
            return _decoded(partial(self._log.item, level.name, level.iteration))
        count = self._log.items(level.name, outside(level.iteration))
        return {"index0": level.number, "index": level.number + 1, "length": count}

    @property
    def _inputs(self) -> dict[str, Any]:
        if self._given is None:
            given: dict[str, Any] = msgspec.json.decode(self._log.text().inputs)
            self._given = {**self._plan.definition.variables, **given}
        return self._given


def _decoded(read: Callable[[], bytes | None]) -> Any:
    raw = read()
    return None if raw is None else msgspec.json.decode(raw)


def items_of(loop: Task, known: Mapping[str, Any]) -> list[Any]:
    """The items of a foreach. Raises InvalidWorkflow where they are no list."""
    items = templates.render(loop.items, known)
    if isinstance(items, str) and items.lstrip().startswith("["):
        try:
            items = msgspec.json.decode(items)
        except msgspec.DecodeError:
            pass
    if not isinstance(items, list):
        kind = type(items).__name__
        raise InvalidWorkflow(loop.task_id, f"its items are no list but a {kind}")
    return items
