"""Bulk: very many after-images into a new index, in the order of its keys.

Replaying op by op walks the tree from its root for each of the four or five keys of a
record. Here the images of a batch are gathered first, the last one of a record counting
alone, and then written table by table and index by index in sorted order: neighbours share
their way down, and a record changed a hundred times is written once.

The index being made is mapped for writing (see `Index.roomy`), so what changes is changed
in the page cache: LMDB holds no pages of its own, and commits copy none. A million ops of
new blobs and files take two thirds of the processor time that op by op takes; DESIGN.md has
the speed that was measured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import final

import lmdb
import xxhash

from cas.catalog.images import Head, put_head
from cas.catalog.journal import BEGINNING, EPOCH_FIRST, Op
from cas.catalog.layout import LAYOUT_OF_NUMBER, SCHEMA, Layout
from cas.catalog.lmdb import Index

# About 1 KB of memory an op while it is gathered and sorted.
OPS_PER_BATCH = 20_000
_CHECKSUM_BYTES = 8
_first = operator.itemgetter(0)  # comparing keys alone takes two thirds of comparing pairs

Progress = Callable[[int, int], None]  # bytes of checkpoint and journal read, and in all


@final
class Bulk:
    """Fills an index that nobody else has open. `head` says how far it has come."""

    def __init__(self, index: Index, progress: Progress | None, total_bytes: int) -> None:
        self._index = index
        self._progress = progress
        self._total_bytes = total_bytes
        self._images: dict[int, dict[bytes, bytes | None]] = {
            number: {} for number in LAYOUT_OF_NUMBER
        }
        self._pending = 0
        self.head = Head(BEGINNING, EPOCH_FIRST, 1, 0, 0, SCHEMA)
        self.ops = 0
        self.read_bytes = 0

    def apply(self, ops: list[Op]) -> None:
        """Add the ops of one write."""
        images = self._images
        for number, key, raw in ops:
            images[number][key] = raw
        self.ops += len(ops)
        self._pending += len(ops)
        if self._pending >= OPS_PER_BATCH:
            txn = self._index.begin()
            self._flush(txn)
            txn.commit()
            if self._progress:
                self._progress(self.read_bytes, self._total_bytes)

    def finish(self) -> None:
        """Write what is still gathered, and `head`."""
        txn = self._index.begin()
        self._flush(txn)
        put_head(txn, self.head)
        txn.commit()

    def _flush(self, txn: lmdb.Transaction[bytes]) -> None:
        # Whole writes only, so no two records of a batch end with one unique value.
        for number, images in self._images.items():
            if images:
                _write(txn, LAYOUT_OF_NUMBER[number], images)
                images.clear()
        self._pending = 0


def _write(txn: lmdb.Transaction[bytes], layout: Layout, images: dict[bytes, bytes | None]) -> None:
    prefix, decode, entry_keys = layout.prefix, layout.decode, layout.entry_keys
    get, checksum = txn.get, xxhash.xxh3_64_digest
    gone: list[bytes] = []
    kept: list[bytes] = []
    records: list[tuple[bytes, bytes]] = []
    entries: list[list[bytes | None]] = []  # of each record in `kept`, as the layout has them
    for key in sorted(images):
        raw, full = images[key], prefix + key
        before = get(full)
        now: list[bytes | None] = []
        if raw is not None:
            now = entry_keys(decode(raw))
            kept.append(key)
            records.append((full, checksum(raw) + raw))
            entries.append(now)
        elif before is not None:
            gone.append(full)
        if before is not None:
            was = entry_keys(decode(before[_CHECKSUM_BYTES:]))
            gone += [entry for entry in was if entry is not None and entry not in now]
    # First what goes: a unique value may have passed from one record to another.
    for entry in gone:
        txn.delete(entry)
    with txn.cursor() as cursor:
        cursor.putmulti(records)
        for column in zip(*entries, strict=True):
            pairs = zip(column, kept, strict=True)
            due = (pair for pair in pairs if pair[0] is not None) if None in column else pairs
            cursor.putmulti(sorted(due, key=_first))
