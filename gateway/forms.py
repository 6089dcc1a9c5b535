"""Records as JSON: the names of requirement 1, times as RFC 3339, digests as hex."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import falcon

from cas.clock import rfc3339
from cas.errors import InvalidRequest
from cas.records import PendingUpload, StoredFile, UploadFile
from cas.uploads import Completion, resume_payload

JSON = dict[str, Any]
PAGE_ITEMS: Final = 100
PAGE_ITEMS_MAX: Final = 1000

UNKNOWN_TYPE: Final = "application/octet-stream"
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MEDIA_TYPE: Final = re.compile(
    rf'{_TOKEN}/{_TOKEN}(?:[ \t]*;[ \t]*{_TOKEN}=(?:{_TOKEN}|"[^"\\\x00-\x1f\x7f-\uffff]*"))*',
    re.ASCII,
)
_MEDIA_TYPE_CHARS_MAX: Final = 255
_CURSOR: Final = re.compile(r"[0-9a-f-]{36}", re.ASCII)


def answer(resp: falcon.Response, form: JSON, status: int = 200) -> None:
    """Send a form; nothing of it may be cached, for it is somebody's own."""
    resp.status = status
    resp.content_type = "application/json"
    resp.data = json.dumps(form, ensure_ascii=False).encode()
    resp.set_header("Cache-Control", "no-store")


def stored_file(file: StoredFile) -> JSON:
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
        "expires_at": _time(file.expires_at),
        "hold": file.hold,
    }


def internal(file: StoredFile, store_name: str) -> JSON:
    """The internal form of requirement 1, field for field; the place says what is true."""
    digest = file.checksum_sha256.hex()
    return {
        "storage_type": "local",
        "bucket": store_name,
        "key": f"objects/{digest[:2]}/{digest}",
        "content_type": file.content_type,
        "size_bytes": file.size_bytes,
        "checksum_sha256": digest,
        "original_filename": file.original_filename,
        "created_at": rfc3339(file.created_at),
        "retention_policy": file.retention_policy,
        "workflow_run_id": file.workflow_run_id,
        "tenant_id": file.tenant_id,
    }


def pending_upload(upload: PendingUpload) -> JSON:
    """An upload as the tenant that asked for it sees it."""
    return {
        "upload_id": upload.upload_id,
        "upload_token": upload.upload_token,
        "event_name": upload.event_name,
        "callback_url": upload.callback_url,
        "retention_policy": upload.retention_policy,
        "workflow_run_id": upload.workflow_run_id,
        "created_by": upload.created_by,
        **upload_shown(upload),
    }


def upload_shown(upload: PendingUpload) -> JSON:
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
        "completed_at": _time(upload.completed_at),
    }


def slot(file: UploadFile) -> JSON:
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


def completion(done: Completion) -> JSON:
    """What the workflow resumes with (requirement 1)."""
    return resume_payload(done)


def page_limit(req: falcon.Request) -> int:
    """How many items of a listing are wanted; raises InvalidRequest."""
    return whole_number(req, "limit", PAGE_ITEMS, 1, PAGE_ITEMS_MAX)


def cursor(req: falcon.Request) -> str | None:
    """Where a listing goes on: an identifier that an earlier page ended with."""
    text = req.get_param("cursor")
    if text is None or _CURSOR.fullmatch(text):
        return text
    raise InvalidRequest(text[:64], "cursor: the next_cursor of an earlier page")


def whole_number(req: falcon.Request, name: str, default: int, low: int, high: int) -> int:
    """A number in the query; raises InvalidRequest."""
    text = req.get_param(name)
    if text is None:
        return default
    if text.isascii() and text.isdecimal() and len(text) <= 12 and low <= int(text) <= high:
        return int(text)
    raise InvalidRequest(text, f"{name}: a whole number, {low} to {high}")


def media_type(req: falcon.Request) -> str | None:
    """The content type the sender names, None when it names none or nothing of that form.

    A claim, never a fact: it is kept, and answered under `nosniff` and a sandbox.
    """
    given = (req.content_type or "").strip()
    if len(given) <= _MEDIA_TYPE_CHARS_MAX and _MEDIA_TYPE.fullmatch(given):
        return given
    return None


def _time(at_us: int | None) -> str | None:
    return None if at_us is None else rfc3339(at_us)
