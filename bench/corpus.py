"""What is stored: seeded data, the same at every run and on every machine.

Large contents are made of one random MiB that is written again and again, each time with
a stamp at its beginning, so that every content is unique, none compresses, and making a
GiB costs little more than writing it. No part of blobcask looks inside blobs, so nothing
here gains from the repetition.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import final

SEED = 20_251_211
MIB = 1 << 20
KIB = 1 << 10

SMALL_BYTES_MIN = 600
SMALL_BYTES_MAX = 16 * KIB
_STAMP_BYTES = 32


def _block() -> bytes:
    return random.Random(SEED).randbytes(MIB)


def _stamp(number: int, offset: int) -> bytes:
    return f"{number}/{offset}".encode().ljust(_STAMP_BYTES)


def small_files(count: int, seed: int = SEED) -> list[bytes]:
    """`count` contents of 0.6 to 16 KB, all different, sizes spread evenly."""
    rng = random.Random(seed)
    return [rng.randbytes(rng.randint(SMALL_BYTES_MIN, SMALL_BYTES_MAX)) for _ in range(count)]


def content(size_bytes: int, number: int) -> bytes:
    """The unique content `number` of this size, in memory."""
    buffer = bytearray(size_bytes)
    Stream(size_bytes, number).readinto(memoryview(buffer))
    return bytes(buffer)


@final
class Stream:
    """The unique content `number` as a source that is never in memory as a whole."""

    def __init__(self, size_bytes: int, number: int) -> None:
        self._size_bytes = size_bytes
        self._number = number
        self._offset = 0
        self._block = bytearray(_block())

    def readinto(self, buffer: memoryview, /) -> int:
        filled = 0
        while filled < len(buffer) and self._offset < self._size_bytes:
            within = self._offset % MIB
            if within == 0:
                self._block[:_STAMP_BYTES] = _stamp(self._number, self._offset)
            count = min(len(buffer) - filled, MIB - within, self._size_bytes - self._offset)
            buffer[filled : filled + count] = memoryview(self._block)[within : within + count]
            filled += count
            self._offset += count
        return filled


@final
class LargeFile:
    """A file of `size_bytes` whose content can be made another one in place, quickly."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Write it; `size_bytes` is a multiple of a MiB."""
        if size_bytes % MIB:
            raise ValueError(f"{size_bytes} bytes are no whole number of MiB")
        self.path = path
        self.size_bytes = size_bytes
        self.number = 0
        block = _block()
        with path.open("wb") as file:
            for offset in range(0, size_bytes, MIB):
                file.write(_stamp(0, offset) + block[_STAMP_BYTES:])

    def renew(self) -> Path:
        """Make it a content that was never there before: only the stamps are written."""
        self.number += 1
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset in range(0, self.size_bytes, MIB):
                os.pwrite(fd, _stamp(self.number, offset), offset)
        finally:
            os.close(fd)
        return self.path
