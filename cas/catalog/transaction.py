"""Transaction: one write of a group, and what the catalog keeps true by itself in it.

Reference counts (invariant 3), the usage of tenants, totals, and the rows of blobs at
targets (invariant 6) change with the records that they speak of, in the same transaction and
the same frame: no caller can forget them, and none needs to know the configuration.
"""

from __future__ import annotations

from typing import TypeVar, cast, final

import lmdb
import msgspec

from cas import rows
from cas.catalog import Key
from cas.catalog.images import encode, put_record
from cas.catalog.layout import LAYOUTS, NO_SHARE, Layout, record_state
from cas.catalog.snapshot import LmdbSnapshot
from cas.catalog.tuples import Value, pack
from cas.digest import Digest
from cas.errors import BlobDeleting, IndexDamaged, NotFound, RecordExists
from cas.records import (
    CONDEMNED,
    DELETING,
    LIVE,
    TARGETS_MAX,
    Blob,
    Record,
    Replica,
    Target,
    Total,
    Usage,
)

R = TypeVar("R", bound=Record)

_BLOBS = LAYOUTS[Blob]
_USAGE = LAYOUTS[Usage]
_TOTALS = LAYOUTS[Total]
_TARGETS = LAYOUTS[Target]
_REPLICAS = LAYOUTS[Replica]


@final
class _Waiting:
    """A record changed by a write and not put into the index yet: what is there, and what
    is to be."""

    __slots__ = ("new", "old", "raw")

    def __init__(self, raw: bytes | None, old: Record | None) -> None:
        self.raw = raw  # of `old`, as it is stored
        self.old = old
        self.new = old


