"""`/healthz`: the process answers. `/readyz`: it should get traffic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import falcon
import msgspec

from cas.background import background_of
from cas.config import Settings
from cas.errors import CatalogError, CatalogFailed, IndexDamaged, StoreFull
from cas.mirrored import mirrored_of
from cas.probe import Probe
from cas.runner import runner_of
from cas.store import Store
from gateway import forms
from gateway.addresses import Watchers
from gateway.errors import NotReady
from gateway.operations import Reply, Right, operation
from gateway.pool import outside_slot


@final
class Health(msgspec.Struct, frozen=True):
    """`degraded` names what is wrong, though requests can be served; who may not read
    `/metrics` is told nothing of it."""

    status: str
    degraded: list[str] = []


@final
class HealthResource:
    """`/healthz`"""

    @operation(Right.NONE, name="health", replies={200: Reply("The process answers.", Health)})
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Whether the process answers; asks nothing of the disk."""
        forms.answer(resp, {"status": "ok"})


@final
class ReadyResource:
    """`/readyz`"""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._probe = Probe(store)
        self._free_bytes_min = settings.store.min_free
        gateway = settings.gateway
        self._watchers = Watchers(gateway.metrics_from, gateway.trusted_proxies)

    @operation(
        Right.NONE,
        name="ready",
        replies={200: Reply("Requests can be served.", Health)},
        refuses=[NotReady, CatalogError, StoreFull],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Whether this node should get traffic.

        503 while nothing can be committed, or while the disk is below `[store] min_free`. A
        doubtful clock, a background process that does not beat, a target that is stalled or
        fenced, or workflows that wait for a runner that does not beat are told in `degraded`.
        What is wrong is told to the networks of `[gateway] metrics_from` only.
        """
        if self._watchers.include(req.env):
            self._check()
            forms.answer(resp, {"status": "ready", "degraded": list(self._degraded())})
            return
        try:
            self._check()
        except (CatalogFailed, IndexDamaged):
            raise  # whoever asks: it must be opened anew, though nobody writes
        except (NotReady, CatalogError, StoreFull):
            raise NotReady("this node should get no traffic now") from None
        forms.answer(resp, {"status": "ready"})

    def _check(self) -> None:
        with outside_slot():  # a disk that hangs must not keep others from their turn
            self._probe.check()
        if self._store.blobs.free_bytes() < self._free_bytes_min:
            raise NotReady("the disk has less free space than [store] min_free")

    def _degraded(self) -> Iterator[str]:
        if trouble := self._store.clock_trouble():
            yield f"nothing expires: {trouble}"
        background = background_of(self._store.root, self._store.clock.now_us())
        yield from background.trouble()
        for target in mirrored_of(self._store, background):
            yield from target.stalled
        yield from runner_of(self._store).trouble()
