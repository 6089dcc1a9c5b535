"""Bytes to the client: `GET /d/{file_id}/{filename}`, and the answer every download shares.

A small body is read and sent with its head. A larger one is handed to the worker as a file,
which it sends with sendfile(2): no byte passes through Python. With `[gateway]
accel_redirect` the answer names the object and the proxy in front sends it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, final
from urllib.parse import quote

import falcon

from cas.elsewhere import Fetched
from cas.errors import BlobUnavailable, LinkExpired, NotFound
from cas.links import download_name
from cas.records import StoredFile
from gateway import forms
from gateway.digests import digest_field
from gateway.door import Door
from gateway.errors import PreconditionFailed, RangeNotSatisfiable
from gateway.operations import ANY_MEDIA, Parameter, Reply, Right, operation
from gateway.ranges import Span, entity_tag, names_tag, parse_range, range_applies
from gateway.sending import TOGETHER_BYTES_MAX

# Stored bytes are a stranger's: never rendered on this origin, whatever their type says.
_GUARDS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}

_FETCHED_BYTES: Final = 256 << 10  # of what comes from a target, sent at once

# What every download takes, answers and refuses.
CONDITIONS: Final = (
    Parameter("Range", "`bytes=0-99`; one range.", where="header"),
    Parameter("If-Range", "The ETag that the range is of; else all is sent.", where="header"),
    Parameter("If-Match", "The ETag that is wanted, and no other.", where="header"),
    Parameter("If-None-Match", "The ETag of a copy.", where="header"),
)
_SENT_HEADERS: Final = {
    "ETag": "The SHA-256, quoted.",
    "Repr-Digest": "The SHA-256 of the whole (RFC 9530).",
    "Content-Disposition": "The name to save it as; always an attachment.",
}
SENT: Final = {
    200: Reply("The bytes.", ANY_MEDIA, _SENT_HEADERS),
    206: Reply("The bytes of the range.", ANY_MEDIA, _SENT_HEADERS),
    304: Reply("The copy is good."),
}
SENDING_REFUSES: Final = (NotFound, PreconditionFailed, RangeNotSatisfiable, BlobUnavailable)


@final
class Sender:
    """Answers GET and HEAD with the bytes of a file."""

    def __init__(self, door: Door, accel_redirect: str) -> None:
        self._door = door
        self._accel_redirect = accel_redirect

    def send(self, req: falcon.Request, resp: falcon.Response, file: StoredFile) -> None:
        """Conditions, range, headers, body; raises BlobUnavailable before anything is sent."""
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
        # nginx would judge If-Match by an ETag that it has not got, and refuse. What is at a
        # target only it cannot send.
        if self._accel_redirect and not if_match and self._door.named(file):
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
            self._attach(resp, file, start, stop - start)

    def _span(self, req: falcon.Request, tag: str, size_bytes: int) -> Span | None:
        if req.method != "GET" or not range_applies(req.get_header("If-Range"), tag):
            return None
        return parse_range(req.get_header("Range"), size_bytes)

    def _attach(self, resp: falcon.Response, file: StoredFile, start: int, count: int) -> None:
        found = self._door.bytes_of(file)
        if isinstance(found, Fetched):
            _attach_fetched(resp, found, start, count)
            return
        fd = found
        if count <= TOGETHER_BYTES_MAX:
            try:
                resp.data = os.pread(fd, count, start)
            finally:
                os.close(fd)
            return
        # Sent from the descriptor's position, as many bytes as Content-Length says.
        os.lseek(fd, start, os.SEEK_SET)
        resp.stream = open(fd, "rb", buffering=0)  # noqa: SIM115  gunicorn closes it


def _attach_fetched(resp: falcon.Response, fetched: Fetched, start: int, count: int) -> None:
    """Send what comes from a target as it comes. Raises BlobElsewhere while it can still be
    told: from the second piece on an error breaks the answer off, before its last byte."""
    fetched.only(start, start + count)
    try:
        first = fetched.read(_FETCHED_BYTES) if count else b""
        while count <= TOGETHER_BYTES_MAX and len(first) < count:
            first += fetched.read(count - len(first))
    except BaseException:
        fetched.close()
        raise
    if len(first) == count:
        fetched.close()
        resp.data = first
    else:
        resp.stream = _Pieces(first, fetched)


@final
class _Pieces:
    """A body in pieces larger than a server reads from a stream; closed by the server."""

    def __init__(self, first: bytes, fetched: Fetched) -> None:
        self._first = first
        self._fetched = fetched

    def __iter__(self) -> Iterator[bytes]:
        piece, self._first = self._first, b""
        while piece:
            yield piece
            piece = self._fetched.read(_FETCHED_BYTES)

    def close(self) -> None:
        self._fetched.close()


@final
class DownloadResource:
    """`/d/{file_id}/{filename}?expires=&signature=`: the signature is the right."""

    def __init__(self, door: Door, sender: Sender) -> None:
        self._door = door
        self._sender = sender

    @operation(
        Right.SIGNATURE,
        name="download",
        parameters=[forms.EXPIRES, forms.SIGNATURE, *CONDITIONS],
        replies=SENT,
        refuses=[LinkExpired, *SENDING_REFUSES],
    )
    def on_get(
        self, req: falcon.Request, resp: falcon.Response, file_id: str, filename: str
    ) -> None:
        """Download a file by its signed URL."""
        self._sender.send(req, resp, self._door.file(req, file_id, filename))


def attachment(filename: str) -> str:
    """Content-Disposition that saves under `filename` (RFC 6266).

    The plain form is for the oldest clients only: what is not safe ASCII becomes `_`.
    """
    plain = "".join(c if c.isascii() and (c.isalnum() or c in " ._-()+") else "_" for c in filename)
    exact = quote(filename, safe="")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"
