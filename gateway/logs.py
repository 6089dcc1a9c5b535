"""The log: one line on stderr for each request and for whatever went wrong.

    {"at": "2026-02-03T04:05:06.789012Z", "level": "info", "event": "request", "pid": 77,
     "request_id": …, "method": "GET", "route": "/u/{token}", "link": "3fa9c2d1",
     "status": 200, "bytes_in": 0, "bytes_out": 5120, "duration_ms": 3.1, …}

What opens something is never written: neither paths nor queries are, but the route's
template and those of its fields that are no secret. An upload link shows as a keyed hash of
its token, by which its lines can be found together. Whatever text others put into a message
is searched for such things too (`redacted`).

Where the lines go, and that nobody waits for it, is `gateway.lines`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, final

import falcon
from gunicorn.glogging import Logger

from cas.config import LogSettings
from cas.log_forms import form_of
from gateway.lines import Lines
from gateway.route_names import NO_ROUTE, route_name

_REQUEST: Final = "blobcask.request"  # where the WSGI environment holds the Falcon request

_requests = logging.getLogger("blobcask.requests")
_current = threading.local()  # `.req`: the request that this thread answers

# Fields of routes that open nothing by themselves.
_OPEN_FIELDS: Final = ("file_id", "index", "name", "rest")
_SECRETS: Final = (
    (re.compile(r"(/u/|/uploads/)[^/\s\"'?#]+"), r"\1…"),
    (re.compile(r"((?:signature|token|secret|password)=)[^&\s\"']+", re.IGNORECASE), r"\1…"),
    (re.compile(r"(bearer\s+)[^\s\"',]+", re.IGNORECASE), r"\1…"),
    (re.compile(r"(authorization\W+)[^\s\"',]+(\s+[^\s\"',]+)?", re.IGNORECASE), r"\1…"),
    (re.compile(r"eyJ[\w-]{5,}(\.[\w-]+)*"), "…"),
)


def redacted(text: str) -> str:
    """`text` without what opens something: tokens, signatures, bearers.

    Knows them by how they are written, and those of the request at hand by their value.
    """
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for secret in _secrets_at_hand():
        text = text.replace(secret, "…")
    return text


def _secrets_at_hand() -> list[str]:
    req = getattr(_current, "req", None)
    if req is None:
        return []
    found = [
        req.context.get("fields", {}).get("token"),
        req.params.get("signature"),
        req.params.get("token"),  # of an approval's link
        (req.get_header("Authorization") or "").rpartition(" ")[2],
    ]
    return [secret for secret in found if isinstance(secret, str) and len(secret) >= 4]


def about(*, tenant: str, actor: str) -> None:
    """Say for whom this thread's request acts; the log line of the request will tell."""
    req = getattr(_current, "req", None)
    if req is not None:
        req.context.tenant, req.context.actor = tenant, actor


# --- requests


@final
class Observed:
    """Middleware: remembers, for its log line, which request a thread is answering."""

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        req.env[_REQUEST] = _current.req = req

    def process_resource(
        self, req: falcon.Request, _resp: falcon.Response, _resource: object, params: dict[str, Any]
    ) -> None:
        req.context.fields = dict(params)


def put_aside(environ: dict[str, Any]) -> None:
    """This thread does not answer the request now; whoever does begins anew."""
    environ.pop(_REQUEST, None)
    _current.req = None


