"""The schema page: every record type, its table, keys, indexes and digest fields.

Records are immutable values. In the journal and the index a record is a msgpack array of
its fields in the order written here, so fields may be appended (with a default) and never
moved or removed. Times end in `_at` and are microseconds since 1970 UTC; sizes are bytes.

A `Schema` declares what the catalog must keep true of a type:

    key       the fields of the primary key
    unique    name -> fields whose values no two records share
    indexes   name -> fields by which records are listed in order; a record whose first
              field there is None is left out, so that such an index holds only what is due
    digests   fields that hold a digest: each one counts as a reference to that blob
    counts    what a record adds to the `Usage` of its tenant
    adds      what it adds to each `Total`: sums that the catalog keeps, as it does the usage

An index, a key or a sum may go by a property too, which is worked out and not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import msgspec

from cas.digest import Digest
from cas.references import DIRECT_RUN


@final
class Counts(msgspec.Struct, frozen=True):
    """What a record of a type with a `tenant_id` adds to the usage of that tenant."""

    size_bytes: str  # the field that says so
    files: int = 1
    unless_none: str = ""  # the field that is None when the record counts nothing


@final
class Adds(msgspec.Struct, frozen=True):
    """What a record adds to a `Total`: one, and its bytes."""

    to: str  # the first part of the total's name
    by: str  # the attribute whose value is the second part; None there adds nothing
    size_bytes: str = "size_bytes"  # "": none are counted

    def part(self, record: Record) -> tuple[str, int] | None:
        """The total's name, and the bytes; None where the record adds nothing."""
        value = getattr(record, self.by)
        if value is None:
            return None
        return f"{self.to}:{value}", getattr(record, self.size_bytes) if self.size_bytes else 0


@final
class Schema(msgspec.Struct, frozen=True):
    """What the catalog keeps true of one record type; `number` names its table on disk."""

    table: str
    number: int
    key: tuple[str, ...]
    unique: Mapping[str, tuple[str, ...]] = {}
    indexes: Mapping[str, tuple[str, ...]] = {}
    digests: tuple[str, ...] = ()
    counts: Counts | None = None
    adds: tuple[Adds, ...] = ()


class Record(msgspec.Struct, frozen=True, array_like=True):
    """A value of one table."""

    schema: ClassVar[Schema]

    def primary_key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field) for field in self.schema.key)


LIVE = "live"  # refcount > 0
CONDEMNED = "condemned"  # refcount 0 since condemned_at; bytes are kept for the grace
DELETING = "deleting"  # bytes are being removed; nobody may count on them


@final
class Blob(Record, frozen=True, array_like=True):
    """Bytes under a digest. `refcount` is kept by the catalog, never by a caller."""

    digest: Digest
    size_bytes: int
    blake3: bytes  # 32 raw bytes: the fast digest that the scrub compares
    inode: int  # of the object as it was written or last verified
    stored_at: int
    verified_at: int  # when the bytes were last known to match the digest
    state: str = LIVE
    refcount: int = 0
    condemned_at: int | None = None
    deleting_at: int | None = None
    missing_at: int | None = None  # since when good bytes are known to be nowhere
    local: bool = True  # the bytes are in objects/
    mtime_ns: int = 0  # of the object too: inode numbers are used again
    evicted_at: int | None = None  # since when they are at targets only (`local` is False)

    schema: ClassVar[Schema] = Schema(
        "blobs",
        1,
        key=("digest",),
        indexes={
            "condemned": ("condemned_at", "digest"),
            "deleting": ("deleting_at", "digest"),
            "missing": ("missing_at", "digest"),
            "verified": ("verified_at", "digest"),
            "evicted": ("evicted_at", "digest"),
        },
        adds=(Adds("blobs", "whereabouts"),),
    )

    @property
    def whereabouts(self) -> str:
        """By which name it is summed up: "here", or "elsewhere" (also where it is nowhere)."""
        return "here" if self.local else "elsewhere"


