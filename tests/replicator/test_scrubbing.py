"""The job that scrubs: a round at a time, interrupted at any moment."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.clock import DAY_US
from cas.config import Settings, Size, StoreSettings, SweeperSettings
from cas.keys import load_keys
from cas.records import Blob, StoredFile
from cas.store import Store
from replicator.jobs import Jobs
from replicator.scrubbing import ScrubRound
from tests.clocks import HandClock

FAST = 1 << 40


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, clock=clock) as opened:
        yield opened


def put(store: Store, content: bytes) -> StoredFile:
    return store.files("t1", "tests").put(content, name="a")


async def to_the_end(job: ScrubRound) -> None:
    while await job.step(0):
        pass


def round_of(store: Store) -> None:
    async def story() -> None:
        job = ScrubRound(store, FAST)
        await to_the_end(job)
        await job.close()

    asyncio.run(story())


def blob_of(store: Store, file: StoredFile) -> Blob:
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, file.checksum_sha256)
    assert blob is not None
    return blob


def test_a_round_finds_damage_tells_it_and_clears_leftovers_away(
    store: Store, clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = put(store, b"good"), put(store, b"bad")
    leftovers = [
        store.root / "catalog" / ".tmp-0123",
        store.root / "objects" / "00" / ".tmp-0123",
    ]
    for leftover in leftovers:
        leftover.write_bytes(b"of a killed process")
    path = store.blobs.path(bad.checksum_sha256)
    os.chmod(path, 0o600)
    path.write_bytes(b"BAD")
    # File times are the system's: the clock of the store is moved beyond the grace after them.
    clock.time_us = max(clock.now_us(), time.time_ns() // 1000) + 2 * DAY_US

    round_of(store)

    assert blob_of(store, good).verified_at == clock.now_us()
    assert blob_of(store, bad).missing_at is not None
    assert not any(leftover.exists() for leftover in leftovers)
    assert bad.checksum_sha256.hex() in caplog.text


def test_stopping_does_not_wait_for_the_piece_at_work(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terabyte at 20 MiB a second takes half a day."""
    monkeypatch.setattr("replicator.scrubbing._STEP_S", 0.01)
    file = put(store, bytes(5_000))
    stored_at = blob_of(store, file).verified_at
    clock.advance(DAY_US)

    async def story() -> None:
        job = ScrubRound(store, 1)  # 5,000 seconds of reading
        assert await job.step(0)
        assert await job.step(0)
        async with asyncio.timeout(60):
            await job.close()

    asyncio.run(story())
    assert blob_of(store, file).verified_at == stored_at


def test_a_piece_that_fails_is_a_failure_of_the_job_and_a_later_one_goes_on(
    store: Store, clock: HandClock
) -> None:
    file = put(store, b"hello")
    clock.advance(DAY_US)
    shard = store.root / "objects" / "00"

    async def story() -> None:
        job = ScrubRound(store, FAST)
        shard.rename(shard.with_name("away"))
        with pytest.raises(FileNotFoundError):
            await to_the_end(job)
        shard.with_name("away").rename(shard)
        await to_the_end(job)
        await job.close()

    asyncio.run(story())
    assert blob_of(store, file).verified_at == clock.now_us()


def test_the_scrub_is_for_a_process_that_lasts_and_can_be_left_out(root: Path) -> None:
    store_settings = StoreSettings(root=root)
    with Store.open(root, Settings(store=store_settings)) as store:
        keys = load_keys(store.settings)
        assert "scrub" not in [job.name for job in Jobs(store, keys).due()]
        assert "scrub" in [job.name for job in Jobs(store, keys).lasting()]
    settings = Settings(store=store_settings, sweeper=SweeperSettings(scrub_rate=Size(0)))
    with Store.open(root, settings) as store:
        assert "scrub" not in [job.name for job in Jobs(store, keys).lasting()]
