"""Checkpoints: whole or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cas.catalog import Position
from cas.catalog.checkpoint import Checkpoint, checkpoints_in, read_checkpoint, write_checkpoint
from cas.catalog.journal import Op
from cas.durable import DISK
from cas.errors import JournalDamaged
from tests.crash.steps import FailingDisk

POSITION = Position(1, 42, b"c" * 32, b"s" * 16, 7)
SMALL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)


def ops(count: int) -> list[Op]:
    return [(6, b"%06d" % number, b"value") for number in range(count)]


def read(path: Path) -> tuple[Position, list[Op]]:
    position, *batches = read_checkpoint(path)
    assert isinstance(position, Position)
    found: list[Op] = []
    for batch in batches:
        assert isinstance(batch, list)
        found += batch
    return position, [(number, key, raw) for number, key, raw in found]


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 3000])
def test_a_checkpoint_gives_back_what_it_was_given(root: Path, count: int) -> None:
    made = write_checkpoint(root, POSITION, ops(count), DISK)
    assert checkpoints_in(root) == [made] == [Checkpoint(1, 42)]
    assert read(root / made.filename) == (POSITION, ops(count))


@given(st.data())
@SMALL
def test_any_flipped_bit_or_lost_end_is_noticed(root: Path, data: st.DataObject) -> None:
    path = root / write_checkpoint(root, POSITION, ops(2000), DISK).filename
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    with pytest.raises(JournalDamaged) as refused:
        read(path)
    assert refused.value.path == path


def test_frames_of_another_checkpoint_are_not_taken_for_its_own(root: Path) -> None:
    one = root / write_checkpoint(root, POSITION, ops(2000), DISK).filename
    content = one.read_bytes()
    other = Position(1, 42, b"d" * 32, b"s" * 16, 7)
    write_checkpoint(root, other, ops(2000), DISK)
    # Both have frames of the same sizes: splice the second half of one to the other.
    half = len(content) - 2000
    one.write_bytes(one.read_bytes()[:half] + content[half:])
    with pytest.raises(JournalDamaged):
        read(one)


@pytest.mark.parametrize("step", ["create", "write", "sync_data", "rename", "sync_folder"])
def test_a_checkpoint_that_failed_leaves_the_old_ones_alone(root: Path, step: str) -> None:
    made = write_checkpoint(root, Position(1, 1, b"c" * 32, b"s" * 16, 1), ops(3), DISK)
    disk = FailingDisk(5, lambda name, number: name == step)
    with pytest.raises(OSError, match="Input/output error"):
        write_checkpoint(root, POSITION, ops(3), disk)
    assert checkpoints_in(root)[0] == made
    assert read(root / made.filename)[1] == ops(3)
    if step != "sync_folder":
        assert os.listdir(root) == [made.filename]


def test_a_state_that_does_not_add_up_gets_no_name(root: Path) -> None:
    def wrong() -> list[Op]:
        raise ValueError("found out at the end")

    def records() -> object:
        yield from ops(3)
        wrong()

    with pytest.raises(ValueError, match="found out"):
        write_checkpoint(root, POSITION, records(), DISK)  # type: ignore[arg-type]
    assert os.listdir(root) == []