@final
class StoredFile(Record, frozen=True, array_like=True):
    """A tenant's named record of a blob (`stored_files` of the requirements).

    `s3_bucket` and `s3_key` of the requirements are not stored: where the bytes are is the
    blob's matter and is told at the edges.
    """

    file_id: str
    tenant_id: str
    workflow_run_id: str
    storage_ref: str
    name: str
    original_filename: str | None
    content_type: str
    size_bytes: int
    checksum_sha256: Digest
    retention_policy: str
    expires_at: int | None  # None: for ever
    created_at: int
    created_by: str
    hold: bool = False
    # Since when its relative expiry waits for a clock that can be believed (invariant 10):
    # `expires_at` is None until then.
    undated_at: int | None = None
    # While it waits: the expiry and policy it had before, when the same bytes came again.
    promised: tuple[int, str] | None = None

    schema: ClassVar[Schema] = Schema(
        "stored_files",
        2,
        key=("file_id",),
        unique={"storage_ref": ("storage_ref",)},
        indexes={
            "tenant": ("tenant_id", "file_id"),
            "run": ("tenant_id", "workflow_run_id", "file_id"),
            "name": ("tenant_id", "name", "file_id"),
            "run_name": ("tenant_id", "workflow_run_id", "name", "file_id"),
            "content": ("tenant_id", "size_bytes", "checksum_sha256", "file_id"),
            "expiry": ("expires_at", "file_id"),
            "undated": ("undated_at", "file_id"),
        },
        digests=("checksum_sha256",),
        counts=Counts("size_bytes"),
    )


PENDING = "pending"
COMPLETED = "completed"
CANCELLED = "cancelled"
EXPIRED = "expired"


@final
class PendingUpload(Record, frozen=True, array_like=True):
    """A request for files from a person (`pending_uploads` of the requirements)."""

    upload_id: str
    upload_token: str
    tenant_id: str
    workflow_run_id: str
    event_name: str
    name: str
    allowed_types: list[str]  # extensions such as "pdf"; empty: any
    max_size_bytes: int  # per file; 0: no limit
    max_files: int
    prompt: str
    status: str
    retention_policy: str
    callback_url: str | None
    redirect_url: str | None
    created_at: int
    created_by: str
    expires_at: int
    completed_at: int | None = None
    open_until: int | None = None  # expires_at while pending: what the sweeper walks
    # Since when its term waits for a clock that can be believed (invariant 10). It lasts
    # `expires_at - undated_at` from the moment when there is one; no `open_until` till then.
    undated_at: int | None = None

    schema: ClassVar[Schema] = Schema(
        "pending_uploads",
        3,
        key=("upload_id",),
        unique={"upload_token": ("upload_token",)},
        indexes={
            "tenant": ("tenant_id", "upload_id"),
            "status": ("tenant_id", "status", "upload_id"),
            "expiry": ("open_until", "upload_id"),
            "undated": ("undated_at", "upload_id"),
        },
    )


@final
class UploadFile(Record, frozen=True, array_like=True):
    """A filled slot (`upload_files`). Completing turns its digest into its `file_id`."""

    upload_id: str
    file_index: int
    filename: str
    content_type: str
    size_bytes: int
    checksum_sha256: Digest | None  # None once completed or dropped
    stored_at: int
    file_id: str | None = None
    partial_id: str | None = None  # the resumable upload that brought the bytes
    tenant_id: str = ""  # of the upload; "" counts for nobody
    # Since completion: what came, for the receipt. No reference: it outlives the file.
    received_sha256: Digest | None = None

    schema: ClassVar[Schema] = Schema(
        "upload_files",
        4,
        key=("upload_id", "file_index"),
        digests=("checksum_sha256",),
        counts=Counts("size_bytes", unless_none="checksum_sha256"),
    )


EVENT_BYTES = 512  # of an event besides its payload: its record, and what it is found by
WAIT_BYTES = 512  # the same of a wait
KEY_BYTES = 512  # the same of a key under which an event was told once


