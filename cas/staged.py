"""Staged: an own copy of bytes on its way to a name, and what is known of it.

It is hashed while it is written, has no name and is nobody else's; closing it unplaced
leaves nothing on disk. `blobs` decides what becomes of it.
"""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import Protocol, Self, final

import msgspec
from blake3 import blake3 as new_blake3

from cas.digest import Digest
from cas.durable import Disk, SupportsRead, Temporary
from cas.errors import SizeMismatch, TooLarge
from cas.leftovers import Leftovers

# Early enough that little is left for the final sync, rare enough to cost nothing.
_WRITEBACK_BYTES = 16 << 20
# A buffer that stays in the cache of one core between being read and being hashed.
READ_BYTES = 256 << 10


class Seekable(SupportsRead, Protocol):
    """A stream that can be read twice."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


@final
class Measured(msgspec.Struct, frozen=True):
    """What bytes are: their name, length, and BLAKE3 (empty where it was not asked for)."""

    digest: Digest
    size_bytes: int
    blake3: bytes = b""


@final
class Placed(msgspec.Struct, frozen=True):
    """A blob file as it was seen or written: whatever differs, it is another file.

    The time of its last write is part of it, since the kernel gives the number of a removed
    inode to the next file that is made; linking and renaming leave that time alone.
    """

    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Placed:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class Meeting(enum.Enum):
    """What is done with an own copy of bytes, once it is known what the store has of them."""

    PLACE = "place"  # nobody has them: this copy counts
    HEAL = "heal"  # a record names them, but nobody can be sure of them: this copy counts
    REHEARSE = "rehearse"  # another tenant has them: work as hard, throw the result away
    LEAVE = "leave"  # the same tenant has them, and may know it


@final
class Staged:
    """An own verified copy without a name. Closing it unplaced leaves nothing on disk."""

    __slots__ = ("_disk", "_hidden", "_leftovers", "_temporary", "measured", "synced")

    def __init__(self, disk: Disk, temporary: Temporary, measured: Measured, synced: bool) -> None:
        self._disk = disk
        self._temporary: Temporary | None = temporary
        self._leftovers: Leftovers | None = None
        self._hidden: list[str] = []  # names it was given only to be taken away
        self.measured = measured
        self.synced = synced

    @property
    def digest(self) -> Digest:
        return self.measured.digest

    @property
    def size_bytes(self) -> int:
        return self.measured.size_bytes

    @property
    def blake3(self) -> bytes:
        return self.measured.blake3

    @property
    def fd(self) -> int:
        """The copy, open for reading (`os.pread`: its position is nobody's) until `close`."""
        if self._temporary is None:
            raise ValueError("the staged copy is closed")
        return self._temporary.fd

    def sync(self) -> None:
        """Make the bytes durable, if they are not yet."""
        if not self.synced:
            self._disk.sync_data(self.fd)
            self.synced = True

    def seen(self) -> Placed:
        """The copy as it shows under any name it has."""
        return Placed.of(os.fstat(self.fd))

    def become(self, other: Staged) -> None:
        """Take over the copy that `other` holds; the own one is closed."""
        temporary, self._temporary = self._temporary, other._temporary
        other._temporary = temporary
        self.synced = other.synced
        other.close()

    def close(self) -> None:
        """Let go of the copy; what was placed stays. May be called twice."""
        temporary, self._temporary = self._temporary, None
        if temporary is None:
            return
        let_go = partial(_let_go, self._disk, temporary, self._hidden)
        if self._leftovers is None:
            let_go()
        else:
            self._leftovers.add(let_go)

    def leave_to(self, leftovers: Leftovers, hidden: str | None = None) -> None:
        """Let `leftovers` let go of it after `close`, which then takes no time.

        `hidden` is a name of it that goes too.
        """
        if hidden is not None:
            self._hidden.append(hidden)
        self._leftovers = leftovers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _let_go(disk: Disk, temporary: Temporary, hidden: list[str]) -> None:
    try:
        for name in hidden:
            disk.unlink(name)
    finally:
        disk.discard(temporary)


class Watcher(Protocol):
    """Is told, by the thread that writes, how a copy grows; must be quick and not raise."""

    def begun(self, fd: int) -> None:
        """The copy is open at `fd`, the writer's: whoever wants it longer opens it anew."""
        ...

    def grown(self, size_bytes: int) -> None:
        """So many bytes can be read from it."""
        ...


@final
class Writing:
    """The growing copy: keeps the promises about its length while it is written."""

    __slots__ = (
        "_disk",
        "_limit",
        "_need_room",
        "_promised",
        "_started",
        "_watcher",
        "expected_bytes",
        "fd",
        "size_bytes",
    )

    def __init__(
        self,
        disk: Disk,
        promised_size: int | None,
        limit_bytes: int,
        need_room: Callable[[int], None],
        watcher: Watcher | None = None,
    ) -> None:
        self._disk = disk
        self._watcher = watcher
        self._need_room = need_room
        self._promised = promised_size
        self._limit = limit_bytes
        self._started = 0
        self.fd = -1
        self.expected_bytes = 0
        self.size_bytes = 0

    def begin(self, fd: int) -> None:
        self.fd = fd
        if self._watcher is not None:
            self._watcher.begun(fd)

    def expect(self, seeming_bytes: int) -> int:
        """How many bytes the source is expected to bring; 0 is unknown."""
        if self._limit and seeming_bytes > self._limit:
            raise TooLarge(self._limit)
        self.expected_bytes = seeming_bytes if self._promised is None else self._promised
        return self.expected_bytes

    def write(self, chunk: bytes | memoryview) -> None:
        size = self.size_bytes + len(chunk)
        if self._promised is not None and size > self._promised:
            raise SizeMismatch(self._promised, size)
        if self._limit and size > self._limit:
            raise TooLarge(self._limit)
        self._disk.write(self.fd, chunk)
        self.size_bytes = size
        if self._watcher is not None:
            self._watcher.grown(size)
        if size - self._started >= _WRITEBACK_BYTES:
            self._disk.start_writeback(self.fd, self._started, size - self._started)
            self._started = size
            if size >= self.expected_bytes:
                # Nothing was reserved for what still comes: an endless source must not
                # take the last of the disk.
                self._need_room(0)

    def end(self) -> None:
        if self._promised is not None and self.size_bytes != self._promised:
            raise SizeMismatch(self._promised, self.size_bytes)
        if self.size_bytes < self.expected_bytes:
            # The source was shorter than it seemed: give back the rest of the reservation.
            self._disk.truncate(self.fd, self.size_bytes)


def write_small(data: bytes, writing: Writing) -> Measured:
    writing.expected_bytes = len(data)
    writing.write(data)
    writing.end()
    return Measured(Digest(hashlib.sha256(data).digest()), len(data), new_blake3(data).digest())


def measure(chunk_into: Callable[[memoryview], memoryview]) -> Measured:
    sha256 = hashlib.sha256()
    size_bytes = 0
    buffer = memoryview(bytearray(READ_BYTES))
    while chunk := chunk_into(buffer):
        sha256.update(chunk)
        size_bytes += len(chunk)
    return Measured(Digest(sha256.digest()), size_bytes)
