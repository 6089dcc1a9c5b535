"""The sweep ends what is over by catalog time, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.errors import NotFound
from cas.files import Files
from cas.records import Blob, StoredFile
from cas.references import parse_reference
from cas.retention import FOREVER, parse_retention
from cas.store import Store
from cas.sweep import SweepPlan, Swept, execute_sweep, plan_sweep
from cas.uploads import UploadRequest
from tests.audit import audit
from tests.cas.interposed import collect
from tests.clocks import HandClock

SETTINGS = Settings(store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)))


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        yield store


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("acme", "ada")


def put(files: Files, data: bytes, retention: str) -> StoredFile:
    return files.put(data, name="it", retention=parse_retention(retention))


def plan(store: Store, limit: int = 10_000) -> SweepPlan:
    with store.catalog.read() as snapshot:
        return plan_sweep(snapshot, store.now_us(snapshot), limit)


def sweep(store: Store) -> Swept:
    return execute_sweep(store.catalog, plan(store))


def test_a_file_is_swept_when_its_time_is_over(
    store: Store, files: Files, clock: HandClock
) -> None:
    put(files, b"one", "hours:1")
    put(files, b"two", "hours:2")
    files.put(b"three", name="it", retention=FOREVER)
    assert sweep(store) == Swept(0, 0)
    clock.advance(HOUR_US - 1)
    assert sweep(store) == Swept(0, 0)
    clock.advance(1)
    assert sweep(store) == Swept(1, 0)
    clock.advance(1000 * DAY_US)
    clock.trusted = True
    assert sweep(store) == Swept(1, 0)
    assert [file.checksum_sha256 for file in files.list().items] == [digest_of(b"three")]
    clock.advance(DAY_US + 1)
    assert collect(store) == 2
    audit(store)


def test_a_plan_touches_nothing_and_can_be_shown(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = put(files, b"one", "hours:1")
    clock.advance(HOUR_US)
    seq = store.catalog.position().seq
    made = plan(store)
    assert made.references == [file.storage_ref]
    assert file.storage_ref.encode() in msgspec.json.encode(made)
    assert store.catalog.position().seq == seq


def test_what_was_prolonged_held_or_deleted_since_the_plan_is_left(
    store: Store, files: Files, clock: HandClock
) -> None:
    data = [b"prolonged", b"held", b"deleted", b"over"]
    stored = {one: put(files, one, "hours:1") for one in data}
    uploads = store.uploads("acme", "ada")
    cancelled = uploads.request(UploadRequest("a", expires_in_s=3600))
    clock.advance(HOUR_US - 1)
    before = plan(store)
    clock.advance(1)
    made = plan(store)
    assert before.file_ids == []
    assert len(made.file_ids) == 4
    assert made.upload_ids == [cancelled.upload_id]
    put(files, b"prolonged", "hours:1")
    files.hold(parse_reference(stored[b"held"].storage_ref), True)
    files.delete(parse_reference(stored[b"deleted"].storage_ref))
    assert execute_sweep(store.catalog, made) == Swept(1, 1)
    assert execute_sweep(store.catalog, made) == Swept(0, 0)
    assert len(files.list().items) == 2
    audit(store)


def test_files_on_hold_do_not_keep_others_from_their_turn(
    store: Store, files: Files, clock: HandClock
) -> None:
    for number in range(7):
        held = put(files, b"held %d" % number, "hours:1")
        files.hold(parse_reference(held.storage_ref), True)
    put(files, b"over", "hours:2")
    put(files, b"over too", "hours:2")
    clock.advance(2 * HOUR_US)
    for _ in range(2):
        made = plan(store, limit=1)
        assert len(made.file_ids) == 1
        assert execute_sweep(store.catalog, made).files == 1
    assert plan(store, limit=1).file_ids == []


def test_a_swept_upload_lets_go_of_its_slots(store: Store, clock: HandClock) -> None:
    uploads = store.uploads("acme", "ada")
    upload = uploads.request(UploadRequest("a", max_files=2, expires_in_s=3600))
    link = store.upload_link(upload.upload_token)
    link.put(0, b"abc", filename="a")
    clock.advance(HOUR_US)
    assert sweep(store) == Swept(0, 1)
    assert sweep(store) == Swept(0, 0)
    assert link.slots() == []
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, digest_of(b"abc"))
    assert blob is not None
    assert blob.condemned_at == clock.now_us()
    clock.advance(DAY_US + 1)
    assert collect(store) == 1
    audit(store)


def test_more_than_one_transaction_holds_is_swept(
    store: Store, files: Files, clock: HandClock
) -> None:
    from cas.files import PutItem

    items = [PutItem(b"%d" % number, "it") for number in range(1200)]
    files.put_many(items, retention=parse_retention("hours:1"))
    clock.advance(HOUR_US)
    assert sweep(store).files == 1200
    assert files.list().items == []
    clock.advance(DAY_US + 1)
    assert collect(store) == 1200
    assert list((store.root / "objects").glob("*/*")) == []
    audit(store)


# --- a clock that is not to be believed (invariant 10)


def test_a_clock_that_goes_back_expires_nothing_early_or_twice(
    store: Store, files: Files, clock: HandClock
) -> None:
    clock.advance(10 * DAY_US)
    file = put(files, b"one", "days:1")
    clock.advance(-9 * DAY_US)
    assert "behind" in store.clock_trouble()
    later = put(files, b"two", "days:1")
    # Time stands still until the clock has caught up.
    assert later.created_at == file.created_at
    # A time service vouches for it: what is counted from where time stands ends no earlier.
    assert later.expires_at == file.expires_at
    clock.advance(9 * DAY_US)
    assert store.clock_trouble() == ""


def test_a_clock_far_ahead_sweeps_nothing_until_it_is_synchronised(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = put(files, b"one", "days:1")
    clock.trusted = False
    clock.advance(SETTINGS.sweeper.max_clock_gap + SECOND_US)
    assert "ahead" in store.clock_trouble()
    assert plan(store).file_ids == []
    assert files.stat(parse_reference(file.storage_ref)) == file
    clock.trusted = True
    assert store.clock_trouble() == ""
    assert sweep(store).files == 1
    with pytest.raises(NotFound):
        files.stat(parse_reference(file.storage_ref))


def test_a_clock_a_little_ahead_is_believed(store: Store, files: Files, clock: HandClock) -> None:
    put(files, b"one", "days:1")
    clock.trusted = False
    clock.advance(SETTINGS.sweeper.max_clock_gap)
    assert store.clock_trouble() == ""
    assert sweep(store).files == 1
