"""Resumable uploads by tus 1.0 (tus.io), into the slots of an upload.

    POST          /api/v1/uploads/{token}/tus/                 announce a file
    HEAD PATCH    /api/v1/uploads/{token}/tus/{partial_id}     how far is it; the next piece
    DELETE                                                     give it up
    OPTIONS       either                                       what is offered

The token is the right, as for looking and completing. Offered beside the core: creation
(the length must be known), creation-with-upload, expiration, checksum (SHA-256, SHA-1) and
termination. `Upload-Metadata` may hold `index` (the slot; else the first free one),
`filename` and `filetype`; other keys are passed over.
"""

from __future__ import annotations

import mimetypes
import socket
from base64 import b64decode, b64encode
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, Protocol, final

import falcon

from cas.clock import SECOND_US
from cas.digest import DIGEST_BYTES
from cas.errors import (
    ChecksumMismatch,
    InvalidName,
    InvalidRequest,
    NotFound,
    OffsetMismatch,
    PartialBusy,
    PartialExpired,
    PartialTaken,
    QuotaExceeded,
    SlotsTaken,
    UploadClosed,
)
from cas.partials import Progress
from cas.pieces import SHA1_BYTES
from cas.upload_links import UploadLink
from gateway import forms
from gateway.body import BodyTooSlow, BodyTruncated, body_of, refuse_encodings
from gateway.door import Door
from gateway.errors import MediaTypeUnsupported, TusVersionUnsupported
from gateway.links import Links
from gateway.operations import Parameter, Reply, Right, operation
from gateway.uploads import completed_instead

VERSION: Final = "1.0.0"
EXTENSIONS: Final = "creation,creation-with-upload,expiration,checksum,termination"
# sha1 because the protocol obliges every server to know it: tuspy sends nothing else.
CHECKSUMS: Final = {"sha256": DIGEST_BYTES, "sha1": SHA1_BYTES}
PIECE: Final = "application/offset+octet-stream"
RETRY_AFTER_S: Final = "1"
_NUMBER_DIGITS_MAX: Final = 15  # a petabyte
_IDENTIFIER_CHARS: Final = 36


# What the operations below take, answer and refuse.
_RESUMABLE: Final = Parameter("Tus-Resumable", f"`{VERSION}`", where="header", required=True)
_OFFERED: Final = {
    "Tus-Version": "The versions of the protocol.",
    "Tus-Extension": "What is offered beside the core.",
    "Tus-Max-Size": "The largest file, in bytes.",
}
_REACHED: Final = {
    "Upload-Offset": "The bytes that are durable.",
    "Upload-Expires": "How long it waits for the next piece.",
}
_REFUSES: Final = (NotFound, InvalidRequest, TusVersionUnsupported, UploadClosed)
_PIECE_REFUSES: Final = (
    MediaTypeUnsupported,
    OffsetMismatch,
    PartialTaken,
    ChecksumMismatch,
    BodyTruncated,
    BodyTooSlow,
    PartialBusy,
    PartialExpired,
    QuotaExceeded,
)


class _Body(Protocol):
    def readinto(self, buffer: memoryview, /) -> int: ...


@final
class _Piece:
    """A body whose sender may be cut off, when a later request takes the upload over."""

    def __init__(self, body: _Body, sock: socket.socket | None) -> None:
        self._body = body
        self._sock = sock

    def readinto(self, buffer: memoryview, /) -> int:
        return self._body.readinto(buffer)

    def interrupt(self) -> None:
        """End a pending read with what has come; the answer can still be sent."""
        if self._sock is not None:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)


class _Tus:
    """What both resources share."""

    def __init__(self, door: Door, links: Links) -> None:
        self._door = door
        self._links = links

    @operation(
        Right.LINK,
        name="resumableOptions",
        replies={204: Reply("In the `Tus-*` fields.", None, _OFFERED)},
        refuses=[NotFound],
    )
    def on_options(
        self, req: falcon.Request, resp: falcon.Response, token: str, partial_id: str = ""
    ) -> None:
        """Tell what is offered, and the largest file that this upload takes."""
        limit_bytes = self._door.upload_link(req, token).size_limit_bytes
        resp.status = 204
        resp.set_headers(
            {
                "Tus-Resumable": VERSION,
                "Tus-Version": VERSION,
                "Tus-Extension": EXTENSIONS,
                "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
            }
        )
        if limit_bytes:
            resp.set_header("Tus-Max-Size", str(limit_bytes))

    def _open(self, req: falcon.Request, resp: falcon.Response, token: str) -> UploadLink:
        """The upload, once it is clear that both sides speak the same version."""
        resp.set_header("Tus-Resumable", VERSION)
        resp.set_header("Cache-Control", "no-store")
        if req.get_header("Tus-Resumable") != VERSION:
            resp.set_header("Tus-Version", VERSION)
            raise TusVersionUnsupported(VERSION)
        return self._door.upload_link(req, token)

    def _append(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        link: UploadLink,
        partial_id: str,
        offset: int,
    ) -> Progress:
        """Read the piece in the body; durable on return (invariant 4)."""
        refuse_encodings(req.env)
        digest = _promised(req)
        body = body_of(req.env)
        try:
            return link.append(
                partial_id,
                offset,
                _Piece(body, req.env.get("gunicorn.socket")),
                promised_size=body.length_bytes,
                promised_digest=digest,
            )
        except OffsetMismatch as error:
            resp.set_header("Upload-Offset", str(error.offset_bytes))
            raise
        except PartialBusy:
            resp.set_header("Retry-After", RETRY_AFTER_S)
            raise


