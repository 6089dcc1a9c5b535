"""Plans: as many are kept at hand as there is room for, those used last."""

from __future__ import annotations

import pytest

from workflows.definitions import Definition
from workflows.engine import plans
from workflows.engine.plan import Plan
from workflows.engine.plans import Plans

TASK = '{"task_id": "one", "operator_type": "task", "function": "t.say"}'
TEXT = f'{{"name": "w", "tasks": {{"one": {TASK}}}}}'


@pytest.fixture
def plan() -> Plan:
    return Plan(Definition.parse(TEXT))


def test_what_was_used_last_is_kept(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "BYTES_MAX", 300)
    kept = Plans()
    for run in ("a", "b", "c"):
        kept.keep(run, plan, 100)
    assert kept.get("a") is plan
    kept.keep("d", plan, 100)
    assert [run for run in "abcd" if kept.get(run) is not None] == ["a", "c", "d"]


def test_one_that_is_larger_than_all_room_is_kept_alone(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "BYTES_MAX", 300)
    kept = Plans()
    kept.keep("a", plan, 100)
    kept.keep("large", plan, 1000)
    assert (kept.get("a"), kept.get("large")) == (None, plan)
    kept.keep("b", plan, 100)
    assert (kept.get("large"), kept.get("b")) == (None, plan)


def test_an_ended_run_leaves_its_room(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "BYTES_MAX", 300)
    kept = Plans()
    for run in ("a", "b", "b", "c"):
        kept.keep(run, plan, 100)
    kept.forget("b")
    kept.forget("unknown")
    kept.keep("d", plan, 100)
    assert [run for run in "abcd" if kept.get(run) is not None] == ["a", "c", "d"]
