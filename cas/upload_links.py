"""Upload links: an upload as the one sees it who has its token.

The token is the right, and it opens its own upload and nothing else (invariant 9). A slot
holds bytes that arrived; completing judges them by content and makes them files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import msgspec

from cas.adoption import Adoption
from cas.blobs import BlobFiles, Measured, Source
from cas.catalog import Catalog, Snapshot, Transaction
from cas.completions import Completion, completion_of, finish, judge
from cas.content import Content, look_at, look_into
from cas.dating import postponed
from cas.digest import Digest
from cas.durable import SupportsRead
from cas.errors import BlobMissing, NotFound, SlotTaken, UploadClosed
from cas.files import DEFAULT_CONTENT_TYPE
from cas.opening import Opener
from cas.partial_files import PartialFiles
from cas.partials import Partials, Progress, partials_of
from cas.quotas import NO_QUOTA, Quota
from cas.records import COMPLETED, EXPIRED, PENDING, Partial, PendingUpload, UploadFile
from cas.references import check_name
from cas.retention import Retention

FILES_MAX = 1000  # slots of one upload


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say about uploads."""

    default_retention: Retention
    default_expiry_us: int
    limit_bytes: int  # 0: none
    scheme: str
    partial_expiry_us: int
    event_keep_us: int  # for a workflow that asks how it ended later
    quota: Quota = NO_QUOTA


