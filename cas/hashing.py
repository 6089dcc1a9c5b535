"""Reading a source once, to its end, while its bytes are hashed.

What is hashed is what the sink was given: the same memory, never a second reading of the
source, which may have changed in between.

SHA-256 costs most of the time of storing a large blob. It runs in a thread of its own, in
a lane: a small ring of reused buffers, so that one core hashes while the other reads,
writes and computes BLAKE3 (hashing, reading and writing all let other threads run). The
lanes of a process are few and fixed, so memory does not grow with the number of uploads:
who finds none free goes on with one small buffer in its own thread, as small sources
always do.

Measured on two cores, 1 GiB, against a ring in which the kernel copies (copy_file_range)
and both threads read back what was written: that one was 8-10 % slower at its best (the
medians were too noisy to tell), since two readings of the copy cost more than the one they
save, and it would serve files only.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, final

from blake3 import blake3

from cas.digest import Digest
from cas.durable import SupportsRead

Source = bytes | bytearray | memoryview | Path | SupportsRead
Sink = Callable[[memoryview], None]

SMALL_BYTES = 1 << 20  # up to here a thread costs more than it saves
_BUFFER_BYTES = 128 << 10  # of a source without a lane; 200 at once are 25 MiB
_LANE_BUFFER_BYTES = 1 << 20  # larger ones leave the cache, smaller ones cost more switching
_LANE_BUFFERS = 4
LANES_MAX = 4  # 16 MiB of buffers in the process, however many uploads there are
_STRETCH_S = 4.0  # how long a lane is kept before others may have it
_SLOW_BYTES_PER_S = 32 << 20  # a slower source leaves the hash idle, so a lane gains nothing


class Reader(Protocol):
    """A source being read: chunks of it, at most `buffer` long; an empty one is the end."""

    def chunk(self, buffer: memoryview) -> memoryview: ...


@final
class _Stream:
    def __init__(self, stream: SupportsRead) -> None:
        self._stream = stream

    def chunk(self, buffer: memoryview) -> memoryview:
        filled = 0
        while filled < len(buffer):
            count = self._stream.readinto(buffer[filled:])
            if count is None:
                raise BlockingIOError("a source must block until it has bytes")
            if count == 0:
                break
            filled += count
        return buffer[:filled]


@final
class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def chunk(self, buffer: memoryview) -> memoryview:
        filled = 0
        while filled < len(buffer):
            count = os.readv(self._fd, [buffer[filled:]])
            if count == 0:
                break
            filled += count
        return buffer[:filled]


@final
class _Memory:
    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def chunk(self, buffer: memoryview) -> memoryview:
        chunk = self._rest[: len(buffer)]
        self._rest = self._rest[len(buffer) :]
        return chunk


@final
class _Mutable:
    """Memory that its owner may change meanwhile: copied before it is hashed and written."""

    def __init__(self, data: bytearray | memoryview) -> None:
        self._rest = memoryview(data).cast("B")

    def chunk(self, buffer: memoryview) -> memoryview:
        chunk = self._rest[: len(buffer)]
        self._rest = self._rest[len(chunk) :]
        buffer[: len(chunk)] = chunk
        return buffer[: len(chunk)]


@contextmanager
def reading(source: Source) -> Iterator[tuple[Reader, int]]:
    """A reader of `source`, and how many bytes it seems to hold (0 is unknown).

    A stream is read from where it stands and left open. A path may be any file that can
    be read: one that grows, one of /proc that says it is empty, a pipe.
    """
    if isinstance(source, bytes):
        yield _Memory(source), len(source)
    elif isinstance(source, bytearray | memoryview):
        yield _Mutable(source), memoryview(source).nbytes
    elif isinstance(source, Path):
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(fd).st_size
            if size_bytes > SMALL_BYTES:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield _Descriptor(fd), size_bytes
        finally:
            os.close(fd)
    else:
        yield _Stream(source), 0


@final
class Hashing:
    """SHA-256 and BLAKE3 of one source; see the module. `lanes` counts the free lanes."""

    def __init__(self, lanes: threading.BoundedSemaphore) -> None:
        self._lanes = lanes
        self._sha256 = hashlib.sha256()
        self._blake3 = blake3()

    @property
    def digest(self) -> Digest:
        return Digest(self._sha256.digest())

    @property
    def blake3(self) -> bytes:
        return self._blake3.digest()

    def drain(self, reader: Reader, size_bytes: int, sink: Sink) -> None:
        """Read to the end, giving each chunk to `sink` and to both hashes.

        `size_bytes` is what the source seems to hold. Whatever reader or sink raise comes
        through, and no thread is left behind. Memory is constant.
        """
        if not size_bytes:
            # Many small sources do not announce themselves: begin small and see.
            began = time.monotonic()
            if self._straight(reader, sink, SMALL_BYTES):
                return
            fast = time.monotonic() - began < SMALL_BYTES / _SLOW_BYTES_PER_S
        elif size_bytes <= SMALL_BYTES:
            self._straight(reader, sink)
            return
        else:
            fast = True
        ended = False
        while not ended:
            if fast and self._lanes.acquire(blocking=False):
                try:
                    ended, fast = self._lane(reader, sink)
                finally:
                    self._lanes.release()
            else:
                began = time.monotonic()
                ended = self._straight(reader, sink, 16 * SMALL_BYTES)
                fast = time.monotonic() - began < 16 * SMALL_BYTES / _SLOW_BYTES_PER_S

    def _straight(self, reader: Reader, sink: Sink, limit_bytes: int = 0) -> bool:
        """One buffer, no thread, up to `limit_bytes` (0: all). True when the source ended."""
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        done = 0
        while not limit_bytes or done < limit_bytes:
            chunk = reader.chunk(buffer)
            if not chunk:
                return True
            self._sha256.update(chunk)
            self._blake3.update(chunk)
            sink(chunk)
            done += len(chunk)
        return False

    def _lane(self, reader: Reader, sink: Sink) -> tuple[bool, bool]:
        """A ring and a second thread, for one stretch of time: (source ended, was fast)."""
        # Memory of its own mapping goes back to the system when the ring does.
        ring = memoryview(mmap.mmap(-1, _LANE_BUFFERS * _LANE_BUFFER_BYTES))
        empty: SimpleQueue[memoryview] = SimpleQueue()
        filled: SimpleQueue[tuple[memoryview, memoryview] | None] = SimpleQueue()
        for start in range(0, len(ring), _LANE_BUFFER_BYTES):
            empty.put(ring[start : start + _LANE_BUFFER_BYTES])

        def hash_filled() -> None:
            while (item := filled.get()) is not None:
                buffer, chunk = item
                self._sha256.update(chunk)
                empty.put(buffer)

        thread = threading.Thread(target=hash_filled, name="sha256", daemon=True)
        thread.start()
        began = time.monotonic()
        done = 0
        try:
            while (elapsed := time.monotonic() - began) < _STRETCH_S:
                buffer = empty.get()
                chunk = reader.chunk(buffer)
                if not chunk:
                    return True, True
                filled.put((buffer, chunk))
                self._blake3.update(chunk)
                sink(chunk)
                done += len(chunk)
            return False, done > elapsed * _SLOW_BYTES_PER_S
        finally:
            filled.put(None)
            thread.join()
