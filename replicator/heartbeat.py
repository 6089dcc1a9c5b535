"""The background process's sign of life, and its right to be the only one of a ROOT.

Both are read by `cas.background`, which also says what their form is. None of it is
journalled: it is worth nothing once the process has ended.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, final

import msgspec

from cas.background import HEARTBEAT, PLACE, Heartbeat, take_place
from cas.durable import DISK

BEAT_S: Final = 5.0

_log = logging.getLogger("blobcask.replicator")


def write_heartbeat(root: Path, beat: Heartbeat) -> bool:
    """Replace the file; False when that failed, which is logged and no reason to stop.

    Not synced: after a crash nobody needs it. Only for who holds the lock.
    """
    path = root / HEARTBEAT
    aside = path.with_suffix(".new")  # one name, so that a killed process leaves one at most
    try:
        DISK.unlink(aside)
        fd = DISK.create(aside)
        try:
            DISK.write(fd, msgspec.json.encode(beat) + b"\n")
        finally:
            os.close(fd)
        DISK.rename(aside, path)
    except OSError as error:
        _log.warning("no heartbeat: %s", error)
        return False
    return True


@final
class Alone:
    """The right to be the background process of ROOT. Ends with the process, or `close`."""

    def __init__(self, root: Path) -> None:
        self._path = root / PLACE
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self) -> bool:
        """Take it without waiting; False while another process has it."""
        if not take_place(self._fd):
            return False
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def holder(self) -> str:
        """The PID of the process that has it, or had it last; "" until the first wrote it."""
        return os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()

    def close(self) -> None:
        os.close(self._fd)
