"""Layout: a record type compiled for the index, and what its records add to the state digest.

    00 00                                      the head, see `images`
    table 00  packed primary key               a record
    table n   packed values of index n         packed primary key

`table` is the record type's number, `n` counts its unique keys and indexes from 1 in the
order of the schema page.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, final

import blake3
import msgspec

from cas.catalog.tuples import KEY_BYTES_MAX, component, pack
from cas.errors import IndexDamaged
from cas.records import RECORDS, Counts, Record

STATE_BYTES = 16
_STATE_MODULUS = 1 << (8 * STATE_BYTES)


@final
class Entry:
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


Share = tuple[str, int, int]  # of one record in the usage of a tenant: files, bytes
NO_SHARE: Share = ("", 0, 0)


def _sharer(counts: Counts) -> Callable[[Record], Share]:
    values = operator.attrgetter("tenant_id", counts.size_bytes, counts.unless_none or "tenant_id")
    files = counts.files

    def share(record: Record) -> Share:
        tenant_id, size_bytes, there = values(record)
        return (tenant_id, files, size_bytes) if tenant_id and there is not None else NO_SHARE

    return share


@final
class Layout:
    """A record type compiled for the index."""

    __slots__ = (
        "adds",
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
        "shares",
    )

    def __init__(self, kind: type[Record]) -> None:
        schema = kind.schema
        self.kind = kind
        self.number = schema.number
        self.prefix = bytes((schema.number, 0))
        self.key_values = _getter(schema.key)
        self.decode = msgspec.msgpack.Decoder(kind).decode
        self.digests = _getter(schema.digests) if schema.digests else None
        self.shares = _sharer(schema.counts) if schema.counts else None
        self.adds = schema.adds
        names = [(name, fields, True) for name, fields in schema.unique.items()]
        names += [(name, fields, False) for name, fields in schema.indexes.items()]
        self.entries = [
            Entry(bytes((schema.number, number)), name, fields, unique)
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


def _keys_at_once(entries: list[Entry]) -> Callable[[Record], list[bytes | None]]:
    """The keys of all entries of a record, None where it is left out; see `Entry.key`.

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
