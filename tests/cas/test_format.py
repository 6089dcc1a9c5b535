"""Stores of older formats: opened, brought to this one, and refused by older versions."""

from __future__ import annotations

import errno
import gzip
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from cas import replicas
from cas.blobs import BlobFiles
from cas.config import Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.doctor import examine
from cas.durable import DISK, Disk
from cas.errors import BlobcaskError, StoreFull
from cas.events import publish, subscribe
from cas.format import FORMAT_VERSION, STEPS
from cas.quotas import usage_of
from cas.records import (
    COMPLETED,
    PENDING,
    Event,
    Mark,
    PendingUpload,
    StoredFile,
    Subscription,
    Total,
    UploadFile,
    Usage,
)
from cas.store import Store
from cas.totals import blobs_here
from tests.audit import assert_well, audit
from tests.cas.disks import TracedDisk
from tests.clocks import KEEP_US, HandClock

SETTINGS = Settings(store=StoreSettings(min_free=Size(0)))
# The journal of a store that the last version of format 1 made: two tenants' files, one of
# them deleted; an upload with two filled slots; one that was completed.
JOURNAL = Path(__file__).with_name("version_1.log.gz")
CONTENTS = (b"one", b"three", b"gone", b"slot zero", b"slot two!", b"done")
HELD = (6, 34)  # the deleted file's blob waits for its grace
USED = {"acme": Usage("acme", 4, 24), "other": Usage("other", 2, 9)}


@pytest.fixture
def clock() -> HandClock:
    """Some hours after the last frame of the journal; the open upload is open for a year."""
    return HandClock(1_795_300_000_000_000)


def version_1(root: Path) -> Path:
    """A store of format 1 as it comes from a copy: without an index."""
    blobs = BlobFiles(root)
    blobs.create()
    journal = root / "catalog/journal"
    journal.mkdir(parents=True)
    journal.with_name("checkpoints").mkdir()
    (journal / "1-00000000000000000001.log").write_bytes(gzip.decompress(JOURNAL.read_bytes()))
    for content in CONTENTS:
        blobs.path(digest_of(content)).write_bytes(content)
    (root / "VERSION").write_text("1\n")
    return root


def opened(root: Path, clock: HandClock, disk: Disk = DISK) -> Store:
    return Store.open(root, SETTINGS, clock=clock, disk=disk)


def assert_upgraded(root: Path, clock: HandClock) -> None:
    with opened(root, clock) as store:
        assert (root / "VERSION").read_text() == f"{FORMAT_VERSION}\n"
        with store.catalog.read() as snapshot:
            assert {tenant: usage_of(snapshot, tenant) for tenant in USED} == USED
            assert blobs_here(snapshot) == Total("blobs:here", *HELD)
        audit(store)


def test_a_store_of_format_1_opens_counted_and_with_all_it_held(
    memory: Path, clock: HandClock
) -> None:
    root = version_1(memory / "store")
    assert_upgraded(root, clock)
    with opened(root, clock) as store:
        assert_well(store)
        for tenant in USED:
            for file in store.files(tenant, "ada").list().items:
                with open(store.opener.here(file.checksum_sha256), "rb") as stream:
                    assert digest_of(stream.read()) == file.checksum_sha256
        files = store.files("acme", "ada").list(run="run-1", name="a.txt").items
        assert [file.workflow_run_id for file in files] == ["run-1"]


def test_slots_of_format_1_learn_whose_they_are(memory: Path, clock: HandClock) -> None:
    with opened(version_1(memory / "store"), clock) as store:
        with store.catalog.read() as snapshot:
            slots = snapshot.range(UploadFile, "")
            (upload,) = snapshot.range(PendingUpload, "status", ("acme", PENDING))
        assert sorted(slot.tenant_id for slot in slots) == ["acme", "acme", "other"]
        store.upload_link(upload.upload_token).complete()
        assert store.files("acme", "ada").usage() == USED["acme"]
        audit(store)


