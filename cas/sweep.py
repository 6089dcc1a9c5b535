"""The sweep: records whose time is over. Plan, then execute.

It follows the expiry indexes, so its cost grows with what is due, not with what is stored.
Expiry is judged by catalog time, and nothing is swept while the clock is not to be
believed (invariant 10). A hold outlives every expiry.
"""

from __future__ import annotations

from typing import final

import msgspec

from cas.catalog import Catalog, Key, Snapshot, Transaction
from cas.records import EXPIRED, PENDING, PendingUpload, StoredFile
from cas.uploads import close_upload

_BATCH = 500  # records a transaction: a few ms of the writer lock
_ACTOR = "sweep"


@final
class SweepPlan(msgspec.Struct, frozen=True):
    """What a sweep would end, by identifier: printable, testable, refusable."""

    now_us: int
    file_ids: list[str]
    references: list[str]  # of those files, for people
    upload_ids: list[str]


@final
class Swept(msgspec.Struct, frozen=True):
    """What a sweep ended."""

    files: int
    uploads: int


def plan_sweep(snapshot: Snapshot, now_us: int, limit: int = 10_000) -> SweepPlan:
    """Up to `limit` files and uploads each whose time is over at `now_us` (catalog time)."""
    due = (now_us + 1,)
    files = _due_files(snapshot, due, limit)
    uploads = snapshot.range(PendingUpload, "expiry", before=due, limit=limit)
    return SweepPlan(
        now_us,
        [file.file_id for file in files],
        [file.storage_ref for file in files],
        [upload.upload_id for upload in uploads],
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


def execute_sweep(catalog: Catalog, plan: SweepPlan) -> Swept:
    """End what the plan names and is still due; safe to stop anywhere and to repeat."""
    files = uploads = 0
    for start in range(0, len(plan.file_ids), _BATCH):
        chunk = plan.file_ids[start : start + _BATCH]

        def end_files(txn: Transaction, chunk: list[str] = chunk) -> int:
            ended = 0
            for file_id in chunk:
                file = txn.get(StoredFile, file_id)
                if file is None or file.hold or file.expires_at is None:
                    continue
                # Its retention may have been prolonged since the plan was made.
                if file.expires_at <= plan.now_us:
                    txn.delete(file)
                    ended += 1
            return ended

        files += catalog.write(end_files, actor=_ACTOR)
    for upload_id in plan.upload_ids:

        def end_upload(txn: Transaction, upload_id: str = upload_id) -> int:
            upload = txn.get(PendingUpload, upload_id)
            if upload is None or upload.status != PENDING or upload.expires_at > plan.now_us:
                return 0
            close_upload(txn, upload, EXPIRED)
            return 1

        # One a transaction: an upload may have a thousand slots to let go of.
        uploads += catalog.write(end_upload, actor=_ACTOR)
    return Swept(files, uploads)