@final
class Event(Record, frozen=True, array_like=True):
    """Something that happened, committed with the change it speaks of (invariant 6)."""

    event_id: str
    tenant_id: str
    event_name: str
    correlation_key: str | None
    payload: bytes  # JSON
    created_at: int
    expires_at: int | None = None
    workflow_run_id: str = ""  # the run whose waits alone it is for; "": any run's
    # `cas.events.topic` while a wait that begins later may get it; None: it was for those
    # that waited when it came.
    open_for: str | None = None
    once: bool = False  # the first wait that gets it is the only one
    # Since when its term waits for a clock that can be believed (invariant 10), as an upload's.
    undated_at: int | None = None
    # The frame of the journal that it came with: which one is older, however fast they come.
    seq: int = 0
    # Whether the store itself tells it, of a change of its own: kept in any case, and counted
    # nowhere. What others tell counts for the tenant.
    own: bool = True

    schema: ClassVar[Schema] = Schema(
        "events",
        5,
        key=("event_id",),
        indexes={
            "expiry": ("expires_at", "event_id"),
            "open": ("open_for", "workflow_run_id", "seq", "event_id"),
            "undated": ("undated_at", "event_id"),
        },
        adds=(Adds("held_of", "held_of"), Adds("kept_of", "kept_of")),
    )

    @property
    def held_of(self) -> str | None:
        """The tenant for whose later wait it is kept, which others told. None once it is for
        no later one."""
        return None if self.open_for is None else self.kept_of

    @property
    def kept_of(self) -> str | None:
        """The tenant for which it is kept, whyever; None where the store itself tells it."""
        return None if self.own else self.tenant_id

    @property
    def size_bytes(self) -> int:
        """What keeping it takes, which is something without a payload, too."""
        return EVENT_BYTES + len(self.payload)


@final
class Mark(Record, frozen=True, array_like=True):
    """A named position that must survive a restart, such as where the scrub stopped."""

    name: str
    value: str

    schema: ClassVar[Schema] = Schema("marks", 6, key=("name",))


@final
class Partial(Record, frozen=True, array_like=True):
    """The bytes that a resumable upload has sent so far: ROOT/partial/<partial_id>."""

    partial_id: str
    upload_id: str
    tenant_id: str
    file_index: int  # the slot they are for
    filename: str
    content_type: str
    length_bytes: int  # announced when it began
    offset_bytes: int  # received, and durable
    created_at: int
    expires_at: int  # moved on by every append; what the sweeper walks
    undated_at: int | None = None  # as an upload's

    schema: ClassVar[Schema] = Schema(
        "partials",
        7,
        key=("partial_id",),
        indexes={
            "upload": ("upload_id", "partial_id"),
            "expiry": ("expires_at", "partial_id"),
            "undated": ("undated_at", "partial_id"),
        },
        counts=Counts("offset_bytes", files=0),
    )


WAITING = "waiting"
DONE = "done"
FAILED = "failed"

CALLBACK = "callback"
MAIL = "mail"  # its target is an address, its payload a mail: see `workflows.mails`


@final
class Delivery(Record, frozen=True, array_like=True):
    """A message that must reach somebody outside, such as the callback of an upload.

    Committed with the change it speaks of (invariant 6); sent by the background process.
    What is sent is in its `DeliveryPayload`: this record is written at every attempt.
    """

    delivery_id: str  # also the idempotency key: the same at every attempt
    tenant_id: str
    kind: str  # callback or mail
    subject: str  # what it speaks of: an upload's identifier, or an approval's
    target: str  # a URL, or an address
    status: str  # waiting, done, failed or cancelled
    created_at: int
    next_attempt_at: int | None  # while waiting: what the background process walks
    attempts: int = 0
    last_attempt_at: int | None = None
    last_status: int | None = None  # the HTTP status of the last answer, if one came
    last_error: str = ""
    done_at: int | None = None

    schema: ClassVar[Schema] = Schema(
        "deliveries",
        8,
        key=("delivery_id",),
        indexes={
            "due": ("next_attempt_at", "delivery_id"),
            "tenant": ("tenant_id", "delivery_id"),
            "status": ("tenant_id", "status", "delivery_id"),
            "subject": ("tenant_id", "subject", "delivery_id"),
            "queue": ("status", "kind", "tenant_id", "next_attempt_at", "delivery_id"),
        },
        adds=(Adds("mails_of", "mail_of", size_bytes=""),),
    )

    @property
    def mail_of(self) -> str | None:
        """The tenant whose mail it is, until it is delivered, given up or called off."""
        return self.tenant_id if self.kind == MAIL and self.status == WAITING else None


