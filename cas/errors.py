"""Every error the store raises, on one page.

Errors carry facts on the instance and know nothing of HTTP: `gateway/errors.py` maps
them to a status and a stable code, `cas/cli.py` maps them to exit codes.

    BlobcaskError
    ├── InvalidInput                what the caller sent can never be right
    │   ├── InvalidDigest  InvalidReference  InvalidName  InvalidRetention  InvalidRequest
    │   ├── InvalidReceipt  InvalidWorkflow  InvalidTemplate  InvalidToolCall
    │   ├── OperatorUnsupported         a workflow, too, as are the two before it
    │   └── InvalidSetting          section, key and value of a bad setting
    ├── NotFound                    no such thing, or not the caller's
    ├── Mismatch                    the bytes are not the promised ones
    │   └── DigestMismatch  SizeMismatch  ChecksumMismatch  ReceiptNotProved
    ├── TooLarge                    more bytes than the limit in force
    ├── Conflict                    right once, not in this state
    │   ├── UploadClosed  UploadNotCompleted  FilesRefused  Held  RecordExists  BlobDeleting
    │   ├── OffsetMismatch  PartialBusy  PartialTaken  PartialExpired  SlotsTaken  SlotTaken
    │   ├── NoWaitingWorkflow  SubscriptionTaken  ApprovalClosed  ApprovalKeyTaken
    │   ├── WebhookClosed  RunEnded
    │   └── KeyReused               an idempotency key came again with another question
    ├── StoreFull                   no space, with numbers
    ├── QuotaExceeded               no more of this tenant, with numbers
    │   └── LinkQuotaExceeded
    ├── TooManyRuns                 as many runs of this tenant are open as may be
    ├── TooManyApprovals            as many approvals of this tenant are remembered as may be
    ├── TooManyMails                as many mails of this tenant are still to go out as may be
    ├── TooManyHeld                 as much of its events is kept for later waits as may be
    ├── TooManyKept                 as much of its events is kept, whyever, as may be
    ├── BlobUnavailable             the record is here, good bytes are not
    │   └── BlobMissing  BlobDamaged  BlobElsewhere
    ├── CopyUnconfirmed             stored here, but not known to be at the bucket yet
    ├── TargetNeeded                a target must not be dropped: what is there would be lost
    ├── BadSignature  LinkExpired   of what carries its own right: a URL, a webhook's call
    ├── SecretSealed                a tenant's secret that no key here opens
    ├── ToolFailed                  a tool of a workflow, with whether trying again may help
    ├── TooManyWaiters              more waits at once than `[events] waiters_max`
    ├── AccessDenied  ServerRefused  ServerUnreachable      of a remote store only
    └── CatalogError                the catalog cannot serve
        ├── CatalogFailed           a sync failed: nobody writes until it is reopened
        ├── CatalogClosed  WrongProcess  StoreBusy  StoreUnready
        ├── UnsuitableRoot          network filesystem, foreign PID namespace, newer format
        └── Damaged                 JournalDamaged, IndexDamaged
"""

from __future__ import annotations

from pathlib import Path


class BlobcaskError(Exception):
    """The root of all errors that blobcask raises on purpose."""


class InvalidInput(BlobcaskError):
    """A value that can never be accepted; `what` names its kind, `value` is it."""

    what = "value"

    def __init__(self, value: object, reason: str) -> None:
        super().__init__(f"{self.what} {value!r}: {reason}")
        self.value = value
        self.reason = reason


class InvalidDigest(InvalidInput):
    what = "digest"


class InvalidReference(InvalidInput):
    what = "reference"


class InvalidName(InvalidInput):
    what = "name"


class InvalidRetention(InvalidInput):
    what = "retention policy"


class InvalidRequest(InvalidInput):
    """A field of a request that is missing, of the wrong type or out of range."""

    what = "field"

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field


class InvalidReceipt(InvalidInput):
    what = "receipt"


