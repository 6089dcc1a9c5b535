"""Forgetting: the records of workflows whose time is over, a part of the sweep.

    waits       claimed ones after `[events] keep`; those that nobody claimed after their end and
                as long again; those of clients minutes after they ended without an event, or
                were given one and have no name to ask for it; none of a run that is still
                open, which may ask again, and with whose end they go
    keys        of what is done once, when they expire
    approvals   nobody decided: they expire, which is an event; ended ones are removed later,
                when the run has ended too
    webhooks    when they expire, with the keys of the calls that came
    ends        of runs, where they were broken off: what ends with them ends now
    runs        when they are forgotten, with their text, steps, keys, waits, approvals and webhooks

The sweep itself sees to events: one that a wait was given stays for as long as the wait
(invariant 13), and goes with the last one that could ask for it (`cas.events.drop`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, final

import msgspec

from cas.approvals import close_approval
from cas.catalog import Catalog, Key, Snapshot, Transaction
from cas.clock import DAY_US
from cas.endings import let_go
from cas.events import IN_VAIN_US, drop, is_run_open
from cas.once import webhook_scope
from cas.records import (
    EXPIRED,
    PENDING,
    Approval,
    Once,
    Record,
    Run,
    RunText,
    Step,
    StepValue,
    Subscription,
    Webhook,
)

R = TypeVar("R", bound=Record)

# When to look again at what is due, but needed: so that it is not looked at by every sweep.
POSTPONED_US: Final = DAY_US
BATCH: Final = 500  # records a transaction: a few ms of the writer lock
_VALUES: Final = 100  # of these, results of steps
_ACTOR: Final = "sweep"


@final
class Due(msgspec.Struct, frozen=True):
    """What is to be forgotten, by primary key."""

    wait_ids: list[str] = []
    keys: list[tuple[str, str, str]] = []
    approval_ids: list[str] = []
    webhook_ids: list[str] = []
    run_ids: list[str] = []
    ending_ids: list[str] = []  # runs

    def __bool__(self) -> bool:
        return any(self.counts().values())

    def counts(self) -> dict[str, int]:
        """How many of each kind, with the names of `Forgotten`."""
        return {
            "waits": len(self.wait_ids),
            "keys": len(self.keys),
            "approvals": len(self.approval_ids),
            "webhooks": len(self.webhook_ids),
            "runs": len(self.run_ids),
            "ends": len(self.ending_ids),
        }


@final
class Forgotten(msgspec.Struct, frozen=True):
    """How many records were removed or, of approvals, expired; of runs, ended to the end."""

    waits: int = 0
    keys: int = 0
    approvals: int = 0
    webhooks: int = 0
    runs: int = 0
    ends: int = 0

    @property
    def total(self) -> int:
        return self.waits + self.keys + self.approvals + self.webhooks + self.runs + self.ends


def plan_forgetting(snapshot: Snapshot, now_us: int, keep_us: int, limit: int) -> Due:
    """Up to `limit` of each kind whose time is over at `now_us` (catalog time)."""
    before = (now_us + 1,)
    unclaimed_before = (max(now_us - keep_us, 0) + 1,)
    waits = [
        *_due(
            snapshot, Subscription, "forget", before, limit, lambda wait: wait.undated_at is None
        ),
        *_due(
            snapshot,
            Subscription,
            "delivered",
            unclaimed_before,
            limit,
            lambda wait: _is_forgettable(snapshot, wait, now_us, keep_us),
        ),
        *_due(
            snapshot,
            Subscription,
            "timer",
            before,
            limit,
            lambda wait: _is_forgettable(snapshot, wait, now_us, keep_us),
        ),
    ]
    keys = _due(snapshot, Once, "expiry", before, limit, lambda key: key.undated_at is None)
    open_over = _due(snapshot, Approval, "expiry", before, limit, lambda _: True)
    ended = _due(snapshot, Approval, "forget", before, limit, lambda one: one.undated_at is None)
    runs = _due(snapshot, Run, "forget", before, limit, lambda one: one.undated_at is None)
    webhooks = _due(snapshot, Webhook, "expiry", before, limit, lambda one: one.undated_at is None)
    return Due(
        list(dict.fromkeys(wait.subscription_id for wait in waits))[:limit],
        [(key.tenant_id, key.scope, key.name) for key in keys],
        [approval.approval_id for approval in (*open_over, *ended)][:limit],
        [webhook.webhook_id for webhook in webhooks],
        [run.run_id for run in runs],
        [run.run_id for run in snapshot.range(Run, "ending", limit=limit)],
    )


def execute_forgetting(catalog: Catalog, due: Due, now_us: int, keep_us: int) -> Forgotten:
    """Forget what is named and still due; safe to stop anywhere and to repeat."""

    def forget_wait(txn: Transaction, wait: Subscription) -> bool:
        if not _is_forgettable(txn, wait, now_us, keep_us):
            if is_due(wait.forget_at, wait.undated_at, now_us):
                later = msgspec.structs.replace(wait, forget_at=now_us + POSTPONED_US)
                txn.replace(later)
            return False
        drop(txn, wait)
        return True

    def forget_key(txn: Transaction, key: Once) -> bool:
        return _delete(txn, key, is_due(key.expires_at, key.undated_at, now_us))

    def end_approval(txn: Transaction, approval: Approval) -> bool:
        if approval.status == PENDING and is_due(approval.open_until, None, now_us):
            close_approval(txn, approval, EXPIRED, keep_us=keep_us)
            return True
        over = is_due(approval.forget_at, approval.undated_at, now_us)
        if over and is_run_open(txn, approval.tenant_id, approval.workflow_run_id):
            # Its step may begin again, and must find what it asked for.
            txn.replace(msgspec.structs.replace(approval, forget_at=now_us + POSTPONED_US))
            return False
        return _delete(txn, approval, over)

    for run_id in due.ending_ids:
        let_go(catalog, run_id, _ACTOR, keep_us)
    return Forgotten(
        _each(catalog, Subscription, [(name,) for name in due.wait_ids], forget_wait),
        _each(catalog, Once, due.keys, forget_key),
        _each(catalog, Approval, [(name,) for name in due.approval_ids], end_approval),
        sum(_forget_due_webhook(catalog, name, now_us) for name in due.webhook_ids),
        sum(_forget_run(catalog, run_id, now_us) for run_id in due.run_ids),
        len(due.ending_ids),
    )


def forget_webhook(txn: Transaction, webhook: Webhook) -> bool:
    """Remove a webhook, whenever it were over: forget up to BATCH of the calls that came; True
    when none is left and its record is gone. The sweep goes on with one that is not."""
    calls = _calls(txn, webhook, BATCH)
    for call in calls:
        txn.delete(call)
    if len(calls) < BATCH:
        txn.delete(webhook)
        return True
    txn.replace(webhook.removed())
    return False


def is_due(at_us: int | None, undated_at: int | None, now_us: int) -> bool:
    """Whether a term is over; one that waits for the clock never is (invariant 10)."""
    return at_us is not None and undated_at is None and at_us <= now_us


def _is_forgettable(snapshot: Snapshot, wait: Subscription, now_us: int, keep_us: int) -> bool:
    if _in_open_run(snapshot, wait) or wait.undated_at is not None:
        return False
    if wait.forget_at is not None:
        return is_due(wait.forget_at, None, now_us)
    if wait.delivered_at is not None:
        return max(wait.delivered_at, wait.expires_at or 0) + keep_us <= now_us
    if wait.open_until is None:
        return False
    # A client hears in time that it was in vain, or waits anew.
    kept_us = IN_VAIN_US if wait.of_client else keep_us
    return wait.open_until + kept_us <= now_us


def _in_open_run(snapshot: Snapshot, wait: Subscription) -> bool:
    """Whether the runner may ask for it again."""
    if wait.of_client:
        return False
    return is_run_open(snapshot, wait.tenant_id, wait.workflow_run_id)


def _due(
    snapshot: Snapshot,
    kind: type[R],
    index: str,
    before: Key,
    limit: int,
    wanted: Callable[[R], bool],
) -> list[R]:
    """Those before a time; what is not wanted stays in the index, and keeps none from its turn."""
    found: list[R] = []
    after: Key = ()
    fields = kind.schema.indexes[index]
    while len(found) < limit:
        page = snapshot.range(kind, index, after=after, before=before, limit=limit)
        found += [record for record in page if wanted(record)]
        if len(page) < limit:
            break
        after = tuple(getattr(page[-1], field) for field in fields)
    return found[:limit]


def _delete(txn: Transaction, record: Record, due: bool) -> bool:
    if due:
        txn.delete(record)
    return due


def _each(
    catalog: Catalog, kind: type[R], keys: list[Any], act: Callable[[Transaction, R], bool]
) -> int:
    """Act on those records that are still there; returns on how many it did something."""
    done = 0
    for chunk in _chunks(keys):

        def change(txn: Transaction, chunk: list[Any] = chunk) -> int:
            found = [txn.get(kind, *key) for key in chunk]
            return sum(act(txn, record) for record in found if record is not None)

        done += catalog.write(change, actor=_ACTOR)
    return done


def _forget_due_webhook(catalog: Catalog, webhook_id: str, now_us: int) -> int:
    """Remove a webhook and what it knows of its calls; 0 when it is not due."""

    def change(txn: Transaction) -> int | None:
        webhook = txn.get(Webhook, webhook_id)
        if webhook is None or not is_due(webhook.expires_at, webhook.undated_at, now_us):
            return 0
        return 1 if forget_webhook(txn, webhook) else None

    while (done := catalog.write(change, actor=_ACTOR)) is None:
        pass
    return done


def _forget_run(catalog: Catalog, run_id: str, now_us: int) -> int:
    """Remove a run and what belongs to it, itself last; 0 when it is not due."""

    def change(txn: Transaction) -> int | None:
        run = txn.get(Run, run_id)
        if run is None or run.open is not None or not is_due(run.forget_at, run.undated_at, now_us):
            return 0
        owned = _owned(txn, run)
        for record in owned:
            if isinstance(record, Subscription):
                # A held event that it was given is there for others again: for one of these,
                # perhaps, so what was read before counts no more.
                drop(txn, txn.get(Subscription, record.subscription_id) or record)
            else:
                txn.delete(record)
        if len(owned) >= _VALUES:
            return None  # there may be more
        text = txn.get(RunText, run_id)
        if text is not None:
            txn.delete(text)
        txn.delete(run)
        return 1

    while (done := catalog.write(change, actor=_ACTOR)) is None:
        pass
    return done


def _owned(txn: Transaction, run: Run) -> list[Record]:
    """Up to a batch of what goes with a run."""
    of_run: Key = (run.tenant_id, run.run_id)
    # Results may be large: fewer at once.
    found: list[Record] = [*txn.range(StepValue, "", (run.run_id,), limit=_VALUES)]
    found += txn.range(Step, "", (run.run_id,), limit=BATCH - len(found))
    scope: Key = (run.tenant_id, f"run:{run.run_id}")
    found += txn.range(Once, "", scope, limit=BATCH - len(found))
    for kind in (Subscription, Approval):
        found += txn.range(kind, "run", of_run, limit=BATCH - len(found))
    for webhook in txn.range(Webhook, "run", of_run, limit=BATCH - len(found)):
        found += _calls(txn, webhook, BATCH - len(found))
        if len(found) >= BATCH:  # there may be more of its calls, which are found by it
            break
        found.append(webhook)
    return found


def _calls(snapshot: Snapshot, webhook: Webhook, limit: int) -> list[Once]:
    """Up to `limit` keys of the calls that a webhook took."""
    scope: Key = (webhook.tenant_id, webhook_scope(webhook.webhook_id))
    return snapshot.range(Once, "", scope, limit=limit)


def _chunks(keys: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(keys), BATCH):
        yield keys[start : start + BATCH]
