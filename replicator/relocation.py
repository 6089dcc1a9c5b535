"""Relocation: what must change in the records of a catalog that came from a target.

No bytes are here. A blob with a verified copy at a target is evicted, as if it had been here;
one without is looked for at the target that the restore is from, and listed as missing where
it is not. Resumable uploads that were under way have lost what they had sent. All of it is
done in the order of digests, blob by blob beside its rows, so that it takes constant memory.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Final, cast, final

import msgspec
from msgspec.structs import replace

from cas import rows
from cas.catalog import pages
from cas.catalog.images import encode
from cas.catalog.layout import LAYOUTS
from cas.catalog.rebase import Rewrite
from cas.catalog.snapshot import LmdbSnapshot
from cas.catalog.tuples import pack
from cas.digest import Digest
from cas.records import (
    DELETING,
    DONE,
    Blob,
    Copy,
    Mark,
    Partial,
    Record,
    Replica,
    StoredFile,
    Total,
    Usage,
)
from cas.records import Target as TargetRecord
from cas.totals import backlog_of
from replicator.listing import Listing
from replicator.reading import read_back
from replicator.targets import BytesDiffer, ObjectAbsent, Target

_LOOKED_AT_ONCE: Final = 16
_PAGE: Final = 2000  # blobs
_LISTED_ABOVE: Final = 1000  # copies that must be looked for; fewer are asked for one by one
_BLOB, _ROW = LAYOUTS[Blob], LAYOUTS[Replica]

Raw = tuple[bytes, bytes, Record]  # packed key, bytes, and what they say


@final
class Counted(msgspec.Struct):
    """What the relocation met."""

    files: int = 0
    blobs: int = 0
    size_bytes: int = 0
    missing: list[str] = msgspec.field(default_factory=list)  # digests, the first of them
    missing_blobs: int = 0
    partials: int = 0


_MISSING_TOLD: Final = 1000


@final
class Relocation:
    """Yields the changes for one restored catalog; `counted` is right when it has ended."""

    def __init__(
        self,
        target: Target,
        name: str,
        now_us: int,
        marks: list[Mark],
        *,
        new_name: str = "",
        distrust: bool,
    ) -> None:
        """`name` is what the records call `target`; they call it `new_name` from now on. With
        `distrust` no rows are believed, since they are older than what may have been deleted
        since: only what is seen at `target` counts as held."""
        self._target = target
        self._name = name
        self.name = new_name or name  # by which the records know it at the end
        # Whether it rests on what was seen there, and not on rows that its HEAD vouches for.
        self.has_doubted = distrust
        self._revived: set[Digest] = set()
        self._now_us = now_us
        self._marks = marks
        self._distrust = distrust
        self._sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.counted = Counted()

    def __call__(self, snapshot: LmdbSnapshot) -> Iterator[Rewrite]:
        self._seq = snapshot.position.seq
        self._known = snapshot.get(TargetRecord, self._name) is not None
        if snapshot.get(TargetRecord, self.name) is not None:
            self.name = self._name  # so they call another one
        self._listing = self._list_of(snapshot)
        blobs = self._blobs(snapshot)
        with ThreadPoolExecutor(_LOOKED_AT_ONCE, thread_name_prefix="look") as pool:
            while some := list(itertools.islice(blobs, _PAGE)):
                there = self._look(some, pool)
                for blob, found in some:
                    yield from self._blob(blob, found, there)
        yield from self._targets(snapshot)
        yield from self._endings(snapshot)
        yield from self._copies(snapshot)
        yield from self._partials(snapshot)
        yield from self._totals(snapshot)
        yield from self._set_marks(snapshot)
        self.counted.files = sum(1 for _ in snapshot.records(StoredFile))

    # --- what is at the target

    def _list_of(self, snapshot: LmdbSnapshot) -> Listing | None:
        """What the target has, where asking for each doubted blob would take longer."""
        waiting = backlog_of(snapshot, self._name).count
        if self._distrust or not self._known or waiting > _LISTED_ABOVE:
            return Listing(self._target)
        return None

    def _look(self, some: list[tuple[Raw, list[Raw]]], pool: ThreadPoolExecutor) -> set[Digest]:
        """The digests of blobs without a copy that is believed in, whose bytes are there."""
        there: set[Digest] = set()
        doubted: list[Digest] = []
        for (_, _, record), found in some:
            blob = cast(Blob, record)
            if blob.state == DELETING or self._held(found):
                continue
            if self._listing is not None and self._listing.size_of(blob.digest) != blob.size_bytes:
                continue
            rows_here = (cast(Replica, row) for _, _, row in found)
            if any(row.held and row.target == self._name for row in rows_here):
                there.add(blob.digest)  # verified once, and there with the right length still
            else:
                doubted.append(blob.digest)
        good = pool.map(self._is_good, doubted)
        return there | {digest for digest, well in zip(doubted, good, strict=True) if well}

    def _is_good(self, digest: Digest) -> bool:
        try:
            read_back(self._target, digest)
        except (ObjectAbsent, BytesDiffer):
            return False
        return True

    def _held(self, found: list[Raw]) -> bool:
        return not self._distrust and any(cast(Replica, row).held for _, _, row in found)

    # --- blobs and rows

    def _blobs(self, snapshot: LmdbSnapshot) -> Iterator[tuple[Raw, list[Raw]]]:
        """Every blob with its rows, in the order of digests."""
        names = [target.name for target in snapshot.range(TargetRecord, "", limit=10_000)]
        streams = [_Rows(snapshot, name) for name in names]
        for _, key, raw in snapshot.records(Blob):
            blob = cast(Blob, _BLOB.read(raw))
            found = [row for stream in streams if (row := stream.of(blob.digest))]
            yield (key, raw, blob), found

    def _blob(self, raw_blob: Raw, found: list[Raw], there: set[Digest]) -> Iterator[Rewrite]:
        key, raw, record = raw_blob
        blob = cast(Blob, record)
        at_home = blob.digest in there
        held = at_home or self._held(found)
        away = replace(blob, local=False, inode=0, mtime_ns=0)
        if blob.state != DELETING:
            away = replace(
                away,
                evicted_at=self._now_us if held else None,
                missing_at=None if held else blob.missing_at or self._now_us,
            )
            self._count(away, held)
        self._add(blob, -1)
        self._add(away, +1)
        yield _BLOB.number, key, raw, encode(away)
        yield from self._rows(blob, found, at_home)

    def _count(self, blob: Blob, held: bool) -> None:
        counted = self.counted
        counted.blobs += 1
        counted.size_bytes += blob.size_bytes
        if not held and blob.refcount:
            counted.missing_blobs += 1
            if len(counted.missing) < _MISSING_TOLD:
                counted.missing.append(blob.digest.hex())

    def _rows(self, blob: Blob, found: list[Raw], at_home: bool) -> Iterator[Rewrite]:
        """The rows of a blob, as far as it is known now what they tell of."""
        at_all = False
        for key, raw, record in found:
            row = cast(Replica, record)
            mine = row.target == self._name
            at_all = at_all or mine
            if row.removed_at is None:
                yield from self._row(key, raw, row, self._seen(row, at_home and mine))
            elif at_home and mine:
                # It came back while its DELETE was due, which this node must not send: these
                # may be its only bytes.
                self.has_doubted = True
                self._revived.add(blob.digest)
                now = replace(row, removed_at=None, ending=None)
                yield from self._row(key, raw, row, rows.verified(now, self._now_us, self._seq))
        if at_home and not at_all:
            row = rows.wished(
                None, self.name, blob.digest, blob.size_bytes, self._now_us, self._seq
            )
            now = rows.verified(row, self._now_us, self._seq)
            yield _ROW.number, pack(_ROW.key_values(now)), None, encode(now)

    def _row(self, key: bytes, raw: bytes, row: Replica, now: Replica) -> Iterator[Rewrite]:
        if row.target == self._name != self.name:
            now = replace(
                now,
                target=self.name,
                queue=now.queue and self.name,
                ending=now.ending and self.name,
            )
        if now == row:
            return
        self._add(row, -1)
        self._add(now, +1)
        if now.target == row.target:
            yield _ROW.number, key, raw, encode(now)
        else:
            yield _ROW.number, key, raw, None
            yield _ROW.number, pack(_ROW.key_values(now)), None, encode(now)

    def _seen(self, row: Replica, at_home: bool) -> Replica:
        if at_home:
            return row if row.held else rows.verified(row, self._now_us, self._seq)
        if self._distrust and row.state == DONE:
            return rows.lost(row, self._now_us, self._seq)
        return row

    def _endings(self, snapshot: LmdbSnapshot) -> Iterator[Rewrite]:
        """Copies that no blob needs: the node before may have begun to delete them since, so
        that they are there no more for a blob that comes back."""
        for ending in chain.from_iterable(pages(snapshot, Replica, "ending")):
            if ending.target == self._name and ending.digest in self._revived:
                continue
            for key, raw in snapshot.under(Replica, (ending.target, ending.digest)):
                yield from self._row(key, raw, ending, rows.lost(ending, self._now_us, self._seq))

    # --- where the target is, and uploads to it

    def _targets(self, snapshot: LmdbSnapshot) -> Iterator[Rewrite]:
        """The target has the address and the name by which this node reaches it."""
        key, place = pack((self.name,)), self._target.place
        for layout, old_key, raw in snapshot.records(TargetRecord):
            record = cast(TargetRecord, layout.read(raw))
            if record.name != self._name or (record.place == place and old_key == key):
                continue
            # Another address may be another server, so it is probed again.
            profile = record.profile if record.place == place else b""
            now = encode(replace(record, name=self.name, place=place, profile=profile))
            if old_key == key:
                yield layout.number, key, raw, now
            else:
                yield layout.number, old_key, raw, None
                yield layout.number, key, None, now
        if not self._known:
            # The rows of what is not there are made by the backfill.
            yield (
                LAYOUTS[TargetRecord].number,
                key,
                None,
                encode(TargetRecord(self.name, place, self._now_us)),
            )

    def _copies(self, snapshot: LmdbSnapshot) -> Iterator[Rewrite]:
        """Nothing goes on with the uploads of another node; what they left there is aborted."""
        for layout, key, raw in snapshot.records(Copy):
            yield layout.number, key, raw, None

    # --- what lost its bytes, and the sums

    def _partials(self, snapshot: LmdbSnapshot) -> Iterator[Rewrite]:
        lost: Counter[str] = Counter()
        for layout, key, raw in snapshot.records(Partial):
            partial = cast(Partial, layout.read(raw))
            lost[partial.tenant_id] += partial.offset_bytes
            self.counted.partials += 1
            yield layout.number, key, raw, None
        if not lost:
            return
        for layout, key, raw in snapshot.records(Usage):
            usage = cast(Usage, layout.read(raw))
            if lost[usage.tenant_id]:
                less = replace(usage, size_bytes=max(usage.size_bytes - lost[usage.tenant_id], 0))
                kept = encode(less) if less.files or less.size_bytes else None
                yield layout.number, key, raw, kept

    def _add(self, record: Blob | Replica, sign: int) -> None:
        for part in filter(None, (adds.part(record) for adds in record.schema.adds)):
            total = self._sums[part[0]]
            total[0] += sign
            total[1] += sign * part[1]

    def _totals(self, snapshot: LmdbSnapshot) -> Iterator[Rewrite]:
        stated = {
            cast(Total, layout.read(raw)).name: (key, raw)
            for layout, key, raw in snapshot.records(Total)
        }
        for name, (count, size_bytes) in self._sums.items():
            key, raw = stated.get(name, (pack((name,)), None))
            before = Total(name, 0, 0) if raw is None else cast(Total, LAYOUTS[Total].read(raw))
            now = Total(name, before.count + count, before.size_bytes + size_bytes)
            if now != before:
                kept = encode(now) if now.count or now.size_bytes else None
                yield LAYOUTS[Total].number, key, raw, kept

    def _set_marks(self, snapshot: LmdbSnapshot) -> Iterator[Rewrite]:
        stated = {key: raw for _, key, raw in snapshot.records(Mark)}
        for mark in self._marks:
            key = pack((mark.name,))
            yield LAYOUTS[Mark].number, key, stated.get(key), encode(mark)


@final
class _Rows:
    """The rows of one target, asked for in the order of digests."""

    def __init__(self, snapshot: LmdbSnapshot, target: str) -> None:
        self._records = snapshot.under(Replica, (target,))
        self._next: Raw | None = None
        self._advance()

    def of(self, digest: Digest) -> Raw | None:
        while self._next is not None and cast(Replica, self._next[2]).digest < digest:
            self._advance()
        if self._next is not None and cast(Replica, self._next[2]).digest == digest:
            return self._next
        return None

    def _advance(self) -> None:
        found = next(self._records, None)
        self._next = None if found is None else (*found, _ROW.read(found[1]))
