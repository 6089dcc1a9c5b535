"""Recovery: the index follows the journal, is made anew from it, or saves it.

One rule serves a killed process and a power cut (invariant 5): every valid frame after
the index's position is synced and applied; a torn end is cut; damage is named.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import final

import lmdb
import msgspec

from cas.catalog import Position
from cas.catalog.ballast import Ballast
from cas.catalog.bulk import Bulk, Progress
from cas.catalog.checkpoint import checkpoints_in, read_checkpoint, write_checkpoint
from cas.catalog.images import Head, put_head, replay
from cas.catalog.journal import (
    Op,
    Placed,
    Segment,
    Stop,
    Tail,
    frames,
    read_frame,
    segments_in,
    valid_at_or_after,
)
from cas.catalog.layout import SCHEMA, add_state, record_state
from cas.catalog.lmdb import Index
from cas.catalog.snapshot import LmdbSnapshot
from cas.durable import Disk, opened
from cas.errors import CatalogError, IndexDamaged, JournalDamaged

# An index takes ten times the bytes of its journal where that has nothing but puts: a file has
# seven entries. Too little room costs the whole building a second time.
_ROOM_FACTOR = 13
_ROOM_STEP_BYTES = 1 << 20  # whole pages of any machine
_ROOM_BYTES_MIN = 128 << 20  # below, making it takes no time worth a special way


@final
class Folders:
    """Where the catalog keeps its files under ROOT."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.catalog = root / "catalog"
        self.journal = self.catalog / "journal"
        self.checkpoints = self.catalog / "checkpoints"
        self.index = self.catalog / "index"
        self.index_aside = self.catalog / "index.aside"  # while a new one is made
        self.ballast = self.catalog / "ballast"
        self.lock = root / "LOCK"

    def make(self, disk: Disk) -> None:
        """Make what is missing; durable on return."""
        made = disk.make_folder(self.catalog)
        if made:
            disk.sync_folder(self.root)
        inner = [disk.make_folder(path) for path in (self.journal, self.checkpoints, self.index)]
        if any(inner):
            disk.sync_folder(self.catalog)


def has_journal(root: Path) -> bool:
    """Whether anything of a catalog is left in ROOT: a segment or a checkpoint."""
    folders = Folders(root)
    try:
        return bool(segments_in(folders.journal) or checkpoints_in(folders.checkpoints))
    except FileNotFoundError:
        return False


def follow(
    folder: Path, after: Position, place: tuple[Segment, int] | None = None
) -> Iterator[Placed | Stop]:
    """The frames after `after`, oldest first, each one proved to continue the chain.

    `place` is where the next frame stands, when that is known. Ends with a `Stop` at a bad
    frame; raises JournalDamaged where the chain breaks or frames are gone.
    """
    segments = segments_in(folder)
    if place is None:
        start = 0
        before = [s for s in segments if s <= Segment(after.epoch, after.seq + 1)]
        if not before:
            if segments or after.seq:
                raise JournalDamaged(folder, 0, f"no segment holds frame {after.seq + 1}")
            return
        segments = segments[segments.index(before[-1]) :]
    else:
        segment, start = place
        segments = [s for s in segments if s >= segment]
        if not segments or segments[0] != segment:
            raise JournalDamaged(folder / segment.filename, 0, "the segment is gone")
    last = after
    for number, segment in enumerate(segments):
        path = folder / segment.filename
        for item in _frames_needed(path, segment, start, after):
            if isinstance(item, Stop):
                later = (_holds_valid(folder, s) for s in segments[number + 1 :])
                if item.valid_after is None and any(later):
                    item = msgspec.structs.replace(item, valid_after=item.start)
                yield item
                return
            seq, chain = item.frame.seq, item.frame.chain
            if seq <= last.seq and last is after:
                if seq == last.seq and item.position.chain != last.chain:
                    raise JournalDamaged(path, item.start, f"frame {seq} is of another history")
                continue
            if seq != last.seq + 1 or chain != last.chain:
                raise JournalDamaged(path, item.start, f"frame {seq} does not follow {last.seq}")
            last = item.position
            yield item
        start = 0


def _frames_needed(
    path: Path, segment: Segment, start: int | None, after: Position
) -> Iterator[Placed | Stop]:
    """The frames of a segment, passing over bad ones of which `after` proves the outcome."""
    newest = 0
    while start is not None:
        begin, start = start, None
        for item in frames(path, segment, begin):
            if isinstance(item, Placed):
                newest = item.frame.seq
            elif item.valid_after is not None and newest < after.seq:
                with opened(path) as fd:
                    read = read_frame(fd, item.valid_after)
                if not isinstance(read, str) and read[0].seq <= after.seq + 1:
                    start = item.valid_after
                    break
            yield item


