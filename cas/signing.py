"""URLs that carry their own right: HMAC-SHA256 over what they allow, and until when.

Signed are purpose, method, subject (an upload's token and slot; a file and its name; an
approval, whom it asks and what the link decides), limits and expiry. Not signed are host and
path prefix, so that proxies may rewrite both.
"""

from __future__ import annotations

import hmac
import json
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Final, final

import msgspec

from cas.clock import SECOND_US
from cas.errors import BadSignature, LinkExpired

SLOT: Final = "slot"
DOWNLOAD: Final = "download"
APPROVAL: Final = "approval"


@final
class Claim(msgspec.Struct, frozen=True):
    """What a signed URL allows; `expires` is seconds since 1970 UTC."""

    purpose: str
    method: str
    subject: tuple[str, ...]
    expires: int
    limits: tuple[int, ...] = ()

    def message(self) -> bytes:
        """The signed bytes. JSON quotes its strings, so no two claims share a message."""
        method = "GET" if self.method == "HEAD" else self.method  # a GET admits HEAD
        parts = [self.purpose, method, *self.subject, self.expires, *self.limits]
        return json.dumps(parts).encode()


@final
class Signer:
    """Signs with the last key of a ring ordered oldest to newest; all of them verify."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys:
            raise ValueError("a key ring holds at least one key")
        self._keys = tuple(keys)

    def sign(self, claim: Claim) -> str:
        """The signature as 43 URL-safe characters."""
        return _signature(self._keys[-1], claim)

    def verify(self, claim: Claim, signature: str, now_us: int) -> None:
        """Raise BadSignature, or LinkExpired when only the time is over.

        The signature is checked first, so that a forger learns nothing from the answer.
        """
        good = False
        for key in self._keys:  # all of them, so that time does not tell which one signed
            good |= _equal(_signature(key, claim), signature)
        if not good:
            raise BadSignature
        if claim.expires * SECOND_US <= now_us:
            raise LinkExpired


def _signature(key: bytes, claim: Claim) -> str:
    digest = hmac.digest(key, claim.message(), "sha256")
    return urlsafe_b64encode(digest).rstrip(b"=").decode()


def _equal(ours: str, theirs: str) -> bool:
    """In constant time."""
    return hmac.compare_digest(ours.encode(), theirs.encode("utf-8", "replace"))
