"""How the background process is, for whoever shares ROOT with it.

ROOT/REPLICATOR           a lock (`cas.alone`): held while it runs
ROOT/replicator.status    JSON, replaced every few seconds: when, and how its jobs are
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, final

import msgspec

from cas.alone import is_held
from cas.beats import SILENT_US_MAX, last_beat
from cas.clock import SECOND_US

PLACE: Final = "REPLICATOR"
HEARTBEAT: Final = "replicator.status"
FAILURES_MAX: Final = 3  # in a row
STEP_US_MAX: Final = 600 * SECOND_US  # a step that takes longer stands still


@final
class JobState(msgspec.Struct):
    """What is known of one job; times are µs since 1970 UTC, None: not yet."""

    name: str
    interval_s: float
    begun_at: int | None = None  # the step that runs now
    ended_at: int | None = None  # the last step
    worked_at: int | None = None  # the last step that did not fail
    failures: int = 0  # in a row
    last_error: str = ""  # of the last failure, kept when it works again; for the operator

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
        """Why this job does not do its work, in words for anybody; "" when it does."""
        if self.begun_at is not None and now_us - self.begun_at > STEP_US_MAX:
            return f"is in one step for {(now_us - self.begun_at) // SECOND_US} s"
        if self.failures >= FAILURES_MAX:
            return f"failed {self.failures} times in a row"
        return ""


@final
class TargetState(msgspec.Struct, frozen=True):
    """How a target is, as the process that mirrors to it knows. Ages are µs at the heartbeat,
    by a clock that nobody sets, so that a wrong one neither hides a stall nor makes one."""

    name: str
    place: str
    probed: bool  # it was reached, and what it honours is known
    fenced: str = ""  # why nothing may be written there (invariant 12)
    down: str = ""  # why it is left alone for now
    last_error: str = ""  # of a copy or a job, "" after one that worked
    rows_per_s: float = 0.0  # copies, over the last minute
    bytes_per_s: float = 0.0
    shipped_seq: int = 0  # the newest frame of the journal that is there
    shipped_at: int = 0  # the catalog time of that frame
    behind_us: int = 0  # how long a frame has waited that is not there; 0 where none waits
    canary_us: int = 0  # since the last canary came back, or since the start where none did
    canary_worked: bool = False
    canary_error: str = ""


@final
class CacheState(msgspec.Struct, frozen=True):
    """What the process has done for readers of evicted blobs since it started."""

    fetched_bytes: int = 0
    evicted: int = 0  # blobs


@final
class Heartbeat(msgspec.Struct, frozen=True):
    """The content of the status file."""

    pid: int
    started_at: int
    at: int
    jobs: list[JobState]
    targets: list[TargetState] = []
    cache: CacheState | None = None  # None: there are no targets


@final
class Background(msgspec.Struct, frozen=True):
    """The background process at one moment."""

    runs: bool
    silent_us: int | None  # since its last sign of life; None: there was none
    beat: Heartbeat | None = None  # the last one, perhaps of a process that has ended
    failing: tuple[str, ...] = ()  # the jobs that do not do their work, and why

    def trouble(self) -> list[str]:
        """What stands still, in words for anybody: no error text of a job."""
        if not self.runs:
            return ["no background process runs: callbacks and mails wait, and nothing expires"]
        if self.silent_us is not None and self.silent_us > SILENT_US_MAX:
            return [f"the background process is silent for {self.silent_us // SECOND_US} s"]
        return [f"the background job {job}" for job in self.failing]


def background_of(root: Path, now_us: int) -> Background:
    """Look at the process that works on `root`, if any does; takes nothing, holds nobody up."""
    beat = last_beat(root / HEARTBEAT, Heartbeat)
    if beat is None:
        return Background(runs(root), None)
    found = [(job.name, job.trouble(now_us)) for job in beat.jobs]
    failing = tuple(f"{name} {trouble}" for name, trouble in found if trouble)
    return Background(runs(root), max(0, now_us - beat.at), beat, failing)


def runs(root: Path) -> bool:
    """Whether a process has the place: it works on `root`, starts, or ends."""
    return is_held(root / PLACE)