def _holds_valid(folder: Path, segment: Segment) -> bool:
    with opened(folder / segment.filename) as fd:
        return valid_at_or_after(fd, 0) is not None


def roll_forward(txn: lmdb.Transaction[bytes], folders: Folders, tail: Tail, disk: Disk) -> Head:
    """Let the index catch up with the journal, under the writer lock.

    Frames that another process wrote, but was killed before it could show, are synced
    first and then applied. Raises JournalDamaged when the journal lost its end: the index
    still shows it, and the next opening saves it from there.
    A sync that fails is marked in the head, here and on return: nobody may write, since
    asking again would prove nothing.
    """
    head = LmdbSnapshot(txn).head
    segment = Segment(head.segment_epoch, head.segment_first_seq)
    following = folders.journal / Segment(segment.epoch, head.position.seq + 1).filename
    try:
        size = tail.size(segment)
    except FileNotFoundError:
        path = folders.journal / segment.filename
        raise JournalDamaged(path, 0, "the segment is gone; reopen to save it") from None
    if size == head.frame_end and not (head.frame_end and following.exists()):
        return head
    if size < head.frame_end:
        path = folders.journal / segment.filename
        raise JournalDamaged(path, size, "acknowledged frames are gone; reopen to save them")
    try:
        _settle(folders, segment, tail, disk)
        head, torn = catch_up(txn, head, folders)
        if torn is not None:
            tail.cut(torn.segment, torn.start)
        _drop_unused(folders, head, disk)
    except OSError as error:
        if error.errno in SHORTAGE:
            raise CatalogError(f"the journal could not be opened: {error}") from None
        head = msgspec.structs.replace(head, failed=f"the journal could not be synced: {error}")
    put_head(txn, head)
    return head


def _settle(folders: Folders, segment: Segment, tail: Tail, disk: Disk) -> None:
    """Sync all that the journal holds from `segment` on, before any of it is shown."""
    disk.sync_folder(folders.journal)
    for begun in segments_in(folders.journal):
        if begun >= segment:
            disk.sync_data(tail.at(begun))


def catch_up(
    txn: lmdb.Transaction[bytes], head: Head, folders: Folders
) -> tuple[Head, Stop | None]:
    """Apply every valid frame after `head`; returns the new head and the torn end, if any.

    Raises JournalDamaged. Neither syncs nor cuts.
    """
    segment = Segment(head.segment_epoch, head.segment_first_seq)
    for item in follow(folders.journal, head.position, (segment, head.frame_end)):
        if isinstance(item, Stop):
            if item.valid_after is not None:
                raise item.error()
            return head, item
        for write in item.frame.writes:
            for number, key, raw in write.ops:
                replay(txn, number, key, raw)
        head = _head_at(item)
    return head, None


# What opening a file may meet in a process that has too much of something: no failed sync.
SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def is_full(error: OSError | lmdb.Error) -> bool:
    """Whether the kernel or LMDB says that there is no space."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, lmdb.DiskError)


def _drop_unused(folders: Folders, head: Head, disk: Disk) -> None:
    """Remove segments after the head's: begun by somebody who was killed before any frame."""
    used = Segment(head.segment_epoch, head.segment_first_seq)
    for segment in segments_in(folders.journal):
        if segment > used:
            disk.unlink(folders.journal / segment.filename)


def _head_at(placed: Placed) -> Head:
    segment = placed.segment
    return Head(placed.position, segment.epoch, segment.first_seq, placed.start, placed.end, SCHEMA)


def build_index(
    folders: Folders,
    ballast: Ballast,
    disk: Disk,
    shown_seq: int = 0,
    progress: Progress | None = None,
) -> tuple[Index, int]:
    """Make the index anew; the caller holds LOCK alone. Returns it and the ops applied.

    From the newest checkpoint that is whole, and the journal after it. A torn end of the
    journal is cut, unless frames up to `shown_seq` would go with it. BOOT is written by the
    caller, last, so an index that was being made is never taken for a good one. Raises
    JournalDamaged, naming the frame.
    """
    _set_aside(folders, disk)
    try:
        try:
            built = _build_from_newest(folders, disk, shown_seq, progress)
        except (OSError, lmdb.Error) as error:
            if not is_full(error):
                raise
            # A full disk must open, or nothing could be deleted from it: the ballast goes,
            # and so does the old index, which took as much as the new one needs.
            ballast.release()
            shutil.rmtree(folders.index_aside)
            built = _build_from_newest(folders, disk, shown_seq, progress)
    except BaseException:
        # What could not be replaced is not thrown away: it may be all that is left of
        # what the damage took.
        _put_back(folders, disk)
        raise
    shutil.rmtree(folders.index_aside, ignore_errors=True)
    return built


