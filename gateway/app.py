"""The only wiring: which resource serves which route, with which collaborators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import falcon

from cas.config import Settings
from cas.keys import Keys
from cas.receipts import Receipts
from cas.runner import runner_of
from cas.signing import Signer
from cas.store import Store
from gateway import errors
from gateway.approval_page import ApprovalPageResource
from gateway.approvals import ApprovalsResource
from gateway.auth import Tokens
from gateway.board import Board, Meter, Waiters
from gateway.cors import Cors
from gateway.counters import Counters
from gateway.docs_page import DocsResource
from gateway.door import Door
from gateway.downloads import DownloadResource, Sender
from gateway.events import EventsResource
from gateway.health import HealthResource, ReadyResource
from gateway.issuers import Issuers
from gateway.limits import Limits
from gateway.links import Links
from gateway.logs import Observed
from gateway.metrics import MetricsResource, routes_of
from gateway.openapi import DocumentResource, Routes
from gateway.receipts import ReceiptKeysResource, ReceiptResource
from gateway.slots import SlotResource
from gateway.storage import StorageResource, StoredFileResource
from gateway.tus import TusPartialResource, TusResource
from gateway.upload_page import StaticResource, UploadPageResource
from gateway.uploads import UploadLinkResource, UploadsResource
from gateway.webhooks import WebhooksResource
from gateway.workflows import WorkflowsResource
from workflows.tools.registry import barred, default_registry
from workflows.views import Workflows


def create_app(
    store: Store,
    settings: Settings,
    keys: Keys,
    reopen: Callable[[], None] = lambda: None,
    meter: Meter | None = None,
    counters: Counters | None = None,
    workflows: Workflows | None = None,
    waiters: Waiters | None = None,
) -> falcon.App[Any, Any]:
    """The gateway as a WSGI app. The store stays the caller's, to be closed after the app.

    So do `workflows`, which end with the store where none are given.

    `reopen` is asked for when all processes must open the store anew (`errors.install`);
    `meter` counts for all processes of a server, of which this is the only one by default,
    and so do `counters` and `waiters`.
    """
    if meter is None:
        board = Board()
        meter = Meter(board, board.take(), store)
    if waiters is None:
        waiters = Waiters(meter.board, 0, settings.events.waiters_max)

    store.elsewhere.expect()
    limits = Limits(settings, counters or Counters())
    tokens = Tokens(keys.jwt, store.about_now_us, Issuers.of(settings.auth), limits.tenant)
    links = Links(Signer(keys.signing), store.about_now_us, settings.gateway)
    door = Door(store, workflows or Workflows(store, keys), links, limits)
    sender = Sender(door, settings.gateway.accel_redirect)
    uploads = UploadsResource(door, tokens, links)
    link = UploadLinkResource(door, links)
    receipts = Receipts(keys.receipts, store.store_id(), settings.gateway.public_url)

    app: falcon.App[Any, Any] = falcon.App(middleware=[Observed(), errors.RequestIds()])
    app.add_middleware(limits)
    if settings.gateway.cors_origins:
        app.add_middleware(Cors(settings.gateway.cors_origins))
    errors.install(app, reopen)
    routes = Routes(app)
    add, hide = routes.add, routes.hide
    add("/api/v1/uploads", uploads)
    add("/api/v1/uploads/{token}", uploads, suffix="one")
    add("/api/v1/uploads/{token}/info", link, suffix="info")
    add("/api/v1/uploads/{token}/complete", link, suffix="complete")
    add("/api/v1/uploads/{token}/cancel", uploads, suffix="cancel")
    add("/api/v1/uploads/{token}/receipt", ReceiptResource(door, receipts))
    add("/api/v1/receipts/keys", ReceiptKeysResource(receipts))
    add("/api/v1/uploads/{token}/files/{index:int(min=0, max=99999)}", SlotResource(door))
    hide("/api/v1/uploads/{token}/tus", TusResource(door, links))  # a slash is easily lost
    add("/api/v1/uploads/{token}/tus/", TusResource(door, links))
    add("/api/v1/uploads/{token}/tus/{partial_id}", TusPartialResource(door, links))
    add("/api/v1/storage", StorageResource(door, tokens, settings))
    add(
        "/api/v1/storage/{rest:path}",
        StoredFileResource(door, tokens, links, sender, settings),
    )
    add("/d/{file_id}/{filename}", DownloadResource(door, sender))
    hide("/u/{token}", UploadPageResource(door))
    hide("/static/{version}/{name}", StaticResource())
    approvals = ApprovalsResource(door, tokens, links)
    add("/api/v1/approvals", approvals)
    add("/api/v1/approvals/{approval_id}", approvals, suffix="one")
    add("/api/v1/approvals/{approval_id}/cancel", approvals, suffix="cancel")
    add("/api/v1/approvals/{approval_id}/respond", ApprovalPageResource(door))
    events = EventsResource(door, tokens, waiters, settings.events)
    add("/api/v1/events/{tenant_id}", events)
    add("/api/v1/events/{tenant_id}/wait", events, suffix="wait")
    webhooks = WebhooksResource(door, tokens, links, settings)
    add("/api/v1/webhooks", webhooks)
    add("/api/v1/webhooks/{webhook_id}", webhooks, suffix="one")
    runs = WorkflowsResource(
        door, tokens, default_registry(), barred(settings), lambda: runner_of(store).trouble()
    )
    add("/api/v1/workflows", runs)
    add("/api/v1/workflows/{run_id}", runs, suffix="one")
    add("/api/v1/workflows/{run_id}/cancel", runs, suffix="cancel")
    add("/api/v1/workflows/{run_id}/steps", runs, suffix="steps")
    add("/api/v1/workflows/{run_id}/steps/{step_id}", runs, suffix="step")
    add("/api/v1/workflows/{run_id}/steps/{step_id}/result", runs, suffix="result")
    add("/healthz", HealthResource())
    add("/readyz", ReadyResource(store, settings))
    hide("/metrics", MetricsResource(store, meter, settings.gateway))
    document = routes.document()
    hide("/api/v1/openapi.json", DocumentResource(document))
    hide("/docs", DocsResource(document, settings.gateway.public_url))
    meter.know_routes(routes_of(app))
    return app
