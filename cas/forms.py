"""Records as JSON: the names of the requirements, times as RFC 3339, digests as hex.

One form for the HTTP API and the command line; what only one of them tells is added there.
"""

from __future__ import annotations

from typing import Annotated, TypedDict

import msgspec

from cas.clock import rfc3339
from cas.records import (
    CANCELLED,
    COMPLETED,
    EXPIRED,
    PENDING,
    PendingUpload,
    StoredFile,
    UploadFile,
)

Time = Annotated[
    str, msgspec.Meta(description="RFC 3339, UTC", extra_json_schema={"format": "date-time"})
]
Sha256 = Annotated[
    str, msgspec.Meta(description="SHA-256, lowercase hex", pattern="^[0-9a-f]{64}$")
]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
Status = Annotated[
    str,
    msgspec.Meta(extra_json_schema={"enum": [PENDING, COMPLETED, CANCELLED, EXPIRED]}),
]


class FileForm(TypedDict):
    """A stored file, as its tenant sees it."""

    file_id: str
    storage_ref: str
    name: str
    filename: str | None
    content_type: str
    size_bytes: Bytes
    checksum_sha256: Sha256
    workflow_run_id: str
    tenant_id: str
    retention_policy: str
    created_at: Time
    created_by: str
    expires_at: Time | None
    # Since when its term waits for a clock that can be believed; `expires_at` is null till then.
    undated_since: Time | None
    hold: bool


class ShownUploadForm(TypedDict):
    """An upload as the holder of its link sees it: what is wanted, and how it stands."""

    name: str
    prompt: str
    status: Status
    allowed_types: list[str]
    max_size_bytes: Bytes
    max_files: int
    redirect_url: str | None
    created_at: Time
    expires_at: Time
    completed_at: Time | None


class UploadForm(ShownUploadForm):
    """An upload as the tenant that asked for it sees it. Its token is the right to upload:
    null for those who may only view."""

    upload_id: str
    upload_token: str | None
    event_name: str
    callback_url: str | None
    retention_policy: str
    workflow_run_id: str
    tenant_id: str
    created_by: str


class SlotForm(TypedDict):
    """A filled slot of a pending upload."""

    index: int
    filename: str
    content_type: str
    size_bytes: Bytes
    checksum_sha256: Sha256 | None
    stored_at: Time


def stored_file(file: StoredFile) -> FileForm:
    """A file as its tenant sees it."""
    return {
        "file_id": file.file_id,
        "storage_ref": file.storage_ref,
        "name": file.name,
        "filename": file.original_filename,
        "content_type": file.content_type,
        "size_bytes": file.size_bytes,
        "checksum_sha256": file.checksum_sha256.hex(),
        "workflow_run_id": file.workflow_run_id,
        "tenant_id": file.tenant_id,
        "retention_policy": file.retention_policy,
        "created_at": rfc3339(file.created_at),
        "created_by": file.created_by,
        "expires_at": shown_time(file.expires_at),
        "undated_since": shown_time(file.undated_at),
        "hold": file.hold,
    }


def pending_upload(upload: PendingUpload, *, opening: bool) -> UploadForm:
    """An upload as the tenant that asked for it sees it, with or without what opens it."""
    return {
        "upload_id": upload.upload_id,
        "upload_token": upload.upload_token if opening else None,
        "event_name": upload.event_name,
        "callback_url": upload.callback_url,
        "retention_policy": upload.retention_policy,
        "workflow_run_id": upload.workflow_run_id,
        "tenant_id": upload.tenant_id,
        "created_by": upload.created_by,
        **upload_shown(upload),
    }


def upload_shown(upload: PendingUpload) -> ShownUploadForm:
    """An upload as the holder of its link sees it: what is wanted, and how it stands."""
    return {
        "name": upload.name,
        "prompt": upload.prompt,
        "status": upload.status,
        "allowed_types": upload.allowed_types,
        "max_size_bytes": upload.max_size_bytes,
        "max_files": upload.max_files,
        "redirect_url": upload.redirect_url,
        "created_at": rfc3339(upload.created_at),
        "expires_at": rfc3339(upload.expires_at),
        "completed_at": shown_time(upload.completed_at),
    }


def slot(file: UploadFile) -> SlotForm:
    """A filled slot of a pending upload."""
    digest = file.checksum_sha256
    return {
        "index": file.file_index,
        "filename": file.filename,
        "content_type": file.content_type,
        "size_bytes": file.size_bytes,
        "checksum_sha256": None if digest is None else digest.hex(),
        "stored_at": rfc3339(file.stored_at),
    }


def shown_time(at_us: int | None) -> str | None:
    """RFC 3339; None stays None."""
    return None if at_us is None else rfc3339(at_us)
