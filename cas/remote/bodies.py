"""What is sent: a source, read once or again, hashed and told about on its way."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, final

from cas.digest import Digest
from cas.durable import SupportsRead
from cas.errors import BlobcaskError, DigestMismatch, SizeMismatch
from cas.hashing import Source

Progress = Callable[[int, int | None], None]  # bytes sent, and bytes in all where known

_CHUNK_BYTES: Final = 256 << 10


class SourceSpent(BlobcaskError):
    """A stream that can be read once was wanted a second time."""

    def __init__(self) -> None:
        super().__init__("the server asked for the bytes again, and this source has none left")


@final
class Outgoing:
    """The bytes of one source. `size_bytes` is None for a stream of unknown length.

    A source that can be sought is `repeatable`; any other can be sent once. Paths are
    opened here and closed by `close`.
    """

    def __init__(self, source: Source, progress: Progress | None = None) -> None:
        self._opened: io.FileIO | None = None
        self._stream: SupportsRead
        if isinstance(source, Path):
            self._stream = self._opened = io.FileIO(source)
        elif isinstance(source, bytes | bytearray | memoryview):
            self._stream = io.BytesIO(source)
        else:
            self._stream = source
        self._progress = progress or (lambda _sent, _all: None)
        self._sha256 = hashlib.sha256()
        self._hashed_bytes = 0
        self._start = 0
        self.repeatable = False
        self.size_bytes: int | None = None
        if isinstance(self._stream, io.IOBase) and self._stream.seekable():
            self.repeatable = True
            self._start = self._stream.tell()
            self.size_bytes = self._stream.seek(0, os.SEEK_END) - self._start
            self._seek(0)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    @property
    def headers(self) -> dict[str, str]:
        """What makes the body one of known length, so that the server can refuse it early."""
        return {} if self.size_bytes is None else {"Content-Length": str(self.size_bytes)}

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to `stop` (None: the end), hashed from the very first on."""
        if self.repeatable:
            if start < self._hashed_bytes:
                self._sha256, self._hashed_bytes = hashlib.sha256(), 0
            self._seek(self._hashed_bytes)
            for _ in self._read(start):  # held there already; the digest needs them all the same
                pass
        elif self._hashed_bytes:
            # An attempt that was refused has read it; what is left would be another file.
            raise SourceSpent
        for chunk in self._read(stop):
            yield chunk
            self._progress(self._hashed_bytes, self.size_bytes)

    def check(self, stored: Digest) -> None:
        """Raise DigestMismatch unless the server stored what was read here."""
        ours = self._sha256.digest()
        if ours != stored:
            raise DigestMismatch(ours.hex(), stored.hex())

    def _read(self, stop: int | None) -> Iterator[bytes]:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while stop is None or self._hashed_bytes < stop:
            rest = _CHUNK_BYTES if stop is None else min(_CHUNK_BYTES, stop - self._hashed_bytes)
            count = self._stream.readinto(buffer[:rest])
            if not count:
                if stop is not None:
                    raise SizeMismatch(stop, self._hashed_bytes)
                return
            chunk = bytes(buffer[:count])
            self._sha256.update(chunk)
            self._hashed_bytes += count
            yield chunk

    def _seek(self, position: int) -> None:
        assert isinstance(self._stream, io.IOBase)
        self._stream.seek(self._start + position)
