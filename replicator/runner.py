"""The background process of one ROOT: takes its place, opens the store, runs the loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from typing import Final, final

from cas.alone import Alone
from cas.background import PLACE, Heartbeat, background_of
from cas.beats import BEAT_S
from cas.config import Settings
from cas.errors import Conflict
from cas.keys import load_keys
from cas.replicas import backlog
from cas.store import Store
from replicator.heartbeat import write_heartbeat
from replicator.jobs import Jobs
from replicator.link import Link
from replicator.links import opened_links
from replicator.loop import ENDING, Job, Loop, first_of
from replicator.signs import Signs

_PID_WRITTEN_S: Final = 0.2  # between taking the place and writing the PID lies less
_PLACE_POLL_S: Final = 0.5
_FIRST_BEAT_S: Final = 0.5
_THREADS: Final = 16
_THREADS_A_TARGET: Final = 8

_log = logging.getLogger("blobcask.replicator")


@final
class Runner:
    """Runs the jobs of the ROOT that `settings` name. `say` gets remarks for people."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._root = settings.store.root
        self._say = say

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, waiting first while another process has the place.

        Raises what opening the store raises, and CatalogFailed or Damaged when it must be
        opened anew.
        """
        asyncio.run(self._run())

    def once(self) -> bool:
        """Do all that is due, and return; False when a job failed, or copies are still to be
        made: `say` is told of which targets.

        The scrub is never due: it is at work for days, a little at a time. Raises Conflict while
        another process has the place.
        """
        alone = Alone(self._root / PLACE)
        try:
            if not alone.take():
                raise Conflict(f"another replicator (PID {alone.holder()}) runs on this store")
            with Store.open(self._root, self._settings) as store, opened_links(store) as links:
                return asyncio.run(self._once(store, links))
        finally:
            alone.close()

    async def _once(self, store: Store, links: list[Link]) -> bool:
        _have_threads(links)
        jobs = Jobs(store, load_keys(self._settings), links)
        well = await _loop(store, jobs.due()).once()
        undone = _undone(store, links)
        for what in undone:
            self._say(what)
        return well and not undone

    async def _run(self) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        alone = Alone(self._root / PLACE)
        try:
            if await self._place(alone, stop):
                # In a thread: an index that must be made anew takes its time.
                store = await asyncio.to_thread(Store.open, self._root, self._settings)
                with store, opened_links(store) as links:
                    await self._serve(store, links, stop)
        finally:
            alone.close()

    async def _place(self, alone: Alone, stop: asyncio.Event) -> bool:
        """Wait for the place; False when told to stop before."""
        told = False
        while not stop.is_set():
            if alone.take():
                return True
            if not told:
                await _wait(stop, _PID_WRITTEN_S)
                self._say(f"Waiting: another replicator (PID {alone.holder()}) runs here.")
                told = True
            await _wait(stop, _PLACE_POLL_S)
        return False

    async def _serve(self, store: Store, links: list[Link], stop: asyncio.Event) -> None:
        _have_threads(links)
        jobs = Jobs(store, load_keys(self._settings), links)
        loop = _loop(store, jobs.lasting())
        told = f" to {', '.join(link.target.place for link in links)}" if links else ""
        self._say(f"Replicating {self._root}{told}: {', '.join(loop.states)}.")
        try:
            async with asyncio.TaskGroup() as group:
                beating = group.create_task(_beat(store, loop, jobs, links))
                await loop.run(stop)
                beating.cancel()
        except BaseExceptionGroup as failed:
            raise first_of(failed) from None


def _loop(store: Store, jobs: Sequence[Job]) -> Loop:
    def now_us() -> int:
        with store.catalog.read() as snapshot:
            return store.now_us(snapshot)

    return Loop(jobs, now_us)


def _undone(store: Store, links: Sequence[Link]) -> list[str]:
    """What a run that did all that is due has left to be done at targets, in words."""
    told = []
    with store.catalog.read() as snapshot:
        for link in links:
            waiting = backlog(snapshot, link.name, store.now_us(snapshot))
            why = link.down or waiting.oldest_error
            if link.fenced:
                told.append(f"Nothing was written to target {link.name}: {link.fenced}.")
            if waiting.rows:
                copies = "1 copy is" if waiting.rows == 1 else f"{waiting.rows:,} copies are"
                told.append(f"{copies} still to be made at {link.name}{why and ': '}{why}")
    return told


def _have_threads(links: Sequence[Link]) -> None:
    """Threads enough that the jobs of one target never wait for another, which may hang: by
    default there are as few as the machine has cores, and some."""
    threads = _THREADS + _THREADS_A_TARGET * len(links)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="job")
    asyncio.get_running_loop().set_default_executor(executor)


async def _beat(store: Store, loop: Loop, jobs: Jobs, links: Sequence[Link]) -> None:
    started_at = store.clock.now_us()
    signs = Signs(store, links, background_of(store.root, started_at).beat)
    # The second one soon: it tells how the first steps went.
    for wait_s in chain((_FIRST_BEAT_S,), repeat(BEAT_S)):
        try:
            beat = Heartbeat(
                os.getpid(),
                started_at,
                store.clock.now_us(),
                list(loop.states.values()),
                signs.states(loop.states.values()),
                jobs.cache(),
            )
            await asyncio.to_thread(write_heartbeat, store.root, beat)
        except ENDING:
            raise
        except Exception:  # noqa: BLE001  nobody hears that all is well, but work goes on
            _log.exception("no heartbeat")
        await asyncio.sleep(wait_s)


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
