"""Cross-origin requests (CORS): which web applications elsewhere may call the API.

Falcon's own middleware is not used. It lets any header pass that a browser asks for, leaves
out `Vary` (so a cache may hand one origin the answer meant for another), and answers a
preflight only after the request went through the resource.

Nothing is said to an origin that is not named: the browser then refuses by itself. There are
no credentials: what opens things here is a token or a signature, never a cookie.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

import falcon

_METHODS: Final = "GET, HEAD, POST, PUT, PATCH, DELETE"
_REQUEST_HEADERS: Final = ", ".join(
    """Authorization Content-Type Content-Digest Repr-Digest Range If-Match If-None-Match
    If-Range Idempotency-Key Tus-Resumable Upload-Length Upload-Offset Upload-Metadata
    Upload-Checksum X-HTTP-Method-Override X-Request-Id""".split()
)
_EXPOSED: Final = ", ".join(
    """Accept-Ranges Content-Digest Content-Disposition Content-Length Content-Range ETag
    Location Repr-Digest Retry-After Tus-Resumable Tus-Version Tus-Extension Tus-Max-Size
    Tus-Checksum-Algorithm Upload-Offset Upload-Length Upload-Metadata Upload-Expires
    X-Request-Id""".split()
)
_MAX_AGE_S: Final = "7200"  # Chromium keeps a preflight no longer
# The pages are for people and the rest is for operators: no application needs to read them.
_OPEN: Final = ("/api/", "/d/")


@final
class Cors:
    """Middleware; made only where `[gateway] cors_origins` names somebody."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origins)

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer a preflight here: it carries no token, and asks for nothing else."""
        preflight = req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method")
        if preflight and self._admits(req):
            resp.set_header("Access-Control-Allow-Methods", _METHODS)
            resp.set_header("Access-Control-Allow-Headers", _REQUEST_HEADERS)
            resp.set_header("Access-Control-Max-Age", _MAX_AGE_S)
            resp.status = 204
            resp.complete = True

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, _resource: object, _ok: bool
    ) -> None:
        if not req.path.startswith(_OPEN):
            return
        # Always: an answer without the headers must not be kept for those who need them.
        resp.append_header("Vary", "Origin")
        if self._admits(req):
            resp.set_header("Access-Control-Allow-Origin", req.get_header("Origin") or "")
            resp.set_header("Access-Control-Expose-Headers", _EXPOSED)

    def _admits(self, req: falcon.Request) -> bool:
        """By equality and nothing softer: suffixes and patterns admit look-alikes."""
        return req.path.startswith(_OPEN) and req.get_header("Origin") in self._origins
