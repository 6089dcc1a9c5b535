"""Dating: when what was stored under a doubtful clock is over (invariant 10).

While the clock is in doubt, catalog time stands still, and how long it has stood nobody can
tell. A term counted from there might be over at the moment in which the clock is set right:
a file kept "for a day" would go an hour after it came. So such records wait `undated`, and
are over at no time, until a write is made whose time is believed: by itself, by a time
service, or by an operator. From then on their terms count.

A record whose `undated_at` is set has terms that began at that moment; dating moves each of
them on by the time that passed since. Waits and approvals have two: how long they are open,
and how long they are remembered. Of a wait that was given its event meanwhile, the time counts
for which it is kept for who has not claimed it.
"""

from __future__ import annotations

from typing import Final, TypeVar, final

import msgspec

from cas.catalog import Catalog, Transaction
from cas.clock import DAY_US, Clock, read, rfc3339
from cas.records import (
    PENDING,
    Approval,
    Event,
    Mark,
    Once,
    Partial,
    PendingUpload,
    Run,
    Secret,
    StoredFile,
    Subscription,
    Webhook,
)
from cas.retention import Term

T = TypeVar("T", PendingUpload, Partial, Approval, Event, Once, Subscription, Webhook)

CLOCK_SEEN = "clock_seen"  # the mark that an idle store writes to keep up with time

_ACTOR = "date"


@final
class Dated(msgspec.Struct, frozen=True):
    """How many records got their end."""

    files: int = 0
    uploads: int = 0
    partials: int = 0
    workflows: int = 0  # events, waits, approvals, webhooks, secrets, keys of what is done once

    def __bool__(self) -> bool:
        return bool(self.files or self.uploads or self.partials or self.workflows)

    def __add__(self, other: Dated) -> Dated:
        return Dated(
            self.files + other.files,
            self.uploads + other.uploads,
            self.partials + other.partials,
            self.workflows + other.workflows,
        )


def date(catalog: Catalog, limit: int = 500) -> Dated:
    """Count the terms of up to `limit` undated records of each kind from now; durable.

    Nothing happens while the clock is in doubt. Costs what is undated, not what is stored.
    """

    def change(txn: Transaction) -> Dated:
        if not txn.believed:
            return Dated()
        files = txn.range(StoredFile, "undated", limit=limit)
        uploads = txn.range(PendingUpload, "undated", limit=limit)
        partials = txn.range(Partial, "undated", limit=limit)
        for file in files:
            txn.replace(kept_for(file, term_of(file).dated(txn.now_us)))
        for upload in uploads:
            txn.replace(_dated_upload(upload, txn.now_us))
        for partial in partials:
            txn.replace(msgspec.structs.replace(postponed(partial, txn.now_us), undated_at=None))
        return Dated(len(files), len(uploads), len(partials), _date_workflows(txn, limit))

    return catalog.write(change, actor=_ACTOR) if any_undated(catalog) else Dated()


def date_all(catalog: Catalog) -> Dated:
    """Date all that is undated, a bounded write at a time."""
    total = Dated()
    while dated := date(catalog):
        total += dated
    return total


def any_undated(catalog: Catalog) -> bool:
    """Whether something waits for a clock that can be believed."""
    with catalog.read() as snapshot:
        return bool(
            snapshot.range(StoredFile, "undated", limit=1)
            or snapshot.range(PendingUpload, "undated", limit=1)
            or snapshot.range(Partial, "undated", limit=1)
            or any(snapshot.range(kind, "undated", limit=1) for kind in _OF_WORKFLOWS)
        )


