"""What an operator wants to know of a store: how much it holds, and what waits to be done.

Costs what is due and the number of tenants, never the number of blobs or files. All of it is
exact, but that a queue is counted up to QUEUE_MAX.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeVar, final

import msgspec

from cas.background import CacheState, background_of
from cas.catalog import Key, Snapshot
from cas.clock import SECOND_US
from cas.deliveries import failed_deliveries
from cas.mirrored import Mirrored, mirrored_of
from cas.records import (
    QUEUED,
    Blob,
    Delivery,
    Partial,
    PendingUpload,
    Record,
    Run,
    StoredFile,
    Usage,
)
from cas.runner import runner_of
from cas.store import Store
from cas.totals import blobs_elsewhere, blobs_here, held_bytes, open_runs

R = TypeVar("R", bound=Record)

QUEUE_MAX: Final = 1_000
_PAGE: Final = 1_000
_PARTIALS_MAX: Final = 10_000


@final
class Queue(msgspec.Struct, frozen=True):
    """What waits of one kind: how many (up to QUEUE_MAX), the oldest due for how long."""

    count: int
    oldest_s: float


@final
class Vitals(msgspec.Struct, frozen=True):
    """A store at one moment."""

    tenants: int
    logical_files: int
    logical_bytes: int
    stored_blobs: int
    stored_bytes: int
    evicted_blobs: int
    evicted_bytes: int
    uploads_pending: int  # up to QUEUE_MAX
    events_held_bytes: int
    partials: int
    partial_bytes: int
    journal_seq: int
    journal_age_seconds: float
    journal_bytes: int
    oldest_reader_commits: int
    dead_readers: int
    free_bytes: int
    free_inodes: int
    clock_doubtful: int
    background_runs: int
    background_silent_seconds: float | None
    background_jobs_failing: int
    runner_up: int
    runner_silent_seconds: float | None
    runner_runs: int | None
    runner_steps: int | None
    runner_oldest_step_seconds: float | None
    runner_late_calls: int | None
    runs: Mapping[str, int]  # by status, those that have not ended
    queues: Mapping[str, Queue]
    targets: Sequence[Mirrored]
    cache: CacheState | None  # None: the background process mirrors to no target


def vitals_of(store: Store) -> Vitals:
    """Look at the store. Frees the reader slots of killed processes by the way."""
    dead_readers = store.catalog.reader_check()
    oldest_reader = store.catalog.oldest_reader_lag()
    with store.catalog.read() as snapshot:
        position = snapshot.position
        now_us = store.now_us(snapshot)
        usages = list(_all(snapshot, Usage))
        partials = [partial.offset_bytes for partial in _all(snapshot, Partial, _PARTIALS_MAX)]
        # One that waits for a right clock has no end yet, and is in an index of its own.
        dated = len(snapshot.range(PendingUpload, "expiry", limit=QUEUE_MAX))
        undated = len(snapshot.range(PendingUpload, "undated", limit=QUEUE_MAX))
        uploads_pending = min(dated + undated, QUEUE_MAX)
        queues = _queues(snapshot, now_us, store.settings.store.grace)
        held = held_bytes(snapshot)
        here, elsewhere = blobs_here(snapshot), blobs_elsewhere(snapshot)
    disk = os.statvfs(store.root)
    background = background_of(store.root, store.clock.now_us())
    silent_us = background.silent_us
    runner = runner_of(store)
    beat = runner.beat if runner.held else None  # what a process that ended had at work is not
    return Vitals(
        tenants=len(usages),
        logical_files=sum(usage.files for usage in usages),
        logical_bytes=sum(usage.size_bytes for usage in usages),
        stored_blobs=here.count,
        stored_bytes=here.size_bytes,
        evicted_blobs=elsewhere.count,
        evicted_bytes=elsewhere.size_bytes,
        uploads_pending=uploads_pending,
        events_held_bytes=held,
        partials=len(partials),
        partial_bytes=sum(partials),
        journal_seq=position.seq,
        journal_age_seconds=max(0, store.clock.now_us() - position.at_us) / SECOND_US,
        journal_bytes=_journal_bytes(store),
        oldest_reader_commits=oldest_reader,
        dead_readers=dead_readers,
        free_bytes=disk.f_bavail * disk.f_frsize,
        free_inodes=disk.f_favail,
        clock_doubtful=int(bool(store.clock_trouble())),
        background_runs=int(background.runs),
        background_silent_seconds=None if silent_us is None else silent_us / SECOND_US,
        background_jobs_failing=len(background.failing),
        runner_up=int(runner.held),
        runner_silent_seconds=None if runner.silent_us is None else runner.silent_us / SECOND_US,
        runner_runs=beat.runs if beat else None,
        runner_steps=beat.steps if beat else None,
        runner_oldest_step_seconds=beat.oldest_step_us / SECOND_US if beat else None,
        runner_late_calls=beat.late if beat else None,
        runs=runner.open,
        queues=queues,
        targets=mirrored_of(store, background),
        cache=background.beat.cache if background.beat else None,
    )


def _journal_bytes(store: Store) -> int:
    with os.scandir(store.root / "catalog" / "journal") as entries:
        return sum(_size(entry) for entry in entries)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # pruned just now
        return 0


# --- queues


def _queues(snapshot: Snapshot, now_us: int, grace_us: int) -> dict[str, Queue]:
    # One only, since each holds a whole definition; how many they are is a total.
    queued = snapshot.range(Run, "queued", limit=1)
    deliveries = snapshot.range(Delivery, "due", limit=QUEUE_MAX)
    failed = failed_deliveries(snapshot, QUEUE_MAX)
    condemned = snapshot.range(Blob, "condemned", before=(now_us - grace_us,), limit=QUEUE_MAX)
    deleting = snapshot.range(Blob, "deleting", limit=QUEUE_MAX)
    missing = snapshot.range(Blob, "missing", limit=QUEUE_MAX)
    uploads = snapshot.range(PendingUpload, "expiry", before=(now_us,), limit=QUEUE_MAX)
    partials = snapshot.range(Partial, "expiry", before=(now_us,), limit=QUEUE_MAX)
    files = snapshot.range(StoredFile, "expiry", before=(now_us,), limit=QUEUE_MAX)
    due: dict[str, list[int | None]] = {
        "deliveries": [delivery.next_attempt_at for delivery in deliveries],
        "deliveries_failed": [delivery.created_at for delivery in failed],
        "blobs_to_collect": [(blob.condemned_at or 0) + grace_us for blob in condemned],
        "blobs_being_removed": [blob.deleting_at for blob in deleting],
        "blobs_missing": [blob.missing_at for blob in missing],
        "uploads_expired": [upload.expires_at for upload in uploads],
        "partials_expired": [
            partial.expires_at for partial in partials if partial.undated_at is None
        ],
        "files_expired": [file.expires_at for file in files if not file.hold],
    }
    queues = {name: _queue(since, now_us) for name, since in due.items()}
    oldest = _queue([run.queued_at for run in queued], now_us)
    count = min(open_runs(snapshot)[QUEUED], QUEUE_MAX)
    queues["runs_queued"] = Queue(count, oldest.oldest_s)
    return queues


def _queue(since: list[int | None], now_us: int) -> Queue:
    oldest_us = min((at for at in since if at is not None), default=now_us)
    return Queue(len(since), max(0, now_us - oldest_us) / SECOND_US)


def _all(snapshot: Snapshot, kind: type[R], most: int | None = None) -> Iterator[R]:
    after: Key = ()
    left = most
    while left is None or left > 0:
        limit = _PAGE if left is None else min(_PAGE, left)
        page = snapshot.range(kind, "", after=after, limit=limit)
        if not page:
            return
        yield from page
        left = None if left is None else left - len(page)
        after = page[-1].primary_key()