def _build_from_newest(
    folders: Folders, disk: Disk, shown_seq: int, progress: Progress | None
) -> tuple[Index, int]:
    names = [c.filename for c in reversed(checkpoints_in(folders.checkpoints))]
    for name in [*names, None]:
        checkpoint = folders.checkpoints / name if name else None
        try:
            try:
                return _build_from(checkpoint, folders, disk, shown_seq, progress)
            except lmdb.MapFullError:  # a rare kind of records: slower, but to the end
                return _build_from(checkpoint, folders, disk, shown_seq, progress, roomy=False)
        except JournalDamaged as error:
            # A bad checkpoint costs time, not data, while an older one and the journal
            # after it are there; damage of the journal itself is final.
            if checkpoint and error.path == checkpoint:
                continue
            raise
    raise AssertionError("the last candidate returns or raises")


def _build_from(
    checkpoint: Path | None,
    folders: Folders,
    disk: Disk,
    shown_seq: int,
    progress: Progress | None,
    *,
    roomy: bool = True,
) -> tuple[Index, int]:
    paths = [folders.journal / segment.filename for segment in segments_in(folders.journal)]
    source_bytes = sum(path.stat().st_size for path in [*paths, *filter(None, [checkpoint])])
    index = _empty_index(folders, disk, source_bytes if roomy else 0)
    try:
        builder = Bulk(index, progress, source_bytes)
        if checkpoint:
            _load_checkpoint(builder, checkpoint)
        _load_journal(builder, folders, disk, shown_seq)
        builder.finish()
        return index.settled(), builder.ops
    except BaseException:
        index.close()
        raise


def _empty_index(folders: Folders, disk: Disk, source_bytes: int) -> Index:
    shutil.rmtree(folders.index, ignore_errors=True)
    disk.make_folder(folders.index)
    disk.sync_folder(folders.catalog)
    room_bytes = source_bytes * _ROOM_FACTOR // _ROOM_STEP_BYTES * _ROOM_STEP_BYTES
    usage = os.statvfs(folders.catalog)
    # Twice, since a filesystem that copies on write may need more than was allocated.
    if _ROOM_BYTES_MIN <= room_bytes <= usage.f_bavail * usage.f_frsize // 2:
        return Index.roomy(folders.index, room_bytes, disk)
    return Index(folders.index)


def _set_aside(folders: Folders, disk: Disk) -> None:
    """Take the index out of the way; one that a killed process set aside is older still."""
    if (folders.index / "BOOT").exists() or not folders.index_aside.exists():
        shutil.rmtree(folders.index_aside, ignore_errors=True)
        disk.rename(folders.index, folders.index_aside)
    disk.sync_folder(folders.catalog)


def _put_back(folders: Folders, disk: Disk) -> None:
    if folders.index_aside.exists():
        shutil.rmtree(folders.index, ignore_errors=True)
        disk.rename(folders.index_aside, folders.index)


def _load_checkpoint(builder: Bulk, path: Path) -> None:
    for item in read_checkpoint(path):
        if isinstance(item, Position):
            builder.head = Head(item, item.epoch, item.seq + 1, 0, 0, SCHEMA)
        else:
            builder.apply(item)
    builder.read_bytes += path.stat().st_size


def _load_journal(builder: Bulk, folders: Folders, disk: Disk, shown_seq: int) -> None:
    synced: Segment | None = None
    for item in follow(folders.journal, builder.head.position):
        if isinstance(item, Stop):
            if item.valid_after is not None or builder.head.position.seq < shown_seq:
                raise item.error()
            with opened(item.path, os.O_RDWR) as fd:
                disk.truncate(fd, item.start)
                disk.sync_data(fd)
            break
        if synced != item.segment:
            # What the index will show must be on the disk (invariant 4), also when the
            # one who wrote it was killed before the sync.
            with opened(folders.journal / item.segment.filename) as fd:
                disk.sync_data(fd)
            synced = item.segment
        for write in item.frame.writes:
            builder.apply(write.ops)
        builder.head = _head_at(item)
        builder.read_bytes += item.end - item.start
    _end_of_journal(builder, folders, disk)
    _drop_unused(folders, builder.head, disk)
    disk.sync_folder(folders.journal)