@final
class TusResource(_Tus):
    """`/api/v1/uploads/{token}/tus/`"""

    @operation(
        Right.LINK,
        name="beginResumable",
        parameters=[
            _RESUMABLE,
            Parameter("Upload-Length", "Bytes to come.", int, "header", required=True),
            Parameter("Upload-Metadata", "`index`, `filename`, `filetype`.", where="header"),
            Parameter("Upload-Checksum", "Of the first piece.", where="header"),
        ],
        replies={201: Reply("Where it goes on.", None, {"Location": "The partial.", **_REACHED})},
        body=PIECE,
        body_required=False,
        refuses=[*_REFUSES, InvalidName, SlotsTaken, *_PIECE_REFUSES],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Announce a file; with a body, its first piece comes along."""
        link = self._open(req, resp, token)
        for name in ("Upload-Defer-Length", "Upload-Concat"):
            if req.get_header(name) is not None:
                raise InvalidRequest(name, "not offered; send Upload-Length")
        length_bytes = _number(req, "Upload-Length")
        brings_piece = _brings_piece(req)
        metadata = _metadata(req)
        content_type = forms.fit_media_type(metadata.get("filetype", ""))
        try:
            begun = link.begin_partial(
                _index(metadata),
                metadata.get("filename") or _default_name(content_type),
                content_type,
                length_bytes,
            )
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        resp.status = 201
        resp.location = self._links.base(req) + forms.tus_path(token, begun.partial_id)
        _tell_expiry(resp, begun)
        if brings_piece:
            begun = self._append(req, resp, link, begun.partial_id, 0)
            _tell(resp, begun)


@final
class TusPartialResource(_Tus):
    """`/api/v1/uploads/{token}/tus/{partial_id}`"""

    @operation(
        Right.LINK,
        name="resumableOffset",
        parameters=[_RESUMABLE],
        replies={200: Reply("In `Upload-Offset`.", None, _REACHED)},
        refuses=[*_REFUSES, PartialExpired, PartialBusy],
    )
    def on_head(
        self, req: falcon.Request, resp: falcon.Response, token: str, partial_id: str
    ) -> None:
        """Tell how far it is.

        Whoever asks means to go on, so a present sender is cut off first.
        """
        link = self._open(req, resp, token)
        try:
            found = link.partial(_identifier(partial_id))
        except PartialBusy:
            resp.set_header("Retry-After", RETRY_AFTER_S)
            raise
        _tell(resp, found)
        resp.set_header("Upload-Length", str(found.length_bytes))
        resp.set_header("Upload-Metadata", _metadata_of(found))

    @operation(
        Right.LINK,
        name="sendPiece",
        body=PIECE,
        parameters=[
            _RESUMABLE,
            Parameter("Upload-Offset", "Where it begins.", int, "header", required=True),
            Parameter("Upload-Checksum", "`sha256 BASE64` of the piece.", where="header"),
        ],
        replies={204: Reply("The piece is durable.", None, _REACHED)},
        refuses=[*_REFUSES, *_PIECE_REFUSES],
    )
    def on_patch(
        self, req: falcon.Request, resp: falcon.Response, token: str, partial_id: str
    ) -> None:
        """Send the next piece, which must begin where the last one ended."""
        link = self._open(req, resp, token)
        if req.content_type != PIECE:
            raise MediaTypeUnsupported(PIECE)
        offset = _number(req, "Upload-Offset")
        try:
            reached = self._append(req, resp, link, _identifier(partial_id), offset)
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        resp.status = 204
        _tell(resp, reached)

    @operation(
        Right.LINK,
        name="giveUpResumable",
        parameters=[_RESUMABLE],
        replies={204: Reply("It is gone.")},
        refuses=_REFUSES,
    )
    def on_delete(
        self, req: falcon.Request, resp: falcon.Response, token: str, partial_id: str
    ) -> None:
        """Give it up; when it is finished, empty the slot that it filled."""
        link = self._open(req, resp, token)
        try:
            link.drop_partial(_identifier(partial_id))
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        resp.status = 204

    @operation(
        Right.LINK,
        name="overrideMethod",
        parameters=[
            _RESUMABLE,
            Parameter("X-HTTP-Method-Override", "PATCH, DELETE or HEAD.", where="header"),
            Parameter("Upload-Offset", "As for PATCH.", int, "header"),
            Parameter("Upload-Checksum", "As for PATCH.", where="header"),
        ],
        replies={
            200: Reply("As HEAD."),
            204: Reply("As the method that was meant."),
            405: Reply("None was named.", "application/problem+json"),
        },
        refuses=[*_REFUSES, *_PIECE_REFUSES],
    )
    def on_post(
        self, req: falcon.Request, resp: falcon.Response, token: str, partial_id: str
    ) -> None:
        """Do what `X-HTTP-Method-Override` names, for senders without PATCH and DELETE."""
        methods = {"PATCH": self.on_patch, "DELETE": self.on_delete, "HEAD": self.on_head}
        method = methods.get((req.get_header("X-HTTP-Method-Override") or "").upper())
        if method is None:
            raise falcon.HTTPMethodNotAllowed(["HEAD", "PATCH", "DELETE", "OPTIONS"])
        method(req, resp, token, partial_id)


# --- fields of requests


def _number(req: falcon.Request, name: str) -> int:
    """A count of bytes in a field; raises InvalidRequest."""
    text = req.get_header(name) or ""
    if text.isascii() and text.isdecimal() and len(text) <= _NUMBER_DIGITS_MAX:
        return int(text)
    raise InvalidRequest(name, "a number of bytes")


def _brings_piece(req: falcon.Request) -> bool:
    """Whether a creation has a body; raises MediaTypeUnsupported for one of another type."""
    empty = req.content_length in (None, 0) and req.get_header("Transfer-Encoding") is None
    if not empty and req.content_type != PIECE:
        raise MediaTypeUnsupported(PIECE)
    return not empty


def _identifier(text: str) -> str:
    """Raises NotFound for what can be nobody's identifier."""
    if len(text) != _IDENTIFIER_CHARS or not text.isascii():
        raise NotFound("partial", text[:64])
    return text


def _metadata(req: falcon.Request) -> dict[str, str]:
    """`Upload-Metadata`: pairs of a key and base64, separated by commas; raises InvalidRequest."""
    found: dict[str, str] = {}
    for pair in filter(None, map(str.strip, (req.get_header("Upload-Metadata") or "").split(","))):
        key, _, coded = pair.partition(" ")
        try:
            value = b64decode(coded.strip(), validate=True).decode()
        except ValueError:  # of UTF-8 too
            raise InvalidRequest("Upload-Metadata", "not KEY BASE64") from None
        if key in found:
            raise InvalidRequest("Upload-Metadata", f"{key[:64]!r} is given twice")
        found[key] = value
    return found


def _index(metadata: dict[str, str]) -> int | None:
    text = metadata.get("index")
    if text is None:
        return None
    if text.isascii() and text.isdecimal() and len(text) <= 5:
        return int(text)
    raise InvalidRequest("Upload-Metadata", "index is the number of a slot, from 0")


def _default_name(content_type: str | None) -> str:
    kind = (content_type or "").partition(";")[0].strip()
    return f"file{mimetypes.guess_extension(kind) or ''}"


def _promised(req: falcon.Request) -> bytes | None:
    """The digest of the piece by `Upload-Checksum`; raises InvalidRequest."""
    text = req.get_header("Upload-Checksum")
    if text is None:
        return None
    algorithm, _, coded = text.partition(" ")
    if algorithm not in CHECKSUMS:
        raise InvalidRequest("Upload-Checksum", f"one of {', '.join(CHECKSUMS)}")
    try:
        raw = b64decode(coded, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != CHECKSUMS[algorithm]:
        raise InvalidRequest("Upload-Checksum", f"{CHECKSUMS[algorithm]} bytes in base64")
    return raw


# --- fields of answers


def _tell(resp: falcon.Response, progress: Progress) -> None:
    resp.set_header("Upload-Offset", str(progress.offset_bytes))
    _tell_expiry(resp, progress)


def _tell_expiry(resp: falcon.Response, progress: Progress) -> None:
    if progress.expires_at is None:  # finished: it lives as long as its upload
        resp.delete_header("Upload-Expires")
        return
    at = datetime.fromtimestamp(progress.expires_at // SECOND_US, UTC)
    resp.set_header("Upload-Expires", falcon.dt_to_http(at))


def _metadata_of(progress: Progress) -> str:
    values = {
        "index": str(progress.index),
        "filename": progress.filename,
        "filetype": progress.content_type,
    }
    return ",".join(f"{key} {b64encode(text.encode()).decode()}" for key, text in values.items())
