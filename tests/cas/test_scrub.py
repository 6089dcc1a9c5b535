"""The scrub: finds what went bad, clears what nobody needs, and is in nobody's way."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from cas import scrub
from cas.catalog import Transaction
from cas.catalog.images import put_record
from cas.catalog.layout import LAYOUTS, record_state
from cas.catalog.transaction import LmdbTransaction
from cas.catalog.tuples import pack
from cas.clock import HOUR_US, SECOND_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import Digest, digest_of
from cas.durable import temporary_name
from cas.errors import BlobMissing
from cas.files import Files
from cas.records import Blob, Mark, StoredFile
from cas.refcounts import Miscount
from cas.references import parse_reference
from cas.scrub import Scrub, ScrubReport
from cas.store import Store
from tests.clocks import HandClock

GRACE_US = HOUR_US


@pytest.fixture
def clock() -> HandClock:
    """The time of day: the ages of files, which nobody can set, are told by it."""
    return HandClock(time.time_ns() // 1000)


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0), grace=Duration(GRACE_US)))
    with Store.open(root, settings, clock=clock) as opened:
        yield opened


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("t1", "test")


def scrubbed(store: Store, *, dry_run: bool = False) -> ScrubReport:
    """The report of a whole scrub."""
    run = Scrub(store, dry_run=dry_run)
    while run.step():
        pass
    assert run.report.finished
    return run.report


def blob_of(store: Store, digest: Digest) -> Blob:
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, digest)
    assert blob is not None
    return blob


def spoil(store: Store, file: StoredFile, data: bytes) -> Path:
    """Write other bytes into the very file of a blob, as a bad disk does it."""
    path = store.blobs.path(file.checksum_sha256)
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    # As where a disk forgets: the time of the last write is what it was.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


# --- bytes


def test_good_bytes_count_as_verified_from_now_on(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = files.put(b"good", name="x")
    clock.advance(HOUR_US)
    report = scrubbed(store)
    assert (report.checked, report.checked_bytes, report.well) == (1, 4, True)
    assert blob_of(store, file.checksum_sha256).verified_at == clock.now_us()


def test_bad_bytes_go_to_quarantine_and_the_next_upload_heals(store: Store, files: Files) -> None:
    file = files.put(b"right", name="x")
    spoil(store, file, b"wrong")
    report = scrubbed(store)
    assert report.damaged == [file.checksum_sha256.hex()]
    assert not report.well
    [aside] = report.quarantined
    assert Path(aside).read_bytes() == b"wrong"
    assert blob_of(store, file.checksum_sha256).missing_at is not None
    with pytest.raises(BlobMissing):
        store.opener.here(file.checksum_sha256)
    assert files.put(b"right", name="x") == file
    assert store.blobs.path(file.checksum_sha256).read_bytes() == b"right"
    assert blob_of(store, file.checksum_sha256).missing_at is None
    assert scrubbed(store).well


@pytest.mark.parametrize("data", [b"", b"righ", b"right, and more"])
def test_bytes_that_are_too_few_or_too_many_are_bad(
    store: Store, files: Files, data: bytes
) -> None:
    file = files.put(b"right", name="x")
    spoil(store, file, data)
    assert scrubbed(store).damaged == [file.checksum_sha256.hex()]


def test_a_missing_file_is_listed_and_cleared_when_it_comes_back(
    store: Store, files: Files, tmp_path: Path
) -> None:
    file = files.put(b"good", name="x")
    path = store.blobs.path(file.checksum_sha256)
    path.unlink()
    assert scrubbed(store).missing == [file.checksum_sha256.hex()]
    assert blob_of(store, file.checksum_sha256).missing_at is not None
    assert scrubbed(store).missing == [file.checksum_sha256.hex()]  # as long as it is
    path.write_bytes(b"good")  # the operator found it in a backup
    report = scrubbed(store)
    assert (report.found_again, report.missing) == ([file.checksum_sha256.hex()], [])
    blob = blob_of(store, file.checksum_sha256)
    assert (blob.missing_at, blob.inode) == (None, path.stat().st_ino)


def test_good_bytes_in_another_file_are_known_by_it(store: Store, files: Files) -> None:
    file = files.put(b"good", name="x")
    path = store.blobs.path(file.checksum_sha256)
    other = path.with_name("copy")
    other.write_bytes(b"good")
    other.rename(path)
    assert scrubbed(store).well
    assert blob_of(store, file.checksum_sha256).inode == path.stat().st_ino
    with store.catalog.read() as snapshot:
        assert store.adoption.trusts(snapshot, file.checksum_sha256)


def test_a_rehearsal_changes_nothing(store: Store, files: Files, clock: HandClock) -> None:
    file = files.put(b"right", name="x")
    path = spoil(store, file, b"wrong")
    orphan = an_orphan(store, b"nobody's")
    clock.advance(2 * GRACE_US)
    before = store.catalog.position()
    report = scrubbed(store, dry_run=True)
    assert report.damaged == [file.checksum_sha256.hex()]
    assert report.orphans == [orphan.name]
    assert store.catalog.position() == before
    assert path.read_bytes() == b"wrong"
    assert orphan.exists()


def test_the_next_scrub_goes_on_with_the_longest_unverified(
    store: Store, files: Files, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "_BATCH_BLOBS", 3)
    stored = [files.put(bytes([number]), name="x") for number in range(5)]
    clock.advance(SECOND_US)
    first = Scrub(store)
    while first.report.checked < 3:
        assert first.step()
    clock.advance(SECOND_US)
    second = Scrub(store)
    while second.report.checked < 3:
        assert second.step()
    seen = sorted(blob_of(store, file.checksum_sha256).verified_at for file in stored)
    now_us = clock.now_us()
    assert seen == [now_us - SECOND_US] * 2 + [now_us] * 3


def test_bytes_are_read_no_faster_than_allowed(store: Store, files: Files) -> None:
    files.put(bytes(100_000), name="x")
    began = time.monotonic()
    run = Scrub(store, bytes_per_s=400_000)
    while run.report.checked == 0:
        run.step()
    assert time.monotonic() - began >= 0.25


# --- meeting others


def test_a_writer_that_heals_while_the_bad_bytes_are_read_wins(store: Store, files: Files) -> None:
    file = files.put(b"right", name="x")
    spoil(store, file, b"no")  # shorter: the next put sees it and places its own copy
    met: list[StoredFile] = []

    def heal(_: int) -> None:
        if not met:
            met.append(files.put(b"right", name="x"))

    run = Scrub(store, progress=heal)
    while run.step():
        pass
    assert met == [file]
    assert (run.report.damaged, run.report.missing, run.report.quarantined) == ([], [], [])
    assert store.blobs.path(file.checksum_sha256).read_bytes() == b"right"
    assert blob_of(store, file.checksum_sha256).missing_at is None


def test_a_writer_that_heals_before_the_file_is_set_aside_keeps_its_file(
    store: Store, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = files.put(b"right", name="x")
    spoil(store, file, b"wrong")
    set_aside = Scrub._set_aside

    def heal_first(run: Scrub, look: scrub._Look) -> Path | None:
        files.put(b"right", name="x")
        return set_aside(run, look)

    monkeypatch.setattr(Scrub, "_set_aside", heal_first)
    report = scrubbed(store)
    assert (report.damaged, report.quarantined) == ([file.checksum_sha256.hex()], [])
    assert store.blobs.path(file.checksum_sha256).read_bytes() == b"right"
    assert scrubbed(store).well


def test_a_file_that_is_deleted_and_collected_meanwhile_is_not_missed(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = files.put(b"short lived", name="x")

    def forget(_: int) -> None:
        try:
            files.delete(parse_reference(file.storage_ref))
        except Exception:  # noqa: BLE001  # the second time it is gone
            return
        clock.advance(2 * GRACE_US)
        with store.catalog.read() as snapshot:
            plan = store.collector.plan(snapshot, store.now_us(snapshot))
        assert store.collector.execute(plan).blobs == 1

    run = Scrub(store, progress=forget)
    while run.step():
        pass
    assert run.report.well


# --- what no record names


def an_orphan(store: Store, data: bytes) -> Path:
    """An object as a writer leaves it that was killed before the catalog knew of it."""
    with store.blobs.stage(data) as staged:
        store.blobs.place(staged)
    return store.blobs.path(digest_of(data))


def test_an_orphan_is_kept_for_the_grace_and_then_removed(store: Store, clock: HandClock) -> None:
    orphan = an_orphan(store, b"nobody's")
    assert scrubbed(store).orphans == []
    assert orphan.exists()
    clock.advance(2 * GRACE_US)
    report = scrubbed(store)
    assert (report.orphans, report.orphan_bytes) == ([orphan.name], 8)
    assert not orphan.exists()
    with store.catalog.read() as snapshot:
        assert snapshot.get(Blob, digest_of(b"nobody's")) is None
    assert scrubbed(store).orphans == []


def test_an_orphan_that_is_adopted_in_that_moment_stays(
    store: Store, files: Files, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = an_orphan(store, b"mine after all")
    clock.advance(2 * GRACE_US)
    doom = store.collector.doom_orphan

    def adopt_first(digest: Digest, size_bytes: int, inode: int) -> bool:
        files.put(b"mine after all", name="x")
        return doom(digest, size_bytes, inode)

    monkeypatch.setattr(type(store.collector), "doom_orphan", lambda _, *found: adopt_first(*found))
    report = scrubbed(store)
    assert report.orphans == []
    assert orphan.read_bytes() == b"mine after all"
    assert report.well


def test_what_a_crash_left_half_written_is_removed_after_the_grace(
    store: Store, root: Path, clock: HandClock
) -> None:
    left = [root / "objects/00" / temporary_name(), root / "catalog/checkpoints" / temporary_name()]
    for path in left:
        path.write_bytes(b"half")
    assert scrubbed(store).temporaries == []
    clock.advance(2 * GRACE_US)
    assert len(scrubbed(store).temporaries) == 2
    assert not any(path.exists() for path in left)


def test_foreign_files_are_told_and_never_touched(
    store: Store, root: Path, clock: HandClock
) -> None:
    name = digest_of(b"x").hex()
    wrong_shard = "00" if name[:2] != "00" else "01"
    foreign = [
        root / "objects/00/README",
        root / "objects/00/.hidden",
        root / "objects" / wrong_shard / name,
        root / "objects" / name[:2] / name.upper(),
    ]
    for path in foreign:
        path.write_bytes(b"x")
    folder = root / "objects/01" / ("01" + "0" * 62)
    folder.mkdir()
    clock.advance(2 * GRACE_US)
    report = scrubbed(store)
    assert {root / told for told in report.foreign} == {*foreign, folder}
    assert all(path.exists() for path in foreign)
    assert report.orphans == []


def test_the_walk_of_the_shards_goes_on_where_it_stopped(store: Store) -> None:
    first = Scrub(store)
    while first.report.shards < 40:
        first.step()
    with store.catalog.read() as snapshot:
        assert snapshot.get(Mark, "scrub_shard") == Mark("scrub_shard", "32")
    second = Scrub(store)
    while second.step():
        pass
    assert second.report.shards == 256
    with store.catalog.read() as snapshot:
        assert snapshot.get(Mark, "scrub_shard") == Mark("scrub_shard", "32")


# --- counts


def test_counts_are_right_after_files_came_and_went(store: Store, files: Files) -> None:
    other = store.files("t2", "test")
    for number in range(20):
        files.put(bytes([number % 7]), name="x", run=f"r{number % 3}")
        other.put(bytes([number % 5]), name="x")
    for file in files.list(limit=5).items:
        files.delete(parse_reference(file.storage_ref))
    assert scrubbed(store).miscounts == []


@pytest.mark.parametrize(
    ("changed", "recorded"),
    [
        (lambda blob: msgspec.structs.replace(blob, refcount=5), 5),
        (lambda blob: None, None),
    ],
)
def test_a_wrong_count_is_told(
    store: Store, files: Files, changed: Callable[[Blob], Blob | None], recorded: int | None
) -> None:
    files.put(b"right", name="x")
    file = files.put(b"wrong", name="x")

    def miscount(txn: Transaction) -> None:
        blob = txn.get(Blob, file.checksum_sha256)
        assert blob is not None
        overwrite(txn, blob, changed(blob))

    store.catalog.write(miscount)
    report = scrubbed(store)
    assert report.miscounts == [Miscount(file.checksum_sha256, recorded, 1)]
    assert not report.well
    assert any("miscounted" in line for line in report.lines())
    assert report.form()["miscounts"][0]["recorded"] == recorded


def overwrite(txn: Transaction, old: Blob, new: Blob | None) -> None:
    """Change a record as no caller can: past the catalog's own counting."""
    inner = cast(LmdbTransaction, txn)
    layout, key = LAYOUTS[Blob], pack((old.digest,))
    raw = None if new is None else msgspec.msgpack.encode(new)
    inner.delta -= record_state(layout.number, key, msgspec.msgpack.encode(old))
    if raw is not None:
        inner.delta += record_state(layout.number, key, raw)
    was, now = layout.entry_keys(old), [] if new is None else layout.entry_keys(new)
    put_record(inner._txn, layout, key, was, now, raw)
    inner.ops[layout.number, key] = raw


def test_a_process_without_descriptors_takes_no_blob_for_damaged(
    store: Store, files: Files
) -> None:
    stored = [files.put(bytes([number]), name="x") for number in range(5)]
    scrub_now = Scrub(store)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(3, taken), limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            scrub_now.step()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    for file in stored:
        assert blob_of(store, file.checksum_sha256).missing_at is None
        assert store.blobs.path(file.checksum_sha256).exists()
