"""The sweep: records whose time is over. Plan, then execute.

It follows the expiry indexes, so its cost grows with what is due, not with what is stored;
only the folder of resumable uploads is read as a whole, and it holds what is unfinished.
Expiry is judged by catalog time, and nothing is swept while the clock is not to be
believed (invariant 10). A hold outlives every expiry.

`cas.forgetting` has what it ends of workflows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar, final

import msgspec

from cas.catalog import Catalog, Key, Snapshot, Transaction
from cas.events import event_is_over
from cas.forgetting import (
    POSTPONED_US,
    Due,
    Forgotten,
    execute_forgetting,
    is_due,
    plan_forgetting,
)
from cas.partial_files import PartialFiles
from cas.partials import partials_of
from cas.records import (
    EXPIRED,
    Event,
    Partial,
    PendingUpload,
    Record,
    StoredFile,
    Subscription,
)
from cas.uploads import close_upload

R = TypeVar("R", bound=Record)

_log = logging.getLogger(__name__)

_BATCH = 500  # records a transaction: a few ms of the writer lock
_ACTOR = "sweep"


@final
class SweepPlan(msgspec.Struct, frozen=True):
    """What a sweep would end, by identifier: printable, testable, refusable."""

    now_us: int
    keep_us: int  # how long events and what has ended are remembered
    file_ids: list[str]
    references: list[str]  # of those files, for people
    upload_ids: list[str]
    partial_ids: list[str] = []
    event_ids: list[str] = []
    leftovers: list[str] = []  # files of partials that have no record any more
    workflows: Due = Due()

    def __bool__(self) -> bool:
        return bool(
            self.file_ids
            or self.upload_ids
            or self.partial_ids
            or self.event_ids
            or self.leftovers
            or self.workflows
        )


@final
class Swept(msgspec.Struct, frozen=True):
    """What a sweep ended."""

    files: int
    uploads: int
    partials: int = 0
    events: int = 0
    leftovers: int = 0
    workflows: Forgotten = Forgotten()

    @property
    def total(self) -> int:
        """Everything together: 0 when there was nothing to do."""
        ended = self.files + self.uploads + self.partials + self.events + self.leftovers
        return ended + self.workflows.total


def plan_sweep(
    snapshot: Snapshot,
    now_us: int,
    limit: int = 10_000,
    *,
    partial_files: PartialFiles | None = None,
    keep_us: int,
) -> SweepPlan:
    """Up to `limit` of each kind whose time is over at `now_us` (catalog time).

    Leftovers are looked for where `partial_files` are given. `keep_us` is `[events] keep`.
    """
    due = (now_us + 1,)
    files = _due_files(snapshot, due, limit)
    uploads = snapshot.range(PendingUpload, "expiry", before=due, limit=limit)
    partials = snapshot.range(Partial, "expiry", before=due, limit=limit)
    events = snapshot.range(Event, "expiry", before=due, limit=limit)
    names = partial_files.names() if partial_files else []
    return SweepPlan(
        now_us,
        keep_us,
        [file.file_id for file in files],
        [file.storage_ref for file in files],
        [upload.upload_id for upload in uploads],
        [partial.partial_id for partial in partials if partial.undated_at is None],
        [event.event_id for event in events if event.undated_at is None],
        sorted(name for name in names if snapshot.get(Partial, name) is None)[:limit],
        plan_forgetting(snapshot, now_us, keep_us, limit),
    )


def _due_files(snapshot: Snapshot, due: Key, limit: int) -> list[StoredFile]:
    """Files to end. Those on hold stay in the index, and must not keep others from their turn."""
    files: list[StoredFile] = []
    after: Key = ()
    while len(files) < limit:
        page = snapshot.range(StoredFile, "expiry", after=after, before=due, limit=limit)
        files += [file for file in page if not file.hold]
        if len(page) < limit:
            break
        after = (page[-1].expires_at or 0, page[-1].file_id)
    return files[:limit]


def execute_sweep(
    catalog: Catalog, plan: SweepPlan, *, partial_files: PartialFiles | None = None
) -> Swept:
    """End what the plan names and is still due; safe to stop anywhere and to repeat.

    The files of partials go after their records, where `partial_files` are given; without,
    they are leftovers for a later sweep.
    """
    now_us = plan.now_us

    def file_is_due(file: StoredFile) -> bool:
        # Its retention may have been prolonged since the plan was made.
        return not file.hold and file.expires_at is not None and file.expires_at <= now_us

    def partial_is_due(partial: Partial) -> bool:
        # Another piece may have come.
        return partial.undated_at is None and partial.expires_at <= now_us

    files = len(_end(catalog, StoredFile, plan.file_ids, file_is_due))
    ended = _end(catalog, Partial, plan.partial_ids, partial_is_due)
    uploads = 0
    for upload_id in plan.upload_ids:
        unfinished = _end_upload(catalog, upload_id, now_us, plan.keep_us)
        if unfinished is not None:
            uploads += 1
            ended += unfinished
    # Waits first: they keep the events that they were given.
    forgotten = execute_forgetting(catalog, plan.workflows, now_us, plan.keep_us)
    events = _end_events(catalog, plan.event_ids, now_us)
    leftovers = 0
    if partial_files is not None:
        _remove(partial_files, ended)
        with catalog.read() as snapshot:
            # Listed before this snapshot, unlike those of the plan: see `leftovers` there.
            over = [name for name in plan.leftovers if snapshot.get(Partial, name) is None]
        leftovers = _remove(partial_files, over)
    return Swept(files, uploads, len(ended), events, leftovers, forgotten)


def _end(
    catalog: Catalog, kind: type[R], identifiers: list[str], is_due: Callable[[R], bool]
) -> list[str]:
    """Delete the records that are still there and due; returns their identifiers."""
    ended: list[str] = []
    for chunk in _chunks(identifiers):

        def end(txn: Transaction, chunk: list[str] = chunk) -> list[str]:
            gone = []
            for identifier in chunk:
                record = txn.get(kind, identifier)
                if record is not None and is_due(record):
                    txn.delete(record)
                    gone.append(identifier)
            return gone

        ended += catalog.write(end, actor=_ACTOR)
    return ended


def _end_events(catalog: Catalog, event_ids: list[str], now_us: int) -> int:
    """Remove the events that are due, but those that a wait was given: it may ask again. They
    are given to no other one from now on. Those of a run that is open stay as they are."""
    ended = 0
    for chunk in _chunks(event_ids):

        def end(txn: Transaction, chunk: list[str] = chunk) -> int:
            gone = 0
            for identifier in chunk:
                event = txn.get(Event, identifier)
                if event is None or not is_due(event.expires_at, event.undated_at, now_us):
                    continue
                later_us = now_us + POSTPONED_US
                if not event_is_over(txn, event, now_us):
                    txn.replace(msgspec.structs.replace(event, expires_at=later_us))
                elif txn.range(Subscription, "event", (identifier,), limit=1):
                    txn.replace(
                        msgspec.structs.replace(
                            event, open_for=None, once=False, expires_at=later_us
                        )
                    )
                else:
                    txn.delete(event)
                    gone += 1
            return gone

        ended += catalog.write(end, actor=_ACTOR)
    return ended


def _end_upload(catalog: Catalog, upload_id: str, now_us: int, keep_us: int) -> list[str] | None:
    """Expire one upload; returns its unfinished partials, None when it is not due.

    One a transaction: an upload may have a thousand slots to let go of.
    """

    def end(txn: Transaction) -> list[str] | None:
        upload = txn.get(PendingUpload, upload_id)
        if upload is None or upload.open_until is None or upload.open_until > now_us:
            return None
        unfinished = [partial.partial_id for partial in partials_of(txn, upload_id)]
        close_upload(txn, upload, EXPIRED, keep_us)
        return unfinished

    return catalog.write(end, actor=_ACTOR)


def _remove(partial_files: PartialFiles, partial_ids: list[str]) -> int:
    """Remove the files; returns how many are gone. One that cannot be keeps no other one."""
    removed = 0
    for partial_id in partial_ids:
        try:
            partial_files.remove(partial_id)
            removed += 1
        except OSError as error:
            _log.warning("partial/%s cannot be removed: %s", partial_id, error.strerror)
    return removed


def _chunks(identifiers: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(identifiers), _BATCH):
        yield identifiers[start : start + _BATCH]
