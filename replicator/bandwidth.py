"""Bandwidth: how many bytes a second go out, all targets together.

Bytes are spent in the threads that send them, as they are read for sending, so that what is
never sent costs nothing, and no single body runs ahead of the others for long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, final

from replicator.targets import Body

# A piece is paid for before it is sent: the larger, the longer the silence before it, and
# servers end connections that are silent for some tens of seconds.
_PIECE_BYTES_MAX: Final = 256 << 10
_PIECE_S: Final = 0.25


class SendingStopped(Exception):
    """What was being sent is given up: the process ends, or another part of it failed."""


@final
class Bandwidth:
    """A limit that many threads share. `bytes_per_s` 0 is no limit."""

    def __init__(self, bytes_per_s: int, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s = bytes_per_s
        self._now_s = now_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    @property
    def piece_bytes(self) -> int:
        """How many bytes to send, at most, before paying again; 0 is no limit."""
        if not self._bytes_per_s:
            return 0
        return max(1, min(_PIECE_BYTES_MAX, int(self._bytes_per_s * _PIECE_S)))

    def owed_s(self, size_bytes: int) -> float:
        """Take `size_bytes` from what may be sent; returns how long to wait before it."""
        if not self._bytes_per_s:
            return 0.0
        with self._lock:
            now_s = self._now_s()
            # Time in which nothing was sent is not saved up.
            self._free_at_s = max(self._free_at_s, now_s) + size_bytes / self._bytes_per_s
            return self._free_at_s - now_s

    def spend(self, size_bytes: int, stop: threading.Event) -> None:
        """Wait until `size_bytes` more may be sent; raises SendingStopped once `stop` is set."""
        wait_s = self.owed_s(size_bytes)
        if wait_s > 0 and stop.wait(wait_s):
            raise SendingStopped


@final
class Sending:
    """A `Body` that keeps to the bandwidth, and ends in the middle when `stop` is set."""

    def __init__(self, body: Body, bandwidth: Bandwidth, stop: threading.Event) -> None:
        self._body = body
        self._bandwidth = bandwidth
        self._stop = stop

    def read(self, size: int = -1, /) -> bytes:
        if self._stop.is_set():
            raise SendingStopped
        most = self._bandwidth.piece_bytes
        if most and not 0 <= size <= most:
            # A sender that asks for all of it at once gets it, and has waited for it.
            size = size if size < 0 else min(size, most)
        piece = self._body.read(size)
        if most:
            self._bandwidth.spend(len(piece), self._stop)
        return piece

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._body.seek(offset, whence)

    def tell(self) -> int:
        return self._body.tell()
