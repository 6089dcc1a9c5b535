"""Uploads: a request for files from a person, its slots, and how it ends.

    pending → completed | cancelled | expired

`Uploads` is a tenant's view (request, list, cancel). `UploadLink` is what the token opens:
the token is the right, and it opens its own upload and nothing else (invariant 9). A slot
holds bytes that arrived; completing judges them by content and makes them files.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict, final
from urllib.parse import urlsplit

import msgspec

from cas.adoption import Adoption
from cas.blobs import BlobFiles, Measured, Source
from cas.catalog import Catalog, Snapshot, Transaction
from cas.clock import SECOND_US, rfc3339
from cas.content import Content, look_at, look_into
from cas.dating import postponed
from cas.deliveries import CALLBACK, enqueue
from cas.digest import Digest
from cas.durable import SupportsRead
from cas.errors import (
    BlobMissing,
    FilesRefused,
    InvalidRequest,
    NotFound,
    RecordExists,
    SlotTaken,
    UploadClosed,
)
from cas.events import REMEMBERED_US, append_event
from cas.files import DEFAULT_CONTENT_TYPE, Naming
from cas.identifiers import new_id
from cas.listing import Page, newest
from cas.once import OnceKey, once
from cas.opening import Opener
from cas.partial_files import PartialFiles
from cas.partials import Partials, Progress, drop_partials, partials_of
from cas.quotas import NO_QUOTA, Quota
from cas.records import (
    CANCELLED,
    COMPLETED,
    EXPIRED,
    PENDING,
    Partial,
    PendingUpload,
    StoredFile,
    UploadFile,
)
from cas.references import DIRECT_RUN, check_name, check_segment, extension_of
from cas.retention import Retention, parse_retention

TOKEN_CHARS = 8  # 62^8 is 2.2e14: guessing is hopeless under a limit on guesses
_TOKEN_ALPHABET = string.ascii_letters + string.digits

FILES_MAX = 1000  # slots of one upload
_PROMPT_CHARS_MAX = 4000
_TYPES_MAX = 50
_EXPIRES_IN_S_MAX = 366 * 24 * 3600


@final
@dataclass(frozen=True, slots=True)
class UploadRequest:
    """What a tenant asks a person for. `max_size_bytes` 0 is no limit but the store's."""

    name: str
    allowed_types: list[str] = field(default_factory=list)  # extensions; empty: any
    max_size_bytes: int = 0
    max_files: int = 1
    prompt: str = ""
    retention: Retention | None = None
    expires_in_s: int | None = None
    callback_url: str | None = None
    redirect_url: str | None = None
    run: str = DIRECT_RUN


