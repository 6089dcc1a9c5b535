"""What ends with a run, in the transaction of its end (invariant 6).

Its waits end in any case, so that no event is given to nobody and no key is blocked. Where it
did not come to its own end, nobody needs what it asked others for: its pending upload links
and approvals are cancelled, and its webhooks are over. A run that is completed leaves them as
it made them, for a link may have been its purpose.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cas.approvals import close_approval
from cas.catalog import Snapshot, Transaction
from cas.events import REMEMBERED_US, end_waits
from cas.records import CANCELLED, COMPLETED, PENDING, Approval, Once, PendingUpload, Run, Webhook
from cas.uploads import close_upload

_PAGE = 200


def let_go(txn: Transaction, run: Run) -> None:
    """`run` has just ended; its status says how."""
    end_waits(txn, run.tenant_id, run.run_id)
    if run.status == COMPLETED:
        return
    for upload in list(_uploads(txn, run)):
        close_upload(txn, upload, CANCELLED, REMEMBERED_US)
    for approval in list(_approvals(txn, run)):
        close_approval(txn, approval, CANCELLED)
    for webhook in list(_webhooks(txn, run)):
        # Over now, however long it had; so it is in a clock in doubt too (invariant 10).
        txn.replace(msgspec.structs.replace(webhook, expires_at=txn.now_us, undated_at=None))


def _uploads(snapshot: Snapshot, run: Run) -> Iterator[PendingUpload]:
    """The pending uploads that its steps asked for: each is remembered under its step."""
    prefix = (run.tenant_id, f"run:{run.run_id}")
    after: tuple[str, ...] = ()
    while page := snapshot.range(Once, "", prefix, after=after, limit=_PAGE):
        for done in page:
            upload = snapshot.get(PendingUpload, done.result)
            if upload is not None and upload.status == PENDING:
                yield upload
        after = (page[-1].name,)


def _approvals(snapshot: Snapshot, run: Run) -> Iterator[Approval]:
    prefix = (run.tenant_id, run.run_id)
    after: tuple[str, ...] = ()
    while page := snapshot.range(Approval, "run", prefix, after=after, limit=_PAGE):
        yield from (approval for approval in page if approval.status == PENDING)
        after = (page[-1].approval_id,)


def _webhooks(snapshot: Snapshot, run: Run) -> Iterator[Webhook]:
    prefix = (run.tenant_id, run.run_id)
    after: tuple[str, ...] = ()
    while page := snapshot.range(Webhook, "run", prefix, after=after, limit=_PAGE):
        for webhook in page:
            if webhook.expires_at is None or webhook.expires_at > (run.ended_at or 0):
                yield webhook
        after = (page[-1].webhook_id,)
