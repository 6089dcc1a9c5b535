"""`Content-Digest` and `Repr-Digest` (RFC 9530): `sha-256=:BASE64:`.

Bodies are stored as they are sent, without content coding, so both fields speak of the
same bytes here.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from typing import Final

import falcon

from cas.digest import DIGEST_BYTES, Digest
from cas.errors import InvalidDigest

# One member of the dictionary: a key and a byte sequence (RFC 8941), parameters ignored.
_MEMBER: Final = re.compile(r"([a-z0-9*_.-]+)=:([A-Za-z0-9+/=]*):(?:;[^,]*)?", re.ASCII)
_SHA256: Final = "sha-256"


def digest_field(digest: Digest) -> str:
    """The value of a digest field for `digest`."""
    return f"{_SHA256}=:{b64encode(digest).decode()}:"


def promised_digest(req: falcon.Request) -> Digest | None:
    """The SHA-256 the sender promises, None when it promises none; raises InvalidDigest.

    Other algorithms are passed over, as the RFC asks; a broken field is not, since a
    sender that wants its bytes checked must not be told "stored" when they were not.
    """
    promised: Digest | None = None
    for name in ("Content-Digest", "Repr-Digest"):
        for member in filter(None, map(str.strip, (req.get_header(name) or "").split(","))):
            match = _MEMBER.fullmatch(member)
            if match is None:
                raise InvalidDigest(member, f"{name}: not ALGORITHM=:BASE64:")
            if match[1] != _SHA256:
                continue
            digest = _decode(match[2], name)
            if promised is not None and promised != digest:
                raise InvalidDigest(member, "Content-Digest and Repr-Digest contradict each other")
            promised = digest
    return promised


def _decode(text: str, name: str) -> Digest:
    try:
        raw = b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != DIGEST_BYTES:
        raise InvalidDigest(text, f"{name}: sha-256 is {DIGEST_BYTES} bytes")
    return Digest(raw)