@final
@dataclass(frozen=True, slots=True)
class Completion:
    """A completed upload and its files, in the order of their slots."""

    upload: PendingUpload
    files: list[StoredFile]
    # As they were called here: the same bytes may be a file already, under another name.
    filenames: list[str]


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say about uploads."""

    default_retention: Retention
    default_expiry_us: int
    limit_bytes: int  # 0: none
    scheme: str
    partial_expiry_us: int
    quota: Quota = NO_QUOTA
    event_keep_us: int = REMEMBERED_US  # for a workflow that asks how it ended later


@final
class Uploads:
    """The uploads of one tenant. Made by `Store.uploads`; safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        open_link: Callable[[PendingUpload, str], UploadLink],
        policy: Policy,
        *,
        tenant_id: str,
        actor: str,
        request_id: str,
        now_us: Callable[[Snapshot], int],
    ) -> None:
        self._catalog = catalog
        self._open_link = open_link
        self._policy = policy
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id
        self._now_us = now_us

    def request(self, wanted: UploadRequest, key: OnceKey | None = None) -> PendingUpload:
        """Record a request and make its token; durable on return.

        Where the same `key` was used before, the upload of that time is returned as it is now,
        and none is made. Raises InvalidRequest, InvalidName with the field's value and the
        reason, KeyReused where the key was used for another request.
        """
        _check(wanted)
        policy = self._policy
        retention = wanted.retention or policy.default_retention
        expiry_us = (
            policy.default_expiry_us
            if wanted.expires_in_s is None
            else wanted.expires_in_s * SECOND_US
        )

        def insert(txn: Transaction) -> str:
            upload_id = new_id(txn.now_us)
            upload = PendingUpload(
                upload_id=upload_id,
                upload_token="".join(secrets.choice(_TOKEN_ALPHABET) for _ in range(TOKEN_CHARS)),
                tenant_id=self._tenant_id,
                workflow_run_id=wanted.run,
                event_name=f"upload_{upload_id}",
                name=wanted.name,
                allowed_types=[kind.lower().removeprefix(".") for kind in wanted.allowed_types],
                max_size_bytes=wanted.max_size_bytes,
                max_files=wanted.max_files,
                prompt=wanted.prompt,
                status=PENDING,
                retention_policy=retention.text,
                callback_url=wanted.callback_url,
                redirect_url=wanted.redirect_url,
                created_at=txn.now_us,
                created_by=self._actor,
                expires_at=txn.now_us + expiry_us,
                open_until=txn.now_us + expiry_us if txn.believed else None,
                undated_at=None if txn.believed else txn.now_us,
            )
            txn.insert(upload)
            return upload_id

        def insert_once(txn: Transaction) -> PendingUpload:
            upload_id, _ = once(txn, self._tenant_id, key, lambda: insert(txn))
            upload = txn.get(PendingUpload, upload_id)
            if upload is None:
                raise NotFound("upload", upload_id)
            return as_of(upload, txn.now_us)

        while True:
            try:
                return self._catalog.write(
                    insert_once, actor=self._actor, request_id=self._request_id
                )
            except RecordExists:
                continue  # the token is taken: once in 10^14 tries

    def list(
        self, *, status: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page[PendingUpload]:
        """A page of uploads, newest first."""
        index = "tenant" if status is None else "status"
        prefix = (self._tenant_id,) if status is None else (self._tenant_id, status)
        with self._catalog.read() as snapshot:
            now_us = self._now_us(snapshot)
            page = newest(snapshot, PendingUpload, index, prefix, cursor, limit)
        shown = [as_of(upload, now_us) for upload in page.items]
        if status is not None:  # one past its time stays among the pending until the sweep
            shown = [upload for upload in shown if upload.status == status]
        return Page(shown, page.next_cursor)

    def get(self, token: str) -> UploadLink:
        """The upload behind a token, if it is the tenant's; raises NotFound."""
        with self._catalog.read() as snapshot:
            upload = upload_behind(snapshot, token)
            now_us = self._now_us(snapshot)
        if upload is None or upload.tenant_id != self._tenant_id:
            raise NotFound("upload", token)
        return self._open_link(as_of(upload, now_us), self._request_id)

    def cancel(self, token: str) -> PendingUpload:
        """Close a pending upload and let go of its slots; raises NotFound, UploadClosed."""

        def change(txn: Transaction) -> PendingUpload:
            upload = txn.find(PendingUpload, "upload_token", token)
            if upload is None or upload.tenant_id != self._tenant_id:
                raise NotFound("upload", token)
            upload = as_of(upload, txn.now_us)
            if upload.status != PENDING:
                raise UploadClosed(upload.status)
            return close_upload(txn, upload, CANCELLED, self._policy.event_keep_us)

        link = self.get(token)
        unfinished = link.partials()
        cancelled = self._catalog.write(change, actor=self._actor, request_id=self._request_id)
        link.sweep_partials(unfinished)
        return cancelled


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
            self._judge(slots, contents)
            self._confirm(slots)

            def finish(
                txn: Transaction,
                slots: list[UploadFile] = slots,
                contents: list[Content] = contents,
            ) -> Completion | None:
                upload = self._pending(txn)
                if slots_of(txn, upload) != slots:
                    return None  # a slot changed while its content was judged
                return self._finish(txn, upload, slots, contents)

            unfinished = self.partials()
            done = self._catalog.write(
                self._quota.keeping(upload.tenant_id, finish),
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
            found = [
                (file, slot.filename)
                for slot in slots_of(snapshot, upload)
                if slot.file_id and (file := snapshot.get(StoredFile, slot.file_id))
            ]
        return Completion(upload, [file for file, _ in found], [name for _, name in found])

    def _finish(
        self,
        txn: Transaction,
        upload: PendingUpload,
        slots: list[UploadFile],
        contents: list[Content],
    ) -> Completion:
        files: list[StoredFile] = []
        for slot, content in zip(slots, contents, strict=True):
            if slot.checksum_sha256 is None:
                raise NotFound("slot", str(slot.file_index))
            content_type = content.content_type or slot.content_type
            naming = Naming(
                upload.tenant_id,
                upload.workflow_run_id,
                upload.name,
                slot.filename,
                content_type,
                extension_of(slot.filename, content_type),
                parse_retention(upload.retention_policy),
                self._actor,
                self._policy.scheme,
            )
            file = naming.record(txn, Measured(slot.checksum_sha256, slot.size_bytes))
            files.append(file)
            # The file counts the bytes from here on: deleting it frees them.
            completed = msgspec.structs.replace(
                slot,
                content_type=content_type,
                checksum_sha256=None,
                file_id=file.file_id,
                received_sha256=slot.checksum_sha256,
            )
            txn.replace(completed)
        drop_partials(txn, upload.upload_id)
        upload = msgspec.structs.replace(
            upload, status=COMPLETED, completed_at=txn.now_us, open_until=None, undated_at=None
        )
        txn.replace(upload)
        done = Completion(upload, files, [slot.filename for slot in slots])
        append_event(
            txn,
            upload.tenant_id,
            upload.event_name,
            resume_payload(done),
            keep_us=self._policy.event_keep_us,
        )
        if upload.callback_url is not None:
            message = callback_payload(done)
            enqueue(txn, upload.tenant_id, CALLBACK, upload.upload_id, upload.callback_url, message)
        return done

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

    def _judge(self, slots: list[UploadFile], contents: list[Content]) -> None:
        if not slots:
            raise FilesRefused([(0, "", "no file has been uploaded yet")])
        allowed = self.upload.allowed_types
        reasons: list[tuple[int, str, str]] = []
        for slot, content in zip(slots, contents, strict=True):
            limit = self.size_limit_bytes
            if limit and slot.size_bytes > limit:
                reasons.append((slot.file_index, slot.filename, f"larger than {limit} bytes"))
            elif allowed and not content.is_one_of(allowed):
                reasons.append(
                    (
                        slot.file_index,
                        slot.filename,
                        f"is {content.described}, not {' or '.join(allowed)}",
                    )
                )
        if reasons:
            raise FilesRefused(reasons)

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


def close_upload(
    txn: Transaction, upload: PendingUpload, status: str, keep_us: int
) -> PendingUpload:
    """End an upload without files: its slots let go of their bytes, and a workflow that waits
    for it hears that nothing will come. The event of it is kept for `keep_us`."""
    drop_partials(txn, upload.upload_id)
    for slot in slots_of(txn, upload):
        txn.delete(slot)
    upload = msgspec.structs.replace(upload, status=status, open_until=None, undated_at=None)
    txn.replace(upload)
    ended = {"status": status, "files": []}
    append_event(txn, upload.tenant_id, upload.event_name, ended, keep_us=keep_us)
    return upload


class ResumedFile(TypedDict):
    """One file of a completed upload, with the names of the requirements."""

    storage_ref: str
    filename: str
    content_type: str
    size_bytes: int
    checksum_sha256: str


class ResumePayload(TypedDict):
    """What the workflow that waits for an upload resumes with."""

    files: list[ResumedFile]
    uploaded_at: str


def resume_payload(done: Completion) -> ResumePayload:
    """What the waiting workflow resumes with, in the form of the requirements."""
    return {
        "files": [
            {
                "storage_ref": file.storage_ref,
                "filename": filename,
                "content_type": file.content_type,
                "size_bytes": file.size_bytes,
                "checksum_sha256": file.checksum_sha256.hex(),
            }
            for file, filename in zip(done.files, done.filenames, strict=True)
        ],
        "uploaded_at": rfc3339(done.upload.completed_at or 0),
    }


def callback_payload(done: Completion) -> dict[str, object]:
    """What the callback says: whose upload it was, and what the workflow resumes with."""
    upload = done.upload
    return {
        "type": "upload.completed",
        "upload_id": upload.upload_id,
        "event_name": upload.event_name,
        "name": upload.name,
        "tenant_id": upload.tenant_id,
        "workflow_run_id": upload.workflow_run_id,
        **resume_payload(done),
    }


def _check(wanted: UploadRequest) -> None:
    check_name(wanted.name)
    check_segment(wanted.run, "run")
    if not 1 <= wanted.max_files <= FILES_MAX:
        raise InvalidRequest(wanted.max_files, f"max_files is 1 to {FILES_MAX}")
    if wanted.max_size_bytes < 0:
        raise InvalidRequest(wanted.max_size_bytes, "max_size_mb is 0 (no limit) or more")
    if len(wanted.prompt) > _PROMPT_CHARS_MAX:
        raise InvalidRequest("prompt", f"prompt is at most {_PROMPT_CHARS_MAX} characters")
    if wanted.expires_in_s is not None and not 1 <= wanted.expires_in_s <= _EXPIRES_IN_S_MAX:
        raise InvalidRequest(wanted.expires_in_s, f"expires_in is 1 to {_EXPIRES_IN_S_MAX} seconds")
    if len(wanted.allowed_types) > _TYPES_MAX:
        raise InvalidRequest("allowed_types", f"allowed_types has at most {_TYPES_MAX} entries")
    for kind in wanted.allowed_types:
        bare = kind.lower().removeprefix(".")
        if not (bare.isascii() and bare.isalnum() and len(bare) <= 16):
            raise InvalidRequest(kind, "allowed_types holds extensions such as pdf or jpg")
    for url in (wanted.callback_url, wanted.redirect_url):
        if url is not None:
            check_url(url)


def check_url(url: str) -> None:
    """Pass an address that people or programs are sent to; raises InvalidRequest."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        parts.port  # noqa: B018  raises when it is no number up to 65535
    except ValueError:
        host = None
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not host or len(url) > 2000:
        raise InvalidRequest(url[:200], "a URL is http or https, with a host")
    # Browsers drop line breaks and take a backslash for a slash: they would go elsewhere than
    # it was read to go here.
    if not url.isprintable() or " " in url or "\\" in url:
        raise InvalidRequest(url[:200], "a URL has no spaces, controls or backslashes")
    if parts.username is not None:
        # It would be shown to whoever sees the upload, and sent to wherever the URL leads.
        raise InvalidRequest(host, "a URL has no user and no password")