@final
class Usage(Record, frozen=True, array_like=True):
    """What one tenant stores: kept by the catalog, as reference counts are.

    A tenant that stores nothing has no such record. Only a recount writes one.
    """

    tenant_id: str
    files: int
    size_bytes: int  # as named, each file in full: what is shared saves nobody's quota

    schema: ClassVar[Schema] = Schema("usage", 9, key=("tenant_id",))


@final
class DeliveryPayload(Record, frozen=True, array_like=True):
    """The bytes that every attempt of a delivery sends: up to 300 KB, written once."""

    delivery_id: str
    payload: bytes  # JSON; of a mail, sealed (`cas.sealing`)

    schema: ClassVar[Schema] = Schema("delivery_payloads", 10, key=("delivery_id",))


@final
class Target(Record, frozen=True, array_like=True):
    """A place that blobs are mirrored to. While it has a record, each live blob gets a row."""

    name: str
    place: str  # what it is, for people: "s3://bucket/prefix at https://…", "folder /mnt/…"
    added_at: int
    # Blobs that were there before: those up to this digest have their rows; None: all have.
    backfill_after: bytes | None = b""
    profile: bytes = b""  # JSON: what a probe found out, see `replicator.probe`; b"": no probe
    # Since when the journal is shipped there; None: never yet. With it, a target without
    # HEAD.json is no new one: it has lost what it held.
    shipped_at: int | None = None

    schema: ClassVar[Schema] = Schema("targets", 11, key=("name",))


TARGETS_MAX = 1000

WANTED = "wanted"
COPYING = "copying"
# DONE and DELETING are shared with deliveries and blobs.


@final
class Replica(Record, frozen=True, array_like=True):
    """One blob at one target. Committed with the blob that becomes live (invariant 6).

    wanted → copying (a multipart upload is under way, see `Copy`) → done: the copy was
    verified there, after every DELETE that was ever sent. When the blob's record goes,
    `removed_at` is set; `delete_delay` later → deleting (persisted before the DELETE is
    sent) → no record. A blob that comes back meanwhile clears `removed_at`, and one that
    meets `deleting` is wanted again once the DELETE is known to have ended. `cas.rows` has
    every step.
    """

    target: str
    digest: Digest
    size_bytes: int
    state: str
    wanted_at: int  # since when there is something to do: the age of the backlog
    queue: str | None  # the target's name while a copy is wanted; None: done, or not needed
    next_attempt_at: int
    attempts: int = 0
    last_error: str = ""
    done_at: int | None = None  # when the copy was last verified
    # Since when no blob needs it. One whose DELETE was refused comes later in the queue: this
    # is then as if it had been removed `delete_delay` before its next attempt.
    removed_at: int | None = None
    ending: str | None = None  # the target's name while a DELETE there is due or under way
    # The frame of the journal in which it was last wanted, done, removed or begun to be
    # deleted: an outcome of work that began before says nothing of what is there now, and
    # nothing is evicted or deleted on its word before that frame is shipped.
    seq: int = 0
    # When the last DELETE was sent whose answer is not written down; None: none is under way.
    sent_at: int | None = None

    schema: ClassVar[Schema] = Schema(
        "replicas",
        12,
        key=("target", "digest"),
        indexes={
            "queue": ("queue", "next_attempt_at", "digest"),
            "age": ("queue", "wanted_at", "digest"),
            "blob": ("digest", "target"),
            "ending": ("ending", "removed_at", "digest"),
        },
        adds=(Adds("backlog", "queue"),),
    )

    @property
    def held(self) -> bool:
        """Whether the copy was verified there and is there to stay."""
        return self.state == DONE and self.removed_at is None


