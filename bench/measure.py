"""How it is measured: both sides alternate in one run, each in a fresh folder, medians.

A number of this machine at this minute means little; the ratio to what bounds it, measured
in the same minutes, means something. So the sides of a comparison take turns (and change
who goes first), and every timed part begins with a settled disk.

Files that a run reads were just written and are in the page cache, for both sides: what
is compared is the work, not the luck of a read from the disk. Writes are counted up to
where the side itself says they are durable.
"""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

import msgspec

_SETTLE_S_MAX = 20.0
_SETTLE_STEP_S = 0.1
_LARGE_BYTES = 1 << 20

_FS_IOC_GETFLAGS = 0x80086601  # <linux/fs.h>
_FS_IOC_SETFLAGS = 0x40086602
_FS_TOPDIR_FL = 0x00020000


@final
class Run:
    """One run of one side: a folder of its own, and the time of what is worth timing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Settle the disk, then time what is inside; several such parts add up."""
        settle(self.folder)
        gc.collect()
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


@final
class Side(msgspec.Struct, frozen=True):
    """One side of a comparison; `work` does one run and times the part that counts."""

    name: str
    work: Callable[[Run], None]


@final
class Samples(msgspec.Struct, frozen=True):
    """The times of one side, in the order they were measured."""

    name: str
    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    """A folder for everything a benchmark writes; gone afterwards.

    ext4 passes over inodes that were deleted in the last minutes one by one, which makes
    each new file near them cost up to a millisecond. So nothing small is deleted before
    the end, and the folders below are spread over the disk, as those of `/` are, instead
    of lying beside whatever was cleaned up just now.
    """
    with tempfile.TemporaryDirectory(prefix="blobcask-bench-", dir=parent) as name:
        _spread(Path(name))
        yield Path(name)


def _spread(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # only ext4 knows this flag, and only it needs it
            held = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
            flags = int.from_bytes(held[:4], "little") | _FS_TOPDIR_FL
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))
    finally:
        os.close(fd)


def alternate(folder: Path, rounds: int, sides: Sequence[Side]) -> list[Samples]:
    """Run all sides `rounds` times by turns; their samples in the order of `sides`."""
    samples = {side.name: Samples(side.name, []) for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            run = Run(Path(tempfile.mkdtemp(prefix="run-", dir=folder)))
            side.work(run)
            samples[side.name].seconds.append(run.seconds)
            _drop_large(run.folder)
    return [samples[side.name] for side in sides]


def settle(folder: Path) -> None:
    """Write out what is dirty, then wait until the disk under `folder` does nothing more."""
    os.sync()
    device = os.stat(folder).st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    deadline = time.monotonic() + _SETTLE_S_MAX
    before: list[str] = []
    while time.monotonic() < deadline:
        try:
            # Reads, writes and requests in flight; discards count too, they slow writes.
            now = path.read_text().split()
        except OSError:
            return  # no disk of its own: overlay, memory
        if now == before and now[8] == "0":
            return
        before = now
        time.sleep(_SETTLE_STEP_S)


def _drop_large(folder: Path) -> None:
    """Give back the space of a run; see `workspace` why its small files stay."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with suppress(FileNotFoundError):
                if os.lstat(path).st_size >= _LARGE_BYTES:
                    os.unlink(path)


def fresh(folder: Path) -> Path:
    """Empty a folder of one run that is used again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@final
class Memory(msgspec.Struct, frozen=True):
    """Memory of a process, as the kernel counts it."""

    resident_bytes: int
    peak_bytes: int  # the most that was ever resident, since the process began
    own_bytes: int  # without pages of files, which the kernel may take back at any time

    @classmethod
    def of(cls, pid: int | str = "self") -> Memory:
        """Read it; raises FileNotFoundError when the process is gone."""
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )

        def size(name: str) -> int:
            return int(fields[name].split()[0]) << 10

        return cls(size("VmRSS"), size("VmHWM"), size("RssAnon"))

    @staticmethod
    def together(pids: Iterable[int]) -> int:
        """Bytes of memory that processes take in all (PSS): what some share counts once."""
        rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in pids)
        return sum(
            int(line.split()[1]) << 10
            for rollup in rollups
            for line in rollup
            if line.startswith("Pss:")
        )
