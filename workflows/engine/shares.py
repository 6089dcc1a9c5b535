"""Shares: whose tools are called next, where there are more calls than places.

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
class Shares:
    """The places, and the calls that wait for one, by number. Safe for threads."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._most = max(1, places * 3 // 4)  # of one tenant
        self._lock = threading.Lock()
        self._order = count()
        self._waiting: dict[str, deque[int]] = {}  # tenant -> calls
        self._since: dict[str, int] = {}  # those that wait, since when
        self._at_work: dict[int, str] = {}  # call -> tenant
        self._held: Counter[str] = Counter()  # by tenant

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
            if len(self._at_work) >= self._places:
                return None
            may = [tenant for tenant in self._waiting if self._held[tenant] < self._most]
            if not may:
                return None
            tenant = min(may, key=lambda one: (self._held[one], self._since[one]))
            call = self._waiting[tenant].popleft()
            self._since[tenant] = next(self._order)
            if not self._waiting[tenant]:
                del self._waiting[tenant], self._since[tenant]
            self._at_work[call] = tenant
            self._held[tenant] += 1
            return call

    def leave(self, call: int) -> None:
        """A call ended, or is put off; nothing where it has no place."""
        with self._lock:
            tenant = self._at_work.pop(call, None)
            if tenant is None:
                return
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]
