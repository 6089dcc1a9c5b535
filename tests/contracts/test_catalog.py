"""What every catalog promises, said against the seam alone."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cas.catalog import Catalog, Snapshot, Transaction, pages
from cas.clock import DAY_US, SECOND_US
from cas.digest import Digest
from cas.errors import (
    BlobcaskError,
    BlobDeleting,
    CatalogClosed,
    NotFound,
    RecordExists,
)
from cas.records import (
    CONDEMNED,
    DELETING,
    DONE,
    LIVE,
    WANTED,
    Blob,
    Delivery,
    Mark,
    Partial,
    Replica,
    StoredFile,
    Target,
    Total,
    UploadFile,
    Usage,
)
from tests.clocks import START_US, HandClock
from tests.contracts.conftest import OpenCatalog

A, B, C = (Digest(bytes([number]) * 32) for number in (1, 2, 3))
EVERYTHING = 1 << 30


def blob(digest: Digest, **fields: Any) -> Blob:
    return replace(Blob(digest, 1, bytes(32), 1, 1, 1), **fields)


def file(file_id: str, digest: Digest = A, **fields: Any) -> StoredFile:
    made = StoredFile(
        file_id=file_id,
        tenant_id="t",
        workflow_run_id="direct",
        storage_ref=f"ref-{file_id}",
        name=f"name-{file_id}",
        original_filename=None,
        content_type="text/plain",
        size_bytes=1,
        checksum_sha256=digest,
        retention_policy="forever",
        expires_at=None,
        created_at=1,
        created_by="test",
    )
    return replace(made, **fields)


def insert(catalog: Catalog, *records: Any) -> None:
    def change(txn: Transaction) -> None:
        for record in records:
            txn.insert(record)

    catalog.write(change)


def remove(catalog: Catalog, *records: Any) -> None:
    def change(txn: Transaction) -> None:
        for record in records:
            txn.delete(record)

    catalog.write(change)


def get_blob(catalog: Catalog, digest: Digest) -> Blob:
    with catalog.read() as snapshot:
        found = snapshot.get(Blob, digest)
    assert found is not None
    return found


def ids(files: list[StoredFile]) -> list[str]:
    return [found.file_id for found in files]


class Oops(Exception):
    """A change that went wrong."""


# --- reading what was written


def test_a_record_is_found_by_its_key_and_by_its_unique_values(catalog: Catalog) -> None:
    insert(catalog, blob(A), file("1"), file("2"))
    with catalog.read() as snapshot:
        assert snapshot.get(StoredFile, "1") == file("1")
        assert snapshot.find(StoredFile, "storage_ref", "ref-2") == file("2")
        assert snapshot.get(StoredFile, "3") is None
        assert snapshot.find(StoredFile, "storage_ref", "ref") is None
        assert snapshot.find(StoredFile, "storage_ref", "ref-22") is None


def test_a_snapshot_stays_as_it_was(catalog: Catalog) -> None:
    insert(catalog, Mark("a", "old"))
    with catalog.read() as snapshot:
        before = snapshot.position
        catalog.write(lambda txn: txn.replace(Mark("a", "new")))
        insert(catalog, Mark("b", "x"))
        assert snapshot.get(Mark, "a") == Mark("a", "old")
        assert snapshot.range(Mark, "") == [Mark("a", "old")]
        assert snapshot.position == before
    assert catalog.position().seq == before.seq + 2


def test_a_write_sees_its_own_changes(catalog: Catalog) -> None:
    def change(txn: Transaction) -> None:
        txn.insert(blob(A))
        txn.insert(file("1"))
        assert txn.get(StoredFile, "1") == file("1")
        assert txn.find(StoredFile, "storage_ref", "ref-1") == file("1")
        assert ids(txn.range(StoredFile, "tenant", ("t",))) == ["1"]
        txn.replace(file("1", storage_ref="other"))
        assert txn.find(StoredFile, "storage_ref", "ref-1") is None
        txn.delete(file("1"))
        assert txn.range(StoredFile, "tenant", ("t",)) == []

    catalog.write(change)


def test_a_write_returns_what_the_change_returns(catalog: Catalog) -> None:
    assert catalog.write(lambda txn: 42) == 42


def test_a_write_that_changes_nothing_leaves_no_trace(catalog: Catalog) -> None:
    insert(catalog, Mark("a", "1"))
    before = catalog.position()
    catalog.write(lambda txn: txn.get(Mark, "a"))
    catalog.write(lambda txn: txn.replace(Mark("a", "1")))
    assert catalog.position() == before


def test_what_is_done_alone_sees_the_newest_and_leaves_no_trace(catalog: Catalog) -> None:
    insert(catalog, Mark("a", "1"))
    before = catalog.position()
    assert catalog.alone(lambda snapshot: snapshot.get(Mark, "a")) == Mark("a", "1")
    assert catalog.position() == before


def test_nobody_writes_while_something_is_done_alone(catalog: Catalog) -> None:
    begun, ended = threading.Event(), threading.Event()
    order: list[str] = []

    def act(snapshot: Snapshot) -> None:
        writer.start()
        begun.wait()
        assert snapshot.get(Mark, "a") is None
        assert not ended.wait(0.05)
        order.append("alone")

    def write() -> None:
        begun.set()
        insert(catalog, Mark("a", "1"))
        ended.set()
        order.append("write")

    writer = threading.Thread(target=write)
    catalog.alone(act)
    writer.join()
    assert order == ["alone", "write"]


# --- ranges


@pytest.fixture
def listed(catalog: Catalog) -> Catalog:
    names = {"1": "a", "2": "b", "3": "b", "4": "c"}
    insert(catalog, blob(A), *(file(key, name=name) for key, name in names.items()))
    insert(catalog, file("5", tenant_id="u", name="b"), file("6", tenant_id="tt", name="b"))
    return catalog


@pytest.mark.parametrize(
    ("index", "prefix", "found"),
    [
        ("", (), [["1", "2"], ["3", "4"], ["5", "6"]]),
        ("tenant", ("t",), [["1", "2"], ["3", "4"]]),
        ("name", ("t", "b"), [["2", "3"]]),
        ("name", ("t",), [["1", "2"], ["3", "4"]]),
        ("name", ("x",), []),
        ("expiry", (), []),
    ],
)
def test_all_records_come_page_by_page(
    listed: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    index: str,
    prefix: tuple[str, ...],
    found: list[list[str]],
) -> None:
    monkeypatch.setattr("cas.catalog._PAGE", 2)
    with listed.read() as snapshot:
        came = list(pages(snapshot, StoredFile, index, prefix))
    assert [[record.file_id for record in page] for page in came] == found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["1", "2", "3", "4"]),
        ({"limit": 2}, ["1", "2"]),
        ({"limit": 0}, []),
        ({"reverse": True}, ["4", "3", "2", "1"]),
        ({"reverse": True, "limit": 1}, ["4"]),
        ({"after": ("b", "2")}, ["3", "4"]),
        ({"after": ("b",)}, ["4"]),
        ({"before": ("b", "3")}, ["1", "2"]),
        ({"before": ("b",)}, ["1"]),
        ({"after": ("a", "1"), "before": ("c",)}, ["2", "3"]),
        ({"after": ("a", "1"), "before": ("c",), "reverse": True}, ["3", "2"]),
        ({"before": ("b", "3"), "reverse": True, "limit": 1}, ["2"]),
        ({"after": ("z",)}, []),
        ({"before": ("",)}, []),
        ({"after": ("c", "4"), "before": ("b",)}, []),
        ({"after": ("a0",)}, ["2", "3", "4"]),
        ({"before": ("b0",), "reverse": True}, ["3", "2", "1"]),
    ],
)
def test_a_range_lists_a_prefix_in_order(
    listed: Catalog, arguments: dict[str, Any], expected: list[str]
) -> None:
    with listed.read() as snapshot:
        assert ids(snapshot.range(StoredFile, "name", ("t",), **arguments)) == expected


def test_a_range_ends_before_it_has_too_many_bytes_but_not_before_its_first_record(
    listed: Catalog,
) -> None:
    with listed.read() as snapshot:
        every = snapshot.range(StoredFile, "name", ("t",))
        sizes = [len(msgspec.msgpack.encode(one)) for one in every]
        for index, prefix in (("name", ("t",)), ("", ())):
            for count in (1, 2, 3, 4):
                for spare, found in ((0, count), (-1, max(1, count - 1))):
                    bytes_max = sum(sizes[:count]) + spare
                    few = snapshot.range(StoredFile, index, prefix, bytes_max=bytes_max)
                    assert few == every[:found]
        assert snapshot.range(StoredFile, "name", ("t",), bytes_max=0) == every[:1]


def test_a_longer_prefix_is_one_name_and_no_neighbour(listed: Catalog) -> None:
    with listed.read() as snapshot:
        assert ids(snapshot.range(StoredFile, "name", ("t", "b"))) == ["2", "3"]
        assert ids(snapshot.range(StoredFile, "name", ("t", "b"), after=("2",))) == ["3"]
        assert snapshot.range(StoredFile, "name", ("t", "")) == []
        assert ids(snapshot.range(StoredFile, "name", ("tt",))) == ["6"]


def test_a_range_without_an_index_goes_by_the_primary_key(listed: Catalog) -> None:
    with listed.read() as snapshot:
        assert ids(snapshot.range(StoredFile, "")) == ["1", "2", "3", "4", "5", "6"]
        assert ids(snapshot.range(StoredFile, "", after=("2",), before=("5",))) == ["3", "4"]
        assert ids(snapshot.range(StoredFile, "", reverse=True, limit=1)) == ["6"]


def test_a_record_without_a_value_is_left_out_of_that_index(catalog: Catalog) -> None:
    insert(catalog, blob(A), file("1"), file("2", expires_at=20), file("3", expires_at=10))
    with catalog.read() as snapshot:
        assert ids(snapshot.range(StoredFile, "expiry")) == ["3", "2"]
        assert ids(snapshot.range(StoredFile, "expiry", before=(20,))) == ["3"]
    catalog.write(lambda txn: txn.replace(file("2")))
    catalog.write(lambda txn: txn.replace(file("1", expires_at=30)))
    with catalog.read() as snapshot:
        assert ids(snapshot.range(StoredFile, "expiry")) == ["3", "1"]


# Long ones share what an index keeps of them; NUL and FF are what keys are made with.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["", "\0", "\0\0", "a", "a\0", "a\0b", "ÿ", "\U0010ffff", "x" * 127, "x" * 128, "x" * 129]
)
LONG = st.builds(lambda head, tail: head * 128 + tail, st.sampled_from("xyé"), TEXT)
SMALL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@SMALL
@given(names=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8, unique=True))
def test_the_order_is_that_of_the_tuples(catalog: Catalog, names: list[tuple[str, str]]) -> None:
    def run(txn: Transaction) -> None:
        for old in txn.range(Delivery, "", limit=EVERYTHING):
            txn.delete(old)
        for number, (tenant, name) in enumerate(names):
            txn.insert(delivery(str(number), tenant, name))

    catalog.write(run)
    # UTF-8 sorts by code point, as Python does.
    expected = [(tenant, name, str(number)) for number, (tenant, name) in enumerate(names)]
    expected = [key for key in sorted(expected) if max(map(len, key[:2])) < 127]
    with catalog.read() as snapshot:
        found = [key_of(e) for e in snapshot.range(Delivery, "subject", limit=EVERYTHING)]
        assert [key for key in found if max(map(len, key[:2])) < 127] == expected
        for low, high in itertools.pairwise(expected):
            between = snapshot.range(Delivery, "subject", after=low, before=high, limit=EVERYTHING)
            assert all(low < key_of(e) < high for e in between if len(e.subject) < 127)
            assert high in [key_of(e) for e in snapshot.range(Delivery, "subject", after=low)]
        for tenant, _ in names:
            found_ids = {e.delivery_id for e in snapshot.range(Delivery, "subject", (tenant,))}
            assert found_ids == {str(n) for n, (t, _) in enumerate(names) if t == tenant}


def delivery(delivery_id: str, tenant: str, subject: str) -> Delivery:
    return Delivery(delivery_id, tenant, "callback", subject, "", DONE, 1, None)


def key_of(found: Delivery) -> tuple[str, str, str]:
    return found.tenant_id, found.subject, found.delivery_id


@SMALL
@given(references=st.lists(LONG | TEXT, min_size=2, max_size=6, unique=True))
def test_values_of_any_length_are_told_apart(catalog: Catalog, references: list[str]) -> None:
    def run(txn: Transaction) -> None:
        for old in txn.range(StoredFile, "", limit=EVERYTHING):
            txn.delete(old)
        if txn.get(Blob, A) is None:
            txn.insert(blob(A))
        for number, reference in enumerate(references[1:]):
            txn.insert(file(str(number), storage_ref=reference))

    catalog.write(run)
    with catalog.read() as snapshot:
        for number, reference in enumerate(references[1:]):
            assert snapshot.find(StoredFile, "storage_ref", reference) == file(
                str(number), storage_ref=reference
            )
        assert snapshot.find(StoredFile, "storage_ref", references[0]) is None


def test_a_key_that_is_too_long_is_refused_and_undone(catalog: Catalog) -> None:
    insert(catalog, blob(A))
    nasty = "\0" * 120
    with pytest.raises(ValueError, match="too long"):
        insert(catalog, file(nasty, tenant_id=nasty, workflow_run_id=nasty))
    assert get_blob(catalog, A).refcount == 0
    with catalog.read() as snapshot:
        assert snapshot.range(StoredFile, "") == []


# --- refusals


def test_inserting_a_key_twice_is_refused(catalog: Catalog) -> None:
    insert(catalog, blob(A), file("1"))
    with pytest.raises(RecordExists) as refused:
        insert(catalog, file("1", storage_ref="other"))
    assert refused.value.table == "stored_files"


def test_a_unique_value_belongs_to_one_record(catalog: Catalog) -> None:
    insert(catalog, blob(A), file("1"), file("2"))
    with pytest.raises(RecordExists):
        insert(catalog, file("3", storage_ref="ref-1"))
    with pytest.raises(RecordExists):
        catalog.write(lambda txn: txn.replace(file("2", storage_ref="ref-1")))
    catalog.write(lambda txn: txn.delete(file("1")))
    catalog.write(lambda txn: txn.replace(file("2", storage_ref="ref-1")))
    insert(catalog, file("3", storage_ref="ref-2"))
    with catalog.read() as snapshot:
        found = snapshot.find(StoredFile, "storage_ref", "ref-1")
    assert found is not None
    assert found.file_id == "2"


def test_what_is_not_there_cannot_be_replaced_or_deleted(catalog: Catalog) -> None:
    with pytest.raises(NotFound):
        catalog.write(lambda txn: txn.replace(Mark("a", "1")))
    with pytest.raises(NotFound):
        catalog.write(lambda txn: txn.delete(Mark("a", "1")))


def test_a_write_that_catches_a_refusal_goes_on_whole(catalog: Catalog) -> None:
    """A refused insert or replace has changed nothing, so the rest may be committed."""
    insert(catalog, blob(A), blob(B), file("1"), file("2", B))

    def stubborn(txn: Transaction) -> None:
        with pytest.raises(RecordExists):
            txn.insert(file("3", B, storage_ref="ref-1"))
        with pytest.raises(RecordExists):
            txn.replace(file("2", A, storage_ref="ref-1", name="other"))
        with pytest.raises(NotFound):
            txn.insert(file("4", C))
        with pytest.raises(NotFound):
            txn.replace(file("2", C))
        txn.insert(Mark("went on", ""))

    catalog.write(stubborn)
    assert get_blob(catalog, A).refcount == 1
    assert get_blob(catalog, B).refcount == 1
    with catalog.read() as snapshot:
        assert snapshot.get(Mark, "went on") is not None
        assert snapshot.find(StoredFile, "storage_ref", "ref-1") == file("1")
        assert ids(snapshot.range(StoredFile, "name", ("t", "name-2"))) == ["2"]
        assert snapshot.range(StoredFile, "name", ("t", "other")) == []


def test_two_records_may_swap_a_unique_value_in_one_write(
    catalog: Catalog, open_catalog: OpenCatalog
) -> None:
    insert(catalog, blob(A), file("1"), file("2"))

    def swap(txn: Transaction) -> None:
        txn.replace(file("1", storage_ref="aside"))
        txn.replace(file("2", storage_ref="ref-1"))
        txn.replace(file("1", storage_ref="ref-2"))

    catalog.write(swap)
    for _ in range(2):
        with catalog.read() as snapshot:
            for reference, owner in (("ref-1", "2"), ("ref-2", "1")):
                found = snapshot.find(StoredFile, "storage_ref", reference)
                assert found is not None
                assert found.file_id == owner
        catalog.close()
        catalog = open_catalog()


# --- reference counts


def test_references_are_counted_by_the_catalog(catalog: Catalog, clock: HandClock) -> None:
    insert(catalog, blob(A), blob(B))
    insert(catalog, file("1"), file("2"), UploadFile("u", 0, "n", "t", 1, A, 1))
    assert get_blob(catalog, A).refcount == 3
    clock.advance(SECOND_US)
    catalog.write(lambda txn: txn.replace(file("2", B)))
    catalog.write(lambda txn: txn.replace(UploadFile("u", 0, "n", "t", 1, None, 1)))
    assert get_blob(catalog, A).refcount == 1
    assert get_blob(catalog, B).refcount == 1
    catalog.write(lambda txn: txn.delete(file("1")))
    condemned = get_blob(catalog, A)
    assert (condemned.refcount, condemned.state) == (0, CONDEMNED)
    assert condemned.condemned_at == clock.time_us
    with catalog.read() as snapshot:
        assert [b.digest for b in snapshot.range(Blob, "condemned")] == [A]


def test_a_condemned_blob_is_revived_by_a_reference(catalog: Catalog) -> None:
    insert(catalog, blob(A), file("1"))
    catalog.write(lambda txn: txn.delete(file("1")))
    insert(catalog, file("2"))
    revived = get_blob(catalog, A)
    assert (revived.refcount, revived.state, revived.condemned_at) == (1, LIVE, None)
    with catalog.read() as snapshot:
        assert snapshot.range(Blob, "condemned") == []


def test_a_caller_cannot_change_a_count(catalog: Catalog) -> None:
    insert(catalog, blob(A, refcount=7), file("1"))
    assert get_blob(catalog, A).refcount == 1

    def verified(txn: Transaction) -> None:
        known = txn.get(Blob, A)
        assert known is not None
        txn.insert(file("2"))
        # Read before the insert, so its count is old by now.
        txn.replace(replace(known, verified_at=99))

    catalog.write(verified)
    assert get_blob(catalog, A).refcount == 2
    assert get_blob(catalog, A).verified_at == 99


def test_a_blob_that_is_referenced_is_neither_doomed_nor_forgotten(catalog: Catalog) -> None:
    insert(catalog, blob(A), file("1"))
    with pytest.raises(ValueError, match="references"):
        catalog.write(lambda txn: txn.delete(blob(A)))
    with pytest.raises(ValueError, match="references"):
        catalog.write(lambda txn: txn.replace(blob(A, state=DELETING, deleting_at=1)))
    assert get_blob(catalog, A).state == LIVE


def test_a_reference_needs_a_blob_that_is_not_being_deleted(catalog: Catalog) -> None:
    insert(catalog, blob(B, state=DELETING, deleting_at=1), blob(C))
    with pytest.raises(NotFound) as unknown:
        insert(catalog, file("1", A))
    assert unknown.value.kind == "blob"
    with pytest.raises(BlobDeleting):
        insert(catalog, file("1", B))
    insert(catalog, file("1", C))
    with pytest.raises(BlobDeleting):
        catalog.write(lambda txn: txn.replace(file("1", B)))
    assert get_blob(catalog, C).refcount == 1


# --- usage


def test_usage_is_counted_by_the_catalog(catalog: Catalog) -> None:
    def used(tenant: str = "t") -> Usage | None:
        with catalog.read() as snapshot:
            return snapshot.get(Usage, tenant)

    insert(catalog, blob(A), file("1", size_bytes=10), file("2", tenant_id="u"))
    assert (used(), used("u")) == (Usage("t", 1, 10), Usage("u", 1, 1))
    slot = UploadFile("u", 0, "n", "t", 5, A, 1, tenant_id="t")
    insert(catalog, slot, replace(slot, file_index=1, tenant_id=""))
    assert used() == Usage("t", 2, 15)
    catalog.write(lambda txn: txn.replace(replace(slot, checksum_sha256=None)))
    assert used() == Usage("t", 1, 10)
    partial = Partial("p", "u", "t", 0, "n", "t", 9, 0, 1, 1)
    insert(catalog, partial)
    catalog.write(lambda txn: txn.replace(replace(partial, offset_bytes=7)))
    assert used() == Usage("t", 1, 17)
    catalog.write(lambda txn: txn.replace(file("1", size_bytes=10, tenant_id="u")))
    assert (used(), used("u")) == (Usage("t", 0, 7), Usage("u", 2, 11))

    def forget(txn: Transaction) -> None:
        txn.delete(partial)
        txn.delete(file("2"))

    catalog.write(forget)
    assert (used(), used("u")) == (None, Usage("u", 1, 10))


def test_a_write_sees_the_usage_that_it_makes(catalog: Catalog) -> None:
    def change(txn: Transaction) -> None:
        txn.insert(blob(A))
        txn.insert(file("1", size_bytes=3))
        assert txn.get(Usage, "t") == Usage("t", 1, 3)
        assert txn.range(Usage, "") == [Usage("t", 1, 3)]
        txn.insert(file("2", size_bytes=4))
        assert txn.range(Usage, "") == [Usage("t", 2, 7)]
        txn.delete(file("1"))

    catalog.write(change)
    with catalog.read() as snapshot:
        assert snapshot.range(Usage, "") == [Usage("t", 1, 4)]


def test_usage_that_a_refused_record_would_have_made_is_not_counted(catalog: Catalog) -> None:
    insert(catalog, blob(A), file("1"))

    def change(txn: Transaction) -> None:
        for wrong in (file("1"), file("2", storage_ref="ref-1"), file("3", B)):
            with pytest.raises(BlobcaskError):
                txn.insert(wrong)

    catalog.write(change)
    with catalog.read() as snapshot:
        assert snapshot.get(Usage, "t") == Usage("t", 1, 1)


def test_a_write_appends_one_image_of_each_usage(catalog: Catalog) -> None:
    insert(catalog, blob(A))
    before = catalog.position().seq
    insert(catalog, *(file(str(number)) for number in range(10)))
    (change,) = catalog.changes(before)
    assert [op[2] for op in change.ops if op[0] is Usage] == [Usage("t", 10, 10)]

    def swap(txn: Transaction) -> None:
        """Takes as much as it gives: no change of the usage."""
        txn.delete(file("1"))
        txn.insert(file("x"))

    catalog.write(swap)
    *_, change = catalog.changes(before + 1)
    assert Usage not in [op[0] for op in change.ops]


# --- totals, and rows at targets


def totals(catalog: Catalog) -> dict[str, tuple[int, int]]:
    with catalog.read() as snapshot:
        found = snapshot.range(Total, "")
    return {total.name: (total.count, total.size_bytes) for total in found}


def rows(catalog: Catalog) -> dict[tuple[str, Digest], Replica]:
    with catalog.read() as snapshot:
        found = snapshot.range(Replica, "", limit=EVERYTHING)
    return {(row.target, row.digest): row for row in found}


def test_totals_are_counted_by_the_catalog(catalog: Catalog) -> None:
    insert(catalog, blob(A), blob(B, size_bytes=7), blob(C, local=False, size_bytes=2))
    assert totals(catalog) == {"blobs:here": (2, 8), "blobs:elsewhere": (1, 2)}
    catalog.write(lambda txn: txn.replace(blob(B, local=False, size_bytes=7)))
    catalog.write(lambda txn: txn.delete(blob(C)))
    assert totals(catalog) == {"blobs:here": (1, 1), "blobs:elsewhere": (1, 7)}
    remove(catalog, blob(A), blob(B))
    assert totals(catalog) == {}


def test_a_total_of_empty_blobs_is_a_total(catalog: Catalog) -> None:
    insert(catalog, blob(A, size_bytes=0))
    assert totals(catalog) == {"blobs:here": (1, 0)}


def test_a_write_sees_the_totals_that_it_makes(catalog: Catalog) -> None:
    def change(txn: Transaction) -> None:
        txn.insert(blob(A))
        assert txn.get(Total, "blobs:here") == Total("blobs:here", 1, 1)
        txn.delete(blob(A))
        assert txn.range(Total, "") == []

    catalog.write(change)


def test_a_blob_gets_a_row_for_each_target_when_it_becomes_live(catalog: Catalog) -> None:
    insert(catalog, Target("dr", "there", 1), Target("edge", "here", 1))
    insert(catalog, blob(A, size_bytes=5))
    assert rows(catalog) == {}
    insert(catalog, file("1"))
    before = rows(catalog)
    assert set(before) == {("dr", A), ("edge", A)}
    assert {row.queue for row in before.values()} == {"dr", "edge"}
    assert totals(catalog)["backlog:dr"] == totals(catalog)["backlog:edge"] == (1, 5)
    insert(catalog, file("2"))
    remove(catalog, file("1"), file("2"))
    insert(catalog, file("3"))
    assert rows(catalog) == before, "one that was condemned and revived keeps its rows"


def test_a_target_counts_from_the_write_that_adds_it(catalog: Catalog) -> None:
    def change(txn: Transaction) -> None:
        txn.insert(blob(A))
        txn.insert(file("1", A))
        txn.insert(Target("dr", "there", 1))
        txn.insert(blob(B))
        txn.insert(file("2", B))
        assert txn.get(Replica, "dr", A) is None
        assert [row.digest for row in txn.range(Replica, "blob", (B,))] == [B]
        txn.delete(Target("dr", "there", 1))
        txn.insert(blob(C))
        txn.insert(file("3", C))

    catalog.write(change)
    assert set(rows(catalog)) == {("dr", B)}


def test_rows_of_a_blob_that_goes_are_removed_in_the_same_write(
    catalog: Catalog, clock: HandClock
) -> None:
    insert(catalog, Target("dr", "there", 1), blob(A), file("1", A), blob(B), file("2", B))
    catalog.write(
        lambda txn: txn.replace(replace(rows(catalog)["dr", A], state=WANTED, attempts=1))
    )
    clock.advance(SECOND_US)
    remove(catalog, file("1"), file("2"))
    assert {row.removed_at for row in rows(catalog).values()} == {None}
    remove(catalog, blob(A), blob(B))
    (row,) = rows(catalog).values()
    assert (row.digest, row.removed_at) == (A, clock.now_us()), "what nobody tried just goes"
    assert "backlog:dr" not in totals(catalog)
    insert(catalog, blob(A), file("3", A))
    (row,) = rows(catalog).values()
    assert (row.removed_at, row.queue, row.attempts) == (None, "dr", 1)


def test_a_write_that_is_undone_leaves_no_row_and_no_total(catalog: Catalog) -> None:
    insert(catalog, Target("dr", "there", 1))

    def change(txn: Transaction) -> None:
        txn.insert(blob(A))
        txn.insert(file("1"))
        raise Oops

    with pytest.raises(Oops):
        catalog.write(change)
    assert (rows(catalog), totals(catalog)) == ({}, {})


# --- one write is one write


def test_an_error_in_a_change_undoes_it_alone(catalog: Catalog) -> None:
    """Writes that waited together share a sync, and no fate."""
    insert(catalog, blob(A))
    started = threading.Barrier(17)
    outcomes: dict[int, BaseException | None] = {}

    def write(number: int) -> None:
        def change(txn: Transaction) -> None:
            txn.insert(file(str(number)))
            if number % 2:
                raise Oops(number)

        started.wait()
        try:
            catalog.write(change)
            outcomes[number] = None
        except Oops as error:
            outcomes[number] = error

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    started.wait()
    for thread in threads:
        thread.join()
    for number, outcome in outcomes.items():
        if number % 2:
            assert isinstance(outcome, Oops)
            assert outcome.args == (number,)
    with catalog.read() as snapshot:
        found = set(ids(snapshot.range(StoredFile, "")))
    assert found == {str(number) for number in range(0, 16, 2)}
    assert get_blob(catalog, A).refcount == 8


def test_increments_of_many_threads_all_count(catalog: Catalog) -> None:
    insert(catalog, Mark("count", "0"))

    def increment(txn: Transaction) -> None:
        mark = txn.get(Mark, "count")
        assert mark is not None
        txn.replace(Mark("count", str(int(mark.value) + 1)))

    def work() -> None:
        for _ in range(25):
            catalog.write(increment)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with catalog.read() as snapshot:
        assert snapshot.get(Mark, "count") == Mark("count", "200")


def test_two_writes_never_both_act_on_what_only_one_may(catalog: Catalog) -> None:
    """Write skew: each reads both marks and takes its own only while both are there."""
    for number in range(20):
        insert(catalog, Mark(f"{number}a", ""), Mark(f"{number}b", ""))

        def take(which: str, number: int = number) -> None:
            def change(txn: Transaction) -> None:
                both = [txn.get(Mark, f"{number}{letter}") for letter in "ab"]
                if None not in both:
                    txn.delete(Mark(f"{number}{which}", ""))

            catalog.write(change)

        threads = [threading.Thread(target=take, args=(letter,)) for letter in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with catalog.read() as snapshot:
        assert len(snapshot.range(Mark, "")) == 20


def test_a_reader_sees_whole_writes_only(catalog: Catalog) -> None:
    insert(catalog, Mark("left", "0"), Mark("right", "0"))
    ended = threading.Event()
    torn: list[list[Mark]] = []

    def watch() -> None:
        while not ended.is_set():
            with catalog.read() as snapshot:
                marks = snapshot.range(Mark, "")
            if len({mark.value for mark in marks}) != 1:
                torn.append(marks)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(100):

        def change(txn: Transaction, value: str = str(number)) -> None:
            txn.replace(Mark("left", value))
            txn.replace(Mark("right", value))

        catalog.write(change)
    ended.set()
    watcher.join()
    assert torn == []


def test_what_was_written_is_there_after_opening_again(
    catalog: Catalog, open_catalog: OpenCatalog
) -> None:
    insert(catalog, blob(A), file("1"))
    before = catalog.position()
    catalog.close()
    catalog = open_catalog()
    assert catalog.position() == before
    with catalog.read() as snapshot:
        assert snapshot.get(StoredFile, "1") == file("1")


def test_a_closed_catalog_says_so(catalog: Catalog) -> None:
    catalog.close()
    catalog.close()
    with pytest.raises(CatalogClosed):
        catalog.write(lambda txn: None)
    with pytest.raises(CatalogClosed), catalog.read():
        pass


def test_nobody_waits_for_ever_at_a_closing_catalog(open_catalog: OpenCatalog) -> None:
    """Every write that meets the closing is either done or refused."""
    catalog = open_catalog()
    started = threading.Barrier(5)
    done: list[str] = []
    refused: list[BlobcaskError] = []

    def write(name: str) -> None:
        started.wait()
        for number in itertools.count():
            try:
                insert(catalog, Mark(f"{name}{number}", ""))
            except CatalogClosed as error:
                refused.append(error)
                return
            done.append(f"{name}{number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    started.wait()
    catalog.close()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(refused) == 4
    with open_catalog().read() as snapshot:
        assert {mark.name for mark in snapshot.range(Mark, "", limit=EVERYTHING)} == set(done)


# --- the journal, seen through the seam


def test_changes_tell_every_write_in_order(catalog: Catalog, clock: HandClock) -> None:
    catalog.write(lambda txn: txn.insert(Mark("a", "1")), actor="alice", request_id="r1")
    clock.advance(5)
    catalog.write(lambda txn: txn.replace(Mark("a", "2")), actor="bob")
    catalog.write(lambda txn: txn.delete(Mark("a", "")))
    first, second, third = catalog.changes(0)
    assert (first.actor, first.request_id, first.at_us) == ("alice", "r1", START_US)
    assert [(kind, record) for kind, _, record in first.ops] == [(Mark, Mark("a", "1"))]
    assert (second.actor, second.at_us) == ("bob", START_US + 5)
    assert [record for _, _, record in third.ops] == [None]
    assert first.seq < second.seq < third.seq == catalog.position().seq
    assert [change.seq for change in catalog.changes(first.seq)] == [second.seq, third.seq]
    assert list(catalog.changes(third.seq)) == []
    assert list(catalog.changes(third.seq + 10)) == []


def test_changes_hold_what_the_catalog_changed_itself(catalog: Catalog) -> None:
    insert(catalog, blob(A))
    insert(catalog, file("1"))
    *_, last = catalog.changes(0)
    counted = [record for kind, _, record in last.ops if kind is Blob]
    assert [record.refcount for record in counted if isinstance(record, Blob)] == [1]


def test_a_checkpoint_changes_nothing_that_can_be_seen(
    catalog: Catalog, open_catalog: OpenCatalog
) -> None:
    assert catalog.checkpoint() == catalog.position()
    insert(catalog, blob(A), file("1"))
    position = catalog.checkpoint()
    assert position == catalog.position()
    assert catalog.checkpoint() == position
    insert(catalog, file("2"))
    catalog.close()
    catalog = open_catalog()
    with catalog.read() as snapshot:
        assert ids(snapshot.range(StoredFile, "")) == ["1", "2"]
    assert catalog.position().seq == position.seq + 1


def test_a_checkpoint_while_others_write_is_of_one_moment(catalog: Catalog) -> None:
    ended = threading.Event()

    def write() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            insert(catalog, Mark(str(number), ""))

    writer = threading.Thread(target=write)
    writer.start()
    positions = [catalog.checkpoint() for _ in range(5)]
    ended.set()
    writer.join()
    assert positions == sorted(positions, key=lambda position: position.seq)


# --- catalog time (invariant 10)


def times(catalog: Catalog, clock: HandClock, *steps: int) -> list[int]:
    """Catalog time as writes see it, after each of these steps of the clock."""
    found = []
    for step in steps:
        clock.advance(step)

        def change(txn: Transaction) -> int:
            txn.insert(Mark(str(len(txn.range(Mark, ""))), ""))
            return txn.now_us

        found.append(catalog.write(change))
    return found


def test_catalog_time_follows_the_clock_and_never_goes_back(
    catalog: Catalog, clock: HandClock
) -> None:
    assert times(catalog, clock, 0, 10, -5, 2, 10) == [
        START_US, START_US + 10, START_US + 10, START_US + 10, START_US + 17,
    ]  # fmt: skip


def test_catalog_time_does_not_go_back_over_a_restart(
    catalog: Catalog, open_catalog: OpenCatalog, clock: HandClock
) -> None:
    times(catalog, clock, 1000)
    catalog.close()
    assert times(open_catalog(), clock, -500) == [START_US + 1000]


def test_a_clock_far_ahead_is_believed_when_it_is_synchronised(
    catalog: Catalog, clock: HandClock
) -> None:
    times(catalog, clock, 0)
    clock.trusted = False
    assert times(catalog, clock, 31 * DAY_US) == [START_US]
    clock.trusted = True
    assert times(catalog, clock, 0) == [START_US + 31 * DAY_US]


def test_the_position_is_that_of_the_newest_write(catalog: Catalog) -> None:
    first = catalog.position()
    insert(catalog, Mark("a", ""))
    second = catalog.position()
    assert second.seq == first.seq + 1
    assert second.chain != first.chain
    assert second.state != first.state
    catalog.write(lambda txn: txn.delete(Mark("a", "")))
    third = catalog.position()
    # The same records, another history.
    assert third.state == first.state
    assert third.chain != first.chain
