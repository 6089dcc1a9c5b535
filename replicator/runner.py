"""The background process of one ROOT: takes its place, opens the store, runs the loop."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, repeat
from typing import Final, final

from cas.background import Heartbeat
from cas.config import Settings
from cas.errors import Conflict
from cas.keys import Keys, load_keys
from cas.store import Store
from replicator.heartbeat import BEAT_S, Alone, write_heartbeat
from replicator.jobs import jobs_of, lasting_jobs_of
from replicator.loop import Job, Loop

_PID_WRITTEN_S: Final = 0.2  # between taking the place and writing the PID lies less
_PLACE_POLL_S: Final = 0.5
_FIRST_BEAT_S: Final = 0.5
_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>

_log = logging.getLogger("blobcask.replicator")


def die_with(parent_pid: int) -> None:
    """Have this process told to stop (SIGTERM) when `parent_pid`, its parent, ends.

    Raises SystemExit where that has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit(0)


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
        """Do all that is due, and return; False when a job failed.

        The scrub is never due: it is at work for days, a little at a time. Raises Conflict while
        another process has the place.
        """
        alone = Alone(self._root)
        try:
            if not alone.take():
                raise Conflict(f"another replicator (PID {alone.holder()}) runs on this store")
            with Store.open(self._root, self._settings) as store:
                return asyncio.run(self._loop(store, jobs_of).once())
        finally:
            alone.close()

    async def _run(self) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        alone = Alone(self._root)
        try:
            if await self._place(alone, stop):
                # In a thread: an index that must be made anew takes its time.
                store = await asyncio.to_thread(Store.open, self._root, self._settings)
                with store:
                    await self._serve(store, stop)
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

    async def _serve(self, store: Store, stop: asyncio.Event) -> None:
        loop = self._loop(store, lasting_jobs_of)
        self._say(f"Replicating {self._root}: {', '.join(loop.states)}.")
        beating = asyncio.create_task(_beat(store, loop))
        try:
            await loop.run(stop)
        finally:
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating

    def _loop(self, store: Store, jobs: Callable[[Store, Keys], list[Job]]) -> Loop:
        def now_us() -> int:
            with store.catalog.read() as snapshot:
                return store.now_us(snapshot)

        return Loop(jobs(store, load_keys(self._settings)), now_us)


async def _beat(store: Store, loop: Loop) -> None:
    started_at = store.clock.now_us()
    # The second one soon: it tells how the first steps went.
    for wait_s in chain((_FIRST_BEAT_S,), repeat(BEAT_S)):
        now_us = store.clock.now_us()
        beat = Heartbeat(os.getpid(), started_at, now_us, list(loop.states.values()))
        await asyncio.to_thread(write_heartbeat, store.root, beat)
        await asyncio.sleep(wait_s)


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
