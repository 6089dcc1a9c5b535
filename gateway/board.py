"""What a server counts, in memory that all its processes share.

One anonymous mapping, made before the first fork, with a row of numbers (a slot) for each
worker. Whichever worker is asked adds all rows up. A new worker takes over the row of one
that ended and counts on from there, so no count ever goes back while the server runs,
however often workers are replaced, and nothing has to be cleaned up after a crash. (The
client library's own way, a folder of files for each process identifier, grows with every
replaced worker and outlives a killed server.)

Labels are route templates, methods and classes of status; never what a client chose.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import mmap
import threading
from array import array
from collections.abc import Iterable
from typing import Final, final

from cas.errors import TooManyWaiters
from cas.store import Store
from gateway.lines import Lines
from gateway.logs import Answered
from gateway.route_names import NO_ROUTE, route_name

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx", "none")
_ROUTES_MAX: Final = 64
# Seconds; downloads and uploads of large files are requests too.
BOUNDS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0)

# A row, in numbers of 8 bytes: requests by route, method and class; then for each route bytes
# in, bytes out, seconds, and the requests of each bucket; then the singles; then who waits.
ROUTE_CELLS: Final = len(METHODS) * len(CLASSES)
AT_BYTES: Final = _ROUTES_MAX * ROUTE_CELLS
TIMES: Final = 3 + len(BOUNDS) + 1
AT_SINGLES: Final = AT_BYTES + _ROUTES_MAX * TIMES
(
    IN_FLIGHT,
    GROUPS,
    WRITES,
    DROPPED,
    STARTS,
    ALIVE,
    CONNECTIONS,
    ACCEPTS,  # 1 while this worker takes new connections
    TURNED_AWAY,
    HITS,  # of the cache: bytes that were here when they were asked for
    MISSES,
    WAITING,  # requests that wait for an event, parked or in a thread
    _SINGLES,
) = range(13)
_CARRIED: Final = (GROUPS, WRITES, DROPPED, HITS, MISSES)
# What is true of a worker only while it lives.
_PASSING: Final = (IN_FLIGHT, CONNECTIONS, ACCEPTS, WAITING)
# The waiting requests of each tenant are in two cells, which others may have, too: the lower
# of the two numbers is too high only where other tenants with many hit both (1 in 262,144).
_TENANT_CELLS: Final = 512
AT_TENANTS: Final = AT_SINGLES + _SINGLES
_ROW: Final = AT_TENANTS + 2 * _TENANT_CELLS


@final
class Board:
    """The numbers of all processes of one server, in memory that they share."""

    def __init__(self, slots: int = 1) -> None:
        self._shared = mmap.mmap(-1, slots * _ROW * 8)
        self._cells: memoryview[float] = memoryview(self._shared).cast("d")
        self._slots = slots
        self._holders = [0] * slots  # workers of each row

    def row(self, slot: int) -> memoryview[float]:
        return self._cells[slot * _ROW : (slot + 1) * _ROW]

    def totals(self) -> list[float]:
        """A row that adds up all rows which any worker has had, without the tenants."""
        started = AT_SINGLES + STARTS
        rows = (self.row(slot)[:AT_TENANTS] for slot in range(self._slots))
        used = [row for row in rows if row[started]]
        return [sum(cells) for cells in zip(*used, strict=True)]

    def take(self) -> int:
        """A row for a worker about to be forked; the last one is shared should all be taken.

        Called by the one process that starts workers, as is `give_back`.
        """
        slot = next((n for n in range(self._slots) if not self._holders[n]), self._slots - 1)
        row = self.row(slot)
        row[AT_SINGLES + STARTS] += 1
        if not self._holders[slot]:
            self._forget(row)  # of one that was killed
        self._hold(slot, 1)
        return slot

    def give_back(self, slot: int) -> None:
        """The worker of this row has ended."""
        self._hold(slot, -1)
        if not self._holders[slot]:  # else another one counts there, and would be forgotten too
            self._forget(self.row(slot))

    def _hold(self, slot: int, by: int) -> None:
        self._holders[slot] += by
        self.row(slot)[AT_SINGLES + ALIVE] = self._holders[slot]

    def least_connections(self, besides: int) -> float:
        """Of the workers that take new connections, all but one: how many the one with the
        fewest has; infinite where there is no other."""
        at, accepts = AT_SINGLES + CONNECTIONS, AT_SINGLES + ACCEPTS
        starts = (slot * _ROW for slot in range(self._slots) if slot != besides)
        found = (self._cells[row + at] for row in starts if self._cells[row + accepts])
        return min(found, default=math.inf)

    def waiting(self) -> float:
        """How many requests wait for an event, in all workers."""
        return self._sum(AT_SINGLES + WAITING)

    def waiting_of(self, tenant_id: str) -> float:
        """How many of one tenant's do: never fewer than there are, and rarely more."""
        return min(map(self._sum, tenant_cells(tenant_id)))

    def _sum(self, at: int) -> float:
        return sum(self._cells[slot * _ROW + at] for slot in range(self._slots))

    @staticmethod
    def _forget(row: memoryview[float]) -> None:
        for cell in _PASSING:
            row[AT_SINGLES + cell] = 0
        row[AT_TENANTS:] = array("d", bytes(8 * (_ROW - AT_TENANTS)))


