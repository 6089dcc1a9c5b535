"""Workloads of shipping and restoring: the metadata of many files, there and back."""

from __future__ import annotations

import hashlib
import shutil
import time

from bench.cataloguing import stored_blob, stored_file
from bench.measure import Samples, settle
from bench.report import Quantity, Row, Target
from bench.scale import Bench
from cas.catalog import Transaction
from cas.config import Settings, TargetSettings
from cas.digest import Digest
from cas.records import LIVE, Blob, Replica
from cas.replicas import Done, due, register
from cas.replicas import settle as settle_rows
from cas.store import Store
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.probe import Profile
from replicator.restoring import Options
from replicator.restoring import restore as restore_root
from replicator.shipping import Shipper

_AT_ONCE = 1000  # records a write
_NAME = "away"
_PROFILE = Profile(conditional=True)


def restore(bench: Bench) -> list[Row]:
    """From a folder that was never there to an open store, all files replicated, lazily."""
    files = bench.scale.restored_files
    target = FolderTarget(_NAME, bench.folder / "away")
    shipped = _ship(bench, target, files)
    spent: list[float] = []
    for _ in range(bench.scale.rounds):
        root = bench.folder / "restored"
        settle(bench.folder)
        began = time.perf_counter()
        made = restore_root(root, Settings(), target, _PROFILE, Options(), say=_silent)
        with Store.open(root):
            spent.append(time.perf_counter() - began)
        if made.counted.files != files or made.counted.missing_blobs:
            raise RuntimeError(f"{made.counted.files} of {files} files came back")
        shutil.rmtree(root)
    median = Samples("restore", spent).median_s
    return [
        Row(
            "restore",
            f"the metadata of {files:,} files from a target, until the store is open",
            Quantity(median, "s", spent),
            median,
            target=Target(10, at_most=True, unit="s"),
        ),
        Row("restore", f"shipping the journal of {files:,} files", shipped, shipped.value),
    ]


def _silent(_text: str) -> None:
    """Nobody reads remarks here."""


def _ship(bench: Bench, target: FolderTarget, files: int) -> Quantity:
    """Make a store whose blobs are all done at the target, and ship it."""
    with Store.open(bench.folder / "store") as store:
        register(store.catalog, [(_NAME, target.place)])
        _fill(store, files)
        link = Link(target, TargetSettings(_NAME, "folder"), _PROFILE)
        shipper = Shipper(store, link, _PROFILE)
        began = time.perf_counter()
        while shipper.step().more:
            pass
        spent_s = time.perf_counter() - began
    size_bytes = sum(path.stat().st_size for path in (bench.folder / "away").rglob("*.log"))
    return Quantity(size_bytes / spent_s / 2**20, "MiB/s")


def _fill(store: Store, files: int) -> None:
    def insert(txn: Transaction, first: int) -> None:
        for number in range(first, min(first + _AT_ONCE, files)):
            digest = Digest(hashlib.sha256(b"%d" % number).digest())
            txn.insert(stored_blob(digest, txn.now_us))
            txn.insert(stored_file(digest, txn.now_us, f"run-{number}"))

    for first in range(0, files, _AT_ONCE):
        store.catalog.write(lambda txn, first=first: insert(txn, first))  # type: ignore[misc]
    while True:
        with store.catalog.read() as snapshot:
            rows: list[Replica] = due(snapshot, _NAME, store.now_us(snapshot), _AT_ONCE)
            blobs = snapshot.range(Blob, "", limit=1)
        if not rows:
            break
        settle_rows(store.catalog, [Done(row) for row in rows])
    assert blobs[0].state == LIVE