class InvalidWorkflow(InvalidInput):
    """A workflow's definition or its inputs; `value` is the task or the field."""

    what = "workflow"


class InvalidTemplate(InvalidWorkflow):
    """A template that cannot be read, or has no value; `value` is the beginning of its text."""

    what = "template"


class InvalidToolCall(InvalidWorkflow):
    """A tool that is not there, or not with these arguments; `value` is its name."""

    what = "tool"


class OperatorUnsupported(InvalidWorkflow):
    """A definition uses an operator that this runner does not carry; `operator` is its name."""

    def __init__(self, task: str, operator: str) -> None:
        super().__init__(task, f"the operator {operator} is not supported")
        self.operator = operator


class InvalidSetting(InvalidInput):
    """A setting that stops the start: names section, key and value."""

    def __init__(self, section: str, key: str, value: object, reason: str) -> None:
        given = "is not set" if value == "" else f"= {value}"
        BlobcaskError.__init__(self, f"[{section}] {key} {given}: {reason}")
        self.section = section
        self.key = key
        self.value = value
        self.reason = reason


class NotFound(BlobcaskError):
    """No such thing for this caller: unknown and foreign are told alike (invariant 9)."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"no {kind} {name!r}")
        self.kind = kind
        self.name = name


class Mismatch(BlobcaskError):
    """The bytes that came are not the bytes that were promised; nothing was kept."""


class DigestMismatch(Mismatch):
    def __init__(self, promised: str, received: str) -> None:
        super().__init__(f"promised digest {promised}, received bytes with digest {received}")
        self.promised = promised
        self.received = received


class SizeMismatch(Mismatch):
    """`promised_bytes` were announced, the source ended (or went on) at `received_bytes`."""

    def __init__(self, promised_bytes: int, received_bytes: int) -> None:
        super().__init__(f"promised {promised_bytes} bytes, received {received_bytes}")
        self.promised_bytes = promised_bytes
        self.received_bytes = received_bytes


class ChecksumMismatch(Mismatch):
    """A piece of a resumable upload has another SHA-256 than its sender promised (hex)."""

    def __init__(self, promised: str, received: str) -> None:
        super().__init__(f"promised a piece with SHA-256 {promised}, received {received}")
        self.promised = promised
        self.received = received


class ReceiptNotProved(Mismatch):
    """The signature is not of this receipt, or not by a trusted key; or it names no such file."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLarge(BlobcaskError):
    """The source is longer than `limit_bytes`; nothing was kept."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"more than the {limit_bytes} bytes allowed")
        self.limit_bytes = limit_bytes


class Conflict(BlobcaskError):
    """The request is well formed, but not possible in the present state."""


class UploadClosed(Conflict):
    """The upload is no longer pending; `state` says what became of it."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the upload is {state}")
        self.state = state


class FilesRefused(Conflict):
    """Completion refused: `reasons` holds (slot index, filename, reason) per refused file."""

    def __init__(self, reasons: list[tuple[int, str, str]]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for _, name, reason in reasons))
        self.reasons = reasons


class Held(Conflict):
    """A legal hold forbids the deletion."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"{reference} is under a legal hold")
        self.reference = reference


class OffsetMismatch(Conflict):
    """A piece of a resumable upload must begin at `offset_bytes`, and begins elsewhere."""

    def __init__(self, offset_bytes: int, sent_bytes: int) -> None:
        super().__init__(f"{offset_bytes} bytes are here; the piece begins at {sent_bytes}")
        self.offset_bytes = offset_bytes
        self.sent_bytes = sent_bytes


class UploadNotCompleted(Conflict):
    """Only a completed upload has this; `state` says how it stands."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the upload is {state}, not completed")
        self.state = state


class PartialBusy(Conflict):
    """Another request works on this resumable upload, and did not let go in time."""

    def __init__(self) -> None:
        super().__init__("another request is busy with this upload; try again")


class PartialTaken(Conflict):
    """This request was asked to let go of its resumable upload, by one that came later."""

    def __init__(self) -> None:
        super().__init__("a later request took this upload over")


