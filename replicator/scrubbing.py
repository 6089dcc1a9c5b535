"""The job that scrubs: reads all blobs again, slowly, round after round.

A piece of a scrub may last as long as its largest blob, hours at a low rate. So it runs in
a thread from step to step, and a step only waits for it a moment. When the process stops,
the piece is given up in the middle: nothing of it is recorded, and the next round begins
with what is longest unverified.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Final, final

from cas.scrub import Scrub, ScrubReport
from cas.store import Store
from replicator.sweeping import refuse_wrong_clock

_STEP_S: Final = 1.0
_BLOB_BYTES: Final = 64 << 10  # what a blob counts beside its bytes: finding it takes a seek
_ROUND_S: Final = 86_400.0  # a small store need not be read again every minute

_log = logging.getLogger("blobcask.scrub")


class _Stopped(Exception):
    """The process ends."""


@final
class ScrubRound:
    """See the module. A `replicator.loop.Job`."""

    name: Final = "scrub"
    interval_s: Final = _ROUND_S

    def __init__(self, store: Store, bytes_per_s: int) -> None:
        """`bytes_per_s`, over 0, is what it reads at most."""
        self._store = store
        self._bytes_per_s = bytes_per_s
        self._stop = threading.Event()
        self._scrub: Scrub | None = None
        self._piece: asyncio.Task[bool] | None = None

    async def step(self, _now_us: int) -> bool:
        """Wait a moment for the piece at work; False when a round is over.

        Raises what the piece raises, and Conflict while the clock is not to be believed:
        what is old enough to be cleared away is judged by it.
        """
        if self._piece is None:
            refuse_wrong_clock(self._store)
            self._piece = asyncio.create_task(asyncio.to_thread(self._work))
        done, _ = await asyncio.wait((self._piece,), timeout=_STEP_S)
        if not done:
            return True
        piece, self._piece = self._piece, None
        return piece.result()

    def _work(self) -> bool:
        """One piece, in a thread: True when the round goes on."""
        scrub = self._scrub
        if scrub is None:
            scrub = Scrub(self._store, bytes_per_s=self._bytes_per_s, wait=self._wait)
        self._scrub = None  # after a failure another round begins with what is next
        began_s, checked = time.monotonic(), scrub.report.checked
        more = scrub.step()
        if not more:
            _tell(scrub.report)
            return False
        self._scrub = scrub
        blobs = scrub.report.checked - checked
        owed_s = blobs * _BLOB_BYTES / self._bytes_per_s
        self._wait(max(0.0, owed_s - (time.monotonic() - began_s)))
        return True

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    async def close(self) -> None:
        """Give up the piece at work, and wait for its thread: it uses the store."""
        self._stop.set()
        if self._piece is not None:
            (ended,) = await asyncio.gather(self._piece, return_exceptions=True)
            if isinstance(ended, Exception) and not isinstance(ended, _Stopped):
                _log.warning("the last piece failed: %s", ended)


def _tell(report: ScrubReport) -> None:
    """Log what was found in a round and an operator has to look at."""
    if report.well:
        return
    _log.error(
        "the scrub found %d damaged and %d missing blobs and %d wrong counts; see `blobcask "
        "doctor`; the first: %s",
        *(len(report.damaged), len(report.missing), len(report.miscounts)),
        ", ".join([*report.damaged, *report.missing][:3]) or "-",
    )
