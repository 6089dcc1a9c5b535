"""The journal: the append-only truth of the catalog (invariant 5).

A segment `<epoch>-<first_seq:020>.log` is a run of frames, one per committed group:

    offset  bytes  what
    0       4      magic "BCF1"
    4       4      length of the payload, most significant byte first
    8       8      XXH3-64 of the payload
    16      …      payload: msgpack [epoch, seq, at, chain, state, writes]

    chain   32 bytes: the chain value before this frame; the frame's own is
            BLAKE3(chain ‖ payload), so each frame seals all that came before it
    state   16 bytes: the sum mod 2^128 of BLAKE3-128(table ‖ key ‖ record) over all records
            as they are after this frame: two catalogs with one state hold the same records
    writes  [[actor, request_id, [[table, key, record or nil], …]], …] with complete
            after-images, reference counts included, so that replay runs no hooks

A bad frame with nothing valid after it is a write that was torn before it was
acknowledged: it is cut. A bad frame with a valid one after it is damage: it is named, and
nothing is ever truncated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import final

import blake3
import msgspec
import xxhash

from cas.catalog import Position
from cas.durable import Disk
from cas.errors import JournalDamaged

MAGIC = b"BCF1"
_HEADER_BYTES = 16
# A group stops growing at GROUP_BYTES (see `local`); one write may be larger. A length over
# this is never believed, so that a flipped bit cannot ask for gigabytes.
PAYLOAD_BYTES_MAX = 1 << 30

EPOCH_FIRST = 1
CHAIN_FIRST = bytes(32)
STATE_FIRST = bytes(16)
BEGINNING = Position(EPOCH_FIRST, 0, CHAIN_FIRST, STATE_FIRST, 0)

Op = tuple[int, bytes, bytes | None]


@final
class Write(msgspec.Struct, frozen=True, array_like=True):
    """What one write of a group did, and who asked for it (the audit log)."""

    actor: str
    request_id: str
    ops: list[Op]


@final
class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One committed group."""

    epoch: int
    seq: int
    at_us: int
    chain: bytes  # of the frame before
    state: bytes
    writes: list[Write]


@final
class Segment(msgspec.Struct, frozen=True, order=True):
    """The name of a segment; segments sort in the order of their frames."""

    epoch: int
    first_seq: int

    @property
    def filename(self) -> str:
        return f"{self.epoch}-{self.first_seq:020}.log"


@final
class Placed(msgspec.Struct, frozen=True):
    """A frame and where it stands in its segment."""

    frame: Frame
    position: Position  # after this frame
    segment: Segment
    start: int
    end: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode
_SEGMENT_NAME = re.compile(r"([0-9]+)-([0-9]{20})\.log", re.ASCII)


def encode_frame(frame: Frame) -> tuple[bytes, Position]:
    """The frame's bytes, and the position after it."""
    payload = _encode(frame)
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a frame of {len(payload)} bytes is too large")
    header = MAGIC + len(payload).to_bytes(4, "big") + xxhash.xxh3_64_digest(payload)
    return header + payload, _after(frame, payload)


def _after(frame: Frame, payload: bytes) -> Position:
    chain = blake3.blake3(frame.chain)
    chain.update(payload)
    return Position(frame.epoch, frame.seq, chain.digest(), frame.state, frame.at_us)


def read_frame(fd: int, offset: int) -> tuple[Frame, Position, int] | str:
    """The frame at `offset`, the position after it and its end; or why there is none."""
    header = os.pread(fd, _HEADER_BYTES, offset)
    if len(header) < _HEADER_BYTES:
        return "the header is cut short"
    if header[:4] != MAGIC:
        return "no frame begins here"
    length = int.from_bytes(header[4:8], "big")
    if length > PAYLOAD_BYTES_MAX:
        return f"a length of {length} bytes"
    payload = os.pread(fd, length, offset + _HEADER_BYTES)
    if len(payload) < length:
        return f"{len(payload)} of {length} bytes are there"
    if xxhash.xxh3_64_digest(payload) != header[8:]:
        return "the checksum differs"
    try:
        frame = _decode(payload)
    except msgspec.MsgspecError as error:
        return f"the payload is not readable: {error}"
    return frame, _after(frame, payload), offset + _HEADER_BYTES + length


