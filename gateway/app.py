"""The only wiring: which resource serves which route, with which collaborators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import falcon

from cas.config import Settings
from cas.keys import Keys
from cas.store import Store
from gateway import errors
from gateway.auth import Tokens
from gateway.downloads import DownloadResource, Sender
from gateway.health import HealthResource, ReadyResource
from gateway.links import Links
from gateway.signing import Signer
from gateway.slots import SlotResource
from gateway.storage import StorageResource, StoredFileResource
from gateway.upload_page import StaticResource, UploadPageResource
from gateway.uploads import UploadLinkResource, UploadsResource


def create_app(
    store: Store, settings: Settings, keys: Keys, reopen: Callable[[], None] = lambda: None
) -> falcon.App[Any, Any]:
    """The gateway as a WSGI app. The store stays the caller's, to be closed after the app.

    `reopen` is asked for when all processes must open the store anew (`errors.install`).
    """

    def now_us() -> int:
        with store.catalog.read() as snapshot:
            return store.now_us(snapshot)

    tokens = Tokens(keys.jwt, now_us)
    links = Links(Signer(keys.signing), now_us, settings.gateway)
    sender = Sender(store, settings.gateway.accel_redirect)
    uploads = UploadsResource(store, tokens, links)
    link = UploadLinkResource(store, links)

    app: falcon.App[Any, Any] = falcon.App(middleware=[errors.RequestIds()])
    errors.install(app, reopen)
    add = app.add_route
    add("/api/v1/uploads", uploads)
    add("/api/v1/uploads/{token}/info", link, suffix="info")
    add("/api/v1/uploads/{token}/complete", link, suffix="complete")
    add("/api/v1/uploads/{token}/cancel", uploads, suffix="cancel")
    add("/api/v1/uploads/{token}/files/{index:int(min=0, max=99999)}", SlotResource(store, links))
    add("/api/v1/storage", StorageResource(store, tokens, settings))
    add(
        "/api/v1/storage/{rest:path}",
        StoredFileResource(store, tokens, links, sender, settings),
    )
    add("/d/{file_id}/{filename}", DownloadResource(store, links, sender))
    add("/u/{token}", UploadPageResource(store))
    add("/static/{name}", StaticResource())
    add("/healthz", HealthResource())
    add("/readyz", ReadyResource(store, settings))
    return app
