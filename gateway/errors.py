"""The one place that speaks HTTP about errors: a row for each class, RFC 9457 answers.

    {"type": "urn:blobcask:CODE", "title": …, "status": …, "code": CODE, "detail": …, facts…}

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
from cas.errors import BlobcaskError
from gateway.body import BodyTooSlow, BodyTruncated

log = logging.getLogger("blobcask.gateway")


class Unauthorized(BlobcaskError):
    """No valid token came with a request that needs one."""


class PermissionMissing(BlobcaskError):
    """The token is good, but lacks `permission`. Raised before anything is looked up."""

    def __init__(self, permission: str) -> None:
        super().__init__(f"the token lacks the permission {permission}")
        self.permission = permission


class BadSignature(BlobcaskError):
    """The URL was not signed here, or not for this: told as if there were nothing."""

    def __init__(self) -> None:
        super().__init__("bad signature")


class LinkExpired(BlobcaskError):
    """The signature is good, its time is over."""

    def __init__(self) -> None:
        super().__init__("the link has expired; ask for a fresh one")


class UploadCompleted(cas.UploadClosed):
    """A second completion: `answer` is what the first one was told."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("completed")
        self.files = answer["files"]
        self.uploaded_at = answer["uploaded_at"]


class RangeNotSatisfiable(BlobcaskError):
    """The asked range lies behind the end of `size_bytes`."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"the range begins behind the end at {size_bytes} bytes")
        self.size_bytes = size_bytes


class PreconditionFailed(BlobcaskError):
    """If-Match names other bytes than these."""

    def __init__(self) -> None:
        super().__init__("the stored bytes are not the ones that If-Match names")


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
    cas.InvalidRequest: _Row(400, "invalid_request", "Invalid request", facts=("reason",)),
    BodyTruncated: _Row(
        400, "body_truncated", "Body incomplete", facts=("received_bytes", "promised_bytes")
    ),
    Unauthorized: _Row(401, "unauthorized", "Token needed"),
    PermissionMissing: _Row(403, "permission_missing", "Permission missing", facts=("permission",)),
    cas.NotFound: _Row(404, "not_found", "Not Found", _NOTHING),
    BadSignature: _Row(404, "not_found", "Not Found", _NOTHING),
    BodyTooSlow: _Row(408, "body_too_slow", "Body too slow", facts=("received_bytes",)),
    cas.Conflict: _Row(
        409, "conflict", "Not possible now", "Something else changed this; try again."
    ),
    cas.UploadClosed: _Row(409, "upload_closed", "Upload closed", facts=("state",)),
    UploadCompleted: _Row(
        409, "upload_closed", "Upload closed", facts=("state", "files", "uploaded_at")
    ),
    cas.Held: _Row(409, "held", "Under a legal hold"),
    LinkExpired: _Row(410, "link_expired", "Link expired"),
    PreconditionFailed: _Row(412, "precondition_failed", "Precondition failed"),
    cas.TooLarge: _Row(413, "too_large", "Too large", facts=("limit_bytes",)),
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
    cas.FilesRefused: _Row(422, "files_refused", "Files refused", facts=("reasons",)),
    cas.BlobUnavailable: _Row(
        503, "blob_unavailable", "Bytes not available", "The bytes are not here now."
    ),
    cas.CatalogError: _Row(503, "catalog_unavailable", "Store not available", _UNAVAILABLE),
    cas.CatalogFailed: _Row(
        503,
        "catalog_failed",
        "Store stopped writing",
        "A sync to the disk failed; what was asked may or may not have been done.",
    ),
    cas.StoreBusy: _Row(503, "store_busy", "Store busy", _UNAVAILABLE),
    NotReady: _Row(503, "not_ready", "Not ready"),
    cas.StoreFull: _Row(
        507,
        "store_full",
        "No space",
        "The store has no room for this; nothing was kept.",
        ("free_bytes", "needed_bytes"),
    ),
    Exception: _Row(500, "internal", "Internal error", "This is a fault of the server."),
}

# Falcon's own refusals (no route, wrong method, broken URL) by status.
_FALCON_CODES: Final = {404: "not_found", 405: "method_not_allowed"}
_RETRY_AFTER_S: Final = "5"


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
    row = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    facts = {name: _fact(getattr(error, name)) for name in row.facts}
    if row.status == 500:
        log.error("fault in %s", request_line(req), exc_info=error)
    elif row.status > 500:
        log.warning("%s: %s", request_line(req), error)
    _write(resp, row.status, row.code, row.title, row.detail or str(error), facts)
    if row.status == 401:
        resp.set_header("WWW-Authenticate", 'Bearer realm="blobcask"')
    elif row.status == 503:
        resp.set_header("Retry-After", _RETRY_AFTER_S)
    if isinstance(error, RangeNotSatisfiable):
        resp.set_header("Content-Range", f"bytes */{error.size_bytes}")


def _answer_falcon(
    _req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, _params: dict[str, Any]
) -> None:
    status = error.status_code
    if error.headers:
        resp.set_headers(error.headers)
    title = HTTPStatus(status).phrase
    detail = _NOTHING if status == 404 else error.description or f"{title}."
    _write(resp, status, _FALCON_CODES.get(status, "invalid_request"), title, detail, {})


def _write(
    resp: falcon.Response, status: int, code: str, title: str, detail: str, facts: dict[str, Any]
) -> None:
    problem = {
        "type": f"urn:blobcask:{code}",
        "title": title,
        "status": status,
        "code": code,
        "detail": detail,
        **facts,
    }
    resp.status = status
    resp.content_type = "application/problem+json"
    resp.stream = None
    resp.data = json.dumps(problem).encode()
    resp.set_header("Cache-Control", "no-store")


def _fact(value: Any) -> Any:
    """A fact as JSON; the refusals of files become objects."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return [
            {"index": index, "filename": filename, "reason": reason}
            for index, filename, reason in value
        ]
    return value


def request_line(req: falcon.Request) -> str:
    """A request for the log: neither tokens nor signatures, which open things."""
    request_id = getattr(req.context, "request_id", "-")
    return f"{req.method} {req.uri_template or '(no route)'} [{request_id}]"


@final
class RequestIds:
    """Middleware: every request has an identifier, the caller's where it gave a fit one."""

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        given = req.get_header("X-Request-Id") or ""
        fits = 0 < len(given) <= 64 and all(c.isalnum() or c in "._-" for c in given)
        req.context.request_id = given if fits and given.isascii() else secrets.token_hex(8)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, _resource: object, _ok: bool
    ) -> None:
        # Falcon refuses some requests before any middleware has seen them.
        resp.set_header("X-Request-Id", getattr(req.context, "request_id", "-"))