class PartialExpired(Conflict):
    """The resumable upload waited too long for its next piece."""

    def __init__(self) -> None:
        super().__init__("nothing came for too long; begin again")


class SlotsTaken(Conflict):
    """No slot is free, and none was named to be replaced."""

    def __init__(self, max_files: int) -> None:
        super().__init__(f"all {max_files} slots are filled; name the one to replace")
        self.max_files = max_files


class SlotTaken(Conflict):
    """The slot `index` was to be filled only if it is free, and is filled or waited for."""

    def __init__(self, index: int) -> None:
        super().__init__(f"slot {index} is taken")
        self.index = index


class RecordExists(Conflict):
    """A record with this key, or this value of a unique key, is in the table."""

    def __init__(self, table: str, key: object) -> None:
        super().__init__(f"{table} has a record {key!r}")
        self.table = table
        self.key = key


class BlobDeleting(Conflict):
    """The bytes of this digest are being removed; finish that, then put them again."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"blob {digest} is being deleted")
        self.digest = digest


class NoWaitingWorkflow(Conflict):
    """An event came for which nothing waits, and it was not to be held. `others` says who waits
    for its name all the same, and why the event is none for them."""

    def __init__(self, event_name: str, others: str = "") -> None:
        super().__init__(f"No workflow waiting for this event{others and f': {others}'}")
        self.event_name = event_name


class SubscriptionTaken(Conflict):
    """Somebody else waits for the same event with the same correlation key."""

    def __init__(self, event_name: str, correlation_key: str) -> None:
        super().__init__(f"{event_name!r} with the key {correlation_key!r} is waited for already")
        self.event_name = event_name
        self.correlation_key = correlation_key


class ApprovalClosed(Conflict):
    """The approval is decided, cancelled or over: by whom and when, as far as there is any."""

    def __init__(self, status: str, decided_by: str | None, decided_at: int | None) -> None:
        super().__init__(f"the approval is {status} already")
        self.status = status
        self.decided_by = decided_by
        self.decided_at = decided_at  # µs since 1970 UTC


class ApprovalKeyTaken(Conflict):
    """Another approval with this key is pending in the same run: one decision would answer
    both."""

    def __init__(self, approval_key: str, run: str) -> None:
        super().__init__(
            f"an approval with the key {approval_key!r} is pending in run {run!r}; give each "
            "its own key: inside a foreach with the item in it, such as publish-{{index}}"
        )
        self.approval_key = approval_key
        self.run = run


class WebhookClosed(Conflict):
    """The webhook takes no more calls, for a reason that who signed this one may know."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class RunEnded(Conflict):
    """The run has ended; `status` says how."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the run is {status} already")
        self.status = status


class KeyReused(Conflict):
    """An idempotency key came again, with another question than the first time."""

    def __init__(self, key: str) -> None:
        super().__init__("the idempotency key was used for another request")
        self.key = key


class BadSignature(BlobcaskError):
    """It was not signed with our key, or not for this: told as if there were nothing."""

    def __init__(self) -> None:
        super().__init__("bad signature")


class LinkExpired(BlobcaskError):
    """The signature is good, its time is over."""

    def __init__(self) -> None:
        super().__init__("the link has expired; ask for a fresh one")


class SecretSealed(BlobcaskError):
    """A tenant's secret was encrypted with a key that is not in ROOT/keys/secrets."""

    def __init__(self, secret_id: str) -> None:
        super().__init__(
            f"secret {secret_id!r} cannot be opened with ROOT/keys/secrets; set it anew"
        )
        self.secret_id = secret_id


class ToolFailed(BlobcaskError):
    """A tool did not do what it was called for. `again`: another attempt may help."""

    def __init__(self, tool: str, reason: str, *, again: bool = False) -> None:
        super().__init__(f"{tool}: {reason}")
        self.tool = tool
        self.reason = reason
        self.again = again


