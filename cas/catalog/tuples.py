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
    key = b"".join([component(value) for value in values])
    # Two bytes are the index's own prefix.
    if len(key) > KEY_BYTES_MAX - 2:
        raise ValueError(f"a key of {len(key)} bytes is too long for the index")
    return key


def component(value: Value | None) -> bytes:
    """One value of a tuple, packed; nothing for None."""
    if type(value) is str:
        try:
            code, data = 2, value.encode()
        except UnicodeEncodeError:  # half a surrogate pair: no record has it, but one may ask
            code, data = 2, value.encode(errors="surrogatepass")
    elif type(value) is int:
        return b"\x03" + value.to_bytes(8, "big")
    elif type(value) is bytes:
        code, data = 1, value
    elif value is None:
        return b""
    else:
        raise TypeError(f"no key can hold a {type(value).__name__}")
    if len(data) > _COMPONENT_BYTES_MAX:
        data = data[:_COMPONENT_BYTES_KEPT] + hashlib.sha256(data).digest()
    if 0 in data:  # ten times as fast as `b"\x00" in data`, and most of this function's time
        data = data.replace(b"\x00", b"\x00\xff")
    return b"%c%b\x00" % (code, data)


def unpack(key: bytes) -> list[Value]:
    """The values of a packed tuple; one that was too long comes back as what stands for it."""
    values: list[Value] = []
    at = 0
    while at < len(key):
        if key[at] == 3:
            values.append(int.from_bytes(key[at + 1 : at + 9], "big"))
            at += 9
            continue
        end = key.index(0, at + 1)
        while key[end + 1 : end + 2] == b"\xff":
            end = key.index(0, end + 1)
        data = key[at + 1 : end].replace(b"\x00\xff", b"\x00")
        values.append(data.decode(errors="replace") if key[at] == 2 else data)
        at = end + 1
    return values
