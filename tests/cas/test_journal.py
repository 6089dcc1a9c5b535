"""Frames and segments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cas.catalog import Position
from cas.catalog.journal import (
    BEGINNING,
    MAGIC,
    Frame,
    Placed,
    Segment,
    Stop,
    Tail,
    Write,
    encode_frame,
    frames,
    segments_in,
)
from cas.durable import DISK

SEGMENT = Segment(1, 1)
SMALL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)


def chain(*payloads: bytes) -> tuple[bytes, list[int], Position]:
    """The bytes of one frame for each payload, where each begins, and the position after."""
    data, starts, position = b"", [], BEGINNING
    for payload in payloads:
        write = Write("actor", "", [(6, b"key", payload)])
        frame = Frame(1, position.seq + 1, 7, position.chain, bytes(16), [write])
        encoded, position = encode_frame(frame)
        starts.append(len(data))
        data += encoded
    return data, starts, position


def read(root: Path, data: bytes) -> list[Placed | Stop]:
    path = root / SEGMENT.filename
    path.write_bytes(data)
    return list(frames(path, SEGMENT))


@given(st.lists(st.binary(max_size=200), max_size=5))
@SMALL
def test_what_was_framed_is_read_again(root: Path, payloads: list[bytes]) -> None:
    data, starts, position = chain(*payloads)
    found = read(root, data)
    assert all(isinstance(item, Placed) for item in found)
    placed = [item for item in found if isinstance(item, Placed)]
    assert [item.start for item in placed] == starts
    assert [item.frame.writes[0].ops[0][2] for item in placed] == payloads
    if placed:
        assert placed[-1].position == position
        assert placed[-1].end == len(data)


@given(st.data())
@SMALL
def test_a_file_that_ends_anywhere_is_torn_there_and_no_damage(
    root: Path, data: st.DataObject
) -> None:
    encoded, starts, _ = chain(b"one", b"two", b"three")
    size = data.draw(st.integers(0, len(encoded)))
    found = read(root, encoded[:size])
    whole = [item for item in found if isinstance(item, Placed)]
    assert len(whole) == sum(end <= size for end in [*starts[1:], len(encoded)])
    stops = [item for item in found if isinstance(item, Stop)]
    assert len(stops) == (size not in (*starts, len(encoded)))
    for stop in stops:
        assert stop.valid_after is None


@given(st.data())
@SMALL
def test_a_flipped_bit_stops_at_its_frame_and_finds_the_next(
    root: Path, data: st.DataObject
) -> None:
    encoded, starts, _ = chain(b"one", b"two", b"three")
    at = data.draw(st.integers(0, len(encoded) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(encoded)
    damaged[at] ^= 1 << bit
    *whole, stop = read(root, bytes(damaged))
    number = sum(start <= at for start in starts) - 1
    assert len(whole) == number
    assert isinstance(stop, Stop)
    assert stop.start == starts[number]
    assert stop.valid_after == (starts[number + 1] if number < 2 else None)
    assert stop.error().offset == stop.start


def test_a_record_that_holds_the_magic_is_no_frame(root: Path) -> None:
    data, starts, _ = chain(MAGIC * 50, b"next")
    damaged = bytearray(data)
    damaged[30] ^= 1
    (stop,) = read(root, bytes(damaged))
    assert isinstance(stop, Stop)
    assert stop.valid_after == starts[1]


def test_the_next_valid_frame_is_found_across_the_border_of_a_window(root: Path) -> None:
    size = (1 << 20) - 200
    for extra in range(0, 240, 7):
        data, starts, _ = chain(bytes(size + extra), b"next")
        damaged = bytearray(data)
        damaged[0] ^= 1
        (stop,) = read(root, bytes(damaged))
        assert isinstance(stop, Stop)
        assert stop.valid_after == starts[1]


def test_a_length_that_asks_for_gigabytes_is_not_believed(root: Path) -> None:
    (stop,) = read(root, MAGIC + b"\xff\xff\xff\xff" + bytes(100))
    assert isinstance(stop, Stop)
    assert "length" in stop.reason


def test_segments_sort_by_epoch_and_number_and_strangers_are_passed_over(root: Path) -> None:
    wanted = [Segment(1, 2), Segment(1, 10), Segment(2, 3), Segment(10, 1)]
    for segment in reversed(wanted):
        (root / segment.filename).touch()
    for name in ("1-2.log", "notes.log", f"{Segment(1, 1).filename}.damaged", ".tmp-1"):
        (root / name).touch()
    assert segments_in(root) == wanted


@pytest.fixture
def tail(root: Path) -> Tail:
    (root / SEGMENT.filename).touch()
    return Tail(root, DISK, segment_bytes_max=100)


def test_a_full_segment_is_followed_by_one_named_after_its_first_frame(
    root: Path, tail: Tail
) -> None:
    assert tail.append(b"x" * 100, SEGMENT, 0, seq=1) == (SEGMENT, 0)
    assert tail.append(b"y" * 10, SEGMENT, 100, seq=2) == (Segment(1, 2), 0)
    tail.sync()
    assert (root / Segment(1, 2).filename).read_bytes() == b"y" * 10
    tail.close()


def test_a_segment_that_was_begun_and_left_is_begun_again(root: Path, tail: Tail) -> None:
    (root / Segment(1, 2).filename).write_bytes(b"torn")
    assert tail.append(b"y", SEGMENT, 100, seq=2) == (Segment(1, 2), 0)
    assert (root / Segment(1, 2).filename).read_bytes() == b"y"
    tail.close()


def test_a_tail_does_not_follow_a_file_that_lost_its_name(root: Path, tail: Tail) -> None:
    """Another process dropped the segment that this one had begun, and began it again."""
    tail.append(b"mine", SEGMENT, 100, seq=2)
    path = root / Segment(1, 2).filename
    path.unlink()
    path.write_bytes(b"the other's")
    assert tail.size(Segment(1, 2)) == len(b"the other's")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tail.size(Segment(1, 2))
    tail.close()


def test_a_tail_takes_back_what_nobody_was_told_of(root: Path, tail: Tail) -> None:
    tail.append(b"kept", SEGMENT, 0, seq=1)
    tail.append(b"gone", SEGMENT, 4, seq=2)
    tail.take_back(SEGMENT, 4)
    assert (root / SEGMENT.filename).read_bytes() == b"kept"
    tail.append(b"gone", SEGMENT, 200, seq=2)
    tail.take_back(SEGMENT, 200)
    assert os.stat(root / Segment(1, 2).filename).st_size == 0
    assert (root / SEGMENT.filename).read_bytes() == b"kept"
    tail.close()