def keep_up(catalog: Catalog, clock: Clock, gap_us_max: int) -> bool:
    """Write down what time it is where nothing was written for long; True when it did.

    Else a store that rests for longer than `gap_us_max`, on a machine without a time service,
    would take its own right clock for a wrong one.
    """
    last_us = catalog.position().at_us
    reading = read(clock, last_us, gap_us_max)
    if not reading.believed or reading.at_us - last_us < min(DAY_US, gap_us_max // 4):
        return False

    catalog.write(note_time, actor=_ACTOR)
    return True


def note_time(txn: Transaction) -> None:
    """Write down what time it is: the smallest of all changes, and one that means nothing else."""
    mark = Mark(CLOCK_SEEN, rfc3339(txn.now_us))
    if txn.get(Mark, CLOCK_SEEN) is None:
        txn.insert(mark)
    else:
        txn.replace(mark)


def term_of(file: StoredFile) -> Term:
    """How long a file is kept."""
    return Term(file.retention_policy, file.expires_at, file.undated_at, file.promised)


def kept_for(file: StoredFile, term: Term) -> StoredFile:
    """The file, kept for `term`."""
    return msgspec.structs.replace(
        file,
        retention_policy=term.retention_policy,
        expires_at=term.expires_at,
        undated_at=term.undated_at,
        promised=term.promised,
    )


def postponed(record: T, now_us: int) -> T:
    """A record as it is at `now_us`: the term of an undated one begins only now."""
    if record.undated_at is None:
        return record
    if record.expires_at is None:
        return msgspec.structs.replace(record, undated_at=now_us)
    term_us = record.expires_at - record.undated_at
    return msgspec.structs.replace(record, expires_at=now_us + term_us, undated_at=now_us)


def _dated_upload(upload: PendingUpload, now_us: int) -> PendingUpload:
    upload = postponed(upload, now_us)
    return msgspec.structs.replace(upload, open_until=upload.expires_at, undated_at=None)


_OF_WORKFLOWS: Final = (Event, Once, Subscription, Approval, Webhook, Run, Secret)


def _date_workflows(txn: Transaction, limit: int) -> int:
    """Date up to `limit` of each kind; returns how many it were."""
    now_us = txn.now_us
    events = txn.range(Event, "undated", limit=limit)
    keys = txn.range(Once, "undated", limit=limit)
    webhooks = txn.range(Webhook, "undated", limit=limit)
    waits = txn.range(Subscription, "undated", limit=limit)
    approvals = txn.range(Approval, "undated", limit=limit)
    runs = txn.range(Run, "undated", limit=limit)
    secrets = txn.range(Secret, "undated", limit=limit)
    for event in events:
        txn.replace(msgspec.structs.replace(postponed(event, now_us), undated_at=None))
    for key in keys:
        txn.replace(msgspec.structs.replace(postponed(key, now_us), undated_at=None))
    for webhook in webhooks:
        txn.replace(msgspec.structs.replace(postponed(webhook, now_us), undated_at=None))
    for wait in waits:
        txn.replace(_dated_wait(wait, now_us, txn.position.seq + 1))
    for approval in approvals:
        txn.replace(_dated(approval, now_us, is_open=approval.status == PENDING))
    for run in runs:
        txn.replace(_dated_run(run, now_us))
    for secret in secrets:
        txn.replace(_dated_secret(secret, now_us))
    counted = (events, keys, webhooks, waits, approvals, runs, secrets)
    return sum(len(dated) for dated in counted)


W = TypeVar("W", Subscription, Approval)


def _dated_run(run: Run, now_us: int) -> Run:
    if run.forget_at is None or run.undated_at is None:
        return msgspec.structs.replace(run, undated_at=None)
    forget_at = now_us + run.forget_at - run.undated_at
    return msgspec.structs.replace(run, forget_at=forget_at, undated_at=None)


def _dated_secret(secret: Secret, now_us: int) -> Secret:
    if secret.old_until is None or secret.undated_at is None:
        return msgspec.structs.replace(secret, undated_at=None)
    old_until = now_us + secret.old_until - secret.undated_at
    return msgspec.structs.replace(secret, old_until=old_until, undated_at=None)


def _dated_wait(wait: Subscription, now_us: int, seq: int) -> Subscription:
    if wait.claimed_at is not None:
        return _dated(wait, now_us, is_open=False)
    if wait.delivered_at is not None:
        return _dated(msgspec.structs.replace(wait, delivered_at=now_us), now_us, is_open=False)
    # It has an end now, which may have come already: watchers must see it.
    return msgspec.structs.replace(_dated(wait, now_us, is_open=True), seq=seq)


def _dated(record: W, now_us: int, *, is_open: bool) -> W:
    """What is open ends its term later; what has ended is remembered for longer."""
    if is_open:
        dated = postponed(record, now_us)
        return msgspec.structs.replace(dated, open_until=dated.expires_at, undated_at=None)
    if record.forget_at is None or record.undated_at is None:
        return msgspec.structs.replace(record, undated_at=None)
    forget_at = now_us + record.forget_at - record.undated_at
    return msgspec.structs.replace(record, forget_at=forget_at, undated_at=None)
