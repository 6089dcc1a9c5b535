"""How much is measured: what the targets speak of, or a quick look at the same things."""

from __future__ import annotations

from pathlib import Path
from typing import final

import msgspec

from bench.corpus import KIB, MIB


@final
class Scale(msgspec.Struct, frozen=True):
    """Sizes, counts and rounds of all workloads. Medians are of `rounds` runs a side."""

    rounds: int = 5
    large_bytes: int = 1 << 30
    small_files: int = 20_000
    sizes: tuple[tuple[int, int], ...] = (
        (4 * KIB, 400),
        (64 * KIB, 400),
        (MIB, 100),
        (16 * MIB, 20),
        (256 * MIB, 3),
    )  # bytes, and how many of each
    commits: int = 8_000
    slow_commits: int = 1_600
    lookups: int = 20_000
    journal_ops: int = 1_000_000
    requests: int = 500
    stream_bytes: int = 10 << 30
    connections: int = 32
    crowd_requests: int = 3_000
    slow_clients: int = 200
    slow_bytes: int = 8 * MIB  # of a file that is read slowly: more than sockets buffer
    memory_uploads: int = 200
    memory_bytes: int = 64 * MIB
    due_files: int = 1_000  # of a sweep, among few and among many
    few_files: int = 10_000
    many_files: int = 1_000_000
    mirrored: tuple[tuple[int, int], ...] = ((64 * KIB, 2_000), (512 * MIB, 4))  # as `sizes`
    backlog_rows: int = 1_000_000
    restored_files: int = 100_000
    waits: tuple[int, ...] = (1, 1_000)  # at once
    wakes: int = 1_000


FULL = Scale()
QUICK = Scale(
    rounds=3,
    large_bytes=64 * MIB,
    small_files=500,
    sizes=((4 * KIB, 50), (MIB, 20), (16 * MIB, 5)),
    commits=320,
    slow_commits=80,
    lookups=5_000,
    journal_ops=50_000,
    requests=50,
    stream_bytes=256 * MIB,
    connections=8,
    crowd_requests=300,
    slow_clients=40,
    memory_uploads=20,
    memory_bytes=8 * MIB,
    due_files=200,
    few_files=1_000,
    many_files=20_000,
    mirrored=((64 * KIB, 200), (64 * MIB, 2)),
    backlog_rows=20_000,
    restored_files=5_000,
    waits=(1, 100),
    wakes=50,
)


@final
class Bench(msgspec.Struct, frozen=True):
    """What a workload is given: how much to do, and a folder to do it in."""

    folder: Path
    scale: Scale = FULL
