"""The job that sends deliveries: what is due, some at a time, no tenant before all others.

Callbacks and mails have places of their own. In both the tenants that wait have their turns, in
order of their names and round after round, each with the few places it may have and its longest
due first. As long as little is due, all of it is looked at; when more is, a look costs the
tenants it comes by and never what is due for them.

A receiver that hangs holds its place for `[callbacks] timeout`. It never holds another
tenant's. All mails go to one server, which may hang for all of them, so they have few places:
callbacks go on beside it. It may hang for the addresses of one tenant only, so that one has half
of them at most, also while no other wants any: a place that was given away is not there for
who comes next.
What came of an attempt is written as soon as it is known, so that a crash makes few
attempts twice. Twice is possible, and announced: the identifier is the same.
A mail whose approval is over is not sent: its links would decide nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final, final

from cas.approvals import ended_of
from cas.callbacks import tenant_secret
from cas.catalog import Snapshot
from cas.deliveries import (
    Outcome,
    due,
    due_of,
    opened_payload,
    payload_of,
    record_attempt,
    waiting_tenant,
)
from cas.errors import Conflict
from cas.records import CALLBACK, FAILED, MAIL, Delivery
from cas.restored import waits_for_acceptance
from cas.sealing import Ring
from cas.store import Store
from replicator.callbacks import Sender
from replicator.mail import Mailer
from replicator.names import TooManyQuestions

PLACES: Final = 32  # callbacks at a time
TENANT_PLACES: Final = 4
MAIL_PLACES: Final = 4  # mails at a time, beside them
TENANT_MAIL_PLACES: Final = 2
# A step waits so long at most, so that what comes due meanwhile gets the free places.
_STEP_S: Final = 1.0
_CLOSE_S: Final = 3.0  # what is in flight may take so long when the process is stopped
_FEW: Final = 100  # due: they are all looked at, which takes a ms
_TENANTS_A_LOOK: Final = 100  # of each kind that have their turn in one look: some 3 ms

# Whose turn it is, with what is due for it; it is asked with a kind, and with the tenant that had
# the last turn.
_Turn = tuple[str, list[Delivery]]
_Turns = Callable[[str, str], Iterator[_Turn]]

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
        mailer: Mailer,
        *,
        ring: Ring = (),
        jitter: Callable[[], float] = lambda: random.uniform(-1, 1),
    ) -> None:
        """`master` is `Keys.callbacks`, `ring` `Keys.secrets`, without which what is sealed
        waits; `jitter` gives numbers from -1 to 1."""
        self._store = store
        self._master = master
        self._sender = sender
        self._mailer = mailer
        self._ring = ring
        self._jitter = jitter
        self._give_up_after_us = store.settings.callbacks.give_up_after
        self._flying: dict[asyncio.Task[None], Delivery] = {}
        self._lanes = (
            _Lane(MAIL, MAIL_PLACES, TENANT_MAIL_PLACES),
            _Lane(CALLBACK, PLACES, TENANT_PLACES),
        )

    async def step(self, now_us: int) -> bool:
        """Start what is due at `now_us` (catalog time) and has a place; wait for one of all
        that are on their way, a second at most. True while there may be more to send now."""
        chosen, many = self._choose(now_us)
        for delivery in chosen:
            task = asyncio.create_task(self._attempt(delivery), name=delivery.delivery_id)
            self._flying[task] = delivery
        done: set[asyncio.Task[None]] = set()
        if self._flying:
            done, _ = await asyncio.wait(
                self._flying, timeout=_STEP_S, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                del self._flying[task]
            for task in done:
                task.result()  # the catalog's errors are the job's
        return many or bool(self._flying or done)

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

    def _choose(self, now_us: int) -> tuple[list[Delivery], bool]:
        """What to start now, and whether more than a few are due."""
        with self._store.catalog.read() as snapshot:
            if waits := waits_for_acceptance(snapshot):
                raise Conflict(f"nothing was sent: {waits}")
            few = due(snapshot, now_us, _FEW)
            many = len(few) == _FEW
            turns = _turns_of_all(snapshot, now_us) if many else _turns_of_few(few)
            flying = self._flying.values()
            chosen = [each for lane in self._lanes for each in lane.choose(flying, turns)]
        return chosen, many

    async def _attempt(self, delivery: Delivery) -> None:
        try:
            outcome = await self._outcome(delivery)
        except TooManyQuestions:
            # No attempt, and none that counts. It keeps its place for a moment, so that what
            # cannot be sent now is not chosen again at once.
            await asyncio.sleep(_STEP_S)
            return
        # In a thread: it waits for the disk.
        recorded = await asyncio.to_thread(self._record, delivery, outcome)
        if recorded is not None and recorded.status == FAILED:
            _log.warning(
                "delivery %s of tenant %s failed for good after %d attempts: %s",
                *(delivery.delivery_id, delivery.tenant_id, recorded.attempts),
                recorded.last_error,
            )

    async def _outcome(self, delivery: Delivery) -> Outcome:
        with self._store.catalog.read() as snapshot:
            payload = payload_of(snapshot, delivery.delivery_id)
            if delivery.kind == MAIL:
                now_us = self._store.now_us(snapshot)
                if over := ended_of(snapshot, delivery.subject, now_us):
                    return Outcome(None, over, unwanted=True)
        if payload is None:
            return Outcome(None, "what was to be sent is gone", hopeless=True)
        payload = opened_payload(delivery, payload, self._ring)
        if payload is None:  # which the operator can mend
            return Outcome(None, "what is sent cannot be opened with ROOT/keys/secrets")
        try:
            if delivery.kind == MAIL:
                return await self._mailer.send(delivery, payload)
            secret = tenant_secret(self._master, delivery.tenant_id)
            return await self._sender.send(delivery, payload, secret)
        except TooManyQuestions:
            raise
        except Exception:  # noqa: BLE001  a bug that one of them sets off must not stop the others
            _log.exception("delivery %s met a bug", delivery.delivery_id)
            return Outcome(None, "an internal error")

    def _record(self, delivery: Delivery, outcome: Outcome) -> Delivery | None:
        return record_attempt(
            self._store.catalog,
            delivery.delivery_id,
            outcome,
            give_up_after_us=self._give_up_after_us,
            jitter=self._jitter(),
        )


@final
class _Lane:
    """The places of one kind of delivery, and which tenant's turn is next."""

    def __init__(self, kind: str, places: int, tenant_places: int) -> None:
        self.kind: Final = kind
        self._places = places
        self._tenant_places = tenant_places
        self._last_tenant = ""  # that had its turn

    def choose(self, flying: Iterable[Delivery], turns: _Turns) -> list[Delivery]:
        """Give the free places to tenants, beginning after the last one that had its turn."""
        taken = [delivery for delivery in flying if delivery.kind == self.kind]
        free = self._places - len(taken)
        if free <= 0:
            return []
        identifiers = {delivery.delivery_id for delivery in taken}
        tenants = Counter(delivery.tenant_id for delivery in taken)
        chosen: list[Delivery] = []
        for tenant_id, deliveries in turns(self.kind, self._last_tenant):
            self._last_tenant = tenant_id
            waiting = [each for each in deliveries if each.delivery_id not in identifiers]
            may_have = min(self._tenant_places - tenants[tenant_id], free - len(chosen))
            chosen += waiting[: max(may_have, 0)]
            # Here, and not when the next one's turn has come, who would lose it.
            if len(chosen) == free:
                break
        return chosen


def _turns_of_few(few: list[Delivery]) -> _Turns:
    """The turns of those that have something among `few`."""

    def turns(kind: str, last_tenant: str) -> Iterator[_Turn]:
        tenants: dict[str, list[Delivery]] = {}
        for delivery in few:
            if delivery.kind == kind:
                tenants.setdefault(delivery.tenant_id, []).append(delivery)
        names = sorted(tenants)
        begin = bisect_right(names, last_tenant)
        for tenant_id in names[begin:] + names[:begin]:
            yield tenant_id, tenants[tenant_id]

    return turns


def _turns_of_all(snapshot: Snapshot, now_us: int) -> _Turns:
    """The turns of those that something waits for, as many of them as are for one look."""

    def turns(kind: str, last_tenant: str) -> Iterator[_Turn]:
        tenant_id = last_tenant
        had: set[str] = set()
        for _ in range(_TENANTS_A_LOOK):
            found = waiting_tenant(snapshot, kind, tenant_id) or waiting_tenant(snapshot, kind)
            if found is None or found in had:
                return
            tenant_id = found
            had.add(tenant_id)
            yield tenant_id, due_of(snapshot, kind, tenant_id, now_us, TENANT_PLACES)

    return turns
