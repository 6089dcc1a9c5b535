"""Adoption: how bytes on disk become a blob record that files may name.

Bytes come first, the record after (invariant 1), and between the two anything may happen:
another writer with the same bytes, a collector, a crash. So the transaction that creates,
heals or revives a blob record looks at the object once more (inode and size as written),
and when it is gone or another one, the writer brings its bytes again. It never counts on a
file that another writer placed and no record names: a sync that failed elsewhere tells
nobody who asks later.

A writer meets one of these:

    no record            its copy is placed, over whatever orphan has the name
    trusted record       its copy is thrown away after the same durable steps, so that time
                         tells no tenant of another (invariant 9); the tenant that has a
                         file of these bytes is spared the work
    record not trusted   its copy is placed over the object: re-upload heals. Not trusted
                         means long unverified, known missing, or another size or inode
    `deleting`           it finishes that removal, then begins again (invariant 2)

What is thrown away goes after the answer, also where the answer is an error. Two of these
cases time does tell: a heal waits for the disk as often as any other, but syncs first and
gives its name by a rename; and one who meets `deleting` waits for a collector.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import TypeVar, final

import msgspec

from cas.blobs import SHARDS, BlobFiles, Measured, Meeting, Placed, Staged
from cas.catalog import Catalog, Snapshot, Transaction
from cas.digest import Digest
from cas.errors import BlobcaskError, BlobDeleting, Conflict
from cas.garbage import Collector
from cas.records import CONDEMNED, DELETING, Blob, StoredFile

T = TypeVar("T")

# Waits until the copy of some bytes at the bucket is verified, which `anew` has sent again.
Confirm = Callable[[Measured, bool], None]

# Each attempt is lost only to another writer or collector that made progress meanwhile.
_ATTEMPTS_MAX = 50
_DISCARDED_AT_ONCE = 50  # each may cost a folder sync under the writer lock
_CONFIRMED_AT_ONCE = 16  # of a batch


class Moved(BlobcaskError):
    """Inside a transaction: the object is not the one this writer placed or saw."""


@final
class Adopted(msgspec.Struct, frozen=True):
    """Bytes that are ready to be named: what they are, and where the own copy was placed."""

    measured: Measured
    placed: Placed | None  # None: the object of the trusted record serves


@final
class Adoption:
    """Brings bytes and the catalog together. Safe for threads and processes."""

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobFiles,
        collector: Collector,
        *,
        trust_verified_for_us: int,
        now_us: Callable[[Snapshot], int],
        confirm: Confirm | None = None,
    ) -> None:
        """`confirm` is called after the commit that names bytes, and before that is told
        (`storage_type = s3`); without it, what is durable here is acknowledged."""
        self._confirm = confirm
        self._catalog = catalog
        self._blobs = blobs
        self._collector = collector
        self._trust_us = trust_verified_for_us
        self._now_us = now_us
        # By the first byte of the digest. One thread may come twice, as it does in tests.
        self._turns = [threading.RLock() for _ in range(SHARDS)]

    def meeting(self, snapshot: Snapshot, tenant_id: str, measured: Measured) -> Meeting:
        """What a tenant's own copy of these bytes is good for."""
        blob = snapshot.get(Blob, measured.digest)
        if blob is None:
            return Meeting.PLACE
        if not self._trusted(blob, self._now_us(snapshot)):
            return Meeting.HEAL
        if held_by(snapshot, tenant_id, measured.size_bytes, measured.digest):
            return Meeting.LEAVE
        return Meeting.REHEARSE

    def commit(
        self,
        staged: Staged,
        tenant_id: str,
        change: Callable[[Transaction], T],
        *,
        actor: str,
        request_id: str,
    ) -> T:
        """Make staged bytes durable and run `change`, which names them; durable on return.

        Raises what `change` raises; an object that nothing names then is removed again,
        after the answer. Raises CopyUnconfirmed where a copy elsewhere is awaited and does not
        come; the change is made all the same.
        """
        for attempt in range(_ATTEMPTS_MAX):
            # Writers of the same bytes who place over one another, each before the other's
            # transaction, could go on for long: those who lost once take turns.
            with self._turns[staged.digest[0]] if attempt else nullcontext():
                try:
                    made, known = self._attempt(
                        staged, tenant_id, change, actor=actor, request_id=request_id
                    )
                    break
                except Moved:
                    continue
                except BlobDeleting:
                    pass
            self._collector.finish(staged.digest)
        else:
            raise Conflict(f"blob {staged.digest.hex()} was replaced {_ATTEMPTS_MAX} times")
        if self._confirm is not None:
            self._confirm(staged.measured, not known)
        return made

    def _attempt(
        self,
        staged: Staged,
        tenant_id: str,
        change: Callable[[Transaction], T],
        *,
        actor: str,
        request_id: str,
    ) -> tuple[T, bool]:
        """What `change` returned, and whether the tenant had a file of these bytes before (which
        is asked only where a copy is awaited)."""
        with self._catalog.read() as snapshot:
            meeting = self.meeting(snapshot, tenant_id, staged.measured)
            known = self._confirm is None or held_by(
                snapshot, tenant_id, staged.size_bytes, staged.digest
            )
        places = meeting in (Meeting.PLACE, Meeting.HEAL)
        placed: Placed | None = None
        try:
            if meeting is Meeting.HEAL:
                # Whoever reads what the record names must not get torn bytes, even where
                # there are none now.
                staged.sync()
            if places:
                placed = self._blobs.place(staged)
            elif meeting is Meeting.REHEARSE:
                self._blobs.rehearse(staged)
            made = self._write(
                Adopted(staged.measured, placed), change, actor=actor, request_id=request_id
            )
        except (Moved, BlobDeleting):
            raise
        except BaseException:
            if places:
                # Also where placing failed: it may have named what it could not sync.
                self.discard([(staged.digest, staged.seen())])
            raise
        return made, known

    def new_to(self, tenant_id: str, brought: Iterable[Measured]) -> frozenset[Digest]:
        """Of what a batch is about to name, what the tenant had no file of before; asked only
        where a copy is awaited, and empty else."""
        if self._confirm is None:
            return frozenset()
        with self._catalog.read() as snapshot:
            return frozenset(
                one.digest
                for one in brought
                if not held_by(snapshot, tenant_id, one.size_bytes, one.digest)
            )

    def confirm(self, named: Iterable[Measured], anew: Container[Digest] = frozenset()) -> None:
        """Wait for the copies of bytes that are named, those in `anew` sent again whatever is
        there (invariant 9); raises CopyUnconfirmed."""
        confirm = self._confirm
        if confirm is None:
            return
        wanted = {one.digest: one for one in named}
        with ThreadPoolExecutor(min(_CONFIRMED_AT_ONCE, len(wanted) or 1)) as pool:
            for _ in pool.map(lambda one: confirm(one, one.digest in anew), wanted.values()):
                pass

    def commit_known(
        self,
        measured: Measured,
        change: Callable[[Transaction], T],
        *,
        actor: str,
        request_id: str,
    ) -> T:
        """Run `change` over bytes that the store has; raises Moved when it has them no more."""
        try:
            made = self._write(Adopted(measured, None), change, actor=actor, request_id=request_id)
        except BlobDeleting:
            raise Moved from None
        if self._confirm is not None:
            self._confirm(measured, False)
        return made

    def bring_back(self, staged: Staged, *, actor: str) -> bool:
        """Make bytes that were fetched the local ones of their record; durable on return.

        False where no record wants them any more, or good bytes came meanwhile. Raises
        StoreFull, CatalogFailed; nothing is left behind then.
        """
        with self._catalog.read() as snapshot:
            if not self._wanted(snapshot.get(Blob, staged.digest)):
                return False
        staged.sync()  # a record speaks of the name
        try:
            placed = self._blobs.place(staged)
            back = self._catalog.write(
                lambda txn: self._put_back(txn, staged.measured, placed), actor=actor
            )
        except BaseException:
            self.discard([(staged.digest, staged.seen())])
            raise
        if not back:
            self.discard([(staged.digest, placed)])
        return back

    def _put_back(self, txn: Transaction, measured: Measured, placed: Placed) -> bool:
        blob = txn.get(Blob, measured.digest)
        if blob is None or blob.state == DELETING or self._blobs.stat(blob.digest) != placed:
            return False
        txn.replace(_healed(blob, measured, placed, txn.now_us))
        return True

    def _wanted(self, blob: Blob | None) -> bool:
        return blob is not None and blob.state != DELETING and not self.is_here(blob)

    def is_here(self, blob: Blob) -> bool:
        """Whether the object is the one that the record speaks of; says nothing of its bytes."""
        return (
            blob.local
            and blob.missing_at is None
            and self._blobs.stat(blob.digest) == object_of(blob)
        )

    def _write(
        self, adopted: Adopted, change: Callable[[Transaction], T], *, actor: str, request_id: str
    ) -> T:
        def adopt_and_change(txn: Transaction) -> T:
            self.adopt(txn, adopted)
            return change(txn)

        return self._catalog.write(adopt_and_change, actor=actor, request_id=request_id)

    def adopt(self, txn: Transaction, adopted: Adopted) -> None:
        """Inside a transaction: give the bytes a record, heal it or leave it as it is.

        On return files may name them. Raises Moved when the object is neither the own copy
        nor the record's, BlobDeleting while the bytes are being removed.
        """
        measured, placed = adopted.measured, adopted.placed
        blob = txn.get(Blob, measured.digest)
        if blob is not None and blob.state == DELETING:
            raise BlobDeleting(measured.digest.hex())
        seen = self._blobs.stat(measured.digest)
        if placed is None or seen != placed:
            if blob is None or blob.missing_at is not None or seen != object_of(blob):
                raise Moved
            return  # what was met, or another's copy that was adopted meanwhile
        if blob is None:
            # Condemned until something names it, so that one which nothing names is collected.
            txn.insert(
                Blob(
                    measured.digest,
                    measured.size_bytes,
                    measured.blake3,
                    placed.inode,
                    txn.now_us,
                    txn.now_us,
                    state=CONDEMNED,
                    condemned_at=txn.now_us,
                    mtime_ns=placed.mtime_ns,
                )
            )
        else:
            txn.replace(_healed(blob, measured, placed, txn.now_us))

    def discard(self, copies: Iterable[tuple[Digest, Placed]]) -> None:
        """After the answer, remove the objects that this writer placed, where nothing came
        to name them. The answer's time must not tell that they were placed (invariant 9).
        """
        self._blobs.leftovers.add(partial(self._discard, list(copies)))

    def _discard(self, copies: list[tuple[Digest, Placed]]) -> None:
        """Alone, which keeps adopters away and needs no space. One that counted on an object
        finds it gone and comes again with its own bytes.
        """
        remaining = iter(copies)
        while some := list(itertools.islice(remaining, _DISCARDED_AT_ONCE)):

            def unlink(snapshot: Snapshot, some: list[tuple[Digest, Placed]] = some) -> None:
                # Not durably, which would take a sync a folder under the writer lock: an
                # orphan that a power cut brings back harms nobody.
                self._blobs.remove_many(
                    (
                        digest
                        for digest, placed in some
                        if self._nameless(snapshot, digest) and self._blobs.stat(digest) == placed
                    ),
                    durable=False,
                )

            try:
                self._catalog.alone(unlink)
            except (BlobcaskError, OSError):
                # Closed, or broken: scrub removes an orphan after the grace.
                return

    @staticmethod
    def _nameless(snapshot: Snapshot, digest: Digest) -> bool:
        """Whether no record counts on an object of this name."""
        blob = snapshot.get(Blob, digest)
        return blob is None or not blob.local

    def trusts(self, snapshot: Snapshot, digest: Digest) -> bool:
        """Whether the store has these bytes and need not see them again."""
        blob = snapshot.get(Blob, digest)
        return blob is not None and self._trusted(blob, self._now_us(snapshot))

    def _trusted(self, blob: Blob, now_us: int) -> bool:
        return (
            blob.state != DELETING
            and now_us - blob.verified_at <= self._trust_us
            and self.is_here(blob)
        )


def _healed(blob: Blob, measured: Measured, placed: Placed, now_us: int) -> Blob:
    """The record of a blob whose good bytes are here, at `placed`."""
    return msgspec.structs.replace(
        blob,
        inode=placed.inode,
        mtime_ns=placed.mtime_ns,
        size_bytes=placed.size_bytes,
        blake3=measured.blake3,
        verified_at=now_us,
        missing_at=None,
        local=True,
        evicted_at=None,
    )


def object_of(blob: Blob) -> Placed:
    """The file that a blob record speaks of."""
    return Placed(blob.inode, blob.size_bytes, blob.mtime_ns)


def held_by(snapshot: Snapshot, tenant_id: str, size_bytes: int, digest: Digest) -> bool:
    """Whether the tenant itself has a file of these bytes (and so may know it)."""
    return bool(snapshot.range(StoredFile, "content", (tenant_id, size_bytes, digest), limit=1))
