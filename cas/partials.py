"""Partials: the bytes of resumable uploads, until they are whole and fill their slot.

    ROOT/partial/<partial_id>    what has come so far, and perhaps more than is recorded

    begin     record the partial; its file is made by the first piece
    append    write → fdatasync → record the offset; only then it is answered (invariant 4)
    fill      at the last byte: copy the bytes into a blob, then in one transaction fill the
              slot and end the record; then remove the file

What is recorded is what counts: bytes behind the recorded offset are cut off before the
next piece is written. An offset equal to the length is never recorded: whoever hears that
all is there hears it from the slot, which remembers the partial that filled it. So a sender
that lost the last answer is told the truth, and nobody is told "complete" too early.

See `partial_files` for the files, `pieces` for what one request brings, `takeover` for what
happens when two come at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, final

import msgspec

from cas.adoption import Adoption
from cas.blobs import BlobFiles, Measured
from cas.catalog import Catalog, Snapshot, Transaction
from cas.dating import postponed
from cas.durable import SupportsRead
from cas.errors import NotFound, OffsetMismatch, PartialExpired, SlotsTaken, TooLarge
from cas.identifiers import new_id
from cas.partial_files import PartialFiles
from cas.pieces import Piece
from cas.quotas import Quota
from cas.records import Partial, PendingUpload, UploadFile

T = TypeVar("T")

_log = logging.getLogger(__name__)

PARTIALS_MAX = 1000  # of one upload: no more than it has slots

# Less is sent again sooner than an additional sync and commit would take.
_WORTH_RECORDING_BYTES = 1 << 20


@final
class Progress(msgspec.Struct, frozen=True):
    """How far a resumable upload is. `offset_bytes` are durable; all of them: it fills its slot."""

    partial_id: str
    index: int
    filename: str
    content_type: str
    length_bytes: int
    offset_bytes: int
    expires_at: int | None  # µs; None when it is finished

    @property
    def finished(self) -> bool:
        return self.offset_bytes == self.length_bytes

    @classmethod
    def of(cls, partial: Partial) -> Progress:
        return cls(
            partial.partial_id,
            partial.file_index,
            partial.filename,
            partial.content_type,
            partial.length_bytes,
            partial.offset_bytes,
            partial.expires_at,
        )


@final
class Partials:
    """The resumable uploads of one upload. Made by `UploadLink`; safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        files: PartialFiles,
        blobs: BlobFiles,
        adoption: Adoption,
        upload: PendingUpload,
        *,
        limit_bytes: int,
        expiry_us: int,
        quota: Quota,
        now_us: Callable[[Snapshot], int],
        pending: Callable[[Transaction], PendingUpload],
        fill: Callable[[Transaction, Partial, Measured], UploadFile],
        actor: str,
        request_id: str,
    ) -> None:
        """`pending` raises unless the upload is; `fill` puts bytes into the slot of a partial."""
        self._catalog = catalog
        self._files = files
        self._blobs = blobs
        self._adoption = adoption
        self._upload = upload
        self._limit_bytes = limit_bytes
        self._expiry_us = expiry_us
        self._quota = quota
        self._now_us = now_us
        self._pending = pending
        self._fill = fill
        self._actor = actor
        self._request_id = request_id

    # --- beginning and ending

    def begin(
        self, index: int | None, filename: str, content_type: str, length_bytes: int
    ) -> Progress:
        """Announce `length_bytes` for slot `index`, or for the first free one; durable on return.

        The slot's earlier partial ends. Without bytes to come the slot is filled at once.
        Raises TooLarge, SlotsTaken, StoreFull where there is no room for the bytes and the
        copy that is made of them in the end.
        """
        if self._limit_bytes and length_bytes > self._limit_bytes:
            raise TooLarge(self._limit_bytes)
        self._blobs.need_room(2 * length_bytes)

        def claim(txn: Transaction) -> tuple[Partial, list[str]]:
            upload = self._pending(txn)
            present = partials_of(txn, upload.upload_id)
            at = _free_slot(txn, upload, present) if index is None else index
            replaced = [partial for partial in present if partial.file_index == at]
            for partial in replaced:
                txn.delete(partial)
            claimed = Partial(
                new_id(txn.now_us),
                upload.upload_id,
                upload.tenant_id,
                at,
                filename,
                content_type,
                length_bytes,
                0,
                txn.now_us,
                self._expires_at(txn, upload),
                None if txn.believed else txn.now_us,
            )
            return claimed, [partial.partial_id for partial in replaced]

        if length_bytes == 0:
            return self._begin_and_end(claim)

        def insert(txn: Transaction) -> tuple[Partial, list[str]]:
            claimed, replaced = claim(txn)
            txn.insert(claimed)
            return claimed, replaced

        begun, replaced = self._write(insert)
        self.remove_files(replaced)
        return Progress.of(begun)

    def end(self, partial_id: str) -> None:
        """Give the partial up, or empty the slot that it filled; durable on return.

        Raises NotFound, UploadClosed.
        """

        def change(txn: Transaction) -> None:
            self._pending(txn)
            partial = self._own(txn, partial_id)
            slot = None if partial else self._filled_by(txn, partial_id)
            if partial is None and slot is None:
                raise NotFound("partial", partial_id)
            for record in (partial, slot):
                if record is not None:
                    txn.delete(record)

        self._write(change)
        self.remove_files([partial_id])

    def remove_files(self, partial_ids: list[str]) -> None:
        """Remove the files of partials whose records are gone; an error leaves leftovers."""
        for partial_id in partial_ids:
            with suppress(OSError):
                self._files.remove(partial_id)

    # --- looking

    def all(self) -> list[Progress]:
        """The unfinished partials, oldest first."""
        with self._catalog.read() as snapshot:
            return [Progress.of(each) for each in partials_of(snapshot, self._upload.upload_id)]

    def find(self, partial_id: str) -> Progress:
        """How far a partial is, whose sender means to go on: a present writer lets go first,
        so that what it received is counted.

        Raises NotFound, PartialExpired, PartialBusy.
        """
        found = self._find(partial_id)
        if found.finished:
            return found
        with suppress(FileNotFoundError), self._files.held(partial_id, make=False):
            pass
        return self._find(partial_id)

    def _find(self, partial_id: str) -> Progress:
        with self._catalog.read() as snapshot:
            partial = self._own(snapshot, partial_id)
            if partial is not None:
                now_us = self._now_us(snapshot)
                partial = postponed(partial, now_us)
                if partial.expires_at <= now_us:
                    raise PartialExpired
                return Progress.of(partial)
            slot = self._filled_by(snapshot, partial_id)
        if slot is None:
            raise NotFound("partial", partial_id)
        return _finished(slot)

    # --- appending

    def append(
        self,
        partial_id: str,
        offset: int,
        source: SupportsRead,
        *,
        promised_size: int | None = None,
        promised_digest: bytes | None = None,
    ) -> Progress:
        """Write what `source` brings at `offset`; durable on return, and at the last byte the
        slot is filled.

        When the source fails, what it brought until then is kept and the error raised;
        unless a digest was promised, for then nothing is kept that was not checked.

        Raises NotFound, PartialExpired, UploadClosed, OffsetMismatch, TooLarge (before a
        byte is read where `promised_size` tells; else what was recorded until then stays),
        ChecksumMismatch (nothing of the piece is kept), StoreFull and QuotaExceeded (the
        recorded offset stays), PartialBusy, PartialTaken when a later writer asked for the
        partial.
        """
        found = self._find(partial_id)
        if found.finished:
            return self._nothing_more(found, offset, source, promised_size)
        with self._files.held(partial_id, make=True) as fd:
            partial = self._recorded(partial_id, fd)
            if partial is None:  # finished or ended while this one waited for its turn
                self.remove_files([partial_id])
                return self._nothing_more(self._find(partial_id), offset, source, promised_size)
            if offset != partial.offset_bytes:
                raise OffsetMismatch(partial.offset_bytes, offset)
            if promised_size is not None and offset + promised_size > partial.length_bytes:
                raise TooLarge(partial.length_bytes - offset)
            self._blobs.need_room(promised_size or 0)
            piece = Piece(
                fd, partial, disk=self._files.disk, blobs=self._blobs, record=self._record
            )
            with self._files.takeovers.reading(fd, source) as writer:
                piece.receive(
                    source, writer, promised_size=promised_size, promised_digest=promised_digest
                )
            return self._finish(piece) if piece.whole else Progress.of(piece.keep())

    def _record(self, partial: Partial, offset_bytes: int) -> Partial:
        """Write down that `offset_bytes` are durable; raises NotFound when the partial ended."""

        def advance(txn: Transaction) -> Partial:
            upload = self._pending(txn)
            found = txn.get(Partial, partial.partial_id)
            # Dating may have changed it meanwhile, but nobody else moves it.
            if found is None or found.offset_bytes != partial.offset_bytes:
                raise NotFound("partial", partial.partial_id)
            moved = msgspec.structs.replace(
                partial,
                offset_bytes=offset_bytes,
                expires_at=self._expires_at(txn, upload),
                undated_at=None if txn.believed else txn.now_us,
            )
            txn.replace(moved)
            return moved

        if partial.offset_bytes == 0:
            self._files.sync_name()
        return self._write(self._quota.keeping(self._upload.tenant_id, advance))

    def _recorded(self, partial_id: str, fd: int) -> Partial | None:
        """The record of a partial whose file this one holds, the file cut to its offset.

        A file that is shorter has lost bytes that were recorded: then nothing of it is good.
        """
        with self._catalog.read() as snapshot:
            partial = self._own(snapshot, partial_id)
        if partial is None:
            return None
        size_bytes = os.fstat(fd).st_size
        if size_bytes < partial.offset_bytes:
            _log.warning(
                "%s of %s bytes of partial %s are gone; it ends",
                partial.offset_bytes - size_bytes,
                partial.offset_bytes,
                partial_id,
            )
            self.end(partial_id)
            return None
        if size_bytes > partial.offset_bytes:
            self._files.disk.truncate(fd, partial.offset_bytes)
        return partial

    def _finish(self, piece: Piece) -> Progress:
        """Copy the whole into a blob and fill the slot with it."""
        length_bytes = piece.partial.length_bytes
        if length_bytes - piece.partial.offset_bytes > _WORTH_RECORDING_BYTES:
            # All but one byte, since only the slot may say "all": a kill while a large file
            # is copied costs its sender that one byte.
            piece.keep(length_bytes - 1)
        partial = piece.partial

        def fill(txn: Transaction) -> UploadFile:
            self._pending(txn)
            current = txn.get(Partial, partial.partial_id)
            if current is None:
                raise NotFound("partial", partial.partial_id)
            txn.delete(current)
            return self._fill(txn, partial, staged.measured)

        os.lseek(piece.fd, 0, os.SEEK_SET)
        with (
            open(piece.fd, "rb", buffering=0, closefd=False) as stream,
            self._blobs.stage(stream, promised_size=length_bytes, sync=False) as staged,
        ):
            slot = self._adoption.commit(
                staged,
                "",
                self._quota.keeping(self._upload.tenant_id, fill),
                actor=self._actor,
                request_id=self._request_id,
            )
        self.remove_files([partial.partial_id])
        return _finished(slot)

    def _begin_and_end(self, claim: Callable[[Transaction], tuple[Partial, list[str]]]) -> Progress:
        """The whole life of a partial without bytes."""
        with self._blobs.stage(b"", sync=False) as staged:

            def fill(txn: Transaction) -> tuple[UploadFile, list[str]]:
                partial, replaced = claim(txn)
                return self._fill(txn, partial, staged.measured), replaced

            slot, replaced = self._adoption.commit(
                staged,
                "",
                self._quota.keeping(self._upload.tenant_id, fill),
                actor=self._actor,
                request_id=self._request_id,
            )
        self.remove_files(replaced)
        return _finished(slot)

    def _nothing_more(
        self, finished: Progress, offset: int, source: SupportsRead, promised_size: int | None
    ) -> Progress:
        """A piece for what is complete may only be an empty one, at its end."""
        if offset != finished.offset_bytes:
            raise OffsetMismatch(finished.offset_bytes, offset)
        if promised_size or (promised_size is None and source.readinto(memoryview(bytearray(1)))):
            raise TooLarge(0)
        return finished

    # --- records

    def _own(self, snapshot: Snapshot, partial_id: str) -> Partial | None:
        # By the index: what is another upload's is not even read, so that it takes no longer
        # than what is nowhere (invariant 9).
        found = snapshot.range(Partial, "upload", (self._upload.upload_id, partial_id), limit=1)
        return found[0] if found else None

    def _filled_by(self, snapshot: Snapshot, partial_id: str) -> UploadFile | None:
        slots = snapshot.range(UploadFile, "", (self._upload.upload_id,), limit=PARTIALS_MAX)
        return next((slot for slot in slots if slot.partial_id == partial_id), None)

    def _expires_at(self, txn: Transaction, upload: PendingUpload) -> int:
        return min(txn.now_us + self._expiry_us, upload.expires_at)

    def _write(self, change: Callable[[Transaction], T]) -> T:
        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)


