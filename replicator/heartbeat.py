"""How the background process is: a small file that it replaces every few seconds.

    ROOT/replicator.status    JSON; may be deleted at any time
    ROOT/REPLICATOR           flock: one process at a time; its content is that one's PID

None of it is journalled: it is worth nothing once the process has ended. The gateway reads
both by `cas.background`.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import Final, final

import msgspec

from cas.background import FAILURES_MAX, SILENT_US_MAX
from cas.clock import SECOND_US
from cas.durable import DISK

BEAT_S: Final = 5.0
STEP_US_MAX: Final = 600 * SECOND_US  # a step that takes longer stands still

_FILE: Final = "replicator.status"
_LOCK: Final = "REPLICATOR"

_log = logging.getLogger("blobcask.replicator")


@final
class JobState(msgspec.Struct):
    """What is known of one job; times are µs since 1970 UTC, None: not yet."""

    name: str
    interval_s: float
    begun_at: int | None = None  # the step that runs now
    ended_at: int | None = None  # the last step
    worked_at: int | None = None  # the last step that did not fail
    failures: int = 0  # in a row
    last_error: str = ""  # of the last failure, kept when it works again

    def begun(self, now_us: int) -> None:
        self.begun_at = now_us

    def worked(self, now_us: int) -> bool:
        """True when it had failed before."""
        recovered = self.failures > 0
        self.begun_at, self.ended_at, self.worked_at, self.failures = None, now_us, now_us, 0
        return recovered

    def failed(self, now_us: int, error: Exception) -> bool:
        """True when this is news: the first failure in a row, or another reason."""
        text = str(error) or type(error).__name__
        news = self.failures == 0 or text != self.last_error
        self.begun_at, self.ended_at, self.last_error = None, now_us, text
        self.failures += 1
        return news

    def trouble(self, now_us: int) -> str:
        """Why this job does not do its work, in words; "" when it does."""
        if self.begun_at is not None and now_us - self.begun_at > STEP_US_MAX:
            return f"a step runs for {(now_us - self.begun_at) // SECOND_US} s"
        if self.failures >= FAILURES_MAX:
            return f"failed {self.failures} times in a row: {self.last_error}"
        return ""


@final
class Heartbeat(msgspec.Struct, frozen=True):
    """The content of the file."""

    pid: int
    started_at: int
    at: int
    jobs: list[JobState]

    def trouble(self, now_us: int) -> list[str]:
        """What is wrong with the process or a job, in words."""
        silent_us = now_us - self.at
        if silent_us > SILENT_US_MAX:
            return [f"no sign of life for {silent_us // SECOND_US} s"]
        found = [(job.name, job.trouble(now_us)) for job in self.jobs]
        return [f"{name}: {trouble}" for name, trouble in found if trouble]


def write_heartbeat(root: Path, beat: Heartbeat) -> bool:
    """Replace the file; False when that failed, which is logged and no reason to stop.

    Not synced: after a crash nobody needs it. Only for who holds the lock.
    """
    path = root / _FILE
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


def read_heartbeat(root: Path) -> Heartbeat | None:
    """The last one; None when there is none that can be read."""
    try:
        return msgspec.json.decode((root / _FILE).read_bytes(), type=Heartbeat)
    except (OSError, msgspec.MsgspecError):
        return None


@final
class Alone:
    """The right to be the background process of ROOT. Ends with the process, or `close`."""

    def __init__(self, root: Path) -> None:
        self._path = root / _LOCK
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self) -> bool:
        """Take it without waiting; False while another process has it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def holder(self) -> str:
        """The PID of the process that has it, or had it last."""
        return os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()

    def close(self) -> None:
        os.close(self._fd)
