"""Completions: the good end of an upload, with the files that its slots became.

An upload is judged by the content of what arrived, and ended in one transaction with its files,
the event for who waits for it, and the callback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, final

import msgspec

from cas.blobs import Measured
from cas.catalog import Snapshot, Transaction
from cas.clock import rfc3339
from cas.content import Content
from cas.deliveries import enqueue
from cas.errors import FilesRefused, NotFound
from cas.events import append_event
from cas.files import Naming
from cas.partials import drop_partials
from cas.records import CALLBACK, COMPLETED, PendingUpload, StoredFile, UploadFile
from cas.references import extension_of
from cas.retention import parse_retention


@final
@dataclass(frozen=True, slots=True)
class Completion:
    """A completed upload and its files, in the order of their slots."""

    upload: PendingUpload
    files: list[StoredFile]
    # As they were called here: the same bytes may be a file already, under another name.
    filenames: list[str]


def judge(
    upload: PendingUpload, slots: list[UploadFile], contents: list[Content], limit_bytes: int
) -> None:
    """Raise FilesRefused with a reason for each slot that is not as asked for, or longer than
    `limit_bytes` (0: no limit); what a slot holds is in `contents`, in the same order."""
    if not slots:
        raise FilesRefused([(0, "", "no file has been uploaded yet")])
    allowed = upload.allowed_types
    reasons: list[tuple[int, str, str]] = []
    for slot, content in zip(slots, contents, strict=True):
        if limit_bytes and slot.size_bytes > limit_bytes:
            reasons.append((slot.file_index, slot.filename, f"larger than {limit_bytes} bytes"))
        elif allowed and not content.is_one_of(allowed):
            reasons.append(
                (
                    slot.file_index,
                    slot.filename,
                    f"is {content.described}, not {' or '.join(allowed)}",
                )
            )
    if reasons:
        raise FilesRefused(reasons)


def finish(
    txn: Transaction,
    upload: PendingUpload,
    slots: list[UploadFile],
    contents: list[Content],
    *,
    actor: str,
    scheme: str,
    keep_us: int,
) -> Completion:
    """End a pending upload well: its slots become files with references of `scheme`, and who
    waits for it hears of them. The event of it is kept for `keep_us`."""
    files: list[StoredFile] = []
    for slot, content in zip(slots, contents, strict=True):
        if slot.checksum_sha256 is None:
            raise NotFound("slot", str(slot.file_index))
        content_type = content.content_type or slot.content_type
        naming = Naming(
            upload.tenant_id,
            upload.workflow_run_id,
            upload.name,
            slot.filename,
            content_type,
            extension_of(slot.filename, content_type),
            parse_retention(upload.retention_policy),
            actor,
            scheme,
        )
        file = naming.record(txn, Measured(slot.checksum_sha256, slot.size_bytes))
        files.append(file)
        # The file counts the bytes from here on: deleting it frees them.
        completed = msgspec.structs.replace(
            slot,
            content_type=content_type,
            checksum_sha256=None,
            file_id=file.file_id,
            received_sha256=slot.checksum_sha256,
        )
        txn.replace(completed)
    drop_partials(txn, upload.upload_id)
    upload = msgspec.structs.replace(
        upload, status=COMPLETED, completed_at=txn.now_us, open_until=None, undated_at=None
    )
    txn.replace(upload)
    done = Completion(upload, files, [slot.filename for slot in slots])
    append_event(
        txn,
        upload.tenant_id,
        upload.event_name,
        resume_payload(done),
        keep_us=keep_us,
    )
    if upload.callback_url is not None:
        message = callback_payload(done)
        enqueue(txn, upload.tenant_id, CALLBACK, upload.upload_id, upload.callback_url, message)
    return done


def completion_of(snapshot: Snapshot, upload: PendingUpload, slots: list[UploadFile]) -> Completion:
    """What a completed upload was completed with; files that were deleted since are left out."""
    found = [
        (file, slot.filename)
        for slot in slots
        if slot.file_id and (file := snapshot.get(StoredFile, slot.file_id))
    ]
    return Completion(upload, [file for file, _ in found], [name for _, name in found])


class ResumedFile(TypedDict):
    """One file of a completed upload, with the names of the requirements."""

    storage_ref: str
    filename: str
    content_type: str
    size_bytes: int
    checksum_sha256: str


class ResumePayload(TypedDict):
    """What the workflow that waits for an upload resumes with."""

    files: list[ResumedFile]
    uploaded_at: str


def resume_payload(done: Completion) -> ResumePayload:
    """What the waiting workflow resumes with, in the form of the requirements."""
    return {
        "files": [
            {
                "storage_ref": file.storage_ref,
                "filename": filename,
                "content_type": file.content_type,
                "size_bytes": file.size_bytes,
                "checksum_sha256": file.checksum_sha256.hex(),
            }
            for file, filename in zip(done.files, done.filenames, strict=True)
        ],
        "uploaded_at": rfc3339(done.upload.completed_at or 0),
    }


def callback_payload(done: Completion) -> dict[str, object]:
    """What the callback says: whose upload it was, and what the workflow resumes with."""
    upload = done.upload
    return {
        "type": "upload.completed",
        "upload_id": upload.upload_id,
        "event_name": upload.event_name,
        "name": upload.name,
        "tenant_id": upload.tenant_id,
        "workflow_run_id": upload.workflow_run_id,
        **resume_payload(done),
    }