def tenant_cells(tenant_id: str) -> tuple[int, int]:
    """Where a row counts a tenant, in every process alike."""
    digest = hashlib.blake2b(tenant_id.encode(), digest_size=4).digest()
    first, second = int.from_bytes(digest[:2]), int.from_bytes(digest[2:])
    at = AT_TENANTS + first % _TENANT_CELLS
    return at, AT_TENANTS + _TENANT_CELLS + second % _TENANT_CELLS


@final
class Share:
    """What a worker's main loop tells the others of its connections, and asks of theirs."""

    def __init__(self, board: Board, slot: int) -> None:
        self._board = board
        self._slot = slot
        self._row = board.row(slot)

    def tell(self, connections: int, *, accepts: bool) -> None:
        """So many are open here, and more are taken or not."""
        self._row[AT_SINGLES + CONNECTIONS] = connections
        self._row[AT_SINGLES + ACCEPTS] = accepts

    def least_of_others(self) -> float:
        """The fewest connections that any other worker has which takes more."""
        return self._board.least_connections(besides=self._slot)

    def turned_away(self) -> None:
        """A connection was closed because its peer, or this worker, has too many."""
        self._row[AT_SINGLES + TURNED_AWAY] += 1


@final
class Waiters:
    """The places of requests that wait for an event. Safe for threads.

    A tenant may have half of all places, and half of those of a worker, so that it cannot keep
    all others from waiting. Counted over all workers, without a lock between them: of those
    that come in the same moment, each worker may let one too many in.
    """

    def __init__(self, board: Board, slot: int, most: int, most_here: int | None = None) -> None:
        """`most` in all workers; `most_here` in this one, for each holds a connection."""
        self._board = board
        self._row = board.row(slot)
        self._most = most
        self._most_here = most if most_here is None else most_here
        self._of_tenant = max(1, self._most // 2)
        self._of_tenant_here = max(1, self._most_here // 2)
        self._lock = threading.Lock()

    def enter(self, tenant_id: str) -> None:
        """Take a place for a tenant, to be left again; raises TooManyWaiters."""
        at = AT_SINGLES + WAITING
        cells = tenant_cells(tenant_id)
        with self._lock:
            if self._row[at] >= self._most_here or self._board.waiting() >= self._most:
                raise TooManyWaiters(self._most)
            here = min(self._row[cell] for cell in cells)
            waiting = self._board.waiting_of(tenant_id)
            if here >= self._of_tenant_here or waiting >= self._of_tenant:
                raise TooManyWaiters(self._of_tenant, " of one tenant")
            for cell in (at, *cells):
                self._row[cell] += 1

    def leave(self, tenant_id: str) -> None:
        """Give a place of the same tenant back."""
        with self._lock:
            for cell in (AT_SINGLES + WAITING, *tenant_cells(tenant_id)):
                self._row[cell] -= 1


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
        # What is in the row already: groups, writes, dropped lines, hits and misses.
        self._seen = (0, 0, 0, 0, 0)

    def know_routes(self, routes: Iterable[str]) -> None:
        """Name all routes that there are, in the same order in every process."""
        names = [NO_ROUTE, *sorted(set(map(route_name, routes)))][:_ROUTES_MAX]
        self._routes = {name: number for number, name in enumerate(names)}

    @property
    def routes(self) -> list[str]:
        return list(self._routes)

    def began(self) -> None:
        """A request has begun."""
        with self._lock:
            self._row[AT_SINGLES + IN_FLIGHT] += 1

    def ended(self, answered: Answered) -> None:
        """A request is over."""
        route = self._routes.get(answered.route, 0)
        method = METHODS.index(answered.method if answered.method in METHODS else "other")
        status = CLASSES.index(f"{answered.status // 100}xx" if answered.status else "none")
        at = AT_BYTES + route * TIMES
        with self._lock:
            row = self._row
            row[AT_SINGLES + IN_FLIGHT] -= 1
            row[route * ROUTE_CELLS + method * len(CLASSES) + status] += 1
            row[at] += answered.bytes_in
            row[at + 1] += answered.bytes_out
            row[at + 2] += answered.duration_s
            row[at + 3 + bisect.bisect_left(BOUNDS, answered.duration_s)] += 1
        self.carry_over()

    def refused(self, status: int) -> None:
        """What came was no request, and was answered with this status."""
        at = METHODS.index("other") * len(CLASSES) + CLASSES.index(f"{status // 100}xx")
        with self._lock:
            self._row[at] += 1  # of the first route, which is none

    def carry_over(self) -> None:
        """Add to the row what other parts of this process have counted meanwhile."""
        groups, writes = self._store.catalog.commits
        dropped = 0 if self._lines is None else self._lines.dropped
        opener = self._store.opener
        with self._lock:
            now = (groups, writes, dropped, opener.hits, opener.misses)
            for cell, count, before in zip(_CARRIED, now, self._seen, strict=True):
                self._row[AT_SINGLES + cell] += max(0, count - before)
            self._seen = now
