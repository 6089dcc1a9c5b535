"""The one place that speaks HTTP about errors: a row for each class, RFC 9457 answers.

    {"type": "urn:blobcask:CODE", "title": …, "status": …, "code": CODE, "detail": …, facts…}

Where workflows are spoken to (`WORKFLOW_PATHS`) the same table is told in the form of
requirement 3, with the code in capital letters:

    {"status": "error", "code": CODE, "message": …, facts…}

`code` is stable; programs compare it and nothing else. A row serves all subclasses that
have none of their own. What a row does not list is not told: no paths, no internals, and
nothing that separates the unknown from what belongs to somebody else (invariant 9).

A wrong digest or length is 422, not 400: the message itself was whole and well formed.
Refused files are 422 and not 409, since clients take the 409 of a second completion for
"it is done, and here are the files".
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, NamedTuple, final

import falcon

from cas import errors as cas
from cas.clock import rfc3339
from cas.completions import ResumePayload
from cas.errors import BlobcaskError
from gateway.body import BodyTooSlow, BodyTruncated
from gateway.parking import RESUMED
from gateway.room import NoRoom
from gateway.route_names import route_name

log = logging.getLogger("blobcask.gateway")


class Unauthorized(BlobcaskError):
    """No valid token came with a request that needs one."""


class PermissionMissing(BlobcaskError):
    """The token is good, but lacks `permission`. Raised before anything is looked up."""

    def __init__(self, permission: str) -> None:
        super().__init__(f"the token lacks the permission {permission}")
        self.permission = permission


class UploadCompleted(cas.UploadClosed):
    """A second completion: `answer` is what the first one was told."""

    def __init__(self, answer: ResumePayload) -> None:
        super().__init__("completed")
        self.files = answer["files"]
        self.uploaded_at = answer["uploaded_at"]


class TooManyRequests(BlobcaskError):
    """More `what` (requests, bytes, guesses) than a limit allows; whose limit is not told."""

    def __init__(self, what: str, retry_after_s: int) -> None:
        self.what = what
        self.retry_after_s = max(1, retry_after_s)
        super().__init__(f"too many {what}; try again in {self.retry_after_s} s")


class RangeNotSatisfiable(BlobcaskError):
    """The asked range lies behind the end of `size_bytes`."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"the range begins behind the end at {size_bytes} bytes")
        self.size_bytes = size_bytes


class PreconditionFailed(BlobcaskError):
    """If-Match names other bytes than these."""

    def __init__(self) -> None:
        super().__init__("the stored bytes are not the ones that If-Match names")


class TusVersionUnsupported(BlobcaskError):
    """A tus client speaks another version than ours, or does not say which."""

    def __init__(self, version: str) -> None:
        super().__init__(f"Tus-Resumable: the version here is {version}")


class MediaTypeUnsupported(BlobcaskError):
    """The body is not of the type that this place takes."""

    def __init__(self, wanted: str) -> None:
        super().__init__(f"Content-Type: send {wanted}")


