"""Index keys: tuples packed so that bytes sort as the values do.

    str    02  UTF-8, 00 written as 00 FF                 00
    bytes  01  the bytes, 00 written as 00 FF             00
    int    03  8 bytes, most significant first (0 … 2^64-1)

A prefix of a tuple packs to a prefix of its key, so `range` over a prefix is one run of
the index. LMDB takes keys up to 511 bytes: a component of 128 bytes or more is packed as
its first 96 bytes and its SHA-256, 128 bytes in all, which no shorter one can spell. It
still compares equal to itself only, and sorts by its first 96 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

KEY_BYTES_MAX = 511
_COMPONENT_BYTES_MAX = 127
_COMPONENT_BYTES_KEPT = 96

Value = str | bytes | int


def pack(values: Iterable[Value]) -> bytes:
    """The order-preserving key of a tuple; raises ValueError when it is over 511 bytes."""
    key = b"".join([_component(value) for value in values])
    # Two bytes are the index's own prefix.
    if len(key) > KEY_BYTES_MAX - 2:
        raise ValueError(f"a key of {len(key)} bytes is too long for the index")
    return key


def _component(value: Value) -> bytes:
    if isinstance(value, str):
        code, data = b"\x02", value.encode()
    elif isinstance(value, bytes):
        code, data = b"\x01", value
    else:
        return b"\x03" + value.to_bytes(8, "big")
    if len(data) > _COMPONENT_BYTES_MAX:
        data = data[:_COMPONENT_BYTES_KEPT] + hashlib.sha256(data).digest()
    if b"\x00" in data:
        data = data.replace(b"\x00", b"\x00\xff")
    return code + data + b"\x00"
