"""The URLs of requests: what they are answered with, and the checking of what they carry.

Absolute, under `[gateway] public_url` or, where that is empty, under the address the
request came to. `cas.links` says what is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import final

import falcon

from cas import links
from cas.config import GatewaySettings
from cas.errors import BadSignature, LinkExpired
from cas.links import SignedLinks, download_claim, slot_claim
from cas.records import PendingUpload, StoredFile
from cas.signing import SLOT, Claim, Signer


@final
class Links:
    """Makes and checks URLs; see `cas.links.SignedLinks`."""

    def __init__(
        self, signer: Signer, now_us: Callable[[], int], settings: GatewaySettings
    ) -> None:
        self.signed = SignedLinks(signer, now_us, settings)
        self._public_url = settings.public_url
        self.lifetime_s = self.signed.lifetime_s

    def base(self, req: falcon.Request) -> str:
        return self._public_url or req.prefix

    def upload_page(self, req: falcon.Request, token: str) -> str:
        return links.upload_page(self.base(req), token)

    # --- slots of uploads

    def slots(self, req: falcon.Request, upload: PendingUpload) -> list[str]:
        """A URL to PUT for each slot, in order; the client adds `filename`."""
        return self.signed.slots(self.base(req), upload)

    def slot(self, req: falcon.Request, upload: PendingUpload, index: int, method: str) -> str:
        """A URL for one method on one slot."""
        return self.signed.slot(self.base(req), upload, index, method)

    def check_slot(self, req: falcon.Request, upload: PendingUpload, index: int) -> None:
        """Raises BadSignature or LinkExpired unless `req` may use this slot."""
        self._check(req, slot_claim(upload, index, req.method, _expires(req)))

    def check_no_slot(self, req: falcon.Request, token: str, index: int) -> None:
        """Only the work of `check_slot`, where no upload has this token: so a signature that
        is wrong and an upload that is not there take the same time (invariant 9)."""
        with suppress(BadSignature, LinkExpired):
            self._check(req, Claim(SLOT, req.method, (token, str(index)), _expires(req), (0,)))

    # --- downloads

    def download(self, req: falcon.Request, file: StoredFile, lifetime_s: int) -> str:
        """A URL to GET for `lifetime_s` seconds."""
        return self.signed.download(self.base(req), file, lifetime_s)

    def check_download(self, req: falcon.Request, file_id: str, filename: str) -> None:
        """Raises BadSignature or LinkExpired unless `req` may read this file."""
        self._check(req, download_claim(file_id, filename, req.method, _expires(req)))

    def _check(self, req: falcon.Request, claim: Claim) -> None:
        self.signed.check(claim, req.get_param("signature") or "")


def _expires(req: falcon.Request) -> int:
    text = req.get_param("expires") or ""
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise BadSignature
    return int(text)
