"""Time tells no tenant whether another one has some bytes (invariant 9).

A put that misses and a put whose bytes another tenant holds do the same durable steps in
the same order before they answer, also where the answer is a refusal; the long form
measures that they take the same time.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cas.config import LimitSettings, Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.errors import LinkQuotaExceeded, QuotaExceeded, UploadClosed
from cas.files import Files, PutItem
from cas.store import Store
from cas.uploads import UploadRequest
from tests.cas.disks import TracedDisk
from tests.cas.interposed import interpose
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
            with until_the_answer(store, disk):
                put(store, files, data)
                steps[kind] = list(disk.steps)
    assert steps["hit"] == steps["miss"]
    assert {"write", "link"} <= set(steps["hit"])


@contextmanager
def until_the_answer(store: Store, disk: TracedDisk) -> Iterator[None]:
    """Nothing of what is done after the answer is done before the end."""
    answered = threading.Event()
    store.blobs.leftovers.add(lambda: answered.wait(60))
    disk.steps.clear()
    try:
        yield
    finally:
        answered.set()
        store.blobs.close()


def over_quota(store: Store, data: bytes) -> None:
    with pytest.raises(QuotaExceeded):
        store.files("full", "ada").put(Stream(data), name="it")


def over_quota_in_a_batch(store: Store, data: bytes) -> None:
    with pytest.raises(QuotaExceeded):
        store.files("full", "ada").put_many([PutItem(data, "it")])


def over_quota_in_a_slot(store: Store, data: bytes) -> None:
    upload = store.uploads("full", "ada").request(UploadRequest("it"))
    with pytest.raises(LinkQuotaExceeded):
        store.upload_link(upload.upload_token).put(0, Stream(data), filename="it")


def into_a_slot_that_closes(store: Store, data: bytes) -> None:
    uploads = store.uploads("acme", "ada")
    token = uploads.request(UploadRequest("it")).upload_token
    interpose(store.adoption).append(lambda: uploads.cancel(token))
    with pytest.raises(UploadClosed):
        store.upload_link(token).put(0, Stream(data), filename="it")


class Stream:
    """Of a length that nobody knows."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def readinto(self, buffer: memoryview, /) -> int:
        piece, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize(
    "refuse", [over_quota, over_quota_in_a_batch, over_quota_in_a_slot, into_a_slot_that_closes]
)
@pytest.mark.parametrize("size_bytes", [4096, 3 << 20])
def test_a_refused_put_does_the_same_steps_whoever_has_the_bytes(
    memory: Path, clock: HandClock, refuse: Callable[[Store, bytes], None], size_bytes: int
) -> None:
    disk, held = TracedDisk(), b"h" * size_bytes
    with Store.open(memory / "store", SETTINGS, clock=clock, disk=disk) as store:
        store.files("other", "bob").put(held, name="it")
        store.files("full", "ada").put(b"x", name="it")
    limited = Settings(store=SETTINGS.store, limits=LimitSettings(quota_files=1))
    with Store.open(memory / "store", limited, clock=clock, disk=disk) as store:
        steps = {}
        for kind, data in (("miss", b"m" * size_bytes), ("hit", held)):
            with until_the_answer(store, disk):
                refuse(store, data)
                steps[kind] = list(disk.steps)
        assert [entry.name for entry in store.blobs.shard(digest_of(b"m" * size_bytes)[0])] == []
    assert steps["hit"] == steps["miss"]
    assert {"write", "link"} <= set(steps["hit"])


def test_a_heal_waits_for_the_disk_as_often_as_a_miss(memory: Path, clock: HandClock) -> None:
    """What it does besides takes no waiting; but it is the one case that can be told apart."""
    disk = TracedDisk()
    with Store.open(memory / "store", SETTINGS, clock=clock, disk=disk) as store:
        store.files("other", "bob").put(b"old", name="it")
        clock.advance(SETTINGS.store.trust_verified_for + 1)
        steps = {}
        for kind, data in (("miss", b"new"), ("heal", b"old")):
            with until_the_answer(store, disk):
                put_one(store, store.files("acme", "ada"), data)
                steps[kind] = Counter(disk.steps)
    assert steps["heal"] - steps["miss"] == Counter(["link", "rename", "unlink"])
    assert steps["miss"] - steps["heal"] == Counter()


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
