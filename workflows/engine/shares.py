"""Shares: whose turn it is, where there is more to do than places.

A tool may take minutes, and a tenant may have thousands of calls at once. So a tenant has at
most three quarters of the places (one, where there is only one), also while nobody else wants
any: a place that is given away for minutes is not there for who comes next. A free one goes to
the tenant that has the fewest and, of several, to who waits for longest, since it was given one
or came. Among the calls of one tenant the first one comes first.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from itertools import count
from typing import final


@final
class Places:
    """A number of places, and who has them. Safe for threads, of which one takes places."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._most = max(1, places * 3 // 4)  # of one tenant
        self._lock = threading.Lock()
        self._holders: dict[int, str] = {}  # number -> tenant
        self._held: Counter[str] = Counter()  # by tenant

    def has_room(self) -> bool:
        """Whether there is a free one."""
        with self._lock:
            return len(self._holders) < self._places

    def may_take(self, tenant: str) -> bool:
        """Whether there is one for this tenant."""
        with self._lock:
            return len(self._holders) < self._places and self._held[tenant] < self._most

    def held(self, tenant: str) -> int:
        """How many it has."""
        with self._lock:
            return self._held[tenant]

    def take(self, tenant: str, number: int) -> None:
        """What has this number has a place of the tenant's, until `leave`."""
        with self._lock:
            self._holders[number] = tenant
            self._held[tenant] += 1

    def leave(self, number: int) -> None:
        """It ended, or is put off; nothing where it has no place."""
        with self._lock:
            tenant = self._holders.pop(number, None)
            if tenant is not None:
                self._held -= Counter({tenant: 1})


@final
class Shares:
    """The places for calls, and the calls that wait for one, by number. Safe for threads, of
    which one asks for the next one."""

    def __init__(self, places: int) -> None:
        self._places = Places(places)
        self._lock = threading.Lock()
        self._order = count()
        self._waiting: dict[str, deque[int]] = {}  # tenant -> calls
        self._since: dict[str, int] = {}  # those that wait, since when

    def wait(self, tenant: str, call: int) -> None:
        """A call waits for a place, behind those of its tenant that do."""
        with self._lock:
            if tenant not in self._waiting:
                self._waiting[tenant] = deque()
                self._since[tenant] = next(self._order)
            self._waiting[tenant].append(call)

    def waiting(self) -> dict[str, int]:
        """How many calls of each tenant wait."""
        with self._lock:
            return {tenant: len(calls) for tenant, calls in self._waiting.items()}

    def next(self) -> int | None:
        """Give a place to a call, which has it until `leave`; None where nobody may have one."""
        with self._lock:
            if not self._waiting or not self._places.has_room():
                return None
            may = [tenant for tenant in self._waiting if self._places.may_take(tenant)]
            if not may:
                return None
            tenant = min(may, key=lambda one: (self._places.held(one), self._since[one]))
            call = self._waiting[tenant].popleft()
            self._since[tenant] = next(self._order)
            if not self._waiting[tenant]:
                del self._waiting[tenant], self._since[tenant]
            self._places.take(tenant, call)
            return call

    def leave(self, call: int) -> None:
        """A call ended, or is put off; nothing where it has no place."""
        self._places.leave(call)
