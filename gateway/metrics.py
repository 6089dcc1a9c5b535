"""`/metrics`: what a server does and what its store holds, for Prometheus.

What the processes do is counted in `gateway.board`; what is stored is not counted there but
read from the catalog when it is asked for (`cas.vitals`).
"""

from __future__ import annotations

import itertools
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, final

import falcon
import falcon.inspect
import gunicorn
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cas import __version__
from cas.background import TargetState
from cas.clock import SECOND_US
from cas.config import GatewaySettings
from cas.errors import NotFound
from cas.mirrored import Mirrored
from cas.store import Store
from cas.vitals import vitals_of
from gateway.addresses import Watchers
from gateway.board import (
    ALIVE,
    AT_BYTES,
    AT_SINGLES,
    BOUNDS,
    CLASSES,
    CONNECTIONS,
    DROPPED,
    GROUPS,
    HITS,
    IN_FLIGHT,
    METHODS,
    MISSES,
    ROUTE_CELLS,
    STARTS,
    TIMES,
    TURNED_AWAY,
    WAITING,
    WRITES,
    Meter,
)


@final
class _Traffic(Collector):
    """What the processes of this server have counted."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._totals: list[float] = []

    def collect(self) -> Iterator[Metric]:
        self._meter.carry_over()
        self._totals = self._meter.board.totals()
        routes = list(enumerate(self._meter.routes))
        yield self._requests(routes)
        yield self._bytes(routes, 0, "request", "Body bytes received.")
        yield self._bytes(routes, 1, "response", "Body bytes sent, unless by a proxy in front.")
        yield self._durations(routes)
        yield self._gauge("in_flight", "Requests being answered now.", IN_FLIGHT)
        yield self._gauge("event_waiters", "Requests that wait for an event.", WAITING)
        yield self._gauge("connections", "Connections of clients that are open.", CONNECTIONS)
        told = "Connections closed because their peer or the worker had too many."
        yield self._counter("connections_turned_away", told, TURNED_AWAY)
        yield self._gauge("workers", "Worker processes that run.", ALIVE)
        yield self._counter("worker_starts", "Worker processes that were started.", STARTS)
        yield self._counter("commit_groups", "Frames that workers wrote to the journal.", GROUPS)
        yield self._counter("commit_writes", "Writes in those frames.", WRITES)
        yield self._counter("log_lines_dropped", "Log lines that found no reader.", DROPPED)
        yield self._counter("cache_hits", "Blobs that were here when they were read.", HITS)
        told = "Blobs that had to be fetched from a target to be read."
        yield self._counter("cache_misses", told, MISSES)
        info = {
            "version": __version__,
            "python": platform.python_version(),
            "gunicorn": gunicorn.__version__,
            "falcon": falcon.__version__,
        }
        yield InfoMetricFamily("blobcask_build", "What is running.", info)

    def _requests(self, routes: list[tuple[int, str]]) -> Metric:
        family = CounterMetricFamily(
            "blobcask_requests", "Requests answered.", labels=("route", "method", "status")
        )
        kinds = list(itertools.product(METHODS, CLASSES))
        for number, route in routes:
            for cell, (method, status) in enumerate(kinds, number * ROUTE_CELLS):
                if count := self._totals[cell]:
                    family.add_metric((route, method, status), count)
        return family

    def _bytes(self, routes: list[tuple[int, str]], at: int, what: str, told: str) -> Metric:
        family = CounterMetricFamily(f"blobcask_{what}_bytes", told, labels=("route",))
        for number, route in routes:
            if count := self._totals[AT_BYTES + number * TIMES + at]:
                family.add_metric((route,), count)
        return family

    def _durations(self, routes: list[tuple[int, str]]) -> Metric:
        family = HistogramMetricFamily(
            "blobcask_request_seconds",
            "From the whole head to the last byte of the answer handed to the socket.",
            labels=("route",),
        )
        names = [str(bound) for bound in BOUNDS] + ["+Inf"]
        for number, route in routes:
            at = AT_BYTES + number * TIMES + 2
            counts = self._totals[at + 1 : at + 1 + len(names)]
            if any(counts):
                buckets = list(zip(names, itertools.accumulate(counts), strict=True))
                family.add_metric((route,), buckets, self._totals[at])
        return family

    def _gauge(self, name: str, told: str, cell: int) -> Metric:
        return GaugeMetricFamily(f"blobcask_{name}", told, self._totals[AT_SINGLES + cell])

    def _counter(self, name: str, told: str, cell: int) -> Metric:
        return CounterMetricFamily(f"blobcask_{name}", told, self._totals[AT_SINGLES + cell])


@final
class _Stored(Collector):
    """What the store holds and waits for, read when it is asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        vitals = vitals_of(self._store)
        for name, told in _GAUGES.items():
            value = getattr(vitals, name)
            if value is not None:
                yield GaugeMetricFamily(f"blobcask_{name}", told, value)
        waiting = GaugeMetricFamily(
            "blobcask_waiting", "What waits to be done; counted up to 1,000.", labels=("what",)
        )
        oldest = GaugeMetricFamily(
            "blobcask_waiting_seconds",
            "For how long the oldest of them has been due; 0 where nothing is due.",
            labels=("what",),
        )
        for what, queue in vitals.queues.items():
            waiting.add_metric((what,), queue.count)
            oldest.add_metric((what,), queue.oldest_s)
        yield waiting
        yield oldest
        runs = GaugeMetricFamily("blobcask_runs", "Runs that have not ended.", labels=("status",))
        for status, count in vitals.runs.items():
            runs.add_metric((status,), count)
        yield runs
        yield from _mirror(vitals.targets)
        if vitals.cache is not None:
            told = "Bytes fetched from targets, since the background process started."
            yield CounterMetricFamily(
                "blobcask_cache_fetched_bytes", told, vitals.cache.fetched_bytes
            )
            told = "Blobs evicted, since the background process started."
            yield CounterMetricFamily("blobcask_cache_evicted", told, vitals.cache.evicted)


