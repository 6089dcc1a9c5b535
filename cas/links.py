"""The URLs this store hands out, as values: made for an address, signed, and judged.

What is signed does not depend on the address, so proxies may rewrite host and path prefix.
The gateway makes them for the address a request came to; a workflow, which has none, for
`[gateway] public_url`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final
from urllib.parse import quote, urlencode

from cas.clock import SECOND_US
from cas.config import GatewaySettings
from cas.errors import BadSignature, LinkExpired
from cas.records import Approval, PendingUpload, StoredFile
from cas.signing import APPROVAL, DOWNLOAD, SLOT, Claim, Signer

DOWNLOAD_LIFETIME_S_MAX: Final = 30 * 24 * 3600

# One spelling for each: numbers have no zeros before them.
_APPROVAL_TOKEN: Final = re.compile(
    r"(0|[1-9]\d{0,3})\.([1-9]\d{0,11})\.([A-Za-z0-9_-]{43})", re.ASCII
)


@final
class SignedLinks:
    """Makes URLs under a `base`, an address without a slash at its end, and checks them.

    An expiry is checked when a request begins: what is in flight is never cut off by it.
    """

    def __init__(
        self, signer: Signer, now_us: Callable[[], int], settings: GatewaySettings
    ) -> None:
        self._signer = signer
        self._now_us = now_us  # catalog time, which never goes back (invariant 10)
        self.lifetime_s = max(1, settings.url_expiry // SECOND_US)  # when nobody says otherwise

    # --- slots of uploads

    def slots(self, base: str, upload: PendingUpload) -> list[str]:
        """A URL to PUT for each slot, in order; the client adds `filename`."""
        expires = self._slot_expiry(upload)  # once: reading the time opens a snapshot
        return [
            self._slot(base, upload, index, "PUT", expires) for index in range(upload.max_files)
        ]

    def slot(self, base: str, upload: PendingUpload, index: int, method: str) -> str:
        """A URL for one method on one slot."""
        return self._slot(base, upload, index, method, self._slot_expiry(upload))

    def _slot_expiry(self, upload: PendingUpload) -> int:
        now_s = self._now_us() // SECOND_US
        return min(now_s + self.lifetime_s, upload.expires_at // SECOND_US)

    def _slot(self, base: str, upload: PendingUpload, index: int, method: str, expires: int) -> str:
        claim = slot_claim(upload, index, method, expires)
        query = urlencode({"expires": expires, "signature": self._signer.sign(claim)})
        return f"{base}/api/v1/uploads/{upload.upload_token}/files/{index}?{query}"

    # --- downloads

    def download(self, base: str, file: StoredFile, lifetime_s: int) -> str:
        """A URL to GET for `lifetime_s` seconds."""
        expires = self._now_us() // SECOND_US + lifetime_s
        name = download_name(file)
        claim = download_claim(file.file_id, name, "GET", expires)
        query = urlencode({"expires": expires, "signature": self._signer.sign(claim)})
        return f"{base}/d/{file.file_id}/{quote(name, safe='')}?{query}"

    # --- approvals

    def approval(self, base: str, approval: Approval, addressee: int, decision: str) -> str:
        """The link by which one addressee (its place in the list) decides "approved" or
        "rejected". Made from the record alone, so that it is the same at every call."""
        claim = approval_claim(approval, addressee, decision)
        token = f"{addressee}.{claim.expires}.{self._signer.sign(claim)}"
        query = urlencode({"decision": decision, "token": token})
        return f"{base}/api/v1/approvals/{approval.approval_id}/respond?{query}"

    def check_approval(self, approval_id: str, decision: str, token: str) -> int:
        """Which addressee (its place in the list) the token of such a link is signed for.

        Raises BadSignature. Whether its time is over the record says, which may have been
        dated since (invariant 10).
        """
        match = _APPROVAL_TOKEN.fullmatch(token)
        if match is None:
            raise BadSignature
        addressee, expires, signature = match.groups()
        claim = Claim(APPROVAL, "POST", (approval_id, addressee, decision), int(expires))
        with suppress(LinkExpired):
            self.check(claim, signature)
        return int(addressee)

    # --- checking

    def now_us(self) -> int:
        """Catalog time, as links are judged by it."""
        return self._now_us()

    def check(self, claim: Claim, signature: str) -> None:
        """Raises BadSignature, or LinkExpired where only the time is over."""
        self._signer.verify(claim, signature, self._now_us())


def upload_page(base: str, token: str) -> str:
    """The address of an upload's page."""
    return f"{base}/u/{token}"


def download_name(file: StoredFile) -> str:
    """The filename a download is offered under."""
    if file.original_filename:
        return file.original_filename
    return f"{file.name}.{file.storage_ref.rpartition('.')[2]}"


def slot_claim(upload: PendingUpload, index: int, method: str, expires: int) -> Claim:
    # The limit in force is signed: a URL made under another one is not good any more.
    subject = (upload.upload_token, str(index))
    return Claim(SLOT, method, subject, expires, (upload.max_size_bytes,))


def download_claim(file_id: str, filename: str, method: str, expires: int) -> Claim:
    return Claim(DOWNLOAD, method, (file_id, filename), expires)


def approval_claim(approval: Approval, addressee: int, decision: str) -> Claim:
    """What one link of an approval allows. The whole term is signed, not the moment of the
    signing: a link is made again whenever it is asked for, and must be the same one."""
    subject = (approval.approval_id, str(addressee), decision)
    return Claim(APPROVAL, "POST", subject, -(-approval.expires_at // SECOND_US))