@final
class Copy(Record, frozen=True, array_like=True):
    """A multipart upload under way: what a restarted mirror needs to go on with it."""

    target: str
    digest: Digest
    upload_id: str
    part_bytes: int
    etags: list[str]  # of the parts that are there, from the first on
    begun_at: int

    schema: ClassVar[Schema] = Schema("copies", 13, key=("target", "digest"))


@final
class Total(Record, frozen=True, array_like=True):
    """A sum over records, kept by the catalog as usage is: read in constant time.

    Names: "blobs:here", "blobs:elsewhere" (at targets only, or missing), "backlog:<target>".
    "waits_for:<topic>" (`Subscription.waiting_for`), "waits_of:<tenant>" (its clients' waits
    that nobody claimed), "runs:<status>" and "runs_of:<tenant>" (open ones),
    "held_of:<tenant>" (events of others that are kept for its later waits), "kept_of:<tenant>"
    (all events of others that are kept, waits that its clients claimed, and keys under which
    others told something once),
    "approvals_of:<tenant>" (all that are remembered), "mails_of:<tenant>" (still to go out).
    A sum of nothing has no record.
    """

    name: str
    count: int
    size_bytes: int

    schema: ClassVar[Schema] = Schema("totals", 14, key=("name",))


@final
class Once(Record, frozen=True, array_like=True):
    """That something was done, under a name that its doer will use again after a crash.

    Committed with what was done (invariant 6). `scope` says whose name it is: "run:<run>" for
    the steps of a run, "events" for the `Idempotency-Key` of events, and so on.
    """

    tenant_id: str
    scope: str
    name: str  # a long one of a client is its SHA-256, see `cas.once`
    result: str  # an identifier, or JSON: what the repetition is answered
    asked: bytes  # a digest of what was asked, so that another question is refused; b"": any
    created_at: int
    expires_at: int | None  # None: it goes with its run
    undated_at: int | None = None  # as an upload's
    # Whether it is of an event that others told, which may be gone long before the key: then it
    # counts for the tenant. What else is done once is there for longer, and has its own limits.
    of_event: bool = False

    schema: ClassVar[Schema] = Schema(
        "once",
        15,
        key=("tenant_id", "scope", "name"),
        indexes={
            "expiry": ("expires_at", "tenant_id", "scope", "name"),
            "undated": ("undated_at", "tenant_id", "scope", "name"),
        },
        adds=(Adds("kept_of", "kept_of"),),
    )

    @property
    def kept_of(self) -> str | None:
        """The tenant for which it counts, beside its event; None where it does not."""
        return self.tenant_id if self.of_event else None

    @property
    def size_bytes(self) -> int:
        """What keeping it takes."""
        return KEY_BYTES


# How the step of a wait begins that a client asked for by a name of its own: no task has a
# colon in its name.
CLIENT_STEP = "waiter:"
# The same of a client that gave none, and cannot ask again: no name has a slash in it.
NAMELESS_STEP = f"{CLIENT_STEP}/"
NEVER = (1 << 63) - 1  # as a time: after all others


