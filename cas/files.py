"""Files: a tenant's named records of blobs.

`Files` is the tenant's view: it holds the tenant's identifier, and every query it makes
begins with it, so that another tenant's file is as absent as an unknown one (invariant 9).
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

import msgspec

from cas.adoption import Adopted, Adoption, Moved, held_by
from cas.blobs import BlobFiles, Measured, Meeting, Seekable, Source
from cas.catalog import Catalog, Snapshot, Transaction
from cas.dating import kept_for, term_of
from cas.digest import Digest
from cas.errors import (
    BlobDeleting,
    DigestMismatch,
    Held,
    NotFound,
    SizeMismatch,
    TooLarge,
)
from cas.identifiers import new_id
from cas.listing import Page, newest
from cas.opening import Opener
from cas.quotas import Quota, usage_of
from cas.records import StoredFile, Usage
from cas.references import DIRECT_RUN, Reference, check_name, check_segment, extension_of
from cas.retention import Retention

T = TypeVar("T")

_STRETCH_FILES = 20_000  # of a batch, that share one durability barrier
_STRETCH_BYTES = 256 << 20  # of sources in memory: a longer batch has more barriers
_BATCH_WRITE = 1000  # files of a batch that share one frame: about 1 MB of journal
DEFAULT_CONTENT_TYPE = "application/octet-stream"


@final
@dataclass(frozen=True, slots=True)
class PutItem:
    """One file of a batch; see `Files.put` for the fields."""

    source: Source
    name: str
    filename: str | None = None
    content_type: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Naming:
    """How bytes are to be named once they are there; all parts are checked."""

    tenant_id: str
    run: str
    name: str
    filename: str | None
    content_type: str
    extension: str
    retention: Retention
    actor: str
    scheme: str

    def record(self, txn: Transaction, measured: Measured) -> StoredFile:
        """Inside a transaction: the file record, new or found.

        The same bytes in one tenant, run and extension are the same file: idempotent, with
        the longer retention.
        """
        reference = str(
            Reference(self.tenant_id, self.run, measured.digest, self.extension, scheme=self.scheme)
        )
        term = self.retention.term(txn.now_us, believed=txn.believed)
        found = txn.find(StoredFile, "storage_ref", reference)
        if found is not None:
            before = term_of(found)
            longer = before.longer(term)
            if longer != before:
                found = kept_for(found, longer)
                txn.replace(found)
            return found
        file = StoredFile(
            file_id=new_id(txn.now_us),
            tenant_id=self.tenant_id,
            workflow_run_id=self.run,
            storage_ref=reference,
            name=self.name,
            original_filename=self.filename,
            content_type=self.content_type,
            size_bytes=measured.size_bytes,
            checksum_sha256=measured.digest,
            retention_policy=term.retention_policy,
            expires_at=term.expires_at,
            created_at=txn.now_us,
            created_by=self.actor,
            undated_at=term.undated_at,
        )
        txn.insert(file)
        return file


@final
@dataclass(frozen=True, slots=True)
class _Prepared:
    """One file of a batch whose bytes are on disk and not yet named."""

    item: PutItem
    begin: int  # where its source stood, should it be read again
    naming: Naming
    adopted: Adopted


@final
class Files:
    """The files of one tenant. Made by `Store.files`; safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobFiles,
        adoption: Adoption,
        opener: Opener,
        *,
        tenant_id: str,
        actor: str,
        request_id: str,
        scheme: str,
        default_retention: Retention,
        limit_bytes: int,
        quota: Quota,
        now_us: Callable[[Snapshot], int],
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._adoption = adoption
        self._opener = opener
        self._quota = quota
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id
        self._scheme = scheme
        self._default_retention = default_retention
        self._limit_bytes = limit_bytes
        self._now_us = now_us

    # --- storing

    def put(
        self,
        source: Source,
        *,
        name: str,
        run: str = DIRECT_RUN,
        filename: str | None = None,
        content_type: str | None = None,
        retention: Retention | None = None,
        promised_size: int | None = None,
        promised_digest: Digest | None = None,
        limit_bytes: int = 0,
    ) -> StoredFile:
        """Store a source to its end; bytes and record are durable on return (invariant 4).

        The same bytes again (in this run, with this extension) are the same file. A path or
        seekable stream of a length that the tenant has files of is hashed first, and not
        written when the tenant holds it. `limit_bytes` 0 leaves the store's own limit.

        Raises InvalidName, TooLarge, SizeMismatch, DigestMismatch, StoreFull, CatalogFailed,
        QuotaExceeded (before the source is read, where its length is known), and whatever
        reading the source raises; nothing is kept then. Raises CopyUnconfirmed where a copy
        elsewhere is awaited and does not come: the file is stored then, not acknowledged.
        """
        naming = self._naming(name, run, filename, content_type, retention)
        limit = min(filter(None, (limit_bytes, self._limit_bytes)), default=0)
        size_bytes = _length(source)
        self._admit(promised_size if size_bytes is None else size_bytes)
        known = self._already_held(source, promised_size, promised_digest, limit)
        if known is not None:
            try:
                return self._adoption.commit_known(
                    known,
                    self._naming_within_quota(naming, known),
                    actor=self._actor,
                    request_id=self._request_id,
                )
            except Moved:
                pass  # collected or replaced meanwhile: the source brings the bytes again
        with self._blobs.stage(
            source,
            promised_size=promised_size,
            promised_digest=promised_digest,
            limit_bytes=limit,
            sync=False,
        ) as staged:
            return self._adoption.commit(
                staged,
                self._tenant_id,
                self._naming_within_quota(naming, staged.measured),
                actor=self._actor,
                request_id=self._request_id,
            )

    def _admit(self, size_bytes: int | None) -> None:
        """Refuse bytes that the tenant has no room for before they are read.

        Those of a length that the tenant has already may be a file already, which takes no
        room: only the transaction can tell.
        """
        if size_bytes is None or not self._quota:
            return
        with self._catalog.read() as snapshot:
            same = snapshot.range(StoredFile, "content", (self._tenant_id, size_bytes), limit=1)
            if not same:
                self._quota.admit(snapshot, self._tenant_id, files=1, size_bytes=size_bytes)

    def _naming_within_quota(
        self, naming: Naming, measured: Measured
    ) -> Callable[[Transaction], StoredFile]:
        return self._quota.keeping(self._tenant_id, lambda txn: naming.record(txn, measured))

    def _already_held(
        self,
        source: Source,
        promised_size: int | None,
        promised_digest: Digest | None,
        limit_bytes: int,
    ) -> Measured | None:
        """What a seekable source holds, when this tenant has a file of the same bytes.

        Only a length that the tenant has already is worth the reading; this asks nothing
        of other tenants (invariant 9).
        """
        size_bytes = _length(source)
        if size_bytes is None:
            return None
        with self._catalog.read() as snapshot:
            if not snapshot.range(StoredFile, "content", (self._tenant_id, size_bytes), limit=1):
                return None
        if limit_bytes and size_bytes > limit_bytes:
            raise TooLarge(limit_bytes)
        if promised_size is not None and promised_size != size_bytes:
            raise SizeMismatch(promised_size, size_bytes)
        measured = self._blobs.measure(_seekable(source))
        if promised_digest is not None and promised_digest != measured.digest:
            raise DigestMismatch(promised_digest.hex(), measured.digest.hex())
        with self._catalog.read() as snapshot:
            held = held_by(snapshot, self._tenant_id, measured.size_bytes, measured.digest)
            trusted = held and self._adoption.trusts(snapshot, measured.digest)
        return measured if trusted else None

    def put_many(
        self,
        items: Iterable[PutItem],
        *,
        run: str = DIRECT_RUN,
        retention: Retention | None = None,
    ) -> list[StoredFile]:
        """Store many files with one durability barrier (one for each 20,000 files or 256 MiB
        in memory); all are durable on return.

        Sources are bytes, paths or seekable streams: one that meets another writer at the
        same bytes is read again. Records come in the order of the items. An error raises at
        once; files of earlier items may then be stored or not. Raises what `put` raises.
        """
        files: list[StoredFile] = []
        for stretch in _stretches(items):
            files += self._put_stretch(stretch, run, retention)
        return files

    def _put_stretch(
        self, items: list[PutItem], run: str, retention: Retention | None
    ) -> list[StoredFile]:
        prepared: list[_Prepared] = []
        files: list[StoredFile] = []
        try:
            with self._blobs.batch() as batch:
                for item in items:
                    naming = self._naming(
                        item.name, run, item.filename, item.content_type, retention
                    )
                    begin = _position(item.source)
                    measured, placed = batch.store(
                        item.source, self._meet, limit_bytes=self._limit_bytes
                    )
                    prepared.append(_Prepared(item, begin, naming, Adopted(measured, placed)))
                batch.sync()
                for chunk in _chunks(prepared, _BATCH_WRITE):
                    brought = [one.adopted.measured for one in chunk]
                    new = self._adoption.new_to(self._tenant_id, brought)
                    files += self._name_chunk(chunk, run, retention)
                    self._adoption.confirm(brought, new)
        except BaseException:
            # What no record came to name would fill a full disk until the scrub.
            self._adoption.discard(
                (one.adopted.measured.digest, one.adopted.placed)
                for one in prepared
                if one.adopted.placed is not None
            )
            raise
        return files

    def _meet(self, measured: Measured) -> Meeting:
        # A snapshot of its own: one for the whole batch would pin index pages for as long
        # as the sources take to be read.
        with self._catalog.read() as snapshot:
            return self._adoption.meeting(snapshot, self._tenant_id, measured)

    def _name_chunk(
        self, chunk: list[_Prepared], run: str, retention: Retention | None
    ) -> list[StoredFile]:
        def name_all(txn: Transaction) -> list[StoredFile | None]:
            made: list[StoredFile | None] = []
            for one in chunk:
                try:
                    self._adoption.adopt(txn, one.adopted)
                except (Moved, BlobDeleting):
                    made.append(None)
                else:
                    made.append(one.naming.record(txn, one.adopted.measured))
            return made

        made = self._catalog.write(
            self._quota.keeping(self._tenant_id, name_all),
            actor=self._actor,
            request_id=self._request_id,
        )
        return [
            file
            if file is not None
            # Somebody else was at these bytes in between: alone, with all the care of `put`.
            else self.put(
                _again(one.item.source, one.begin),
                name=one.item.name,
                run=run,
                filename=one.item.filename,
                content_type=one.item.content_type,
                retention=retention,
            )
            for file, one in zip(made, chunk, strict=True)
        ]

    def _naming(
        self,
        name: str,
        run: str,
        filename: str | None,
        content_type: str | None,
        retention: Retention | None,
    ) -> Naming:
        return Naming(
            self._tenant_id,
            check_segment(run, "run"),
            check_name(name),
            None if filename is None else check_name(filename),
            content_type or DEFAULT_CONTENT_TYPE,
            extension_of(filename, content_type),
            retention or self._default_retention,
            self._actor,
            self._scheme,
        )

    # --- what is stored

    def usage(self) -> Usage:
        """What the tenant stores: files, filled slots, and what resumable uploads brought."""
        with self._catalog.read() as snapshot:
            return usage_of(snapshot, self._tenant_id)

    def stat(self, reference: Reference) -> StoredFile:
        """The record; raises NotFound for the unknown, the expired and the foreign alike."""
        with self._catalog.read() as snapshot:
            return self._own(snapshot, reference, self._now_us(snapshot))

    def open(self, reference: Reference) -> tuple[StoredFile, int]:
        """The record and a read-only descriptor of bytes that are here, the caller's to close.

        Raises NotFound, BlobMissing, BlobDamaged (another length than the record's).
        """
        file = self.stat(reference)
        return file, self._opener.here(file.checksum_sha256, file.size_bytes)

    def reader(self, reference: Reference) -> tuple[StoredFile, io.RawIOBase]:
        """The record and a stream of the bytes, here or as they come from a target.

        The stream is the caller's to close. Raises what `open` does, and BlobElsewhere, which
        reading may raise too.
        """
        file = self.stat(reference)
        return file, self._opener.stream(file.checksum_sha256, file.size_bytes)

    def list(
        self,
        *,
        run: str | None = None,
        name: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page[StoredFile]:
        """A page of files, newest first; costs what the page holds, however much is stored."""
        index = {
            (False, False): "tenant",
            (True, False): "run",
            (False, True): "name",
            (True, True): "run_name",
        }[run is not None, name is not None]
        prefix = (self._tenant_id, *(wanted for wanted in (run, name) if wanted is not None))
        with self._catalog.read() as snapshot:
            now_us = self._now_us(snapshot)
            page = newest(snapshot, StoredFile, index, prefix, cursor, limit)
        shown = [file for file in page.items if not _expired(file, now_us)]
        return Page(shown, page.next_cursor)

    # --- changing

    def delete(self, reference: Reference) -> None:
        """Forget the file; its bytes go when nothing names them and the grace is over.

        Raises NotFound, Held.
        """

        def forget(txn: Transaction) -> None:
            file = self._own(txn, reference, now_us=0)
            if file.hold:
                raise Held(file.storage_ref)
            txn.delete(file)

        self._catalog.write(forget, actor=self._actor, request_id=self._request_id)

    def hold(self, reference: Reference, on: bool) -> StoredFile:
        """Set or lift the legal hold: while it is on, nothing deletes the file."""

        def change(txn: Transaction) -> StoredFile:
            file = msgspec.structs.replace(self._own(txn, reference, now_us=0), hold=on)
            txn.replace(file)
            return file

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def _own(self, snapshot: Snapshot, reference: Reference, now_us: int) -> StoredFile:
        file = None
        if reference.tenant_id == self._tenant_id:
            # A foreign reference is not even looked up: its time is that of an unknown one.
            file = snapshot.find(StoredFile, "storage_ref", str(reference))
        if file is None or file.tenant_id != self._tenant_id or _expired(file, now_us):
            raise NotFound("file", str(reference))
        return file


def _expired(file: StoredFile, now_us: int) -> bool:
    return file.expires_at is not None and file.expires_at <= now_us and not file.hold


def _length(source: Source) -> int | None:
    """How many bytes a source that can be read twice holds; None for streams."""
    if isinstance(source, bytes | bytearray | memoryview):
        return memoryview(source).nbytes
    if isinstance(source, Path):
        return source.stat().st_size if source.is_file() else None
    if isinstance(source, io.IOBase) and source.seekable():
        position = source.tell()
        try:
            return source.seek(0, os.SEEK_END) - position
        finally:
            source.seek(position)
    return None


def _seekable(source: Source) -> Path | Seekable:
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    assert isinstance(source, Path | io.IOBase)
    return source


def _position(source: Source) -> int:
    """Where a stream stands; 0 for what has no position."""
    return source.tell() if isinstance(source, io.IOBase) and source.seekable() else 0


def _again(source: Source, begin: int) -> Source:
    """The source, to be read a second time from where it began."""
    if isinstance(source, io.IOBase):
        source.seek(begin)
    return source


def _stretches(items: Iterable[PutItem]) -> Iterator[list[PutItem]]:
    """The items in stretches that share a barrier, so that memory is bounded for any batch."""
    stretch: list[PutItem] = []
    held_bytes = 0
    for item in items:
        stretch.append(item)
        if isinstance(item.source, bytes | bytearray | memoryview):
            held_bytes += memoryview(item.source).nbytes
        if len(stretch) >= _STRETCH_FILES or held_bytes >= _STRETCH_BYTES:
            yield stretch
            stretch, held_bytes = [], 0
    if stretch:
        yield stretch


def _chunks(items: Iterable[T], size: int) -> Iterable[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