class TooManyWaiters(BlobcaskError):
    """As many requests wait for events as `[events] waiters_max` allows, or as many of one
    tenant, which may have half of that."""

    def __init__(self, waiters_max: int, whose: str = "") -> None:
        super().__init__(f"{waiters_max} requests{whose} wait for events already")
        self.waiters_max = waiters_max


class StoreFull(BlobcaskError):
    """No space: `needed_bytes` may be 0 where the need was not announced."""

    def __init__(self, free_bytes: int, needed_bytes: int, path: Path) -> None:
        need = f", {needed_bytes} needed" if needed_bytes else ""
        super().__init__(f"disk full: {free_bytes} bytes free at {path}{need}")
        self.free_bytes = free_bytes
        self.needed_bytes = needed_bytes
        self.path = path


class QuotaExceeded(BlobcaskError):
    """The tenant would store more than it may; nothing was kept.

    `what` is "files" or "size_bytes": `used` of `limit` are taken, `needed` more were asked.
    """

    def __init__(self, what: str, limit: int, used: int, needed: int) -> None:
        noun = "bytes" if what == "size_bytes" else what
        super().__init__(f"quota: {used} of {limit} {noun} are used, {needed} more are needed")
        self.what = what
        self.limit = limit
        self.used = used
        self.needed = needed


class LinkQuotaExceeded(QuotaExceeded):
    """The same for the holder of an upload token, who may not know the tenant's numbers."""


class TooManyRuns(BlobcaskError):
    """`open` runs of the tenant have not ended, and `limit` may; nothing was begun."""

    def __init__(self, limit: int, open: int) -> None:  # noqa: A002
        super().__init__(f"{open} runs have not ended, of {limit} that may be open at once")
        self.limit = limit
        self.open = open


class TooManyApprovals(BlobcaskError):
    """`remembered` approvals of the tenant are, also such as have ended, and `limit` may be;
    nobody was asked."""

    def __init__(self, limit: int, remembered: int) -> None:
        super().__init__(f"{remembered} approvals are remembered, of {limit} that may be at once")
        self.limit = limit
        self.remembered = remembered


class TooManyMails(BlobcaskError):
    """`waiting` mails of the tenant are still to go out, `limit` may be, and `needed` more have
    no room beside them; nobody was asked."""

    def __init__(self, limit: int, waiting: int, needed: int) -> None:
        super().__init__(
            f"{waiting} mails are still to go out, of {limit} that may be at once; "
            f"{needed} more are needed"
        )
        self.limit = limit
        self.waiting = waiting
        self.needed = needed


class TooManyHeld(BlobcaskError):
    """The tenant's events that others told, and that are kept for later waits, have `held_bytes`
    of `limit_bytes`, and one of `needed_bytes` has no room beside them; nothing was kept."""

    def __init__(self, limit_bytes: int, held_bytes: int, needed_bytes: int) -> None:
        super().__init__(
            f"{held_bytes} bytes of events are held, of {limit_bytes} that may be; "
            f"{needed_bytes} more are needed"
        )
        self.limit_bytes = limit_bytes
        self.held_bytes = held_bytes
        self.needed_bytes = needed_bytes


class TooManyKept(BlobcaskError):
    """What is kept of the tenant's events that others told, of their idempotency keys, and of
    waits that its clients may ask for again, has `kept_bytes` of `limit_bytes`, and one of
    `needed_bytes` has no room beside it; nothing was kept."""

    def __init__(self, limit_bytes: int, kept_bytes: int, needed_bytes: int) -> None:
        super().__init__(
            f"{kept_bytes} bytes of events, keys and waits are kept, of {limit_bytes} that may be; "
            f"{needed_bytes} more are needed"
        )
        self.limit_bytes = limit_bytes
        self.kept_bytes = kept_bytes
        self.needed_bytes = needed_bytes


class BlobUnavailable(BlobcaskError):
    """A record names this digest, but good bytes are not here."""

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(f"blob {digest}: {reason}")
        self.digest = digest
        self.reason = reason


