"""Alone: the right to be the one process of its kind on a ROOT.

A record lock on the first byte of a file in ROOT, which holds the PID of its holder. The lock
belongs to the open file (F_OFD_SETLK), so that a kill releases it and a look at it takes
nothing: a look must never be what keeps a process from its place.

A forked child would share the open file, and keep the place of a parent that was killed: it
closes its own descriptor as soon as it is there, which takes nothing from the parent. One that
is started as another program never has it (O_CLOEXEC).
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
from pathlib import Path
from typing import Final, final

from cas.durable import opened

_FLOCK: Final = "@hhqqi0q"  # struct flock of 64-bit Linux: type, whence, start, length, pid

_places: Final[weakref.WeakSet[Alone]] = weakref.WeakSet()


@final
class Alone:
    """The right itself. Ends with the process, or `close`."""

    def __init__(self, path: Path) -> None:
        """`path` names the file; it is made where it does not exist."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _places.add(self)

    def take(self) -> bool:
        """Take it without waiting; False while another process has it."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock())
        except BlockingIOError:
            return False
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def holder(self) -> str:
        """The PID of the process that has it, or had it last; "" until the first wrote it."""
        return os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()

    def close(self) -> None:
        """Let go of it, where this process has it. Closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def is_held(path: Path) -> bool:
    """Whether a process has the right: it works, starts, or ends. Takes nothing."""
    try:
        with opened(path) as fd:
            found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock())
    except FileNotFoundError:
        return False
    kind: int = struct.unpack(_FLOCK, found)[0]
    return kind != fcntl.F_UNLCK


def _lock() -> bytes:
    return struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 1, 0)


def _after_fork() -> None:
    for place in _places:
        place.close()


os.register_at_fork(after_in_child=_after_fork)
