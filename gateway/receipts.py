"""Receipts of completed uploads, and the keys that prove them (see `cas.receipts`).

GET /api/v1/uploads/{token}/receipt     for whoever has the link
GET /api/v1/receipts/keys               for everybody, as JWKS
"""

from __future__ import annotations

import json
from typing import Any, Final, final

import falcon

from cas.errors import NotFound, UploadNotCompleted
from cas.receipts import Receipts
from gateway import forms
from gateway.door import Door
from gateway.downloads import attachment
from gateway.operations import Reply, Right, operation

_KEYS_MAX_AGE_S: Final = 3600


@final
class ReceiptResource:
    """`/api/v1/uploads/{token}/receipt`"""

    def __init__(self, door: Door, receipts: Receipts) -> None:
        self._door = door
        self._receipts = receipts

    @operation(
        Right.LINK,
        name="getReceipt",
        replies={200: Reply("The receipt, signed.", dict[str, Any])},
        refuses=[NotFound, UploadNotCompleted],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Give the receipt of a completed upload.

        A file to keep; the same bytes each time, as long as keys and address stay."""
        link = self._door.upload_link(req, token)
        document = self._receipts.document(link.upload, link.slots())
        forms.answer(resp, document)
        resp.data = json.dumps(document, ensure_ascii=False, indent=2).encode() + b"\n"
        name = f"receipt-{link.upload.upload_id}.json"
        resp.set_header("Content-Disposition", attachment(name))
        resp.set_header("X-Content-Type-Options", "nosniff")


@final
class ReceiptKeysResource:
    """`/api/v1/receipts/keys`"""

    def __init__(self, receipts: Receipts) -> None:
        self._jwks = receipts.jwks()

    @operation(
        Right.NONE,
        name="getReceiptKeys",
        replies={200: Reply("A JWK set (RFC 7517).", dict[str, Any])},
    )
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Give the public keys that prove receipts."""
        forms.answer(resp, self._jwks)
        resp.set_header("Cache-Control", f"public, max-age={_KEYS_MAX_AGE_S}")
