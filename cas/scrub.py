"""The scrub: hashes what is stored again, and clears away what no record names.

Three walks, in steps of bounded work, so that a scrub may be stopped anywhere:

    blobs     longest unverified first, so the next scrub goes on where this one stopped.
              Good bytes: `verified_at` moves on. Bad ones: the record says `missing`, then
              the file goes to quarantine, so that the next upload of the bytes heals it.
    shards    objects without a record, files of evicted blobs that a crash left behind, and
              hidden temporaries, once they are older than the grace; the position is a mark.
              Foreign names are told, never touched.
    counts    the audit of the reference counts, at the end; tells, mends nothing

What is read outside a transaction is looked at again inside it: a writer may have healed,
adopted or replaced the object meanwhile, and then its word counts. An object that is just
being adopted is younger than the grace, and were it not, the `deleting` record that it gets
first would send its writer back to bring the bytes again (see `adoption`).
"""

from __future__ import annotations

import errno
import os
import stat as modes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, final

import msgspec

from cas.adoption import object_of
from cas.blobs import SHARDS, Placed
from cas.catalog import Key, Snapshot, Transaction
from cas.digest import Digest, parse_digest
from cas.durable import is_temporary
from cas.errors import BlobMissing, InvalidDigest
from cas.records import DELETING, Blob, Mark
from cas.refcounts import Miscount, miscounts
from cas.replicas import is_leftover
from cas.store import Store

_ACTOR = "scrub"
# What a disk says of bytes that it cannot give back.
_BAD_DISK = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
_SHARD_MARK = "scrub_shard"  # the shard folder that the walk comes to next
_SHARDS_A_MARK = 16  # how often the position is written down
_BATCH_BLOBS = 64  # records a transaction: under a ms of the writer lock
_BATCH_BYTES = 64 << 20
_NAMES_AT_ONCE = 1000  # entries looked up in one snapshot
_TOLD_MAX = 1000  # foreign names in the report


@final
@dataclass
class ScrubReport:
    """What a scrub did and found. Digests as hex; with `dry_run` nothing was changed."""

    dry_run: bool = False
    checked: int = 0
    checked_bytes: int = 0
    shards: int = 0
    finished: bool = False  # all three walks came to their end
    damaged: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)  # paths
    missing: list[str] = field(default_factory=list)
    found_again: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)  # removed, or to be removed
    orphan_bytes: int = 0
    leftovers: list[str] = field(default_factory=list)  # of evicted blobs, likewise
    temporaries: list[str] = field(default_factory=list)  # likewise
    foreign: list[str] = field(default_factory=list)
    miscounts: list[Miscount] = field(default_factory=list)

    @property
    def well(self) -> bool:
        """Whether all bytes are there and right, and all counts."""
        return not (self.damaged or self.missing or self.miscounts)

    def form(self) -> dict[str, Any]:
        """As JSON."""
        form: dict[str, Any] = msgspec.to_builtins(self)
        form["miscounts"] = [
            {**msgspec.structs.asdict(wrong), "digest": wrong.digest.hex()}
            for wrong in self.miscounts
        ]
        return form

    def lines(self) -> Iterator[str]:
        """For people: what deserves a look, then the sum."""
        for noun, names in (
            ("damaged", self.damaged),
            ("quarantined", self.quarantined),
            ("missing", self.missing),
            ("found again", self.found_again),
            ("orphan", self.orphans),
            ("leftover", self.leftovers),
            ("temporary", self.temporaries),
            ("foreign", self.foreign),
        ):
            yield from (f"{noun:12} {name}" for name in names)
        for wrong in self.miscounts:
            recorded = "no record" if wrong.recorded is None else f"recorded {wrong.recorded}"
            yield f"{'miscounted':12} {wrong.digest.hex()}: {recorded}, counted {wrong.counted}"
        yield (
            f"{self.checked:,} blobs and {self.checked_bytes:,} bytes checked, "
            f"{self.shards} of {SHARDS} shards walked" + ("" if self.finished else "; not finished")
        )


class _Verdict(Enum):
    GOOD = "good"
    DAMAGED = "damaged"
    MISSING = "missing"


