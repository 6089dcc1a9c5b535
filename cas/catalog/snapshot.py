"""Snapshot: reading the index as it was at one commit.

An index entry is believed only when the record it leads to has the values that it stands
for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

import lmdb

from cas.catalog import Key, Position
from cas.catalog.images import Head, read_head, unsealed
from cas.catalog.layout import LAYOUTS, Layout
from cas.catalog.tuples import Value, pack
from cas.errors import IndexDamaged
from cas.records import Record

R = TypeVar("R", bound=Record)

_END = b"\xff"  # sorts after every component code


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
        record = layout.read(self._led_to(layout, primary))
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
        bytes_max: int | None = None,
        reverse: bool = False,
    ) -> list[R]:
        layout = LAYOUTS[kind]
        entry = layout.indexes[index] if index else None
        head = (entry.prefix if entry else layout.prefix) + pack(prefix)
        low = head + (pack(after) + _END if after else b"")
        high = head + (pack(before) if before else _END)
        found: list[R] = []
        size_bytes = 0
        with self._txn.cursor() as cursor:
            for key, value in _walk(cursor, low, high, reverse):
                if len(found) >= limit:
                    break
                raw = unsealed(value, key) if entry is None else self._led_to(layout, value)
                size_bytes += len(raw)
                if bytes_max is not None and size_bytes > bytes_max and found:
                    break
                record = layout.read(raw)
                if entry is not None and entry.key(record) != key:
                    raise IndexDamaged(f"{kind.schema.table}.{index} leads to another record")
                found.append(cast(R, record))
        return found

    @property
    def position(self) -> Position:
        return self.head.position

    @property
    def head(self) -> Head:
        """Where the index stands; raises IndexDamaged when that cannot be read."""
        return read_head(self._txn)

    def records(self, *kinds: type[Record]) -> Iterator[tuple[Layout, bytes, bytes]]:
        """Every (layout, packed primary key, record bytes), in order of table and key.

        Those of `kinds` alone, when any are named, in the order of their naming.
        """
        with self._txn.cursor() as cursor:
            for layout in [LAYOUTS[kind] for kind in kinds] or LAYOUTS.values():
                for key, value in _walk(cursor, layout.prefix, layout.prefix + _END, False):
                    yield layout, key[2:], unsealed(value, key)

    def under(self, kind: type[Record], prefix: Key) -> Iterator[tuple[bytes, bytes]]:
        """(packed primary key, record bytes) of those whose primary key begins with `prefix`."""
        low = LAYOUTS[kind].prefix + pack(prefix)
        with self._txn.cursor() as cursor:
            for key, value in _walk(cursor, low, low + _END, False):
                yield key[2:], unsealed(value, key)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry of every unique key and index, as it stands."""
        with self._txn.cursor() as cursor:
            for layout in LAYOUTS.values():
                for entry in layout.entries:
                    yield from _walk(cursor, entry.prefix, entry.prefix + _END, False)

    def _raw(self, layout: Layout, key: bytes) -> bytes | None:
        full = layout.prefix + key
        value = self._txn.get(full)
        return None if value is None else unsealed(value, full)

    def _led_to(self, layout: Layout, primary: bytes) -> bytes:
        """The bytes of the record that an entry leads to."""
        raw = self._raw(layout, primary)
        if raw is None:
            raise IndexDamaged(f"an entry of {layout.kind.schema.table} leads to no record")
        return raw


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
