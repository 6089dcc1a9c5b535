"""Slots: the places of an upload, filled and emptied by signed URLs.

PUT    /api/v1/uploads/{token}/files/{index}?filename=&expires=&signature=   raw body
       replaces what is there; with If-None-Match: * only where nothing is
DELETE /api/v1/uploads/{token}/files/{index}?expires=&signature=
"""

from __future__ import annotations

import mimetypes
from typing import final

import falcon

from cas.errors import (
    DigestMismatch,
    InvalidDigest,
    InvalidName,
    InvalidRequest,
    LinkExpired,
    NotFound,
    QuotaExceeded,
    SizeMismatch,
    SlotTaken,
    UploadClosed,
)
from cas.references import check_name
from gateway import forms
from gateway.body import BodyTooSlow, BodyTruncated, body_of, refuse_encodings
from gateway.digests import digest_field, promised_digest
from gateway.door import Door
from gateway.operations import ANY_BYTES, Parameter, Reply, Right, operation
from gateway.uploads import completed_instead


@final
class SlotResource:
    """`/api/v1/uploads/{token}/files/{index}`"""

    def __init__(self, door: Door) -> None:
        self._door = door

    @operation(
        Right.SIGNATURE,
        name="putSlot",
        body=ANY_BYTES,
        parameters=[
            Parameter("filename", "What the file is called."),
            forms.EXPIRES,
            forms.SIGNATURE,
            forms.CONTENT_DIGEST,
            Parameter(
                "If-None-Match", "`*`: only where nothing is, nor on its way.", where="header"
            ),
        ],
        replies={200: Reply("The slot is filled, durably.", forms.SlotForm, forms.REPR_DIGEST)},
        refuses=[
            NotFound,
            LinkExpired,
            UploadClosed,
            SlotTaken,
            InvalidName,
            InvalidDigest,
            InvalidRequest,
            BodyTruncated,
            BodyTooSlow,
            DigestMismatch,
            SizeMismatch,
            QuotaExceeded,
        ],
    )
    def on_put(self, req: falcon.Request, resp: falcon.Response, token: str, index: int) -> None:
        """Fill the slot, or replace what is in it; durable when it is answered."""
        link = self._door.slot(req, token, index)
        refuse_encodings(req.env)
        content_type = forms.media_type(req)
        filename = check_name(req.get_param("filename") or _default_name(index, content_type))
        digest = promised_digest(req)
        body = body_of(req.env)
        try:  # durable on return (invariant 4)
            filled = link.put(
                index,
                body,
                filename=filename,
                content_type=content_type,
                promised_size=body.length_bytes,
                promised_digest=digest,
                # RFC 9110, 13.1.2: of two windows on one upload, none overwrites the other.
                only_free=req.get_header("If-None-Match") == "*",
            )
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        forms.answer(resp, forms.slot(filled))
        if filled.checksum_sha256 is not None:
            resp.set_header("Repr-Digest", digest_field(filled.checksum_sha256))

    @operation(
        Right.SIGNATURE,
        name="emptySlot",
        parameters=[forms.EXPIRES, forms.SIGNATURE],
        replies={204: Reply("The slot is empty.")},
        refuses=[NotFound, LinkExpired, UploadClosed],
    )
    def on_delete(self, req: falcon.Request, resp: falcon.Response, token: str, index: int) -> None:
        """Empty the slot; fine when it is empty already."""
        link = self._door.slot(req, token, index)
        try:
            link.empty(index)
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        resp.status = 204


def _default_name(index: int, content_type: str | None) -> str:
    """For clients that PUT to the URL just as they got it."""
    kind = (content_type or "").partition(";")[0].strip()
    return f"file-{index + 1}{mimetypes.guess_extension(kind) or ''}"
