"""The index: every record in one LMDB environment, ready to be read and thrown away.

    key                                        value
    00 00                                      Head: position in the journal (msgpack)
    table 00  packed primary key               XXH3-64 of what follows, record (msgpack)
    table n   packed values of index n         packed primary key

`table` is the record type's number, `n` counts its unique keys and indexes from 1 in the
order of the schema page. LMDB keeps no checksums, so each record carries one, and an index
entry is believed only when the record it leads to has the values that it stands for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast, final

import blake3
import lmdb
import msgspec
import xxhash

from cas.catalog import Key, Position
from cas.catalog.tuples import Value, pack
from cas.digest import Digest
from cas.errors import BlobDeleting, IndexDamaged, NotFound, RecordExists
from cas.records import CONDEMNED, DELETING, LIVE, RECORDS, Blob, Record

R = TypeVar("R", bound=Record)

MAP_BYTES = 1 << 40  # sparse address space, not disk: the map never has to grow in flight
READERS_MAX = 8192  # slots shared by all threads of all processes; 64 bytes each

STATE_BYTES = 16
_STATE_MODULUS = 1 << (8 * STATE_BYTES)
_CHECKSUM_BYTES = 8
_HEAD_KEY = b"\x00\x00"
_END = b"\xff"  # sorts after every component code

_encode = msgspec.msgpack.Encoder().encode


@final
class Head(msgspec.Struct, frozen=True, array_like=True):
    """How far the index has followed the journal."""

    position: Position
    segment_epoch: int  # the segment that holds the frame of `position`
    segment_first_seq: int
    frame_start: int  # byte offsets of that frame in the segment
    frame_end: int
    schema: str  # fingerprint of the schema page that the index was built by
    failed: str = ""  # why nobody may write until the catalog is reopened


_decode_head = msgspec.msgpack.Decoder(Head).decode


@final
class _Entry:
    """One unique key or index of a type: how to compute its key from a record."""

    __slots__ = ("fields", "name", "partial", "prefix", "unique", "values")

    def __init__(self, prefix: bytes, name: str, fields: tuple[str, ...], unique: bool) -> None:
        self.prefix = prefix
        self.name = name
        self.fields = fields
        self.unique = unique
        self.values = _getter(fields)

    def key(self, record: Record) -> bytes | None:
        """The entry's key, None when the record is left out of it."""
        values = self.values(record)
        return None if values[0] is None else self.prefix + pack(values)


def _getter(fields: tuple[str, ...]) -> Callable[[Record], tuple[Any, ...]]:
    if len(fields) > 1:
        return operator.attrgetter(*fields)
    single = operator.attrgetter(fields[0])
    return lambda record: (single(record),)


@final
class Layout:
    """A record type compiled for the index."""

    __slots__ = (
        "decode",
        "digests",
        "entries",
        "indexes",
        "key_values",
        "kind",
        "number",
        "prefix",
    )

    def __init__(self, kind: type[Record]) -> None:
        schema = kind.schema
        self.kind = kind
        self.number = schema.number
        self.prefix = bytes((schema.number, 0))
        self.key_values = _getter(schema.key)
        self.decode = msgspec.msgpack.Decoder(kind).decode
        self.digests = _getter(schema.digests) if schema.digests else None
        names = [(name, fields, True) for name, fields in schema.unique.items()]
        names += [(name, fields, False) for name, fields in schema.indexes.items()]
        self.entries = [
            _Entry(bytes((schema.number, number)), name, fields, unique)
            for number, (name, fields, unique) in enumerate(names, start=1)
        ]
        self.indexes = {entry.name: entry for entry in self.entries}


LAYOUTS: dict[type[Record], Layout] = {kind: Layout(kind) for kind in RECORDS}
LAYOUT_OF_NUMBER: dict[int, Layout] = {layout.number: layout for layout in LAYOUTS.values()}
_BLOBS = LAYOUTS[Blob]

SCHEMA = blake3.blake3(
    repr(
        [
            (layout.number, [(entry.name, entry.fields) for entry in layout.entries])
            for layout in LAYOUTS.values()
        ]
    ).encode()
).hexdigest(length=8)


def record_state(number: int, key: bytes, record: bytes) -> int:
    """What one record adds to the state digest."""
    digest = blake3.blake3(bytes((number,)) + key + record).digest(length=STATE_BYTES)
    return int.from_bytes(digest, "big")


def add_state(state: bytes, delta: int) -> bytes:
    """The state digest after records worth `delta` came (or went: negative)."""
    total = (int.from_bytes(state, "big") + delta) % _STATE_MODULUS
    return total.to_bytes(STATE_BYTES, "big")


def _sealed(record: bytes) -> bytes:
    return xxhash.xxh3_64_digest(record) + record