class NotReady(BlobcaskError):
    """The node should get no traffic now; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class _Row(NamedTuple):
    status: int
    code: str
    title: str
    # The error's own text, or one that stands here because the text tells too much.
    detail: str | None = None
    facts: tuple[str, ...] = ()


_NOTHING: Final = "There is nothing here, or nothing for you."
_UNAVAILABLE: Final = "The store cannot serve this now. Nothing was changed; try again later."

TABLE: Final[dict[type[BaseException], _Row]] = {
    cas.InvalidInput: _Row(400, "invalid_input", "Invalid value"),
    cas.InvalidDigest: _Row(400, "invalid_digest", "Invalid digest"),
    cas.InvalidReference: _Row(400, "invalid_reference", "Invalid reference"),
    cas.InvalidName: _Row(400, "invalid_name", "Invalid name", facts=("reason",)),
    cas.InvalidRetention: _Row(400, "invalid_retention", "Invalid retention policy"),
    cas.InvalidRequest: _Row(400, "invalid_request", "Invalid request", facts=("field", "reason")),
    cas.InvalidWorkflow: _Row(
        400, "invalid_workflow", "Invalid workflow", facts=("value", "reason")
    ),
    cas.OperatorUnsupported: _Row(
        400, "operator_unsupported", "Operator not supported", facts=("value", "operator")
    ),
    BodyTruncated: _Row(
        400, "body_truncated", "Body incomplete", facts=("received_bytes", "promised_bytes")
    ),
    Unauthorized: _Row(401, "unauthorized", "Token needed"),
    # Not 409, on which tus clients go on by themselves: two of them would fight for ever.
    cas.PartialTaken: _Row(400, "partial_taken", "Taken over by a later request"),
    PermissionMissing: _Row(403, "permission_missing", "Permission missing", facts=("permission",)),
    cas.NotFound: _Row(404, "not_found", "Not Found", _NOTHING),
    cas.NoWaitingWorkflow: _Row(
        404, "no_waiting_workflow", "No workflow waits", facts=("event_name",)
    ),
    cas.BadSignature: _Row(404, "not_found", "Not Found", _NOTHING),
    BodyTooSlow: _Row(408, "body_too_slow", "Body too slow", facts=("received_bytes",)),
    cas.Conflict: _Row(
        409, "conflict", "Not possible now", "Something else changed this; try again."
    ),
    cas.UploadClosed: _Row(409, "upload_closed", "Upload closed", facts=("state",)),
    UploadCompleted: _Row(
        409, "upload_closed", "Upload closed", facts=("state", "files", "uploaded_at")
    ),
    cas.SubscriptionTaken: _Row(409, "subscription_taken", "Waited for already"),
    cas.ApprovalClosed: _Row(
        409, "approval_closed", "Decided already", facts=("status", "decided_by", "decided_at")
    ),
    cas.ApprovalKeyTaken: _Row(
        409, "approval_key_taken", "Asked already", facts=("approval_key", "run")
    ),
    cas.WebhookClosed: _Row(409, "webhook_closed", "Takes no more"),
    # Of the server's, found out by what is asked for: who runs it is to be told by who asked.
    cas.InvalidSetting: _Row(
        409, "invalid_setting", "Setting missing", facts=("section", "key", "reason")
    ),
    cas.RunEnded: _Row(409, "run_ended", "Ended already", facts=("status",)),
    cas.OffsetMismatch: _Row(409, "offset_mismatch", "Wrong offset", facts=("offset_bytes",)),
    cas.SlotsTaken: _Row(409, "slots_taken", "No free slot", facts=("max_files",)),
    cas.UploadNotCompleted: _Row(
        409, "upload_not_completed", "Upload not completed", facts=("state",)
    ),
    cas.Held: _Row(409, "held", "Under a legal hold"),
    cas.LinkExpired: _Row(410, "link_expired", "Link expired"),
    cas.PartialExpired: _Row(410, "partial_expired", "Resumable upload expired"),
    cas.SlotTaken: _Row(412, "slot_taken", "Slot taken", facts=("index",)),
    PreconditionFailed: _Row(412, "precondition_failed", "Precondition failed"),
    TusVersionUnsupported: _Row(412, "tus_version_unsupported", "Other version of tus"),
    cas.TooLarge: _Row(413, "too_large", "Too large", facts=("limit_bytes",)),
    MediaTypeUnsupported: _Row(415, "unsupported_media_type", "Other media type wanted"),
    RangeNotSatisfiable: _Row(
        416, "range_not_satisfiable", "Range not satisfiable", facts=("size_bytes",)
    ),
    cas.Mismatch: _Row(422, "mismatch", "Other bytes than promised"),
    cas.DigestMismatch: _Row(
        422, "digest_mismatch", "Other bytes than promised", facts=("promised", "received")
    ),
    cas.SizeMismatch: _Row(
        422,
        "size_mismatch",
        "Other length than promised",
        facts=("promised_bytes", "received_bytes"),
    ),
    cas.KeyReused: _Row(422, "idempotency_key_reused", "Idempotency key used before"),
    cas.PartialBusy: _Row(423, "partial_busy", "Busy with another request"),
    cas.ChecksumMismatch: _Row(  # a status of tus's own
        460, "checksum_mismatch", "Other bytes than promised", facts=("promised", "received")
    ),
    cas.FilesRefused: _Row(422, "files_refused", "Files refused", facts=("reasons",)),
    TooManyRequests: _Row(
        429, "too_many_requests", "Too many requests", facts=("what", "retry_after_s")
    ),
    # No Retry-After: nobody knows when one of them ends.
    cas.TooManyRuns: _Row(429, "too_many_runs", "Too many runs", facts=("limit", "open")),
    cas.TooManyApprovals: _Row(
        429, "too_many_approvals", "Too many approvals", facts=("limit", "remembered")
    ),
    cas.TooManyMails: _Row(
        429, "too_many_mails", "Too many mails", facts=("limit", "waiting", "needed")
    ),
    # Without the numbers of the tenant: who posts one kind of event need not know of others.
    cas.TooManyHeld: _Row(
        429,
        "too_many_held",
        "Too many events held",
        "There is no room for another event that nobody waits for yet; nothing was kept.",
        ("limit_bytes",),
    ),
    cas.TooManyKept: _Row(
        429,
        "too_many_kept",
        "Too many events kept",
        "There is no room for another event or wait beside those that are kept; nothing was kept.",
        ("limit_bytes",),
    ),
    cas.SecretSealed: _Row(503, "secret_unavailable", "Secret not available", _UNAVAILABLE),
    cas.TooManyWaiters: _Row(503, "too_many_waiters", "Too many wait"),
    cas.BlobUnavailable: _Row(
        503, "blob_unavailable", "Bytes not available", "The bytes are not here now."
    ),
    cas.BlobElsewhere: _Row(
        503,
        "blob_elsewhere",
        "Bytes at a mirror only",
        "The bytes are at a mirror only, and could not be fetched from there now.",
    ),
    cas.CopyUnconfirmed: _Row(
        503,
        "copy_unconfirmed",
        "Copy not confirmed",
        "Stored here, but the copy at the bucket is not confirmed; to ask again is harmless.",
    ),
    cas.CatalogError: _Row(503, "catalog_unavailable", "Store not available", _UNAVAILABLE),
    cas.CatalogFailed: _Row(
        503,
        "catalog_failed",
        "Store stopped writing",
        "A sync to the disk failed; what was asked may or may not have been done.",
    ),
    cas.StoreBusy: _Row(503, "store_busy", "Store busy", _UNAVAILABLE),
    NoRoom: _Row(503, "server_busy", "Server busy"),
    NotReady: _Row(503, "not_ready", "Not ready"),
    cas.StoreUnready: _Row(503, "not_ready", "Not ready"),
    cas.StoreFull: _Row(
        507,
        "store_full",
        "No space",
        "The store has no room for this; nothing was kept.",
        ("free_bytes", "needed_bytes"),
    ),
    cas.QuotaExceeded: _Row(
        507, "quota_exceeded", "Quota exceeded", facts=("what", "limit", "used", "needed")
    ),
    cas.LinkQuotaExceeded: _Row(
        507,
        "quota_exceeded",
        "Quota exceeded",
        "There is no more room for files of those who asked for them.",
    ),
    Exception: _Row(500, "internal", "Internal error", "This is a fault of the server."),
}

# Below these, refusals have requirement 3's form.
WORKFLOW_PATHS: Final = (
    "/api/v1/events",
    "/api/v1/approvals",
    "/api/v1/webhooks",
    "/api/v1/workflows",
)
# What a fact is called where its own name has a meaning already, in either form.
_FACT_NAMES: Final = {"status": "state"}

# Falcon's own refusals (no route, wrong method, broken URL) by status.
_FALCON_CODES: Final = {404: "not_found", 405: "method_not_allowed"}
_RETRY_AFTER_S: Final = "5"
# What may be set already when the bytes turn out not to be here: it speaks of the file.
_OF_THE_FILE: Final = (
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Length",
    "Content-Range",
    "ETag",
    "Repr-Digest",
)


def problem_schema() -> dict[str, Any]:
    """The JSON Schema of every refusal; facts stand beside these members."""
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["type", "title", "status", "code", "detail"],
        "properties": {
            "type": text,
            "title": text,
            "status": {"type": "integer"},
            "code": text,
            "detail": text,
        },
    }


def refusal_schema() -> dict[str, Any]:
    """The same of a refusal where workflows are spoken to."""
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["status", "code", "message"],
        "properties": {"status": {"const": "error"}, "code": text, "message": text},
    }


def of_workflows(path: str) -> bool:
    """Whether refusals there have requirement 3's form."""
    return any(path == above or path.startswith(f"{above}/") for above in WORKFLOW_PATHS)


