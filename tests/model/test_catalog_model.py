"""The catalog beside a dict: any sequence of writes, with everything that may come between.

Between writes the catalog is checkpointed, closed and opened, and its index is dropped,
put back from an older copy or met in another boot. At the end its state adds up, and the
index equals what the journal says (invariant 5).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from cas.catalog import Transaction
from cas.catalog.local import CatalogSettings, LocalCatalog
from cas.clock import DAY_US
from cas.digest import Digest
from cas.errors import NotFound, RecordExists
from cas.records import CONDEMNED, Blob, Mark, StoredFile
from tests.clocks import HandClock
from tests.crash.ledger import audit_index, entry, journal_damage
from tests.crash.steps import StepDisk

_MEMORY = Path("/dev/shm")
FILES = st.sampled_from([f"f{number}" for number in range(6)])
REFERENCES = st.sampled_from([f"ref{number}" for number in range(5)] + ["r" * 200, "r" * 201])
DIGESTS = st.sampled_from([Digest(bytes([number]) * 32) for number in range(3)])
EXPIRIES = st.none() | st.integers(0, 5)
EVERYTHING = 1 << 30


class Oops(Exception):
    """A change that went wrong."""


class CatalogModel(RuleBasedStateMachine):
    """`files` and `marks` are what must be there."""

    def __init__(self) -> None:
        super().__init__()
        where = _MEMORY if _MEMORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="blobcask-", dir=where))
        self.root = self.folder / "root"
        self.root.mkdir()
        self.clock = HandClock()
        self.boots = 0
        self.files: dict[str, StoredFile] = {}
        self.marks: dict[str, str] = {}
        self.ever: set[Digest] = set()
        self.copy: Path | None = None
        self.catalog: LocalCatalog
        self.tiny = True

    @initialize(tiny=st.booleans())
    def begin(self, tiny: bool) -> None:
        self.tiny = tiny
        self.open()

    def open(self) -> None:
        tiny = CatalogSettings(
            # Background checkpoints begin when they like; here they are a rule instead.
            checkpoint_bytes=1 << 40, journal_keep_us=-10_000 * DAY_US, min_free_bytes=1 << 60
        )  # fmt: skip
        self.catalog = LocalCatalog(
            self.root, tiny, clock=self.clock, disk=StepDisk(f"boot {self.boots}")
        )
        if self.tiny:
            # Segments of a frame or two.
            self.catalog._committer._tail._segment_bytes_max = 1000

    def teardown(self) -> None:
        try:
            self.catalog.verify_state()
            with self.catalog.inspect() as snapshot:
                audit_index(snapshot)
            self.drop_index()
            self.same()
            assert journal_damage(self.root) == []
            self.catalog.verify_state()
        finally:
            self.catalog.close()
            shutil.rmtree(self.folder)

    # --- writes

    def change(self, txn: Transaction, digest: Digest) -> None:
        if txn.get(Blob, digest) is None:
            txn.insert(Blob(digest, 1, bytes(32), 1, 1, 1))
        assert txn.now_us >= self.catalog.position().at_us

    def made(self, file_id: str, reference: str, digest: Digest, expires: int | None) -> StoredFile:
        return replace(
            entry(file_id, 1, digest), file_id=file_id, storage_ref=reference, expires_at=expires
        )

    def taken(self, file: StoredFile) -> bool:
        return any(
            other.storage_ref == file.storage_ref and other.file_id != file.file_id
            for other in self.files.values()
        )

    @rule(file_id=FILES, reference=REFERENCES, digest=DIGESTS, expires=EXPIRIES)
    def insert(self, file_id: str, reference: str, digest: Digest, expires: int | None) -> None:
        file = self.made(file_id, reference, digest, expires)

        def change(txn: Transaction) -> None:
            self.change(txn, digest)
            txn.insert(file)

        if file_id in self.files or self.taken(file):
            with pytest.raises(RecordExists):
                self.catalog.write(change)
        else:
            self.catalog.write(change)
            self.files[file_id] = file
            self.ever.add(digest)

    @rule(file_id=FILES, reference=REFERENCES, digest=DIGESTS, expires=EXPIRIES)
    def put_over(self, file_id: str, reference: str, digest: Digest, expires: int | None) -> None:
        file = self.made(file_id, reference, digest, expires)

        def change(txn: Transaction) -> None:
            self.change(txn, digest)
            txn.replace(file)

        if file_id not in self.files:
            with pytest.raises(NotFound):
                self.catalog.write(change)
        elif self.taken(file):
            with pytest.raises(RecordExists):
                self.catalog.write(change)
        else:
            self.catalog.write(change)
            self.files[file_id] = file
            self.ever.add(digest)

    @rule(file_id=FILES)
    def delete(self, file_id: str) -> None:
        file = self.files.pop(file_id, None)
        if file is None:
            missing = self.made(file_id, "", Digest(bytes(32)), None)
            with pytest.raises(NotFound):
                self.catalog.write(lambda txn: txn.delete(missing))
        else:
            self.catalog.write(lambda txn: txn.delete(file))

    @precondition(lambda self: len(self.files) > 1)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        """Two files exchange their references in one write."""
        one, other = data.draw(st.permutations(sorted(self.files)))[:2]
        left, right = self.files[one], self.files[other]
        swapped = (
            replace(left, storage_ref=right.storage_ref),
            replace(right, storage_ref=left.storage_ref),
        )

        def change(txn: Transaction) -> None:
            txn.replace(replace(left, storage_ref="aside"))
            txn.replace(swapped[1])
            txn.replace(swapped[0])

        self.catalog.write(change)
        self.files[one], self.files[other] = swapped

    @rule(names=st.lists(st.sampled_from("abc"), max_size=4), fails=st.booleans())
    def mark(self, names: list[str], fails: bool) -> None:
        """Several records in one write, which may be undone at its end."""
        values = dict(self.marks)

        def change(txn: Transaction) -> None:
            for name in names:
                old = txn.get(Mark, name)
                if old is None:
                    txn.insert(Mark(name, "1"))
                    values[name] = "1"
                elif len(old.value) > 2:
                    txn.delete(old)
                    del values[name]
                else:
                    txn.replace(Mark(name, old.value + "1"))
                    values[name] = old.value + "1"
            if fails:
                raise Oops

        if fails:
            with pytest.raises(Oops):
                self.catalog.write(change)
        else:
            self.catalog.write(change)
            self.marks = values

    # --- what comes between

    @rule(by_us=st.sampled_from([-DAY_US, 0, 1, DAY_US]))
    def time_passes(self, by_us: int) -> None:
        self.clock.advance(by_us)

    @rule()
    def checkpoint(self) -> None:
        assert self.catalog.checkpoint() == self.catalog.position()

    @rule()
    def reopen(self) -> None:
        self.between(lambda: None)

    @rule()
    def restart_the_machine(self) -> None:
        self.boots += 1
        self.between(lambda: None)

    @rule()
    def drop_index(self) -> None:
        self.between(lambda: shutil.rmtree(self.root / "catalog/index"))

    @rule()
    def copy_index(self) -> None:
        def copy() -> None:
            self.copy = self.folder / "data.mdb"
            shutil.copyfile(self.root / "catalog/index/data.mdb", self.copy)

        self.between(copy)

    @precondition(lambda self: self.copy is not None)
    @rule()
    def restore_older_index(self) -> None:
        def restore() -> None:
            assert self.copy is not None
            # In place, so that BOOT speaks of it still.
            shutil.copyfile(self.copy, self.root / "catalog/index/data.mdb")

        self.between(restore)

    @rule(count=st.integers(1, 40))
    def tear_the_end(self, count: int) -> None:
        """Somebody was killed in the middle of a frame."""

        def tear() -> None:
            *_, last = sorted((self.root / "catalog/journal").glob("*.log"))
            with last.open("ab") as file:
                file.write(b"BCF1\0\0\1\0torn, and longer than its bytes"[:count])

        self.between(tear)

    def between(self, happen: Callable[[], None]) -> None:
        before = self.catalog.position()
        self.catalog.close()
        happen()
        self.open()
        assert self.catalog.position() == before

    # --- and always

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "catalog"):
            return
        with self.catalog.read() as snapshot:
            found = snapshot.range(StoredFile, "", limit=EVERYTHING)
            assert {file.file_id: file for file in found} == self.files
            assert {m.name: m.value for m in snapshot.range(Mark, "")} == self.marks
            for file in self.files.values():
                assert snapshot.find(StoredFile, "storage_ref", file.storage_ref) == file
            due = sorted(
                (file.expires_at, file.file_id)
                for file in self.files.values()
                if file.expires_at is not None
            )
            listed = snapshot.range(StoredFile, "expiry", limit=EVERYTHING)
            assert [(file.expires_at, file.file_id) for file in listed] == due
            for digest in self.ever:
                blob = snapshot.get(Blob, digest)
                assert blob is not None
                count = sum(f.checksum_sha256 == digest for f in self.files.values())
                assert blob.refcount == count
                assert (blob.state == CONDEMNED) == (count == 0)


TestCatalogModel = CatalogModel.TestCase
TestCatalogModel.settings = settings(stateful_step_count=40)
