"""A store in which every state of a blob occurs, what may be done to it, and its judge.

For the tests that kill the process or cut the power at every step of what is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cas.blobs import Meeting
from cas.clock import DAY_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import Digest, digest_of
from cas.durable import DISK, Disk
from cas.errors import NotFound, UploadClosed
from cas.files import Files, PutItem
from cas.records import DELETING, Blob, Event, StoredFile
from cas.references import parse_reference
from cas.retention import FOREVER, parse_retention
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.uploads import UploadRequest
from tests.audit import assert_readable, assert_well, audit
from tests.cas.interposed import InterposedDisk, collect, interpose
from tests.clocks import KEEP_US, START_US, HandClock
from tests.crash.rounds import READY
from tests.crash.victims import Report

GRACE_US = DAY_US
SETTINGS = Settings(store=StoreSettings(grace=Duration(GRACE_US), min_free=Size(0)))

KEPT = b"stored before, and stays"
GOING = b"stored before, and is deleted"
CONDEMNED = b"deleted before, so condemned"
DOOMED = b"its record says deleting, its bytes are there"
DAMAGED = b"its file was cut short under us"
GONE = b"its file was removed under us"
ORPHANED = b"somebody linked half of it and was killed"
NEW = b"new to the store"
SLOTTED = b"in a slot of an upload"
EVERYTHING = (KEPT, GOING, CONDEMNED, DOOMED, DAMAGED, GONE, ORPHANED, NEW, SLOTTED)
TOKEN_FILE = "token"


def open_store(root: Path, disk: Disk = DISK, days: int = 0) -> Store:
    clock = HandClock(START_US + days * DAY_US)
    return Store.open(root, SETTINGS, clock=clock, disk=disk)


def put(files: Files, data: bytes, run: str = "direct") -> StoredFile:
    return files.put(data, name="it", run=run, retention=FOREVER)


def reference_of(tenant: str, run: str, data: bytes) -> str:
    return f"uploads/{tenant}/{run}/{digest_of(data).hex()}.bin"


def delete(files: Files, tenant: str, run: str, data: bytes) -> None:
    files.delete(parse_reference(reference_of(tenant, run, data)))


def make_template(root: Path) -> None:
    """Make a store at `root` in which every state of a blob occurs."""
    disk = InterposedDisk()
    with open_store(root, disk) as store:
        # Where a folder has its name no ballast can be laid: 32 MiB less to copy each time.
        (root / "catalog/ballast").unlink()
        (root / "catalog/ballast").mkdir()
        files = store.files("acme", "ada")
        put(files, DOOMED)
        delete(files, "acme", "direct", DOOMED)

    def die() -> None:
        raise KeyboardInterrupt

    with open_store(root, disk, days=2) as store:
        disk.before["unlink"].append(die)
        with pytest.raises(KeyboardInterrupt):
            collect(store)
        files = store.files("acme", "ada")
        for data in (KEPT, GOING, CONDEMNED, DAMAGED, GONE):
            put(files, data)
        delete(files, "acme", "direct", CONDEMNED)
        expired = parse_retention("until:2020-01-01T00:00:00Z")
        files.put(GOING, name="short", run="short", retention=expired)
        upload = store.uploads("acme", "ada").request(
            UploadRequest("papers", max_files=3, retention=FOREVER, expires_in_s=100 * 86_400)
        )
        link = store.upload_link(upload.upload_token)
        link.put(0, SLOTTED, filename="slotted.bin")
        link.put(2, KEPT, filename="kept.bin")
        (root / TOKEN_FILE).write_text(upload.upload_token)
        os.truncate(store.blobs.path(digest_of(DAMAGED)), 3)
        store.blobs.path(digest_of(GONE)).unlink()
        store.blobs.path(digest_of(ORPHANED)).write_bytes(ORPHANED[:7])
        with store.catalog.read() as snapshot:
            doomed = snapshot.get(Blob, digest_of(DOOMED))
        assert doomed is not None
        assert doomed.state == DELETING


# --- what is killed


Told = Callable[[str], None]  # what was acknowledged, for the oracle
Act = Callable[[Store, Told], None]


def said(told: Told, file: StoredFile) -> None:
    told(f"+ {file.file_id} {file.checksum_sha256.hex()}")


def put_new(store: Store, told: Told) -> None:
    said(told, put(store.files("acme", "ada"), NEW))


def put_held(store: Store, told: Told) -> None:
    said(told, put(store.files("acme", "ada"), KEPT, run="again"))


def put_held_by_another(store: Store, told: Told) -> None:
    said(told, put(store.files("other", "bob"), KEPT))


def put_condemned(store: Store, told: Told) -> None:
    said(told, put(store.files("acme", "ada"), CONDEMNED))


def put_deleting(store: Store, told: Told) -> None:
    said(told, put(store.files("acme", "ada"), DOOMED))


def put_damaged(store: Store, told: Told) -> None:
    said(told, put(store.files("acme", "ada"), DAMAGED, run="again"))


def put_gone(store: Store, told: Told) -> None:
    said(told, put(store.files("acme", "ada"), GONE, run="again"))


def put_orphaned(store: Store, told: Told) -> None:
    said(told, put(store.files("acme", "ada"), ORPHANED))


def put_over_a_batch(store: Store, told: Told) -> None:
    """The own copy is removed as an orphan, and a batch that has not synced links its own."""
    batch = store.blobs.batch()

    def come_between() -> None:
        placed = store.blobs.stat(digest_of(NEW))
        assert placed is not None
        assert store.collector.doom_orphan(digest_of(NEW), placed.size_bytes, placed.inode)
        batch.store(NEW, lambda _: Meeting.PLACE)

    waiting = interpose(store.adoption)
    waiting.append(come_between)
    said(told, put(store.files("acme", "ada"), NEW))
    batch.close()


def put_many(store: Store, told: Told) -> None:
    items = [PutItem(data, "many") for data in (*EVERYTHING, NEW)]
    for file in store.files("other", "bob").put_many(items, run="many", retention=FOREVER):
        said(told, file)


def upload_link_of(store: Store) -> str:
    return (store.root / TOKEN_FILE).read_text()


def fill_slots(store: Store, told: Told) -> None:
    link = store.upload_link(upload_link_of(store))
    link.put(1, NEW, filename="new.bin")
    told(f"s 1 {digest_of(NEW).hex()}")
    link.put(0, NEW, filename="new.bin")
    told(f"s 0 {digest_of(NEW).hex()}")


def complete(store: Store, told: Told) -> None:
    for file in store.upload_link(upload_link_of(store)).complete().files:
        said(told, file)
    told("c")


def delete_one(store: Store, told: Told) -> None:
    told(f"- {reference_of('acme', 'direct', GOING)}")
    delete(store.files("acme", "ada"), "acme", "direct", GOING)
    told(f"x {reference_of('acme', 'direct', GOING)}")


def collect_all(store: Store, told: Told) -> None:
    collect(store)


def sweep_all(store: Store, told: Told) -> None:
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    assert len(plan.file_ids) == 1
    execute_sweep(store.catalog, plan)


ACTS: list[Act] = [
    put_new,
    put_held,
    put_held_by_another,
    put_condemned,
    put_deleting,
    put_damaged,
    put_gone,
    put_orphaned,
    put_over_a_batch,
    put_many,
    fill_slots,
    complete,
    delete_one,
    collect_all,
    sweep_all,
]


def neighbour(root: Path, report: Report) -> None:
    """Another process that had ROOT open all the while, and commits next."""
    with open_store(root, days=4) as store:
        report.acknowledge(READY)
        report.wait_for_word()
        said(report.acknowledge, put(store.files("third", "cyd"), NEW))
        said(report.acknowledge, put(store.files("third", "cyd"), KEPT))


def judge(
    root: Path, acknowledged: list[str], *, disk: Disk = DISK, torn_orphans: bool = False
) -> None:
    """Open what is left and find all that was acknowledged; then go on as if nothing had been.

    `torn_orphans`: a power cut may have torn objects that no record names.
    """
    damaged = frozenset({digest_of(DAMAGED)})
    gone = frozenset({digest_of(GONE)})
    orphaned = frozenset({digest_of(ORPHANED)})
    kept: dict[str, Digest] = {}
    going = False
    with open_store(root, disk, days=5) as store:
        audit(store, damaged=damaged | orphaned, absent=gone, torn_orphans=torn_orphans)
        for line in acknowledged:
            kind, *rest = line.split(" ")
            if kind == "+":
                kept[rest[0]] = Digest(bytes.fromhex(rest[1]))
            elif kind == "-":
                going = True
            elif kind == "x":
                with pytest.raises(NotFound):
                    store.files("acme", "ada").stat(parse_reference(rest[0]))
            elif kind == "s":
                slots = {s.file_index: s for s in store.upload_link(upload_link_of(store)).slots()}
                assert slots[int(rest[0])].checksum_sha256 == bytes.fromhex(rest[1])
        assert_readable(store, kept)
        files = store.files("acme", "ada")
        files.stat(parse_reference(reference_of("acme", "direct", KEPT)))
        if not going:
            files.stat(parse_reference(reference_of("acme", "direct", GOING)))
        _assert_complete_or_not(store, told="c" in acknowledged)
        _go_on(store)


def _assert_complete_or_not(store: Store, told: bool) -> None:
    """Files, slots, event and state of the upload came together, or not at all."""
    link = store.upload_link(upload_link_of(store))
    with store.catalog.read() as snapshot:
        events = snapshot.range(Event, "")
    if link.upload.status == "completed":
        assert len(events) == 1
        assert [file.name for file in link.completion().files] == ["papers", "it"]
    else:
        assert not told
        assert events == []
        assert all(slot.file_id is None for slot in link.slots())


def _go_on(store: Store) -> None:
    """What was interrupted is done again, by others too, and all bytes are good then."""
    for tenant in ("acme", "fourth"):
        files = store.files(tenant, "dan")
        for data in EVERYTHING:
            put(files, data, run="later")
    link = store.upload_link(upload_link_of(store))
    try:
        link.complete()
    except UploadClosed:
        assert link.completion().files
    collect(store)
    audit(store)
    assert_well(store)
    for tenant in ("acme", "fourth"):
        for data in EVERYTHING:
            _, fd = store.files(tenant, "dan").open(
                parse_reference(reference_of(tenant, "later", data))
            )
            with open(fd, "rb") as stream:
                assert stream.read() == data
