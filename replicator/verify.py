"""Verify: both sides compared, what is listed there with what is written down here.

The target lists its objects in the order of their digests, and the rows are in that order
too, so that they are walked side by side in constant memory, whatever their number.

    done, and not there        the copy is wanted again
    done, of another length    the same
    done, and other bytes      the same (`by_bytes`: every copy is read back and hashed)
    done, and needed by none   not trouble; but one that is not there is not done any more
    wrong bytes here           quarantined and listed as missing, healed from a target
    wanted, and there          told: the mirror will see to it
    there, and nobody's        told; with `remove_strays` deleted, in its time
    a live blob without row    gets one

A listing takes time while the mirror works, so each difference is looked at once more, by a
question for that one object and against the row as it is then, before anything is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, final

import msgspec

from cas.catalog import Key
from cas.digest import Digest, parse_digest
from cas.errors import InvalidDigest
from cas.records import DELETING, DONE, WANTED, Blob, Replica
from cas.replicas import Failed, backfill, begin_backfill, settle, want_again
from cas.scrub import Scrub
from cas.store import Store
from replicator.bandwidth import SendingStopped
from replicator.reading import read_back
from replicator.targets import OBJECTS, BytesDiffer, ObjectAbsent, ObjectStat, Target, object_key

_ROWS: Final = 500  # read at once, and written at once
_TOLD_MAX: Final = 1000  # names of a kind in the report


@final
@dataclass
class VerifyReport:
    """What was compared and found at one target. Digests as hex."""

    target: str
    by_bytes: bool = False
    rows: int = 0  # compared
    objects: int = 0
    read_bytes: int = 0
    good: int = 0  # done, and as they should be as far as was looked
    waiting: int = 0  # not copied yet
    absent: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    damaged_here: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    strays_removed: int = 0
    foreign: list[str] = field(default_factory=list)  # keys that name no blob
    finished: bool = False

    @property
    def well(self) -> bool:
        """Whether all that is written down as done is there and right, and all that is here."""
        return not (self.absent or self.differing or self.damaged_here)

    def form(self) -> dict[str, Any]:
        """As JSON."""
        return dict(msgspec.to_builtins(self))

    def lines(self) -> Iterator[str]:
        """For people: what deserves a look, then the sum."""
        for noun, names in (
            ("absent", self.absent),
            ("differing", self.differing),
            ("damaged here", self.damaged_here),
            ("stray", self.strays),
            ("foreign", self.foreign),
        ):
            yield from (f"{self.target} {noun:12} {name}" for name in names)
        how = f", {self.read_bytes:,} bytes read back" if self.by_bytes else ""
        yield (
            f"{self.target}: {self.rows:,} rows and {self.objects:,} objects compared{how}; "
            f"{self.good:,} good, {self.waiting:,} waiting"
            + ("" if self.finished else "; broken off")
        )


@final
class Verification:
    """Compares one target with the catalog. Blocks; `step` until it returns False."""

    def __init__(
        self,
        store: Store,
        target: Target,
        *,
        by_bytes: bool = False,
        remove_strays: bool = False,
        stop: threading.Event | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """`progress` is called with the rows compared so far."""
        self._store = store
        self._target = target
        self._remove_strays = remove_strays
        self._stop = stop or threading.Event()
        self._progress = progress
        self._after: Key = ()
        self._listed = _Listed(target)
        self.report = VerifyReport(target.name, by_bytes)

    def step(self) -> bool:
        """Compare the next rows; False when all are. Raises TargetError, SendingStopped."""
        if not self._after:
            self._give_rows()
        with self._store.catalog.read() as snapshot:
            rows = snapshot.range(Replica, "", (self._target.name,), after=self._after, limit=_ROWS)
        again: list[Digest] = []
        for row in rows:
            self._strays_before(row.digest)
            found = self._listed.take(row.digest)
            if self._is_lost(row, found):
                again.append(row.digest)
        want_again(self._store.catalog, self._target.name, again)
        self.report.rows += len(rows)
        self.report.objects = self._listed.count
        if self._progress is not None:
            self._progress(self.report.rows)
        if rows:
            self._after = (rows[-1].digest,)
            return True
        self._strays_before(None)
        self.report.objects = self._listed.count
        self.report.foreign = self._listed.foreign
        self.report.finished = True
        return False

    def _give_rows(self) -> None:
        """Rows for live blobs that have none."""
        begin_backfill(self._store.catalog, self._target.name)
        while backfill(self._store.catalog, self._target.name):
            pass

    # --- one row

    def _is_lost(self, row: Replica, found: ObjectStat | None) -> bool:
        """Whether the copy of a row that says done is not there as it should be."""
        if row.state != DONE:
            self.report.waiting += row.state != DELETING and row.removed_at is None
            return False
        if found is None or found.size_bytes != row.size_bytes:
            found = self._asked(row)
        same = found and found.size_bytes == row.size_bytes and self._same_bytes(row)
        if row.removed_at is None:
            self._tell_of(row.digest, there=found is not None, same=bool(same))
        # One that nobody needs is no trouble, but must not count when its blob comes back.
        return not same

    def _tell_of(self, digest: Digest, *, there: bool, same: bool) -> None:
        report, name = self.report, digest.hex()
        if not there:
            _tell(report.absent, name)
        elif not same:
            _tell(report.differing, name)
        else:
            if report.by_bytes and not self._good_here(digest):
                _tell(report.damaged_here, name)
            report.good += 1

    def _asked(self, row: Replica) -> ObjectStat | None:
        """What the target says of this one, now."""
        try:
            return self._target.stat(object_key(row.digest))
        except ObjectAbsent:
            return None

    def _same_bytes(self, row: Replica) -> bool:
        if not self.report.by_bytes:
            return True
        try:
            read_back(self._target, row.digest, row.size_bytes, self._stop, self._count)
        except (BytesDiffer, ObjectAbsent):
            return False
        return True

    def _count(self, size_bytes: int) -> None:
        self.report.read_bytes += size_bytes

    def _good_here(self, digest: Digest) -> bool:
        """Look at the local bytes, too; whatever is wrong with them is written down."""
        scrub = Scrub(self._store)
        scrub.look_at(digest)
        return not (scrub.report.damaged or scrub.report.missing)

    # --- strays

    def _strays_before(self, digest: Digest | None) -> None:
        """What is listed before the next row, and so has none."""
        listed = self._listed.before(digest)
        while some := list(islice(listed, _ROWS)):  # a whole target may be nobody's
            nobodys = self._nobodys(some)
            for stat in nobodys:
                _tell(self.report.strays, stat.key.rpartition("/")[2])
            if self._remove_strays and nobodys:
                self._doom(nobodys)
            if self._stop.is_set():
                raise SendingStopped

    def _nobodys(self, stats: list[ObjectStat]) -> list[ObjectStat]:
        with self._store.catalog.read() as snapshot:
            return [
                stat
                for stat in stats
                if (digest := _digest_of(stat.key)) is not None
                and snapshot.get(Blob, digest) is None
                and snapshot.get(Replica, self._target.name, digest) is None
            ]

    def _doom(self, strays: list[ObjectStat]) -> None:
        """Give them rows that say removed, so that they go in their time like all others."""
        words = []
        for stat in strays:
            digest = _digest_of(stat.key)
            assert digest is not None
            row = Replica(self._target.name, digest, stat.size_bytes, WANTED, 0, None, 0)
            words.append(Failed(row, "nobody's", 0))
        settle(self._store.catalog, words)
        self.report.strays_removed += len(words)


@final
class _Listed:
    """The listing of a target's blobs, read as it is asked for, in the order of digests."""

    def __init__(self, target: Target) -> None:
        self._stats = target.list(OBJECTS)
        self._next: ObjectStat | None = None
        self._ended = False
        self.count = 0
        self.foreign: list[str] = []

    def take(self, digest: Digest) -> ObjectStat | None:
        """The object of `digest`, if it comes next."""
        stat = self._peek()
        if stat is None or _digest_of(stat.key) != digest:
            return None
        self._next = None
        return stat

    def before(self, digest: Digest | None) -> Iterator[ObjectStat]:
        """The objects that come before `digest`; None: all that are left."""
        while (stat := self._peek()) is not None:
            found = _digest_of(stat.key)
            assert found is not None
            if digest is not None and found >= digest:
                return
            self._next = None
            yield stat

    def _peek(self) -> ObjectStat | None:
        while self._next is None and not self._ended:
            stat = next(self._stats, None)
            if stat is None:
                self._ended = True
            elif _digest_of(stat.key) is None:
                _tell(self.foreign, stat.key)
            else:
                self.count += 1
                self._next = stat
        return self._next


def _digest_of(key: str) -> Digest | None:
    """The digest that a key stands for, None for a key that is no blob's."""
    try:
        digest = parse_digest(key.rpartition("/")[2])
    except InvalidDigest:
        return None
    return digest if key == object_key(digest) else None


def _tell(names: list[str], name: str) -> None:
    if len(names) < _TOLD_MAX:
        names.append(name)