def install(app: falcon.App[Any, Any], reopen: Callable[[], None]) -> None:
    """Make every error of the app an answer by this table.

    `reopen` is called when the catalog serves no more until every process has opened it
    anew: after a failed sync, or with a damaged index.
    """

    def answer_and_reopen(
        req: falcon.Request, resp: falcon.Response, error: BaseException, params: dict[str, Any]
    ) -> None:
        _answer(req, resp, error, params)
        reopen()

    app.add_error_handler(Exception, _answer)
    app.add_error_handler((cas.CatalogFailed, cas.IndexDamaged), answer_and_reopen)
    app.add_error_handler(falcon.HTTPError, _answer_falcon)


def _answer(
    req: falcon.Request, resp: falcon.Response, error: BaseException, _params: dict[str, Any]
) -> None:
    row = _row(error)
    req.context.code = row.code
    req.context.told = isinstance(error, NoRoom)  # by the room, of many in one line
    facts = {_FACT_NAMES.get(name, name): _fact(name, getattr(error, name)) for name in row.facts}
    if row.status == 500:
        log.error("fault in %s", request_line(req), exc_info=error)
    elif row.status > 500 and not req.context.told:
        log.warning("%s: %s", request_line(req), error)
    _write(req, resp, row.status, row.code, row.title, row.detail or str(error), facts)
    if row.status == 401:
        resp.set_header("WWW-Authenticate", 'Bearer realm="blobcask"')
    elif row.status == 503:
        resp.set_header("Retry-After", _RETRY_AFTER_S)
    if isinstance(error, TooManyRequests):
        resp.set_header("Retry-After", str(error.retry_after_s))
    if isinstance(error, RangeNotSatisfiable):
        resp.set_header("Content-Range", f"bytes */{error.size_bytes}")


