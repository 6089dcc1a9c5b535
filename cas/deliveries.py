"""Deliveries: messages that must reach somebody outside, such as the callback of an upload or
the mail that asks for a decision.

    waiting → done        the receiver took it (2xx; of SMTP, 250)
            → failed      it said "never again" (410; a refused address), or was given up after
                          `give_up_after`
            → cancelled   what it speaks of is over, so nobody needs it any more

A delivery is recorded in the transaction of the change it speaks of (invariant 6), so what
happened is told even when everything is killed a moment later. The background process sends
it, and records what came of every attempt. An attempt whose record was lost is made again:
a receiver may get a message twice, always with the same `delivery_id`, and never not at all.

What is sent is a record of its own, written once, so that an attempt journals but what
changes and nobody who counts or lists reads it. That of a mail is sealed: its links decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, final

import msgspec

from cas.catalog import Catalog, Key, Snapshot, Transaction, pages
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.errors import NotFound
from cas.identifiers import first_id, new_id
from cas.listing import Page, newest
from cas.records import CANCELLED, DONE, FAILED, MAIL, WAITING, Delivery, DeliveryPayload
from cas.references import check_segment
from cas.sealing import Names, Ring, is_sealed, seal, unseal

# How long to wait after the first, second, … failed attempt; after more, as after the last.
# Most failures are a restart, over in seconds; the others are an outage, over in hours.
DELAYS_US: Final = tuple(
    seconds * SECOND_US for seconds in (5, 30, 120, 600, 1800, 3600, 2 * 3600, 4 * 3600, 6 * 3600)
)
JITTER: Final = 0.2  # of a delay, up or down: what failed together need not come back together
# A receiver may ask for a later attempt, within reason.
RETRY_AFTER_US_MAX: Final = 6 * HOUR_US
KEPT_US: Final = 30 * DAY_US  # what is decided stays in the listings for so long

RETRY_AFTER_STATUS: Final = (429, 503)  # of another answer, Retry-After means nothing here
_NEVER_AGAIN: Final = 410  # "Gone": how a receiver ends what it no longer wants
_ERROR_CHARS_MAX: Final = 300
_PAGE: Final = 500  # records read at a time, of some 300 bytes each
_BATCH: Final = 500  # deliveries a transaction: a few ms of the writer lock
_SEALED_BATCH: Final = 50  # mails a transaction, of up to 30 KB each
_ACTOR: Final = "deliveries"

_encode = msgspec.json.Encoder().encode


def enqueue(
    txn: Transaction,
    tenant_id: str,
    kind: str,
    subject: str,
    target: str,
    payload: dict[str, Any],
    *,
    ring: Ring | None = None,
) -> Delivery:
    """Record a message inside the transaction of what it speaks of; due at once. See `message`."""
    delivery, sent = message(txn.now_us, tenant_id, kind, subject, target, payload, ring=ring)
    txn.insert(delivery)
    txn.insert(sent)
    return delivery


def message(
    now_us: int,
    tenant_id: str,
    kind: str,
    subject: str,
    target: str,
    payload: dict[str, Any],
    *,
    ring: Ring | None = None,
) -> tuple[Delivery, DeliveryPayload]:
    """A message that is due at `now_us`: both records are to be inserted in the transaction of
    what it speaks of. Where there are many of them, they are made before it.

    `subject` is what it speaks of (an upload's identifier), `target` a URL, or an address
    where `kind` is MAIL. The payload is stored as JSON: every attempt sends the same bytes.
    With a `ring`, `Keys.secrets`, it is sealed: neither the journal nor where that is shipped
    to tells what is sent.
    """
    delivery = Delivery(
        delivery_id=new_id(now_us),
        tenant_id=tenant_id,
        kind=kind,
        subject=subject,
        target=target,
        status=WAITING,
        created_at=now_us,
        next_attempt_at=now_us,
    )
    sent = _encode(payload)
    if ring is not None:
        sent = seal(ring, _names(delivery), sent)
    return delivery, DeliveryPayload(delivery.delivery_id, sent)


def call_off(txn: Transaction, tenant_id: str, subject: str, why: str) -> None:
    """Send nothing more of what waits for one subject, inside the transaction that ends it.

    What is on its way at this moment may still arrive, and is `done` then.
    """
    for page in pages(txn, Delivery, "subject", (tenant_id, subject)):
        for delivery in page:
            if delivery.status == WAITING:
                txn.replace(_called_off(delivery, why, txn.now_us))


def _called_off(delivery: Delivery, why: str, now_us: int) -> Delivery:
    taken = delivery.last_status is not None and Outcome(delivery.last_status).taken
    if taken and not delivery.last_error:
        # It has arrived, and was to be sent again.
        return msgspec.structs.replace(delivery, status=DONE, next_attempt_at=None, done_at=now_us)
    return msgspec.structs.replace(
        delivery, status=CANCELLED, next_attempt_at=None, last_error=why, done_at=now_us
    )


def _names(delivery: Delivery) -> Names:
    return delivery.kind, delivery.tenant_id, delivery.delivery_id


@final
class Deliveries:
    """The deliveries of one tenant. Made by `Store.deliveries`; safe for threads."""

    def __init__(self, catalog: Catalog, *, tenant_id: str, actor: str, request_id: str) -> None:
        self._catalog = catalog
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id

    def list(
        self,
        *,
        status: str | None = None,
        subject: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page[Delivery]:
        """A page of deliveries, newest first; of one `status`, or of one `subject`."""
        index, prefix = "tenant", (self._tenant_id,)
        if status is not None:
            index, prefix = "status", (self._tenant_id, status)  # type: ignore[assignment]
        elif subject is not None:
            index, prefix = "subject", (self._tenant_id, subject)  # type: ignore[assignment]
        with self._catalog.read() as snapshot:
            return newest(snapshot, Delivery, index, prefix, cursor, limit)

    def newest(self, subjects: Iterable[str]) -> dict[str, Delivery]:
        """The newest delivery of each subject that has any, all as of one moment."""
        with self._catalog.read() as snapshot:
            found = [
                snapshot.range(
                    Delivery, "subject", (self._tenant_id, subject), limit=1, reverse=True
                )
                for subject in subjects
            ]
        return {delivery.subject: delivery for deliveries in found for delivery in deliveries}

    def get(self, delivery_id: str) -> Delivery:
        """One delivery; raises NotFound, also for another tenant's."""
        with self._catalog.read() as snapshot:
            return self._own(snapshot, delivery_id)

    def resend(self, delivery_id: str) -> Delivery:
        """Have it sent at once, whatever became of it, with all its attempts before it. What it
        speaks of may be over: then nothing is sent, and what had arrived is `done` as before.

        The receiver sees the same `delivery_id`. Durable on return; raises NotFound.
        """

        def change(txn: Transaction) -> Delivery:
            delivery = msgspec.structs.replace(
                self._own(txn, delivery_id),
                status=WAITING,
                next_attempt_at=txn.now_us,
                attempts=0,
                done_at=None,
            )
            txn.replace(delivery)
            return delivery

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def _own(self, snapshot: Snapshot, delivery_id: str) -> Delivery:
        delivery = snapshot.get(Delivery, delivery_id)
        if delivery is None or delivery.tenant_id != self._tenant_id:
            raise NotFound("delivery", delivery_id)
        return delivery


# --- for the process that sends them


@final
class Outcome(msgspec.Struct, frozen=True):
    """What came of one attempt.

    `status` is that of the HTTP or SMTP answer, None when none came; `error` says in words what was
    wrong, for the tenant to read, "" when nothing was. `retry_after_us` is what the receiver
    asked for. `hopeless` tells that no later attempt can end otherwise, `unwanted` that none
    was made, since what it speaks of is over.
    """

    status: int | None
    error: str = ""
    retry_after_us: int | None = None
    hopeless: bool = False
    unwanted: bool = False

    @property
    def taken(self) -> bool:
        """Whether the receiver has the message."""
        return self.status is not None and 200 <= self.status < 300 and not self.error

    @property
    def final(self) -> bool:
        """Whether it is pointless, or unwanted, to try again."""
        return self.hopeless or self.status == _NEVER_AGAIN


def due(snapshot: Snapshot, now_us: int, limit: int, *, after: Key = ()) -> list[Delivery]:
    """Up to `limit` deliveries to be sent at `now_us`, longest due first.

    `after` continues where an earlier call ended: (next_attempt_at, delivery_id).
    """
    return snapshot.range(Delivery, "due", after=after, before=(now_us + 1,), limit=limit)


def due_of(
    snapshot: Snapshot, kind: str, tenant_id: str, now_us: int, limit: int
) -> list[Delivery]:
    """Up to `limit` deliveries of one kind and tenant to be sent at `now_us`, longest due first."""
    prefix = (WAITING, kind, tenant_id)
    return snapshot.range(Delivery, "queue", prefix, before=(now_us + 1,), limit=limit)


def waiting_tenant(snapshot: Snapshot, kind: str, after: str = "") -> str | None:
    """The next tenant in order that something of a kind waits for, due or not; None: no more.

    Costs one look, however much waits for the tenants before it.
    """
    behind: Key = (after,) if after else ()
    found = snapshot.range(Delivery, "queue", (WAITING, kind), after=behind, limit=1)
    return found[0].tenant_id if found else None


def payload_of(snapshot: Snapshot, delivery_id: str) -> bytes | None:
    """What a delivery sends, JSON or sealed; None when it is gone meanwhile."""
    record = snapshot.get(DeliveryPayload, delivery_id)
    return record.payload if record else None


def opened_payload(delivery: Delivery, payload: bytes, ring: Ring) -> bytes | None:
    """The JSON of what a delivery sends, also where it was recorded before it was sealed; None
    where no key of `ring`, `Keys.secrets`, opens it."""
    return unseal(ring, _names(delivery), payload) if is_sealed(payload) else payload


def record_attempt(
    catalog: Catalog,
    delivery_id: str,
    outcome: Outcome,
    *,
    give_up_after_us: int,
    jitter: float,
) -> Delivery | None:
    """Write down what came of an attempt, and when the next one is; durable on return.

    `jitter` is a number from -1 to 1. None: the delivery is decided, or gone, meanwhile.
    """

    def change(txn: Transaction) -> Delivery | None:
        delivery = txn.get(Delivery, delivery_id)
        if delivery is None or not (
            delivery.status == WAITING
            or (delivery.status == CANCELLED and outcome.taken)  # it was on its way just then
        ):
            return None
        delivery = after_attempt(
            delivery, outcome, txn.now_us, give_up_after_us=give_up_after_us, jitter=jitter
        )
        txn.replace(delivery)
        return delivery

    return catalog.write(change, actor=_ACTOR)


def after_attempt(
    delivery: Delivery, outcome: Outcome, now_us: int, *, give_up_after_us: int, jitter: float
) -> Delivery:
    """The delivery after an attempt at `now_us`; `jitter` is a number from -1 to 1.

    It is given up when its patience is spent. That is counted in the delays, not by the
    clock: a store that was down for a week has not tried for a week.
    """
    if outcome.unwanted:
        return _called_off(delivery, outcome.error, now_us)
    attempts = delivery.attempts + 1
    delay_us = _delay_us(attempts)
    status, next_attempt_at, done_at = WAITING, None, None
    if outcome.taken:
        status, done_at = DONE, now_us
    elif outcome.final or sum(map(_delay_us, range(1, attempts + 1))) > give_up_after_us:
        status, done_at = FAILED, now_us
    else:
        delay_us += int(delay_us * JITTER * jitter)
        if outcome.status in RETRY_AFTER_STATUS and outcome.retry_after_us is not None:
            delay_us = max(delay_us, min(outcome.retry_after_us, RETRY_AFTER_US_MAX))
        next_attempt_at = now_us + delay_us
    return msgspec.structs.replace(
        delivery,
        status=status,
        next_attempt_at=next_attempt_at,
        attempts=attempts,
        last_attempt_at=now_us,
        last_status=outcome.status,
        last_error=outcome.error[:_ERROR_CHARS_MAX],
        done_at=done_at,
    )


def _delay_us(attempts: int) -> int:
    return DELAYS_US[min(attempts, len(DELAYS_US)) - 1]


# --- what is owed, and what is over


@final
class Backlog(msgspec.Struct, frozen=True):
    """What is still to be sent, and what never will be. `oldest_us` is the age of the oldest
    that waits, since it was recorded; 0 when nothing waits."""

    waiting: int
    failed: int
    oldest_us: int


def backlog(snapshot: Snapshot, now_us: int) -> Backlog:
    """Count what waits and what failed, of all tenants; costs as much as there is of both."""
    waiting, failed, oldest_at = 0, 0, now_us
    for delivery in _queued(snapshot, WAITING):
        waiting += 1
        oldest_at = min(oldest_at, delivery.created_at)
    for _ in _queued(snapshot, FAILED):
        failed += 1
    return Backlog(waiting, failed, now_us - oldest_at)


def failed_deliveries(snapshot: Snapshot, limit: int) -> list[Delivery]:
    """Up to `limit` deliveries that were given up, of all tenants."""
    return snapshot.range(Delivery, "queue", (FAILED,), limit=limit)


def _queued(snapshot: Snapshot, status: str) -> Iterator[Delivery]:
    after: Key = ()
    while page := snapshot.range(Delivery, "queue", (status,), after=after, limit=_PAGE):
        yield from page
        last = page[-1]
        due_at = () if last.next_attempt_at is None else (last.next_attempt_at,)
        after = (last.kind, last.tenant_id, *due_at, last.delivery_id)


def plan_forgetting(snapshot: Snapshot, now_us: int, limit: int = 1000) -> list[str]:
    """Deliveries that were recorded and decided over KEPT_US ago, oldest first."""
    old = (first_id(max(now_us - KEPT_US, 0)),)
    found: list[str] = []
    after: Key = ()
    while len(found) < limit:
        page = snapshot.range(Delivery, "", after=after, before=old, limit=_PAGE)
        found += [delivery.delivery_id for delivery in page if _is_over(delivery, now_us)]
        if len(page) < _PAGE:
            break
        after = (page[-1].delivery_id,)
    return found[:limit]


def forget(catalog: Catalog, delivery_ids: list[str], now_us: int) -> int:
    """Remove what the plan names and is still over, with what it sent; returns how many.

    Safe to stop anywhere and to repeat.
    """
    return sum(
        _forget(catalog, delivery_ids[start : start + _BATCH], now_us)
        for start in range(0, len(delivery_ids), _BATCH)
    )


def _forget(catalog: Catalog, delivery_ids: list[str], now_us: int) -> int:
    def change(txn: Transaction) -> int:
        over = [
            delivery
            for delivery_id in delivery_ids
            if (delivery := txn.get(Delivery, delivery_id)) and _is_over(delivery, now_us)
        ]
        for delivery in over:
            txn.delete(delivery)
            payload = txn.get(DeliveryPayload, delivery.delivery_id)
            if payload is not None:
                txn.delete(payload)
        return len(over)

    return catalog.write(change, actor=_ACTOR)


def reseal_mails(catalog: Catalog, ring: Ring) -> None:
    """Seal by the newest key what is mailed, or may be sent again; durable on return.

    What no key opens is left as it is. Safe to stop anywhere and to repeat.
    """
    with catalog.read() as snapshot:
        names = [
            delivery.delivery_id
            for page in pages(snapshot, Delivery)
            for delivery in page
            if delivery.kind == MAIL
        ]
    for start in range(0, len(names), _SEALED_BATCH):

        def change(
            txn: Transaction, chunk: list[str] = names[start : start + _SEALED_BATCH]
        ) -> None:
            for name in chunk:
                delivery, record = txn.get(Delivery, name), txn.get(DeliveryPayload, name)
                if delivery is None or record is None or not is_sealed(record.payload):
                    continue
                payload = opened_payload(delivery, record.payload, ring)
                if payload is not None:
                    txn.replace(DeliveryPayload(name, seal(ring, _names(delivery), payload)))

        catalog.write(change, actor=_ACTOR)


def _is_over(delivery: Delivery, now_us: int) -> bool:
    # Sent again, or decided, only lately: somebody may still look at it.
    return delivery.done_at is not None and delivery.done_at <= now_us - KEPT_US
