"""Tools over an open store: a `Place` in this process.

Links that tools make begin with `[gateway] public_url`, for there is no request whose address
they could take. `blobcask serve` tells its runner the address it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from cas.approvals import ended_payload, event_name
from cas.errors import InvalidRequest, InvalidSetting, TooLarge
from cas.files import Files
from cas.links import DOWNLOAD_LIFETIME_S_MAX, download_name, upload_page
from cas.once import OnceKey
from cas.records import PENDING, StoredFile
from cas.references import Reference, check_segment, parse_reference
from cas.retention import Retention
from cas.store import Store
from cas.uploads import UploadRequest
from workflows.approvals import ApprovalRequest
from workflows.events import Claimed
from workflows.tools.place import RegisteredWebhook, RequestedApproval, RequestedUpload
from workflows.views import Workflows
from workflows.webhooks import WebhookRequest, address_of


@final
class EmbeddedPlace:
    """One tenant's store in this process; see `workflows.tools.place.Place`."""

    def __init__(self, store: Store, workflows: Workflows, tenant_id: str, actor: str) -> None:
        """`actor` is who is named in the audit log. Raises InvalidName."""
        self._store = store
        self._workflows = workflows
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor

    @property
    def tenant_id(self) -> str:
        return self._tenant_id

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
        return self._files().put(
            data,
            name=name,
            run=run,
            filename=filename,
            content_type=content_type,
            retention=retention,
        )

    def stat(self, reference: str) -> StoredFile:
        return self._files().stat(self._parsed(reference))

    def read(self, reference: str, limit_bytes: int) -> tuple[bytes, str, str]:
        files, parsed = self._files(), self._parsed(reference)
        if files.stat(parsed).size_bytes > limit_bytes:
            raise TooLarge(limit_bytes)
        file, source = files.reader(parsed)
        with source:
            return source.read(), file.content_type, download_name(file)

    def url(self, reference: str, expires_in_s: int | None = None) -> str:
        file = self.stat(reference)
        lifetime_s = self._workflows.links.lifetime_s if expires_in_s is None else expires_in_s
        if not 1 <= lifetime_s <= DOWNLOAD_LIFETIME_S_MAX:
            raise InvalidRequest("expires_in", f"1 to {DOWNLOAD_LIFETIME_S_MAX} seconds")
        return self._workflows.links.download(self._base(), file, lifetime_s)

    def delete(self, reference: str) -> None:
        self._files().delete(self._parsed(reference))

    # --- what people and programs are asked for

    def request_upload(self, wanted: UploadRequest, key: OnceKey | None = None) -> RequestedUpload:
        base = self._base()  # before anything is asked that nobody could be told of
        upload = self._store.uploads(self._tenant_id, self._actor).request(wanted, key)
        page = upload_page(base, upload.upload_token)
        return RequestedUpload(
            upload.upload_id,
            upload.upload_token,
            page,
            self._workflows.links.slots(base, upload),
            upload.event_name,
            upload.expires_at,
        )

    def request_approval(
        self, wanted: ApprovalRequest, key: OnceKey | None = None
    ) -> RequestedApproval:
        base = self._base()
        approvals = self._workflows.approvals(self._tenant_id, self._actor)
        approval = approvals.request(wanted, key)
        return RequestedApproval(
            approval.approval_id,
            event_name(approval.approval_key),
            approval.expires_at,
            # Of one that ended since it was asked for, they would open nothing.
            approvals.links(base, approval) if approval.status == PENDING else [],
        )

    def ended_approval(self, approval_id: str) -> Mapping[str, Any] | None:
        approval = self._workflows.approvals(self._tenant_id, self._actor).get(approval_id)
        return None if approval.status == PENDING else ended_payload(approval)

    def register_webhook(
        self, wanted: WebhookRequest, key: OnceKey | None = None
    ) -> RegisteredWebhook:
        base = self._base()
        webhooks = self._workflows.webhooks(self._tenant_id, self._actor)
        webhook = webhooks.register(wanted, key)
        return RegisteredWebhook(
            webhook.webhook_id,
            address_of(base, webhook.webhook_id),
            webhook.event_name,
            webhook.correlation_key,
            webhook.expires_at,
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
        events = self._workflows.events(self._tenant_id, self._actor)
        return events.wait(event_name, correlation_key, timeout_s, run=run)

    def _files(self) -> Files:
        return self._store.files(self._tenant_id, self._actor)

    def _parsed(self, reference: str) -> Reference:
        return parse_reference(reference, self._store.settings.references.scheme)

    def _base(self) -> str:
        base = self._store.settings.gateway.public_url
        if not base:
            reason = (
                "links that workflows make begin with an address that people can reach; start "
                "`blobcask serve`, which tells its runner its own, or set this"
            )
            raise InvalidSetting("gateway", "public_url", "", reason)
        return base