def journal_of(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((root / "catalog/journal").iterdir())]


def test_an_upgrade_that_stops_anywhere_is_done_by_the_next_opening(
    memory: Path, clock: HandClock
) -> None:
    """And the older version, which VERSION alone keeps away, never meets what it cannot read."""
    whole = TracedDisk()
    opened(version_1(memory / "whole"), clock, whole).close()
    for number, step in enumerate(whole.steps):
        root = version_1(memory / f"{number}-{step}")
        broken = TracedDisk(fail_at=number, code=errno.EIO)
        with suppress(OSError, BlobcaskError):
            opened(root, clock, broken).close()
        assert broken.failed == step
        if (root / "VERSION").read_text() == "1\n":
            assert journal_of(root) == [gzip.decompress(JOURNAL.read_bytes())]
        assert_upgraded(root, clock)


def test_a_step_runs_until_it_left_its_mark_and_never_again(
    memory: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = version_1(memory / "store")
    (root / "VERSION").write_text("2\n")  # as after a crash between VERSION and the count
    assert_upgraded(root, clock)
    monkeypatch.setitem(STEPS, "usage_counted", lambda *_: pytest.fail("it ran again"))
    assert_upgraded(root, clock)


def test_slots_learn_their_tenant_in_several_writes(
    memory: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.quotas._SLOTS_A_WRITE", 2)
    root = version_1(memory / "store")
    with opened(root, clock) as store:
        marked = [change for change in store.catalog.changes(0) if change.actor == "recount"]
        tables = [Counter(op[0] for op in change.ops) for change in marked]
    assert [count[UploadFile] for count in tables] == [2, 1, 0, 0]
    assert [count[Mark] for count in tables] == [0, 0, 1, 1]
    assert_upgraded(root, clock)


def test_a_repeated_count_counts_nothing_twice(memory: Path, clock: HandClock) -> None:
    root = version_1(memory / "store")
    with opened(root, clock) as store:
        file = store.files("acme", "ada").put(b"more", name="more")
        store.catalog.write(lambda txn: txn.delete(Mark("usage_counted", "")))
    with opened(root, clock) as store:
        assert store.files("acme", "ada").usage() == Usage("acme", 5, 28)
        assert store.file_by_id(file.file_id) == file
        audit(store)


class FullDisk(Disk):
    """Has no room for the file `name`, so many times."""

    def __init__(self, name: str, times: int) -> None:
        self._name, self._times = name, times

    def write_file(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        if path.name == self._name and self._times:
            self._times -= 1
            raise OSError(errno.ENOSPC, "full")
        super().write_file(path, data, mode)


def test_a_full_disk_gives_the_ballast_for_version(memory: Path, clock: HandClock) -> None:
    root = version_1(memory / "store")
    with opened(root, clock, FullDisk("VERSION", 1)) as store:
        assert (root / "VERSION").read_text() == f"{FORMAT_VERSION}\n"
        assert store.files("acme", "ada").usage() == USED["acme"]


def test_nothing_new_is_journalled_where_version_cannot_be_written(
    memory: Path, clock: HandClock
) -> None:
    root = version_1(memory / "store")
    with pytest.raises(StoreFull):
        opened(root, clock, FullDisk("VERSION", 2))
    assert (root / "VERSION").read_text() == "1\n"
    assert journal_of(root) == [gzip.decompress(JOURNAL.read_bytes())]
    assert_upgraded(root, clock)


def test_a_step_that_finds_the_disk_full_runs_at_a_later_opening(
    memory: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreFull(0, 1, memory)

    root = version_1(memory / "store")
    with monkeypatch.context() as patch:
        patch.setitem(STEPS, "usage_counted", full)
        with opened(root, clock) as store:
            store.files("acme", "ada").put(b"x", name="x")
    assert (root / "VERSION").read_text() == f"{FORMAT_VERSION}\n"
    with opened(root, clock) as store:
        assert store.files("acme", "ada").usage() == Usage("acme", 5, 25)
        audit(store)


def test_the_doctor_says_that_an_older_format_is_upgraded(memory: Path, clock: HandClock) -> None:
    findings = list(examine(version_1(memory / "store"), SETTINGS))
    assert [finding.what for finding in findings if "format" in finding.what] == [
        f"the format is '1', not {FORMAT_VERSION}"
    ]
    assert not [finding for finding in findings if finding.wrong]


# --- format 2

# Of the last version of format 2: acme's "one" and "three" (held), one that was deleted and an
# open upload with a filled slot; other's "one".
JOURNAL_2 = Path(__file__).with_name("version_2.log.gz")
CONTENTS_2 = (b"one", b"three", b"gone", b"slot zero")


def version_2(root: Path) -> Path:
    """A store of format 2 as it comes from a copy: without an index."""
    blobs = BlobFiles(root)
    blobs.create()
    journal = root / "catalog/journal"
    journal.mkdir(parents=True)
    journal.with_name("checkpoints").mkdir()
    (journal / "1-00000000000000000001.log").write_bytes(gzip.decompress(JOURNAL_2.read_bytes()))
    for content in CONTENTS_2:
        blobs.path(digest_of(content)).write_bytes(content)
    (root / "VERSION").write_text("2\n")
    return root


def assert_upgraded_2(root: Path, clock: HandClock) -> None:
    with opened(root, clock) as store:
        assert (root / "VERSION").read_text() == f"{FORMAT_VERSION}\n"
        with store.catalog.read() as snapshot:
            assert blobs_here(snapshot) == Total("blobs:here", 4, 21)
            assert usage_of(snapshot, "acme") == Usage("acme", 3, 17)
            (held,) = snapshot.range(StoredFile, "name", ("acme", "b"))
        assert held.hold
        audit(store)
        assert_well(store)


def test_a_store_of_format_2_opens_with_its_totals_counted(memory: Path, clock: HandClock) -> None:
    root = version_2(memory / "store")
    assert_upgraded_2(root, clock)
    assert_upgraded_2(root, clock)


def test_an_upgrade_from_format_2_that_stops_anywhere_is_done_by_the_next_opening(
    memory: Path, clock: HandClock
) -> None:
    whole = TracedDisk()
    opened(version_2(memory / "whole"), clock, whole).close()
    for number, step in enumerate(whole.steps):
        root = version_2(memory / f"{number}-{step}")
        broken = TracedDisk(fail_at=number, code=errno.EIO)
        with suppress(OSError, BlobcaskError):
            opened(root, clock, broken).close()
        assert broken.failed == step
        if (root / "VERSION").read_text() == "2\n":
            assert journal_of(root) == [gzip.decompress(JOURNAL_2.read_bytes())]
        assert_upgraded_2(root, clock)


def test_blobs_of_an_older_store_are_backfilled_to_a_first_target(
    memory: Path, clock: HandClock
) -> None:
    with opened(version_2(memory / "store"), clock) as store:
        replicas.register(store.catalog, [("dr", "folder /mnt/dr")])
        while replicas.backfill(store.catalog, "dr", limit=1):
            pass
        with store.catalog.read() as snapshot:
            due = {row.digest for row in replicas.due(snapshot, "dr", 0)}
        assert due == {digest_of(data) for data in (b"one", b"three", b"slot zero")}
        assert_well(store)


def test_totals_that_writes_kept_before_the_count_are_stated_anew(
    memory: Path, clock: HandClock
) -> None:
    root = version_2(memory / "store")
    with opened(root, clock) as store:
        store.files("acme", "ada").put(b"more", name="more")
        store.catalog.write(lambda txn: txn.delete(Mark("totals_counted", "")))
        store.catalog.write(lambda txn: txn.replace(Total("blobs:here", 1, 4)))
    with opened(root, clock) as store:
        with store.catalog.read() as snapshot:
            assert blobs_here(snapshot) == Total("blobs:here", 5, 25)
        audit(store)


# --- format 3

# Of the last version of format 3, with a target: acme's completed upload ("done"), an open one
# with a filled slot, a cancelled one, and a file; other's completed upload.
JOURNAL_3 = Path(__file__).with_name("version_3.log.gz")
CONTENTS_3 = (b"one", b"done", b"slot zero")


def version_3(root: Path) -> Path:
    """A store of format 3 as it comes from a copy: without an index."""
    blobs = BlobFiles(root)
    blobs.create()
    journal = root / "catalog/journal"
    journal.mkdir(parents=True)
    journal.with_name("checkpoints").mkdir()
    (journal / "1-00000000000000000001.log").write_bytes(gzip.decompress(JOURNAL_3.read_bytes()))
    for content in CONTENTS_3:
        blobs.path(digest_of(content)).write_bytes(content)
    (root / "VERSION").write_text("3\n")
    return root


def wait_for_upload(store: Store, upload: PendingUpload) -> Subscription:
    return store.catalog.write(
        lambda txn: subscribe(txn, upload.tenant_id, "run-1", "wait", upload.event_name, None, None)
    )


def assert_upgraded_3(root: Path, clock: HandClock) -> None:
    """A workflow that is written now waits for an upload that was completed before."""
    with opened(root, clock) as store:
        assert (root / "VERSION").read_text() == f"{FORMAT_VERSION}\n"
        with store.catalog.read() as snapshot:
            (done,) = snapshot.range(PendingUpload, "status", ("acme", COMPLETED))
            (pending,) = snapshot.range(PendingUpload, "status", ("acme", PENDING))
            assert snapshot.get(Mark, "events_opened") == Mark("events_opened", "4")
            events = snapshot.range(Event, "")
        assert [event.workflow_run_id for event in events] == ["", ""]
        assert [event.expires_at for event in events] == [clock.now_us() + KEEP_US] * 2
        wait = wait_for_upload(store, done)
        assert wait.event_id == events[0].event_id
        assert json.loads(events[0].payload)["files"][0]["filename"] == "d.txt"
        assert wait_for_upload(store, msgspec.structs.replace(done, tenant_id="else")).event_id is (
            None
        )
        assert pending.open_until
        audit(store)
        assert_well(store)


def test_a_store_of_format_3_opens_with_its_events_for_later_waits(
    memory: Path, clock: HandClock
) -> None:
    root = version_3(memory / "store")
    assert_upgraded_3(root, clock)
    assert_upgraded_3(root, clock)


def test_an_upgrade_from_format_3_that_stops_anywhere_is_done_by_the_next_opening(
    memory: Path, clock: HandClock
) -> None:
    whole = TracedDisk()
    opened(version_3(memory / "whole"), clock, whole).close()
    for number, step in enumerate(whole.steps):
        root = version_3(memory / f"{number}-{step}")
        broken = TracedDisk(fail_at=number, code=errno.EIO)
        with suppress(OSError, BlobcaskError):
            opened(root, clock, broken).close()
        assert broken.failed == step
        if (root / "VERSION").read_text() == "3\n":
            assert journal_of(root) == [gzip.decompress(JOURNAL_3.read_bytes())]
        assert_upgraded_3(root, clock)


def test_opening_events_once_more_leaves_those_that_are_for_nobody_else(
    memory: Path, clock: HandClock
) -> None:
    """A crash between the change and the mark: events of this format came meanwhile."""
    root = version_3(memory / "store")
    with opened(root, clock) as store:
        store.catalog.write(lambda txn: publish(txn, "acme", "told", b"1"))
        store.catalog.write(lambda txn: txn.delete(Mark("events_opened", "")))
    with opened(root, clock) as store, store.catalog.read() as snapshot:
        (told,) = (event for event in snapshot.range(Event, "") if event.event_name == "told")
        assert told.open_for is None
