"""The ballast: space that is given back when the disk is full (invariant 4 needs space).

A delete must be journalled before it frees anything, so on a full disk nothing could be
deleted. The ballast is a file of reserved blocks, truncated at that moment; the journal
and the index then go on for tens of thousands of writes. It is laid again as soon as
there is room.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

from cas.durable import Disk, opened

BALLAST_BYTES = 32 << 20  # a delete journals about 1 KB: some 30,000 of them


@final
class Ballast:
    """The file `catalog/ballast`. Safe for many processes: the worst race lays it twice."""

    def __init__(self, path: Path, disk: Disk, keep_free_bytes: int) -> None:
        """It is only laid where `keep_free_bytes` beside it stay free."""
        self._path = path
        self._disk = disk
        self._keep_free_bytes = keep_free_bytes
        self.given_back = False  # by this process, and not laid again since

    def release(self) -> bool:
        """Give the space back; False when there was none left to give."""
        self.given_back = True
        try:
            with opened(self._path, os.O_RDWR) as fd:
                if os.fstat(fd).st_size == 0:
                    return False
                self._disk.truncate(fd, 0)
        except OSError:
            # Not there, or a disk on which nothing can be changed: nothing to give either way.
            return False
        return True

    def restore(self) -> bool:
        """Lay the ballast where it is missing and there is room; True when it lies."""
        try:
            if self._path.stat().st_size == BALLAST_BYTES:
                self.given_back = False
                return True
        except FileNotFoundError:
            pass
        if self.free_bytes() < BALLAST_BYTES + self._keep_free_bytes:
            return False
        try:
            with opened(self._path, os.O_RDWR | os.O_CREAT) as fd:
                try:
                    self._disk.allocate(fd, BALLAST_BYTES)
                    # Allocating leaves the length as it is; the length says that it lies.
                    self._disk.truncate(fd, BALLAST_BYTES)
                except OSError:
                    self._disk.truncate(fd, 0)
                    return False
        except OSError:
            # A comfort, not a promise: a store that cannot lay it opens and serves.
            return False
        self.given_back = False
        return True

    def free_bytes(self) -> int:
        """Bytes that a process without privileges may still write."""
        usage = os.statvfs(self._path.parent)
        return usage.f_bavail * usage.f_frsize