def _unsealed(value: bytes, key: bytes) -> bytes:
    record = value[_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(record) != value[:_CHECKSUM_BYTES]:
        raise IndexDamaged(f"record at key {key.hex()} fails its checksum")
    return record


class LmdbSnapshot:
    """Reads in one LMDB transaction. See `cas.catalog.Snapshot`."""

    __slots__ = ("_txn",)

    def __init__(self, txn: lmdb.Transaction[bytes]) -> None:
        self._txn = txn

    def get(self, kind: type[R], *key: Value) -> R | None:
        layout = LAYOUTS[kind]
        raw = self._raw(layout, pack(key))
        return None if raw is None else cast(R, layout.decode(raw))

    def find(self, kind: type[R], unique: str, *values: Value) -> R | None:
        layout = LAYOUTS[kind]
        entry = layout.indexes[unique]
        primary = self._txn.get(entry.prefix + pack(values))
        if primary is None:
            return None
        record = self._led_to(layout, primary)
        if entry.values(record) != values:
            # Also where two values over 128 bytes met in one key: refused, never mixed up.
            raise IndexDamaged(f"{kind.schema.table}.{unique} leads to another record")
        return cast(R, record)

    def range(
        self,
        kind: type[R],
        index: str,
        prefix: Key = (),
        *,
        after: Key = (),
        before: Key = (),
        limit: int = 100,
        reverse: bool = False,
    ) -> list[R]:
        layout = LAYOUTS[kind]
        entry = layout.indexes[index] if index else None
        head = (entry.prefix if entry else layout.prefix) + pack(prefix)
        low = head + (pack(after) + _END if after else b"")
        high = head + (pack(before) if before else _END)
        found: list[R] = []
        with self._txn.cursor() as cursor:
            for key, value in _walk(cursor, low, high, reverse):
                if len(found) >= limit:
                    break
                if entry is None:
                    record = layout.decode(_unsealed(value, key))
                else:
                    record = self._led_to(layout, value)
                    if entry.key(record) != key:
                        raise IndexDamaged(f"{kind.schema.table}.{index} leads to another record")
                found.append(cast(R, record))
        return found

    @property
    def position(self) -> Position:
        return self.head.position

    @property
    def head(self) -> Head:
        """Where the index stands; raises IndexDamaged when that cannot be read."""
        value = self._txn.get(_HEAD_KEY)
        if value is None:
            raise IndexDamaged("it has no head")
        try:
            return _decode_head(_unsealed(value, _HEAD_KEY))
        except msgspec.DecodeError as error:
            raise IndexDamaged(f"its head is not readable: {error}") from None

    def records(self) -> Iterator[tuple[Layout, bytes, bytes]]:
        """Every (layout, packed primary key, record bytes), in order of table and key."""
        with self._txn.cursor() as cursor:
            for layout in LAYOUTS.values():
                for key, value in _walk(cursor, layout.prefix, layout.prefix + _END, False):
                    yield layout, key[2:], _unsealed(value, key)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry of every unique key and index, as it stands."""
        with self._txn.cursor() as cursor:
            for layout in LAYOUTS.values():
                for entry in layout.entries:
                    yield from _walk(cursor, entry.prefix, entry.prefix + _END, False)

    def _raw(self, layout: Layout, key: bytes) -> bytes | None:
        full = layout.prefix + key
        value = self._txn.get(full)
        return None if value is None else _unsealed(value, full)

    def _led_to(self, layout: Layout, primary: bytes) -> Record:
        raw = self._raw(layout, primary)
        if raw is None:
            raise IndexDamaged(f"an entry of {layout.kind.schema.table} leads to no record")
        return layout.decode(raw)


def _walk(
    cursor: lmdb.Cursor[bytes], low: bytes, high: bytes, reverse: bool
) -> Iterator[tuple[bytes, bytes]]:
    """The entries with low <= key < high, in order or in reverse."""
    if not reverse:
        if cursor.set_range(low):
            for key, value in cursor.iternext():
                if key >= high:
                    return
                yield key, value
        return
    if cursor.prev() if cursor.set_range(high) else cursor.last():
        for key, value in cursor.iterprev():
            if key < low:
                return
            yield key, value


@final
class LmdbTransaction(LmdbSnapshot):
    """Reads and writes of one write of a group. See `cas.catalog.Transaction`.

    `ops` gathers the after-images for the journal; a record touched twice is there once.
    """

    __slots__ = ("_now_us", "delta", "ops")

    def __init__(self, txn: lmdb.Transaction[bytes], now_us: int) -> None:
        super().__init__(txn)
        self._now_us = now_us
        self.ops: dict[tuple[int, bytes], bytes | None] = {}
        self.delta = 0  # to the state digest

    @property
    def now_us(self) -> int:
        return self._now_us

    def insert(self, record: Record) -> None:
        layout = LAYOUTS[type(record)]
        values = layout.key_values(record)
        key = pack(values)
        if self._txn.get(layout.prefix + key) is not None:
            raise RecordExists(record.schema.table, values)
        self._count(layout, None, record)
        self._store(layout, key, None, None, record)

    def replace(self, record: Record) -> None:
        layout = LAYOUTS[type(record)]
        key, raw, old = self._existing(layout, record)
        self._count(layout, old, record)
        self._store(layout, key, raw, old, record)

    def delete(self, record: Record) -> None:
        layout = LAYOUTS[type(record)]
        key, raw, old = self._existing(layout, record)
        self._count(layout, old, None)
        self._store(layout, key, raw, old, None)

    def _existing(self, layout: Layout, record: Record) -> tuple[bytes, bytes, Record]:
        values = layout.key_values(record)
        key = pack(values)
        raw = self._raw(layout, key)
        if raw is None:
            raise NotFound(record.schema.table, repr(values))
        return key, raw, layout.decode(raw)

    def _store(
        self,
        layout: Layout,
        key: bytes,
        old_raw: bytes | None,
        old: Record | None,
        new: Record | None,
    ) -> None:
        raw = None if new is None else _encode(new)
        if raw == old_raw:
            return
        if old_raw is not None:
            self.delta -= record_state(layout.number, key, old_raw)
        if raw is not None:
            self.delta += record_state(layout.number, key, raw)
        put_record(self._txn, layout, key, old, new, raw)
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
        raw = self._raw(_BLOBS, key)
        if raw is None:
            raise NotFound("blob", digest.hex())
        blob = cast(Blob, _BLOBS.decode(raw))
        if blob.state == DELETING and count > 0:
            raise BlobDeleting(digest.hex())
        refcount = blob.refcount + count
        if refcount < 0:
            raise IndexDamaged(f"blob {digest.hex()} has fewer references than are released")
        condemned = refcount == 0
        changed = msgspec.structs.replace(
            blob,
            refcount=refcount,
            state=CONDEMNED if condemned else LIVE,
            condemned_at=self._now_us if condemned else None,
        )
        self._store(_BLOBS, key, raw, blob, changed)


def put_record(
    txn: lmdb.Transaction[bytes],
    layout: Layout,
    key: bytes,
    old: Record | None,
    new: Record | None,
    raw: bytes | None,
) -> None:
    """Put one record (or its absence) and its index entries over the one that was there.

    Raises RecordExists when a unique value belongs to another record.
    """
    for entry in layout.entries:
        was = None if old is None else entry.key(old)
        now = None if new is None else entry.key(new)
        if was == now:
            continue
        if was is not None:
            txn.delete(was)
        if now is not None and not txn.put(now, key, overwrite=not entry.unique):
            raise RecordExists(layout.kind.schema.table, entry.values(cast(Record, new)))
    if raw is None:
        txn.delete(layout.prefix + key)
    else:
        txn.put(layout.prefix + key, _sealed(raw))


def put_head(txn: lmdb.Transaction[bytes], head: Head) -> None:
    """Record how far the index has followed the journal."""
    txn.put(_HEAD_KEY, _sealed(_encode(head)))


def replay(txn: lmdb.Transaction[bytes], number: int, key: bytes, raw: bytes | None) -> None:
    """Apply one after-image of the journal. Runs no hooks: the counts are in the images."""
    layout = LAYOUT_OF_NUMBER[number]
    before = txn.get(layout.prefix + key)
    old = None if before is None else layout.decode(before[_CHECKSUM_BYTES:])
    new = None if raw is None else layout.decode(raw)
    put_record(txn, layout, key, old, new, raw)


@final
class Index:
    """The LMDB environment of one process. LMDB forbids two of one file in one process."""

    def __init__(self, folder: Path) -> None:
        """Open or make the environment; raises IndexDamaged when LMDB refuses the file."""
        try:
            self._env: lmdb.Environment = lmdb.open(
                str(folder),
                map_size=MAP_BYTES,
                max_readers=READERS_MAX,
                # The journal is synced, the index never: it is rebuilt after a crash of
                # the machine (invariant 5).
                sync=False,
                metasync=False,
                # Read transactions belong to the snapshot, not to the thread.
                max_spare_txns=64,
                mode=0o600,
            )
        except lmdb.Error as error:
            raise IndexDamaged(str(error)) from None
        # Slots of processes that were killed would otherwise pin old pages for ever.
        self._env.reader_check()

    @contextmanager
    def read(self) -> Iterator[LmdbSnapshot]:
        try:
            with self._env.begin(buffers=False) as txn:
                yield LmdbSnapshot(txn)
        except (lmdb.CorruptedError, lmdb.PageNotFoundError) as error:
            raise IndexDamaged(str(error)) from None

    def begin(self) -> lmdb.Transaction[bytes]:
        """A write transaction; waits for the writer lock shared by all processes."""
        return self._env.begin(write=True)

    def begin_child(self, parent: lmdb.Transaction[bytes]) -> lmdb.Transaction[bytes]:
        return self._env.begin(parent=parent, write=True)

    def reader_check(self) -> int:
        """Free the reader slots of dead processes; returns how many there were."""
        return self._env.reader_check()

    def oldest_reader_lag(self) -> int:
        """How many commits the oldest reader is behind; 0 without readers."""
        last = self._env.info()["last_txnid"]
        seen = [
            int(line.split()[2])
            for line in self._env.readers().splitlines()[1:]
            if line.split()[2].isdigit()
        ]
        return max((last - txnid for txnid in seen), default=0)

    def close(self) -> None:
        self._env.close()
