"""The name of a blob: its SHA-256, as 32 raw bytes in records, 64 lowercase hex outside.

`Digest` costs nothing at run time (it is `bytes`), yet the type checker keeps unchecked
bytes and text out: a function that takes a `Digest` never checks it again.
"""

from __future__ import annotations

import hashlib
from typing import NewType

from cas.errors import InvalidDigest

Digest = NewType("Digest", bytes)

DIGEST_BYTES = 32
_HEX = frozenset("0123456789abcdef")


def parse_digest(text: str) -> Digest:
    """The digest that 64 lowercase hex characters name; raises InvalidDigest.

    One canonical form only: with upper case allowed, one blob would have many names.
    """
    if len(text) != 2 * DIGEST_BYTES or not _HEX.issuperset(text):
        raise InvalidDigest(text, "not 64 lowercase hex characters")
    return Digest(bytes.fromhex(text))


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """The SHA-256 of bytes in memory."""
    return Digest(hashlib.sha256(data).digest())
