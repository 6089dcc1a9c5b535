"""Slots: the places of an upload, filled and emptied by signed URLs.

PUT    /api/v1/uploads/{token}/files/{index}?filename=&expires=&signature=   raw body
DELETE /api/v1/uploads/{token}/files/{index}?expires=&signature=
"""

from __future__ import annotations

import mimetypes
from typing import final

import falcon

from cas.errors import UploadClosed
from cas.references import check_name
from cas.store import Store
from gateway import forms
from gateway.body import body_of, refuse_encodings
from gateway.digests import digest_field, promised_digest
from gateway.links import Links
from gateway.uploads import completed_instead


@final
class SlotResource:
    """`/api/v1/uploads/{token}/files/{index}`"""

    def __init__(self, store: Store, links: Links) -> None:
        self._store = store
        self._links = links

    def on_put(self, req: falcon.Request, resp: falcon.Response, token: str, index: int) -> None:
        """Fill the slot, or replace what is in it; durable on return (invariant 4)."""
        link = self._store.upload_link(token, req.context.request_id)
        self._links.check_slot(req, link.upload, index)
        refuse_encodings(req.env)
        content_type = forms.media_type(req)
        filename = check_name(req.get_param("filename") or _default_name(index, content_type))
        digest = promised_digest(req)
        body = body_of(req.env)
        try:
            filled = link.put(
                index,
                body,
                filename=filename,
                content_type=content_type,
                promised_size=body.length_bytes,
                promised_digest=digest,
            )
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        forms.answer(resp, forms.slot(filled))
        if filled.checksum_sha256 is not None:
            resp.set_header("Repr-Digest", digest_field(filled.checksum_sha256))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, token: str, index: int) -> None:
        """Empty the slot; fine when it is empty already."""
        link = self._store.upload_link(token, req.context.request_id)
        self._links.check_slot(req, link.upload, index)
        try:
            link.empty(index)
        except UploadClosed as closed:
            raise completed_instead(link, closed) from None
        resp.status = 204


def _default_name(index: int, content_type: str | None) -> str:
    """For clients that PUT to the URL just as they got it."""
    kind = (content_type or "").partition(";")[0].strip()
    return f"file-{index + 1}{mimetypes.guess_extension(kind) or ''}"
