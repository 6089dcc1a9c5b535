"""Plan: a definition as the engine walks it.

A level is what one execution of stabilize carries: the run itself (""), or one item of a
foreach, which is then the level's name. The tasks of a parallel's branches belong to the
level that the parallel is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import TopologicalSorter
from typing import Final, final

from workflows.definitions import (
    ALL_DONE,
    CONDITION,
    EARLY,
    Definition,
    Task,
    awaited_of,
    implied_of,
    ways_of,
)
from workflows.engine.spots import END, Spot

# Rules by which a task begins although something before it failed: it takes up the failure.
TOLERANT = (ALL_DONE, *EARLY)
# Names that templates know besides the inputs and the results: of a loop's item, and of the run.
OF_ITEMS: Final = ("item", "index", "loop")
RUN_ID: Final = "run_id"


@final
class Plan:
    """Who depends on whom, and where. Read only, so safe for threads."""

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.tasks: dict[str, Task] = {}
        self.level_of: dict[str, str] = {}
        self.parallel_of: dict[str, str] = {}  # the innermost parallel around it; "" outside
        self.dependents: dict[str, list[str]] = {}
        self._direct: dict[str, list[Task]] = {}
        self._awaited: dict[str, list[str]] = {}
        self._ways: dict[str, tuple[tuple[Task, Task], ...]] = {}
        self._ways_into: dict[str, list[Task]] = {}
        self._named: dict[str, dict[str, list[str]]] = {}
        self._certain = {""}  # with the run itself
        self._take("", "", list(definition.tasks.values()))

    def _take(self, level: str, parallel: str, tasks: list[Task]) -> None:
        if not parallel:
            self._direct[level] = tasks
        for task in tasks:
            self.tasks[task.task_id] = task
            self.level_of[task.task_id] = level
            self.parallel_of[task.task_id] = parallel
            self.dependents.setdefault(task.task_id, [])
        here = {task.task_id: task for task in tasks}
        order = TopologicalSorter({task.task_id: task.dependencies for task in tasks})
        ordered = list(order.static_order())
        ways = ways_of(here, ordered)
        implied = implied_of({name: here[name].dependencies for name in ordered})
        self._awaited.update(awaited_of(here, ordered))
        taken_up = {
            name for task in tasks if task.trigger_rule in TOLERANT for name in task.dependencies
        }
        for name in ordered:
            before = [parallel or level, *here[name].dependencies]
            if not ways[name].around and name not in taken_up and self._certain.issuperset(before):
                self._certain.add(name)
        for task in tasks:
            task_id = task.task_id
            self._ways[task_id] = tuple((here[one], here[way]) for one, way in ways[task_id].around)
            self._ways_into[task_id] = [
                here[name]
                for name in task.dependencies
                if here[name].operator != CONDITION
                or name in ways[task_id].own
                or task_id in (here[name].if_true, here[name].if_false)
                or name not in implied[task_id]
            ]
            for name in task.dependencies:
                self.dependents[name].append(task.task_id)
            for branch in task.branches.values():
                self._take(level, task.task_id, branch)
            if task.body:
                self._take(task.task_id, "", task.body)

    def level(self, level: str) -> list[Task]:
        """The tasks of a level, without those in branches."""
        return self._direct[level]

    def level_of_spot(self, spot: Spot) -> str:
        """The level whose tasks have the iteration of `spot`."""
        return spot.task if spot.role == END else self.level_of[spot.task]

    def everything(self, level: str) -> Iterator[Task]:
        """The tasks of a level, with those in branches."""
        rest = list(self._direct[level])
        while rest:
            task = rest.pop()
            yield task
            rest += branch_tasks(task)

    def named(self, level: str) -> dict[str, list[str]]:
        """The names that a level's results have, each with the tasks whose it is: their own
        ones, and their `result_key`s."""
        known = self._named.get(level)
        if known is None:
            known = {}
            for task in self.everything(level):
                for name in {task.task_id, task.result_key or task.task_id}:
                    known.setdefault(name, []).append(task.task_id)
            self._named[level] = known
        return known

    def loops_around(self, task_id: str) -> list[Task]:
        """The loops that a task is in, the outermost first."""
        found: list[Task] = []
        level = self.level_of[task_id]
        while level:
            found.append(self.tasks[level])
            level = self.level_of[level]
        return found[::-1]

    def knows(self, level: str, name: str) -> bool:
        """Whether `name` is one of `visible(level)`; costs what the levels are deep."""
        if not level:
            return name == RUN_ID or name in self.named(level)
        found = name in OF_ITEMS or name in self.named(level)
        return found or self.knows(self.level_of[level], name)

    def visible(self, level: str) -> set[str]:
        """The names that the templates of a level may know besides the inputs: see `Scope`."""
        found = {RUN_ID, *(OF_ITEMS if level else ()), *self.named(level)}
        return found | self.visible(self.level_of[level]) if level else found

    def is_certain(self, task_id: str) -> bool:
        """Whether the run can complete only if this task does, of a loop with items: no condition
        leaves it out, and nobody takes up its failure, or that of what it comes after or is in."""
        return task_id in self._certain

    def ways_into(self, task: Task) -> list[Task]:
        """Those that a task depends on, without what says nothing of its own: highway_dsl has
        all tasks of a condition's way depend on the condition too, also those further down."""
        return self._ways_into[task.task_id]

    def awaited(self, task: Task) -> list[str]:
        """Those whose ends a task waits for before it is looked at: see `awaited_of`."""
        return self._awaited[task.task_id]

    def ways_around(self, task: Task) -> tuple[tuple[Task, Task], ...]:
        """The ways of conditions that a task is in: each condition with the task that it leads to
        there. That is the task itself, or one before it, where the task depends on the condition
        too. Of ways in each other the innermost ones: where an outer one is not taken, they are
        not either."""
        return self._ways[task.task_id]

    def tolerated(self, task_id: str) -> bool:
        """Whether somebody may take up that this task failed: then the run goes on."""
        if any(self.tasks[name].trigger_rule in TOLERANT for name in self.dependents[task_id]):
            return True
        parallel = self.parallel_of[task_id]
        return bool(parallel) and self.tolerated(parallel)

    def early(self, task_id: str) -> list[str]:
        """Those that may begin when this task ends, whatever else they depend on."""
        return [name for name in self.dependents[task_id] if self.tasks[name].trigger_rule in EARLY]


def branch_tasks(parallel: Task) -> list[Task]:
    """The tasks of all branches of a parallel, without those of parallels in them."""
    return [task for branch in parallel.branches.values() for task in branch]
