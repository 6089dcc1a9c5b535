"""Attempts: how long until the next one, by a clock that no test waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import pytest

from cas.errors import ToolFailed
from tests.workflows.running import until
from workflows.engine.attempts import LATE_MAX, Attempts
from workflows.engine.spots import Spot

SPOT = Spot("run", "task")
OTHER = Spot("run", "other")


@final
@dataclass
class Scene:
    now_s: float = 1000.0
    goes_on: threading.Event = field(default_factory=threading.Event)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.attempts = Attempts(lambda: self.now_s)

    def late(self, spot: Spot, tenant: str = "acme") -> None:
        """A call of this spot whose time is over."""

        def call() -> None:
            self.goes_on.wait(60)
            self.ended.release()

        with pytest.raises(ToolFailed, match="took longer") as failed:
            self.attempts.within(spot, tenant, 0.001, "t.late", call)
        assert failed.value.again


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.goes_on.set()


def test_the_next_attempt_begins_after_the_delay(scene: Scene) -> None:
    scene.attempts.failed(SPOT, 60.0)
    # The catalog's time stands still, or has gone on by itself: this process knows better.
    for told_s in (60.0, -1000.0):
        assert scene.attempts.left_s(SPOT, 60.0, told_s) == 60.0
    scene.now_s += 60.0
    assert scene.attempts.left_s(SPOT, 60.0, 60.0) == 0.0


@pytest.mark.parametrize(("told_s", "left_s"), [(20.0, 20.0), (-5.0, 0.0), (1e9, 60.0)])
def test_of_an_attempt_in_another_process_the_catalog_tells_what_is_left(
    scene: Scene, told_s: float, left_s: float
) -> None:
    assert scene.attempts.left_s(SPOT, 60.0, told_s) == left_s
    scene.now_s += left_s
    # Even where catalog time stands still, for its clock is in doubt (invariant 10).
    assert scene.attempts.left_s(SPOT, 60.0, told_s) == 0.0


def test_a_delay_counts_from_the_end_of_a_call_whose_time_was_over(scene: Scene) -> None:
    scene.late(SPOT)
    scene.attempts.failed(SPOT, 10.0)
    scene.now_s += 1000.0
    assert 0.0 < scene.attempts.left_s(SPOT, 10.0, 0.0) <= 60.0
    scene.goes_on.set()
    until(lambda: scene.attempts.left_s(SPOT, 10.0, 0.0) == 10.0)
    scene.now_s += 10.0
    assert scene.attempts.left_s(SPOT, 10.0, 0.0) == 0.0


def test_a_tenant_has_so_many_calls_whose_time_is_over(scene: Scene) -> None:
    for number in range(LATE_MAX):
        assert scene.attempts.crowded_s("acme") == 0.0
        scene.late(Spot("run", f"task {number}"))
    assert scene.attempts.crowded_s("acme") > 0.0
    assert scene.attempts.crowded_s("other") == 0.0
    scene.goes_on.set()
    until(lambda: scene.attempts.crowded_s("acme") == 0.0)


def test_calls_that_go_on_are_counted(scene: Scene) -> None:
    assert scene.attempts.late() == 0
    scene.late(SPOT, "acme")
    scene.late(OTHER, "other")
    assert scene.attempts.late() == 2
    scene.goes_on.set()
    until(lambda: scene.attempts.late() == 0)


def test_where_there_is_no_thread_nothing_is_called(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(OSError, match="start new thread"):
        scene.attempts.within(SPOT, "acme", 60.0, "t.x", lambda: pytest.fail("it was called"))


@pytest.mark.parametrize("limit_s", [None, 60.0])
def test_what_a_call_comes_to_within_its_time_is_passed_on(
    scene: Scene, limit_s: float | None
) -> None:
    def fails() -> Any:
        raise LookupError("no")

    assert scene.attempts.within(SPOT, "acme", limit_s, "t.x", lambda: 7) == 7
    with pytest.raises(LookupError, match="no"):
        scene.attempts.within(SPOT, "acme", limit_s, "t.x", fails)
    assert scene.attempts.crowded_s("acme") == 0.0


def test_nothing_is_kept_of_a_run_that_ended(scene: Scene) -> None:
    scene.late(SPOT)
    for spot in (SPOT, OTHER):
        scene.attempts.failed(spot, 10.0)
    scene.attempts.over(OTHER)
    scene.attempts.forget("run")
    assert scene.attempts.left_s(SPOT, 10.0, 0.0) == 0.0
    assert not scene.attempts._late
