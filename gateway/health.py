"""`/healthz`: the process answers. `/readyz`: it should get traffic."""

from __future__ import annotations

from typing import final

import falcon

from cas.config import Settings
from cas.records import Mark
from cas.store import Store
from gateway import forms
from gateway.errors import NotReady


@final
class HealthResource:
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        forms.answer(resp, {"status": "ok"})

    on_head = on_get


@final
class ReadyResource:
    """503 while the catalog cannot be read, or the disk is below `[store] min_free`."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._free_bytes_min = settings.store.min_free

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        with self._store.catalog.read() as snapshot:
            snapshot.get(Mark, "ready")
        if self._store.blobs.free_bytes() < self._free_bytes_min:
            raise NotReady("the disk has less free space than [store] min_free")
        forms.answer(resp, {"status": "ready"})

    on_head = on_get
