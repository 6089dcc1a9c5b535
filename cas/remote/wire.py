"""Requests to one server: connections, retries with backoff, problems as errors.

A call is repeated when no answer came, or the server says that it is overloaded or away
(408, 423, 429, 502, 503, 504), with jittered exponential backoff from 0.2 s to 10 s, or as long
as `Retry-After` asks. What must not happen twice is repeated only while nothing was sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, final
from urllib.parse import urlsplit

import httpx

from cas import errors
from cas.errors import BlobcaskError, InvalidRequest, ServerUnreachable

T = TypeVar("T")

PATIENCE_S: Final = 60.0
_PAUSE_S_MIN: Final = 0.2
_PAUSE_S_MAX: Final = 10.0
_CONNECT_S: Final = 10.0
# Between two bytes. Longer than the server needs to make a large body durable.
_IDLE_S: Final = 120.0
# 423: the server is still storing what an earlier connection brought.
_AGAIN: Final = frozenset({408, 423, 429, 502, 503, 504})

JSON = dict[str, Any]


@final
class Wire:
    """Sends requests to one server. Safe for threads."""

    def __init__(
        self,
        server: str,
        token: str,
        patience_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest("server", "a URL such as https://files.example.org")
        self.server = server.rstrip("/")
        self._patience_s = patience_s
        self._sleep = sleep
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(_IDLE_S, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            # A redirect would take the token, or the bytes, to another place.
            follow_redirects=False,
        )

    def close(self) -> None:
        self._http.close()

    def url(self, path: str) -> str:
        return f"{self.server}{path}"

    def ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int | None] | None = None,
        form: object = None,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Iterable[bytes]] | None = None,
        repeatable: bool = True,
    ) -> httpx.Response:
        """One request and its whole answer; `body` makes the bytes anew for each attempt.

        Raises the error that a problem stands for, ServerUnreachable when patience is over.
        """

        def attempt() -> httpx.Response:
            content = None if body is None else body()
            return self.once(
                method, path, params=params, form=form, headers=headers, content=content
            )

        return self.persist(attempt, repeatable=repeatable)

    def once(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int | None] | None = None,
        form: object = None,
        headers: Mapping[str, str] | None = None,
        content: Iterable[bytes] | None = None,
        silence_s: float | None = None,
    ) -> httpx.Response:
        """One attempt, for use inside `persist`: raises httpx.TransportError and Overloaded
        too, and the first also when nothing moves for `silence_s` (None: as long as a large
        body may need to be made durable)."""
        answer = self._http.request(
            method,
            self.url(path),
            params=_given(params),
            json=form,
            content=content,
            headers=headers,
            timeout=httpx.USE_CLIENT_DEFAULT if silence_s is None else silence_s,
        )
        raise_problem(answer)
        return answer

    def form(self, method: str, path: str, **how: Any) -> JSON:
        """`ask`, and the JSON object of the answer."""
        return _object(self.ask(method, path, **how))

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """A GET whose body is read as it comes; raises as `ask`, but tries once."""
        with self._http.stream("GET", self.url(path), headers=headers) as answer:
            if answer.status_code >= 400:
                answer.read()
            raise_problem(answer)
            yield answer

    def persist(self, attempt: Callable[[], T], *, repeatable: bool = True) -> T:
        """Run `attempt` until it ends in an answer, or in patience seconds of failures."""
        deadline: float | None = None
        pause_s = _PAUSE_S_MIN
        while True:
            try:
                return attempt()
            except httpx.ConnectError as error:
                reason, wait_s = str(error), 0.0  # nothing was sent
            except Overloaded as error:
                if not (repeatable or error.refused):
                    raise ServerUnreachable(self.server, str(error)) from None
                reason, wait_s = str(error), error.retry_after_s
            except (httpx.LocalProtocolError, httpx.UnsupportedProtocol):
                raise  # a fault of ours, which no other try would mend
            except httpx.TransportError as error:
                reason, wait_s = str(error) or type(error).__name__, 0.0
                if not repeatable:
                    raise ServerUnreachable(self.server, reason) from None
            wait_s = max(wait_s, pause_s * random.uniform(0.5, 1.0))
            # From the first failure: a body that took an hour to send must have its chance too.
            deadline = deadline or time.monotonic() + self._patience_s
            if time.monotonic() + wait_s > deadline:
                raise ServerUnreachable(self.server, reason)
            self._sleep(wait_s)
            pause_s = min(pause_s * 2, _PAUSE_S_MAX)


class Overloaded(BlobcaskError):
    """The server, or what stands before it, asks to come again."""

    def __init__(self, status: int, reason: str, retry_after_s: float) -> None:
        super().__init__(f"{status}: {reason}")
        # It was turned away at the door: nothing of it was done.
        self.refused = status == 429
        self.retry_after_s = retry_after_s


def raise_problem(answer: httpx.Response) -> None:
    """Raise what a refusal stands for; passes every answer below 400."""
    status = answer.status_code
    if status < 300 or status == 304:
        return
    if status < 400:
        elsewhere = answer.headers.get("location", "")
        raise errors.ServerRefused(status, "redirect", f"it redirects to {elsewhere!r}")
    try:
        problem = _object(answer)
    except BlobcaskError:
        problem = {}
    # Where workflows are spoken to, a refusal has the form of requirement 3.
    code = str(problem.get("code", "")).lower()
    detail = str(problem.get("detail", problem.get("message", answer.reason_phrase)))
    if status in _AGAIN and code not in _LASTING:
        wait = answer.headers.get("retry-after", "")
        raise Overloaded(status, detail, float(wait) if wait.isascii() and wait.isdecimal() else 0)
    make = _ERRORS.get(code)
    if make is None:
        raise errors.ServerRefused(status, code or "unknown", detail)
    raise make(problem, detail)


# Answers of 503 and 429 that another try, soon, would not change.
_LASTING: Final = frozenset(
    {
        "blob_unavailable",
        "secret_unavailable",
        "too_many_approvals",
        "too_many_held",
        "too_many_kept",
        "too_many_mails",
        "too_many_runs",
    }
)

_ERRORS: Final[Mapping[str, Callable[[JSON, str], BlobcaskError]]] = {
    "invalid_input": lambda form, text: InvalidRequest("request", text),
    "invalid_digest": lambda form, text: errors.InvalidDigest("digest", text),
    "invalid_reference": lambda form, text: errors.InvalidReference("reference", text),
    "invalid_name": lambda form, text: errors.InvalidName("name", text),
    "invalid_retention": lambda form, text: errors.InvalidRetention("policy", text),
    "invalid_request": lambda form, text: InvalidRequest(
        str(form.get("field", "request")), str(form.get("reason", text))
    ),
    "invalid_workflow": lambda form, text: errors.InvalidWorkflow(form["value"], form["reason"]),
    "operator_unsupported": lambda form, text: errors.OperatorUnsupported(
        form["value"], form["operator"]
    ),
    "unauthorized": lambda form, text: errors.AccessDenied(text),
    "permission_missing": lambda form, text: errors.AccessDenied(text),
    "not_found": lambda form, text: errors.NotFound("such thing", "at this server"),
    "held": lambda form, text: errors.Held(str(form.get("reference", "the file"))),
    "idempotency_key_reused": lambda form, text: errors.KeyReused("of this request"),
    "no_waiting_workflow": lambda form, text: errors.NoWaitingWorkflow(
        str(form.get("event_name", "")), text.partition(": ")[2]
    ),
    "subscription_taken": lambda form, text: errors.SubscriptionTaken("this event", "given"),
    "approval_closed": lambda form, text: errors.ApprovalClosed(
        str(form.get("state", "closed")), form.get("decided_by"), None
    ),
    "approval_key_taken": lambda form, text: errors.ApprovalKeyTaken(
        str(form.get("approval_key", "")), str(form.get("run", ""))
    ),
    "webhook_closed": lambda form, text: errors.WebhookClosed(text),
    "run_ended": lambda form, text: errors.RunEnded(str(form.get("state", "over"))),
    "invalid_setting": lambda form, text: errors.InvalidSetting(
        str(form.get("section", "")), str(form.get("key", "")), "", str(form.get("reason", text))
    ),
    "link_expired": lambda form, text: errors.LinkExpired(),
    "upload_closed": lambda form, text: errors.UploadClosed(str(form.get("state", "closed"))),
    "files_refused": lambda form, text: errors.FilesRefused(
        [(one["index"], one["filename"], one["reason"]) for one in form["reasons"]]
    ),
    "too_large": lambda form, text: errors.TooLarge(int(form["limit_bytes"])),
    "digest_mismatch": lambda form, text: errors.DigestMismatch(form["promised"], form["received"]),
    "size_mismatch": lambda form, text: errors.SizeMismatch(
        form["promised_bytes"], form["received_bytes"]
    ),
    "quota_exceeded": lambda form, text: (
        errors.QuotaExceeded(form["what"], form["limit"], form["used"], form["needed"])
        if "limit" in form
        else errors.LinkQuotaExceeded("space", 0, 0, 0)
    ),
    "too_many_runs": lambda form, text: errors.TooManyRuns(form["limit"], form["open"]),
    "too_many_approvals": lambda form, text: errors.TooManyApprovals(
        form["limit"], form["remembered"]
    ),
    "too_many_mails": lambda form, text: errors.TooManyMails(
        form["limit"], form["waiting"], form["needed"]
    ),
    "too_many_held": lambda form, text: errors.TooManyHeld(form["limit_bytes"], 0, 0),
    "too_many_kept": lambda form, text: errors.TooManyKept(form["limit_bytes"], 0, 0),
    "store_full": lambda form, text: errors.StoreFull(
        form["free_bytes"], form["needed_bytes"], Path("the server")
    ),
    "blob_unavailable": lambda form, text: errors.BlobMissing("of the file", text),
}


def _given(params: Mapping[str, str | int | None] | None) -> dict[str, str | int] | None:
    # None, not {}: given any, httpx throws away the query that the URL came with.
    return {name: value for name, value in (params or {}).items() if value is not None} or None


def _object(answer: httpx.Response) -> JSON:
    try:
        form = answer.json()
    except ValueError:
        form = None
    if not isinstance(form, dict):
        host = str(answer.url.host)
        raise ServerUnreachable(host, f"{answer.status_code}, and no JSON: not a blobcask server?")
    return form