def _end_of_journal(builder: Bulk, folders: Folders, disk: Disk) -> None:
    """Point the head at a segment that exists, even where no frame follows a checkpoint."""
    head = builder.head
    if head.frame_end:
        return
    segment = Segment(head.position.epoch, head.position.seq + 1)
    begun = [s for s in segments_in(folders.journal) if s <= segment]
    if begun and begun[-1] != segment:
        # The checkpoint was made at the end of a segment that goes on.
        last = begun[-1]
        end = (folders.journal / last.filename).stat().st_size
        builder.head = Head(head.position, last.epoch, last.first_seq, end, end, SCHEMA)
    elif not begun:
        begin_segment(folders, segment, disk)
        builder.head = Head(head.position, segment.epoch, segment.first_seq, 0, 0, SCHEMA)


def begin_segment(folders: Folders, segment: Segment, disk: Disk) -> None:
    """Make an empty segment; durable on return."""
    os.close(disk.create(folders.journal / segment.filename, 0o600))
    disk.sync_folder(folders.journal)


def state_of(snapshot: LmdbSnapshot) -> bytes:
    """The state digest computed from every record of a snapshot."""
    total = 0
    for layout, key, raw in snapshot.records():
        total += record_state(layout.number, key, raw)
    return add_state(bytes(16), total)


def entries_add_up(snapshot: LmdbSnapshot) -> bool:
    """Whether the entries of every unique key and index are those due to the records."""
    due = there = 0
    for layout, key, raw in snapshot.records():
        record = layout.read(raw)
        for entry in layout.entries:
            entry_key = entry.key(record)
            if entry_key is not None:
                due += record_state(0, entry_key, key)
    for entry_key, key in snapshot.entries():
        there += record_state(0, entry_key, key)
    return due == there


def checkpoint_of(snapshot: LmdbSnapshot, folders: Folders, disk: Disk) -> Position:
    """Write a checkpoint of `snapshot`; refuses with IndexDamaged when its state is off.

    The state is summed while the records are written, and checked before the checkpoint
    gets its name, so a wrong index never becomes a truth.
    """
    position = snapshot.position
    total = 0

    def ops() -> Iterator[Op]:
        nonlocal total
        for layout, key, raw in snapshot.records():
            total += record_state(layout.number, key, raw)
            yield layout.number, key, raw
        if add_state(bytes(16), total) != position.state:
            raise IndexDamaged("its records do not add up to the state the journal states")

    write_checkpoint(folders.checkpoints, position, ops(), disk)
    return position


def save_journal(index: Index, folders: Folders, disk: Disk) -> Position:
    """Give the journal a new beginning from an index that knows more than it does.

    For an end of the journal that was lost, damaged or failed to sync under a running
    machine: the index is of this boot, so it shows only acknowledged writes, and what the
    journal holds beyond it was applied by the caller. Its records are proved by the state
    digest and become a checkpoint; the segment with the bad end stays for the operator.
    Raises IndexDamaged when the index does not add up either.
    """
    with index.read() as snapshot:
        head = snapshot.head
        position = checkpoint_of(snapshot, folders, disk)
    segment = Segment(position.epoch, position.seq + 1)
    for later in [s for s in segments_in(folders.journal) if s >= segment]:
        path = folders.journal / later.filename
        disk.rename(path, path.with_suffix(".damaged"))
    begin_segment(folders, segment, disk)
    txn = index.begin()
    put_head(
        txn,
        msgspec.structs.replace(
            head,
            segment_epoch=segment.epoch,
            segment_first_seq=segment.first_seq,
            frame_start=0,
            frame_end=0,
            failed="",
        ),
    )
    txn.commit()
    return position


def verify_journal(folders: Folders) -> Iterator[Position | JournalDamaged]:
    """Walk all kept journal frame by frame: checksums, order, chain.

    Yields the position after each segment, and a JournalDamaged (yielded, not raised) for
    each bad place, going on behind it. Reads only and takes no lock; a torn frame at the
    very end may be one that is being written and is no damage.
    """
    segments = segments_in(folders.journal)
    last: Position | None = None
    for segment in segments:
        path = folders.journal / segment.filename
        start: int | None = 0
        while start is not None:
            begin, start = start, None
            for item in frames(path, segment, begin):
                if isinstance(item, Stop):
                    if item.valid_after is not None or segment != segments[-1]:
                        yield item.error()
                    last, start = None, item.valid_after
                    break
                follows = last is None or (
                    item.frame.seq == last.seq + 1 and item.frame.chain == last.chain
                )
                if not follows:
                    yield JournalDamaged(
                        path, item.start, f"frame {item.frame.seq} does not follow"
                    )
                last = item.position
        if last is not None:
            yield last