class BlobMissing(BlobUnavailable):
    pass


class BlobDamaged(BlobUnavailable):
    pass


class BlobElsewhere(BlobUnavailable):
    """The bytes are at targets only, and could not be fetched from there, or not in time."""


class CopyUnconfirmed(BlobcaskError):
    """`storage_type = s3`: the bytes are named and durable here, and their copy at the bucket
    was not confirmed in time. Storing them again is harmless, and asks again."""

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(f"blob {digest}: its copy at the bucket is not confirmed: {reason}")
        self.digest = digest
        self.reason = reason


class TargetNeeded(BlobcaskError):
    """A target must not be dropped; nothing was changed.

    With `blobs`, so many (at least, from 1,000 on) have their good bytes there alone. Without,
    it is configured no more, or its name stands for the place `elsewhere` now, and what is known
    of its copies would be lost.
    """

    def __init__(
        self, name: str, place: str, elsewhere: str | None = None, *, blobs: int = 0
    ) -> None:
        if blobs:
            why = f"cannot go: {blobs:,} blobs have their good bytes nowhere else"
        elif elsewhere is None:
            why = (
                "is not configured, but copies there are known of; configure it as it was, or "
                f"let go of it with: blobcask replicate forget {name}"
            )
        else:
            why = (
                f"is {elsewhere} now, but copies at the old place are known of; where that is "
                f"the same place: blobcask replicate moved {name}; where it is another one: "
                f"blobcask replicate forget {name}"
            )
        super().__init__(f"target {name} ({place}) {why}")
        self.name = name
        self.place = place
        self.elsewhere = elsewhere
        self.blobs = blobs


class AccessDenied(BlobcaskError):
    """A server does not believe the token, or the token lacks a permission."""


class ServerRefused(BlobcaskError):
    """A server answered with an error that has no class here; `code` is its stable name."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"the server refused ({status} {code}): {detail}")
        self.status = status
        self.code = code
        self.detail = detail


class ServerUnreachable(BlobcaskError):
    """No answer, or none that could be used; what was asked may or may not have been done."""

    def __init__(self, server: str, reason: str) -> None:
        super().__init__(f"{server}: {reason}")
        self.server = server
        self.reason = reason


class CatalogError(BlobcaskError):
    """The catalog cannot serve; nothing of the request was done unless said otherwise."""


class CatalogFailed(CatalogError):
    """A sync of the journal failed, so what is on the disk is unknown (fsyncgate).

    Every process stops writing until the catalog is reopened; the write that met it may
    or may not be there afterwards.
    """


class CatalogClosed(CatalogError):
    def __init__(self) -> None:
        super().__init__("the catalog is closed")


class WrongProcess(CatalogError):
    """A catalog was used across fork; open one in each process."""

    def __init__(self) -> None:
        super().__init__("opened in another process: open the store after fork")


class StoreUnready(CatalogError):
    """A commit was tried out and did not come back, or the disk took no bytes; `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class StoreBusy(CatalogError):
    """Work that needs ROOT alone met other processes that have it open."""

    def __init__(self, path: Path, wanted: str) -> None:
        super().__init__(f"{path} is open in other processes; stop them to {wanted}")
        self.path = path
        self.wanted = wanted


class UnsuitableRoot(CatalogError):
    """This ROOT cannot be used here: network filesystem, PID namespace, newer format."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class Damaged(CatalogError):
    """Bytes on the disk are not what was written."""


class JournalDamaged(Damaged):
    """A frame is bad although it was acknowledged; nothing is truncated (invariant 5)."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path} at byte {offset}: {reason}")
        self.path = path
        self.offset = offset
        self.reason = reason


class IndexDamaged(Damaged):
    """The LMDB index cannot be read; it is rebuilt from the journal at the next opening."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"index damaged: {reason}; reopen the store to rebuild it")
        self.reason = reason