def _mirror(mirrored: Sequence[Mirrored]) -> Iterator[Metric]:
    """How far each target has come; what only the background process knows is absent until
    it has said it."""
    for name, (told, value_of) in _TARGET_GAUGES.items():
        family = GaugeMetricFamily(f"blobcask_target_{name}", told, labels=("target",))
        for target in mirrored:
            value = value_of(target)
            if value is not None:
                family.add_metric((target.name,), value)
        yield family


# Fields of Vitals: what the exposition says of them.
_GAUGES: Final = {
    "logical_bytes": "Bytes of all files as named, each in full, with filled slots and partials.",
    "logical_files": "Files and filled slots of all tenants.",
    "stored_bytes": "Bytes of all blobs here, each once; those to be collected included.",
    "stored_blobs": "Blobs whose bytes are here.",
    "evicted_bytes": "Bytes of the blobs that are at targets only.",
    "evicted_blobs": "Blobs whose bytes are at targets only, or missing there too.",
    "uploads_pending": "Uploads that wait for files; counted up to 1,000.",
    "events_held_bytes": "Bytes of events that others told and that wait for who asks later.",
    "partial_bytes": "Bytes of resumable uploads that are not finished.",
    "partials": "Resumable uploads that are not finished.",
    "tenants": "Tenants that store anything.",
    "journal_seq": "The number of the last frame in the journal.",
    "journal_age_seconds": "Since the last frame was written.",
    "journal_bytes": "Bytes of journal that are kept.",
    "oldest_reader_commits": "By how many commits the oldest reader of the index is behind.",
    "dead_readers": "Reader slots of killed processes that were freed just now.",
    "free_bytes": "Free bytes on the disk of ROOT.",
    "free_inodes": "Free inodes on the disk of ROOT.",
    "clock_doubtful": "1 while the clock is not believed, and nothing expires.",
    "background_runs": "1 while the background process runs.",
    "background_silent_seconds": "Since the background process's last sign of life.",
    "background_jobs_failing": "Its jobs that have failed three times in a row or more.",
    "runner_up": "1 while the runner of workflows runs.",
    "runner_silent_seconds": "Since the runner's last sign of life.",
    "runner_runs": "Runs that the runner has taken up.",
    "runner_steps": "Steps of workflows that are at work.",
    "runner_oldest_step_seconds": "For how long the oldest of them is at work.",
    "runner_late_calls": "Calls of tools that go on past their time.",
}


_Of = Callable[[TargetState], float | None]


def _known(value_of: _Of) -> Callable[[Mirrored], float | None]:
    return lambda target: None if target.state is None else value_of(target.state)


# blobcask_target_…: what the exposition says of it, and its value; None: not known.
_TARGET_GAUGES: Final[Mapping[str, tuple[str, Callable[[Mirrored], float | None]]]] = {
    "waiting": ("Copies that are still to be made.", lambda target: target.backlog.rows),
    "waiting_bytes": ("Bytes of them.", lambda target: target.backlog.size_bytes),
    "oldest_seconds": (
        "For how long the oldest of them has waited; 0 where none waits.",
        lambda target: target.backlog.oldest_us / SECOND_US,
    ),
    "catch_up_seconds": (
        "How long they take at the rate of the last minute.",
        lambda target: target.catch_up_s,
    ),
    "copies_per_second": ("Copies made, over a minute.", _known(lambda state: state.rows_per_s)),
    "bytes_per_second": ("Bytes copied, over a minute.", _known(lambda state: state.bytes_per_s)),
    "metadata_behind_seconds": (
        "How long the oldest change has waited that is not there; 0 where none waits.",
        _known(lambda state: state.behind_us / SECOND_US),
    ),
    "canary_seconds": (
        "Since the last canary came back.",
        _known(lambda state: state.canary_us / SECOND_US if state.canary_worked else None),
    ),
    "fenced": (
        "1 while nothing may be written there, because it is another node's.",
        _known(lambda state: int(bool(state.fenced))),
    ),
    "down": (
        "1 while it is left alone, because it fails.",
        _known(lambda state: int(bool(state.down))),
    ),
    "stalled": ("1 while it counts as stalled.", lambda target: int(bool(target.stalled))),
}


@final
class MetricsResource:
    """`/metrics`, for the networks of `[gateway] metrics_from` and as if absent for others."""

    def __init__(self, store: Store, meter: Meter, settings: GatewaySettings) -> None:
        self._watchers = Watchers(settings.metrics_from, settings.trusted_proxies)
        self._one_at_a_time = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(_Traffic(meter))
        self._registry.register(_Stored(store))

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """What the server does and the store holds, for [gateway] metrics_from."""
        if not self._watchers.include(req.env):
            raise NotFound("metrics", "")
        encode, content_type = choose_encoder(req.get_header("Accept") or "")
        with self._one_at_a_time:
            resp.data = encode(self._registry)
        resp.content_type = content_type
        resp.set_header("Cache-Control", "no-store")


def routes_of(app: falcon.App[Any, Any]) -> list[str]:
    """The templates of all routes of an app."""
    return [route.path for route in falcon.inspect.inspect_routes(app)]
