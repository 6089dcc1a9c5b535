"""Images: records as they stand in the index, each with its checksum and its entries.

LMDB keeps no checksums, so each record carries one: XXH3-64 of what follows.
"""

from __future__ import annotations

import itertools
from typing import final

import lmdb
import msgspec
import xxhash

from cas.catalog import Position
from cas.catalog.layout import LAYOUT_OF_NUMBER, Layout
from cas.errors import IndexDamaged

_CHECKSUM_BYTES = 8
_HEAD_KEY = b"\x00\x00"

encode = msgspec.msgpack.Encoder().encode


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


def sealed(record: bytes) -> bytes:
    """A record as it is stored."""
    return xxhash.xxh3_64_digest(record) + record


def unsealed(value: bytes, key: bytes) -> bytes:
    """The record of a stored value; raises IndexDamaged when it fails its checksum."""
    record = value[_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(record) != value[:_CHECKSUM_BYTES]:
        raise IndexDamaged(f"record at key {key.hex()} fails its checksum")
    return record


def read_head(txn: lmdb.Transaction[bytes]) -> Head:
    """How far the index has followed the journal; raises IndexDamaged when nobody can tell."""
    value = txn.get(_HEAD_KEY)
    if value is None:
        raise IndexDamaged("it has no head")
    try:
        return _decode_head(unsealed(value, _HEAD_KEY))
    except msgspec.DecodeError as error:
        raise IndexDamaged(f"its head is not readable: {error}") from None


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
        txn.put(layout.prefix + key, sealed(raw))


def put_head(txn: lmdb.Transaction[bytes], head: Head) -> None:
    """Record how far the index has followed the journal."""
    txn.put(_HEAD_KEY, sealed(encode(head)))


def replay(txn: lmdb.Transaction[bytes], number: int, key: bytes, raw: bytes | None) -> None:
    """Apply one after-image of the journal. Runs no hooks: the counts are in the images."""
    layout = LAYOUT_OF_NUMBER[number]
    before = txn.get(layout.prefix + key)
    was = [] if before is None else layout.entry_keys(layout.decode(before[_CHECKSUM_BYTES:]))
    now = [] if raw is None else layout.entry_keys(layout.decode(raw))
    put_record(txn, layout, key, was, now, raw)
