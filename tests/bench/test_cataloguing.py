"""What the catalog costs: a durable write, a lookup, the index made anew."""

from __future__ import annotations

import hashlib
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from bench.cataloguing import stored_blob, stored_file, write_journal
from bench.storing import ACTOR, TENANT
from cas.catalog import Transaction
from cas.digest import Digest
from cas.files import Files
from cas.records import StoredFile
from cas.references import parse_reference
from cas.store import Store

DIGEST = Digest(hashlib.sha256(b"measured").digest())


def test_commit(benchmark: Any, store: Store) -> None:
    store.catalog.write(lambda txn: txn.insert(stored_blob(DIGEST, txn.now_us)))
    names = count()

    def insert(txn: Transaction) -> None:
        txn.insert(stored_file(DIGEST, txn.now_us, f"run-{next(names)}"))

    benchmark(store.catalog.write, insert, actor=ACTOR)


def test_lookup(benchmark: Any, files: Files) -> None:
    file = files.put(b"found", name="found.txt")
    assert benchmark(files.stat, parse_reference(file.storage_ref)) == file


def test_rebuild(benchmark: Any, root: Path) -> None:
    folder = root / "rebuilt"
    ops = write_journal(folder, 2_000)

    def lose_the_index() -> None:
        shutil.rmtree(folder / "catalog" / "index")

    def rebuild() -> None:
        Store.open(folder).close()

    benchmark.pedantic(rebuild, setup=lose_the_index, rounds=3)
    with Store.open(folder) as store, store.catalog.read() as snapshot:
        store.catalog.verify_state()
        found = snapshot.range(StoredFile, "tenant", (TENANT,), limit=ops)
    assert len(found) == ops // 2