def partials_of(snapshot: Snapshot, upload_id: str) -> list[Partial]:
    """The unfinished partials of an upload, oldest first."""
    return snapshot.range(Partial, "upload", (upload_id,), limit=PARTIALS_MAX)


def drop_partials(txn: Transaction, upload_id: str) -> None:
    """End all unfinished partials of an upload that closes; their files go after."""
    for partial in partials_of(txn, upload_id):
        txn.delete(partial)


def _free_slot(txn: Transaction, upload: PendingUpload, present: list[Partial]) -> int:
    """The first slot that is neither filled nor claimed; else the one whose claim is oldest,
    for a sender that never heard where its first attempt began must not be locked out."""
    slots = txn.range(UploadFile, "", (upload.upload_id,), limit=PARTIALS_MAX)
    filled = {slot.file_index for slot in slots}
    claimed = {partial.file_index for partial in present}
    for index in range(upload.max_files):
        if index not in filled | claimed:
            return index
    waiting = [partial for partial in present if partial.file_index not in filled]
    if not waiting:
        raise SlotsTaken(upload.max_files)
    return min(waiting, key=lambda partial: partial.expires_at).file_index


def _finished(slot: UploadFile) -> Progress:
    return Progress(
        slot.partial_id or "",
        slot.file_index,
        slot.filename,
        slot.content_type,
        slot.size_bytes,
        slot.size_bytes,
        None,
    )