@final
class LmdbTransaction(LmdbSnapshot):
    """Reads and writes of one write of a group. See `cas.catalog.Transaction`.

    `finish` ends it. Then `ops` has the after-images for the journal; a record touched
    twice is there once.

    Records without unique keys (blobs, above all) reach the index when the write ends, or
    asks for a range of them: a blob that is made, counted and revived in one write is
    encoded and indexed once.
    """

    __slots__ = ("_believed", "_now_us", "_targets", "_waiting", "delta", "ops")

    def __init__(self, txn: lmdb.Transaction[bytes], now_us: int, *, believed: bool = True) -> None:
        super().__init__(txn)
        self._believed = believed
        self._now_us = now_us
        self._waiting: dict[Layout, dict[bytes, _Waiting]] = {}
        self._targets: list[str] | None = None  # their names, once somebody asked
        self.ops: dict[tuple[int, bytes], bytes | None] = {}
        self.delta = 0  # to the state digest

    @property
    def now_us(self) -> int:
        return self._now_us

    @property
    def believed(self) -> bool:
        return self._believed

    def get(self, kind: type[R], *key: Value) -> R | None:
        return cast(R | None, self._current(LAYOUTS[kind], pack(key)).new)

    def range(
        self,
        kind: type[R],
        index: str,
        prefix: Key = (),
        *,
        after: Key = (),
        before: Key = (),
        limit: int = 100,
        bytes_max: int | None = None,
        reverse: bool = False,
    ) -> list[R]:
        self._settle(LAYOUTS[kind])
        return super().range(
            kind,
            index,
            prefix,
            after=after,
            before=before,
            limit=limit,
            bytes_max=bytes_max,
            reverse=reverse,
        )

    def insert(self, record: Record) -> None:
        layout = LAYOUTS[type(record)]
        values = layout.key_values(record)
        key = pack(values)
        current = self._current(layout, key)
        if current.new is not None:
            raise RecordExists(record.schema.table, values)
        if isinstance(record, Blob):
            record = msgspec.structs.replace(record, refcount=0)
        self._change(layout, key, current, record)

    def replace(self, record: Record) -> None:
        layout = LAYOUTS[type(record)]
        key, current = self._existing(layout, record)
        if isinstance(current.new, Blob):
            record = _counted(current.new, cast(Blob, record))
        self._change(layout, key, current, record)

    def delete(self, record: Record) -> None:
        layout = LAYOUTS[type(record)]
        key, current = self._existing(layout, record)
        if isinstance(current.new, Blob) and current.new.refcount:
            raise ValueError(
                f"blob {current.new.digest.hex()} has {current.new.refcount} references"
            )
        self._change(layout, key, current, None)

    def finish(self) -> None:
        """Put what still waits into the index; nothing may be changed afterwards."""
        for layout in self._waiting:
            self._settle(layout)

    def _current(self, layout: Layout, key: bytes) -> _Waiting:
        """The record as this write sees it (`new`), and how it is in the index."""
        waiting = self._waiting.get(layout)
        if waiting is not None and key in waiting:
            return waiting[key]
        raw = self._raw(layout, key)
        return _Waiting(raw, None if raw is None else layout.read(raw))

    def _existing(self, layout: Layout, record: Record) -> tuple[bytes, _Waiting]:
        values = layout.key_values(record)
        key = pack(values)
        current = self._current(layout, key)
        if current.new is None:
            raise NotFound(record.schema.table, repr(values))
        return key, current

    def _change(self, layout: Layout, key: bytes, current: _Waiting, record: Record | None) -> None:
        old = current.new
        keys = [] if record is None else layout.entry_keys(record)  # ValueError when too long
        if record is not None:
            self._refuse(layout, key, old, record, keys)
        self._count(layout, old, record)
        self._account(layout, old, record)
        self._add_up(layout, old, record)
        current.new = record
        if layout.has_unique:
            # At once: its unique values must be taken when the next record asks for them.
            self._put(layout, key, current, keys)
            return
        self._wait(layout, key, current)
        if layout is _TARGETS:
            self._targets = None
        elif layout is _BLOBS and record is None:
            self._release(cast(Blob, old))

    def _refuse(
        self,
        layout: Layout,
        key: bytes,
        old: Record | None,
        new: Record,
        keys: list[bytes | None],
    ) -> None:
        """Raise what speaks against `new` before anything is changed.

        A write may catch the error and go on, and must then find nothing half done.
        """
        if layout.has_unique:
            for entry, now in zip(layout.entries, keys, strict=True):
                if entry.unique and now is not None and self._txn.get(now) not in (None, key):
                    raise RecordExists(layout.kind.schema.table, entry.values(new))
        if layout.digests is None:
            return
        held = () if old is None else layout.digests(old)
        for digest in layout.digests(new):
            if digest is None:
                continue
            blob = cast(Blob | None, self._current(_BLOBS, pack((digest,))).new)
            if blob is None:
                raise NotFound("blob", digest.hex())
            if digest not in held and blob.state == DELETING:
                raise BlobDeleting(digest.hex())

    def _wait(self, layout: Layout, key: bytes, current: _Waiting) -> None:
        self._waiting.setdefault(layout, {})[key] = current

    def _settle(self, layout: Layout) -> None:
        """Put what waits of one table into the index."""
        waiting = self._waiting.get(layout)
        if not waiting:
            return
        for key, current in waiting.items():
            keys = [] if current.new is None else layout.entry_keys(current.new)
            self._put(layout, key, current, keys)
        waiting.clear()

    def _put(self, layout: Layout, key: bytes, current: _Waiting, keys: list[bytes | None]) -> None:
        raw = None if current.new is None else encode(current.new)
        if raw == current.raw:
            return
        if current.raw is not None:
            self.delta -= record_state(layout.number, key, current.raw)
        if raw is not None:
            self.delta += record_state(layout.number, key, raw)
        was = [] if current.old is None else layout.entry_keys(current.old)
        put_record(self._txn, layout, key, was, keys, raw)
        self.ops[layout.number, key] = raw

    def _count(self, layout: Layout, old: Record | None, new: Record | None) -> None:
        """Keep `blobs.refcount` equal to the digest fields that name the blob (invariant 3)."""
        if layout.digests is None:
            return
        before = [] if old is None else [d for d in layout.digests(old) if d is not None]
        after = [] if new is None else [d for d in layout.digests(new) if d is not None]
        if before == after:
            return
        for digest in after:
            self._refer(digest, +1)
        for digest in before:
            self._refer(digest, -1)

    def _refer(self, digest: Digest, count: int) -> None:
        key = pack((digest,))
        current = self._current(_BLOBS, key)
        blob = cast(Blob | None, current.new)
        if blob is None:
            raise IndexDamaged(f"blob {digest.hex()} has references and no record")
        refcount = blob.refcount + count
        if refcount < 0:
            raise IndexDamaged(f"blob {digest.hex()} has fewer references than are released")
        condemned = refcount == 0
        current.new = msgspec.structs.replace(
            blob,
            refcount=refcount,
            state=CONDEMNED if condemned else LIVE,
            condemned_at=self._now_us if condemned else None,
        )
        self._wait(_BLOBS, key, current)
        if not blob.refcount:
            self._wish(blob)

    def _account(self, layout: Layout, old: Record | None, new: Record | None) -> None:
        """Keep `usage` equal to what the records of each tenant add up to."""
        if layout.shares is None:
            return
        before = NO_SHARE if old is None else layout.shares(old)
        after = NO_SHARE if new is None else layout.shares(new)
        if before == after:
            return
        if before[0] == after[0]:
            self._use(after[0], after[1] - before[1], after[2] - before[2])
            return
        if before[0]:
            self._use(before[0], -before[1], -before[2])
        if after[0]:
            self._use(after[0], after[1], after[2])

    def _use(self, tenant_id: str, files: int, size_bytes: int) -> None:
        key = pack((tenant_id,))
        current = self._current(_USAGE, key)
        usage = cast(Usage | None, current.new)
        if usage is not None:
            files += usage.files
            size_bytes += usage.size_bytes
        # Below zero only after a miscount: doctor names it, and it must not keep anybody
        # from deleting.
        files, size_bytes = max(files, 0), max(size_bytes, 0)
        current.new = Usage(tenant_id, files, size_bytes) if files or size_bytes else None
        self._wait(_USAGE, key, current)

    def _add_up(self, layout: Layout, old: Record | None, new: Record | None) -> None:
        """Keep each `Total` equal to what the records add to it."""
        for adds in layout.adds:
            before = None if old is None else adds.part(old)
            after = None if new is None else adds.part(new)
            if before == after:
                continue
            if before is not None:
                self._sum(before[0], -1, -before[1])
            if after is not None:
                self._sum(after[0], 1, after[1])

    def _sum(self, name: str, count: int, size_bytes: int) -> None:
        key = pack((name,))
        current = self._current(_TOTALS, key)
        total = cast(Total | None, current.new)
        if total is not None:
            count += total.count
            size_bytes += total.size_bytes
        # Below zero only after a miscount, as with usage.
        count, size_bytes = max(count, 0), max(size_bytes, 0)
        current.new = Total(name, count, size_bytes) if count or size_bytes else None
        self._wait(_TOTALS, key, current)

    def _wish(self, blob: Blob) -> None:
        """Have a blob that has become live copied to each target (invariant 6)."""
        for target in self._target_names():
            key = pack((target, blob.digest))
            current = self._current(_REPLICAS, key)
            row = rows.wished(
                cast(Replica | None, current.new),
                target,
                blob.digest,
                blob.size_bytes,
                self._now_us,
                self.position.seq + 1,
            )
            self._set_row(key, current, row)

    def _release(self, blob: Blob) -> None:
        """Have the copies of a blob whose record goes deleted in their time."""
        for target in self._target_names():
            key = pack((target, blob.digest))
            current = self._current(_REPLICAS, key)
            row = cast(Replica | None, current.new)
            if row is not None:
                self._set_row(key, current, rows.released(row, self._now_us, self.position.seq + 1))

    def _set_row(self, key: bytes, current: _Waiting, row: Replica | None) -> None:
        if row is current.new:
            return
        self._add_up(_REPLICAS, current.new, row)
        current.new = row
        self._wait(_REPLICAS, key, current)

    def _target_names(self) -> list[str]:
        if self._targets is None:
            found = self.range(Target, "", limit=TARGETS_MAX)
            self._targets = [target.name for target in found]
        return self._targets


def _counted(old: Blob, new: Blob) -> Blob:
    """`new` with the count that the catalog keeps, whatever the caller read or made up."""
    if new.state == DELETING and old.refcount:
        raise ValueError(f"blob {old.digest.hex()} has {old.refcount} references")
    return msgspec.structs.replace(new, refcount=old.refcount)
