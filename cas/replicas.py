"""Replicas: what the background process asks of the rows, and tells them.

The catalog makes a row for each target in the transaction that makes a blob live, and marks
it removed in the one that ends the blob (invariant 6). The steps from state to state are in
`cas.rows`; here they meet the catalog, each word from outside judged against the row as it
is now. All of it is safe to stop anywhere and to repeat.

    register begin_backfill backfill keep_profile moved     targets, and rows for old blobs
    was_shipped_to begin_shipping                           whether a target is a new one
    due next_due_us backlog                                 what is to be copied
    settle want_again                                       what became of it
    removable begin_removals put_off_removals end_removals  what is to be deleted there
    homes evict is_leftover                                 what may be gone here
    faults                                                  what the doctor asks
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeVar, final

import msgspec
from msgspec.structs import replace

from cas import rows
from cas.adoption import object_of
from cas.blobs import BlobFiles, Placed
from cas.catalog import Catalog, Key, Snapshot, Transaction, pages
from cas.digest import Digest
from cas.errors import NotFound, TargetNeeded
from cas.records import DELETING, LIVE, TARGETS_MAX, Blob, Copy, Record, Replica, Target
from cas.totals import backlog_of

R = TypeVar("R", bound=Record)
T = TypeVar("T")

_ACTOR = "replicator"
_ROWS_A_WRITE = 500  # a few ms of the writer lock
_UNLINKS_ALONE = 16  # each may take ms where the file is large
_NEEDED_COUNTED_MAX = 1000


# --- outcomes


@final
class Done(msgspec.Struct, frozen=True):
    """The copy is at the target: verified there by what the profile trusts, after it was sent."""

    row: Replica  # as it was when the work began


@final
class Failed(msgspec.Struct, frozen=True):
    """It is not known to be there; `next_attempt_at` is by the clock that `due` was given."""

    row: Replica
    error: str
    next_attempt_at: int
    afresh: bool = False  # forget the multipart upload that was under way


@final
class Copying(msgspec.Struct, frozen=True):
    """A multipart upload has come so far; `copy` is what a restarted mirror needs."""

    row: Replica
    copy: Copy


Outcome = Done | Failed | Copying


@final
class Backlog(msgspec.Struct, frozen=True):
    """What is still to be copied to one target."""

    rows: int
    size_bytes: int
    oldest_us: int  # how long the oldest has waited; 0 where nothing waits
    oldest: Digest | None = None  # which one that is
    oldest_error: str = ""  # what went wrong with it last


# --- targets


def register(catalog: Catalog, places: Iterable[tuple[str, str]]) -> None:
    """Make the targets of the catalog those configured: (name, place); durable on return.

    Call it when the background process starts, before anything else here. A new target gets
    its record, and from then on a row for each blob that becomes live; `backfill` makes those
    of the blobs that were there before. One that is no longer configured, or whose place is
    another now, goes where it has no rows.

    Raises TargetNeeded, having changed nothing, where it has: what is known of its copies is
    the work of days, and one start without the configuration must not cost it. `forget` lets go
    of a target, `moved` is for the same place under another address.
    """
    wanted = dict(places)
    with catalog.read() as snapshot:
        known = {target.name: target for target in targets(snapshot)}
        in_rows = set(_names_in_rows(snapshot))
    leaving = sorted(name for name in known if known[name].place != wanted.get(name))
    for name in leaving:
        if name in in_rows:
            raise TargetNeeded(name, known[name].place, wanted.get(name))
    for name in (*leaving, *sorted(in_rows - known.keys())):  # and what a killed `forget` left
        _leave(catalog, name)
    catalog.write(lambda txn: _add(txn, wanted), actor=_ACTOR)


@final
class Forgetting(msgspec.Struct, frozen=True):
    """What it means to forget a target."""

    name: str
    place: str
    rows: int  # what is known of so many blobs there goes
    needed: int  # blobs whose good bytes are there alone: it cannot be forgotten


def plan_forgetting(catalog: Catalog, name: str) -> Forgetting:
    """What `forget` would do. Reads all its rows, and each blob whose good bytes are not here.

    Raises NotFound for a target that the catalog does not know.
    """
    with catalog.read() as snapshot:
        target = _target(snapshot, name)
        count = sum(len(page) for page in pages(snapshot, Replica, "", (name,)))
        return Forgetting(name, target.place, count, _needed(snapshot, name))


def forget(catalog: Catalog, name: str) -> None:
    """Forget a target and what is known of its copies, in bounded steps; durable on return.

    What is at the target stays there. A target that is configured still is a new one at the
    next start. Raises NotFound; TargetNeeded, having changed nothing, where blobs have their
    good bytes there alone.
    """
    with catalog.read() as snapshot:
        place, needed = _target(snapshot, name).place, _needed(snapshot, name)
    if needed:
        raise TargetNeeded(name, place, blobs=needed)
    _leave(catalog, name)


def targets(snapshot: Snapshot) -> list[Target]:
    """The targets that each blob must reach, in the order of their names."""
    return snapshot.range(Target, "", limit=TARGETS_MAX)


def moved(catalog: Catalog, name: str, place: str) -> None:
    """Say that a target has another address and is the same place. Raises NotFound.

    What a probe found out is forgotten: another server may answer there.
    """
    catalog.write(
        lambda txn: txn.replace(replace(_target(txn, name), place=place, profile=b"")),
        actor=_ACTOR,
    )


def keep_profile(catalog: Catalog, name: str, profile: bytes) -> None:
    """Write down what a probe found out about a target. Raises NotFound."""
    catalog.write(
        lambda txn: txn.replace(replace(_target(txn, name), profile=profile)), actor=_ACTOR
    )


def was_shipped_to(snapshot: Snapshot, name: str) -> bool:
    """Whether the journal was, or may have been, shipped to a target before."""
    target = snapshot.get(Target, name)
    return target is not None and target.shipped_at is not None


def begin_shipping(catalog: Catalog, name: str) -> None:
    """Say that the journal is shipped to a target from now on; durable. Raises NotFound."""
    catalog.write(
        lambda txn: txn.replace(replace(_target(txn, name), shipped_at=txn.now_us)), actor=_ACTOR
    )


def begin_backfill(catalog: Catalog, name: str) -> None:
    """Have `backfill` look at all blobs again, which mends rows too. Raises NotFound."""
    catalog.write(
        lambda txn: txn.replace(replace(_target(txn, name), backfill_after=b"")), actor=_ACTOR
    )


def backfill(catalog: Catalog, target: str, limit: int = _ROWS_A_WRITE) -> bool:
    """Give rows to up to `limit` blobs that were there before the target; True: more to do.

    One write. It goes on where it stopped, also after a restart. False where nothing is left,
    or the target has no record.
    """
    with catalog.read() as snapshot:
        record = snapshot.get(Target, target)
    if record is None or record.backfill_after is None:
        return False

    def give(txn: Transaction) -> bool:
        record = txn.get(Target, target)
        if record is None or record.backfill_after is None:
            return False
        after: Key = (record.backfill_after,) if record.backfill_after else ()
        blobs = txn.range(Blob, "", after=after, limit=limit)
        for blob in blobs:
            if blob.state == LIVE:
                _wish(txn, target, blob)
        more = len(blobs) == limit
        txn.replace(replace(record, backfill_after=blobs[-1].digest if more else None))
        return more

    return catalog.write(give, actor=_ACTOR)


# --- copying


def due(
    snapshot: Snapshot, target: str, now_us: int, limit: int = 100, *, after: Key = ()
) -> list[Replica]:
    """Up to `limit` rows that want a copy made at `now_us`, longest due first.

    `after` is the last row that was looked at: its `next_attempt_at` and its digest.

    Rows that were never tried are due at once, whatever `now_us` is. For the others it may
    be any clock that never goes back and is not behind the catalog's: catalog time itself
    stands still while the clock is not believed, and then no failed row would come again.
    The blob of a row may be at other targets only (`local` is False).
    """
    now_us = max(now_us, snapshot.position.at_us)
    before = (now_us + 1,)
    return snapshot.range(Replica, "queue", (target,), after=after, before=before, limit=limit)


def next_due_us(snapshot: Snapshot, target: str) -> int | None:
    """When the first row of the queue is due; None where none is, or will be, by itself."""
    for row in snapshot.range(Replica, "queue", (target,), before=(rows.NEVER,), limit=1):
        return row.next_attempt_at
    return None


def backlog(snapshot: Snapshot, target: str, now_us: int) -> Backlog:
    """What is still to be copied, in constant time."""
    total = backlog_of(snapshot, target)
    for row in snapshot.range(Replica, "age", (target,), limit=1):
        waits_us = max(now_us - row.wanted_at, 0)
        return Backlog(total.count, total.size_bytes, waits_us, row.digest, row.last_error)
    return Backlog(total.count, total.size_bytes, 0)


def settle(catalog: Catalog, outcomes: Sequence[Outcome]) -> list[Replica | None]:
    """Write down what became of copies, in one write; durable on return.

    Returns the rows as they are now, None where there is none (any more). A row is changed
    only where it is the one that the work began with: after Done `held` is the answer, after
    Copying the upload goes on only where the state is `copying` (else abort it). An object
    that may have arrived for a blob that went meanwhile gets a row again, so that it is
    deleted in its time.
    """
    return catalog.write(lambda txn: [_settled(txn, outcome) for outcome in outcomes], actor=_ACTOR)


def want_again(catalog: Catalog, target: str, digests: Iterable[Digest]) -> int:
    """Have copies made anew that were found absent or rotten; returns how many; durable.

    An evicted blob that no other target holds is listed as missing (invariant 1) until a
    copy is verified again: by looking at the target, if nobody brings the bytes.
    """
    some = list(digests)
    return sum(
        catalog.write(
            lambda txn, part=part: sum(_lose(txn, target, digest) for digest in part),  # type: ignore[misc]
            actor=_ACTOR,
        )
        for part in _parts(some)
    )


# --- deleting


def removable(
    snapshot: Snapshot, target: str, before_us: int, shipped_seq: int, limit: int = 100
) -> list[Replica]:
    """Up to `limit` rows whose copies no blob has needed since before `before_us`.

    `shipped_seq` is the newest frame that is at the target: none is deleted there whose
    removal the journal there does not tell. Those whose DELETE was begun are among them at
    any time, since it may have been sent and must be known to have ended; but one that was
    refused comes again in its time.
    """
    found = snapshot.range(Replica, "ending", (target,), limit=limit)
    return [row for row in found if _is_removable(row, before_us, shipped_seq)]


def _is_removable(row: Replica, before_us: int, shipped_seq: int) -> bool:
    due = row.removed_at is not None and row.removed_at < before_us
    if row.state == DELETING:
        return due or not row.attempts
    return due and row.seq <= shipped_seq


def begin_removals(catalog: Catalog, found: Iterable[Replica]) -> list[Replica]:
    """Say that DELETEs are about to be sent; returns the rows to send them for; durable.

    Left out are those that changed since they were `found`. Send nothing for another row.
    """

    def begin(txn: Transaction, row: Replica) -> Replica | None:
        now = txn.get(Replica, row.target, row.digest)
        if now is None or now.removed_at is None:
            return None
        stale = now.seq != row.seq or txn.get(Blob, row.digest) is not None
        if now.state != DELETING and stale:
            return None
        now = rows.begun(now, txn.now_us, _seq(txn))
        txn.replace(now)
        return now

    return [row for row in _each(catalog, begin, found) if row is not None]


def put_off_removals(catalog: Catalog, refused: Iterable[tuple[Replica, str, int]]) -> None:
    """Say that the target answered DELETEs, and refused them: (row, why, the time that is to
    stand for `removed_at`, so that others come first). Durable on return."""
    known = list(refused)
    words = {(row.target, row.digest): (why, at_us) for row, why, at_us in known}

    def put_off(txn: Transaction, row: Replica) -> None:
        now = txn.get(Replica, row.target, row.digest)
        if now is not None and now.state == DELETING and now.seq == row.seq:
            txn.replace(rows.refused(now, *words[row.target, row.digest]))

    _each(catalog, put_off, [row for row, _, _ in known])


def end_removals(catalog: Catalog, begun: Iterable[Replica]) -> None:
    """Say that DELETEs have ended for certain: the target answered. Durable on return.

    The row goes, and with it what a multipart upload would go on with; where the blob came
    back meanwhile, its copy is wanted now.
    """

    def end(txn: Transaction, row: Replica) -> None:
        now = txn.get(Replica, row.target, row.digest)
        if now is None or now.state != DELETING or now.seq != row.seq:
            return
        _forget_copy(txn, now)
        after = rows.ended(now, txn.now_us, _seq(txn))
        if after is None:
            txn.delete(now)
        else:
            txn.replace(after)

    _each(catalog, end, begun)


# --- evicting


def homes(snapshot: Snapshot, digest: Digest) -> list[str]:
    """The targets that hold a verified copy which is to stay."""
    found = snapshot.range(Replica, "blob", (digest,), limit=TARGETS_MAX)
    return [row.target for row in found if row.held and snapshot.get(Target, row.target)]


def evict(
    catalog: Catalog,
    blobs: BlobFiles,
    digests: Sequence[Digest],
    shipped: Mapping[str, int],
    may_go: Callable[[Digest], bool] = lambda _digest: True,
) -> list[Blob]:
    """Let go of local bytes that every target holds; returns the blobs as they are now.

    `shipped` has the newest frame that is at each target: only what was verified there after
    the last DELETE, in a frame that is shipped, is evicted (invariant 8). The record first,
    durably, then the file: one that a crash leaves behind is removed by the scrub. Whoever
    has the file open reads on. Passes over whatever is not evictable now, and over what is in
    use by its name: `may_go` is asked in the transaction, and once more before the file goes.
    """
    gone: list[Blob] = []
    for some in _parts(digests, _UNLINKS_ALONE):
        evicted = catalog.write(
            lambda txn, some=some: [  # type: ignore[misc]
                found
                for digest in some
                if may_go(digest) and (found := _evict(txn, blobs, digest, shipped))
            ],
            actor=_ACTOR,
        )
        _unlink(catalog, blobs, evicted, may_go)
        gone += [blob for blob, _ in evicted]
    return gone


def _evict(
    txn: Transaction, blobs: BlobFiles, digest: Digest, shipped: Mapping[str, int]
) -> tuple[Blob, Placed] | None:
    blob = txn.get(Blob, digest)
    if blob is None or not blob.local or blob.missing_at is not None or blob.state == DELETING:
        return None
    names = [target.name for target in targets(txn)]
    for name in names:
        row = txn.get(Replica, name, digest)
        if row is None or not row.held or row.seq > shipped.get(name, -1):
            return None
    placed = blobs.stat(digest)
    if not names or placed is None or placed != object_of(blob):
        return None
    blob = replace(blob, local=False, evicted_at=txn.now_us)
    txn.replace(blob)
    return blob, placed


def _unlink(
    catalog: Catalog,
    blobs: BlobFiles,
    evicted: list[tuple[Blob, Placed]],
    may_go: Callable[[Digest], bool],
) -> None:
    """Alone, so that no writer is between looking at the file and naming it. One that was
    promised to somebody meanwhile stays, as a crash would leave it."""

    def unlink(snapshot: Snapshot) -> None:
        blobs.remove_many(
            (
                blob.digest
                for blob, placed in evicted
                if is_leftover(snapshot, blob.digest)
                and blobs.stat(blob.digest) == placed
                and may_go(blob.digest)
            ),
            durable=False,
        )

    if evicted:
        catalog.alone(unlink)


def is_leftover(snapshot: Snapshot, digest: Digest) -> bool:
    """Whether a file of this digest is what an eviction left behind."""
    blob = snapshot.get(Blob, digest)
    return blob is not None and not blob.local and blob.state != DELETING


# --- for the doctor


def faults(snapshot: Snapshot) -> Iterator[tuple[Digest, str]]:
    """(digest, what is wrong) for each row that cannot be as it is, or is not there.

    Reads all blobs and rows; those of a target that has no record are on their way out.
    """
    known = {target.name: target for target in targets(snapshot)}
    for row in chain.from_iterable(pages(snapshot, Replica)):
        if row.target in known and (what := _fault(snapshot, row)):
            yield row.digest, f"its row at target {row.target} {what}"
    for copy in chain.from_iterable(pages(snapshot, Copy)):
        if copy.target in known and snapshot.get(Replica, copy.target, copy.digest) is None:
            yield copy.digest, f"an upload to target {copy.target} goes on without a row"
    for blob in chain.from_iterable(pages(snapshot, Blob)) if known else ():
        for name, target in known.items():
            after = target.backfill_after
            due = blob.state == LIVE and (after is None or blob.digest <= after)
            if due and snapshot.get(Replica, name, blob.digest) is None:
                yield blob.digest, f"it is live and has no row at target {name}"


def _fault(snapshot: Snapshot, row: Replica) -> str:
    what = rows.fault(row)
    if what:
        return what
    blob = snapshot.get(Blob, row.digest)
    if blob is None:
        return "is kept for a blob that has no record" if row.removed_at is None else ""
    if blob.size_bytes != row.size_bytes:
        return f"has {row.size_bytes:,} bytes of {blob.size_bytes:,}"
    if blob.state == LIVE and row.removed_at is not None and row.queue is None:
        return "is removed, and the blob is live"
    return ""


# --- inside: targets


def _target(snapshot: Snapshot, name: str) -> Target:
    target = snapshot.get(Target, name)
    if target is None:
        raise NotFound("target", name)
    return target


def _names_in_rows(snapshot: Snapshot) -> Iterator[str]:
    """The targets that have rows, also those that were being removed when somebody died."""
    after: Key = ()
    while found := snapshot.range(Replica, "", after=after, limit=1):
        yield found[0].target
        after = (found[0].target,)


def _add(txn: Transaction, places: Mapping[str, str]) -> None:
    for name, place in places.items():
        if txn.get(Target, name) is None:
            txn.insert(Target(name, place, txn.now_us))


def _needed(snapshot: Snapshot, name: str) -> int:
    """How many blobs have their good bytes at this target alone: evicted ones, and those that
    are missing here. Costs what is evicted or missing; counts no further than it must."""
    count = 0
    for index in ("evicted", "missing"):
        for blob in chain.from_iterable(pages(snapshot, Blob, index)):
            twice = index == "evicted" and blob.missing_at is not None
            count += not twice and homes(snapshot, blob.digest) == [name]
            if count == _NEEDED_COUNTED_MAX:
                return count
    return count


def _leave(catalog: Catalog, name: str) -> None:
    """Forget a target: its record first, so that nobody makes another row, then the rows."""

    def forget(txn: Transaction) -> bool:
        target = txn.get(Target, name)
        if target is not None:
            txn.delete(target)
        found = txn.range(Replica, "", (name,), limit=_ROWS_A_WRITE)
        for row in found:
            _forget_copy(txn, row)
            txn.delete(row)
        return bool(found)

    while catalog.write(forget, actor=_ACTOR):
        pass


# --- inside: rows


def _wish(txn: Transaction, target: str, blob: Blob) -> None:
    row = txn.get(Replica, target, blob.digest)
    now = rows.wished(row, target, blob.digest, blob.size_bytes, txn.now_us, _seq(txn))
    _put(txn, row, now)


def _settled(txn: Transaction, outcome: Outcome) -> Replica | None:
    seen = outcome.row
    row = txn.get(Replica, seen.target, seen.digest)
    if row is None:
        return _arrived_late(txn, seen)
    if row.held:
        return _settled_held(txn, row, outcome)
    if row.removed_at is not None or row.seq != seen.seq:
        return _put(txn, row, rows.touched(row))
    match outcome:
        case Done():
            return _done(txn, row)
        case Failed():
            if outcome.afresh:
                _forget_copy(txn, row)
            return _put(txn, row, _failed(row, outcome))
        case Copying():
            _put(txn, txn.get(Copy, row.target, row.digest), outcome.copy)
            return _put(txn, row, rows.copying(row))


def _settled_held(txn: Transaction, row: Replica, outcome: Outcome) -> Replica | None:
    """For a copy that was sent again although it was there: so that time does not tell one
    tenant of another (invariant 9)."""
    if isinstance(outcome, Done):
        return _put(txn, row, rows.verified(row, txn.now_us, row.seq))
    if isinstance(outcome, Failed) and row.seq == outcome.row.seq:
        # What was sent may have spoilt what was there.
        row = _put(txn, row, _failed(rows.lost(row, txn.now_us, _seq(txn)), outcome))
        _list_if_nowhere(txn, row.digest)
    return row


def _done(txn: Transaction, row: Replica) -> Replica:
    _forget_copy(txn, row)
    blob = txn.get(Blob, row.digest)
    if blob is not None and not blob.local and blob.missing_at is not None:
        # It is somewhere after all. What a restore found nowhere was never evicted: it is now, or
        # it would be in neither index.
        evicted_at = blob.evicted_at or txn.now_us
        txn.replace(replace(blob, missing_at=None, evicted_at=evicted_at))
    return _put(txn, row, rows.verified(row, txn.now_us, _seq(txn)))


def _failed(row: Replica, outcome: Failed) -> Replica:
    return rows.failed(row, outcome.error, outcome.next_attempt_at, afresh=outcome.afresh)


def _arrived_late(txn: Transaction, seen: Replica) -> Replica | None:
    """Work has ended for a row that is no more: an object may be there that nobody wants."""
    if txn.get(Target, seen.target) is None:
        return None
    blob = txn.get(Blob, seen.digest)
    if blob is not None and blob.state == LIVE:  # a row that got lost
        row = rows.wished(None, seen.target, blob.digest, blob.size_bytes, txn.now_us, _seq(txn))
        return _put(txn, None, rows.touched(row))
    row = rows.stray(seen.target, seen.digest, seen.size_bytes, txn.now_us, _seq(txn))
    return _put(txn, None, row)


def _lose(txn: Transaction, target: str, digest: Digest) -> int:
    row = txn.get(Replica, target, digest)
    if row is None:
        return 0
    now = _put(txn, row, rows.lost(row, txn.now_us, _seq(txn)))
    _list_if_nowhere(txn, digest)
    return int(row.held and not now.held)


def _list_if_nowhere(txn: Transaction, digest: Digest) -> None:
    """A blob that is neither here nor at any target is listed as missing (invariant 1)."""
    blob = txn.get(Blob, digest)
    if blob is None or blob.local or blob.missing_at is not None or blob.state == DELETING:
        return
    if not homes(txn, digest):
        txn.replace(replace(blob, missing_at=txn.now_us))


def _forget_copy(txn: Transaction, row: Replica) -> None:
    copy = txn.get(Copy, row.target, row.digest)
    if copy is not None:
        txn.delete(copy)


# --- inside: writing


def _seq(txn: Transaction) -> int:
    """The frame that this write will be in."""
    return txn.position.seq + 1


def _put(txn: Transaction, before: R | None, now: R) -> R:
    if before is None:
        txn.insert(now)
    elif now != before:
        txn.replace(now)
    return now


def _parts(items: Sequence[T], size: int = _ROWS_A_WRITE) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _each(
    catalog: Catalog, step: Callable[[Transaction, Replica], T], found: Iterable[Replica]
) -> list[T]:
    """Take a step with each row, so many in a write that no writer waits for long."""
    return [
        result
        for part in _parts(list(found))
        for result in catalog.write(
            lambda txn, part=part: [step(txn, row) for row in part],  # type: ignore[misc]
            actor=_ACTOR,
        )
    ]