@final
class Answered:
    """One request that was answered, as far as the server knows; made when it is over."""

    def __init__(self, environ: dict[str, Any], resp: Any, duration_s: float) -> None:
        # Taken out: the request and its environment hold each other, and both the body.
        self.req: falcon.Request | None = environ.pop(_REQUEST, None)
        self.method: str = environ.get("REQUEST_METHOD", "-")
        self.duration_s = duration_s
        self.status: int = getattr(resp, "status_code", None) or 0 if resp is not None else 0
        # gunicorn ends a request that cannot be sent to its end by an exception.
        self.cut_short = sys.exc_info()[0] is not None
        self.bytes_in: int = getattr(environ.get("wsgi.input"), "received_bytes", 0)
        self.bytes_out = 0 if resp is None else self._sent(resp)

    @property
    def told(self) -> bool:
        """Whether the log tells of it anyhow, however often it comes: see `gateway.errors`."""
        return self.req is not None and bool(self.req.context.get("told"))

    @property
    def route(self) -> str:
        """The template of the route; "none" where no route was met."""
        template = self.req.uri_template if self.req else None
        return route_name(template) if template else NO_ROUTE

    def _sent(self, resp: Any) -> int:
        """Body bytes of the answer; gunicorn does not count what sendfile(2) sent."""
        if self.cut_short or self.method == "HEAD" or self.status in (204, 304):
            return int(resp.sent)
        return int(resp.sent or resp.response_length or 0)


@final
class RequestLog:
    """Writes the line of each request that the settings want to see."""

    def __init__(self, settings: LogSettings, secret: bytes) -> None:
        """`secret` is what the hashes of tokens are keyed with."""
        self._wanted = settings.requests
        self._secret = secret[: hashlib.blake2s.MAX_KEY_SIZE]

    def write(self, answered: Answered) -> None:
        """Log one request, and end its being the one at hand."""
        failed = (answered.status >= 500 and not answered.told) or not answered.status
        if self._wanted == "all" or (failed and self._wanted == "errors"):
            level = logging.ERROR if failed else logging.INFO
            _requests.log(level, "request", extra={"facts": self._facts(answered)})
        _current.req = None

    def _facts(self, answered: Answered) -> dict[str, Any]:
        facts: dict[str, Any] = {"method": answered.method, "route": answered.route}
        if answered.req is not None:
            facts |= self._of_request(answered.req)
        facts |= {
            "status": answered.status,
            "bytes_in": answered.bytes_in,
            "bytes_out": answered.bytes_out,
            "duration_ms": round(answered.duration_s * 1000, 2),
        }
        if answered.cut_short:
            facts["cut_short"] = True
        return facts

    def _of_request(self, req: falcon.Request) -> dict[str, Any]:
        context = req.context
        fields: Mapping[str, Any] = context.get("fields") or {}
        facts = {name: fields[name] for name in _OPEN_FIELDS if name in fields}
        if "token" in fields:
            facts["link"] = self._hashed(fields["token"])
        names = ("tenant", "actor", "code")
        facts |= {name: context[name] for name in names if name in context}
        facts["address"] = context.get("address") or req.remote_addr
        return facts

    def _hashed(self, token: str) -> str:
        return hashlib.blake2s(token.encode(), key=self._secret, digest_size=4).hexdigest()


# --- where the lines go


def line_form(name: Literal["json", "text"]) -> logging.Formatter:
    """The form of the server's lines: without secrets, with the request that they are about."""
    return form_of(name, redacted, _request_at_hand)


def _request_at_hand() -> dict[str, Any]:
    req = getattr(_current, "req", None)
    if req is None or "request_id" not in req.context:
        return {}
    return {"request_id": req.context.request_id}


def install(settings: LogSettings) -> Lines:
    """Send all that this process logs to stderr, in the form that the settings want."""
    lines = Lines()
    lines.setFormatter(line_form(settings.format))
    root = logging.getLogger()
    root.handlers[:] = [lines]
    root.setLevel(logging.WARNING)
    logging.getLogger("blobcask").setLevel(logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_error
    return lines


def _log_thread_error(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_value is not None and not isinstance(failed.exc_value, SystemExit):
        name = "?" if failed.thread is None else failed.thread.name
        logging.getLogger("blobcask").error("thread %s ended", name, exc_info=failed.exc_value)


@final
class GunicornLog(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's messages through the same handler; its access log is `RequestLog`'s work."""

    QUIET: ClassVar[int] = logging.WARNING

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.loglevel = self.QUIET
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        self.error_log.setLevel(self.QUIET)
        self._access_log_enabled = False
