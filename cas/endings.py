"""What ends with a run: all that it waits for, and what it asked others for.

Its waits and steps end in any case, so that no event is given to nobody, none is kept for nobody
and no key is blocked.
Where it did not come to its own end, nobody needs what it asked others for: its pending upload
links and approvals are cancelled, and its webhooks are over. A run that is completed leaves them
as it made them, for a link may have been its purpose.

    end      the run's own record, by which everybody judges, and a portion of what ends with it,
             in one transaction (invariant 6): what others can act upon first
    let_go   the rest of a run that has more, in portions, so that others write meanwhile

A run that is not done with is found by the index "ending". Where its process was killed, the
sweep goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

import msgspec

from cas.approvals import close_approval
from cas.catalog import Catalog, Key, Snapshot, Transaction, pages
from cas.events import drop
from cas.records import (
    CANCELLED,
    COMPLETED,
    PENDING,
    RUNNING,
    WAITING,
    Approval,
    Once,
    PendingUpload,
    Record,
    Run,
    Step,
    Subscription,
    Webhook,
)
from cas.upload_links import slots_of
from cas.uploads import close_upload

PORTION: Final = 500  # records a transaction: some 50 ms of the writer lock
VAIN_MAX: Final = 10 * PORTION  # looked at for nothing by `end`: as long again, at most
_ENDING: Final = "ending"


def end(txn: Transaction, run: Run, keep_us: int) -> Run:
    """Record `run`, which ends now; its status says how. Returned with `ending` where there is
    more that ends with it, which `let_go` is for. `keep_us` is `[events] keep`."""
    txn.replace(run)  # first: from here on its waits are passed over
    ended = in_vain = 0
    for record in _going(txn, run):
        if ended >= PORTION or in_vain >= VAIN_MAX:
            run = msgspec.structs.replace(run, ending=_ENDING)
            txn.replace(run)
            break
        if record is None:
            in_vain += 1
        else:
            ended += 1 + _end_one(txn, run, record, keep_us)
    return run


def let_go(catalog: Catalog, run_id: str, actor: str, keep_us: int) -> None:
    """End what is left of a run that has ended; nothing where it is still open. Safe to stop
    anywhere and to repeat. `keep_us` is `[events] keep`."""
    with catalog.read() as snapshot:
        run = snapshot.get(Run, run_id)
        if run is None or run.open is not None:
            return
        left: list[tuple[type[Record], Key]] = [
            (type(record), record.primary_key())
            for record in _going(snapshot, run)
            if record is not None
        ]
    done = 0
    while done < len(left) or (run is not None and run.ending is not None):
        portion = partial(_end_portion, run_id, left, done, keep_us)
        done, run = catalog.write(portion, actor=actor)


def _end_portion(
    run_id: str,
    left: list[tuple[type[Record], Key]],
    done: int,
    keep_us: int,
    txn: Transaction,
) -> tuple[int, Run | None]:
    """End some of what is left; returns how many of all are done with, and the run."""
    run = txn.get(Run, run_id)
    if run is None:
        return len(left), None  # forgotten, and all of it
    ended = 0
    while done < len(left) and ended < PORTION:
        kind, key = left[done]
        record = txn.get(kind, *key)
        ended += 1 if record is None else 1 + _end_one(txn, run, record, keep_us)
        done += 1
    if done == len(left) and run.ending is not None:
        run = msgspec.structs.replace(run, ending=None)
        txn.replace(run)
    return done, run


def _going(snapshot: Snapshot, run: Run) -> Iterator[Record | None]:
    """All of a run that ends with it and has not, what others can act upon first; None for each
    record that was looked at in vain, so that it can be counted what that costs."""
    of_run = (run.tenant_id, run.run_id)
    if run.status != COMPLETED:
        for kind in (Approval, Webhook):
            for found in pages(snapshot, kind, "run", of_run):
                yield from (record if _ends(run, record) else None for record in found)
        # Each upload is remembered under the step that asked for it.
        for page in pages(snapshot, Once, "", (run.tenant_id, f"run:{run.run_id}")):
            for key in page:
                upload = snapshot.get(PendingUpload, key.result)
                yield upload if upload is not None and _ends(run, upload) else None
    # First those that still wait: to end one that was given an event costs looking for another
    # one that waits for it. Last what nobody sees: those that were claimed.
    given: list[Subscription] = []
    claimed: list[str] = []
    for waits in pages(snapshot, Subscription, "run", of_run):
        for wait in waits:
            going = _ends(run, wait)
            if going and wait.claimed_at is not None:
                claimed.append(wait.subscription_id)
            elif going and wait.event_id is not None:
                given.append(wait)
            elif going:
                yield wait
                continue
            yield None
    yield from given
    for status in (RUNNING, WAITING):
        for steps in pages(snapshot, Step, "status", (run.run_id, status)):
            yield from steps
    for name in claimed:
        yield snapshot.get(Subscription, name)


def _ends(run: Run, record: Record) -> bool:
    """Whether a record of a run, which has ended, goes on without it."""
    match record:
        case PendingUpload() | Approval():
            return record.status == PENDING
        case Webhook():
            return record.expires_at is None or record.expires_at > (run.ended_at or 0)
        case Subscription():
            # Claimed ones too: no step of it asks again. Clients' stay until they are over: what
            # they were given is theirs.
            return not record.of_client
        case Step():
            return record.status in (RUNNING, WAITING)
    return False


def _end_one(txn: Transaction, run: Run, record: Record, keep_us: int) -> int:
    """End it, unless it has ended meanwhile; returns how many other records went with it."""
    if not _ends(run, record):
        return 0
    match record:
        case PendingUpload():
            slots = len(slots_of(txn, record))
            close_upload(txn, record, CANCELLED, keep_us)
            return slots
        case Approval():
            close_approval(txn, record, CANCELLED, keep_us=keep_us)
        case Webhook():
            # Over now, however long it had; so it is in a clock in doubt too (invariant 10).
            txn.replace(msgspec.structs.replace(record, expires_at=run.ended_at, undated_at=None))
        case Subscription():
            drop(txn, record)
        case Step():
            txn.replace(step_as_of(run, record))
    return 0


def step_as_of(run: Run, step: Step) -> Step:
    """A step as it is beside its run: one that is over ends all of them, also those whose own
    record does not say so yet."""
    if run.open is not None or step.status not in (RUNNING, WAITING):
        return step
    return msgspec.structs.replace(step, status=CANCELLED, ended_at=run.ended_at, value_bytes=None)
