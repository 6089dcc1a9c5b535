"""The way from a request to the store: every method takes a right and opens what it is for.

Resources are given a Door and never the Store, so that none of them can ask for anything
without saying by which right (invariant 9). `tests/test_arrows.py` holds the rest of the
gateway to it: only this module, and what serves no tenant, knows the Store.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import final

import falcon

from cas.deliveries import Deliveries
from cas.elsewhere import Fetched
from cas.errors import NotFound
from cas.files import Files
from cas.records import PENDING, StoredFile, Subscription
from cas.store import Store
from cas.upload_links import UploadLink
from cas.uploads import Uploads
from gateway.auth import Caller
from gateway.limits import Limits
from gateway.links import Links
from gateway.logs import about
from workflows.approvals import ApprovalLink, Approvals
from workflows.events import Events
from workflows.runs import Runs
from workflows.signatures import Call
from workflows.views import Workflows
from workflows.webhooks import ProvedCall, Webhooks


@final
class Door:
    """Safe for threads. `request_id` goes into the audit log with what is written."""

    def __init__(
        self, store: Store, workflows: Workflows, links: Links, limits: Limits | None = None
    ) -> None:
        """Without `limits`, whose middleware an app needs too, anybody may guess."""
        self._store = store
        self._workflows = workflows
        self._links = links
        self._limits = limits

    # --- by a bearer token

    def files(self, caller: Caller, request_id: str) -> Files:
        """The files of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._store.files(caller.tenant_id, caller.actor, request_id)

    def uploads(self, caller: Caller, request_id: str) -> Uploads:
        """The uploads of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._store.uploads(caller.tenant_id, caller.actor, request_id)

    def deliveries(self, caller: Caller, request_id: str) -> Deliveries:
        """What is sent for the caller's tenant, and for no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._store.deliveries(caller.tenant_id, caller.actor, request_id)

    def events(self, caller: Caller, request_id: str) -> Events:
        """The events of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._workflows.events(caller.tenant_id, caller.actor, request_id)

    def event(self, req: falcon.Request, caller: Caller) -> None:
        """An event comes for the caller's tenant; raises TooManyRequests, TooLarge."""
        if self._limits is not None:
            self._limits.event(req, caller.tenant_id)

    def watch(self, wait: Subscription, ring: Callable[[], None]) -> Callable[[], None]:
        """Have `ring` called when a wait that `events` gave has an event or is over; returns
        how to stop that. Raises CatalogClosed."""
        return self._workflows.watcher.watch(wait.subscription_id, ring)

    def approvals(self, caller: Caller, request_id: str) -> Approvals:
        """The approvals of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._workflows.approvals(caller.tenant_id, caller.actor, request_id)

    def webhooks(self, caller: Caller, request_id: str) -> Webhooks:
        """The webhooks of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._workflows.webhooks(caller.tenant_id, caller.actor, request_id)

    def runs(self, caller: Caller, request_id: str) -> Runs:
        """The runs of the caller's tenant, and of no other."""
        about(tenant=caller.tenant_id, actor=caller.actor)
        return self._workflows.runs(caller.tenant_id, caller.actor, request_id)

    def submission(self, caller: Caller) -> None:
        """A workflow of the caller's tenant is submitted; raises TooManyRequests."""
        if self._limits is not None:
            self._limits.submission(caller.tenant_id)

    # --- by the token of an upload

    def upload_link(self, req: falcon.Request, token: str) -> UploadLink:
        """The one upload that the token opens; raises NotFound, TooManyRequests, TooLarge."""
        with self._looking_up(req):
            link = self._store.upload_link(token, req.context.request_id)
        self._opened(req, link)
        return link

    # --- by a signature

    def slot(self, req: falcon.Request, token: str, index: int) -> UploadLink:
        """The upload whose slot `req` is signed for.

        Raises NotFound, BadSignature, LinkExpired.
        """
        with self._looking_up(req):
            try:
                link = self._store.upload_link(token, req.context.request_id)
            except NotFound:
                self._links.check_no_slot(req, token, index)
                raise
            self._links.check_slot(req, link.upload, index)
        self._opened(req, link)
        return link

    def file(self, req: falcon.Request, file_id: str, filename: str) -> StoredFile:
        """The file that `req` is signed for; raises BadSignature, LinkExpired, NotFound."""
        with nullcontext() if self._limits is None else self._limits.verifying(req):
            self._links.check_download(req, file_id, filename)
        file = self._store.file_by_id(file_id)
        about(tenant=file.tenant_id, actor="signed URL")
        return file

    def approval(
        self, req: falcon.Request, approval_id: str, decision: str, token: str
    ) -> ApprovalLink:
        """The approval and decision that a link is signed for.

        Raises BadSignature, NotFound, TooManyRequests, TooLarge.
        """
        with self._looking_up(req):
            link = self._workflows.approval_link(
                approval_id, decision, token, req.context.request_id
            )
        about(tenant=link.approval.tenant_id, actor="link")
        if self._limits is not None:
            self._limits.body(req, link.approval.tenant_id)
        return link

    def deciding(self, req: falcon.Request, link: ApprovalLink) -> None:
        """A link that `approval` opened is about to decide, which is an event; looking at it is
        none. Raises TooManyRequests, TooLarge."""
        if self._limits is not None and link.approval.status == PENDING:
            self._limits.event(req, link.approval.tenant_id)

    def webhook(self, req: falcon.Request, webhook_id: str, call: Call) -> ProvedCall:
        """The call of a webhook, whose signature is good: it passes, however often others of
        its address were wrong, for many send from the addresses of GitHub.

        Raises NotFound, BadSignature, TooManyRequests.
        """
        with nullcontext() if self._limits is None else self._limits.verifying(req):
            opened = self._workflows.webhook_call(webhook_id, req.context.request_id)
            proved = opened.prove(call)
        about(tenant=proved.webhook.tenant_id, actor="webhook")
        if self._limits is not None:
            self._limits.event(req, proved.webhook.tenant_id)
        return proved

    def came_before(self, proved: ProvedCall) -> None:
        """The call that `webhook` proved was taken before, or is none that an event is made of:
        it is no further event."""
        if self._limits is not None:
            self._limits.event_again(proved.webhook.tenant_id)

    # --- by a file that one of the others opened

    def bytes_of(self, file: StoredFile) -> int | Fetched:
        """A read-only descriptor, or a stream of what comes from a target; the caller's to
        close. Raises BlobMissing, BlobDamaged, BlobElsewhere."""
        return self._store.opener.open(file.checksum_sha256, file.size_bytes)

    def named(self, file: StoredFile) -> bool:
        """Whether a proxy that opens the object by its name, within a minute, finds it."""
        return self._store.opener.named(file.checksum_sha256)

    # --- limits

    def _looking_up(self, req: falcon.Request) -> AbstractContextManager[None]:
        return nullcontext() if self._limits is None else self._limits.looking_up(req)

    def _opened(self, req: falcon.Request, link: UploadLink) -> None:
        about(tenant=link.upload.tenant_id, actor="link")
        if self._limits is not None:
            self._limits.link(req, link.upload)
