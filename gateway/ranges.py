"""Conditional and partial requests (RFC 9110, 13 and 14), on values alone.

The entity tag of a blob is its digest, which is as strong as a validator can be.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from cas.digest import Digest
from gateway.errors import RangeNotSatisfiable

_RANGE: Final = re.compile(
    r"bytes=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.ASCII | re.IGNORECASE
)
_TAG: Final = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')


class Span(NamedTuple):
    """The bytes `start` to `stop`, `stop` not included."""

    start: int
    stop: int

    def content_range(self, size_bytes: int) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{size_bytes}"


def entity_tag(digest: Digest) -> str:
    return f'"{digest.hex()}"'


def parse_range(header: str | None, size_bytes: int) -> Span | None:
    """The asked part, or None for all of it; raises RangeNotSatisfiable.

    A server may ignore a Range; it does for other units, for nonsense, and for several
    ranges at once, whose multipart answers cost much and serve few.
    """
    match = _RANGE.fullmatch(header) if header else None
    if match is None:
        return None
    first, last = match[1], match[2]
    if not first and not last:
        return None
    if not first:  # the last N bytes
        start, stop = max(0, size_bytes - int(last)), size_bytes
        if int(last) == 0:
            raise RangeNotSatisfiable(size_bytes)
    else:
        start = int(first)
        stop = min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= size_bytes:
        raise RangeNotSatisfiable(size_bytes)
    return Span(start, stop)


def names_tag(header: str | None, tag: str, *, weakly: bool) -> bool:
    """Whether a list of entity tags (If-Match, If-None-Match) names `tag`.

    `weakly` compares as If-None-Match does; If-Match wants a strong tag.
    """
    if not header:
        return False
    if header.strip() == "*":
        return True
    found = _TAG.findall(header)
    return any(f'"{opaque}"' == tag and (weakly or not weak) for weak, opaque in found)


def range_applies(if_range: str | None, tag: str) -> bool:
    """Whether Range counts under If-Range; dates never match, for there is no Last-Modified."""
    return if_range is None or if_range.strip() == tag
