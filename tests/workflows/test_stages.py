"""Stages: what stabilize is told of who waits for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.records import Run
from workflows.definitions import (
    ALL_DONE,
    ALL_SUCCESS,
    EARLY,
    JOIN,
    ONE_DONE,
    ONE_SUCCESS,
    PARALLEL,
    Definition,
    Task,
)
from workflows.engine.plan import Plan
from workflows.engine.spots import END, FORK, Spot
from workflows.engine.stages import stages_of

RUN = Run("run", "acme", "d", "queued", 0, "ann")


def plan_of(*tasks: Task) -> Plan:
    return Plan(Definition("d", {task.task_id: task for task in tasks}))


def told(plan: Plan) -> dict[Spot, set[Spot]]:
    """Each stage with those that it names."""
    stages = stages_of(plan, RUN, "", "")
    spots = {stage.spot.stage_id: stage.spot for stage in stages}
    return {stage.spot: {spots[one] for one in stage.before} for stage in stages}


def awaited(named: dict[Spot, set[Spot]]) -> dict[Spot, set[Spot]]:
    """Each stage with all that it waits for, directly or through others."""
    found: dict[Spot, set[Spot]] = {}

    def of(spot: Spot) -> set[Spot]:
        if spot not in found:
            found[spot] = set(named[spot]).union(*(of(one) for one in named[spot]))
        return found[spot]

    for spot in named:
        of(spot)
    return found


def in_full(tasks: list[Task], fork: Spot | None = None) -> dict[Spot, set[Spot]]:
    """What stages would be told if each named all that its task depends on."""
    named: dict[Spot, set[Spot]] = {}
    for task in tasks:
        early = task.trigger_rule in EARLY
        before = {Spot("run", name) for name in ([] if early else task.dependencies)}
        if fork is not None and not before:
            before = {fork}
        if task.operator == PARALLEL:
            opening = Spot("run", task.task_id, "", FORK)
            named[opening] = before
            inner = [one for branch in task.branches.values() for one in branch]
            named |= in_full(inner, opening)
            before = {opening, *(Spot("run", one.task_id) for one in inner)}
        named[Spot("run", task.task_id)] = before
    if fork is None:
        named[Spot("run", "", "", END)] = {Spot("run", task.task_id) for task in tasks}
    return named


@st.composite
def levels(draw: st.DrawFn, prefix: str = "t", depth: int = 0) -> list[Task]:
    """Tasks each of which depends on some of those before it, some of them parallels."""
    tasks: list[Task] = []
    for number in range(draw(st.integers(1, 3 if depth else 10))):
        name = f"{prefix}{number}"
        dependencies = [one.task_id for one in tasks if draw(st.booleans())]
        rule = draw(st.sampled_from([ALL_SUCCESS, ALL_SUCCESS, ALL_DONE, ONE_SUCCESS, ONE_DONE]))
        if depth < 2 and draw(st.integers(0, 4)) == 0:
            branches = {branch: draw(levels(f"{name}{branch}", depth + 1)) for branch in ("l", "r")}
            tasks.append(Task(name, PARALLEL, dependencies, rule, branches=branches))
        else:
            tasks.append(Task(name, JOIN, dependencies, rule))
    return tasks


@given(tasks=levels())
def test_a_stage_waits_for_the_same_as_if_it_named_all(tasks: list[Task]) -> None:
    named = told(plan_of(*tasks))
    found = awaited(named)
    assert found == awaited(in_full(tasks))
    for before in named.values():
        steps = {one for one in before if one.role != FORK}
        assert not any(steps & found[one] for one in steps), "one of these says nothing new"


def test_where_each_depends_on_all_before_it_each_is_told_of_one() -> None:
    names = [f"t{number}" for number in range(250)]
    tasks = [Task(name, JOIN, names[:number]) for number, name in enumerate(names)]
    assert [len(before) for before in told(plan_of(*tasks)).values()] == [0] + [1] * 250


@pytest.mark.parametrize("rule", EARLY)
def test_who_begins_early_has_waited_for_nobody(rule: str) -> None:
    early, last = Task("early", JOIN, ["slow"], rule), Task("last", JOIN, ["slow", "early"])
    named = told(plan_of(Task("slow", JOIN, []), early, last))
    assert named[Spot("run", "last")] == {Spot("run", "slow"), Spot("run", "early")}
    assert named[Spot("run", "early")] == set()
