"""Checkpoints: the whole state as one file of frames, anchored in the journal's chain.

    frame 1      writes []; epoch, seq, chain, state and time of the position it shows
    frames 2…n   one write each, of up to BATCH after-images, in order of table and key
    frame n+1    one write without ops, its request_id the number of records: the end

Every frame's `chain` is the chain value after the one before it, beginning with the
journal's at that position, so a checkpoint is whole or refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import final

import msgspec

from cas.catalog import Position
from cas.catalog.journal import Frame, Op, Write, encode_frame, read_frame
from cas.durable import Disk, temporary_name
from cas.errors import JournalDamaged

_BATCH = 1024  # records a frame: about half a megabyte
_ACTOR = "checkpoint"
_NAME = re.compile(r"([0-9]+)-([0-9]{20})\.log", re.ASCII)


@final
class Checkpoint(msgspec.Struct, frozen=True, order=True):
    """The name of a checkpoint; they sort in the order of their positions."""

    epoch: int
    seq: int

    @property
    def filename(self) -> str:
        return f"{self.epoch}-{self.seq:020}.log"


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a folder, oldest first."""
    found = [_NAME.fullmatch(name) for name in os.listdir(folder)]
    return sorted(Checkpoint(int(match[1]), int(match[2])) for match in found if match)


def write_checkpoint(folder: Path, position: Position, ops: Iterable[Op], disk: Disk) -> Checkpoint:
    """Write the state at `position`; durable on return, whole or absent after a crash."""
    made = Checkpoint(position.epoch, position.seq)
    aside = folder / temporary_name()
    fd = disk.create(aside, 0o600)
    try:
        chain, count = position.chain, 0

        def add(writes: list[Write]) -> bytes:
            frame = Frame(
                position.epoch, position.seq, position.at_us, chain, position.state, writes
            )
            data, after = encode_frame(frame)
            disk.write(fd, data)
            return after.chain

        chain = add([])
        for batch in _batches(ops):
            chain = add([Write(_ACTOR, "", batch)])
            count += len(batch)
        add([Write(_ACTOR, str(count), [])])
        disk.sync_data(fd)
        disk.rename(aside, folder / made.filename)
    except BaseException:
        disk.unlink(aside)
        raise
    finally:
        os.close(fd)
    disk.sync_folder(folder)
    return made


def _batches(ops: Iterable[Op]) -> Iterator[list[Op]]:
    batch: list[Op] = []
    for op in ops:
        batch.append(op)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def read_checkpoint(path: Path) -> Iterator[Position | list[Op]]:
    """First the position, then the records in batches, in constant memory.

    Raises JournalDamaged, possibly after batches were given: use them only when it ended.
    """
    with path.open("rb", buffering=0) as file:
        fd, offset = file.fileno(), 0
        position: Position | None = None
        chain, count = b"", 0
        while True:
            read = read_frame(fd, offset)
            if isinstance(read, str):
                raise JournalDamaged(path, offset, read)
            frame, after, end = read
            if position is None:
                chain = frame.chain
                position = Position(frame.epoch, frame.seq, chain, frame.state, frame.at_us)
                yield position
            elif frame.chain != chain:
                raise JournalDamaged(path, offset, "the frame is not of this checkpoint")
            for write in frame.writes:
                if not write.ops:
                    if write.request_id != str(count):
                        raise JournalDamaged(path, offset, f"{count} records, not as many as made")
                    return
                count += len(write.ops)
                yield write.ops
            chain, offset = after.chain, end
