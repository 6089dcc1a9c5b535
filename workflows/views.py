"""The ways into this package, each for one tenant (invariant 9), as `cas.store.Store` has its
own. Where its parts are wired."""

from __future__ import annotations

from typing import final

from cas.events import Room
from cas.keys import Keys
from cas.links import SignedLinks
from cas.signing import Signer
from cas.store import Store
from workflows.approvals import ApprovalLink, Approvals
from workflows.complaints import Complaints
from workflows.events import Events
from workflows.runs import Runs
from workflows.secrets import Secrets
from workflows.watcher import Watcher
from workflows.webhooks import Reception, WebhookCall, Webhooks


@final
class Workflows:
    """Everything of this package over one open store. Safe for threads; close it before the
    store: it has a thread of its own once somebody waits."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        limits = store.settings.limits
        self._room = Room(limits.tenant_held_events, limits.tenant_kept_events)
        self._reception = Reception(
            store.catalog,
            keys.secrets,
            store.settings.events,
            store.now_us,
            Complaints(),
            self._room,
        )
        self.watcher = Watcher(store.catalog)
        self.links = SignedLinks(Signer(keys.signing), store.about_now_us, store.settings.gateway)

    def events(self, tenant_id: str, actor: str, request_id: str = "") -> Events:
        """The events and waits of one tenant; raises InvalidName for an impossible tenant."""
        return Events(
            self._store.catalog,
            self.watcher,
            self._store.settings.events,
            tenant_id=tenant_id,
            actor=actor,
            request_id=request_id,
            room=self._room,
        )

    def approvals(self, tenant_id: str, actor: str, request_id: str = "") -> Approvals:
        """The approvals of one tenant."""
        return Approvals(
            self._store.catalog,
            self.links,
            self._store.settings,
            self._keys.secrets,
            tenant_id=tenant_id,
            actor=actor,
            request_id=request_id,
        )

    def approval_link(
        self, approval_id: str, decision: str, token: str, request_id: str = ""
    ) -> ApprovalLink:
        """What one link of an approval opens; raises NotFound, BadSignature."""
        return ApprovalLink.open(
            self._store.catalog,
            self.links,
            self._store.settings,
            approval_id,
            decision,
            token,
            request_id,
        )

    def webhooks(self, tenant_id: str, actor: str, request_id: str = "") -> Webhooks:
        """The webhooks of one tenant."""
        return Webhooks(
            self._store.catalog, tenant_id=tenant_id, actor=actor, request_id=request_id
        )

    def webhook_call(self, webhook_id: str, request_id: str = "") -> WebhookCall:
        """The webhook that somebody calls, whose signature is the right; raises NotFound."""
        return self._reception.open(webhook_id, request_id)

    def secrets(self, tenant_id: str, actor: str, request_id: str = "") -> Secrets:
        """The secrets of one tenant."""
        return Secrets(
            self._store.catalog,
            self._keys.secrets,
            tenant_id=tenant_id,
            actor=actor,
            request_id=request_id,
        )

    def runs(self, tenant_id: str, actor: str, request_id: str = "") -> Runs:
        """The runs of one tenant."""
        return Runs(
            self._store.catalog,
            tenant_id=tenant_id,
            actor=actor,
            request_id=request_id,
            keep_us=self._store.settings.workflows.keep,
            events_keep_us=self._store.settings.events.keep,
            open_max=self._store.settings.limits.tenant_runs,
        )

    def close(self) -> None:
        """Wake all who wait, with nothing, and end the thread."""
        self.watcher.close()
