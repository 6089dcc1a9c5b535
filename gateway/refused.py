"""What a sender gets whose bytes are no request: a problem like every other, and an end.

The message was never understood, so nothing of it is repeated and nothing on the connection
can be believed any more: whatever follows might be part of it.
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import falcon
from gunicorn.http import errors as gunicorn_errors

# A name or an address, and a port; names of the world come as punycode.
_HOST: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::[0-9]{1,5})?", re.ASCII)
_METHODS: Final = frozenset(falcon.COMBINED_METHODS)


class MethodUnknown(gunicorn_errors.ParseException):  # type: ignore[misc]  # has no types
    """No method of any standard that this server knows."""


class BadHost(gunicorn_errors.ParseException):  # type: ignore[misc]
    """HTTP/1.1 wants one Host (RFC 9112, 3.2), and it becomes part of links."""


class Refusal(NamedTuple):
    """The answer to what is no request."""

    status: HTTPStatus
    code: str
    detail: str

    def whole(self) -> bytes:
        """Head and body of the answer, which ends the connection."""
        problem = {
            "type": f"urn:blobcask:{self.code}",
            "title": self.status.phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        body = json.dumps(problem, separators=(",", ":")).encode()
        head = (
            f"HTTP/1.1 {self.status} {self.status.phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\n\r\n"
        )
        return head.encode() + body


HEAD_TOO_LARGE: Final = Refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large", "The head is too large."
)
INTERNAL: Final = Refusal(
    HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "This is a fault of the server."
)
_INVALID: Final = Refusal(
    HTTPStatus.BAD_REQUEST, "invalid_head", "This cannot be read as one HTTP/1.1 request."
)
_REFUSALS: Final = {
    gunicorn_errors.LimitRequestHeaders: HEAD_TOO_LARGE,
    gunicorn_errors.LimitRequestLine: Refusal(
        HTTPStatus.REQUEST_URI_TOO_LONG, "uri_too_long", "The address is too long."
    ),
    gunicorn_errors.ExpectationFailed: Refusal(
        HTTPStatus.EXPECTATION_FAILED, "expectation_failed", "Only 100-continue can be expected."
    ),
    gunicorn_errors.UnsupportedTransferCoding: Refusal(
        HTTPStatus.NOT_IMPLEMENTED, "coding_unknown", "Transfer-Encoding: only chunked is read."
    ),
    MethodUnknown: Refusal(
        HTTPStatus.NOT_IMPLEMENTED, "method_unknown", "No such method is known here."
    ),
    # Of an answer, not of a request.
    gunicorn_errors.ConfigurationProblem: INTERNAL,
    gunicorn_errors.InvalidResponseHeader: INTERNAL,
    gunicorn_errors.InvalidResponseHeaderName: INTERNAL,
}


def refusal_of(error: BaseException) -> Refusal:
    """The answer to an error outside the app."""
    if isinstance(error, gunicorn_errors.ParseException):
        return _REFUSALS.get(type(error), _INVALID)
    return INTERNAL


def check_head(request: Any) -> None:
    """What gunicorn's parser lets pass; raises MethodUnknown, BadHost, and
    UnsupportedTransferCoding for bytes that would be stored in their coded form."""
    if request.method not in _METHODS:
        raise MethodUnknown
    hosts = [value for name, value in request.headers if name == "HOST"]
    if not all(map(_HOST.fullmatch, hosts)) or not (hosts or request.version < (1, 1)):
        raise BadHost
    codings = [value for name, value in request.headers if name == "TRANSFER-ENCODING"]
    if any(coding.lower() != "chunked" for coding in codings):
        raise gunicorn_errors.UnsupportedTransferCoding("coded")
