"""Parked requests: they wait for something that happens elsewhere, and hold no thread.

A resource that has nothing to answer yet makes a `Parked`, has somebody ring it, and leaves it
in the WSGI environment. A server that can park (`gateway.worker`) then sends no answer: it lays
the connection aside until the bell rings, the time is over, the client is gone, or the server
stops. After any of these the app is asked once more, with what was parked, and answers.

    request -> resource: PARKED -> [laid aside] -> resource: RESUMED -> answer

On any other server the resource's thread waits for the bell itself.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Final, Generic, TypeVar, final

from gateway.pool import outside_slot

# In the WSGI environment: whether the server can park; what it is to park; and, when the app is
# asked once more, what was parked. No client can set them: headers come as HTTP_….
CAN_PARK: Final = "blobcask.can_park"
PARKED: Final = "blobcask.parked"
RESUMED: Final = "blobcask.resumed"

T = TypeVar("T", bound=Hashable)


@final
class Parked:
    """One request that waits. `ring` may be called from any thread, at any time, more than
    once; only the first counts."""

    def __init__(self, kept: Any, request_id: str, patience_s: float) -> None:
        """`kept` is for the resource when it is asked once more, at the latest after
        `patience_s`."""
        self.kept = kept
        self.request_id = request_id
        self.ends_at_s = time.monotonic() + patience_s
        self.gone = False  # the client has left, or at least sends no more
        self._rung = threading.Event()
        self._lock = threading.Lock()
        self._wake: Callable[[], None] | None = None
        self._on_leaving: list[Callable[[], object]] = []

    def ring(self) -> None:
        """What was waited for may have come."""
        with self._lock:
            self._rung.set()
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def when_rung(self, wake: Callable[[], None]) -> None:
        """Have `wake` called once: by the bell, or now where it has rung already."""
        with self._lock:
            if not self._rung.is_set():
                self._wake = wake
                return
        wake()

    def wait(self) -> None:
        """Wait for the bell in this thread, outside its working slot."""
        with outside_slot():
            self._rung.wait(max(0.0, self.ends_at_s - time.monotonic()))

    def on_leaving(self, acts: Iterable[Callable[[], object]]) -> None:
        """What `leave` shall do."""
        self._on_leaving += acts

    def leave(self) -> None:
        """The waiting is over, in whichever way; further calls do nothing."""
        while self._on_leaving:
            self._on_leaving.pop()()


@final
class Lot(Generic[T]):
    """What is parked on one main loop, by when its time is over. For one thread."""

    def __init__(self) -> None:
        self._ends_s: dict[T, float] = {}
        self._by_end: list[tuple[float, int, T]] = []  # a heap; some have left already
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._ends_s)

    def __contains__(self, parked: T) -> bool:
        return parked in self._ends_s

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._ends_s))  # each may be removed meanwhile

    def add(self, parked: T, ends_at_s: float) -> None:
        """Park it until then, in seconds of time.monotonic."""
        self._ends_s[parked] = ends_at_s
        heapq.heappush(self._by_end, (ends_at_s, next(self._numbers), parked))

    def remove(self, parked: T) -> bool:
        """Whether it was there."""
        if self._ends_s.pop(parked, None) is None:
            return False
        if len(self._by_end) > 2 * len(self._ends_s) + 64:  # mostly of those that left early
            self._by_end = [entry for entry in self._by_end if self._there(entry)]
            heapq.heapify(self._by_end)
        return True

    def next_end_s(self) -> float:
        """When the first one's time is over; infinite where none is parked."""
        while self._by_end and not self._there(self._by_end[0]):
            heapq.heappop(self._by_end)
        return self._by_end[0][0] if self._by_end else math.inf

    def over(self, now_s: float) -> Iterator[T]:
        """Those whose time is over, the first to end first; they stay until removed."""
        while self.next_end_s() <= now_s:
            yield heapq.heappop(self._by_end)[2]

    def _there(self, entry: tuple[float, int, T]) -> bool:
        return self._ends_s.get(entry[2]) == entry[0]
