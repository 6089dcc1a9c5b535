"""How an approval ends, for those who decide it and for the sweep that ends what nobody decided.

    pending → approved | rejected | cancelled | expired

The end and its event are one transaction (invariant 6), and there is one end: whoever comes
second is told of the first (`workflows.approvals`). What was not mailed by then is not mailed
any more: its links would decide nothing.

The event names the run and the approval's key, and not the approval: so of one key in one run
one approval is pending at a time, and what the one before it came to is told to nobody who
begins to wait after the next was asked for (`take_key`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from cas.catalog import Snapshot, Transaction
from cas.clock import rfc3339
from cas.dating import postponed
from cas.deliveries import call_off
from cas.errors import ApprovalKeyTaken
from cas.events import append_event, topic
from cas.records import APPROVED, EXPIRED, PENDING, Approval, Event

_PAGE: Final = 100


def event_name(approval_key: str) -> str:
    """The event that tells how an approval with this key ended."""
    return f"approval_{approval_key}"


def approval_as_of(approval: Approval, now_us: int) -> Approval:
    """The approval as it is at `now_us`: one past its time is expired before the sweep says so."""
    if approval.status != PENDING:
        return approval
    approval = postponed(approval, now_us)
    if approval.expires_at <= now_us:
        return msgspec.structs.replace(approval, status=EXPIRED)
    return approval


def ended_of(snapshot: Snapshot, approval_id: str, now_us: int) -> str:
    """Why no mail is to ask for this approval at `now_us` (catalog time), for people to read;
    "": it is pending. One that was forgotten ended long before."""
    found = snapshot.get(Approval, approval_id)
    if found is None:
        return "the approval is forgotten already"
    status = approval_as_of(found, now_us).status
    return "" if status == PENDING else _why_unsent(status)


def _why_unsent(status: str) -> str:
    return f"the approval is {status} already"


def take_key(
    txn: Transaction,
    tenant_id: str,
    run: str,
    approval_key: str,
    *,
    keep_us: int,
) -> None:
    """Have the key free for an approval that is about to be asked for in this transaction:
    no decision on an earlier one answers it, nor one on it an earlier one.

    One whose time is over ends here where the sweep has not come yet. Raises ApprovalKeyTaken
    while another one is pending, in the run `direct` too.
    """
    for approval in txn.range(Approval, "key", (tenant_id, run, approval_key, PENDING)):
        if approval_as_of(approval, txn.now_us).status == PENDING:
            raise ApprovalKeyTaken(approval_key, run)
        close_approval(txn, approval, EXPIRED, keep_us=keep_us)
    # Those who were given one of these have it still.
    about = topic(tenant_id, event_name(approval_key), None)
    while ended := txn.range(Event, "open", (about, run), limit=_PAGE):
        for event in ended:
            txn.replace(msgspec.structs.replace(event, open_for=None))


def close_approval(
    txn: Transaction,
    approval: Approval,
    status: str,
    *,
    decided_by: str | None = None,
    comment: str = "",
    keep_us: int,
) -> Approval:
    """End a pending approval and tell its run; the event, and the record, are kept `keep_us`.

    Its addressees can look up for as long how it ended.
    """
    closed = msgspec.structs.replace(
        approval,
        status=status,
        open_until=None,
        undated_at=None if txn.believed else txn.now_us,
        decided_at=txn.now_us,
        decided_by=decided_by,
        comment=comment,
        forget_at=txn.now_us + keep_us,
    )
    txn.replace(closed)
    call_off(txn, closed.tenant_id, closed.approval_id, _why_unsent(status))
    append_event(
        txn,
        closed.tenant_id,
        event_name(closed.approval_key),
        ended_payload(closed),
        run=closed.workflow_run_id,
        keep_us=keep_us,
    )
    return closed


def ended_payload(approval: Approval) -> dict[str, object]:
    """What the workflow that waits for an approval resumes with.

    `approved_by` is null where it was not approved, `decided_by` where nobody decided, and
    both are "" where the addressee has no name.
    """
    return {
        "status": approval.status,
        "approval_id": approval.approval_id,
        "approval_key": approval.approval_key,
        "approved_by": approved_by(approval.status, approval.decided_by),
        "decided_by": approval.decided_by,
        "decided_at": None if approval.decided_at is None else rfc3339(approval.decided_at),
        "comment": approval.comment,
    }


def approved_by(status: str, decided_by: str | None) -> str | None:
    """Who approved: whoever decided, where that was to approve."""
    return decided_by if status == APPROVED else None
