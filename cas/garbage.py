"""Garbage: bytes that no record needs are removed, never racing a writer (invariant 2).

    live → condemned      the last file that named the bytes went; the grace begins
    condemned → deleting  the grace is over, in a transaction that sees refcount 0 again
    bytes unlinked, folder synced
    record removed

A writer that meets `condemned` revives it by naming it; one that meets `deleting` takes
COLLECT, finishes the removal and brings its bytes. The walk follows the `condemned` index,
so it costs what is due, not what is stored, and holds the writer lock for one batch only.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import final

import msgspec

from cas.blobs import BlobFiles
from cas.catalog import Catalog, Snapshot, Transaction
from cas.digest import Digest
from cas.durable import locked
from cas.records import CONDEMNED, DELETING, Blob

_BATCH = 200  # records a transaction: a few ms of the writer lock
_ACTOR = "collect"


@final
class CollectPlan(msgspec.Struct, frozen=True):
    """What a collection would remove: printable, testable, refusable."""

    digests: list[Digest]
    size_bytes: int
    condemned_before_us: int


@final
class Collected(msgspec.Struct, frozen=True):
    """What a collection removed."""

    blobs: int
    size_bytes: int


@final
class Collector:
    """Removes condemned bytes; one at a time per ROOT, held by the flock COLLECT."""

    def __init__(self, root: Path, catalog: Catalog, blobs: BlobFiles, grace_us: int) -> None:
        self._lock_path = root / "COLLECT"
        self._catalog = catalog
        self._blobs = blobs
        self._grace_us = grace_us

    def plan(self, snapshot: Snapshot, now_us: int, limit: int = 10_000) -> CollectPlan:
        """Up to `limit` blobs whose grace was over at `now_us`, longest condemned first."""
        before = max(now_us - self._grace_us, 0)
        due = snapshot.range(Blob, "deleting", limit=limit)
        due += snapshot.range(Blob, "condemned", before=(before,), limit=limit - len(due))
        return CollectPlan(
            [blob.digest for blob in due], sum(blob.size_bytes for blob in due), before
        )

    def execute(self, plan: CollectPlan) -> Collected:
        """Remove what the plan names and is still due; safe to stop anywhere and to repeat."""
        blobs = size_bytes = 0
        for start in range(0, len(plan.digests), _BATCH):
            digests = plan.digests[start : start + _BATCH]
            # A batch at a time: a writer that meets `deleting` waits for it, not for the plan.
            with self._alone():
                doomed = self._catalog.write(
                    lambda txn, digests=digests: [  # type: ignore[misc]
                        blob
                        for digest in digests
                        if (blob := self._doom(txn, digest, plan.condemned_before_us))
                    ],
                    actor=_ACTOR,
                )
                self._remove([blob.digest for blob in doomed])
                blobs += len(doomed)
                size_bytes += sum(blob.size_bytes for blob in doomed)
        return Collected(blobs, size_bytes)

    def finish(self, digest: Digest) -> None:
        """Finish a removal that somebody else began, for a writer that brings the bytes again."""
        with self._alone():
            with self._catalog.read() as snapshot:
                blob = snapshot.get(Blob, digest)
            if blob is not None and blob.state == DELETING:
                self._remove([digest])

    def doom_orphan(self, digest: Digest, size_bytes: int, inode: int) -> bool:
        """Remove an object that no record names; False when a record came meanwhile.

        It gets a `deleting` record first, so that a writer that is about to adopt it knows.
        """

        def doom(txn: Transaction) -> bool:
            if txn.get(Blob, digest) is not None:
                return False
            txn.insert(
                Blob(
                    digest,
                    size_bytes,
                    b"",
                    inode,
                    txn.now_us,
                    txn.now_us,
                    state=DELETING,
                    deleting_at=txn.now_us,
                )
            )
            return True

        with self._alone():
            doomed = self._catalog.write(doom, actor=_ACTOR)
            if doomed:
                self._remove([digest])
            return doomed

    def _doom(self, txn: Transaction, digest: Digest, before_us: int) -> Blob | None:
        """Condemned long enough and still unreferenced → deleting."""
        blob = txn.get(Blob, digest)
        if blob is None:
            return None
        if blob.state == DELETING:
            return blob
        due = blob.state == CONDEMNED and blob.refcount == 0 and blob.condemned_at is not None
        if not due or (blob.condemned_at or 0) >= before_us:
            return None
        blob = msgspec.structs.replace(
            blob, state=DELETING, condemned_at=None, deleting_at=txn.now_us
        )
        txn.replace(blob)
        return blob

    def _remove(self, digests: list[Digest]) -> None:
        """Bytes, then records. Only under COLLECT, only for what says `deleting`."""
        self._blobs.remove_many(digests)

        def forget(txn: Transaction) -> None:
            for digest in digests:
                blob = txn.get(Blob, digest)
                if blob is not None and blob.state == DELETING:
                    txn.delete(blob)

        self._catalog.write(forget, actor=_ACTOR)

    def _alone(self) -> AbstractContextManager[None]:
        return locked(self._lock_path, os.O_RDWR | os.O_CREAT)
