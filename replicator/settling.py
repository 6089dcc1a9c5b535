"""Settling: what became of copies is written down, one write of the catalog for many.

While one write is under way the next outcomes gather; those that nobody waits for wait a
moment longer for company. A write costs a sync of the journal, whatever it holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, final

from cas.records import Replica
from cas.replicas import Outcome, settle
from cas.store import Store

_GATHER_S: Final = 0.05
_MOST: Final = 256  # a write: some 20 ms of the writer lock

InThread = Callable[..., Awaitable[Any]]


@final
class Settling:
    """Writes outcomes down for one target. For the event loop."""

    def __init__(self, store: Store, in_thread: InThread) -> None:
        self._store = store
        self._in_thread = in_thread
        self._waiting: list[tuple[Outcome, asyncio.Future[Replica | None]]] = []
        self._full = asyncio.Event()
        self._hurried = False
        self._writing: asyncio.Task[None] | None = None

    async def add(self, outcome: Outcome, *, urgent: bool = False) -> Replica | None:
        """Write `outcome` down, durably; returns the row as it is now. `urgent`: do not wait
        for others. Raises what the catalog raises."""
        written: asyncio.Future[Replica | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((outcome, written))
        if urgent or self._hurried or len(self._waiting) >= _MOST:
            self._full.set()
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        return await written

    def hurry(self) -> None:
        """Gather no more: the process ends."""
        self._hurried = True
        self._full.set()

    async def _write_all(self) -> None:
        while self._waiting:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), _GATHER_S)
            if not self._hurried:
                self._full.clear()
            some, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
            outcomes = [outcome for outcome, _ in some]
            try:
                rows = await self._in_thread(settle, self._store.catalog, outcomes)
            except Exception as error:  # noqa: BLE001  each of them is told
                for _, written in some:
                    if not written.done():
                        written.set_exception(error)
                continue
            for (_, written), row in zip(some, rows, strict=True):
                if not written.done():
                    written.set_result(row)
