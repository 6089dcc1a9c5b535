"""Tools over a store that another machine serves: a `Place` behind its gateway.

    with RemoteStore("https://files.example.org", token) as store:
        tools = Toolbox(RemotePlace(store))
        tools.storage.store(name="report", data="…", content_type="text/plain")

The token's tenant is the tenant, and its permissions say what may be done: `manage_storage`,
`view_storage`, `manage_uploads`, `manage_workflows`, `emit_events`, `wait_events` (which
`manage_workflows` includes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import msgspec

from cas.approvals import approved_by
from cas.clock import parse_rfc3339
from cas.errors import AccessDenied, TooLarge
from cas.links import download_name
from cas.once import OnceKey
from cas.records import PENDING, Event, StoredFile, Subscription
from cas.references import SCHEME, Reference, parse_reference
from cas.remote import RemoteStore
from cas.retention import Retention
from cas.uploads import UploadRequest
from workflows.approvals import ApprovalLinks, ApprovalRequest
from workflows.events import Claimed
from workflows.signatures import REFUSE
from workflows.tools.place import RegisteredWebhook, RequestedApproval, RequestedUpload
from workflows.webhooks import WebhookRequest


@final
class RemotePlace:
    """The store behind a gateway, for the tenant of its token; see
    `workflows.tools.place.Place`.

    What is asked for with a key is done once within a day: so long servers remember keys.
    Every call may raise AccessDenied and ServerUnreachable too.
    """

    def __init__(self, store: RemoteStore, *, scheme: str = SCHEME) -> None:
        """`scheme` is that of the server's references. Raises AccessDenied for a token that
        names no tenant."""
        if not store.tenant_id:
            raise AccessDenied("the token names no tenant")
        self._store = store
        self._scheme = scheme

    @property
    def tenant_id(self) -> str:
        return self._store.tenant_id

    # --- files

    def store(
        self,
        data: bytes,
        *,
        name: str,
        run: str,
        filename: str | None = None,
        content_type: str | None = None,
        retention: Retention | None = None,
    ) -> StoredFile:
        return self._store.files().put(
            data,
            name=name,
            run=run,
            filename=filename,
            content_type=content_type,
            retention=retention,
        )

    def stat(self, reference: str) -> StoredFile:
        return self._store.files().stat(self._parsed(reference))

    def read(self, reference: str, limit_bytes: int) -> tuple[bytes, str, str]:
        file, source = self._store.files().reader(self._parsed(reference))
        with source:
            if file.size_bytes > limit_bytes:
                raise TooLarge(limit_bytes)
            return source.read(), file.content_type, download_name(file)

    def url(self, reference: str, expires_in_s: int | None = None) -> str:
        return self._store.files().url(self._parsed(reference), expires_in_s)

    def delete(self, reference: str) -> None:
        self._store.files().delete(self._parsed(reference))

    # --- what people and programs are asked for

    def request_upload(self, wanted: UploadRequest, key: OnceKey | None = None) -> RequestedUpload:
        form = self._store.uploads().asked(wanted, key)
        return RequestedUpload(
            form["upload_id"],
            form["upload_token"],
            form["upload_url"],
            form["presigned_urls"],
            form["event_name"],
            parse_rfc3339(form["expires_at"]),
        )

    def request_approval(
        self, wanted: ApprovalRequest, key: OnceKey | None = None
    ) -> RequestedApproval:
        asked = {
            "approval_key": wanted.approval_key,
            "title": wanted.title,
            "message": wanted.message,
            "addressees": wanted.addressees,
            "expires_in": wanted.expires_in_s,
            "one_click": wanted.one_click,
            "redirect_url": wanted.redirect_url,
            "run": wanted.run,
        }
        form = self._store.approvals().request(asked, key)
        links = [
            ApprovalLinks(
                one["addressee"],
                one["approve_url"],
                one["reject_url"],
                one.get("mailed", False),  # a server that is older than this does not say
            )
            for one in form["links"]
        ]
        expires_at = parse_rfc3339(form["expires_at"])
        return RequestedApproval(form["approval_id"], form["event_name"], expires_at, links)

    def ended_approval(self, approval_id: str) -> Mapping[str, Any] | None:
        form = self._store.approvals().get(approval_id)
        if form["status"] == PENDING:
            return None
        told = ("status", "approval_id", "approval_key", "decided_by", "decided_at", "comment")
        by = approved_by(form["status"], form["decided_by"])
        return {**{name: form[name] for name in told}, "approved_by": by}

    def register_webhook(
        self, wanted: WebhookRequest, key: OnceKey | None = None
    ) -> RegisteredWebhook:
        asked: dict[str, Any] = {
            "name": wanted.name,
            "kind": wanted.kind,
            "secret_id": wanted.secret_id,
            "signature": wanted.signature,
            "event_name": wanted.event_name,
            "correlation_key": wanted.correlation_key,
            "allowed_networks": wanted.allowed_networks,
            "single_use": wanted.single_use,
            "expires_in": wanted.expires_in_s,
            "run": wanted.run,
        }
        if wanted.repeats != REFUSE:  # a server that does not know them yet refuses them anyway
            asked["repeats"] = wanted.repeats
        form = self._store.webhooks().register(asked, key)
        return RegisteredWebhook(
            form["webhook_id"],
            form["webhook_url"],
            form["event_name"],
            form["correlation_key"],
            None if form["expires_at"] is None else parse_rfc3339(form["expires_at"]),
        )

    # --- events

    def wait(
        self,
        event_name: str,
        correlation_key: str | None = None,
        timeout_s: float | None = None,
        *,
        run: str,
    ) -> Claimed:
        """As `Place.wait`; of the records only what the server tells is in them (no times)."""
        events = self._store.events()
        form = events.wait(event_name, correlation_key, timeout_s, run=run)
        wait = Subscription(
            form["subscription_id"],
            self.tenant_id,
            run,
            "",  # the server names it
            event_name,
            correlation_key,
            created_at=0,
            expires_at=None,
            waiting_for=None,
            keyed_for=None,
            open_until=None,
            event_id=form.get("event_id"),
        )
        if form["status"] != "delivered":
            return Claimed(wait, None)
        payload = msgspec.json.encode(form["payload"])
        event = Event(
            form["event_id"], self.tenant_id, event_name, correlation_key, payload, created_at=0
        )
        return Claimed(wait, event)

    def _parsed(self, reference: str) -> Reference:
        return parse_reference(reference, self._scheme)
