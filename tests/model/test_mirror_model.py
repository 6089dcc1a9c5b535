"""The store with targets, against what is truly at them.

A target here is a dictionary of bytes. Objects land in it, are verified, and only later, or
never, is that told to the catalog; DELETEs likewise; targets come, go and lose what they
hold. Whatever the order: a row that says done tells the truth, nothing is evicted that is
not everywhere, and in the end each target holds what is live and nothing else.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cas import replicas
from cas.clock import DAY_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import Digest, digest_of
from cas.errors import NotFound, TargetNeeded
from cas.records import DONE, Blob, Copy, Replica
from cas.references import Reference, parse_reference
from cas.replicas import Copying, Done, Failed, Outcome
from cas.rows import NEVER
from cas.store import Store
from tests.audit import assert_well, audit
from tests.cas.interposed import collect, interpose
from tests.clocks import HandClock

GRACE_US = DAY_US
SETTINGS = Settings(
    store=StoreSettings(
        grace=Duration(GRACE_US), min_free=Size(0), trust_verified_for=Duration(10_000 * DAY_US)
    )
)
CONTENTS = [b"", b"b" * 100]
NAMES = ("dr", "edge")
DATA = {digest_of(data): data for data in CONTENTS}
SHIPPED = dict.fromkeys(NAMES, NEVER)

names = st.sampled_from(NAMES)
contents = st.sampled_from(CONTENTS)
fates = st.sampled_from(["done", "failed before", "failed after", "begun", "killed"])


class MirrorModel(RuleBasedStateMachine):
    """`at` is what each target holds; `outcomes` and `deletes` are words not told yet.

    One tenant and two contents, so that many things happen to the same blob.
    """

    def __init__(self) -> None:
        super().__init__()
        place = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(
            prefix="blobcask-", dir=place if place.is_dir() else None
        )
        self.clock = HandClock()
        self.store = self._open()
        self.live: dict[bytes, Reference] = {}
        self.damaged: set[bytes] = set()  # no good bytes of it are here
        self.at: dict[str, set[Digest]] = {name: set() for name in NAMES}
        self.known: set[str] = set()
        self.outcomes: list[Outcome] = []
        self.deletes: list[Replica] = []
        self.lost: set[tuple[str, Digest]] = set()  # and no verify has noticed
        self.untold: set[tuple[str, Digest]] = set()  # objects that only a listing finds
        self.register(set(NAMES))

    def _open(self) -> Store:
        return Store.open(Path(self._folder.name) / "store", SETTINGS, clock=self.clock)

    @property
    def now_us(self) -> int:
        return self.clock.now_us()

    # --- tenants

    @rule(data=contents)
    def put(self, data: bytes) -> None:
        file = self.store.files("acme", "ada").put(data, name="it")
        self.live[data] = parse_reference(file.storage_ref)
        self.damaged.discard(data)
        blob = self._blob(digest_of(data))
        assert blob is not None
        assert blob.local

    @rule(data=contents, happens=st.sampled_from(["gone", "evicted", "deleted", "put"]))
    def put_while(self, data: bytes, happens: str) -> None:
        """Something else happens wholly between this writer's bytes and its commit."""

        def between() -> None:
            if happens == "put":
                self.put(data)
            elif happens == "evicted":
                self.all_sent()
                self.evict({data})
            else:
                self.all_sent()
                self.gone(data)
                if happens == "deleted":
                    for name in NAMES:
                        self.begin_deletes(name)

        waiting = interpose(self.store.adoption)
        waiting.append(between)
        try:
            self.put(data)
        finally:
            waiting.clear()

    @rule(data=contents, collected=st.booleans())
    def gone(self, data: bytes, collected: bool = True) -> None:
        """Its file is deleted, and most often its bytes are collected."""
        reference = self.live.pop(data, None)
        if reference is not None:
            self.store.files("acme", "ada").delete(reference)
        if collected:
            self.clock.advance(GRACE_US + 1)
            collect(self.store)
            self.damaged &= self.live.keys()

    @rule(data=contents)
    def rot(self, data: bytes) -> None:
        """What a scrub does with bytes that fail their hash."""
        blob = self._blob(digest_of(data))
        if blob is None or not blob.local or blob.missing_at is not None:
            return
        self.store.blobs.quarantine(blob.digest)
        self.store.catalog.write(
            lambda txn: txn.replace(msgspec.structs.replace(blob, missing_at=txn.now_us))
        )
        self.damaged.add(data)

    @rule(index=st.sampled_from(["kept", "dropped"]))
    def reopen(self, index: str) -> None:
        self.store.close()
        if index == "dropped":
            shutil.rmtree(self.store.root / "catalog/index")
        self.store = self._open()

    # --- looking

    def _blob(self, digest: Digest) -> Blob | None:
        with self.store.catalog.read() as snapshot:
            return snapshot.get(Blob, digest)

    def rows(self, target: str) -> list[Replica]:
        with self.store.catalog.read() as snapshot:
            return snapshot.range(Replica, "", (target,), limit=1000)

    def homes(self, digest: Digest) -> list[str]:
        with self.store.catalog.read() as snapshot:
            return replicas.homes(snapshot, digest)

    # --- targets

    @rule(wanted=st.sets(names))
    def register(self, wanted: set[str]) -> None:
        kept = {name for name in self.known - wanted if self._has_rows(name)}
        try:
            replicas.register(self.store.catalog, [(name, "there") for name in wanted])
        except TargetNeeded:
            assert kept
        else:
            assert not kept
            self._left(self.known - wanted)
            self.known = wanted

    @rule(name=names)
    def forget(self, name: str) -> None:
        needed = any(
            blob is not None
            and (not blob.local or blob.missing_at is not None)
            and self.homes(blob.digest) == [name]
            for blob in map(self._blob, DATA)
        )
        try:
            replicas.forget(self.store.catalog, name)
        except TargetNeeded:
            assert needed
        except NotFound:
            assert name not in self.known
        else:
            assert not needed
            self._left({name})
            self.known -= {name}

    def _left(self, names: set[str]) -> None:
        self.untold |= {(name, digest) for name in names for digest in self.at[name]}

    def _has_rows(self, name: str) -> bool:
        with self.store.catalog.read() as snapshot:
            return bool(snapshot.range(Replica, "", (name,), limit=1))

    @rule(name=names, again=st.booleans())
    def backfill(self, name: str, again: bool) -> None:
        if again and name in self.known:
            replicas.begin_backfill(self.store.catalog, name)
        replicas.backfill(self.store.catalog, name, limit=2)

    # --- copying

    @rule(name=names, fate=fates, many=st.integers(1, 3))
    def send(self, name: str, fate: str, many: int) -> None:
        """Copy some that are due; the outcome is told later, or the mirror dies before."""
        with self.store.catalog.read() as snapshot:
            due = replicas.due(snapshot, name, self.now_us, many)
        for row in due:
            self._send(row, fate)

    def _send(self, row: Replica, fate: str) -> None:
        held, digest = self.at[row.target], row.digest
        copy = Copy(row.target, digest, "upload", 5, [], 1)
        if digest not in held and not self._readable(digest):
            fate = "failed before"
        if fate in ("done", "failed after", "killed"):
            held.add(digest)
            self.lost.discard((row.target, digest))
        if fate == "killed":
            self.untold.add((row.target, digest))
        if fate == "done":
            self.outcomes.append(Done(row))
        elif fate == "begun":
            self.outcomes.append(Copying(row, copy))
        elif fate != "killed":
            self.outcomes.append(Failed(row, fate, self.now_us, afresh=fate == "failed after"))

    def _readable(self, digest: Digest) -> bool:
        """Whether there are good bytes to send: here, or at another target."""
        blob = self._blob(digest)
        here = blob is not None and blob.local and DATA[digest] not in self.damaged
        return here or any(digest in self.at[home] for home in self.homes(digest))

    @precondition(lambda self: self.outcomes)
    @rule(reverse=st.booleans())
    def tell(self, reverse: bool) -> None:
        told, self.outcomes = self.outcomes, []
        replicas.settle(self.store.catalog, told[::-1] if reverse else told)

    @precondition(lambda self: self.outcomes)
    @rule()
    def tell_one(self) -> None:
        replicas.settle(self.store.catalog, [self.outcomes.pop()])

    @rule(name=names, data=contents)
    def send_anew(self, name: str, data: bytes) -> None:
        """For a tenant that did not hold the bytes before (invariant 9)."""
        with self.store.catalog.read() as snapshot:
            row = snapshot.get(Replica, name, digest_of(data))
        if row is not None and row.held and self._readable(row.digest):
            self._send(row, "done")

    # --- deleting

    @rule(name=names)
    def begin_deletes(self, name: str) -> None:
        with self.store.catalog.read() as snapshot:
            found = replicas.removable(snapshot, name, NEVER, NEVER, 2)
        for row in replicas.begin_removals(self.store.catalog, found):
            self.at[name].discard(row.digest)
            self.lost.discard((name, row.digest))
            self.deletes.append(row)

    @rule(killed=st.booleans())
    def end_deletes(self, killed: bool) -> None:
        ended, self.deletes = self.deletes, []
        if not killed:
            replicas.end_removals(self.store.catalog, ended)

    @rule(data=contents, ended=st.booleans())
    def gone_and_back(self, data: bytes, ended: bool) -> None:
        """Its copies are deleted while a tenant brings the bytes again."""
        self.gone(data)
        for name in NAMES:
            self.begin_deletes(name)
        self.put(data)
        if ended:
            self.end_deletes(killed=False)

    # --- evicting

    @rule(some=st.sets(contents))
    def evict(self, some: set[bytes]) -> None:
        gone = replicas.evict(
            self.store.catalog, self.store.blobs, [digest_of(data) for data in some], SHIPPED
        )
        for blob in gone:
            assert self.known
            assert self.store.blobs.stat(blob.digest) is None
            for name in self.known:
                there = blob.digest in self.at[name] or (name, blob.digest) in self.lost
                assert there, "invariant 8"

    @rule(data=contents)
    def fetch(self, data: bytes) -> None:
        digest = digest_of(data)
        if any(digest in self.at[home] for home in self.homes(digest)):
            with self.store.blobs.stage(data) as staged:
                self.store.adoption.bring_back(staged, actor="test")
            if self._blob(digest) is not None:
                self.damaged.discard(data)

    def all_sent(self) -> None:
        for name in NAMES:
            self.backfill(name, again=False)
            self.send(name, "done", 5)
        if self.outcomes:
            self.tell(reverse=False)

    # --- bad luck at the targets

    @rule(name=names, data=contents, noticed=st.booleans())
    def lose(self, name: str, data: bytes, noticed: bool) -> None:
        digest = digest_of(data)
        if digest in self.at[name]:
            self.at[name].discard(digest)
            self.lost.add((name, digest))
        if noticed:
            self.verify(name)

    @rule(name=names)
    def verify(self, name: str) -> None:
        """Both sides are compared."""
        absent = [
            row for row in self.rows(name) if row.state == DONE and row.digest not in self.at[name]
        ]
        assert all((name, row.digest) in self.lost for row in absent)
        wanted = replicas.want_again(self.store.catalog, name, [row.digest for row in absent])
        assert wanted == sum(row.held for row in absent)
        self.lost = {one for one in self.lost if one[0] != name}
        self._note_missing()

    def _note_missing(self) -> None:
        """What was only at a target that lost it is lost."""
        for digest, data in DATA.items():
            blob = self._blob(digest)
            if blob is not None and not blob.local and blob.missing_at is not None:
                self.damaged.add(data)

    # --- what is always true

    @invariant()
    def rows_tell_the_truth(self) -> None:
        with self.store.catalog.read() as snapshot:
            assert list(replicas.faults(snapshot)) == []
        for name in NAMES:
            for row in self.rows(name):
                assert name in self.known
                if row.held:
                    there = row.digest in self.at[name] or (name, row.digest) in self.lost
                    assert there, "a fake green"
        for digest in DATA:
            blob = self._blob(digest)
            if blob is not None and not blob.local and blob.missing_at is None:
                assert self.homes(digest), "invariant 1"

    def teardown(self) -> None:
        try:
            for name in sorted(self.known):
                self.verify(name)
            audit(self.store, damaged=frozenset(map(digest_of, self.damaged)))
            if not self.damaged:
                assert_well(self.store)
            for data in list(self.damaged):
                self.put(data)
            self.all_is_done()
            assert_well(self.store)
        finally:
            self.store.close()
            self._folder.cleanup()

    def all_is_done(self) -> None:
        """Then each target holds what is live, and no more."""
        for _ in range(4):
            self.clock.advance(GRACE_US + 1)
            collect(self.store)
            for name in sorted(self.known):
                while replicas.backfill(self.store.catalog, name):
                    pass
                self.begin_deletes(name)
                self.end_deletes(killed=False)
                self.send(name, "done", 10)
                replicas.settle(self.store.catalog, self.outcomes)
                self.outcomes = []
        live = {digest_of(data) for data in self.live}
        for name in sorted(self.known):
            with self.store.catalog.read() as snapshot:
                assert replicas.backlog(snapshot, name, self.now_us).rows == 0
            assert {row.digest for row in self.rows(name)} == live
            assert all(row.held for row in self.rows(name))
            assert live <= self.at[name]
            strays = self.at[name] - live
            assert strays <= {digest for there, digest in self.untold if there == name}


TestMirrorModel = MirrorModel.TestCase
TestMirrorModel.settings = settings(
    max_examples=settings().max_examples // 2, stateful_step_count=50
)