@final
class _Look(msgspec.Struct, frozen=True):
    """What was seen of one blob, and of which file."""

    blob: Blob
    verdict: _Verdict
    placed: Placed | None


@final
class Scrub:
    """One scrub of a store: call `step` until it returns False, or stop whenever you like."""

    def __init__(
        self,
        store: Store,
        *,
        bytes_per_s: int = 0,
        dry_run: bool = False,
        progress: Callable[[int], None] | None = None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """`bytes_per_s` 0 is no limit; `progress` is called with the bytes checked so far.

        `wait` is called to wait so many seconds for the rate's sake. What it raises ends the
        step in the middle, with nothing recorded of the blobs it was at.
        """
        self._store = store
        self._dry_run = dry_run
        self._progress = progress
        self._pace = _Pace(bytes_per_s, wait) if bytes_per_s else None
        self._grace_us = store.settings.store.grace
        self.report = ScrubReport(dry_run=dry_run)
        with store.catalog.read() as snapshot:
            # What is verified from here on need not be seen again by this scrub.
            self._began_us = store.now_us(snapshot)
            mark = snapshot.get(Mark, _SHARD_MARK)
        # First those verified at this very moment, as all are while time stands still
        # (invariant 10): what this scrub verifies is of this moment then, and not to be seen
        # twice. The others follow, longest unverified first.
        self._prefix: Key = (self._began_us,)
        self._after: Key = ()
        self._blobs_left = True
        self._shard = int(mark.value) % SHARDS if mark and mark.value.isdigit() else 0

    def step(self) -> bool:
        """Do the next piece of work: some blobs, and a shard. False when all is done."""
        if self._blobs_left:
            self._blobs_left = self._check_some()
        if self.report.shards < SHARDS:
            self._walk_shard()
        if self._blobs_left or self.report.shards < SHARDS:
            return True
        if not self.report.finished:
            self._walk_other_folders()
            with self._store.catalog.inspect() as snapshot:
                self.report.miscounts = miscounts(snapshot)
            self.report.finished = True
        return False

    def look_at(self, digest: Digest) -> None:
        """Check one blob now, for somebody who met wrong bytes or none; whatever is wrong is
        written down and set aside as in any scrub."""
        with self._store.catalog.read() as snapshot:
            blob = snapshot.get(Blob, digest)
        if blob is None or blob.state == DELETING or not blob.local:
            return
        look = self._look(blob)
        if look is not None:
            self._settle([look])

    def walk_folders(self) -> None:
        """The walk of the folders alone, all of it at once: what the doctor looks at."""
        while self.report.shards < SHARDS:
            self._walk_shard()
        self._walk_other_folders()

    # --- blobs

    def _check_some(self) -> bool:
        """Check the next blobs, up to a batch; False when none is left."""
        with self._store.catalog.read() as snapshot:
            blobs = snapshot.range(
                Blob,
                "verified",
                prefix=self._prefix,
                after=self._after,
                before=() if self._prefix else (self._began_us,),
                limit=_BATCH_BLOBS,
            )
        if not blobs and self._prefix:
            self._prefix, self._after = (), ()
            return True
        looks: list[_Look] = []
        size_bytes = 0
        for blob in blobs:
            self._after = (blob.digest,) if self._prefix else (blob.verified_at, blob.digest)
            if blob.state == DELETING or not blob.local:
                continue
            look = self._look(blob)
            if look is not None:
                looks.append(look)
            size_bytes += blob.size_bytes
            if size_bytes >= _BATCH_BYTES:
                break
        self._settle(looks)
        return bool(blobs)

    def _look(self, blob: Blob) -> _Look | None:
        """Hash one blob; None when a writer replaced it meanwhile, and so knows better."""
        files, report = self._store.blobs, self.report
        seen = files.stat(blob.digest)
        if seen is None:
            return _Look(blob, _Verdict.MISSING, None)
        try:
            measured = files.check(blob.digest, blob.blake3, self._rate)
        except BlobMissing:
            return _Look(blob, _Verdict.MISSING, None)
        except OSError as error:
            if error.errno not in _BAD_DISK:
                # This process lacks descriptors, memory or rights: the blob is not to blame.
                raise
            return _Look(blob, _Verdict.DAMAGED, seen)
        report.checked += 1
        good = measured.digest == blob.digest and measured.size_bytes == blob.size_bytes
        if not good:
            return _Look(blob, _Verdict.DAMAGED, seen)
        known = seen == object_of(blob) and blob.missing_at is None
        # Of another file than the record knows, who brought it may not have synced it.
        if not known and files.sync_existing(blob.digest) != seen:
            return None
        return _Look(blob, _Verdict.GOOD, seen)

    def _rate(self, size_bytes: int) -> None:
        self.report.checked_bytes += size_bytes
        if self._pace is not None:
            self._pace.spend(size_bytes)
        if self._progress is not None:
            self._progress(self.report.checked_bytes)

    def _settle(self, looks: list[_Look]) -> None:
        """Write down what was seen, as far as it is still so, then set damage aside."""
        if not looks:
            return
        if self._dry_run:
            agreed = looks
        else:
            agreed = self._store.catalog.write(
                lambda txn: [look for look in looks if self._record(txn, look)], actor=_ACTOR
            )
        report = self.report
        for look in agreed:
            name = look.blob.digest.hex()
            if look.verdict is _Verdict.MISSING:
                report.missing.append(name)
            elif look.verdict is _Verdict.DAMAGED:
                report.damaged.append(name)
                aside = None if self._dry_run else self._set_aside(look)
                if aside is not None:
                    report.quarantined.append(str(aside))
            elif look.blob.missing_at is not None:
                report.found_again.append(name)

    def _record(self, txn: Transaction, look: _Look) -> bool:
        """Inside a transaction: note the verdict; False when somebody was there meanwhile."""
        blob = txn.get(Blob, look.blob.digest)
        if blob is None or blob.state == DELETING or not blob.local:
            return False
        if (blob.inode, blob.verified_at, blob.missing_at) != (
            look.blob.inode,
            look.blob.verified_at,
            look.blob.missing_at,
        ):
            return False  # a writer brought the bytes meanwhile
        if self._store.blobs.stat(blob.digest) != look.placed:
            return False
        if look.verdict is _Verdict.GOOD:
            assert look.placed is not None
            changed = msgspec.structs.replace(
                blob,
                inode=look.placed.inode,
                mtime_ns=look.placed.mtime_ns,
                verified_at=txn.now_us,
                missing_at=None,
            )
        elif blob.missing_at is None:
            changed = msgspec.structs.replace(blob, missing_at=txn.now_us)
        else:
            return True  # known already
        txn.replace(changed)
        return True

    def _set_aside(self, look: _Look) -> Path | None:
        """Move the damaged file to quarantine; None when a writer has healed it meanwhile.

        The record says `missing` by now (invariant 1). Alone, so that no writer can adopt the
        file between the look and the move; one that places its copy in that very moment
        finds it gone when it adopts, and brings it again.
        """

        def move(snapshot: Snapshot) -> Path | None:
            blob = snapshot.get(Blob, look.blob.digest)
            files = self._store.blobs
            if blob is None or blob.missing_at is None or files.stat(blob.digest) != look.placed:
                return None
            return files.quarantine(blob.digest)

        return self._store.catalog.alone(move)

    # --- folders

    def _walk_shard(self) -> None:
        """Walk one shard folder, and now and then write down which one is due next."""
        names: list[str] = []
        for entry in self._store.blobs.shard(self._shard):
            names.append(entry.name)
            if len(names) == _NAMES_AT_ONCE:
                self._judge(names)
                names = []
        self._judge(names)
        self._shard = (self._shard + 1) % SHARDS
        self.report.shards += 1
        if not self._dry_run and self._shard % _SHARDS_A_MARK == 0:
            self._store.catalog.write(self._put_mark, actor=_ACTOR)

    def _put_mark(self, txn: Transaction) -> None:
        mark = Mark(_SHARD_MARK, str(self._shard))
        if txn.get(Mark, _SHARD_MARK) is None:
            txn.insert(mark)
        else:
            txn.replace(mark)

    def _judge(self, names: list[str]) -> None:
        """Tell the entries of the present shard apart, and clear away what is over."""
        folder = self._store.root / "objects" / f"{self._shard:02x}"
        digests: list[Digest] = []
        for name in names:
            digest = _digest_named(name, self._shard)
            if digest is not None:
                digests.append(digest)
            elif is_temporary(name):
                self._clear_temporary(folder / name)
            else:
                self._tell_foreign(folder / name)
        with self._store.catalog.read() as snapshot:
            nameless = [digest for digest in digests if snapshot.get(Blob, digest) is None]
            leftovers = [digest for digest in digests if is_leftover(snapshot, digest)]
        for digest in nameless:
            self._clear_orphan(digest)
        for digest in leftovers:
            self._clear_leftover(digest)

    def _clear_orphan(self, digest: Digest) -> None:
        path = self._store.blobs.path(digest)
        found = _stat(path)
        if found is None:
            return
        if not modes.S_ISREG(found.st_mode):
            self._tell_foreign(path)
        elif self._is_over(found) and (
            self._dry_run or self._store.collector.doom_orphan(digest, found.st_size, found.st_ino)
        ):
            self.report.orphans.append(digest.hex())
            self.report.orphan_bytes += found.st_size

    def _clear_leftover(self, digest: Digest) -> None:
        """Remove what a crash left of an evicted blob; alone, as `replicas.evict` does it."""
        path = self._store.blobs.path(digest)
        found = _stat(path)
        if found is None or not modes.S_ISREG(found.st_mode) or not self._is_over(found):
            return
        seen = Placed.of(found)

        def unlink(snapshot: Snapshot) -> bool:
            files = self._store.blobs
            if not is_leftover(snapshot, digest) or files.stat(digest) != seen:
                return False  # somebody fetched it, or brought it, meanwhile
            files.remove_many([digest], durable=False)
            return True

        if self._dry_run or self._store.catalog.alone(unlink):
            self.report.leftovers.append(digest.hex())

    def _clear_temporary(self, path: Path) -> None:
        found = _stat(path)
        if found is not None and modes.S_ISREG(found.st_mode) and self._is_over(found):
            if not self._dry_run:
                self._store.disk.unlink(path)
            self.report.temporaries.append(str(path.relative_to(self._store.root)))

    def _walk_other_folders(self) -> None:
        """Temporaries outside the shards: of uploads, checkpoints and small files."""
        root = self._store.root
        for folder in (root, root / "objects", root / "catalog", root / "catalog/checkpoints"):
            for name in os.listdir(folder):
                if is_temporary(name):
                    self._clear_temporary(folder / name)

    def _tell_foreign(self, path: Path) -> None:
        if len(self.report.foreign) < _TOLD_MAX:
            self.report.foreign.append(str(path.relative_to(self._store.root)))

    def _is_over(self, found: os.stat_result) -> bool:
        """Whether a file was last changed, or linked, longer ago than the grace."""
        changed_us = max(found.st_ctime_ns, found.st_mtime_ns) // 1000
        return self._store.clock.now_us() - changed_us > self._grace_us


def _digest_named(name: str, shard: int) -> Digest | None:
    """The digest that an object's name spells, None for a name that has no place there."""
    try:
        digest = parse_digest(name)
    except InvalidDigest:
        return None
    return digest if digest[0] == shard else None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


@final
class _Pace:
    """Keeps to so many bytes a second, measured from when it began or last caught up."""

    def __init__(self, bytes_per_s: int, wait: Callable[[float], object]) -> None:
        self._bytes_per_s = bytes_per_s
        self._wait = wait
        self._free_at_s = time.monotonic()

    def spend(self, size_bytes: int) -> None:
        """Wait until these bytes may have been read."""
        now_s = time.monotonic()
        # Time in which nothing was read is not saved up.
        self._free_at_s = max(self._free_at_s, now_s) + size_bytes / self._bytes_per_s
        self._wait(self._free_at_s - now_s)
