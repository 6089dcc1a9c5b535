"""The loop: runs jobs side by side until it is told to stop. The only place that waits.

A job is a bounded `step(now)`. The loop knows the rest: the interval between steps, at
once again while there is more to do, ever longer (with jitter) while steps fail, and what
`replicate status` is told about each.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol, final, runtime_checkable

from cas.background import JobState
from cas.errors import BlobcaskError, CatalogClosed, CatalogFailed, Damaged

BACKOFF_S: Final = 1.0  # after the first failure in a row; doubled after each more
BACKOFF_S_MAX: Final = 60.0  # what was down for days is found again within a minute
JITTER: Final = 0.2  # of every wait, up or down: jobs of many stores must not march in step
# Only opening the store anew heals these, so the process ends and is started again.
ENDING: Final = (CatalogFailed, CatalogClosed, Damaged)

_log = logging.getLogger("blobcask.replicator")


class Job(Protocol):
    """Something that is done again and again."""

    @property
    def name(self) -> str: ...

    @property
    def interval_s(self) -> float:
        """From the end of a step that had no more to do to the next one."""
        ...

    async def step(self, now_us: int) -> bool:
        """A bounded piece of the work at `now_us` (catalog time); True: there is more now.

        Whatever it raises is a failure of the job, and the step is tried again later.
        """
        ...

    async def close(self) -> None:
        """Let go of what lasts from step to step. Called once, after the last one."""
        ...


@runtime_checkable
class Stoppable(Protocol):
    """A job with steps that take long, and end in the middle when they are told to."""

    def stop(self) -> None:
        """End the step that is under way. Called once, by the event loop's thread."""
        ...


@final
class Loop:
    """Runs jobs. `states` tells how each is, for whoever wants to know."""

    def __init__(
        self,
        jobs: Sequence[Job],
        now_us: Callable[[], int],
        *,
        jitter: Callable[[], float] = lambda: random.uniform(-1, 1),
    ) -> None:
        """`now_us` is catalog time; `jitter` gives numbers from -1 to 1."""
        self._jobs = jobs
        self._now_us = now_us
        self._jitter = jitter
        self.states = {job.name: JobState(job.name, job.interval_s) for job in jobs}

    async def run(self, stop: asyncio.Event) -> None:
        """Run all jobs until `stop` is set; then each ends its step.

        Raises CatalogFailed, CatalogClosed, Damaged: the store must be opened anew.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tell(stop), name="stop")
                for job in self._jobs:
                    group.create_task(self._run(job, stop), name=job.name)
        except BaseExceptionGroup as failed:
            raise first_of(failed) from None
        finally:
            for job in self._jobs:
                await job.close()

    async def once(self) -> bool:
        """Run each job until it has no more to do; False when one failed, which ends that one."""
        well = True
        for job in self._jobs:
            while (more := await self._step(job)) is True:
                pass
            well = well and more is not None
        for job in {id(job): job for job in self._jobs}.values():  # one may be there twice
            await job.close()
        return well

    async def _tell(self, stop: asyncio.Event) -> None:
        await stop.wait()
        for job in self._jobs:
            if isinstance(job, Stoppable):
                job.stop()

    async def _run(self, job: Job, stop: asyncio.Event) -> None:
        while not stop.is_set():
            more = await self._step(job)
            if more:
                await asyncio.sleep(0)  # a job that always has more must not keep the others
                continue
            wait_s = job.interval_s if more is not None else self._backoff_s(job)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), wait_s * (1 + JITTER * self._jitter()))

    async def _step(self, job: Job) -> bool | None:
        """Whether there is more; None when the step failed."""
        state = self.states[job.name]
        now_us = self._now_us()
        state.begun(now_us)
        try:
            more = await job.step(now_us)
        except ENDING:
            raise
        except Exception as error:  # noqa: BLE001  one job's trouble is not the others'
            if state.failed(self._now_us(), error):
                _log.warning("%s failed: %s", job.name, error, exc_info=not _is_plain(error))
            return None
        if state.worked(self._now_us()):
            _log.warning("%s works again", job.name)
        return more

    def _backoff_s(self, job: Job) -> float:
        doublings = min(self.states[job.name].failures - 1, 16)
        backoff_s = min(max(BACKOFF_S, job.interval_s) * 2.0**doublings, BACKOFF_S_MAX)
        return max(job.interval_s, backoff_s)  # failing, it is not done more often


def first_of(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first, out of its groups."""
    first = failed.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _is_plain(error: Exception) -> bool:
    """Whether its text says it all: what we raise on purpose, and what the system says."""
    return isinstance(error, (BlobcaskError, OSError))
