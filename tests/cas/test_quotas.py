"""What a tenant stores is counted with every change, and a quota holds to the byte."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cas.catalog import Transaction
from cas.catalog.layout import LAYOUTS
from cas.clock import DAY_US
from cas.config import LimitSettings, Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.errors import LinkQuotaExceeded, QuotaExceeded
from cas.files import Files, PutItem
from cas.quotas import recount_usage, usage_of
from cas.records import Mark, StoredFile, UploadFile, Usage
from cas.references import parse_reference
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest
from tests.audit import assert_well, audit
from tests.clocks import KEEP_US, HandClock

LIMIT_BYTES = 100
LIMIT_FILES = 4
OpenStore = Callable[[int, int], Store]


def settings(files: int, size_bytes: int) -> Settings:
    return Settings(
        store=StoreSettings(min_free=Size(0)),
        limits=LimitSettings(quota_files=files, quota_bytes=Size(size_bytes)),
    )


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(memory / "store", settings(LIMIT_FILES, LIMIT_BYTES), clock=clock) as store:
        yield store
        audit(store)
        assert_well(store)


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("acme", "ada")


def used(store: Store, tenant: str = "acme") -> tuple[int, int]:
    """(files, bytes)"""
    usage = store.files(tenant, "ada").usage()
    return usage.files, usage.size_bytes


def opened(store: Store, tenant: str = "acme", max_files: int = 3) -> UploadLink:
    upload = store.uploads(tenant, "ada").request(UploadRequest("papers", max_files=max_files))
    return store.upload_link(upload.upload_token)


class Unread(io.RawIOBase):
    """A body that nobody may read."""

    def readable(self) -> bool:
        return True

    def readinto(self, _buffer: object) -> int:
        raise AssertionError("it was read")


# --- counting


def test_usage_follows_files_from_their_first_to_their_last_day(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = files.put(b"x" * 10, name="a")
    files.put(b"x" * 10, name="a", run="run-1")  # the same bytes, and a second file
    files.put_many([PutItem(b"y" * 5, "b"), PutItem(b"y" * 5, "c")])  # one file, put twice
    assert used(store) == (3, 25)
    files.delete(parse_reference(file.storage_ref))
    assert used(store) == (2, 15)
    clock.advance(400 * DAY_US)
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    execute_sweep(store.catalog, plan)
    assert used(store) == (0, 0)
    with store.catalog.read() as snapshot:
        assert snapshot.range(Usage, "") == []


def test_usage_follows_slots_to_files(store: Store) -> None:
    link = opened(store)
    link.put(0, b"x" * 10, filename="a.txt")
    link.put(1, b"y" * 20, filename="b.txt")
    assert used(store) == (2, 30)
    link.put(1, b"z" * 3, filename="b.txt")
    assert used(store) == (2, 13)
    link.empty(0)
    assert used(store) == (1, 3)
    link.complete()
    assert used(store) == (1, 3)


def test_a_slot_whose_bytes_are_a_file_already_counts_until_it_is_completed(
    store: Store, files: Files
) -> None:
    files.put(b"x" * 10, name="a", filename="a.txt", content_type="text/plain")
    link = opened(store)
    link.put(0, b"x" * 10, filename="a.txt", content_type="text/plain")
    assert used(store) == (2, 20)
    link.complete()
    assert used(store) == (1, 10)


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_an_upload_that_ends_without_files_gives_its_room_back(
    store: Store, clock: HandClock, end: str
) -> None:
    link = opened(store)
    link.put(0, b"x" * 10, filename="a.txt")
    begun = link.begin_partial(1, "b.txt", None, 50)
    link.append(begun.partial_id, 0, io.BytesIO(b"y" * 20))
    assert used(store) == (1, 30)
    if end == "cancel":
        store.uploads("acme", "ada").cancel(link.upload.upload_token)
    else:
        clock.advance(366 * DAY_US)
        with store.catalog.read() as snapshot:
            plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
        execute_sweep(store.catalog, plan)
    assert used(store) == (0, 0)


def test_a_tenants_usage_never_changes_by_what_another_does(store: Store) -> None:
    store.files("acme", "ada").put(b"x" * 10, name="a")
    before = used(store)
    other = store.files("other", "bob")
    file = other.put(b"x" * 10, name="a")
    other.put(b"y" * 20, name="b")
    opened(store, "other").put(0, b"x" * 10, filename="a.txt")
    assert (used(store), used(store, "other")) == (before, (3, 40))
    other.delete(parse_reference(file.storage_ref))
    assert (used(store), used(store, "other")) == (before, (2, 30))


def test_a_batch_writes_usage_down_once(store: Store) -> None:
    many = store.files("many", "ada")
    before = store.catalog.position().seq
    many.put_many([PutItem(bytes([number]), "it") for number in range(LIMIT_FILES)])
    ops = [op for change in store.catalog.changes(before) for op in change.ops]
    assert [op[2] for op in ops if op[0] is Usage] == [Usage("many", LIMIT_FILES, LIMIT_FILES)]


# --- the boundary


def test_the_last_byte_fits_and_one_more_does_not(store: Store, files: Files) -> None:
    files.put(b"x" * 60, name="a")
    with pytest.raises(QuotaExceeded) as refused:
        files.put(io.BytesIO(b"y" * 41), name="b")
    error = refused.value
    assert (error.what, error.limit, error.used, error.needed) == ("size_bytes", 100, 60, 41)
    store.blobs.close()
    assert store.blobs.stat(digest_of(b"y" * 41)) is None
    files.put(b"y" * 40, name="b")
    files.put(b"", name="empty")  # a file of no bytes still is one
    assert used(store) == (3, 100)


def test_the_last_file_fits_and_one_more_does_not(store: Store, files: Files) -> None:
    for number in range(LIMIT_FILES):
        files.put(bytes([number]), name="a")
    with pytest.raises(QuotaExceeded, match="4 of 4 files"):
        files.put(b"more", name="a")
    with pytest.raises(LinkQuotaExceeded):
        opened(store).put(0, b"more", filename="a.txt")
    assert used(store) == (LIMIT_FILES, LIMIT_FILES)


def test_a_stream_of_unknown_length_is_judged_when_it_has_come(store: Store, files: Files) -> None:
    left = [b"z" * 101]

    class Pipe(io.RawIOBase):
        """Cannot be sought in."""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            data = left.pop() if left else b""
            buffer[: len(data)] = data
            return len(data)

    with pytest.raises(QuotaExceeded):
        files.put(Pipe(), name="a")
    assert used(store) == (0, 0)
    store.blobs.close()
    assert store.blobs.stat(digest_of(b"z" * 101)) is None


@pytest.mark.parametrize("size_bytes", [101, 5 << 30])
def test_a_promised_size_over_the_quota_is_refused_before_a_byte_is_read(
    store: Store, files: Files, size_bytes: int
) -> None:
    with pytest.raises(QuotaExceeded):
        files.put(Unread(), name="a", promised_size=size_bytes)
    with pytest.raises(LinkQuotaExceeded):
        opened(store).put(0, Unread(), filename="a", promised_size=size_bytes)
    with pytest.raises(LinkQuotaExceeded):
        opened(store).begin_partial(0, "a", None, size_bytes)


def test_putting_the_same_file_again_costs_nothing_at_a_full_quota(
    store: Store, files: Files
) -> None:
    file = files.put(b"x" * 100, name="a")
    again = [
        files.put(b"x" * 100, name="a"),
        files.put(io.BytesIO(b"x" * 100), name="a", promised_size=100),
        *files.put_many([PutItem(b"x" * 100, "a")]),
    ]
    assert {one.file_id for one in again} == {file.file_id}
    with pytest.raises(QuotaExceeded):  # the same length, and other bytes
        files.put(b"y" * 100, name="a")
    with pytest.raises(QuotaExceeded):  # the same bytes as another file
        files.put(b"x" * 100, name="a", run="run-1")
    assert used(store) == (1, 100)


def test_a_batch_over_the_quota_keeps_nothing_of_its_write(store: Store, files: Files) -> None:
    items = [PutItem(bytes([number]) * 30, "it") for number in range(4)]
    with pytest.raises(QuotaExceeded):
        files.put_many(items)
    assert used(store) == (0, 0)
    assert audit(store).orphans == []
    files.put_many(items[:3])


def test_replacing_a_slot_needs_only_the_difference(store: Store) -> None:
    link = opened(store)
    link.put(0, b"x" * 90, filename="a.txt")
    link.put(0, b"y" * 100, filename="a.txt", promised_size=100)
    with pytest.raises(LinkQuotaExceeded):
        link.put(0, b"z" * 101, filename="a.txt")
    assert [slot.size_bytes for slot in link.slots()] == [100]
    assert used(store) == (1, 100)


def test_deleting_makes_room(store: Store, files: Files) -> None:
    file = files.put(b"x" * 100, name="a")
    with pytest.raises(QuotaExceeded):
        files.put(b"y", name="b")
    files.delete(parse_reference(file.storage_ref))
    files.put(b"y" * 100, name="b")


def test_completing_takes_no_room(store: Store) -> None:
    link = opened(store)
    for index in range(3):
        link.put(index, bytes([index]) * 33, filename=f"{index}.bin")
    assert len(link.complete().files) == 3
    assert used(store) == (3, 99)


def test_what_a_resumable_upload_brought_counts_and_becomes_the_slots(store: Store) -> None:
    link = opened(store)
    begun = link.begin_partial(0, "a.bin", None, 100)
    link.append(begun.partial_id, 0, io.BytesIO(b"x" * 70))
    assert used(store) == (0, 70)
    with pytest.raises(LinkQuotaExceeded):
        link.put(1, b"y" * 31, filename="b.bin")
    assert link.append(begun.partial_id, 70, io.BytesIO(b"x" * 30)).finished
    assert used(store) == (1, 100)


def test_beginning_a_resumable_upload_anew_gives_back_what_came_for_it(store: Store) -> None:
    link = opened(store)
    begun = link.begin_partial(0, "a.bin", None, 100)
    link.append(begun.partial_id, 0, io.BytesIO(b"x" * 70))
    link.begin_partial(0, "a.bin", None, 100)
    assert used(store) == (0, 0)


def test_a_resumable_upload_that_others_overtook_ends_with_the_quota(
    store: Store, files: Files
) -> None:
    link = opened(store)
    begun = link.begin_partial(0, "a.bin", None, 80)
    link.append(begun.partial_id, 0, io.BytesIO(b"x" * 40))
    files.put(b"y" * 50, name="b")
    with pytest.raises(LinkQuotaExceeded):
        link.append(begun.partial_id, 40, io.BytesIO(b"x" * 40))
    assert link.partial(begun.partial_id).offset_bytes == 40
    assert used(store) == (1, 90)


def test_of_two_at_the_boundary_one_wins(store: Store) -> None:
    """Whatever the order, the usage never passes the limit, and every refused one left nothing."""
    ready = threading.Barrier(8)

    def put(number: int) -> bool:
        ready.wait()
        try:
            store.files("acme", "ada").put(bytes([number]) * 60, name="it")
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(put, range(8))) == 1
    assert used(store) == (1, 60)
    assert audit(store).orphans == []


def test_a_quota_that_was_lowered_refuses_growth_alone(memory: Path, clock: HandClock) -> None:
    with Store.open(memory / "store", settings(0, 0), clock=clock) as store:
        link = opened(store)
        link.put(0, b"x" * 60, filename="a.txt")
        token = link.upload.upload_token
        file = store.files("acme", "ada").put(b"y" * 60, name="b")
    with Store.open(memory / "store", settings(1, 50), clock=clock) as store:
        files = store.files("acme", "ada")
        assert files.hold(parse_reference(file.storage_ref), on=True).hold
        store.upload_link(token).put(0, b"z" * 10, filename="a.txt")
        store.upload_link(token).complete()
        assert used(store) == (2, 70)
        with pytest.raises(QuotaExceeded):
            files.put(b"", name="c")


def test_who_has_a_link_is_not_told_the_tenants_numbers(store: Store, files: Files) -> None:
    files.put(b"x" * 90, name="a")
    with pytest.raises(LinkQuotaExceeded):
        opened(store).put(0, b"y" * 20, filename="a.txt")


# --- miscounts


def test_a_recount_mends_what_the_doctor_found(store: Store, files: Files) -> None:
    files.put(b"x" * 10, name="a")
    link = opened(store, "other")
    link.put(0, b"x" * 7, filename="a.txt")

    def spoil(txn: Transaction) -> None:
        txn.replace(Usage("acme", 5, 1))
        txn.delete(usage_of(txn, "other"))
        txn.insert(Usage("nobody", 1, 1))

    store.catalog.write(spoil)
    with pytest.raises(AssertionError, match=r"acme.*nobody.*other"):
        assert_well(store)
    assert recount_usage(store.catalog) == 3
    assert recount_usage(store.catalog) == 0
    assert (used(store), used(store, "other")) == ((1, 10), (1, 7))


def test_a_count_that_another_process_has_done_is_not_done_again(store: Store) -> None:
    def spoil(txn: Transaction) -> None:
        txn.insert(Usage("nobody", 1, 1))

    store.catalog.write(spoil)
    mark = Mark("counted", "")
    assert recount_usage(store.catalog, mark) == 1
    store.catalog.write(spoil)
    assert recount_usage(store.catalog, mark) == 0
    assert recount_usage(store.catalog) == 1


def test_a_miscount_keeps_nobody_from_deleting(store: Store, files: Files) -> None:
    file = files.put(b"x" * 10, name="a")
    store.catalog.write(lambda txn: txn.replace(Usage("acme", 1, 3)))
    files.delete(parse_reference(file.storage_ref))
    assert used(store) == (0, 0)


def test_usage_is_replayed_and_not_counted_a_second_time(memory: Path, clock: HandClock) -> None:
    """The images in the journal are complete: a rebuild runs no hooks."""
    root = memory / "store"
    with Store.open(root, settings(0, 0), clock=clock) as store:
        store.files("acme", "ada").put_many([PutItem(b"a", "it"), PutItem(b"bb", "it")])
    (root / "catalog/index/BOOT").unlink()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (StoredFile, UploadFile):
            patch.setattr(LAYOUTS[kind], "shares", None)
        with Store.open(root, settings(0, 0), clock=clock) as store:
            assert used(store) == (2, 3)
