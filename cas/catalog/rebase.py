"""Rebase: a catalog that came from elsewhere, made the beginning of a new epoch.

Checkpoint and journal of an older epoch lie in the folders, whole or not at all. They are
replayed into an index and proved by the state digest; then records are changed that are not
true here (such as where bytes are), in the index itself, since as writes they would fill the
journal; and what came out becomes a checkpoint that a new epoch goes on from. The chain value
goes on too, so the new epoch seals all history before it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import final

import lmdb
import msgspec

from cas.catalog import Position
from cas.catalog.ballast import Ballast
from cas.catalog.bulk import OPS_PER_BATCH
from cas.catalog.checkpoint import Checkpoint, checkpoints_in
from cas.catalog.ground import Boot
from cas.catalog.images import Head, put_head, sealed
from cas.catalog.journal import Segment, segments_in
from cas.catalog.layout import LAYOUT_OF_NUMBER, SCHEMA, Layout, add_state, record_state
from cas.catalog.lmdb import Index
from cas.catalog.recovery import Folders, begin_segment, build_index, checkpoint_of, state_of
from cas.catalog.snapshot import LmdbSnapshot
from cas.durable import Disk
from cas.errors import IndexDamaged

# What becomes of a record: its table, its packed primary key, and its bytes before and after,
# None where there is none. The bytes before are those that the state digest was added up from.
Rewrite = tuple[int, bytes, bytes | None, bytes | None]
Rewriting = Callable[[LmdbSnapshot], Iterator[Rewrite]]


@final
class Rebased(msgspec.Struct, frozen=True):
    """What a rebase began from, and where the new epoch begins."""

    was: Position
    now: Position
    checkpoint: Checkpoint


def replayed(folders: Folders, disk: Disk, *, prove: bool = True) -> Index:
    """An index of what lies in `folders`, proved by the state digest that the journal states.

    Raises JournalDamaged, IndexDamaged. The caller closes it. `rebase` proves by itself.
    """
    folders.make(disk)
    index, _ = build_index(folders, Ballast(folders.ballast, disk, 0), disk)
    try:
        with index.read() as snapshot:
            if prove and state_of(snapshot) != snapshot.position.state:
                raise IndexDamaged("the journal does not add up to its own state")
    except BaseException:
        index.close()
        raise
    return index


def rebase(
    index: Index, folders: Folders, epoch: int, at_us: int, change: Rewriting, disk: Disk
) -> Rebased:
    """Begin `epoch` with the records of `index`, changed by `change`; closes the index.

    `at_us` is catalog time of the beginning. The index is left as one that may be opened on
    this boot; checkpoint and journal of before are gone. Everything is durable on return, and
    a crash leaves the folders in any state: the caller makes them anew then.
    """
    try:
        with index.read() as snapshot:
            was = snapshot.position
        head = _changed(index, was, Position(epoch, was.seq, was.chain, was.state, at_us), change)
        _forget(folders, disk)
        begin_segment(folders, Segment(epoch, head.position.seq + 1), disk)
        with index.read() as snapshot:
            checkpoint_of(snapshot, folders, disk)  # adds all records up again
    finally:
        index.close()
    boot = Boot.of(folders.index, disk)
    disk.write_file(folders.index / "BOOT", msgspec.json.encode(boot), 0o600)
    made = Checkpoint(epoch, head.position.seq)
    return Rebased(was, head.position, made)


def _changed(index: Index, was: Position, now: Position, change: Rewriting) -> Head:
    """Make the changes, and state what the records add up to if they did so before."""
    delta = 0
    with index.read() as snapshot:
        changes = change(snapshot)
        while batch := list(itertools.islice(changes, OPS_PER_BATCH)):
            txn = index.begin()
            for number, rewrites in itertools.groupby(batch, key=operator.itemgetter(0)):
                delta += _write(txn, LAYOUT_OF_NUMBER[number], rewrites)
            txn.commit()
    now = msgspec.structs.replace(now, state=add_state(was.state, delta))
    head = Head(now, now.epoch, now.seq + 1, 0, 0, SCHEMA)
    txn = index.begin()
    put_head(txn, head)
    txn.commit()
    return head


def _write(txn: lmdb.Transaction[bytes], layout: Layout, rewrites: Iterable[Rewrite]) -> int:
    """Put records of one table in the place of others; returns what the state digest gains.

    Only those entries are touched whose values change: that takes a third of the time.
    """
    number, delta = layout.number, 0
    entries: list[tuple[bytes, bytes]] = []
    for _, key, old, new in rewrites:
        before = None if old is None else layout.decode(old)
        after = None if new is None else layout.decode(new)
        for entry in layout.entries:
            if before and after and entry.values(before) == entry.values(after):
                continue
            if before is not None and (gone := entry.key(before)) is not None:
                txn.delete(gone)
            if after is not None and (come := entry.key(after)) is not None:
                entries.append((come, key))
        if old is not None:
            delta -= record_state(number, key, old)
        if new is None:
            txn.delete(layout.prefix + key)
        else:
            delta += record_state(number, key, new)
            txn.put(layout.prefix + key, sealed(new))
    with txn.cursor() as cursor:
        cursor.putmulti(sorted(entries))
    return delta


def _forget(folders: Folders, disk: Disk) -> None:
    for segment in segments_in(folders.journal):
        disk.unlink(folders.journal / segment.filename)
    for checkpoint in checkpoints_in(folders.checkpoints):
        disk.unlink(folders.checkpoints / checkpoint.filename)
    disk.sync_folder(folders.journal)
    disk.sync_folder(folders.checkpoints)
