"""Writes with two halves, and the audit that finds a lost or a halved one.

A write of the ledger is called by a label such as "t2-17". It inserts two files that share
a blob with other writes, so that half a write, a lost one, a wrong reference count and a
stale index entry all show.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from cas.catalog import Snapshot, Transaction
from cas.catalog.journal import Segment
from cas.catalog.local import CatalogSettings, LocalCatalog
from cas.catalog.recovery import Folders, verify_journal
from cas.catalog.snapshot import LmdbSnapshot
from cas.clock import DAY_US
from cas.digest import Digest
from cas.durable import DISK, Disk
from cas.errors import JournalDamaged
from cas.records import CONDEMNED, LIVE, Blob, StoredFile, Usage
from tests.clocks import HandClock

# Segments of 1 KiB, so one or two frames each, and journal that goes as soon as it may.
# Without a ballast an open is cheap.
TINY = CatalogSettings(
    checkpoint_bytes=4 << 10,
    journal_keep_us=-10_000 * DAY_US,
    min_free_bytes=1 << 60,
    lock_wait_s=60,
)
LARGE = CatalogSettings(min_free_bytes=1 << 60, lock_wait_s=60)
_BLOBS = 5


def open_catalog(root: Path, settings: CatalogSettings = LARGE, disk: Disk = DISK) -> LocalCatalog:
    return LocalCatalog(root, settings, clock=HandClock(), disk=disk)


def digest_of(label: str) -> Digest:
    return Digest(hashlib.sha256(b"%d" % (sum(label.encode()) % _BLOBS)).digest())


def entry(label: str, half: int, digest: Digest | None = None) -> StoredFile:
    """One of the two files of a write."""
    return StoredFile(
        file_id=f"{label}/{half}",
        tenant_id="tenant",
        workflow_run_id="direct",
        storage_ref=f"hwy://uploads/tenant/direct/{label}.{half}",
        name=label,
        original_filename=None,
        content_type="text/plain",
        size_bytes=len(label),
        checksum_sha256=digest or digest_of(label),
        retention_policy="forever",
        expires_at=None,
        created_at=0,
        created_by="test",
    )


def enter(label: str) -> Callable[[Transaction], None]:
    """The write called `label`."""

    def change(txn: Transaction) -> None:
        digest = digest_of(label)
        if txn.get(Blob, digest) is None:
            txn.insert(Blob(digest, 1, bytes(32), 1, 1, 1))
        txn.insert(entry(label, 1))
        txn.insert(entry(label, 2))

    return change


def strike(label: str) -> Callable[[Transaction], None]:
    """The write that takes `label` back."""

    def change(txn: Transaction) -> None:
        txn.delete(entry(label, 1))
        txn.delete(entry(label, 2))

    return change


def labels(snapshot: Snapshot) -> set[str]:
    """The writes that a snapshot shows; raises AssertionError at half a write."""
    halves = Counter(file.name for file in snapshot.range(StoredFile, "", limit=1 << 30))
    torn = {label for label, count in halves.items() if count != 2}
    assert not torn, f"half of a write is there: {torn}"
    return set(halves)


def audit_index(snapshot: LmdbSnapshot) -> None:
    """Every entry of every index is due to a record, and the other way round; counts add up."""
    due: dict[bytes, bytes] = {}
    references: Counter[bytes] = Counter()
    stored: Counter[str] = Counter()
    used: dict[str, int] = {}
    blobs: dict[bytes, Blob] = {}
    for layout, key, raw in snapshot.records():
        record = layout.decode(raw)
        for index in layout.entries:
            entry_key = index.key(record)
            if entry_key is not None:
                due[entry_key] = key
        if isinstance(record, Blob):
            blobs[record.digest] = record
        elif isinstance(record, StoredFile):
            stored[record.tenant_id] += 1
        elif isinstance(record, Usage):
            used[record.tenant_id] = record.files
        if layout.digests is not None:
            references.update(digest for digest in layout.digests(record) if digest is not None)
    assert dict(snapshot.entries()) == due
    assert used == dict(stored)
    assert {d: b.refcount for d, b in blobs.items() if b.refcount} == dict(references)
    for blob in blobs.values():
        if blob.state in (LIVE, CONDEMNED):
            assert (blob.state == CONDEMNED) == (blob.condemned_at is not None)


def journal_damage(root: Path) -> list[JournalDamaged]:
    """What `journal verify` would name."""
    return [item for item in verify_journal(Folders(root)) if isinstance(item, JournalDamaged)]


def audit(
    root: Path,
    acknowledged: Collection[str],
    attempted: Collection[str] | None = None,
    *,
    settings: CatalogSettings = LARGE,
    disk: Disk = DISK,
    damaged: bool = False,
) -> set[str]:
    """Open `root` and find every acknowledged write whole; returns what is there.

    What is there besides must have been `attempted`, whole too. `damaged`: the journal is
    known to have a bad place.
    """
    catalog = open_catalog(root, settings, disk)
    try:
        with catalog.inspect() as snapshot:
            found = labels(snapshot)
            audit_index(snapshot)
        catalog.verify_state()
        lost = set(acknowledged) - found
        assert not lost, f"acknowledged and lost: {sorted(lost)}"
        if attempted is not None:
            assert found <= set(attempted), "a write is there that nobody tried"
        # It must be possible to go on from here, and what goes on must stay.
        catalog.write(enter("audit"))
        catalog.write(strike("audit"))
        catalog.verify_state()
    finally:
        catalog.close()
    if not damaged:
        assert journal_damage(root) == []
    return found


def segment_paths(root: Path) -> list[Path]:
    """The segments of the journal, oldest first."""
    return sorted((root / "catalog/journal").glob("*.log"))


def first_segment(root: Path) -> Path:
    return root / "catalog/journal" / Segment(1, 1).filename
