"""Collection: plan, then execute; what is needed again stays, what is due goes once.

Invariants 2 (bytes before records) and 3 (nothing names what is being deleted).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cas.clock import DAY_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.files import Files, PutItem
from cas.garbage import Collected, CollectPlan
from cas.records import CONDEMNED, DELETING, Blob
from cas.references import parse_reference
from cas.store import Store
from tests.audit import audit
from tests.cas.disks import TracedDisk
from tests.cas.interposed import InterposedDisk, collect
from tests.clocks import HandClock

SETTINGS = Settings(store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)))


@pytest.fixture
def disk() -> InterposedDisk:
    return InterposedDisk()


@pytest.fixture
def store(memory: Path, clock: HandClock, disk: InterposedDisk) -> Iterator[Store]:
    with Store.open(memory / "store", SETTINGS, clock=clock, disk=disk) as store:
        yield store


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("acme", "ada")


def plan(store: Store, limit: int = 10_000) -> CollectPlan:
    with store.catalog.read() as snapshot:
        return store.collector.plan(snapshot, store.now_us(snapshot), limit)


def condemn(files: Files, *contents: bytes) -> None:
    for file in files.put_many([PutItem(data, "it") for data in contents]):
        files.delete(parse_reference(file.storage_ref))


def test_a_plan_touches_nothing_and_can_be_shown(
    store: Store, files: Files, clock: HandClock
) -> None:
    condemn(files, b"one", b"three")
    assert plan(store).digests == []
    clock.advance(DAY_US + 1)
    seq = store.catalog.position().seq
    made = plan(store)
    assert sorted(made.digests) == sorted([digest_of(b"one"), digest_of(b"three")])
    assert made.size_bytes == 8
    assert msgspec.json.encode(made)
    assert store.catalog.position().seq == seq
    assert store.collector.execute(made) == Collected(2, 8)
    assert store.collector.execute(made) == Collected(0, 0)
    assert plan(store).digests == []


def test_the_longest_condemned_go_first(store: Store, files: Files, clock: HandClock) -> None:
    for data in (b"1", b"2", b"3"):
        condemn(files, data)
        clock.advance(1)
    clock.advance(DAY_US)
    assert plan(store, limit=2).digests == [digest_of(b"1"), digest_of(b"2")]


def test_a_blob_condemned_anew_since_the_plan_gets_its_whole_grace(
    store: Store, files: Files, clock: HandClock
) -> None:
    condemn(files, b"one")
    clock.advance(DAY_US + 1)
    made = plan(store)
    condemn(files, b"one")
    assert store.collector.execute(made).blobs == 0
    clock.advance(DAY_US)
    assert collect(store) == 0
    clock.advance(1)
    assert collect(store) == 1


def test_bytes_go_only_while_the_record_says_deleting(
    store: Store, files: Files, clock: HandClock, disk: InterposedDisk
) -> None:
    condemn(files, b"one")
    clock.advance(DAY_US + 1)
    seen = []

    def look() -> None:
        with store.catalog.read() as snapshot:
            blob = snapshot.get(Blob, digest_of(b"one"))
        assert blob is not None
        seen.append((blob.state, store.blobs.stat(digest_of(b"one")) is not None))

    disk.before["unlink"].append(look)
    disk.before["sync_folder"].append(look)
    assert collect(store) == 1
    assert seen == [(DELETING, True), (DELETING, False)]


def test_a_folder_that_cannot_be_synced_keeps_the_record(
    store: Store, files: Files, clock: HandClock, disk: InterposedDisk
) -> None:
    condemn(files, b"one")
    clock.advance(DAY_US + 1)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.before["sync_folder"].append(fail)
    with pytest.raises(OSError, match="Input/output"):
        collect(store)
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, digest_of(b"one"))
    assert blob is not None
    assert blob.state == DELETING
    assert collect(store) == 1
    audit(store)


def test_an_object_that_is_gone_already_is_no_obstacle(
    store: Store, files: Files, clock: HandClock
) -> None:
    condemn(files, b"one", b"two")
    store.blobs.path(digest_of(b"one")).unlink()
    clock.advance(DAY_US + 1)
    assert collect(store) == 2
    assert audit(store).orphans == []


def test_bytes_that_nothing_came_to_name_are_condemned_from_the_start(
    store: Store, files: Files, clock: HandClock
) -> None:
    """A file that exists already names no blob anew, and nothing is counted twice."""
    condemn(files, b"one")
    with store.catalog.read() as snapshot:
        [blob] = snapshot.range(Blob, "")
    assert (blob.state, blob.refcount, blob.condemned_at) == (CONDEMNED, 0, clock.now_us())


def test_the_cost_follows_what_is_due_not_what_is_stored(memory: Path, clock: HandClock) -> None:
    disk = TracedDisk()
    with Store.open(memory / "traced", SETTINGS, clock=clock, disk=disk) as store:
        files = store.files("acme", "ada")
        files.put_many([PutItem(b"%d" % number, "it") for number in range(1000)])
        condemn(files, b"one")
        clock.advance(DAY_US + 1)
        disk.steps.clear()
        assert collect(store) == 1
        assert len(disk.steps) < 10


def test_another_collector_may_have_a_turn_between_two_batches(
    store: Store, files: Files, clock: HandClock, disk: InterposedDisk
) -> None:
    condemn(files, *(b"%d" % number for number in range(450)))
    clock.advance(DAY_US + 1)
    held = []
    alone = store.collector._alone

    def counted() -> object:
        held.append(1)
        return alone()

    store.collector._alone = counted  # type: ignore[method-assign, assignment]
    assert collect(store) == 450
    assert len(held) == 3