@final
class Subscription(Record, frozen=True, array_like=True):
    """One wait for one event (`event_subscriptions` of the requirements), or for a time.

    waiting → delivered (an event was given to it, in the transaction of the event) →
    claimed (who waited has it; claiming again gives the same event)
            → over (`expires_at` came first), which is claimed too
    """

    subscription_id: str  # derived from tenant, run, step and iteration
    tenant_id: str
    workflow_run_id: str
    step: str  # "<task>" or "<task>#<iteration>"; of a client that polls: its own name
    event_name: str  # "" waits for `expires_at` alone
    correlation_key: str | None
    created_at: int
    expires_at: int | None  # None: it waits for ever
    waiting_for: str | None  # `cas.events.topic` while it waits: what an event is matched by
    keyed_for: str | None  # the same while it waits or is unclaimed, and has a key: one only
    open_until: int | None  # `expires_at` while it waits: what wakes it without an event
    event_id: str | None = None
    delivered_at: int | None = None  # while delivered or over, and unclaimed
    claimed_at: int | None = None
    forget_at: int | None = None  # what the sweeper walks
    # Since when its term waits for a clock that can be believed (invariant 10), as an upload's.
    undated_at: int | None = None
    # While unclaimed: the frame of the journal in which it was last begun, given something or
    # dated. By it a watcher reads what is new, and nothing twice.
    seq: int | None = None

    schema: ClassVar[Schema] = Schema(
        "subscriptions",
        16,
        key=("subscription_id",),
        unique={"keyed": ("keyed_for",)},
        indexes={
            # By their ends, so that those whose time is over are passed over at once.
            "waiting": ("waiting_for", "lapses_at", "subscription_id"),
            "waiting_run": ("waiting_for", "workflow_run_id", "lapses_at", "subscription_id"),
            "timer": ("open_until", "subscription_id"),
            "delivered": ("delivered_at", "subscription_id"),
            "changed": ("seq", "subscription_id"),
            "run": ("tenant_id", "workflow_run_id", "subscription_id"),
            "event": ("event_id", "had_by", "subscription_id"),
            "forget": ("forget_at", "subscription_id"),
            "undated": ("undated_at", "subscription_id"),
        },
        adds=(
            Adds("waits_for", "waiting_for", size_bytes=""),
            Adds("waits_of", "client_of", size_bytes=""),
            Adds("kept_of", "kept_of"),
        ),
    )

    @property
    def of_client(self) -> bool:
        """Whether somebody outside of workflows asked for it, and no step of a run."""
        return self.workflow_run_id == DIRECT_RUN or self.step.startswith(CLIENT_STEP)

    @property
    def nameless(self) -> bool:
        """Whether nobody but the request that began it can ask what it was given."""
        return self.step.startswith(NAMELESS_STEP)

    @property
    def client_of(self) -> str | None:
        """The tenant whose client has not claimed it yet."""
        return self.tenant_id if self.of_client and self.claimed_at is None else None

    @property
    def kept_of(self) -> str | None:
        """The tenant whose client has claimed it, and may ask again: one more for each name
        that a client thinks of. Those of runs come and go with them."""
        return self.tenant_id if self.of_client and self.claimed_at is not None else None

    @property
    def size_bytes(self) -> int:
        """What keeping it takes."""
        return WAIT_BYTES

    @property
    def had_by(self) -> str:
        """The run which has had an event when this wait has it; "" where no run has: what a
        client is told, a step of the run that it asks about still waits for."""
        return "" if self.of_client else self.workflow_run_id

    @property
    def lapses_at(self) -> int:
        """When it is over without an event; NEVER where it has no end, or none yet."""
        return NEVER if self.open_until is None else self.open_until


APPROVED = "approved"
REJECTED = "rejected"
# PENDING, EXPIRED and CANCELLED are shared with uploads.


