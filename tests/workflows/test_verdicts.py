"""Verdicts: the trigger rules, over all that may become of two tasks before another."""

from __future__ import annotations

import pytest

from cas.records import COMPLETED, FAILED, RUNNING, SKIPPED, Step
from workflows.definitions import Definition, Task
from workflows.engine.plan import Plan
from workflows.engine.verdicts import Judge, State, Verdict

DONE, BROKEN, DEAD, BLOCKED, RUNS = "done", "broken", "dead", "blocked", "runs"


def step(name: str, what: str) -> Step:
    status = {DONE: COMPLETED, BROKEN: FAILED, RUNS: RUNNING}.get(what, SKIPPED)
    return Step("run", name, "", status, 1, 0, error="a failed" if what == BLOCKED else "")


def judged(rule: str, *before: str) -> Verdict:
    names = [f"b{number}" for number in range(len(before))]
    tasks = [Task(name, "task", []) for name in names]
    last = Task("last", "task", names, rule)
    plan = Plan(Definition("d", {task.task_id: task for task in [*tasks, last]}))
    steps = {name: step(name, what) for name, what in zip(names, before, strict=True) if what}
    return Judge(plan, steps.get, lambda name: None).verdict(last)


@pytest.mark.parametrize(
    ("before", "all_success", "none_failed", "all_done", "one_success", "one_done"),
    [
        ((DONE, DONE), "begin", "begin", "begin", "begin", "begin"),
        ((DONE, RUNS), "not yet", "not yet", "not yet", "begin", "begin"),
        ((DONE, ""), "not yet", "not yet", "not yet", "begin", "begin"),
        ((DONE, BROKEN), "blocked", "blocked", "begin", "begin", "begin"),
        ((DONE, BLOCKED), "blocked", "blocked", "begin", "begin", "begin"),
        ((DONE, DEAD), "begin", "begin", "begin", "begin", "begin"),
        ((BROKEN, RUNS), "not yet", "not yet", "not yet", "not yet", "begin"),
        ((BROKEN, DEAD), "blocked", "blocked", "begin", "blocked", "begin"),
        ((BLOCKED, DEAD), "blocked", "blocked", "begin", "blocked", "blocked"),
        ((DEAD, RUNS), "not yet", "not yet", "not yet", "not yet", "not yet"),
        ((DEAD, DEAD), "dead", "begin", "dead", "dead", "dead"),
        ((), "begin", "begin", "begin", "begin", "begin"),
    ],
)
def test_a_rule_lets_a_task_begin_or_not(
    before: tuple[str, ...],
    all_success: str,
    none_failed: str,
    all_done: str,
    one_success: str,
    one_done: str,
) -> None:
    rules = ("all_success", "none_failed", "all_done", "one_success", "one_done")
    assert [judged(rule, *before) for rule in rules] == [
        all_success, none_failed, all_done, one_success, one_done,
    ]  # fmt: skip


def test_a_chain_of_a_thousand_that_were_left_out_is_judged() -> None:
    names = [f"t{number}" for number in range(1000)]
    tasks = [
        Task(name, "task", [names[number - 1]] if number else [])
        for number, name in enumerate(names)
    ]
    plan = Plan(Definition("d", {task.task_id: task for task in tasks}))
    steps = {name: step(name, BLOCKED) for name in names[:-1]}
    judge = Judge(plan, steps.get, lambda name: None)
    assert judge.verdict(tasks[-1]) is Verdict.BLOCKED
    assert judge.state(tasks[-2]) is State.BLOCKED
    assert judge.why_blocked(tasks[-1]) == "t998 did not succeed"
    assert len(plan.before("t999")) == 999
