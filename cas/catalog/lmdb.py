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

import itertools
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast, final

import blake3
import lmdb
import msgspec
import xxhash

from cas.catalog import Key, Position
from cas.catalog.tuples import KEY_BYTES_MAX, Value, component, pack
from cas.digest import Digest
from cas.durable import Disk, opened
from cas.errors import BlobDeleting, IndexDamaged, NotFound, RecordExists
from cas.records import CONDEMNED, DELETING, LIVE, RECORDS, Blob, Record

R = TypeVar("R", bound=Record)

# What LMDB says when its pages are not what it wrote; all else is no reason for a new index.
DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
    lmdb.CursorFullError,
)

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
        "entry_keys",
        "has_unique",
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
        self.entry_keys = _keys_at_once(self.entries)
        self.has_unique = bool(schema.unique)

    def read(self, raw: bytes) -> Record:
        """The record; raises IndexDamaged when a page put another table's in its place."""
        try:
            return self.decode(raw)
        except msgspec.DecodeError as error:
            raise IndexDamaged(f"a record of {self.kind.schema.table}: {error}") from None


def _keys_at_once(entries: list[_Entry]) -> Callable[[Record], list[bytes | None]]:
    """The keys of all entries of a record, None where it is left out; see `_Entry.key`.

    Most fields are part of several entries; each is packed once here.
    """
    fields = tuple(dict.fromkeys(field for entry in entries for field in entry.fields))
    if not fields:
        return lambda record: []
    values = _getter(fields)
    prefixes = [entry.prefix for entry in entries]
    # Where a key's prefix and components stand in `parts` below, and its first component.
    places = {field: len(prefixes) + number for number, field in enumerate(fields)}
    plans = [
        (
            places[entry.fields[0]],
            operator.itemgetter(number, *(places[field] for field in entry.fields)),
        )
        for number, entry in enumerate(entries)
    ]

    def keys(record: Record) -> list[bytes | None]:
        parts = [*prefixes, *map(component, values(record))]
        found = [b"".join(pick(parts)) if parts[first] else None for first, pick in plans]
        if sum(map(len, parts)) > KEY_BYTES_MAX:  # else no key can be longer either
            for key in filter(None, found):
                if len(key) > KEY_BYTES_MAX:
                    raise ValueError(f"a key of {len(key)} bytes is too long for the index")
        return found

    return keys


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
        return None if raw is None else cast(R, layout.read(raw))

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
                    record = layout.read(_unsealed(value, key))
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
        return layout.read(raw)


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

    __slots__ = ("_now_us", "_waiting", "delta", "ops")

    def __init__(self, txn: lmdb.Transaction[bytes], now_us: int) -> None:
        super().__init__(txn)
        self._now_us = now_us
        self._waiting: dict[Layout, dict[bytes, _Waiting]] = {}
        self.ops: dict[tuple[int, bytes], bytes | None] = {}
        self.delta = 0  # to the state digest

    @property
    def now_us(self) -> int:
        return self._now_us

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
        reverse: bool = False,
    ) -> list[R]:
        self._settle(LAYOUTS[kind])
        return super().range(
            kind, index, prefix, after=after, before=before, limit=limit, reverse=reverse
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
        current.new = record
        if layout.has_unique:
            # At once: its unique values must be taken when the next record asks for them.
            self._put(layout, key, current, keys)
        else:
            self._waiting.setdefault(layout, {})[key] = current

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
        raw = None if current.new is None else _encode(current.new)
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
        self._waiting.setdefault(_BLOBS, {})[key] = current


def _counted(old: Blob, new: Blob) -> Blob:
    """`new` with the count that the catalog keeps, whatever the caller read or made up."""
    if new.state == DELETING and old.refcount:
        raise ValueError(f"blob {old.digest.hex()} has {old.refcount} references")
    return msgspec.structs.replace(new, refcount=old.refcount)


def put_record(
    txn: lmdb.Transaction[bytes],
    layout: Layout,
    key: bytes,
    was: list[bytes | None],
    now: list[bytes | None],
    raw: bytes | None,
) -> None:
    """Put one record (or its absence) and its index entries over the one that was there.

    `was` and `now` are the `entry_keys` of the record before and after, empty for none.

    A unique value may still belong to another record: a write that let two records swap
    theirs is replayed one record at a time. The later one has it then, and the earlier
    one, when its turn comes, leaves alone what is no longer its own.
    """
    if was != now:
        for entry, before, after in itertools.zip_longest(layout.entries, was, now):
            if before == after:
                continue
            if before is not None and (not entry.unique or txn.get(before) == key):
                txn.delete(before)
            if after is not None:
                txn.put(after, key)
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
    was = [] if before is None else layout.entry_keys(layout.decode(before[_CHECKSUM_BYTES:]))
    now = [] if raw is None else layout.entry_keys(layout.decode(raw))
    put_record(txn, layout, key, was, now, raw)


@final
class Index:
    """The LMDB environment of one process. LMDB forbids two of one file in one process."""

    def __init__(self, folder: Path, room_bytes: int = 0) -> None:
        """Open or make the environment; raises IndexDamaged when LMDB refuses the file.

        `room_bytes` are for `roomy` alone.
        """
        self._folder = folder
        self._roomy = room_bytes > 0
        try:
            self._env: lmdb.Environment = lmdb.open(
                str(folder),
                map_size=room_bytes or MAP_BYTES,
                max_readers=READERS_MAX,
                # The journal is synced, the index never: it is rebuilt after a crash of
                # the machine (invariant 5).
                sync=False,
                metasync=False,
                writemap=self._roomy,
                # Read transactions belong to the snapshot, not to the thread.
                max_spare_txns=64,
                mode=0o600,
            )
        except lmdb.Error as error:
            raise IndexDamaged(str(error)) from None
        # A page beyond the end of the file is a SIGBUS at the first look at it.
        pages = self._env.info()["last_pgno"] + 1
        size_bytes = (folder / "data.mdb").stat().st_size
        if size_bytes < pages * self._env.stat()["psize"] and not self._roomy:
            self._env.close()
            raise IndexDamaged(f"it was cut short to {size_bytes} bytes, {pages} pages")
        # Slots of processes that were killed would otherwise pin old pages for ever.
        self._env.reader_check()

    @classmethod
    def roomy(cls, folder: Path, room_bytes: int, disk: Disk) -> Index:
        """A new environment to be filled alone, then `settled`; see `bulk`.

        It is written through its memory map, which spares LMDB the copying of pages. A full
        disk would then be a SIGBUS, so all of the file is allocated first, and where that
        cannot be had the environment is an ordinary one. Filling it raises
        lmdb.MapFullError when the room was too small.
        """
        index = cls(folder, room_bytes)
        try:
            with opened(folder / "data.mdb", os.O_RDWR) as fd:
                disk.allocate(fd, room_bytes)
                if os.fstat(fd).st_blocks * 512 >= room_bytes:
                    return index
        except OSError:
            pass  # no such space: the ordinary way needs less of it, and fails in words
        index.close()
        (folder / "data.mdb").unlink()
        return cls(folder)

    def settled(self) -> Index:
        """The environment as others may open it, without the room that was not used."""
        if not self._roomy:
            return self
        pages = self._env.info()["last_pgno"] + 1
        size_bytes = pages * self._env.stat()["psize"]
        self.close()
        os.truncate(self._folder / "data.mdb", size_bytes)
        return Index(self._folder)

    @contextmanager
    def read(self) -> Iterator[LmdbSnapshot]:
        try:
            with self._env.begin(buffers=False) as txn:
                yield LmdbSnapshot(txn)
        except DAMAGE as error:
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
