"""Workloads of the sweep: what is due among much that is not."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time

import msgspec

from bench.cataloguing import stored_blob, stored_file
from bench.measure import settle
from bench.report import Quantity, Row, Target
from bench.scale import Bench
from cas.catalog import Snapshot, Transaction
from cas.digest import Digest
from cas.store import Store
from cas.sweep import SweepPlan, execute_sweep, plan_sweep

_AT_ONCE = 1000  # records a write


def sweep(bench: Bench) -> list[Row]:
    """Ending as many due files among many records as among few."""
    due, few, many = bench.scale.due_files, bench.scale.few_files, bench.scale.many_files
    names = (f"run-due-{number}" for number in itertools.count())
    spent: dict[int, list[float]] = {few: [], many: []}
    with (
        Store.open(bench.folder / "few") as small,
        Store.open(bench.folder / "many") as large,
    ):
        stores = {few: small, many: large}
        for kept, store in stores.items():
            _fill(store, [f"run-{number}" for number in range(kept)], due=False)
        for turn in range(bench.scale.rounds):
            for kept in (few, many) if turn % 2 else (many, few):
                _fill(stores[kept], list(itertools.islice(names, due)), due=True)
                spent[kept].append(_swept_ms(stores[kept], due))
        idle_us = _idle_us(large)
    ours, limit = (_median(spent[kept]) for kept in (many, few))
    return [
        Row(
            "sweep",
            f"{due:,} due among {many:,} files",
            ours,
            ours.value / limit.value,
            limit,
            f"the same among {few:,}",
            Target(2, at_most=True),
        ),
        Row(
            "sweep",
            f"a look that finds nothing due, {many:,} files",
            Quantity(idle_us, "us"),
            idle_us,
            target=Target(1000, at_most=True, unit="us"),
        ),
    ]


def _fill(store: Store, names: list[str], *, due: bool) -> None:
    """File records, each with a blob of its own where they are `due`."""

    def insert(txn: Transaction, some: list[str]) -> None:
        shared = Digest(hashlib.sha256(some[0].encode()).digest())
        txn.insert(stored_blob(shared, txn.now_us))
        for name in some:
            digest = Digest(hashlib.sha256(name.encode()).digest()) if due else shared
            if digest != shared:
                txn.insert(stored_blob(digest, txn.now_us))
            file = stored_file(digest, txn.now_us, name)
            txn.insert(msgspec.structs.replace(file, expires_at=txn.now_us) if due else file)

    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        store.catalog.write(lambda txn: insert(txn, some))  # noqa: B023


def _planned(store: Store, snapshot: Snapshot) -> SweepPlan:
    return plan_sweep(
        snapshot,
        store.now_us(snapshot),
        partial_files=store.partial_files,
        keep_us=store.settings.events.keep,
    )


def _swept_ms(store: Store, due: int) -> float:
    settle(store.root)
    began = time.perf_counter()
    with store.catalog.read() as snapshot:
        plan = _planned(store, snapshot)
    swept = execute_sweep(store.catalog, plan, partial_files=store.partial_files)
    spent_ms = (time.perf_counter() - began) * 1e3
    if swept.files != due:
        raise RuntimeError(f"{swept.files} files were swept, not {due}")
    return spent_ms


def _idle_us(store: Store) -> float:
    looks = []
    for _ in range(100):
        began = time.perf_counter()
        with store.catalog.read() as snapshot:
            _planned(store, snapshot)
        looks.append((time.perf_counter() - began) * 1e6)
    return statistics.median(looks)


def _median(spent_ms: list[float]) -> Quantity:
    return Quantity(statistics.median(spent_ms), "ms", spent_ms)
