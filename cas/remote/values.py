"""JSON of the HTTP API to the records it speaks of. Times come in whole seconds."""

from __future__ import annotations

from typing import Any

from cas.clock import parse_rfc3339
from cas.digest import parse_digest
from cas.records import PendingUpload, StoredFile, UploadFile

JSON = dict[str, Any]


def stored_file(form: JSON) -> StoredFile:
    return StoredFile(
        file_id=form["file_id"],
        tenant_id=form["tenant_id"],
        workflow_run_id=form["workflow_run_id"],
        storage_ref=form["storage_ref"],
        name=form["name"],
        original_filename=form["filename"],
        content_type=form["content_type"],
        size_bytes=form["size_bytes"],
        checksum_sha256=parse_digest(form["checksum_sha256"]),
        retention_policy=form["retention_policy"],
        expires_at=_time(form["expires_at"]),
        created_at=parse_rfc3339(form["created_at"]),
        created_by=form["created_by"],
        hold=form["hold"],
        undated_at=_time(form.get("undated_since")),  # an older server does not tell
    )


def pending_upload(form: JSON) -> PendingUpload:
    return PendingUpload(
        upload_id=form["upload_id"],
        upload_token=form["upload_token"] or "",  # not told to those who may only view
        tenant_id=form["tenant_id"],
        workflow_run_id=form["workflow_run_id"],
        event_name=form["event_name"],
        name=form["name"],
        allowed_types=form["allowed_types"],
        max_size_bytes=form["max_size_bytes"],
        max_files=form["max_files"],
        prompt=form["prompt"],
        status=form["status"],
        retention_policy=form["retention_policy"],
        callback_url=form["callback_url"],
        redirect_url=form["redirect_url"],
        created_at=parse_rfc3339(form["created_at"]),
        created_by=form["created_by"],
        expires_at=parse_rfc3339(form["expires_at"]),
        completed_at=_time(form["completed_at"]),
    )


def upload_file(upload_id: str, form: JSON) -> UploadFile:
    digest = form["checksum_sha256"]
    return UploadFile(
        upload_id=upload_id,
        file_index=form["index"],
        filename=form["filename"],
        content_type=form["content_type"],
        size_bytes=form["size_bytes"],
        checksum_sha256=None if digest is None else parse_digest(digest),
        stored_at=parse_rfc3339(form["stored_at"]),
    )


def _time(text: str | None) -> int | None:
    return None if text is None else parse_rfc3339(text)