@final
class Approval(Record, frozen=True, array_like=True):
    """A question to people that one of them decides (`workflow_approvals`)."""

    approval_id: str
    tenant_id: str
    workflow_run_id: str
    approval_key: str  # its event is "approval_<key>"
    title: str
    message: str
    addressees: list[str]  # each has its own pair of links; never empty: "" is "somebody"
    one_click: bool  # whether opening a link decides
    redirect_url: str | None
    status: str  # pending, approved, rejected, expired or cancelled
    created_at: int
    created_by: str
    expires_at: int
    open_until: int | None  # `expires_at` while pending: what the sweeper walks
    decided_at: int | None = None
    decided_by: str | None = None  # an addressee
    comment: str = ""
    forget_at: int | None = None  # what the sweeper walks once it is decided or over
    undated_at: int | None = None  # as an upload's

    schema: ClassVar[Schema] = Schema(
        "approvals",
        17,
        key=("approval_id",),
        indexes={
            "tenant": ("tenant_id", "approval_id"),
            "run": ("tenant_id", "workflow_run_id", "approval_id"),
            "key": ("tenant_id", "workflow_run_id", "approval_key", "status", "approval_id"),
            "expiry": ("open_until", "approval_id"),
            "forget": ("forget_at", "approval_id"),
            "undated": ("undated_at", "approval_id"),
        },
        adds=(Adds("approvals_of", "tenant_id", size_bytes=""),),
    )


@final
class Webhook(Record, frozen=True, array_like=True):
    """An address where others post what happened (`webhook_registrations`)."""

    webhook_id: str
    tenant_id: str
    workflow_run_id: str
    name: str  # `webhook_path` of the requirements
    kind: str  # whose signature it takes: github, slack, stripe, twilio or generic
    secret_id: str
    signature: bytes  # JSON: what `generic` needs to know, see `workflows.signatures`
    event_name: str
    correlation_key: str | None
    allowed_networks: list[str]  # empty: any
    single_use: bool
    created_at: int
    created_by: str
    expires_at: int | None  # None: until its run is forgotten
    consumed_at: int | None = None  # the last call that was taken
    calls: int = 0
    undated_at: int | None = None  # as an upload's
    # "accept": a call with the same body and another identifier, which its sender does not sign,
    # is another event; "refuse": it is the same.
    repeats: str = "refuse"

    @property
    def is_removed(self) -> bool:
        """Whether it is there only until all its calls are forgotten (`removed`)."""
        return self.expires_at == 0

    def removed(self) -> Webhook:
        """The same, which ended before any was made: nobody is shown it, and the sweep comes."""
        return msgspec.structs.replace(self, expires_at=0, undated_at=None)

    schema: ClassVar[Schema] = Schema(
        "webhooks",
        18,
        key=("webhook_id",),
        indexes={
            "tenant": ("tenant_id", "webhook_id"),
            "run": ("tenant_id", "workflow_run_id", "webhook_id"),
            "expiry": ("expires_at", "webhook_id"),
            "undated": ("undated_at", "webhook_id"),
        },
    )


@final
class Secret(Record, frozen=True, array_like=True):
    """A secret that a tenant shares with somebody; kept encrypted, see `workflows.secrets`."""

    tenant_id: str
    secret_id: str
    sealed: bytes
    created_at: int
    created_by: str
    old_sealed: bytes = b""  # what it was before, where that is good for a while; b"": nothing
    old_until: int | None = None
    undated_at: int | None = None  # as an upload's: of `old_until`

    schema: ClassVar[Schema] = Schema(
        "secrets",
        19,
        key=("tenant_id", "secret_id"),
        indexes={"undated": ("undated_at", "tenant_id", "secret_id")},
    )


# States of runs and steps; COMPLETED, FAILED, CANCELLED and WAITING are shared.
QUEUED = "queued"
RUNNING = "running"
SKIPPED = "skipped"
ENDED = (COMPLETED, FAILED, CANCELLED)  # of a run


