"""The jobs that end what is over: date, sweep, forget, collect, upkeep, a bounded batch a step.

They do what the verbs of the same names do, with the same plans, and nothing while the
clock is not to be believed (invariant 10): that is an error of the job, which `replicate
status` shows, until the clock is right or the operator accepts it.
"""

from __future__ import annotations

import asyncio
from typing import Final, final

from cas.clock import SECOND_US
from cas.dating import date, keep_up
from cas.deliveries import forget, plan_forgetting
from cas.errors import Conflict
from cas.restored import waits_for_acceptance
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep

_BATCH: Final = 1000  # of each kind a step: about a second


def refuse_wrong_clock(store: Store) -> None:
    """Raise Conflict while nothing may be judged by the clock (invariant 10), or the store is
    as of an earlier time and nobody has accepted that yet."""
    with store.catalog.read() as snapshot:
        trouble = waits_for_acceptance(snapshot)
    trouble = trouble or store.clock_trouble()
    if trouble:
        raise Conflict(f"nothing was removed: {trouble}")


@final
class Date:
    """Dates what was stored while the clock was in doubt, as soon as it is not (invariant 10).

    Also lets catalog time keep up with the clock where nothing else is written.
    """

    name: Final = "date"

    def __init__(self, store: Store) -> None:
        self._store = store
        self.interval_s = store.settings.sweeper.interval / SECOND_US

    async def step(self, _now_us: int) -> bool:
        """One batch; True when it dated something, so that there may be more."""
        return await asyncio.to_thread(self._date)

    def _date(self) -> bool:
        store = self._store
        keep_up(store.catalog, store.clock, store.settings.sweeper.max_clock_gap)
        return bool(date(store.catalog))

    async def close(self) -> None:
        """Nothing is left open between steps."""


@final
class Sweep:
    """Ends files, uploads, partials, events and records of workflows whose time is over."""

    name: Final = "sweep"

    def __init__(self, store: Store) -> None:
        self._store = store
        self.interval_s = store.settings.sweeper.interval / SECOND_US

    async def step(self, now_us: int) -> bool:
        """One batch; True when it ended something, so that there may be more."""
        return await asyncio.to_thread(self._sweep, now_us)

    def _sweep(self, now_us: int) -> bool:
        store = self._store
        refuse_wrong_clock(store)
        with store.catalog.read() as snapshot:
            plan = plan_sweep(
                snapshot,
                now_us,
                _BATCH,
                partial_files=store.partial_files,
                keep_us=store.settings.events.keep,
            )
        return execute_sweep(store.catalog, plan, partial_files=store.partial_files).total > 0

    async def close(self) -> None:
        """Nothing is left open between steps."""


@final
class Forget:
    """Removes deliveries that were decided long ago."""

    name: Final = "forget"

    def __init__(self, store: Store) -> None:
        self._store = store
        self.interval_s = store.settings.sweeper.interval / SECOND_US

    async def step(self, now_us: int) -> bool:
        """One batch; True when it removed something, so that there may be more."""
        return await asyncio.to_thread(self._forget, now_us)

    def _forget(self, now_us: int) -> bool:
        refuse_wrong_clock(self._store)
        with self._store.catalog.read() as snapshot:
            old = plan_forgetting(snapshot, now_us, _BATCH)
        return forget(self._store.catalog, old, now_us) > 0

    async def close(self) -> None:
        """Nothing is left open between steps."""


@final
class Collect:
    """Removes the bytes that no file needs and whose grace is over."""

    name: Final = "collect"

    def __init__(self, store: Store) -> None:
        self._store = store
        self.interval_s = store.settings.sweeper.interval / SECOND_US

    async def step(self, now_us: int) -> bool:
        """One batch; True when it removed something, so that there may be more."""
        return await asyncio.to_thread(self._collect, now_us)

    def _collect(self, now_us: int) -> bool:
        refuse_wrong_clock(self._store)
        with self._store.catalog.read() as snapshot:
            plan = self._store.collector.plan(snapshot, now_us, _BATCH)
        return bool(plan.digests) and self._store.collector.execute(plan).blobs > 0

    async def close(self) -> None:
        """Nothing is left open between steps."""


@final
class Upkeep:
    """Frees the index's reader slots of killed processes: each would pin old pages.

    All other upkeep is done by whoever writes: checkpoints, pruning, laying the ballast.
    """

    name: Final = "upkeep"
    interval_s: Final = 300.0

    def __init__(self, store: Store) -> None:
        self._store = store

    async def step(self, _now_us: int) -> bool:
        """A look at every slot; never more to do."""
        await asyncio.to_thread(self._store.catalog.reader_check)
        return False

    async def close(self) -> None:
        """Nothing is left open between steps."""
