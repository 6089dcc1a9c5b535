"""Rows at targets: words from outside against the row as it is now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from cas import replicas, rows
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import Digest, digest_of
from cas.doctor import examine_store
from cas.errors import NotFound, TargetNeeded
from cas.records import COPYING, DELETING, DONE, WANTED, Blob, Copy, Replica, StoredFile, Target
from cas.references import parse_reference
from cas.replicas import Backlog, Copying, Done, Failed, Forgetting, settle
from cas.scrub import Scrub
from cas.store import Store
from cas.totals import blobs_elsewhere, blobs_here
from tests.audit import assert_well, audit
from tests.cas.interposed import collect
from tests.clocks import HandClock

GRACE_US = DAY_US
DR = ("dr", "folder /mnt/dr")
EDGE = ("edge", "s3://edge")
EVERYTHING_SHIPPED = {"dr": 1 << 40, "edge": 1 << 40}


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(grace=Duration(GRACE_US), min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        yield store
        audit(store)


@pytest.fixture
def mirrored(store: Store) -> Store:
    replicas.register(store.catalog, [DR])
    return store


def put(store: Store, data: bytes) -> StoredFile:
    return store.files("acme", "ada").put(data, name="it")


def lose(store: Store, file: StoredFile, clock: HandClock) -> None:
    """Delete a file, and collect its bytes."""
    _delete(store, file)
    clock.advance(GRACE_US + 1)
    collect(store)


def _delete(store: Store, file: StoredFile) -> None:
    store.files("acme", "ada").delete(parse_reference(file.storage_ref))


def row(store: Store, digest: Digest, target: str = "dr") -> Replica | None:
    with store.catalog.read() as snapshot:
        return snapshot.get(Replica, target, digest)


def there(store: Store, digest: Digest, target: str = "dr") -> Replica:
    found = row(store, digest, target)
    assert found is not None
    return found


def blob(store: Store, digest: Digest) -> Blob:
    with store.catalog.read() as snapshot:
        found = snapshot.get(Blob, digest)
    assert found is not None
    return found


def due(store: Store, now_us: int = 0, target: str = "dr") -> list[Digest]:
    with store.catalog.read() as snapshot:
        return [row.digest for row in replicas.due(snapshot, target, now_us)]


def copied(store: Store, *names: str) -> None:
    """Every row of these targets is done."""
    for name in names or ("dr",):
        with store.catalog.read() as snapshot:
            found = replicas.due(snapshot, name, rows.NEVER - 1, 1000)
        settle(store.catalog, [Done(one) for one in found])


def removable(store: Store, before_us: int, shipped: int = 1 << 40) -> list[Replica]:
    with store.catalog.read() as snapshot:
        return replicas.removable(snapshot, "dr", before_us, shipped)


def wrong(store: Store) -> list[str]:
    return [found.what for found in examine_store(store) if found.wrong]


# --- targets


def test_targets_are_registered_once_and_their_blobs_backfilled_in_steps(store: Store) -> None:
    digests = {put(store, b"%d" % number).checksum_sha256 for number in range(5)}
    replicas.register(store.catalog, [DR])
    before = store.catalog.position()
    replicas.register(store.catalog, [DR])
    assert store.catalog.position() == before
    assert due(store) == []
    late = put(store, b"late").checksum_sha256
    steps = [replicas.backfill(store.catalog, "dr", limit=2) for _ in range(4)]
    assert steps == [True, True, True, False]
    assert set(due(store)) == digests | {late}
    assert not replicas.backfill(store.catalog, "dr")
    assert not replicas.backfill(store.catalog, "nobody")
    assert_well(store)


def test_a_backfill_gives_no_row_to_what_is_condemned(store: Store, clock: HandClock) -> None:
    file = put(store, b"it")
    _delete(store, file)
    replicas.register(store.catalog, [DR])
    replicas.backfill(store.catalog, "dr")
    assert due(store) == []
    put(store, b"it")
    assert due(store) == [file.checksum_sha256]


def test_a_target_that_is_forgotten_goes_with_its_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "_ROWS_A_WRITE", 2)
    replicas.register(store.catalog, [DR, EDGE])
    digests = [put(store, b"%d" % number).checksum_sha256 for number in range(5)]
    copy = Copy("dr", digests[0], "upload", 5, [], 1)
    settle(store.catalog, [Copying(there(store, digests[0]), copy)])
    assert replicas.plan_forgetting(store.catalog, "dr") == Forgetting("dr", DR[1], 5, 0)
    replicas.forget(store.catalog, "dr")
    assert [row(store, digest) for digest in digests] == [None] * 5
    assert len(due(store, target="edge")) == 5
    with store.catalog.read() as snapshot:
        assert [target.name for target in replicas.targets(snapshot)] == ["edge"]
        assert snapshot.range(Copy, "") == []
        assert replicas.backlog(snapshot, "dr", 0) == Backlog(0, 0, 0)
    assert_well(store)


def test_one_start_without_the_configuration_costs_nothing(store: Store) -> None:
    """Else a `replicate once` from a shell that lacks it forgets days of work."""
    replicas.register(store.catalog, [DR, EDGE])
    digest = put(store, b"it").checksum_sha256
    copied(store, "dr", "edge")
    before = store.catalog.position()
    for places in ([], [EDGE], [("dr", "folder /elsewhere"), EDGE]):
        with pytest.raises(TargetNeeded, match="replicate forget dr"):
            replicas.register(store.catalog, places)
    with pytest.raises(TargetNeeded, match="replicate moved dr"):
        replicas.register(store.catalog, [("dr", "folder /elsewhere"), EDGE])
    assert store.catalog.position() == before
    replicas.register(store.catalog, [DR, EDGE])
    assert there(store, digest).held


def test_a_target_without_any_row_goes_by_itself(store: Store) -> None:
    replicas.register(store.catalog, [DR])
    replicas.register(store.catalog, [("dr", "folder /elsewhere"), EDGE])
    with store.catalog.read() as snapshot:
        assert [target.place for target in replicas.targets(snapshot)] == [
            "folder /elsewhere",
            EDGE[1],
        ]


def test_rows_that_a_killed_process_left_go_at_the_next_start(store: Store) -> None:
    replicas.register(store.catalog, [DR, EDGE])
    put(store, b"it")
    with store.catalog.read() as snapshot:
        target = snapshot.get(Target, "dr")
    assert target is not None
    store.catalog.write(lambda txn: txn.delete(target))
    replicas.register(store.catalog, [EDGE])
    with store.catalog.read() as snapshot:
        assert {row.target for row in snapshot.range(Replica, "")} == {"edge"}


def test_another_place_under_the_same_name_has_nothing_yet(mirrored: Store) -> None:
    """A green row of the old place would be a lie about the new one."""
    file = put(mirrored, b"it")
    copied(mirrored)
    replicas.forget(mirrored.catalog, "dr")
    replicas.register(mirrored.catalog, [("dr", "folder /elsewhere")])
    assert row(mirrored, file.checksum_sha256) is None
    replicas.backfill(mirrored.catalog, "dr")
    assert due(mirrored) == [file.checksum_sha256]


def test_the_same_place_under_another_address_keeps_its_rows(mirrored: Store) -> None:
    file = put(mirrored, b"it")
    copied(mirrored)
    replicas.moved(mirrored.catalog, "dr", "folder /elsewhere")
    replicas.register(mirrored.catalog, [("dr", "folder /elsewhere")])
    assert there(mirrored, file.checksum_sha256).held


def test_a_target_that_evicted_blobs_need_stays(store: Store) -> None:
    replicas.register(store.catalog, [DR, EDGE])
    file = put(store, b"it")
    copied(store, "dr", "edge")
    replicas.evict(store.catalog, store.blobs, [file.checksum_sha256], EVERYTHING_SHIPPED)
    replicas.forget(store.catalog, "dr")  # the other one holds it too
    before = store.catalog.position()
    assert replicas.plan_forgetting(store.catalog, "edge").needed == 1
    with pytest.raises(TargetNeeded) as needed:
        replicas.forget(store.catalog, "edge")
    assert needed.value.blobs == 1
    assert store.catalog.position() == before
    assert_well(store)


def test_a_target_with_the_only_good_copy_of_what_is_missing_here_stays(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    path = mirrored.blobs.path(digest)
    path.chmod(0o600)
    path.write_bytes(b"rot")
    Scrub(mirrored).look_at(digest)
    assert blob(mirrored, digest).missing_at is not None
    with pytest.raises(TargetNeeded) as needed:
        replicas.forget(mirrored.catalog, "dr")
    assert needed.value.blobs == 1


def test_only_a_target_that_is_known_is_forgotten(store: Store) -> None:
    with pytest.raises(NotFound):
        replicas.plan_forgetting(store.catalog, "dr")
    with pytest.raises(NotFound):
        replicas.forget(store.catalog, "dr")


def test_what_a_probe_found_is_kept_with_the_target(mirrored: Store) -> None:
    replicas.keep_profile(mirrored.catalog, "dr", b"{}")
    with mirrored.catalog.read() as snapshot:
        assert [target.profile for target in replicas.targets(snapshot)] == [b"{}"]
    with pytest.raises(NotFound):
        replicas.keep_profile(mirrored.catalog, "nobody", b"{}")


# --- copying


def test_the_backlog_has_rows_bytes_and_the_oldest_age(mirrored: Store, clock: HandClock) -> None:
    began_us = clock.now_us()
    first = put(mirrored, b"one")
    clock.advance(SECOND_US)
    second = put(mirrored, b"three")
    clock.advance(SECOND_US)
    with mirrored.catalog.read() as snapshot:
        backlog = replicas.backlog(snapshot, "dr", clock.now_us())
        assert replicas.next_due_us(snapshot, "dr") == began_us
    assert backlog == Backlog(2, 8, 2 * SECOND_US, first.checksum_sha256)
    settle(mirrored.catalog, [Done(there(mirrored, first.checksum_sha256))])
    with mirrored.catalog.read() as snapshot:
        backlog = replicas.backlog(snapshot, "dr", clock.now_us())
        assert backlog == Backlog(1, 5, SECOND_US, second.checksum_sha256)
    copied(mirrored)
    with mirrored.catalog.read() as snapshot:
        assert replicas.backlog(snapshot, "dr", clock.now_us()) == Backlog(0, 0, 0)
        assert replicas.next_due_us(snapshot, "dr") is None


def test_a_failed_copy_comes_again_in_its_time_behind_the_others(
    mirrored: Store, clock: HandClock
) -> None:
    one, two = (put(mirrored, data).checksum_sha256 for data in (b"one", b"two"))
    later_us = clock.now_us() + HOUR_US
    (now,) = settle(mirrored.catalog, [Failed(there(mirrored, one), "no answer", later_us)])
    assert now is not None
    assert (now.attempts, now.last_error, now.state) == (1, "no answer", WANTED)
    assert due(mirrored, clock.now_us()) == [two]
    assert due(mirrored, later_us) == [two, one]


def test_new_rows_are_due_whatever_clock_is_asked(mirrored: Store) -> None:
    file = put(mirrored, b"it")
    assert due(mirrored, 0) == [file.checksum_sha256]


def test_a_multipart_upload_is_remembered_until_it_is_done(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copy = Copy("dr", digest, "upload", 5, ["e1"], 1)
    (now,) = settle(mirrored.catalog, [Copying(there(mirrored, digest), copy)])
    assert now is not None
    assert now.state == COPYING
    assert due(mirrored) == [digest]
    more = replace(copy, etags=["e1", "e2"])
    settle(mirrored.catalog, [Copying(now, more)])
    settle(mirrored.catalog, [Failed(there(mirrored, digest), "cut", 0)])
    with mirrored.catalog.read() as snapshot:
        assert snapshot.get(Copy, "dr", digest) == more
    settle(mirrored.catalog, [Done(now)])
    assert there(mirrored, digest).held
    with mirrored.catalog.read() as snapshot:
        assert snapshot.get(Copy, "dr", digest) is None


def test_an_upload_that_must_begin_afresh_is_forgotten(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copy = Copy("dr", digest, "upload", 5, ["e1"], 1)
    (now,) = settle(mirrored.catalog, [Copying(there(mirrored, digest), copy)])
    assert now is not None
    (now,) = settle(mirrored.catalog, [Failed(now, "no such upload", 0, afresh=True)])
    assert now is not None
    assert now.state == WANTED
    with mirrored.catalog.read() as snapshot:
        assert snapshot.range(Copy, "") == []


def test_many_outcomes_are_one_write(mirrored: Store) -> None:
    found = [there(mirrored, put(mirrored, b"%d" % n).checksum_sha256) for n in range(20)]
    before = mirrored.catalog.position().seq
    now = settle(mirrored.catalog, [Done(one) for one in found])
    assert all(one is not None and one.held for one in now)
    assert mirrored.catalog.position().seq == before + 1


# --- late words


def test_a_copy_that_ends_after_its_blob_went_is_deleted_in_its_time(
    mirrored: Store, clock: HandClock
) -> None:
    file = put(mirrored, b"it")
    seen = there(mirrored, file.checksum_sha256)
    lose(mirrored, file, clock)
    assert row(mirrored, file.checksum_sha256) is None
    for outcome in (Done(seen), Failed(seen, "cut", 0), Done(seen)):
        (now,) = settle(mirrored.catalog, [outcome])
        assert now is not None
        assert now.removed_at is not None
    assert [one.digest for one in removable(mirrored, clock.now_us() + 1)] == [seen.digest]
    assert_well(mirrored)


def test_a_copy_of_before_a_delete_never_makes_the_row_done(
    mirrored: Store, clock: HandClock
) -> None:
    """Sent, deleted at the target, wanted again: what was verified is gone by then."""
    file = put(mirrored, b"it")
    seen = there(mirrored, file.checksum_sha256)
    settle(mirrored.catalog, [Failed(seen, "slow", 0)])
    lose(mirrored, file, clock)
    begun = replicas.begin_removals(mirrored.catalog, removable(mirrored, clock.now_us() + 1))
    put(mirrored, b"it")
    (now,) = settle(mirrored.catalog, [Done(seen)])
    assert now is not None
    assert now.state == DELETING
    replicas.end_removals(mirrored.catalog, begun)
    (now,) = settle(mirrored.catalog, [Done(seen)])
    assert now is not None
    assert not now.held
    assert due(mirrored) == [file.checksum_sha256]
    copied(mirrored)
    assert_well(mirrored)


def test_a_copy_of_a_target_that_left_is_nobodys(mirrored: Store) -> None:
    seen = there(mirrored, put(mirrored, b"it").checksum_sha256)
    replicas.forget(mirrored.catalog, "dr")
    assert settle(mirrored.catalog, [Done(seen)]) == [None]
    assert row(mirrored, seen.digest) is None


def test_bytes_sent_once_more_leave_a_done_row_done(mirrored: Store, clock: HandClock) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    seen = there(mirrored, digest)
    clock.advance(SECOND_US)
    (now,) = settle(mirrored.catalog, [Done(seen)])
    assert now is not None
    assert now.held
    assert now.done_at == clock.now_us()
    assert now.seq == seen.seq


def test_bytes_sent_once_more_that_arrive_spoilt_are_wanted_again(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    (now,) = settle(mirrored.catalog, [Failed(there(mirrored, digest), "half of it", 0)])
    assert now is not None
    assert not now.held
    assert due(mirrored) == [digest]
    assert_well(mirrored)


def test_what_verify_found_lost_is_copied_again(mirrored: Store) -> None:
    one, two = (put(mirrored, data).checksum_sha256 for data in (b"one", b"two"))
    copied(mirrored)
    seen = there(mirrored, one)
    assert replicas.want_again(mirrored.catalog, "dr", [one, digest_of(b"never")]) == 1
    assert due(mirrored) == [one]
    assert there(mirrored, two).held
    settle(mirrored.catalog, [Failed(seen, "an old word", 0)])
    assert there(mirrored, one).attempts == 0


# --- deleting


def test_copies_are_deleted_after_the_delay_and_the_journal(
    mirrored: Store, clock: HandClock
) -> None:
    file = put(mirrored, b"it")
    copied(mirrored)
    lose(mirrored, file, clock)
    removed = there(mirrored, file.checksum_sha256)
    assert removed.removed_at == clock.now_us()
    assert removable(mirrored, clock.now_us()) == []
    assert removable(mirrored, clock.now_us() + 1, shipped=removed.seq - 1) == []
    found = removable(mirrored, clock.now_us() + 1, shipped=removed.seq)
    begun = replicas.begin_removals(mirrored.catalog, found)
    assert [one.state for one in begun] == [DELETING]
    # Whoever is started next finds it, whatever the delay is by then.
    assert removable(mirrored, 0, shipped=0) == begun
    assert replicas.begin_removals(mirrored.catalog, begun) == begun
    replicas.end_removals(mirrored.catalog, begun)
    assert row(mirrored, file.checksum_sha256) is None
    replicas.end_removals(mirrored.catalog, begun)
    assert_well(mirrored)


def test_a_blob_that_came_back_is_not_deleted(mirrored: Store, clock: HandClock) -> None:
    file = put(mirrored, b"it")
    copied(mirrored)
    lose(mirrored, file, clock)
    found = removable(mirrored, clock.now_us() + 1)
    put(mirrored, b"it")
    assert there(mirrored, file.checksum_sha256).held
    assert replicas.begin_removals(mirrored.catalog, found) == []
    assert there(mirrored, file.checksum_sha256).held


def test_a_blob_that_comes_back_while_its_copy_is_deleted_is_copied_after(
    mirrored: Store, clock: HandClock
) -> None:
    file = put(mirrored, b"it")
    copied(mirrored)
    lose(mirrored, file, clock)
    begun = replicas.begin_removals(mirrored.catalog, removable(mirrored, clock.now_us() + 1))
    put(mirrored, b"it")
    assert due(mirrored, rows.NEVER - 1) == []
    with mirrored.catalog.read() as snapshot:
        assert replicas.backlog(snapshot, "dr", clock.now_us()).rows == 1
        assert replicas.next_due_us(snapshot, "dr") is None
    assert_well(mirrored)
    replicas.end_removals(mirrored.catalog, begun)
    assert due(mirrored) == [file.checksum_sha256]
    replicas.end_removals(mirrored.catalog, begun)  # a word of before says nothing
    assert due(mirrored) == [file.checksum_sha256]
    assert_well(mirrored)


def test_a_delete_forgets_the_upload_that_was_under_way(mirrored: Store, clock: HandClock) -> None:
    file = put(mirrored, b"it")
    copy = Copy("dr", file.checksum_sha256, "upload", 5, [], 1)
    settle(mirrored.catalog, [Copying(there(mirrored, file.checksum_sha256), copy)])
    lose(mirrored, file, clock)
    begun = replicas.begin_removals(mirrored.catalog, removable(mirrored, clock.now_us() + 1))
    with mirrored.catalog.read() as snapshot:
        assert snapshot.get(Copy, "dr", file.checksum_sha256) == copy, "it is to be aborted"
    replicas.end_removals(mirrored.catalog, begun)
    with mirrored.catalog.read() as snapshot:
        assert snapshot.range(Copy, "") == []


# --- evicting


def test_only_what_every_target_holds_is_evicted(store: Store) -> None:
    """Invariant 8."""
    digest = put(store, b"it").checksum_sha256

    def evicted() -> bool:
        found = replicas.evict(store.catalog, store.blobs, [digest], EVERYTHING_SHIPPED)
        return bool(found)

    assert not evicted(), "no target"
    replicas.register(store.catalog, [DR, EDGE])
    replicas.backfill(store.catalog, "dr")
    replicas.backfill(store.catalog, "edge")
    copied(store, "dr")
    assert not evicted(), "one of two"
    copied(store, "edge")
    seq = there(store, digest, "edge").seq
    for shipped in ({}, {"dr": seq}, {"dr": seq, "edge": seq - 1}):
        assert replicas.evict(store.catalog, store.blobs, [digest], shipped) == []
    assert store.blobs.stat(digest) is not None
    assert evicted()
    assert store.blobs.stat(digest) is None
    assert not blob(store, digest).local
    assert blob(store, digest).evicted_at is not None
    with store.catalog.read() as snapshot:
        assert (blobs_here(snapshot).count, blobs_elsewhere(snapshot).size_bytes) == (0, 2)
        assert replicas.homes(snapshot, digest) == ["dr", "edge"]
    assert not evicted()
    assert_well(store)


def test_another_file_than_was_recorded_is_not_evicted(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    path = mirrored.blobs.path(digest)
    other = path.with_name("other")
    other.write_bytes(b"it")
    other.rename(path)
    found = replicas.evict(mirrored.catalog, mirrored.blobs, [digest], EVERYTHING_SHIPPED)
    assert found == []
    assert path.exists()


def test_a_reader_of_an_evicted_file_reads_on(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    with open(mirrored.blobs.open(digest), "rb") as stream:
        replicas.evict(mirrored.catalog, mirrored.blobs, [digest], EVERYTHING_SHIPPED)
        assert stream.read() == b"it"


def test_bytes_that_come_again_are_here_again(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    replicas.evict(mirrored.catalog, mirrored.blobs, [digest], EVERYTHING_SHIPPED)
    put(mirrored, b"it")
    assert blob(mirrored, digest).local
    assert blob(mirrored, digest).evicted_at is None
    assert there(mirrored, digest).held
    assert mirrored.blobs.stat(digest) is not None
    assert_well(mirrored)


def test_the_file_that_a_crash_left_is_scrubbed_away_after_the_grace(
    mirrored: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    monkeypatch.setattr(replicas, "_unlink", lambda *_: None)
    replicas.evict(mirrored.catalog, mirrored.blobs, [digest], EVERYTHING_SHIPPED)
    found = mirrored.blobs.stat(digest)
    assert found is not None
    scrub = Scrub(mirrored)
    while scrub.step():
        pass
    assert scrub.report.leftovers == []
    clock.time_us = found.mtime_ns // 1000 + 10 * DAY_US
    for dry_run in (True, False):
        scrub = Scrub(mirrored, dry_run=dry_run)
        while scrub.step():
            pass
        assert scrub.report.leftovers == [digest.hex()]
        assert scrub.report.well
        assert (mirrored.blobs.stat(digest) is None) is not dry_run
    assert_well(mirrored)


def test_an_evicted_blob_that_its_target_lost_is_listed_as_missing_until_it_is_found(
    mirrored: Store,
) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    replicas.evict(mirrored.catalog, mirrored.blobs, [digest], EVERYTHING_SHIPPED)
    replicas.want_again(mirrored.catalog, "dr", [digest])
    assert blob(mirrored, digest).missing_at is not None
    assert wrong(mirrored) == [f"the bytes of blob {digest.hex()} are missing"]
    settle(mirrored.catalog, [Done(there(mirrored, digest))])
    assert blob(mirrored, digest).missing_at is None
    assert_well(mirrored)


def test_an_evicted_blob_that_one_of_two_targets_lost_is_not_missing(store: Store) -> None:
    replicas.register(store.catalog, [DR, EDGE])
    digest = put(store, b"it").checksum_sha256
    copied(store, "dr", "edge")
    replicas.evict(store.catalog, store.blobs, [digest], EVERYTHING_SHIPPED)
    replicas.want_again(store.catalog, "dr", [digest])
    assert blob(store, digest).missing_at is None
    assert_well(store)


def test_an_evicted_blob_that_nobody_needs_is_collected_and_deleted(
    mirrored: Store, clock: HandClock
) -> None:
    file = put(mirrored, b"it")
    copied(mirrored)
    digest = file.checksum_sha256
    replicas.evict(mirrored.catalog, mirrored.blobs, [digest], EVERYTHING_SHIPPED)
    lose(mirrored, file, clock)
    with mirrored.catalog.read() as snapshot:
        assert snapshot.get(Blob, digest) is None
    assert [one.digest for one in removable(mirrored, clock.now_us() + 1)] == [digest]


# --- the doctor


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: replace(row, queue=None),
        lambda row: replace(row, size_bytes=9),
        lambda row: replace(row, state=DONE),
        lambda row: replace(row, removed_at=1, ending="dr", queue=None),
        None,
    ],
)
def test_the_doctor_names_a_row_that_cannot_be(mirrored: Store, spoil: object) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    replicas.backfill(mirrored.catalog, "dr")
    found = there(mirrored, digest)
    if spoil is None:
        mirrored.catalog.write(lambda txn: txn.delete(found))
    else:
        assert callable(spoil)
        mirrored.catalog.write(lambda txn: txn.replace(spoil(found)))
    assert [text for text in wrong(mirrored) if digest.hex() in text and "target dr" in text]
    if spoil is None:
        replicas.begin_backfill(mirrored.catalog, "dr")
        replicas.backfill(mirrored.catalog, "dr")
        assert_well(mirrored)


def test_the_doctor_names_an_evicted_blob_that_is_nowhere(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    replicas.evict(mirrored.catalog, mirrored.blobs, [digest], EVERYTHING_SHIPPED)
    found = there(mirrored, digest)
    mirrored.catalog.write(lambda txn: txn.replace(rows.lost(found, 1, 1)))
    assert any("neither here nor at a target" in text for text in wrong(mirrored))


def nowhere(store: Store, missing_at: int | None) -> Digest:
    """A blob as a restore leaves one that it found neither here nor there."""
    digest = put(store, b"it").checksum_sha256
    now = replace(blob(store, digest), local=False, inode=0, mtime_ns=0, missing_at=missing_at)
    store.catalog.write(lambda txn: txn.replace(now))
    store.blobs.path(digest).unlink()
    return digest


def test_what_a_restore_found_nowhere_and_a_target_has_after_all_is_evicted(
    mirrored: Store,
) -> None:
    """In no index of what is not here it would be forgotten with its target."""
    digest = nowhere(mirrored, missing_at=1)
    settle(mirrored.catalog, [Done(there(mirrored, digest))])
    assert blob(mirrored, digest).missing_at is None
    assert_well(mirrored)
    with pytest.raises(TargetNeeded):
        replicas.forget(mirrored.catalog, "dr")


def test_a_blob_that_is_in_no_list_and_nowhere_is_damage(mirrored: Store) -> None:
    nowhere(mirrored, missing_at=None)
    (found,) = [found for found in examine_store(mirrored) if found.wrong]
    assert (found.severity, found.invariant) == ("damage", 1)
    mirrored.catalog.write(
        lambda txn: txn.replace(replace(blob(mirrored, digest_of(b"it")), missing_at=1))
    )


def test_a_missing_blob_that_a_target_holds_is_not_lost(mirrored: Store) -> None:
    digest = put(mirrored, b"it").checksum_sha256
    copied(mirrored)
    gone = msgspec.structs.replace(blob(mirrored, digest), missing_at=1)
    mirrored.catalog.write(lambda txn: txn.replace(gone))
    (found,) = [found for found in examine_store(mirrored) if found.wrong]
    assert found.severity == "trouble"
    assert found.what.endswith("held by dr")
