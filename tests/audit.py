"""What must be true of a store at rest, asked of the files and records themselves.

Counts anew what the store keeps counted, and lets `find` and `sha256sum` judge the bytes,
so that the store's own checks are not asked about themselves.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import final

import msgspec

from cas.catalog.layout import LAYOUTS
from cas.catalog.snapshot import LmdbSnapshot
from cas.digest import Digest, digest_of
from cas.doctor import examine_store
from cas.records import (
    CONDEMNED,
    DELETING,
    LIVE,
    Approval,
    Blob,
    Delivery,
    Event,
    Once,
    Partial,
    Record,
    Replica,
    Run,
    StepValue,
    StoredFile,
    Subscription,
    Total,
    UploadFile,
    Usage,
)
from cas.store import Store


@final
class Findings(msgspec.Struct, frozen=True):
    """What an audit saw that is no fault by itself."""

    orphans: list[str]  # objects that no record names, temporaries included
    missing: list[str]  # blobs that the catalog itself lists as missing


def records_in(snapshot: LmdbSnapshot) -> list[Record]:
    """Every record, in no promised order."""
    return [layout.decode(raw) for layout, _, raw in snapshot.records()]


def references_counted(snapshot: LmdbSnapshot) -> Counter[Digest]:
    """How often each digest is named by the digest fields of all records."""
    return Counter(
        digest
        for record in records_in(snapshot)
        for digest in (getattr(record, field) for field in record.schema.digests)
        if digest is not None
    )


def usage_counted(snapshot: LmdbSnapshot) -> dict[str, Usage]:
    """What each tenant stores, by the records themselves."""
    files: Counter[str] = Counter()
    size_bytes: Counter[str] = Counter()
    for record in records_in(snapshot):
        if isinstance(record, StoredFile) or (
            isinstance(record, UploadFile) and record.checksum_sha256 is not None
        ):
            files[record.tenant_id] += 1
            size_bytes[record.tenant_id] += record.size_bytes
        elif isinstance(record, Partial):
            size_bytes[record.tenant_id] += record.offset_bytes
    return {
        tenant: Usage(tenant, files[tenant], size_bytes[tenant])
        for tenant in files.keys() | size_bytes.keys()
        if files[tenant] or size_bytes[tenant]
    }


def totals_counted(snapshot: LmdbSnapshot) -> dict[str, Total]:
    """What all blobs, rows, waits, events and runs add up to, by the records themselves."""
    count: Counter[str] = Counter()
    size_bytes: Counter[str] = Counter()
    for record in records_in(snapshot):
        if isinstance(record, Blob):
            name = "blobs:here" if record.local else "blobs:elsewhere"
        elif isinstance(record, Replica) and record.queue is not None:
            name = f"backlog:{record.queue}"
        elif isinstance(record, Subscription):
            if record.waiting_for is not None:
                count[f"waits_for:{record.waiting_for}"] += 1
            asked = record.workflow_run_id == "direct" or record.step.startswith("waiter:")
            if asked and record.claimed_at is None:
                count[f"waits_of:{record.tenant_id}"] += 1
            elif asked:
                count[f"kept_of:{record.tenant_id}"] += 1
                size_bytes[f"kept_of:{record.tenant_id}"] += 512
            continue
        elif isinstance(record, Event):
            names = ["kept_of"] if record.open_for is None else ["kept_of", "held_of"]
            for name in () if record.own else names:
                count[f"{name}:{record.tenant_id}"] += 1
                size_bytes[f"{name}:{record.tenant_id}"] += 512 + len(record.payload)
            continue
        elif isinstance(record, Once):
            if record.of_event:
                count[f"kept_of:{record.tenant_id}"] += 1
                size_bytes[f"kept_of:{record.tenant_id}"] += 512
            continue
        elif isinstance(record, Approval):
            count[f"approvals_of:{record.tenant_id}"] += 1
            continue
        elif isinstance(record, Delivery):
            if (record.kind, record.status) == ("mail", "waiting"):
                count[f"mails_of:{record.tenant_id}"] += 1
            continue
        elif isinstance(record, Run):
            if record.open is not None:
                count[f"runs:{record.status}"] += 1
                count[f"runs_of:{record.tenant_id}"] += 1
            continue
        elif isinstance(record, StepValue):
            count[f"values_of:{record.run_id}"] += 1
            size_bytes[f"values_of:{record.run_id}"] += len(record.value)
            if record.kind == "item":
                count[f"items_of:{record.run_id}"] += 1
                size_bytes[f"items_of:{record.run_id}"] += record.steps
            continue
        else:
            continue
        count[name] += 1
        size_bytes[name] += record.size_bytes
    return {name: Total(name, count[name], size_bytes[name]) for name in count if count[name]}


def audit(
    store: Store,
    *,
    damaged: frozenset[Digest] = frozenset(),
    absent: frozenset[Digest] = frozenset(),
    torn_orphans: bool = False,
) -> Findings:
    """Assert invariants 1, 2, 3, 5 and 7 of a store that nobody is writing to.

    The bytes of `damaged` were spoilt by the test; they may be wrong or missing.
    Those of `absent` were removed by it: they may be missing, and never wrong.
    `torn_orphans`: a power cut may have torn what no record names.
    """
    store.blobs.close()  # what is thrown away after the answer is gone on return
    store.catalog.verify_state()
    with store.catalog.inspect() as snapshot:
        blobs = {blob.digest: blob for blob in records_in(snapshot) if isinstance(blob, Blob)}
        counted = references_counted(snapshot)
        used = {use.tenant_id: use for use in records_in(snapshot) if isinstance(use, Usage)}
        assert used == usage_counted(snapshot), "the usage of a tenant is counted wrongly"
        totals = {one.name: one for one in records_in(snapshot) if isinstance(one, Total)}
        assert totals == totals_counted(snapshot), "a total is counted wrongly"
        entries = sum(1 for _ in snapshot.entries())
        expected = sum(
            1
            for record in records_in(snapshot)
            for entry in LAYOUTS[type(record)].entries
            if entry.key(record) is not None
        )
    assert entries == expected, "an index has entries too many or too few"
    assert counted.keys() <= blobs.keys(), "a record names a blob that has none"
    for digest, blob in blobs.items():
        assert blob.refcount == counted[digest], f"{digest.hex()} is counted wrongly"
        if blob.refcount:
            assert blob.state == LIVE
        else:
            assert blob.state in (CONDEMNED, DELETING)
        assert (blob.state == CONDEMNED) == (blob.condemned_at is not None)
        assert (blob.state == DELETING) == (blob.deleting_at is not None)
    missing = {digest for digest, blob in blobs.items() if blob.missing_at is not None}
    spoilt = {digest.hex() for digest in damaged}
    if torn_orphans:
        named = {digest.hex() for digest, blob in blobs.items() if blob.state != DELETING}
        spoilt |= {path.name for path in (store.root / "objects").glob("*/*")} - named
    on_disk = proven(store.root, frozenset(spoilt))
    for digest, blob in blobs.items():
        if blob.state == DELETING or digest in missing | damaged or not blob.local:
            continue
        if digest in absent and digest.hex() not in on_disk:
            continue
        assert digest.hex() in on_disk, f"the bytes of {digest.hex()} are gone"
        assert store.blobs.path(digest).stat().st_size == blob.size_bytes
    orphans = on_disk - {digest.hex() for digest in blobs}
    hidden = {path.name for path in (store.root / "objects").rglob(".*")}
    return Findings(sorted(orphans | hidden), sorted(digest.hex() for digest in missing))


def assert_well(store: Store) -> None:
    """The store's own doctor finds nothing wrong; what it only notes is no fault."""
    wrong = [finding for finding in examine_store(store, read_data=True) if finding.wrong]
    assert wrong == [], wrong