def _answer_falcon(
    req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, _params: dict[str, Any]
) -> None:
    status = error.status_code
    req.context.code = _FALCON_CODES.get(status, "invalid_request")
    if error.headers:
        resp.set_headers(error.headers)
    title = HTTPStatus(status).phrase
    detail = _NOTHING if status == 404 else error.description or f"{title}."
    _write(req, resp, status, req.context.code, title, detail, {})


def _write(
    req: falcon.Request,
    resp: falcon.Response,
    status: int,
    code: str,
    title: str,
    detail: str,
    facts: dict[str, Any],
) -> None:
    form: dict[str, Any]
    if of_workflows(req.path):
        resp.content_type = "application/json"
        form = {"status": "error", "code": code.upper(), "message": detail, **facts}
    else:
        resp.content_type = "application/problem+json"
        form = {
            "type": f"urn:blobcask:{code}",
            "title": title,
            "status": status,
            "code": code,
            "detail": detail,
            **facts,
        }
    for header in _OF_THE_FILE:
        resp.delete_header(header)
    resp.status = status
    resp.stream = None
    resp.data = json.dumps(form, separators=(",", ":")).encode()
    resp.set_header("Cache-Control", "no-store")


def _fact(name: str, value: Any) -> Any:
    """A fact as JSON; times become text, the refusals of files objects."""
    if name.endswith("_at") and isinstance(value, int):
        return rfc3339(value)
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return [
            {"index": index, "filename": filename, "reason": reason}
            for index, filename, reason in value
        ]
    return value


def code_of(error: BaseException) -> str:
    """The stable code of an error."""
    return _row(error).code


def _row(error: BaseException) -> _Row:
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def request_line(req: falcon.Request) -> str:
    """A request for the log: neither tokens nor signatures, which open things."""
    request_id = getattr(req.context, "request_id", "-")
    return f"{req.method} {route_name(req.uri_template or '(no route)')} [{request_id}]"


@final
class RequestIds:
    """Middleware: every request has an identifier, the caller's where it gave a fit one."""

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        if RESUMED in req.env:
            req.context.request_id = req.env[RESUMED].request_id
            return
        given = req.get_header("X-Request-Id") or ""
        fits = 0 < len(given) <= 64 and all(c.isalnum() or c in "._-" for c in given)
        req.context.request_id = given if fits and given.isascii() else secrets.token_hex(8)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, _resource: object, _ok: bool
    ) -> None:
        # Falcon refuses some requests before any middleware has seen them.
        resp.set_header("X-Request-Id", getattr(req.context, "request_id", "-"))
