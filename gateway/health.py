"""`/healthz`: the process answers. `/readyz`: it should get traffic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import falcon
import msgspec

from cas.background import background_of
from cas.config import Settings
from cas.errors import CatalogError
from cas.probe import Probe
from cas.store import Store
from gateway import forms
from gateway.errors import NotReady
from gateway.operations import Reply, Right, operation


@final
class Health(msgspec.Struct, frozen=True):
    """`degraded` names what is wrong, though requests can be served."""

    status: str
    degraded: list[str] = []


@final
class HealthResource:
    """`/healthz`"""

    @operation(Right.NONE, name="health", replies={200: Reply("The process answers.", Health)})
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Whether the process answers; asks nothing of the disk."""
        forms.answer(resp, {"status": "ok"})

    on_head = on_get


@final
class ReadyResource:
    """`/readyz`"""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._probe = Probe(store)
        self._free_bytes_min = settings.store.min_free

    @operation(
        Right.NONE,
        name="ready",
        replies={200: Reply("Requests can be served.", Health)},
        refuses=[NotReady, CatalogError],
    )
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Whether this node should get traffic.

        503 while nothing can be committed, or while the disk is below `[store] min_free`. A
        doubtful clock or a background process that does not beat is told in `degraded`.
        """
        # Raised as they are: a catalog that must be opened anew is, though nobody writes.
        self._probe.check()
        if self._store.blobs.free_bytes() < self._free_bytes_min:
            raise NotReady("the disk has less free space than [store] min_free")
        forms.answer(resp, {"status": "ready", "degraded": list(self._degraded())})

    on_head = on_get

    def _degraded(self) -> Iterator[str]:
        if trouble := self._store.clock_trouble():
            yield f"nothing expires: {trouble}"
        yield from background_of(self._store.root, self._store.clock.now_us()).trouble()
