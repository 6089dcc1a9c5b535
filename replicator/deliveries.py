"""The job that sends deliveries: what is due, some at a time, no tenant before all others.

A receiver that hangs holds its place for `[callbacks] timeout`. It never holds another
tenant's: each has but a few of the places, and what is due behind it is looked for.
What came of an attempt is written as soon as it is known, so that a crash makes few
attempts twice. Twice is possible, and announced: the identifier is the same.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Final, final

from cas.callbacks import tenant_secret
from cas.catalog import Key
from cas.deliveries import Outcome, due, record_attempt
from cas.records import FAILED, Delivery
from cas.store import Store
from replicator.callbacks import Sender

PLACES: Final = 32  # attempts at a time
TENANT_PLACES: Final = 4
# A step waits so long at most, so that what comes due meanwhile gets the free places.
_STEP_S: Final = 1.0
_CLOSE_S: Final = 3.0  # what is in flight may take so long when the process is stopped
_PAGE: Final = 200
_LOOKED_AT_MAX: Final = 20_000  # records a step, which takes some 50 ms

_log = logging.getLogger("blobcask.deliveries")


@final
class SendDeliveries:
    """See the module. A `replicator.loop.Job`."""

    name: Final = "deliveries"
    interval_s: Final = 1.0

    def __init__(
        self,
        store: Store,
        master: bytes,
        sender: Sender,
        *,
        jitter: Callable[[], float] = lambda: random.uniform(-1, 1),
    ) -> None:
        """`master` is `Keys.callbacks`; `jitter` gives numbers from -1 to 1."""
        self._store = store
        self._master = master
        self._sender = sender
        self._jitter = jitter
        self._give_up_after_us = store.settings.callbacks.give_up_after
        self._flying: dict[asyncio.Task[None], Delivery] = {}

    async def step(self, now_us: int) -> bool:
        """Start what is due at `now_us` (catalog time) and has a place; wait for one of all
        that are on their way, a second at most. True while some are on their way."""
        for delivery in self._choose(now_us):
            task = asyncio.create_task(self._attempt(delivery), name=delivery.delivery_id)
            self._flying[task] = delivery
        if self._flying:
            done, _ = await asyncio.wait(
                self._flying, timeout=_STEP_S, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                del self._flying[task]
            for task in done:
                task.result()  # the catalog's errors are the job's
        return bool(self._flying)

    async def close(self) -> None:
        """Wait a moment for what is on its way, and give up the rest, to be sent again."""
        if self._flying:
            await asyncio.wait(self._flying, timeout=_CLOSE_S)
        for task in self._flying:
            task.cancel()
        for ended in await asyncio.gather(*self._flying, return_exceptions=True):
            if isinstance(ended, Exception):
                _log.warning("an attempt was not recorded: %s", ended)
        self._flying.clear()

    def _choose(self, now_us: int) -> list[Delivery]:
        flying = {delivery.delivery_id for delivery in self._flying.values()}
        taken = Counter(delivery.tenant_id for delivery in self._flying.values())
        chosen: list[Delivery] = []
        looked_at, after = 0, ()
        with self._store.catalog.read() as snapshot:
            while len(flying) < PLACES and looked_at < _LOOKED_AT_MAX:
                page = due(snapshot, now_us, _PAGE, after=after)
                for delivery in page:
                    if delivery.delivery_id in flying or len(flying) >= PLACES:
                        continue
                    if taken[delivery.tenant_id] < TENANT_PLACES:
                        taken[delivery.tenant_id] += 1
                        flying.add(delivery.delivery_id)
                        chosen.append(delivery)
                if len(page) < _PAGE:
                    break
                looked_at += len(page)
                after = _place(page[-1])  # type: ignore[assignment]
        return chosen

    async def _attempt(self, delivery: Delivery) -> None:
        secret = tenant_secret(self._master, delivery.tenant_id)
        try:
            outcome = await self._sender.send(delivery, secret)
        except Exception:  # noqa: BLE001  a bug that one URL sets off must not stop the others
            _log.exception("delivery %s met a bug", delivery.delivery_id)
            outcome = Outcome(None, "an internal error")
        # In a thread: it waits for the disk.
        recorded = await asyncio.to_thread(self._record, delivery, outcome)
        if recorded is not None and recorded.status == FAILED:
            _log.warning(
                "delivery %s of tenant %s failed for good after %d attempts: %s",
                *(delivery.delivery_id, delivery.tenant_id, recorded.attempts),
                recorded.last_error,
            )

    def _record(self, delivery: Delivery, outcome: Outcome) -> Delivery | None:
        return record_attempt(
            self._store.catalog,
            delivery.delivery_id,
            outcome,
            give_up_after_us=self._give_up_after_us,
            jitter=self._jitter(),
        )


def _place(delivery: Delivery) -> Key:
    return (delivery.next_attempt_at or 0, delivery.delivery_id)
