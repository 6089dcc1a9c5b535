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


def choice(rule: str, *dependencies: str, target: str = "last") -> Definition:
    """A condition that leads to one task or to `target`; a third one has nothing to do with it."""
    tasks = [
        Task("other", "task", []),
        Task("ask", "condition", [], condition="1 > 0", if_true="yes", if_false=target),
        Task("yes", "task", ["ask"]),
        Task("no", "task", ["ask"]),
        Task("then", "task", ["no", "ask"]),
        Task("last", "task", list(dependencies), rule),
    ]
    return Definition("d", {task.task_id: task for task in tasks})


RULES = ("all_success", "none_failed", "all_done", "one_success", "one_done")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("other", [DONE, BROKEN])
@pytest.mark.parametrize(
    ("dependencies", "target"),
    [
        (("ask",), "last"),
        (("other", "ask"), "last"),
        (("no", "ask"), "no"),
        (("no", "other", "ask"), "no"),
        (("then", "other", "ask"), "no"),
    ],
)
def test_what_is_in_a_way_that_was_not_taken_is_dead_whatever_else_there_is(
    rule: str, other: str, dependencies: tuple[str, ...], target: str
) -> None:
    plan = Plan(choice(rule, *dependencies, target=target))
    left_out = {"no": DEAD, "then": DEAD} if target == "no" else {}
    states = {"other": other, "ask": DONE, "yes": DONE, **left_out}
    steps = {name: step(name, what) for name, what in states.items()}
    held = {"ask": b"true"}
    assert Judge(plan, steps.get, held.get).verdict(plan.tasks["last"]) is Verdict.DEAD


@pytest.mark.parametrize("rule", ["one_success", "one_done"])
def test_no_rule_begins_a_way_before_it_is_taken(rule: str) -> None:
    plan = Plan(choice(rule, "other", "ask"))
    steps = {"other": step("other", DONE), "ask": step("ask", RUNS)}
    assert Judge(plan, steps.get, lambda name: None).verdict(plan.tasks["last"]) is Verdict.NOT_YET
    steps["ask"] = step("ask", DONE)
    held = {"ask": b"false"}
    assert Judge(plan, steps.get, held.get).verdict(plan.tasks["last"]) is Verdict.BEGIN


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dependencies", [("ask",), ("yes", "no", "ask"), ("yes", "no")])
def test_what_comes_after_both_ways_begins_whichever_was_taken(
    rule: str, dependencies: tuple[str, ...]
) -> None:
    plan = Plan(choice(rule, *dependencies, target="no"))
    steps = {"ask": step("ask", DONE), "yes": step("yes", DONE), "no": step("no", DEAD)}
    held = {"ask": b"true"}
    assert Judge(plan, steps.get, held.get).verdict(plan.tasks["last"]) is Verdict.BEGIN


def test_of_ways_in_each_other_the_inner_one_counts() -> None:
    tasks = [
        Task("outer", "condition", [], condition="1 > 0", if_true="in"),
        Task("in", "condition", ["outer"], condition="1 > 0", if_true="yes", if_false="no"),
        Task("yes", "task", ["in", "outer"]),
        Task("no", "task", ["in", "outer"]),
        Task("other", "task", []),
        Task("last", "task", ["no", "other", "in", "outer"], "all_done"),
        Task("after", "task", ["in", "outer"]),
    ]
    plan = Plan(Definition("d", {task.task_id: task for task in tasks}))
    states = {"outer": DONE, "in": DONE, "other": DONE, "no": DEAD}
    steps = {name: step(name, what) for name, what in states.items()}
    held = {"outer": b"true", "in": b"true"}
    judge = Judge(plan, steps.get, held.get)
    verdicts = {name: judge.verdict(plan.tasks[name]) for name in ("yes", "no", "last", "after")}
    assert verdicts == {
        "yes": Verdict.BEGIN,
        "no": Verdict.DEAD,
        "last": Verdict.DEAD,
        "after": Verdict.BEGIN,
    }
    steps = {"outer": step("outer", DONE), "in": step("in", DEAD), "other": step("other", DONE)}
    judge = Judge(plan, steps.get, {"outer": b"false"}.get)
    for name in ("in", "yes", "no", "after"):
        assert judge.verdict(plan.tasks[name]) is Verdict.DEAD


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


def merged(*dependencies: str, joined: tuple[str, ...] = (), rule: str = "none_failed") -> Plan:
    """A way of `urgent` leads to `big`, which has ways itself."""
    tasks = [
        Task("urgent", "condition", [], condition="1 > 0", if_true="page", if_false="big"),
        Task("page", "task", ["urgent"]),
        Task("big", "condition", ["urgent"], condition="1 > 0", if_true="mail", if_false="log"),
        Task("mail", "task", ["big", "urgent"]),
        Task("log", "task", ["big", "urgent"]),
        Task("last", "task", [*dependencies, *joined], rule, joined=list(joined)),
    ]
    return Plan(Definition("d", {task.task_id: task for task in tasks}))


@pytest.mark.parametrize(
    ("plan", "verdict"),
    [
        (merged("page", "big"), Verdict.BEGIN),
        # Of `big` it would depend on `urgent` too: it is of no way, and `big` was decided.
        (merged("page", "mail", "big", rule="all_success"), Verdict.BEGIN),
        (merged("mail", "big", "urgent"), Verdict.DEAD),
        (merged("mail", "big", "urgent", rule="all_done"), Verdict.DEAD),
        (merged(joined=("mail", "big"), rule="all_success"), Verdict.BEGIN),
        (merged(joined=("mail", "page"), rule="all_success"), Verdict.DEAD),
    ],
)
def test_who_says_nothing_of_a_way_is_of_none(plan: Plan, verdict: Verdict) -> None:
    states = {"urgent": DONE, "page": DEAD, "big": DONE, "mail": DEAD, "log": DONE}
    steps = {name: step(name, what) for name, what in states.items()}
    held = {"urgent": b"false", "big": b"false"}
    assert Judge(plan, steps.get, held.get).verdict(plan.tasks["last"]) is verdict
