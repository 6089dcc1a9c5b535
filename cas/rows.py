"""Rows: the states of a `Replica`, each step a function from the row to the next one.

        no row ──wished──→ wanted ⇄ copying ──verified──→ done
                             ↑                             │ released: the blob went
                             │                             ↓
        no row ←──ended── deleting ←──begun── done, wanted or copying, with `removed_at`

A row is in one of five conditions, told by three fields:

    queue       `removed_at`  `ending`   a copy is
    the target  None          None       wanted (state wanted or copying), and counts as backlog
    None        None          None       there: state done
    None        a time        the target needed by nobody; its DELETE waits for `delete_delay`
    None        a time        the target being deleted: state deleting
    the target  a time        the target being deleted, and wanted again after that

The last one is backlog that cannot be worked at yet, so that its next attempt is `NEVER`.

`seq` is why a late word is no harm: work takes the row along, and what it brings back
counts only where the row has the same `seq` still. A DELETE is sent only after `begun` was
committed in a later frame, so an upload from before it can never make the row done.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from cas.digest import Digest
from cas.records import COPYING, DELETING, DONE, WANTED, Replica

NEVER: Final = (1 << 63) - 1  # a time that no clock reaches

_TOLD_MAX = 500  # characters of an error that are kept


def wished(
    row: Replica | None, target: str, digest: Digest, size_bytes: int, now_us: int, seq: int
) -> Replica:
    """The row of a blob that is live (again)."""
    if row is None:
        return Replica(target, digest, size_bytes, WANTED, now_us, target, now_us, seq=seq)
    if row.state == DELETING:
        if row.queue is not None:
            return row
        # `seq` stays: it is the DELETE's, whose end must still be believed.
        return replace(row, queue=target, wanted_at=now_us, next_attempt_at=NEVER)
    if row.removed_at is None:
        return row
    row = replace(row, removed_at=None, ending=None, seq=seq)
    # A copy that was verified is there still: no DELETE was sent.
    return row if row.state == DONE else _queued(row, now_us)


def released(row: Replica, now_us: int, seq: int) -> Replica | None:
    """The row of a blob whose record goes; None: nothing can be at the target."""
    if row.state == DELETING:
        return replace(row, queue=None)
    if row.removed_at is not None:
        return row
    if never_tried(row):
        return None
    return replace(row, queue=None, removed_at=now_us, ending=row.target, seq=seq)


def never_tried(row: Replica) -> bool:
    """Whether nobody has sent anything for this row, as far as is written down."""
    return row.state == WANTED and not row.attempts and row.done_at is None


def verified(row: Replica, now_us: int, seq: int) -> Replica:
    """The row of a copy that is there, whether it was wanted or done before."""
    return replace(row, state=DONE, queue=None, attempts=0, last_error="", done_at=now_us, seq=seq)


def failed(row: Replica, error: str, next_attempt_at: int, *, afresh: bool = False) -> Replica:
    """The row after a copy that did not succeed; `afresh`: no multipart upload goes on."""
    return replace(
        row,
        state=WANTED if afresh else row.state,
        attempts=row.attempts + 1,
        last_error=error[:_TOLD_MAX],
        next_attempt_at=next_attempt_at,
    )


def copying(row: Replica) -> Replica:
    """The row of a multipart upload that is under way."""
    return replace(row, state=COPYING)


def touched(row: Replica) -> Replica:
    """The row after work that says nothing of it, but may have left an object there."""
    return replace(row, attempts=1) if never_tried(row) else row


def stray(target: str, digest: Digest, size_bytes: int, now_us: int, seq: int) -> Replica:
    """The row of an object that may be at the target, and that no blob needs."""
    return Replica(
        target,
        digest,
        size_bytes,
        WANTED,
        now_us,
        None,
        now_us,
        attempts=1,
        removed_at=now_us,
        ending=target,
        seq=seq,
    )


def lost(row: Replica, now_us: int, seq: int) -> Replica:
    """The row of a copy that was found absent or rotten.

    `done_at` stays: something may be there, so the row is never taken for an untried one.
    Work that is under way is not believed, for it may have verified what is lost now.
    """
    if row.state == DELETING:
        return row
    was, row = row.state, replace(row, seq=seq)
    if was != DONE:
        return row
    row = replace(row, state=WANTED)
    # Should its blob come back, it is to be copied; until then its DELETE does no harm.
    return row if row.removed_at is not None else _queued(row, now_us)


def begun(row: Replica, now_us: int, seq: int) -> Replica:
    """The row whose DELETE is about to be sent, or sent once more."""
    if row.state == DELETING:
        return replace(row, sent_at=now_us)
    return replace(row, state=DELETING, attempts=0, last_error="", seq=seq, sent_at=now_us)


def refused(row: Replica, error: str, removed_at: int) -> Replica:
    """The row whose DELETE was answered, but not done. It comes after all that were removed
    before `removed_at`, so that those which are refused always keep no others waiting."""
    return replace(
        row,
        attempts=row.attempts + 1,
        last_error=error[:_TOLD_MAX],
        removed_at=removed_at,
        sent_at=None,
    )


def ended(row: Replica, now_us: int, seq: int) -> Replica | None:
    """The row after its DELETE has ended for certain; None: nobody wants it again."""
    if row.queue is None:
        return None
    return replace(
        row,
        state=WANTED,
        next_attempt_at=now_us,
        attempts=0,
        last_error="",
        done_at=None,
        removed_at=None,
        ending=None,
        seq=seq,
        sent_at=None,
    )


def fault(row: Replica) -> str:
    """What is impossible about a row, in words; "" for one that is as it may be."""
    if row.state not in (WANTED, COPYING, DONE, DELETING):
        return f"has the unknown state {row.state!r}"
    if row.queue not in (None, row.target) or row.ending not in (None, row.target):
        return "is in the queue of another target"
    if (row.removed_at is None) != (row.ending is None):
        return "is removed and not removed"
    if row.state == DELETING:
        if row.ending is None:
            return "is being deleted without being removed"
        return "" if row.queue is None or row.next_attempt_at == NEVER else "is due while deleted"
    if row.state == DONE and row.done_at is None:
        return "is done without having been verified"
    due = row.state in (WANTED, COPYING) and row.removed_at is None
    if due != (row.queue is not None):
        return "is wanted and in no queue" if due else "is in the queue and not wanted"
    return ""


def _queued(row: Replica, now_us: int) -> Replica:
    return replace(row, queue=row.target, wanted_at=now_us, next_attempt_at=now_us)
