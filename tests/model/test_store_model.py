"""The store against an oracle of a few dictionaries: whatever the order of things, they agree."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cas.catalog import Transaction
from cas.clock import DAY_US, HOUR_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import Digest, digest_of
from cas.errors import FilesRefused, Held, NotFound, UploadClosed
from cas.files import PutItem
from cas.listing import PAGE_MAX
from cas.records import Blob, StoredFile
from cas.references import Reference, parse_reference
from cas.retention import Retention, parse_retention
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.uploads import UploadRequest
from tests.audit import assert_well, audit
from tests.cas.interposed import collect, interpose
from tests.clocks import KEEP_US, HandClock

GRACE_US = DAY_US
SETTINGS = Settings(
    store=StoreSettings(
        grace=Duration(GRACE_US), min_free=Size(0), trust_verified_for=Duration(20 * DAY_US)
    )
)
CONTENTS = [b"", b"a", b"b" * 100, b"c" * 300]

tenants = st.sampled_from(["acme", "other"])
runs = st.sampled_from(["direct", "run-1"])
contents = st.sampled_from(CONTENTS)
extensions = st.sampled_from(["bin", "txt"])
retentions = st.sampled_from([parse_retention(t) for t in ("hours:1", "days:3", "forever")])
slots = st.integers(0, 1)
# Of what there is, in the order it came: tokens are random, and would not come again.
choices = st.integers(0, 30)


@dataclass
class ModelFile:
    """What the oracle knows of a file."""

    file_id: str
    data: bytes
    expires_at: int | None
    hold: bool = False

    def shown(self, now_us: int) -> bool:
        return self.hold or self.expires_at is None or self.expires_at > now_us


@dataclass
class ModelUpload:
    """What the oracle knows of an upload."""

    tenant: str
    expires_at: int
    retention: Retention
    slots: dict[int, bytes] = field(default_factory=dict)
    status: str = "pending"

    def as_of(self, now_us: int) -> str:
        over = self.status == "pending" and self.expires_at <= now_us
        return "expired" if over else self.status


class StoreModel(RuleBasedStateMachine):
    """Every rule does a thing to the store and to the oracle, and compares the answers."""

    def __init__(self) -> None:
        super().__init__()
        place = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(
            prefix="blobcask-", dir=place if place.is_dir() else None
        )
        self.clock = HandClock()
        self.store = self._open()
        self.files: dict[str, ModelFile] = {}
        self.uploads: dict[str, ModelUpload] = {}
        self.damaged: set[bytes] = set()

    def _open(self) -> Store:
        return Store.open(Path(self._folder.name) / "store", SETTINGS, clock=self.clock)

    @property
    def now_us(self) -> int:
        return self.clock.now_us()

    def reference(self, tenant: str, run: str, data: bytes, extension: str) -> Reference:
        return Reference(tenant, run, digest_of(data), extension)

    def stored(self, file: StoredFile, data: bytes, retention: Retention) -> None:
        """Compare the answer to storing `data`, and remember the file."""
        expires_at = retention.expires_at(self.now_us)
        known = self.files.get(file.storage_ref)
        if known is None:
            self.files[file.storage_ref] = ModelFile(file.file_id, data, expires_at)
        else:
            assert file.file_id == known.file_id
            both = known.expires_at, expires_at
            known.expires_at = None if None in both else max(filter(None, both))
        assert file.expires_at == self.files[file.storage_ref].expires_at
        assert file.checksum_sha256 == digest_of(data)
        self.damaged.discard(data)
        with open(self.store.opener.here(file.checksum_sha256), "rb") as stream:
            assert stream.read() == data

    # --- files

    @rule(tenant=tenants, run=runs, data=contents, extension=extensions, retention=retentions)
    def put(self, tenant: str, run: str, data: bytes, extension: str, retention: Retention) -> None:
        file = self.store.files(tenant, "ada").put(
            data, name="it", run=run, filename=f"it.{extension}", retention=retention
        )
        self.stored(file, data, retention)

    @rule(tenant=tenants, run=runs, many=st.lists(contents, max_size=5), retention=retentions)
    def put_many(self, tenant: str, run: str, many: list[bytes], retention: Retention) -> None:
        items = [PutItem(data, "it") for data in many]
        stored = self.store.files(tenant, "ada").put_many(items, run=run, retention=retention)
        for file, data in zip(stored, many, strict=True):
            self.stored(file, data, retention)

    @rule(
        tenant=tenants,
        data=contents,
        retention=retentions,
        between=st.sampled_from(["collect", "sweep and collect", "orphan", "put"]),
    )
    def put_while(self, tenant: str, data: bytes, retention: Retention, between: str) -> None:
        """Something else happens wholly between this writer's bytes and its commit."""

        def happens() -> None:
            if between == "put":
                self.put("other", "run-1", data, "txt", retention)
            elif between == "orphan":
                placed = self.store.blobs.stat(digest_of(data))
                if placed is not None:
                    self.store.collector.doom_orphan(
                        digest_of(data), placed.size_bytes, placed.inode
                    )
            else:
                if between == "sweep and collect":
                    self.sweep()
                self.clock.advance(GRACE_US + 1)
                self.collect()

        waiting = interpose(self.store.adoption)
        waiting.append(happens)
        try:
            self.put(tenant, "direct", data, "bin", retention)
        finally:
            waiting.clear()

    @precondition(lambda self: self.files)
    @rule(choice=choices, foreign=st.booleans())
    def delete(self, choice: int, foreign: bool) -> None:
        text = list(self.files)[choice % len(self.files)]
        reference = parse_reference(text)
        tenant = "third" if foreign else reference.tenant_id
        files = self.store.files(tenant, "ada")
        try:
            files.delete(reference)
        except NotFound:
            assert foreign
        except Held:
            assert self.files[text].hold
        else:
            assert not foreign
            assert not self.files.pop(text).hold

    @precondition(lambda self: self.files)
    @rule(choice=choices, on=st.booleans())
    def hold(self, choice: int, on: bool) -> None:
        text = list(self.files)[choice % len(self.files)]
        reference = parse_reference(text)
        assert self.store.files(reference.tenant_id, "ada").hold(reference, on).hold is on
        self.files[text].hold = on

    # --- uploads

    @rule(tenant=tenants, retention=retentions, hours=st.integers(1, 48))
    def request(self, tenant: str, retention: Retention, hours: int) -> None:
        upload = self.store.uploads(tenant, "ada").request(
            UploadRequest("it", max_files=2, retention=retention, expires_in_s=hours * 3600)
        )
        self.uploads[upload.upload_token] = ModelUpload(
            tenant, self.now_us + hours * HOUR_US, retention
        )

    @precondition(lambda self: self.uploads)
    @rule(choice=choices, index=slots, data=contents)
    def fill(self, choice: int, index: int, data: bytes) -> None:
        token = list(self.uploads)[choice % len(self.uploads)]
        model = self.uploads[token]
        try:
            self.store.upload_link(token).put(index, data, filename="it.bin")
        except UploadClosed as closed:
            assert closed.state == model.as_of(self.now_us) != "pending"  # noqa: PT017
        else:
            assert model.as_of(self.now_us) == "pending"
            model.slots[index] = data
            self.damaged.discard(data)

    @precondition(lambda self: self.uploads)
    @rule(choice=choices, index=slots)
    def empty(self, choice: int, index: int) -> None:
        token = list(self.uploads)[choice % len(self.uploads)]
        model = self.uploads[token]
        try:
            self.store.upload_link(token).empty(index)
        except UploadClosed as closed:
            assert closed.state == model.as_of(self.now_us) != "pending"  # noqa: PT017
        else:
            model.slots.pop(index, None)

    @precondition(lambda self: self.uploads)
    @rule(choice=choices, cancel=st.booleans())
    def end(self, choice: int, cancel: bool) -> None:
        token = list(self.uploads)[choice % len(self.uploads)]
        model = self.uploads[token]
        if self.damaged & set(model.slots.values()):
            return  # what cannot be read cannot be judged; told in the stories of uploads
        try:
            if cancel:
                self.store.uploads(model.tenant, "ada").cancel(token)
                model.status = "cancelled"
                model.slots.clear()
                return
            done = self.store.upload_link(token).complete()
        except UploadClosed as closed:
            assert closed.state == model.as_of(self.now_us) != "pending"  # noqa: PT017
            return
        except FilesRefused:
            assert not model.slots
            return
        assert model.as_of(self.now_us) == "pending"
        model.status = "completed"
        wanted = [data for _, data in sorted(model.slots.items())]
        model.slots.clear()
        for file, data in zip(done.files, wanted, strict=True):
            self.stored(file, data, model.retention)

    # --- time, and what is done in its course

    @rule(by=st.sampled_from([1, HOUR_US, DAY_US, 4 * DAY_US, 21 * DAY_US]))
    def time_passes(self, by: int) -> None:
        self.clock.advance(by)

    @rule()
    def sweep(self) -> None:
        with self.store.catalog.read() as snapshot:
            plan = plan_sweep(snapshot, self.store.now_us(snapshot), keep_us=KEEP_US)
        execute_sweep(self.store.catalog, plan)
        for text, file in list(self.files.items()):
            if not file.shown(self.now_us):
                del self.files[text]
        for model in self.uploads.values():
            if model.as_of(self.now_us) == "expired":
                model.status = "expired"
                model.slots.clear()

    @rule()
    def collect(self) -> None:
        collect(self.store)
        with self.store.catalog.read() as snapshot:
            self.damaged = {
                data for data in self.damaged if snapshot.get(Blob, digest_of(data)) is not None
            }

    # --- bad luck

    @rule(data=contents, harm=st.sampled_from(["remove", "truncate", "replace", "rot"]))
    def damage(self, data: bytes, harm: str) -> None:
        digest = digest_of(data)
        path = self.store.blobs.path(digest)
        if not path.exists() or (harm == "truncate" and not data):
            return
        if harm == "remove":
            path.unlink()
        elif harm == "truncate":
            os.truncate(path, len(data) // 2)
        elif harm == "replace":
            bad = path.with_name("bad")
            bad.write_bytes(bytes(len(data)))
            bad.rename(path)
        else:
            self._rot(digest)
        if self._blob(digest) is not None:
            self.damaged.add(data)

    def _blob(self, digest: Digest) -> Blob | None:
        with self.store.catalog.read() as snapshot:
            return snapshot.get(Blob, digest)

    def _rot(self, digest: Digest) -> None:
        """What a scrub does with bytes that fail their hash."""
        self.store.blobs.quarantine(digest)

        def mark(txn: Transaction) -> None:
            blob = txn.get(Blob, digest)
            if blob is not None:
                txn.replace(msgspec.structs.replace(blob, missing_at=txn.now_us))

        self.store.catalog.write(mark)

    @rule(index=st.sampled_from(["kept", "dropped"]))
    def reopen(self, index: str) -> None:
        self.store.close()
        if index == "dropped":
            shutil.rmtree(self.store.root / "catalog/index")
        self.store = self._open()

    @rule()
    def checkpoint(self) -> None:
        self.store.catalog.checkpoint()

    # --- what is always true

    @invariant()
    def files_are_listed_and_counted(self) -> None:
        for tenant in ("acme", "other", "third"):
            listed = self.store.files(tenant, "ada").list(limit=PAGE_MAX).items
            assert {file.storage_ref: file.file_id for file in listed} == {
                text: file.file_id
                for text, file in self.files.items()
                if parse_reference(text).tenant_id == tenant and file.shown(self.now_us)
            }
            stored = [
                len(file.data)
                for text, file in self.files.items()
                if parse_reference(text).tenant_id == tenant
            ]
            stored += [
                len(data)
                for model in self.uploads.values()
                if model.tenant == tenant
                for data in model.slots.values()
            ]
            usage = self.store.files(tenant, "ada").usage()
            assert (usage.files, usage.size_bytes) == (len(stored), sum(stored))
        counted = Counter(file.data for file in self.files.values())
        for model in self.uploads.values():
            counted.update(model.slots.values())
        for data in CONTENTS:
            blob = self._blob(digest_of(data))
            assert (blob.refcount if blob else 0) == counted[data]

    def teardown(self) -> None:
        try:
            audit(self.store, damaged=frozenset(digest_of(data) for data in self.damaged))
            for text, model in self.files.items():
                if model.data not in self.damaged:
                    with open(self.store.opener.here(parse_reference(text).digest), "rb") as stream:
                        assert stream.read() == model.data
            # Storing all of it again heals whatever happened, and then nothing is amiss.
            self.clock.advance(GRACE_US + 1)
            for tenant in ("acme", "other"):
                self.put_many(tenant, "run-1", CONTENTS, parse_retention("forever"))
            self.sweep()
            self.collect()
            assert audit(self.store).missing == []
            assert_well(self.store)
        finally:
            self.store.close()
            self._folder.cleanup()


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(
    max_examples=settings().max_examples // 2, stateful_step_count=40
)
