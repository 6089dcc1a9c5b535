"""Writers meet writers, collectors and bad bytes at the worst moment, and nothing is lost.

Every interleaving here is forced: the other party acts, wholly, at one chosen point.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from cas.blobs import Source
from cas.catalog import Transaction
from cas.clock import DAY_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import Digest, digest_of
from cas.errors import StoreFull, UploadClosed
from cas.files import Files, PutItem
from cas.records import CONDEMNED, DELETING, LIVE, Blob, StoredFile
from cas.references import parse_reference
from cas.store import Store
from cas.upload_links import UploadLink
from cas.uploads import UploadRequest
from tests.audit import audit
from tests.cas.interposed import InterposedDisk, collect, interpose, interposed
from tests.clocks import HandClock

GRACE_US = DAY_US
DATA = b"the bytes that everybody wants" * 100
DIGEST = digest_of(DATA)
SETTINGS = Settings(store=StoreSettings(grace=Duration(GRACE_US), min_free=Size(0)))


@pytest.fixture
def disk() -> InterposedDisk:
    return InterposedDisk()


@pytest.fixture
def store(root: Path, clock: HandClock, disk: InterposedDisk) -> Iterator[Store]:
    with Store.open(root / "store", SETTINGS, clock=clock, disk=disk) as store:
        yield store


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("acme", "ada")


def put(files: Files, source: Source = DATA, run: str = "direct") -> StoredFile:
    return files.put(source, name="it", run=run)


def put_one_of_many(files: Files, source: Source = DATA, run: str = "direct") -> StoredFile:
    items = [PutItem(b"before", "a"), PutItem(source, "it"), PutItem(b"after", "b")]
    return files.put_many(items, run=run)[1]


def put_stream(files: Files, source: Source = DATA, run: str = "direct") -> StoredFile:
    assert isinstance(source, bytes)
    return files.put(io.BytesIO(source), name="it", run=run)


Put = Callable[..., StoredFile]
every_put = pytest.mark.parametrize("store_it", [put, put_one_of_many, put_stream])


def blob(store: Store, digest: Digest = DIGEST) -> Blob | None:
    with store.catalog.read() as snapshot:
        return snapshot.get(Blob, digest)


def read(store: Store, digest: Digest = DIGEST) -> bytes:
    with open(store.opener.here(digest), "rb") as stream:
        return stream.read()


def delete(files: Files, file: StoredFile) -> None:
    files.delete(parse_reference(file.storage_ref))


def let_grace_pass_and_collect(store: Store, clock: HandClock) -> None:
    clock.advance(GRACE_US + 1)
    assert collect(store) >= 1


def assert_stored(store: Store, file: StoredFile) -> None:
    assert file.checksum_sha256 == DIGEST
    assert read(store) == DATA
    found = blob(store)
    assert found is not None
    assert found.state == LIVE
    assert audit(store).orphans == []


# --- a collector runs through while a writer is between meeting the bytes and its commit


@every_put
@pytest.mark.parametrize("tenant", ["acme", "other"])
def test_bytes_are_collected_between_meeting_and_commit(
    store: Store, files: Files, clock: HandClock, store_it: Put, tenant: str
) -> None:
    first = put(store.files(tenant, "ada"), run="first")

    def collected() -> None:
        delete(store.files(tenant, "ada"), first)
        let_grace_pass_and_collect(store, clock)
        assert blob(store) is None

    interpose(store.adoption if store_it is not put_one_of_many else files).append(collected)
    assert_stored(store, store_it(files))


@every_put
def test_a_condemned_blob_is_revived_just_before_its_collection(
    store: Store, files: Files, clock: HandClock, store_it: Put
) -> None:
    delete(files, put(files))
    condemned = blob(store)
    assert condemned is not None
    assert condemned.state == CONDEMNED
    clock.advance(GRACE_US + 1)
    with store.catalog.read() as snapshot:
        plan = store.collector.plan(snapshot, clock.now_us())
    assert plan.digests == [DIGEST]
    file = store_it(files)
    assert store.collector.execute(plan).blobs == 0
    assert_stored(store, file)


@every_put
def test_an_orphan_is_removed_while_a_writer_is_about_to_adopt_it(
    store: Store, files: Files, store_it: Put
) -> None:
    def removed() -> None:
        placed = store.blobs.stat(DIGEST)
        assert placed is not None
        assert store.collector.doom_orphan(DIGEST, placed.size_bytes, placed.inode)
        assert store.blobs.stat(DIGEST) is None

    interpose(store.adoption if store_it is not put_one_of_many else files).append(removed)
    assert_stored(store, store_it(files))


def test_no_orphan_is_removed_once_a_record_names_it(store: Store, files: Files) -> None:
    file = put(files)
    placed = store.blobs.stat(DIGEST)
    assert placed is not None
    assert not store.collector.doom_orphan(DIGEST, placed.size_bytes, placed.inode)
    assert_stored(store, file)


@every_put
@pytest.mark.parametrize("tenant", ["acme", "other"])
def test_bytes_vanish_between_meeting_and_commit(
    store: Store, files: Files, store_it: Put, tenant: str
) -> None:
    # What a scrub does that has put bad bytes aside and not come to say so.
    put(store.files(tenant, "ada"), run="first")
    waiting = interpose(store.adoption if store_it is not put_one_of_many else files)
    waiting.append(lambda: store.blobs.quarantine(DIGEST))
    assert_stored(store, store_it(files))


@every_put
@pytest.mark.parametrize("times", [1, 3])
def test_bytes_are_healed_by_others_between_meeting_and_commit(
    store: Store, files: Files, store_it: Put, times: int
) -> None:
    # Each time the object is another one than the writer met, and held by another tenant.
    put(store.files("other", "bob"), run="first")

    def heal_meanwhile() -> None:
        os.truncate(store.blobs.path(DIGEST), 1)
        put(store.files("other", "bob"), run="second")

    waiting = interpose(store.adoption)
    if store_it is put_one_of_many:
        interpose(files).append(heal_meanwhile)
    for _ in range(times):
        waiting.append(heal_meanwhile)
        waiting.append(lambda: None)  # the write of the healer itself
    assert_stored(store, store_it(files))


@pytest.mark.parametrize("store_it", [put, put_stream])
def test_a_copy_that_was_rehearsed_is_rehearsed_again(
    store: Store, files: Files, store_it: Put
) -> None:
    # The kernel lets no file return that has lost its last name, so it takes a fresh copy.
    others = store.files("other", "bob")
    put(others, run="first")

    def place_over() -> None:
        with store.blobs.stage(DATA) as staged:
            store.blobs.place(staged)

    between = interposed(store.adoption)
    between.before_write.append(place_over)
    between.before_read.extend([lambda: None, lambda: put(others, run="second")])
    assert_stored(store, store_it(files))
    assert not between.before_read


# --- a writer meets `deleting`


def die_after_dooming(store: Store, disk: InterposedDisk, clock: HandClock) -> None:
    """A collection that ends after its record says `deleting` and before the bytes go."""

    def die() -> None:
        raise KeyboardInterrupt

    clock.advance(GRACE_US + 1)
    disk.before["unlink"].append(die)
    with pytest.raises(KeyboardInterrupt):
        collect(store)
    doomed = blob(store)
    assert doomed is not None
    assert doomed.state == DELETING
    assert store.blobs.stat(DIGEST) is not None


@every_put
def test_a_writer_finishes_a_removal_that_nobody_will_finish(
    store: Store, files: Files, disk: InterposedDisk, clock: HandClock, store_it: Put
) -> None:
    delete(files, put(files))
    die_after_dooming(store, disk, clock)
    assert_stored(store, store_it(files))


def test_a_slot_finishes_a_removal_too(
    store: Store, files: Files, disk: InterposedDisk, clock: HandClock
) -> None:
    delete(files, put(files))
    die_after_dooming(store, disk, clock)
    link = upload(store)
    link.put(0, DATA, filename="a.bin")
    assert_stored(store, link.complete().files[0])


def test_a_killed_collection_is_finished_by_the_next(
    store: Store, files: Files, disk: InterposedDisk, clock: HandClock
) -> None:
    delete(files, put(files))
    die_after_dooming(store, disk, clock)
    assert collect(store) == 1
    assert blob(store) is None
    assert store.blobs.stat(DIGEST) is None
    audit(store)


@every_put
def test_a_removal_begins_between_meeting_and_commit(
    store: Store, files: Files, disk: InterposedDisk, clock: HandClock, store_it: Put
) -> None:
    first = put(files, run="first")

    def doomed() -> None:
        delete(files, first)
        die_after_dooming(store, disk, clock)

    interpose(store.adoption if store_it is not put_one_of_many else files).append(doomed)
    assert_stored(store, store_it(files))


@every_put
def test_a_writer_waits_for_the_collector_that_removes_just_these_bytes(
    store: Store, files: Files, disk: InterposedDisk, clock: HandClock, store_it: Put
) -> None:
    delete(files, put(files))
    clock.advance(GRACE_US + 1)
    met = threading.Event()
    finish = store.collector.finish

    def finish_noticed(digest: Digest) -> None:
        met.set()  # from here on the writer waits for COLLECT
        finish(digest)

    store.collector.finish = finish_noticed  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as other:
        writing = []

        def write_meanwhile() -> None:
            writing.append(other.submit(store_it, files))
            assert met.wait(30)

        disk.before["unlink"].append(write_meanwhile)
        assert collect(store) == 1
        assert_stored(store, writing[0].result(30))


# --- two collectors


def test_two_collectors_remove_everything_once(
    store: Store, files: Files, clock: HandClock
) -> None:
    contents = [b"%d" % number for number in range(20)]
    for file in files.put_many([PutItem(data, "x") for data in contents]):
        delete(files, file)
    clock.advance(GRACE_US + 1)
    with store.catalog.read() as snapshot:
        plan = store.collector.plan(snapshot, clock.now_us())
    other: list[int] = []
    interpose(store.collector).append(lambda: other.append(_execute_apart(store, plan.digests)))
    mine = store.collector.execute(plan).blobs
    assert (mine, other) == (0, [20])
    assert audit(store).orphans == []


def _execute_apart(store: Store, digests: list[Digest]) -> int:
    # COLLECT is held by the first, so the second does what a collector does inside of it.
    def doom(txn: Transaction) -> int:
        doomed = [store.collector._doom(txn, digest, 1 << 60) for digest in digests]
        return len([blob for blob in doomed if blob])

    count = store.catalog.write(doom)
    store.blobs.remove_many(digests)
    store.collector._remove(digests)
    return count


def test_collectors_in_threads_never_count_a_blob_twice(
    store: Store, files: Files, clock: HandClock
) -> None:
    stored = files.put_many([PutItem(b"%d" % number, "x") for number in range(300)])
    for file in stored:
        delete(files, file)
    clock.advance(GRACE_US + 1)
    with ThreadPoolExecutor(4) as pool:
        counts = [future.result() for future in [pool.submit(collect, store) for _ in range(4)]]
    assert collect(store) == 0
    assert sum(counts) >= 300
    assert list((store.root / "objects").glob("*/*")) == []
    audit(store)


# --- batch and single writer at the same bytes


@pytest.mark.parametrize("tenant", ["acme", "other"])
def test_a_single_writer_stores_what_a_batch_has_linked_and_not_synced(
    store: Store, files: Files, disk: InterposedDisk, tenant: str
) -> None:
    single: list[StoredFile] = []
    disk.before["sync_filesystem"].append(
        lambda: single.append(put(store.files(tenant, "bob"), run="single"))
    )
    many = put_one_of_many(files)
    assert_stored(store, many)
    assert_stored(store, single[0])


@pytest.mark.parametrize("tenant", ["acme", "other"])
def test_a_batch_stores_what_a_single_writer_has_placed_and_not_named(
    store: Store, files: Files, tenant: str
) -> None:
    many: list[StoredFile] = []
    interpose(store.adoption).append(
        lambda: many.append(put_one_of_many(store.files(tenant, "bob"), run="many"))
    )
    single = put(files)
    assert_stored(store, many[0])
    assert_stored(store, single)


def test_two_batches_at_the_same_bytes(store: Store, files: Files, disk: InterposedDisk) -> None:
    other = store.files("other", "bob")
    inner: list[StoredFile] = []
    disk.before["sync_filesystem"].append(lambda: inner.append(put_one_of_many(other)))
    outer = put_one_of_many(files)
    assert_stored(store, inner[0])
    assert_stored(store, outer)


def test_a_batch_reads_a_stream_again_from_where_it_began(
    store: Store, files: Files, clock: HandClock
) -> None:
    first = put(files, run="first")
    stream = io.BytesIO(b"not this" + DATA)
    stream.seek(8)

    def collected() -> None:
        delete(files, first)
        let_grace_pass_and_collect(store, clock)

    interpose(files).append(collected)
    [file] = files.put_many([PutItem(stream, "it")])
    assert_stored(store, file)


def test_the_same_bytes_from_32_threads_are_one_object(store: Store, root: Path) -> None:
    source = root / "source"
    source.write_bytes(DATA * 1000)
    digest = digest_of(DATA * 1000)
    start = threading.Barrier(32)

    def store_it(number: int) -> StoredFile:
        files = store.files(f"tenant{number % 5}", "ada")
        start.wait(30)
        if number % 3 == 0:
            return files.put_many([PutItem(source, "it")], run=f"run{number}")[0]
        with source.open("rb") as stream:
            return put(files, source if number % 3 == 1 else stream, run=f"run{number}")

    with ThreadPoolExecutor(32) as pool:
        stored = list(pool.map(store_it, range(32)))
    assert {file.checksum_sha256 for file in stored} == {digest}
    assert len({file.file_id for file in stored}) == 32
    found = blob(store, digest)
    assert found is not None
    assert found.refcount == 32
    assert read(store, digest) == DATA * 1000
    store.blobs.close()  # copies that lost are let go of after the answer
    assert len(list((store.root / "objects").glob("*/*"))) == 1
    audit(store)


def test_the_same_file_from_32_threads_is_one_file(store: Store, files: Files) -> None:
    start = threading.Barrier(32)

    def store_it(_: int) -> StoredFile:
        start.wait(30)
        return put(files)

    with ThreadPoolExecutor(32) as pool:
        stored = list(pool.map(store_it, range(32)))
    assert len({file.file_id for file in stored}) == 1
    assert_stored(store, stored[0])


# --- healing


def truncated(store: Store, path: Path) -> None:
    os.truncate(path, 5)


def replaced(store: Store, path: Path) -> None:
    bad = path.with_name("bad")
    bad.write_bytes(b"!" * len(DATA))
    bad.rename(path)


def removed(store: Store, path: Path) -> None:
    path.unlink()


def rotted(store: Store, path: Path) -> None:
    """What a scrub leaves of bytes that failed their hash."""
    store.blobs.quarantine(DIGEST)

    def mark(txn: Transaction) -> None:
        found = txn.get(Blob, DIGEST)
        assert found is not None
        txn.replace(msgspec.structs.replace(found, missing_at=txn.now_us))

    store.catalog.write(mark)


Harm = Callable[[Store, Path], None]
every_harm = pytest.mark.parametrize("harm", [truncated, replaced, removed, rotted])


@every_put
@every_harm
@pytest.mark.parametrize("tenant", ["acme", "other"])
def test_storing_again_heals(
    store: Store, files: Files, store_it: Put, harm: Harm, tenant: str
) -> None:
    first = put(files, run="first")
    harm(store, store.blobs.path(DIGEST))
    assert_stored(store, store_it(store.files(tenant, "ada")))
    assert files.stat(parse_reference(first.storage_ref)) == first
    found = blob(store)
    assert found is not None
    assert found.missing_at is None


@every_harm
def test_a_slot_heals(store: Store, files: Files, harm: Harm) -> None:
    put(files)
    harm(store, store.blobs.path(DIGEST))
    link = upload(store)
    link.put(0, DATA, filename="a.bin")
    assert_stored(store, link.complete().files[0])


@every_harm
def test_two_heal_at_once(store: Store, files: Files, harm: Harm) -> None:
    put(files, run="first")
    harm(store, store.blobs.path(DIGEST))
    interpose(store.adoption).append(lambda: put(store.files("other", "bob"), run="second"))
    assert_stored(store, put(files, run="third"))


@every_harm
def test_many_heal_at_once(store: Store, files: Files, harm: Harm) -> None:
    put(files, run="first")
    harm(store, store.blobs.path(DIGEST))
    start = threading.Barrier(8)

    def heal(number: int) -> StoredFile:
        start.wait(30)
        healers = store.files(f"tenant{number % 2}", "ada")
        if number % 2:
            return put_one_of_many(healers, run=f"run{number}")
        return put(healers, run=f"run{number}")

    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(heal, range(8)))
    for file in stored:
        assert_stored(store, file)


@every_put
def test_bytes_are_not_trusted_for_ever(
    store: Store, files: Files, clock: HandClock, store_it: Put
) -> None:
    put(files, run="first")
    path = store.blobs.path(DIGEST)
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"?" * len(DATA))
    # As where a disk forgets: same inode, length and time, so nothing shows it.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.advance(SETTINGS.store.trust_verified_for + 1)
    assert_stored(store, store_it(files))
    assert path.stat().st_ino != before.st_ino


@every_put
def test_an_orphan_with_bad_bytes_poisons_nothing(
    store: Store, files: Files, store_it: Put
) -> None:
    # A power cut tore the object of a writer that had not come to the end.
    store.blobs.path(DIGEST).write_bytes(b"torn")
    assert_stored(store, store_it(files))


@every_put
def test_an_orphan_with_the_right_length_and_bad_bytes_poisons_nothing(
    store: Store, files: Files, store_it: Put
) -> None:
    store.blobs.path(DIGEST).write_bytes(bytes(len(DATA)))
    assert_stored(store, store_it(files))


# --- a change that fails


def upload(store: Store, max_files: int = 2) -> UploadLink:
    wanted = UploadRequest("papers", max_files=max_files)
    return store.upload_link(store.uploads("acme", "ada").request(wanted).upload_token)


def test_bytes_that_no_record_comes_to_name_are_removed(store: Store) -> None:
    link = upload(store)

    def cancel() -> None:
        store.uploads("acme", "ada").cancel(link.upload.upload_token)

    interpose(store.adoption).append(cancel)
    with pytest.raises(UploadClosed) as closed:
        link.put(0, DATA, filename="a.bin")
    assert closed.value.state == "cancelled"
    store.blobs.close()
    assert store.blobs.stat(DIGEST) is None
    assert blob(store) is None
    assert audit(store).orphans == []


def test_what_was_refused_is_removed_by_closing_at_the_latest(root: Path, clock: HandClock) -> None:
    with Store.open(root / "refusing", SETTINGS, clock=clock) as store:
        link, answered = upload(store), threading.Event()

        def cancel() -> None:
            store.uploads("acme", "ada").cancel(link.upload.upload_token)

        interpose(store.adoption).append(cancel)
        store.blobs.leftovers.add(lambda: answered.wait(60))
        with pytest.raises(UploadClosed):
            link.put(0, DATA, filename="a.bin")
        assert store.blobs.stat(DIGEST) is not None
        answered.set()
    assert store.blobs.stat(DIGEST) is None


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("step", ["sync_data", "sync_folder"])
def test_a_failed_sync_leaves_no_name(
    store: Store, files: Files, disk: InterposedDisk, step: str, code: int
) -> None:
    def fail() -> None:
        assert store.blobs.stat(DIGEST) is not None  # it has its name by now
        raise OSError(code, os.strerror(code))

    disk.before[step].append(fail)
    with pytest.raises(StoreFull if code == errno.ENOSPC else OSError):
        put(files)
    store.blobs.close()
    assert store.blobs.stat(DIGEST) is None
    assert_stored(store, put(files))


def test_nobody_counts_on_a_file_whose_sync_may_have_failed_for_another(
    store: Store, files: Files, disk: InterposedDisk
) -> None:
    """The kernel tells of a failed sync once; who syncs the same file later hears of nothing."""
    others = store.blobs.stage(DATA, sync=False)

    def fail() -> None:
        raise OSError(errno.EIO, "the bytes are lost")

    def placed_by_another() -> None:
        store.blobs.remove(DIGEST)  # an orphan, to a scrub
        disk.before["sync_data"].append(fail)
        with pytest.raises(OSError, match="lost"):
            store.blobs.place(others)

    with others:
        interpose(store.adoption).append(placed_by_another)
        assert_stored(store, put(files))
        found = store.blobs.stat(DIGEST)
        assert found is not None
        assert found.inode != others.seen().inode


def test_the_own_object_stays_when_another_adopted_it_and_the_own_change_fails(
    store: Store, files: Files
) -> None:
    link = upload(store)
    placed, go = threading.Event(), threading.Event()

    def pause() -> None:
        placed.set()
        assert go.wait(30)

    waiting = interpose(store.adoption)
    with ThreadPoolExecutor(1) as other:
        # Another has placed its copy; this one's goes over it, and the other adopts that.
        waiting.append(pause)
        adopting = other.submit(put, files)
        assert placed.wait(30)

        def let_adopt_and_cancel() -> None:
            go.set()
            adopting.result(30)
            store.uploads("acme", "ada").cancel(link.upload.upload_token)

        waiting.append(let_adopt_and_cancel)
        with pytest.raises(UploadClosed):
            link.put(0, DATA, filename="a.bin")
    assert_stored(store, adopting.result())


def test_a_batch_that_fails_leaves_nothing(store: Store, files: Files) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: object) -> int:
            raise OSError(errno.EIO, "the network went away")

    items = [PutItem(b"%d" % number, "x") for number in range(300)]
    with pytest.raises(OSError, match="went away"):
        files.put_many([*items, PutItem(Broken(), "y")])
    assert files.list().items == []
    assert audit(store).orphans == []


def test_a_full_disk_while_naming_leaves_nothing_of_a_batch(
    store: Store, files: Files, disk: InterposedDisk
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk.before["sync_filesystem"].append(full)
    with pytest.raises(StoreFull):
        files.put_many([PutItem(b"%d" % number, "x") for number in range(100)])
    assert audit(store).orphans == []
    assert len(files.put_many([PutItem(b"%d" % number, "x") for number in range(100)])) == 100
