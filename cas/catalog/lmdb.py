"""The index: the LMDB environment of one process, ready to be read and thrown away.

layout        record types compiled: keys of records and entries
images        a record as it is stored, and the head
snapshot      reading
transaction   changing
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import final

import lmdb

from cas.catalog.snapshot import LmdbSnapshot
from cas.durable import Disk, opened
from cas.errors import IndexDamaged

# What LMDB says when its pages are not what it wrote; all else is no reason for a new index.
DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
    lmdb.CursorFullError,
)

MAP_BYTES = 1 << 40  # sparse address space, not disk: the map never has to grow in flight
READERS_MAX = 8192  # slots shared by all threads of all processes; 64 bytes each


@final
class Reading:
    """A snapshot while it is open. A class, since a generator would cost as much as the read."""

    __slots__ = ("_damaged", "_env", "_txn")

    def __init__(self, env: lmdb.Environment, damaged: Callable[[], None]) -> None:
        self._env = env
        self._damaged = damaged

    def __enter__(self) -> LmdbSnapshot:
        try:
            self._txn = self._env.begin(buffers=False)
        except DAMAGE as error:
            self._damaged()
            raise IndexDamaged(str(error)) from None
        return LmdbSnapshot(self._txn)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._txn.abort()
        if isinstance(error, IndexDamaged):
            self._damaged()
        elif isinstance(error, DAMAGE):
            self._damaged()
            raise IndexDamaged(str(error)) from None


@final
class Index:
    """The LMDB environment of one process. LMDB forbids two of one file in one process."""

    def __init__(self, folder: Path, room_bytes: int = 0) -> None:
        """Open or make the environment; raises IndexDamaged when LMDB refuses the file.

        `room_bytes` are for `roomy` alone.
        """
        self._folder = folder
        self._roomy = room_bytes > 0
        try:
            self._env: lmdb.Environment = lmdb.open(
                str(folder),
                map_size=room_bytes or MAP_BYTES,
                max_readers=READERS_MAX,
                # The journal is synced, the index never: it is rebuilt after a crash of
                # the machine (invariant 5).
                sync=False,
                metasync=False,
                writemap=self._roomy,
                # Read transactions belong to the snapshot, not to the thread.
                max_spare_txns=64,
                mode=0o600,
            )
        except lmdb.Error as error:
            raise IndexDamaged(str(error)) from None
        # A page beyond the end of the file is a SIGBUS at the first look at it.
        pages = self._env.info()["last_pgno"] + 1
        size_bytes = (folder / "data.mdb").stat().st_size
        if size_bytes < pages * self._env.stat()["psize"] and not self._roomy:
            self._env.close()
            raise IndexDamaged(f"it was cut short to {size_bytes} bytes, {pages} pages")
        # Slots of processes that were killed would otherwise pin old pages for ever.
        self._env.reader_check()

    @classmethod
    def roomy(cls, folder: Path, room_bytes: int, disk: Disk) -> Index:
        """A new environment to be filled alone, then `settled`; see `bulk`.

        It is written through its memory map, which spares LMDB the copying of pages. A full
        disk would then be a SIGBUS, so all of the file is allocated first, and where that
        cannot be had the environment is an ordinary one. Filling it raises
        lmdb.MapFullError when the room was too small.
        """
        index = cls(folder, room_bytes)
        try:
            with opened(folder / "data.mdb", os.O_RDWR) as fd:
                disk.allocate(fd, room_bytes)
                if os.fstat(fd).st_blocks * 512 >= room_bytes:
                    return index
        except OSError:
            pass  # no such space: the ordinary way needs less of it, and fails in words
        index.close()
        (folder / "data.mdb").unlink()
        return cls(folder)

    def settled(self) -> Index:
        """The environment as others may open it, without the room that was not used."""
        if not self._roomy:
            return self
        pages = self._env.info()["last_pgno"] + 1
        size_bytes = pages * self._env.stat()["psize"]
        self.close()
        os.truncate(self._folder / "data.mdb", size_bytes)
        return Index(self._folder)

    def read(self, damaged: Callable[[], None] = lambda: None) -> Reading:
        """A snapshot, as a context manager; what LMDB cannot read there is IndexDamaged, and
        told to `damaged` too."""
        return Reading(self._env, damaged)

    def begin(self) -> lmdb.Transaction[bytes]:
        """A write transaction; waits for the writer lock shared by all processes."""
        return self._env.begin(write=True)

    def begin_child(self, parent: lmdb.Transaction[bytes]) -> lmdb.Transaction[bytes]:
        return self._env.begin(parent=parent, write=True)

    def reader_check(self) -> int:
        """Free the reader slots of dead processes; returns how many there were."""
        return self._env.reader_check()

    def last_commit(self) -> int:
        """The number of the last commit of any process."""
        return self._env.info()["last_txnid"]

    def oldest_reader_lag(self) -> int:
        """How many commits the oldest reader is behind; 0 without readers."""
        last = self._env.info()["last_txnid"]
        seen = [
            int(line.split()[2])
            for line in self._env.readers().splitlines()[1:]
            if line.split()[2].isdigit()
        ]
        return max((last - txnid for txnid in seen), default=0)

    def close(self) -> None:
        self._env.close()
