"""Where the processes of one server find the counters that they share."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import Final, final

_LOCK: Final = "LOCK"


@final
class CounterFolder:
    """A folder for `Counters`, made before any worker is forked.

    In memory, where there is any (`/dev/shm`): each request counts, and on a disk that is
    busy with uploads a page that is only being dirtied may wait for milliseconds, with the
    lock of all processes held. Its name is made of ROOT's own number, so that a second
    server on one ROOT counts with the first.
    """

    def __init__(self, root: Path, memory: Path = Path("/dev/shm")) -> None:  # noqa: S108  see _make_private
        root = root.absolute()
        where = root.stat()
        ours = f"blobcask-{os.geteuid()}-"
        _sweep(memory, ours)
        name = f"{ours}{where.st_dev:x}-{where.st_ino:x}"
        try:
            self.path, self._lock = _occupied(memory / name)
        except OSError:  # no such folder, full, or somebody took the name
            self.path, self._lock = _occupied(root / "limits")

    def close(self) -> None:
        """Remove the folder, unless others count there."""
        if _taken(self._lock):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _occupied(folder: Path) -> tuple[Path, int]:
    """The folder, and its lock, held by all that are forked from here and freed when the last
    of them ends. Whoever comes first throws away what an earlier server left there."""
    while True:
        _make_private(folder)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _taken(lock):
                for left in ("data.mdb", "lock.mdb"):  # maybe damaged
                    (folder / left).unlink(missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if (folder / _LOCK).stat().st_ino == os.fstat(lock).st_ino:
                return folder, lock
        except FileNotFoundError:
            pass  # the one before removed it just now
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _taken(lock: int) -> bool:
    """Whether nobody else holds the lock; it is ours alone then."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(memory: Path, ours: str) -> None:
    """Remove what killed servers of other ROOTs left behind: memory is not to be leaked."""
    for left in memory.glob(f"{ours}*/{_LOCK}"):
        try:
            lock = os.open(left, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # not ours, or gone
        if _taken(lock):
            shutil.rmtree(left.parent, ignore_errors=True)
        os.close(lock)


def _make_private(folder: Path) -> None:
    """Anybody may make names in `/dev/shm`: raises OSError for one that is not a folder of
    our own, closed to others."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not ours or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not ours alone")
