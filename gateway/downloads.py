"""Bytes to the client: `GET /d/{file_id}/{filename}`, and the answer every download shares.

The body is handed to gunicorn as a file, which it sends with sendfile(2): no byte passes
through Python. With `[gateway] accel_redirect` the answer names the object and the proxy in
front sends it.
"""

from __future__ import annotations

import os
from typing import Final, final
from urllib.parse import quote

import falcon

from cas.digest import Digest
from cas.records import StoredFile
from cas.store import Store
from gateway.digests import digest_field
from gateway.errors import PreconditionFailed
from gateway.links import Links, download_name
from gateway.ranges import Span, entity_tag, names_tag, parse_range, range_applies

# Stored bytes are a stranger's: never rendered on this origin, whatever their type says.
_GUARDS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


@final
class Sender:
    """Answers GET and HEAD with the bytes of a file."""

    def __init__(self, store: Store, accel_redirect: str) -> None:
        self._store = store
        self._accel_redirect = accel_redirect

    def send(self, req: falcon.Request, resp: falcon.Response, file: StoredFile) -> None:
        """Conditions, range, headers, body; raises BlobMissing before anything is sent."""
        digest = file.checksum_sha256
        tag = entity_tag(digest)
        resp.set_headers(_GUARDS)
        resp.set_header("ETag", tag)
        resp.set_header("Accept-Ranges", "bytes")
        resp.set_header("Repr-Digest", digest_field(digest))
        # The bytes behind this address never change, but the right to see them may end.
        resp.set_header("Cache-Control", "private, no-cache")
        if_match = req.get_header("If-Match")
        if if_match and not names_tag(if_match, tag, weakly=False):
            raise PreconditionFailed
        if names_tag(req.get_header("If-None-Match"), tag, weakly=True):
            resp.status = 304
            return
        resp.content_type = file.content_type
        resp.set_header("Content-Disposition", attachment(download_name(file)))
        if self._accel_redirect:
            name = digest.hex()
            resp.set_header("X-Accel-Redirect", f"{self._accel_redirect}{name[:2]}/{name}")
            return
        span = self._span(req, tag, file.size_bytes)
        start, stop = span or (0, file.size_bytes)
        if span:
            resp.status = 206
            resp.set_header("Content-Range", span.content_range(file.size_bytes))
        resp.content_length = stop - start
        if req.method == "GET":
            self._attach(resp, digest, start)

    def _span(self, req: falcon.Request, tag: str, size_bytes: int) -> Span | None:
        if req.method != "GET" or not range_applies(req.get_header("If-Range"), tag):
            return None
        return parse_range(req.get_header("Range"), size_bytes)

    def _attach(self, resp: falcon.Response, digest: Digest, start: int) -> None:
        # gunicorn sends from the descriptor's position, as many bytes as Content-Length says.
        fd = self._store.open_blob(digest)
        os.lseek(fd, start, os.SEEK_SET)
        resp.stream = open(fd, "rb", buffering=0)  # noqa: SIM115  gunicorn closes it


@final
class DownloadResource:
    """`/d/{file_id}/{filename}?expires=&signature=`: the signature is the right."""

    def __init__(self, store: Store, links: Links, sender: Sender) -> None:
        self._store = store
        self._links = links
        self._sender = sender

    def on_get(
        self, req: falcon.Request, resp: falcon.Response, file_id: str, filename: str
    ) -> None:
        self._links.check_download(req, file_id, filename)
        self._sender.send(req, resp, self._store.file_by_id(file_id))

    on_head = on_get


def attachment(filename: str) -> str:
    """Content-Disposition that saves under `filename` (RFC 6266).

    The plain form is for the oldest clients only: what is not safe ASCII becomes `_`.
    """
    plain = "".join(c if c.isascii() and (c.isalnum() or c in " ._-()+") else "_" for c in filename)
    exact = quote(filename, safe="")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"
