"""Reading an object back: piece by piece, and as the proof of a copy."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Final

from cas.digest import Digest
from replicator.bandwidth import SendingStopped
from replicator.targets import BytesDiffer, Target, object_key

_READ_BYTES: Final = 1 << 20


def read_pieces(target: Target, key: str, stop: threading.Event | None = None) -> Iterator[bytes]:
    """The bytes of an object; raises ObjectAbsent, TargetUnreachable where it is cut short,
    and SendingStopped once `stop` is set."""
    with target.get(key) as incoming:
        while piece := incoming.read(_READ_BYTES):
            if stop is not None and stop.is_set():
                raise SendingStopped
            yield piece


def read_back(
    target: Target,
    digest: Digest,
    size_bytes: int | None = None,
    stop: threading.Event | None = None,
    rate: Callable[[int], None] | None = None,
) -> None:
    """Read a blob's copy whole and compare it. Blocks.

    `rate` is called with the bytes of each piece. Raises BytesDiffer, ObjectAbsent,
    TargetUnreachable where it broke off, SendingStopped.
    """
    found, got_bytes = hashlib.sha256(), 0
    for piece in read_pieces(target, object_key(digest), stop):
        found.update(piece)
        got_bytes += len(piece)
        if rate is not None:
            rate(len(piece))
    if found.digest() != digest or size_bytes not in (None, got_bytes):
        raise BytesDiffer(
            target.name, f"read back, the {got_bytes} bytes of {digest.hex()} are other ones"
        )
