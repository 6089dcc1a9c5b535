"""The loop: intervals, backoff, the stop signal, and what it says about its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import pytest

from cas.background import FAILURES_MAX, STEP_US_MAX, JobState
from cas.clock import SECOND_US
from cas.errors import CatalogFailed, Conflict
from replicator.loop import BACKOFF_S_MAX, Loop

Deed = Callable[[], bool]


@final
@dataclass
class Scripted:
    """A job that does its deeds one after the other, then tells that it is at its end."""

    deeds: list[Deed]
    name: str = "scripted"
    interval_s: float = 0.0
    at_end: asyncio.Event = field(default_factory=asyncio.Event)
    times: list[int] = field(default_factory=list)
    closed: int = 0

    async def step(self, now_us: int) -> bool:
        self.times.append(now_us)
        if not self.deeds:
            self.at_end.set()
            return False
        return self.deeds.pop(0)()

    async def close(self) -> None:
        self.closed += 1


def more() -> bool:
    return True


def enough() -> bool:
    return False


def fail(error: Exception) -> Deed:
    def deed() -> bool:
        raise error

    return deed


async def run_to_the_end(*jobs: Scripted) -> Loop:
    """Runs until every job has done its deeds."""
    loop = Loop(jobs, iter(range(1, 1_000_000)).__next__, jitter=lambda: 0.0)
    stop = asyncio.Event()
    running = asyncio.create_task(loop.run(stop))
    for job in jobs:
        await job.at_end.wait()
    stop.set()
    await running
    return loop


def test_a_job_that_has_more_to_do_goes_on_at_once() -> None:
    async def story() -> None:
        job = Scripted([more] * 5, interval_s=0.0)
        loop = await run_to_the_end(job)
        assert len(job.times) >= 6
        assert job.times == sorted(job.times)
        assert loop.states["scripted"].worked_at is not None
        assert job.closed == 1

    asyncio.run(story())


def test_a_busy_job_leaves_the_others_their_turn() -> None:
    async def story() -> None:
        busy = Scripted([more] * 10_000, "busy")
        other = Scripted([enough], "other")
        loop = Loop([busy, other], lambda: 1, jitter=lambda: 0.0)
        stop = asyncio.Event()
        running = asyncio.create_task(loop.run(stop))
        await other.at_end.wait()
        assert busy.deeds, "the other one had its turn meanwhile"
        stop.set()
        await running

    asyncio.run(story())


def test_stopping_interrupts_the_wait_for_the_next_step() -> None:
    async def story() -> None:
        job = Scripted([], interval_s=3600.0)
        async with asyncio.timeout(60):
            await run_to_the_end(job)

    asyncio.run(story())


def test_a_failing_job_is_tried_again_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.loop.BACKOFF_S", 0.0)

    async def story() -> Loop:
        failing = Scripted([fail(Conflict("the clock")), fail(Conflict("the clock")), enough])
        return await run_to_the_end(failing, Scripted([enough], "other"))

    loop = asyncio.run(story())
    state = loop.states["scripted"]
    assert (state.failures, state.last_error) == (0, "the clock")
    told = [record.message for record in caplog.records]
    assert told == ["scripted failed: the clock", "scripted works again"]  # once, not twice


def test_waits_after_failures_double_up_to_a_limit() -> None:
    job = Scripted([], interval_s=1.0)
    loop = Loop([job], lambda: 1)
    waits = []
    for failures in range(1, 13):
        loop.states["scripted"].failures = failures
        waits.append(loop._backoff_s(job))
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert waits[-1] == BACKOFF_S_MAX
    loop.states["scripted"].failures = 10**6
    assert loop._backoff_s(job) == BACKOFF_S_MAX


def test_a_bug_is_logged_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop([Scripted([fail(ZeroDivisionError("a bug"))])], lambda: 1)
    assert asyncio.run(loop.once()) is False
    assert "Traceback" in caplog.text


def test_a_catalog_that_must_be_opened_anew_ends_the_loop() -> None:
    async def story() -> None:
        failed = Scripted([fail(CatalogFailed("a sync failed"))])
        other = Scripted([], "other", interval_s=3600.0)
        with pytest.raises(CatalogFailed):
            await Loop([failed, other], lambda: 1).run(asyncio.Event())
        assert (failed.closed, other.closed) == (1, 1)

    asyncio.run(story())


def test_once_does_what_there_is_and_says_whether_all_went_well() -> None:
    async def story() -> None:
        good = Scripted([more, more, enough], "good")
        assert await Loop([good], lambda: 1).once()
        assert (len(good.times), good.closed) == (3, 1)
        bad = Scripted([fail(Conflict("no"))], "bad")
        other = Scripted([enough], "other")
        assert not await Loop([bad, other], lambda: 1).once()
        assert len(other.times) == 1

    asyncio.run(story())


# --- how it looks from outside


def test_a_long_step_and_failures_in_a_row_are_trouble() -> None:
    job = JobState("sweep", 60.0)
    job.begun(0)
    assert job.trouble(STEP_US_MAX) == ""
    assert "in one step" in job.trouble(STEP_US_MAX + SECOND_US)
    for count in range(1, FAILURES_MAX + 1):
        assert job.failed(1, OSError("disk")) is (count == 1)
    assert job.trouble(1) == f"failed {FAILURES_MAX} times in a row"
    assert job.failed(1, OSError("another"))
    assert job.worked(2)
    assert (job.trouble(2), job.last_error) == ("", "another")


def test_a_job_that_fails_is_not_done_more_often_than_one_that_works() -> None:
    job = Scripted([], interval_s=7 * 86_400.0)
    loop = Loop([job], lambda: 0)
    for failures in range(1, 30):
        loop.states["scripted"].failed(0, Conflict("no"))
        assert loop._backoff_s(job) == job.interval_s, failures


def test_a_job_with_a_long_step_is_told_to_end_it() -> None:
    @final
    class Long:
        name = "long"
        interval_s = 0.0
        ended = asyncio.Event()
        begun = asyncio.Event()

        async def step(self, _now_us: int) -> bool:
            self.begun.set()
            await self.ended.wait()
            return False

        def stop(self) -> None:
            self.ended.set()

        async def close(self) -> None: ...

    async def story() -> None:
        job, stop = Long(), asyncio.Event()
        running = asyncio.create_task(Loop([job], lambda: 0).run(stop))
        await job.begun.wait()
        stop.set()
        await asyncio.wait_for(running, 60)

    asyncio.run(story())
