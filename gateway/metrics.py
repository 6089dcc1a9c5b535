"""`/metrics`: what a server does and what its store holds, for Prometheus.

Every process of a server counts in memory that all of them share: one anonymous mapping,
made before the first fork, with a row of numbers (a slot) for each worker. Whichever worker
is asked adds all rows up. A new worker takes over the row of one that ended and counts on
from there, so no count ever goes back while the server runs, however often workers are
replaced, and nothing has to be cleaned up after a crash. (The client library's own way, a
folder of files for each process identifier, grows with every replaced worker and outlives
a killed server.)

Labels are route templates, methods and classes of status; never what a client chose.
What is stored is not counted here but read from the catalog when it is asked for
(`cas.vitals`).
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import platform
import threading
import time
from collections.abc import Iterable, Iterator
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
from cas.config import GatewaySettings
from cas.errors import NotFound
from cas.store import Store
from cas.vitals import vitals_of
from gateway.addresses import client_address, within
from gateway.logs import Answered, Lines, RequestLog
from gateway.operations import Reply, Right, operation

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx", "none")
_ROUTES_MAX: Final = 64
# Seconds; downloads and uploads of large files are requests too.
_BOUNDS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0)
_NO_ROUTE: Final = "none"
_FORWARDED: Final = ("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED", "HTTP_VIA")

# A row, in numbers of 8 bytes: requests by route, method and class; then for each route bytes
# in, bytes out, seconds, and the requests of each bucket; then the singles.
_ROUTE_CELLS: Final = len(_METHODS) * len(_CLASSES)
_AT_BYTES: Final = _ROUTES_MAX * _ROUTE_CELLS
_TIMES: Final = 3 + len(_BOUNDS) + 1
_AT_SINGLES: Final = _AT_BYTES + _ROUTES_MAX * _TIMES
_IN_FLIGHT, _GROUPS, _WRITES, _DROPPED, _STARTS, _ALIVE, _SINGLES = range(7)
_ROW: Final = _AT_SINGLES + _SINGLES


@final
class Board:
    """The numbers of all processes of one server, in memory that they share."""

    def __init__(self, slots: int = 1) -> None:
        self._shared = mmap.mmap(-1, slots * _ROW * 8)
        self._cells: memoryview[float] = memoryview(self._shared).cast("d")
        self._slots = slots
        self._taken: set[int] = set()

    def row(self, slot: int) -> memoryview[float]:
        return self._cells[slot * _ROW : (slot + 1) * _ROW]

    def totals(self) -> list[float]:
        """A row that adds up all rows which any worker has had."""
        started = _AT_SINGLES + _STARTS
        used = [row for row in map(self.row, range(self._slots)) if row[started]]
        return [sum(cells) for cells in zip(*used, strict=True)]

    def take(self) -> int:
        """A row for a worker about to be forked; the last one is shared should all be taken.

        Called by the one process that starts workers, as is `give_back`.
        """
        slot = next((n for n in range(self._slots) if n not in self._taken), self._slots - 1)
        self._taken.add(slot)
        row = self.row(slot)
        row[_AT_SINGLES + _STARTS] += 1
        row[_AT_SINGLES + _ALIVE] = 1
        row[_AT_SINGLES + _IN_FLIGHT] = 0  # of one that was killed
        return slot

    def give_back(self, slot: int) -> None:
        """The worker of this row has ended."""
        self._taken.discard(slot)
        row = self.row(slot)
        row[_AT_SINGLES + _ALIVE] = row[_AT_SINGLES + _IN_FLIGHT] = 0


@final
class Meter:
    """Counts for one process, in its row of the board. Safe for threads."""

    def __init__(self, board: Board, slot: int, store: Store, lines: Lines | None = None) -> None:
        self.board = board
        self._row = board.row(slot)
        self._lock = threading.Lock()
        self._store = store
        self._lines = lines
        self._routes: dict[str, int] = {}
        self._seen = (0, 0, 0)  # groups, writes and dropped lines that are in the row already

    def know_routes(self, routes: Iterable[str]) -> None:
        """Name all routes that there are, in the same order in every process."""
        names = [_NO_ROUTE, *sorted(routes)][:_ROUTES_MAX]
        self._routes = {name: number for number, name in enumerate(names)}

    @property
    def routes(self) -> list[str]:
        return list(self._routes)

    def began(self) -> None:
        """A request has begun."""
        with self._lock:
            self._row[_AT_SINGLES + _IN_FLIGHT] += 1

    def ended(self, answered: Answered) -> None:
        """A request is over."""
        route = self._routes.get(answered.route, 0)
        method = _METHODS.index(answered.method if answered.method in _METHODS else "other")
        status = _CLASSES.index(f"{answered.status // 100}xx" if answered.status else "none")
        at = _AT_BYTES + route * _TIMES
        with self._lock:
            row = self._row
            row[_AT_SINGLES + _IN_FLIGHT] -= 1
            row[route * _ROUTE_CELLS + method * len(_CLASSES) + status] += 1
            row[at] += answered.bytes_in
            row[at + 1] += answered.bytes_out
            row[at + 2] += answered.duration_s
            row[at + 3 + bisect.bisect_left(_BOUNDS, answered.duration_s)] += 1
        self.carry_over()

    def carry_over(self) -> None:
        """Add to the row what other parts of this process have counted meanwhile."""
        groups, writes = self._store.catalog.commits
        dropped = 0 if self._lines is None else self._lines.dropped
        with self._lock:
            now = (groups, writes, dropped)
            for cell, count, before in zip(
                (_GROUPS, _WRITES, _DROPPED), now, self._seen, strict=True
            ):
                self._row[_AT_SINGLES + cell] += max(0, count - before)
            self._seen = now


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
        yield self._gauge("in_flight", "Requests being answered now.", _IN_FLIGHT)
        yield self._gauge("workers", "Worker processes that run.", _ALIVE)
        yield self._counter("worker_starts", "Worker processes that were started.", _STARTS)
        yield self._counter("commit_groups", "Frames that workers wrote to the journal.", _GROUPS)
        yield self._counter("commit_writes", "Writes in those frames.", _WRITES)
        yield self._counter("log_lines_dropped", "Log lines that found no reader.", _DROPPED)
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
        kinds = list(itertools.product(_METHODS, _CLASSES))
        for number, route in routes:
            for cell, (method, status) in enumerate(kinds, number * _ROUTE_CELLS):
                if count := self._totals[cell]:
                    family.add_metric((route, method, status), count)
        return family

    def _bytes(self, routes: list[tuple[int, str]], at: int, what: str, told: str) -> Metric:
        family = CounterMetricFamily(f"blobcask_{what}_bytes", told, labels=("route",))
        for number, route in routes:
            if count := self._totals[_AT_BYTES + number * _TIMES + at]:
                family.add_metric((route,), count)
        return family

    def _durations(self, routes: list[tuple[int, str]]) -> Metric:
        family = HistogramMetricFamily(
            "blobcask_request_seconds",
            "From the whole head to the last byte of the answer handed to the socket.",
            labels=("route",),
        )
        names = [str(bound) for bound in _BOUNDS] + ["+Inf"]
        for number, route in routes:
            at = _AT_BYTES + number * _TIMES + 2
            counts = self._totals[at + 1 : at + 1 + len(names)]
            if any(counts):
                buckets = list(zip(names, itertools.accumulate(counts), strict=True))
                family.add_metric((route,), buckets, self._totals[at])
        return family

    def _gauge(self, name: str, told: str, cell: int) -> Metric:
        return GaugeMetricFamily(f"blobcask_{name}", told, self._totals[_AT_SINGLES + cell])

    def _counter(self, name: str, told: str, cell: int) -> Metric:
        return CounterMetricFamily(f"blobcask_{name}", told, self._totals[_AT_SINGLES + cell])


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


# Fields of Vitals: what the exposition says of them.
_GAUGES: Final = {
    "logical_bytes": "Bytes of all files as named, each in full, with filled slots and partials.",
    "logical_files": "Files and filled slots of all tenants.",
    "stored_bytes": "Bytes of all blobs, each once; those that wait for collection included.",
    "stored_blobs": "Blobs.",
    "stored_estimated": "1 where the blobs are too many to be counted, and both are estimates.",
    "uploads_pending": "Uploads that wait for files; counted up to 1,000.",
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
}


@final
class MetricsResource:
    """`/metrics`, for the networks of `[gateway] metrics_from` and as if absent for others."""

    def __init__(self, store: Store, meter: Meter, settings: GatewaySettings) -> None:
        self._allowed = settings.metrics_from
        self._proxies = settings.trusted_proxies
        self._one_at_a_time = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(_Traffic(meter))
        self._registry.register(_Stored(store))

    @operation(
        Right.NONE,
        name="metrics",
        replies={200: Reply("The numbers, as Prometheus reads them.", "text/plain")},
        refuses=[NotFound],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """What the server does and the store holds, for [gateway] metrics_from."""
        if not self._may_see(req):
            raise NotFound("metrics", "")
        encode, content_type = choose_encoder(req.get_header("Accept") or "")
        with self._one_at_a_time:
            resp.data = encode(self._registry)
        resp.content_type = content_type
        resp.set_header("Cache-Control", "no-store")

    def _may_see(self, req: falcon.Request) -> bool:
        peer = client_address({"REMOTE_ADDR": req.remote_addr}, ())
        through_proxy = any(name in req.env for name in _FORWARDED)
        if through_proxy and not (peer and within(peer, self._proxies)):
            # From a proxy that nobody has told us of: its own address says nothing.
            return False
        address = client_address(req.env, self._proxies)
        return address is not None and within(address, self._allowed)


def routes_of(app: falcon.App[Any, Any]) -> list[str]:
    """The templates of all routes of an app."""
    return [route.path for route in falcon.inspect.inspect_routes(app)]


@final
class Observer:
    """gunicorn's two calls around each request: counts it, and has it logged."""

    def __init__(self, meter: Meter, log: RequestLog) -> None:
        self._meter = meter
        self._log = log

    def before(self, request: Any) -> None:
        request.began_s = time.monotonic()
        self._meter.began()

    def after(self, request: Any, environ: dict[str, Any], resp: Any) -> None:
        answered = Answered(environ, resp, time.monotonic() - request.began_s)
        self._meter.ended(answered)
        self._log.write(answered)