def proven(root: Path, torn_is_fine: frozenset[str] = frozenset()) -> set[str]:
    """The names in objects/, each one proved by the system's own sha256sum (invariant 7)."""
    command = "find objects -type f ! -name '.*' -print0 | xargs -0 -r sha256sum"
    lines = subprocess.run(
        ["sh", "-c", command], cwd=root, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    names = set()
    for line in lines:
        found, _, path = line.partition("  ")
        name = Path(path).name
        assert Path(path).parent.name == name[:2], f"{path} is in the wrong folder"
        assert found == name or name in torn_is_fine, f"{path} holds other bytes than it says"
        names.add(name)
    return names


def assert_readable(store: Store, files: dict[str, Digest]) -> None:
    """Every file (file_id → digest) is there, with the bytes that its digest names."""
    lost = []
    for file_id, digest in files.items():
        with store.catalog.read() as snapshot:
            file = snapshot.get(StoredFile, file_id)
        if file is None or file.checksum_sha256 != digest:
            lost.append(f"{file_id}: no record")
            continue
        with open(store.opener.here(digest), "rb") as stream:
            if digest_of(stream.read()) != digest:
                lost.append(f"{file_id}: wrong bytes")
    assert not lost, f"{len(lost)} of {len(files)} acknowledged files are lost: {lost[:5]}"
