"""The jobs that end what is over, one bounded batch a step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.deliveries import KEPT_US, Outcome, enqueue, record_attempt
from cas.errors import Conflict
from cas.retention import parse_retention
from cas.store import Store
from cas.uploads import UploadRequest
from replicator.loop import Job
from replicator.scrubbing import ScrubRound
from replicator.sweeping import Collect, Date, Forget, Sweep, Upkeep
from tests.clocks import HandClock


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, clock=clock) as opened:
        yield opened


def stepped(store: Store, job: Job) -> int:
    """How many steps it takes until there is no more."""

    async def story() -> int:
        steps = 1
        while await job.step(store.clock.now_us()):
            steps += 1
        await job.close()
        return steps

    return asyncio.run(story())


def put(store: Store, name: str, retention: str) -> None:
    store.files("t1", "tests").put(name.encode(), name=name, retention=parse_retention(retention))


def test_what_is_over_ends_and_its_bytes_go_after_the_grace(store: Store, clock: HandClock) -> None:
    put(store, "short", "hours:1")
    put(store, "long", "days:7")
    store.uploads("t1", "tests").request(UploadRequest(name="papers", expires_in_s=60))
    assert stepped(store, Sweep(store)) == 1
    clock.advance(2 * HOUR_US)

    assert stepped(store, Sweep(store)) == 2

    files = store.files("t1", "tests").list().items
    assert [file.name for file in files] == ["long"]
    (upload,) = store.uploads("t1", "tests").list().items
    assert upload.status == "expired"
    objects = store.root / "objects"
    assert stepped(store, Collect(store)) == 1
    assert len([path for path in objects.rglob("*") if path.is_file()]) == 2
    clock.advance(DAY_US + SECOND_US)
    assert stepped(store, Collect(store)) == 2
    assert len([path for path in objects.rglob("*") if path.is_file()]) == 1


def test_old_deliveries_are_forgotten(store: Store, clock: HandClock) -> None:
    delivery = store.catalog.write(
        lambda txn: enqueue(txn, "t1", "callback", "u1", "https://a.test/", {})
    )
    record_attempt(store.catalog, delivery.delivery_id, Outcome(200), give_up_after_us=0, jitter=0)
    clock.advance(KEPT_US + SECOND_US)
    # One whose sweep fails forgets all the same: another job.
    assert stepped(store, Sweep(store)) == 1
    assert stepped(store, Forget(store)) == 2
    assert store.deliveries("t1", "tests").list().items == []


def test_nothing_ends_while_the_clock_is_not_to_be_believed(store: Store, clock: HandClock) -> None:
    put(store, "short", "hours:1")
    clock.trusted = False
    clock.advance(400 * DAY_US)
    for job in (Sweep(store), Forget(store), Collect(store), ScrubRound(store, 1 << 30)):
        with pytest.raises(Conflict, match="nothing was removed"):
            stepped(store, job)
    assert len(store.files("t1", "tests").list().items) == 1
    clock.trusted = True
    assert stepped(store, Sweep(store)) == 2


def test_what_came_under_a_wrong_clock_gets_its_end_when_the_clock_is_right(
    store: Store, clock: HandClock
) -> None:
    clock.trusted = False
    right_us = clock.now_us()
    clock.time_us = 0
    put(store, "short", "hours:1")
    assert stepped(store, Date(store)) == 1  # no trouble of this job: it waits
    clock.time_us = right_us + HOUR_US
    assert stepped(store, Date(store)) == 2
    clock.advance(HOUR_US - 1)
    assert stepped(store, Sweep(store)) == 1
    clock.advance(1)
    assert stepped(store, Sweep(store)) == 2


def test_a_store_at_rest_keeps_up_with_time(store: Store, clock: HandClock) -> None:
    clock.trusted = False
    for _ in range(40):
        clock.advance(DAY_US)
        assert stepped(store, Date(store)) == 1
    assert store.clock_trouble() == ""


def test_what_cannot_be_removed_is_told_and_keeps_nothing_else(
    store: Store, clock: HandClock, caplog: pytest.LogCaptureFixture
) -> None:
    put(store, "short", "hours:1")
    partial = store.root / "partial"
    stuck, leftover = (partial / f"01890000-0000-7000-8000-00000000000{n}" for n in (1, 2))
    stuck.mkdir()
    leftover.write_bytes(b"of a killed process")
    clock.advance(2 * HOUR_US)

    assert stepped(store, Sweep(store)) == 2

    assert store.files("t1", "tests").list().items == []
    assert (stuck.exists(), leftover.exists()) == (True, False)
    assert f"partial/{stuck.name} cannot be removed" in caplog.text


def test_upkeep_has_never_more_to_do(store: Store) -> None:
    assert stepped(store, Upkeep(store)) == 1