def segments_in(folder: Path) -> list[Segment]:
    """The segments of a folder, oldest first; anything with another name is passed over."""
    found = [_SEGMENT_NAME.fullmatch(name) for name in os.listdir(folder)]
    return sorted(Segment(int(match[1]), int(match[2])) for match in found if match)


def frames(path: Path, segment: Segment, start: int = 0) -> Iterator[Placed | Stop]:
    """The frames of one segment from byte `start` on, in constant memory.

    Ends with a `Stop` where a frame was expected and is bad; with nothing at a clean end.
    """
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        while start < size:
            read = read_frame(fd, start)
            if isinstance(read, str):
                yield Stop(segment, path, start, read, valid_at_or_after(fd, start + 1))
                return
            frame, position, end = read
            yield Placed(frame, position, segment, start, end)
            start = end


@final
class Stop(msgspec.Struct, frozen=True):
    """A bad frame: torn when nothing valid comes after it, else damage."""

    segment: Segment
    path: Path
    start: int
    reason: str
    valid_after: int | None  # offset of the next valid frame in the same segment

    def error(self) -> JournalDamaged:
        return JournalDamaged(self.path, self.start, self.reason)


def valid_at_or_after(fd: int, offset: int) -> int | None:
    """The offset of the next valid frame, searched byte by byte for its magic."""
    window = 1 << 20
    while True:
        # Overlap by what a magic across the border needs.
        block = os.pread(fd, window + len(MAGIC) - 1, offset)
        if len(block) < len(MAGIC):
            return None
        at = block.find(MAGIC)
        while at >= 0:
            if not isinstance(read_frame(fd, offset + at), str):
                return offset + at
            at = block.find(MAGIC, at + 1)
        offset += window


@final
class Tail:
    """The open end of the journal of one process: appends frames under the writer lock."""

    def __init__(self, folder: Path, disk: Disk, segment_bytes_max: int) -> None:
        self._folder = folder
        self._disk = disk
        self._segment_bytes_max = segment_bytes_max
        self._fd = -1
        self._segment: Segment | None = None

    def at(self, segment: Segment) -> int:
        """The descriptor of `segment`, opened once; raises FileNotFoundError when it is gone."""
        # The file may have lost its name too: begun by this process, which then met a full
        # disk, dropped as unused by another one, and begun again under the same name.
        if segment != self._segment or os.fstat(self._fd).st_nlink == 0:
            self.close()
            self._fd = os.open(self._folder / segment.filename, os.O_RDWR | os.O_CLOEXEC)
            self._segment = segment
        return self._fd

    def size(self, segment: Segment) -> int:
        """The bytes of `segment`; raises FileNotFoundError when it is gone."""
        return os.fstat(self.at(segment)).st_size

    def append(self, data: bytes, segment: Segment, end: int, seq: int) -> tuple[Segment, int]:
        """Write one frame after byte `end` of `segment`, or into a new segment when it is full.

        Returns where it stands. Not durable before `sync`. On an OSError nothing valid was
        added: what a short write left is cut, and cut again by the next roll-forward.
        """
        if end >= self._segment_bytes_max:
            segment, end = self._begin(Segment(segment.epoch, seq)), 0
        fd = self.at(segment)
        try:
            self._disk.write_at(fd, data, end)
        except OSError:
            self._disk.truncate(fd, end)
            raise
        return segment, end

    def _begin(self, segment: Segment) -> Segment:
        self.close()
        path = self._folder / segment.filename
        try:
            self._fd = self._disk.create(path, 0o600)
        except FileExistsError:
            # Somebody was killed right here. Roll-forward has been through: nothing valid
            # is in it, or it would be the segment we come from.
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._disk.truncate(self._fd, 0)
        self._segment = segment
        # The name must be durable before the first frame in it is acknowledged.
        self._disk.sync_folder(self._folder)
        return segment

    def sync(self) -> None:
        """One durability barrier for the group (invariant 4)."""
        self._disk.sync_data(self._fd)

    def take_back(self, segment: Segment, end: int) -> None:
        """Drop what was appended after byte `end` of `segment`, as far as the disk lets us."""
        if self._fd >= 0:
            try:
                self._disk.truncate(self._fd, end if segment == self._segment else 0)
            except OSError:
                return  # the mark in the index stops everybody

    def cut(self, segment: Segment, end: int) -> None:
        """Drop a torn, never acknowledged end; durable on return."""
        fd = self.at(segment)
        self._disk.truncate(fd, end)
        self._disk.sync_data(fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._segment = -1, None
