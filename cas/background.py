"""How the background process is, for whoever shares ROOT with it but not its code.

    ROOT/REPLICATOR           flock: held while it runs
    ROOT/replicator.status    JSON, replaced every few seconds: when, and how its jobs are

It is written by `replicator.heartbeat`, whose form this reads as far as it needs it.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Final, final

import msgspec

from cas.clock import SECOND_US
from cas.durable import opened

SILENT_US_MAX: Final = 60 * SECOND_US
FAILURES_MAX: Final = 3  # in a row


class _Job(msgspec.Struct):
    name: str
    failures: int = 0
    last_error: str = ""


class _Beat(msgspec.Struct):
    at: int
    jobs: list[_Job] = []


@final
class Background(msgspec.Struct, frozen=True):
    """The background process at one moment."""

    runs: bool
    silent_us: int | None  # since its last sign of life; None: there was none
    failing: tuple[str, ...] = ()  # jobs that failed FAILURES_MAX times in a row, and why

    def trouble(self) -> list[str]:
        """What stands still, in words."""
        if not self.runs:
            return ["no background process runs: callbacks wait, and nothing expires"]
        if self.silent_us is not None and self.silent_us > SILENT_US_MAX:
            return [f"the background process is silent for {self.silent_us // SECOND_US} s"]
        return [f"the background job {job}" for job in self.failing]


def background_of(root: Path, now_us: int) -> Background:
    """Look at the process that works on `root`, if any does."""
    try:
        beat = msgspec.json.decode((root / "replicator.status").read_bytes(), type=_Beat)
    except (OSError, msgspec.MsgspecError):
        return Background(_runs(root), None)
    failing = tuple(
        f"{job.name} failed {job.failures} times in a row"
        for job in beat.jobs
        if job.failures >= FAILURES_MAX
    )
    return Background(_runs(root), max(0, now_us - beat.at), failing)


def _runs(root: Path) -> bool:
    try:
        with opened(root / "REPLICATOR") as fd:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two may look at once
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