@final
class Run(Record, frozen=True, array_like=True):
    """One execution of a workflow. With its text and its steps the whole truth of it: what the
    engine keeps beside them is made anew from these. Small, for it is written at each change
    between running and waiting, and those of many runs are read to find a few."""

    run_id: str
    tenant_id: str
    name: str
    status: str  # queued, running, waiting, completed, failed or cancelled
    created_at: int
    created_by: str
    open: str | None = "open"  # until it ends: what the runner walks
    started_at: int | None = None
    ended_at: int | None = None
    error: str = ""
    forget_at: int | None = None  # what the sweeper walks
    undated_at: int | None = None  # as an upload's
    # "ending" from its end until what ends with it has ended too, where that is too much for
    # one transaction (`cas.endings`).
    ending: str | None = None

    schema: ClassVar[Schema] = Schema(
        "runs",
        20,
        key=("run_id",),
        indexes={
            "tenant": ("tenant_id", "run_id"),
            "status": ("tenant_id", "status", "run_id"),
            "open": ("open", "run_id"),
            "queued": ("queued_at", "run_id"),
            "ending": ("ending", "run_id"),
            "forget": ("forget_at", "run_id"),
            "undated": ("undated_at", "run_id"),
        },
        adds=(
            Adds("runs", "open_as", size_bytes=""),
            Adds("runs_of", "open_of", size_bytes=""),
        ),
    )

    @property
    def queued_at(self) -> int | None:
        """Since when it waits for a runner; None once one has taken it up, or it ended."""
        return self.created_at if self.status == QUEUED else None

    @property
    def open_as(self) -> str | None:
        """Its status until it ends: what open runs are counted by."""
        return None if self.open is None else self.status

    @property
    def open_of(self) -> str | None:
        """The tenant whose run it is, until it ends."""
        return None if self.open is None else self.tenant_id


@final
class RunText(Record, frozen=True, array_like=True):
    """What a run was asked to do: written once, with it."""

    run_id: str
    definition: bytes  # highway_dsl's JSON
    inputs: bytes  # JSON: an object

    schema: ClassVar[Schema] = Schema("run_texts", 23, key=("run_id",))


@final
class Step(Record, frozen=True, array_like=True):
    """One task of a run, or one round of it in a loop. A step that is completed never runs
    again: its result is read from its `StepValue`. Small, for all of a run are walked."""

    run_id: str
    step_id: str  # the task's name in the definition
    iteration: str  # "" outside of loops, else the item's number from 0: "2", in loops "2.0"
    status: str  # running, waiting, completed, failed, skipped or cancelled
    attempts: int
    started_at: int
    ended_at: int | None = None
    value_bytes: int | None = None  # of its result or, before, of what it shows; None: neither
    error: str = ""
    failures: int = 0  # attempts that failed, and another one followed
    retry_at: int | None = None  # when the next one begins, where one follows

    schema: ClassVar[Schema] = Schema(
        "steps",
        21,
        key=("run_id", "step_id", "iteration"),
        indexes={"status": ("run_id", "status", "step_id", "iteration")},
    )


RESULT = "result"
SHOWN = "shown"  # while a step waits: what others need to let it go on, such as a link
ITEMS = "items"  # of a loop that has begun: how many there are
ITEM = "item"  # of a loop, each with the iteration that it is for
FULL = "full"  # of a run, under no step: there is no room for what its steps come to


@final
class StepValue(Record, frozen=True, array_like=True):
    """What a step came to, or a loop goes over: apart from the step, for it may be large and
    few ask for it."""

    run_id: str
    kind: str  # result, shown, items, item or full
    step_id: str
    iteration: str
    value: bytes  # JSON
    steps: int = 0  # of an item: how many tasks are done for it

    schema: ClassVar[Schema] = Schema(
        "step_values",
        22,
        key=("run_id", "kind", "step_id", "iteration"),
        adds=(Adds("values_of", "run_id"), Adds("items_of", "item_of", size_bytes="steps")),
    )

    @property
    def size_bytes(self) -> int:
        return len(self.value)

    @property
    def item_of(self) -> str | None:
        """The run whose item it is; None where it is something else."""
        return self.run_id if self.kind == ITEM else None


RECORDS: tuple[type[Record], ...] = (
    Blob,
    StoredFile,
    PendingUpload,
    UploadFile,
    Event,
    Mark,
    Partial,
    Delivery,
    Usage,
    DeliveryPayload,
    Target,
    Replica,
    Copy,
    Total,
    Once,
    Subscription,
    Approval,
    Webhook,
    Secret,
    Run,
    Step,
    StepValue,
    RunText,
)
