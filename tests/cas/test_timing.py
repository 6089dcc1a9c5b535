"""Time tells no tenant whether another one has some bytes (invariant 9).

A put that misses and a put whose bytes another tenant holds do the same durable steps in
the same order before they answer; the long form measures that they take the same time.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cas.config import Settings, Size, StoreSettings
from cas.files import Files, PutItem
from cas.store import Store
from cas.uploads import UploadRequest
from tests.cas.disks import TracedDisk
from tests.clocks import HandClock

SETTINGS = Settings(store=StoreSettings(min_free=Size(0)))
Put = Callable[[Store, Files, bytes], object]


def put_one(store: Store, files: Files, data: bytes) -> object:
    return files.put(data, name="it")


def put_many(store: Store, files: Files, data: bytes) -> object:
    return files.put_many([PutItem(data, "it")])


def put_known_length(store: Store, files: Files, data: bytes) -> object:
    """The tenant has other bytes of this length, so these are hashed first."""
    return files.put(data, name="it")


def fill_slot(store: Store, files: Files, data: bytes) -> object:
    upload = store.uploads("acme", "ada").request(UploadRequest("it"))
    return store.upload_link(upload.upload_token).put(0, data, filename="it")


@pytest.mark.parametrize("put", [put_one, put_many, put_known_length, fill_slot])
@pytest.mark.parametrize("size_bytes", [1, 4096, 3 << 20])
def test_a_hit_on_anothers_bytes_does_the_steps_of_a_miss(
    memory: Path, clock: HandClock, put: Put, size_bytes: int
) -> None:
    disk = TracedDisk()
    with Store.open(memory / "store", SETTINGS, clock=clock, disk=disk) as store:
        files = store.files("acme", "ada")
        if put is put_known_length:
            put_one(store, files, b"k" * size_bytes)
        held = b"h" * size_bytes
        store.files("other", "bob").put(held, name="it")
        store.blobs.close()
        steps = {}
        for kind, data in (("miss", b"m" * size_bytes), ("hit", held)):
            disk.steps.clear()
            put(store, files, data)
            steps[kind] = answered(disk.steps)
    assert steps["hit"] == steps["miss"]
    assert {"write", "link"} <= set(steps["hit"])


def answered(steps: list[str]) -> list[str]:
    """The steps that take time before the answer: taking a name away in memory takes none."""
    return [step for step in steps if step != "unlink"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size_bytes", [4096, 1 << 20])
@pytest.mark.parametrize("put", [put_one, fill_slot])
def test_hits_and_misses_take_the_same_time(root: Path, put: Put, size_bytes: int) -> None:
    """At least 2,000 puts of each kind in random order; the difference drowns in the noise."""
    chance = random.Random(1)
    count = 2_000 if size_bytes < 1 << 20 else 500
    with Store.open(root / "store", SETTINGS) as store:
        files, others = store.files("acme", "ada"), store.files("other", "bob")
        kinds = ["hit", "miss"] * count
        chance.shuffle(kinds)
        taken: dict[str, list[float]] = {"hit": [], "miss": []}
        for kind in kinds:
            data = chance.randbytes(size_bytes)
            # The other tenant stores something each time, so that what went before is alike.
            others.put(data if kind == "hit" else chance.randbytes(size_bytes), name="it")
            begin = time.perf_counter()
            put(store, files, data)
            taken[kind].append((time.perf_counter() - begin) * 1e6)
    z = mann_whitney_z(taken["hit"], taken["miss"])
    hit, miss = statistics.median(taken["hit"]), statistics.median(taken["miss"])
    low, _, high = statistics.quantiles(taken["miss"], n=4)
    sys.stdout.write(
        f"\n{put.__name__} of {size_bytes} bytes, {count} of each: median hit {hit:.0f} µs, "
        f"miss {miss:.0f} µs, difference {hit - miss:+.0f} µs, quartiles of a miss "
        f"{low:.0f}-{high:.0f} µs, z {z:+.1f}\n"
    )
    # What one put can tell: a small part of what the disk varies by itself.
    assert abs(hit - miss) < 0.1 * (high - low) + 0.02 * miss


def mann_whitney_z(one: list[float], other: list[float]) -> float:
    """How far apart two samples are in rank, in standard deviations of chance."""
    ranked = sorted([(value, 0) for value in one] + [(value, 1) for value in other])
    ranks = sum(rank for rank, (_, which) in enumerate(ranked, 1) if which == 0)
    n, m = len(one), len(other)
    u = ranks - n * (n + 1) / 2
    return (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