@final
class UploadLink:
    """One upload, opened by its token. Made by `Store.upload_link`; safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobFiles,
        adoption: Adoption,
        policy: Policy,
        upload: PendingUpload,
        *,
        request_id: str,
        partial_files: PartialFiles,
        opener: Opener,
        now_us: Callable[[Snapshot], int],
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._opener = opener
        self._adoption = adoption
        self._policy = policy
        self._quota = policy.quota.untold()
        self._now_us = now_us
        self._request_id = request_id
        self._actor = f"upload:{upload.upload_id}"
        self.upload = upload
        self._partials = Partials(
            catalog,
            partial_files,
            blobs,
            adoption,
            upload,
            limit_bytes=self.size_limit_bytes,
            expiry_us=policy.partial_expiry_us,
            quota=self._quota,
            now_us=now_us,
            pending=self._pending,
            fill=self._fill_from,
            actor=self._actor,
            request_id=request_id,
        )

    @property
    def size_limit_bytes(self) -> int:
        """The longest file a slot takes; 0 is no limit."""
        limits = (self.upload.max_size_bytes, self._policy.limit_bytes)
        return min(filter(None, limits), default=0)

    def slots(self) -> list[UploadFile]:
        """The filled slots, in the order of their index."""
        with self._catalog.read() as snapshot:
            return slots_of(snapshot, self.upload)

    def put(
        self,
        index: int,
        source: Source,
        *,
        filename: str,
        content_type: str | None = None,
        promised_size: int | None = None,
        promised_digest: Digest | None = None,
        only_free: bool = False,
    ) -> UploadFile:
        """Fill slot `index` (0 … max_files-1), or replace what is in it; durable on return.

        Raises UploadClosed, NotFound for a slot that is not there, InvalidName, TooLarge,
        SizeMismatch, DigestMismatch, StoreFull, SlotTaken where it should be `only_free` and
        is filled, or a partial is on its way to it; the slot is as before then.
        """
        check_name(filename)
        self._check_slot(index)
        if self.upload.status != PENDING:
            raise UploadClosed(self.upload.status)
        self._foresee(index, promised_size, only_free=only_free)
        with self._blobs.stage(
            source,
            promised_size=promised_size,
            promised_digest=promised_digest,
            limit_bytes=self.size_limit_bytes,
            sync=False,
        ) as staged:
            measured = staged.measured

            def fill(txn: Transaction) -> UploadFile:
                self._pending(txn)
                if only_free:
                    self._check_free(txn, index)
                return self._fill(
                    txn, index, filename, content_type or DEFAULT_CONTENT_TYPE, measured
                )

            return self._adoption.commit(
                staged,
                # Nobody's own bytes: who has the token may be a stranger, and no work is
                # skipped that would tell him what the tenant has (invariant 9).
                "",
                self._quota.keeping(self.upload.tenant_id, fill),
                actor=self._actor,
                request_id=self._request_id,
            )

    # --- resumable uploads (see `partials`)

    def begin_partial(
        self, index: int | None, filename: str, content_type: str | None, length_bytes: int
    ) -> Progress:
        """Announce a file for slot `index` (None: the first free one) that comes in pieces;
        durable on return. It ends the unfinished one of that slot, if there is one.

        Raises UploadClosed, NotFound for a slot that is not there, InvalidName, TooLarge,
        SlotsTaken, StoreFull.
        """
        check_name(filename)
        if index is not None:
            self._check_slot(index)
        if self.upload.status != PENDING:
            raise UploadClosed(self.upload.status)
        self._admit(index, length_bytes)
        return self._partials.begin(
            index, filename, content_type or DEFAULT_CONTENT_TYPE, length_bytes
        )

    def partials(self) -> list[Progress]:
        """The unfinished ones, oldest first."""
        return self._partials.all()

    def partial(self, partial_id: str) -> Progress:
        """How far it is, finished or not, once a present writer has let go.

        Raises NotFound, PartialExpired, PartialBusy.
        """
        return self._partials.find(partial_id)

    def append(
        self,
        partial_id: str,
        offset: int,
        source: SupportsRead,
        *,
        promised_size: int | None = None,
        promised_digest: bytes | None = None,
    ) -> Progress:
        """Write a piece that begins at `offset`; durable on return. The last one fills the slot.

        See `Partials.append` for what is raised, and what is kept then.
        """
        return self._partials.append(
            partial_id,
            offset,
            source,
            promised_size=promised_size,
            promised_digest=promised_digest,
        )

    def drop_partial(self, partial_id: str) -> None:
        """Give it up, or empty the slot that it filled; raises NotFound, UploadClosed."""
        self._partials.end(partial_id)

    def sweep_partials(self, before: list[Progress]) -> None:
        """After the upload closed: remove the files of what was unfinished `before`."""
        self._partials.remove_files([partial.partial_id for partial in before])

    def empty(self, index: int) -> None:
        """Take the file out of slot `index`; nothing happens to an empty one."""
        self._check_slot(index)

        def change(txn: Transaction) -> None:
            self._pending(txn)
            slot = txn.get(UploadFile, self.upload.upload_id, index)
            if slot is not None:
                txn.delete(slot)

        self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def complete(self) -> Completion:
        """Judge all filled slots and make them files, with the event of it; durable on return.

        The first to complete wins, and includes every slot that is filled at that moment;
        resumable uploads that are not finished then end.
        Raises UploadClosed when it is no longer pending, FilesRefused with a reason for
        each file that is not as asked; the upload stays pending then, so that the person
        can mend it. Raises CopyUnconfirmed where a copy elsewhere is awaited and does not come:
        it stays pending too, and may be completed later.
        """
        while True:
            with self._catalog.read() as snapshot:
                upload = snapshot.get(PendingUpload, self.upload.upload_id) or self.upload
                slots = slots_of(snapshot, upload)
            for status in (self.upload.status, upload.status):
                if status != PENDING:  # nothing to judge: how it ended is the answer
                    raise UploadClosed(status)
            try:
                contents = [self._look(slot) for slot in slots]
            except BlobMissing:
                if self.slots() != slots:
                    continue  # its bytes were replaced and collected while they were looked at
                raise
            judge(upload, slots, contents, self.size_limit_bytes)
            self._confirm(slots)

            def change(
                txn: Transaction,
                slots: list[UploadFile] = slots,
                contents: list[Content] = contents,
            ) -> Completion | None:
                upload = self._pending(txn)
                if slots_of(txn, upload) != slots:
                    return None  # a slot changed while its content was judged
                return finish(
                    txn,
                    upload,
                    slots,
                    contents,
                    actor=self._actor,
                    scheme=self._policy.scheme,
                    keep_us=self._policy.event_keep_us,
                )

            unfinished = self.partials()
            done = self._catalog.write(
                self._quota.keeping(upload.tenant_id, change),
                actor=self._actor,
                request_id=self._request_id,
            )
            if done is not None:
                self.sweep_partials(unfinished)
                return done

    def completion(self) -> Completion:
        """What the upload was completed with; raises UploadClosed when it was not."""
        with self._catalog.read() as snapshot:
            upload = snapshot.get(PendingUpload, self.upload.upload_id) or self.upload
            if upload.status != COMPLETED:
                # That it expired may be what only the clock says so far.
                ended = upload if upload.status != PENDING else self.upload
                raise UploadClosed(ended.status)
            return completion_of(snapshot, upload, slots_of(snapshot, upload))

    def _fill(
        self,
        txn: Transaction,
        index: int,
        filename: str,
        content_type: str,
        measured: Measured,
        partial_id: str | None = None,
    ) -> UploadFile:
        slot = UploadFile(
            self.upload.upload_id,
            index,
            filename,
            content_type,
            measured.size_bytes,
            measured.digest,
            txn.now_us,
            partial_id=partial_id,
            tenant_id=self.upload.tenant_id,
        )
        if txn.get(UploadFile, self.upload.upload_id, index) is None:
            txn.insert(slot)
        else:
            txn.replace(slot)
        return slot

    def _foresee(self, index: int, promised_size: int | None, *, only_free: bool) -> None:
        """Refuse before the body is read what would be refused when it has come."""
        with self._catalog.read() as snapshot:
            self._pending_at(snapshot, self._now_us(snapshot))
            if only_free:
                self._check_free(snapshot, index)
        if promised_size is not None:
            self._admit(index, promised_size)

    def _admit(self, index: int | None, size_bytes: int) -> None:
        """Refuse a body that the tenant has no room for before it is read."""
        if not self._quota:
            return
        with self._catalog.read() as snapshot:
            slots = [slot for slot in slots_of(snapshot, self.upload) if slot.file_index == index]
            partials = [
                partial
                for partial in partials_of(snapshot, self.upload.upload_id)
                if partial.file_index == index
            ]
            replaced_bytes = sum(slot.size_bytes for slot in slots)
            replaced_bytes += sum(partial.offset_bytes for partial in partials)
            self._quota.admit(
                snapshot,
                self.upload.tenant_id,
                files=0 if slots else 1,
                size_bytes=size_bytes - replaced_bytes,
            )

    def _fill_from(self, txn: Transaction, partial: Partial, measured: Measured) -> UploadFile:
        return self._fill(
            txn,
            partial.file_index,
            partial.filename,
            partial.content_type,
            measured,
            partial.partial_id,
        )

    def _confirm(self, slots: list[UploadFile]) -> None:
        """Nothing is acknowledged that is not where it must be: a slot is filled before its copy
        is awaited, so a filled one proves nothing. Only this waits again, where it was in vain."""
        self._adoption.confirm(
            Measured(slot.checksum_sha256, slot.size_bytes)
            for slot in slots
            if slot.checksum_sha256 is not None
        )

    def _look(self, slot: UploadFile) -> Content:
        if slot.checksum_sha256 is None:
            raise UploadClosed(COMPLETED)
        try:
            return look_at(self._blobs.path(slot.checksum_sha256))
        except FileNotFoundError:  # evicted, perhaps
            with self._opener.stream(slot.checksum_sha256, slot.size_bytes) as stream:
                return look_into(stream, slot.size_bytes)

    def _check_slot(self, index: int) -> None:
        if not 0 <= index < self.upload.max_files:
            raise NotFound("slot", str(index))

    def _check_free(self, snapshot: Snapshot, index: int) -> None:
        claimed = partials_of(snapshot, self.upload.upload_id)
        filled = snapshot.get(UploadFile, self.upload.upload_id, index) is not None
        if filled or any(partial.file_index == index for partial in claimed):
            raise SlotTaken(index)

    def _pending(self, txn: Transaction) -> PendingUpload:
        """The upload as it is in this transaction; raises UploadClosed unless pending."""
        return self._pending_at(txn, txn.now_us)

    def _pending_at(self, snapshot: Snapshot, now_us: int) -> PendingUpload:
        upload = snapshot.get(PendingUpload, self.upload.upload_id)
        if upload is None:
            raise NotFound("upload", self.upload.upload_token)
        upload = as_of(upload, now_us)
        if upload.status != PENDING:
            raise UploadClosed(upload.status)
        return upload


def upload_behind(snapshot: Snapshot, token: str) -> PendingUpload | None:
    """The upload that a token opens, or None, which takes as long to find (invariant 9).

    Read is the record of this token or, where there is none, of the last one before it:
    the same work, and pages of the index that are as likely to be on the disk only.
    """
    nearest = snapshot.range(
        PendingUpload, "upload_token", before=(f"{token}\0",), limit=1, reverse=True
    )
    return next((upload for upload in nearest if upload.upload_token == token), None)


def slots_of(snapshot: Snapshot, upload: PendingUpload) -> list[UploadFile]:
    """The filled slots of an upload, in the order of their index."""
    return snapshot.range(UploadFile, "", (upload.upload_id,), limit=FILES_MAX)


def as_of(upload: PendingUpload, now_us: int) -> PendingUpload:
    """The upload as it is at `now_us`: one past its time is expired before the sweep says so."""
    upload = postponed(upload, now_us)
    if upload.status == PENDING and upload.expires_at <= now_us:
        return msgspec.structs.replace(upload, status=EXPIRED)
    return upload
