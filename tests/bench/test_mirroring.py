"""The mirror against rclone, with hardly anything to do: `blobcask bench mirror` measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from bench.ceph import PROGRAMS
from bench.corpus import KIB
from bench.mirroring import mirror, read_backlog
from bench.scale import QUICK, Bench, Scale

SMALL: Scale = replace(QUICK, rounds=1, mirrored=((64 * KIB, 20),), backlog_rows=2_000)


@pytest.mark.slow
def test_the_mirror_and_rclone_copy_the_same_files(
    root: Path, program: Callable[[str], str]
) -> None:
    for name in ("rclone", *PROGRAMS):
        program(name)
    speed, processor, memory = mirror(Bench(root, SMALL))
    assert speed.figure > 0
    assert processor.ours.value > 0
    assert memory.ours.value > 1


def test_a_backlog_is_told_whatever_its_length(root: Path) -> None:
    (row,) = read_backlog(Bench(root, SMALL))
    assert row.figure > 0
