"""History: finding a place in the kept journal again, and reading whole frames from there.

For whoever carries the journal elsewhere, byte for byte: what was shipped last is known by
its number and its chain value alone, and those two prove that it is of this history.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from pathlib import Path
from typing import final

import msgspec

from cas.catalog import Position
from cas.catalog.images import Head
from cas.catalog.journal import Placed, Segment, Stop, frames, segments_in
from cas.catalog.recovery import follow
from cas.durable import opened


class Lies(enum.Enum):
    """How a position lies to a journal."""

    HERE = "here"  # the journal goes on from it
    AHEAD = "ahead"  # it is later than all that the journal holds
    FOREIGN = "foreign"  # another frame stands in its place
    PRUNED = "pruned"  # the journal that is kept begins later


@final
class Found(msgspec.Struct, frozen=True):
    """Where a position lies; `place` is where the frame after it stands, or will stand."""

    lies: Lies
    place: tuple[Segment, int] | None = None


@final
class RawFrame(msgspec.Struct, frozen=True):
    """A committed frame as it stands on disk."""

    data: bytes
    position: Position  # after it
    place: tuple[Segment, int]  # where the next one stands, or will stand


def locate(folder: Path, head: Head, seq: int, chain: bytes) -> Found:
    """Where the position after frame `seq`, whose chain value is `chain`, lies.

    `head` bounds what is committed. Costs the reading of at most one segment. Raises
    JournalDamaged where a bad frame is in the way.
    """
    newest = head.position
    if seq > newest.seq:
        return Found(Lies.AHEAD)
    if seq == newest.seq:
        here = chain == newest.chain
        place = (Segment(head.segment_epoch, head.segment_first_seq), head.frame_end)
        return Found(Lies.HERE, place) if here else Found(Lies.FOREIGN)
    before = [segment for segment in segments_in(folder) if segment.first_seq <= seq + 1]
    try:
        return _within(folder, before[-1], seq, chain) if before else Found(Lies.PRUNED)
    except FileNotFoundError:
        return Found(Lies.PRUNED)  # by another process, at this moment


def _within(folder: Path, segment: Segment, seq: int, chain: bytes) -> Found:
    for item in frames(folder / segment.filename, segment):
        if isinstance(item, Stop):
            raise item.error()
        if item.frame.seq == seq + 1:
            if item.frame.chain != chain:
                return Found(Lies.FOREIGN)
            return Found(Lies.HERE, (segment, item.start))
    return Found(Lies.PRUNED)


def raw_frames(
    folder: Path, newest: Position, seq: int, chain: bytes, place: tuple[Segment, int]
) -> Iterator[RawFrame]:
    """The frames after `seq` up to `newest`, oldest first, each proved to continue the chain.

    `place` is of `locate`, or of the last frame read before. Frames beyond `newest` may not
    be synced yet, and are not given. Raises JournalDamaged.
    """
    if seq >= newest.seq:
        return
    after = Position(place[0].epoch, seq, chain, b"", 0)
    for item in follow(folder, after, place):
        if isinstance(item, Stop):
            raise item.error()
        yield _raw(folder, item)
        if item.frame.seq >= newest.seq:
            return


def _raw(folder: Path, item: Placed) -> RawFrame:
    with opened(folder / item.segment.filename) as fd:
        data = os.pread(fd, item.end - item.start, item.start)
    return RawFrame(data, item.position, (item.segment, item.end))
