"""The URLs the gateway hands out, and the checking of those that carry a signature.

Absolute, under `[gateway] public_url` or, where that is empty, under the address the
request came to. What is signed does not depend on either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, final
from urllib.parse import quote, urlencode

import falcon

from cas.clock import SECOND_US
from cas.config import GatewaySettings
from cas.records import PendingUpload, StoredFile
from gateway.errors import BadSignature, LinkExpired
from gateway.signing import DOWNLOAD, SLOT, Claim, Signer

DOWNLOAD_LIFETIME_S_MAX: Final = 30 * 24 * 3600


@final
class Links:
    """Makes and checks URLs.

    An expiry is checked when a request begins: what is in flight is never cut off by it.
    """

    def __init__(
        self, signer: Signer, now_us: Callable[[], int], settings: GatewaySettings
    ) -> None:
        self._signer = signer
        self._now_us = now_us  # catalog time, which never goes back (invariant 10)
        self._public_url = settings.public_url
        self.lifetime_s = max(1, settings.url_expiry // SECOND_US)  # when nobody says otherwise

    def base(self, req: falcon.Request) -> str:
        return self._public_url or req.prefix

    def upload_page(self, req: falcon.Request, token: str) -> str:
        return f"{self.base(req)}/u/{token}"

    # --- slots of uploads

    def slots(self, req: falcon.Request, upload: PendingUpload) -> list[str]:
        """A URL to PUT for each slot, in order; the client adds `filename`."""
        expires = self._slot_expiry(upload)  # once: reading the time opens a snapshot
        slots = range(upload.max_files)
        return [self._slot(req, upload, index, "PUT", expires) for index in slots]

    def slot(self, req: falcon.Request, upload: PendingUpload, index: int, method: str) -> str:
        """A URL for one method on one slot."""
        return self._slot(req, upload, index, method, self._slot_expiry(upload))

    def _slot_expiry(self, upload: PendingUpload) -> int:
        now_s = self._now_us() // SECOND_US
        return min(now_s + self.lifetime_s, upload.expires_at // SECOND_US)

    def _slot(
        self, req: falcon.Request, upload: PendingUpload, index: int, method: str, expires: int
    ) -> str:
        claim = _slot_claim(upload, index, method, expires)
        query = urlencode({"expires": expires, "signature": self._signer.sign(claim)})
        token = upload.upload_token
        return f"{self.base(req)}/api/v1/uploads/{token}/files/{index}?{query}"

    def check_slot(self, req: falcon.Request, upload: PendingUpload, index: int) -> None:
        """Raises BadSignature or LinkExpired unless `req` may use this slot."""
        claim = _slot_claim(upload, index, req.method, _expires(req))
        self._check(req, claim)

    def check_no_slot(self, req: falcon.Request, token: str, index: int) -> None:
        """Only the work of `check_slot`, where no upload has this token: so a signature that
        is wrong and an upload that is not there take the same time (invariant 9)."""
        with suppress(BadSignature, LinkExpired):
            self._check(req, Claim(SLOT, req.method, (token, str(index)), _expires(req), (0,)))

    # --- downloads

    def download(self, req: falcon.Request, file: StoredFile, lifetime_s: int) -> str:
        """A URL to GET for `lifetime_s` seconds."""
        return self.download_under(self.base(req), file, lifetime_s)

    def download_under(self, base: str, file: StoredFile, lifetime_s: int) -> str:
        """The same under a given address, where there is no request."""
        expires = self._now_us() // SECOND_US + lifetime_s
        name = download_name(file)
        claim = _download_claim(file.file_id, name, "GET", expires)
        query = urlencode({"expires": expires, "signature": self._signer.sign(claim)})
        return f"{base}/d/{file.file_id}/{quote(name, safe='')}?{query}"

    def check_download(self, req: falcon.Request, file_id: str, filename: str) -> None:
        """Raises BadSignature or LinkExpired unless `req` may read this file."""
        self._check(req, _download_claim(file_id, filename, req.method, _expires(req)))

    def _check(self, req: falcon.Request, claim: Claim) -> None:
        self._signer.verify(claim, req.get_param("signature") or "", self._now_us())


def download_name(file: StoredFile) -> str:
    """The filename a download is offered under."""
    if file.original_filename:
        return file.original_filename
    return f"{file.name}.{file.storage_ref.rpartition('.')[2]}"


def _slot_claim(upload: PendingUpload, index: int, method: str, expires: int) -> Claim:
    # The limit in force is signed: a URL made under another one is not good any more.
    subject = (upload.upload_token, str(index))
    return Claim(SLOT, method, subject, expires, (upload.max_size_bytes,))


def _download_claim(file_id: str, filename: str, method: str, expires: int) -> Claim:
    return Claim(DOWNLOAD, method, (file_id, filename), expires)


def _expires(req: falcon.Request) -> int:
    text = req.get_param("expires") or ""
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise BadSignature
    return int(text)
