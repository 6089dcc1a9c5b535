"""The drill: a restore that is practised, into a scratch folder, while all goes on.

The whole catalog is brought from the target, replayed and proved, and must be this store's
own history; then a sample of blobs is brought and hashed. Only a drill that succeeds proves
that the next restore can.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

import msgspec

from cas.catalog.history import Lies
from cas.catalog.rebase import replayed
from cas.catalog.recovery import Folders
from cas.catalog.snapshot import LmdbSnapshot
from cas.clock import SECOND_US, parse_rfc3339, rfc3339
from cas.digest import Digest
from cas.errors import Conflict, Damaged
from cas.records import LIVE, Blob, Replica, StoredFile
from cas.restored import drilled, last_drill
from cas.store import Store
from replicator.bandwidth import SendingStopped
from replicator.fence import Fenced, Head, read_head
from replicator.gathering import Gathering
from replicator.link import Link
from replicator.loop import JITTER
from replicator.reading import read_back
from replicator.targets import BytesDiffer, ObjectAbsent, Target

SAMPLE: Final = 100  # blobs
_SCRATCH: Final = "drill"
_ACTOR: Final = "drill"
_LOOK_S: Final = 3600.0
_AGAIN_S: Final = 86_400.0  # a drill brings the whole catalog


class DrillFailed(Conflict):
    """A restore from this target would not bring all back."""


class DrillUnderWay(Conflict):
    """One at a time: each takes the room of a catalog."""


@final
class Drilled(msgspec.Struct, frozen=True):
    """What a successful drill brought."""

    head: Head
    files: int
    blobs: int  # of the sample, hashed
    size_bytes: int


def drill(
    store: Store, target: Target, sample: int = SAMPLE, stop: threading.Event | None = None
) -> Drilled:
    """Practise a restore of `store` from `target`; writes down that it succeeded.

    Takes room for the catalog in ROOT/drill while it runs. Raises DrillFailed, DrillUnderWay,
    HistoryBroken, TargetError, and SendingStopped once `stop` is set.
    """
    stop = stop or threading.Event()
    with _scratch(store.root / _SCRATCH) as scratch:
        made = _drill(store, target, sample, scratch, stop)
    with store.catalog.read() as snapshot:
        now_us = store.now_us(snapshot)
    drilled(store.catalog, target.name, rfc3339(now_us), actor=_ACTOR)
    return made


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """An empty folder for one drill at a time, of all processes; gone at the end."""
    fd = _taken(path)
    try:
        work = path / "work"
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        work.mkdir(mode=0o700)
        yield work
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def _taken(path: Path) -> int:
    """A descriptor of the folder `path`, made where there is none, that holds it for this
    drill until it is closed, however the process ends. Raises DrillUnderWay."""
    while True:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it before may have removed it since it was opened.
                if path.stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            except BlockingIOError:
                os.close(fd)
                raise DrillUnderWay("another drill is under way on this store") from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def _drill(
    store: Store, target: Target, sample: int, scratch: Path, stop: threading.Event
) -> Drilled:
    head = read_head(target).head
    if head is None or head.store_id != store.store_id():
        raise DrillFailed(f"nothing of this store was shipped to {target.place}")
    folders = Folders(scratch)
    Gathering(target, head, folders, store.disk, lambda _: None, stop).gather()
    index = replayed(folders, store.disk)
    try:
        with index.read() as snapshot:
            end = snapshot.position
            found, _ = store.catalog.locate(end.seq, end.chain)
            if found.lies in (Lies.FOREIGN, Lies.AHEAD):
                raise Fenced(f"what is at {target.place} is not this store's history")
            files = sum(1 for _ in snapshot.records(StoredFile))
            chosen = _sample(snapshot, head.target, sample)
    finally:
        index.close()
    for digest in chosen:
        _prove(target, digest, stop)
    return Drilled(head, files, len(chosen), sum(chosen.values()))


def _sample(snapshot: LmdbSnapshot, name: str, count: int) -> dict[Digest, int]:
    """Blobs that the target must have, chosen blindly, and their sizes."""
    chosen: dict[Digest, int] = {}
    for _ in range(count):
        after = Digest(random.randbytes(32))
        near = snapshot.range(Blob, "", after=(after,), limit=1) or snapshot.range(
            Blob, "", limit=1
        )
        for blob in near:
            row = snapshot.get(Replica, name, blob.digest)
            if blob.state == LIVE and row is not None and row.held:
                chosen[blob.digest] = blob.size_bytes
    return chosen


def _prove(target: Target, digest: Digest, stop: threading.Event) -> None:
    try:
        read_back(target, digest, stop=stop)
    except ObjectAbsent:
        raise DrillFailed(f"{target.place} lacks blob {digest.hex()}") from None
    except BytesDiffer:
        raise DrillFailed(f"{target.place} holds other bytes than blob {digest.hex()}") from None


@final
class Drill:
    """The job that practises a restore from one target, every `[replicator] drill_every`."""

    def __init__(
        self, store: Store, link: Link, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = f"drill {link.name}"
        self._every_s = store.settings.replicator.drill_every / SECOND_US
        self.interval_s = min(self._every_s, _LOOK_S)  # only looks whether one is due
        self._store = store
        self._link = link
        self._now_s = now_s
        self._tried_s: float | None = None
        self._stop = threading.Event()

    async def step(self, now_us: int) -> bool:
        """One drill, where it is due: none at the start, which is busy enough, and after one
        that failed not sooner than in a day. Raises what that one raises."""
        now_s = self._now_s()
        if self._tried_s is None:
            self._tried_s = now_s - min(self._every_s, _AGAIN_S) + self.interval_s
        elif self._link.open and self._is_due(now_us, now_s):
            await self._try(now_s)
        return False

    def _is_due(self, now_us: int, now_s: float) -> bool:
        assert self._tried_s is not None
        early_s = self.interval_s * JITTER  # by which a look may come
        if now_s - self._tried_s < min(self._every_s, _AGAIN_S) - early_s:
            return False
        with self._store.catalog.read() as snapshot:
            last = last_drill(snapshot, self._link.name)
        # A clock that went back is no reason to wait for it.
        ago_s = (now_us - parse_rfc3339(last)) / SECOND_US if last else self._every_s
        return not 0 <= ago_s < self._every_s - early_s

    async def _try(self, now_s: float) -> None:
        try:
            await asyncio.to_thread(drill, self._store, self._link.target, stop=self._stop)
        except DrillUnderWay:
            return  # of another target, or by hand: at the next look
        except SendingStopped:
            return
        except Damaged as error:
            # There, not here: no reason to open this store anew.
            self._tried_s = now_s
            raise DrillFailed(str(error)) from None
        except BaseException:
            self._tried_s = now_s
            raise
        self._tried_s = now_s

    def stop(self) -> None:
        """End a drill that is under way."""
        self._stop.set()

    async def close(self) -> None:
        """End the thread, where the step is not waited for."""
        self._stop.set()
