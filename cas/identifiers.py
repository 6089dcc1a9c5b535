"""Identifiers of records: UUID version 7 (RFC 9562), so that the newest sort last.

Order by time keeps index pages full and listings in the order of arrival without a
second index. The random part is 74 bits from the kernel.
"""

from __future__ import annotations

import os


def new_id(now_us: int) -> str:
    """A fresh UUIDv7 in its canonical text; `now_us` is catalog time in microseconds."""
    return _text(now_us, int.from_bytes(os.urandom(10), "big"))


def first_id(at_us: int) -> str:
    """The least that `new_id` may make at `at_us`: what sorts before it is older."""
    return _text(at_us, 0)


def _text(at_us: int, random: int) -> str:
    value = (at_us // 1000) & ((1 << 48) - 1)
    value = value << 16 | 0x7000 | random & 0x0FFF
    value = value << 64 | 0b10 << 62 | random >> 12 & ((1 << 62) - 1)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
