"""Records as JSON: the same names that the HTTP API answers with."""

from __future__ import annotations

from cas.cli.call import JSON
from cas.clock import rfc3339
from cas.records import PendingUpload, StoredFile, UploadFile


def file_form(file: StoredFile) -> JSON:
    """A stored file; times are RFC 3339, digests hex."""
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
        "hold": file.hold,
    }


def upload_form(upload: PendingUpload, url: str | None) -> JSON:
    """An upload; `url` is that of its page, None where the server's address is not known."""
    return {
        "upload_id": upload.upload_id,
        "upload_token": upload.upload_token or None,  # None: who asks may only view
        "upload_url": url,
        "event_name": upload.event_name,
        "name": upload.name,
        "prompt": upload.prompt,
        "status": upload.status,
        "allowed_types": upload.allowed_types,
        "max_size_bytes": upload.max_size_bytes,
        "max_files": upload.max_files,
        "callback_url": upload.callback_url,
        "redirect_url": upload.redirect_url,
        "retention_policy": upload.retention_policy,
        "workflow_run_id": upload.workflow_run_id,
        "tenant_id": upload.tenant_id,
        "created_at": rfc3339(upload.created_at),
        "created_by": upload.created_by,
        "expires_at": rfc3339(upload.expires_at),
        "completed_at": shown_time(upload.completed_at),
    }


def slot_form(slot: UploadFile) -> JSON:
    """A filled slot; its digest has gone to the file once the upload is completed."""
    digest = slot.checksum_sha256
    return {
        "index": slot.file_index,
        "filename": slot.filename,
        "content_type": slot.content_type,
        "size_bytes": slot.size_bytes,
        "checksum_sha256": None if digest is None else digest.hex(),
        "stored_at": rfc3339(slot.stored_at),
        "file_id": slot.file_id,
    }


def shown_time(at_us: int | None) -> str | None:
    return None if at_us is None else rfc3339(at_us)
