"""Threads for requests, of which few work while many wait for their clients.

A thread that waits for a slow client costs its stack and nothing else; one that works costs
a share of the interpreter. So threads are made as they are needed, up to one a connection,
and what is limited is how many *work*: each holds one of the slots, gives it back around
every wait for its client (`waiting`), and stands in line for one again, in the same line as
the requests that have not begun. So 200 uploads of a kilobyte a second hold no slot, and
no crowd of uploads keeps a new request from its turn.

    submit → [line] → works, in a slot → done
                ↑                ↓
                └─── waits for its client: no slot
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, final

Work = Callable[[], None]

# Kept for the next crowd for so long. The last to become idle is the first to work again,
# so the others' time does come.
_IDLE_S: Final = 30.0
# Below the 2 MiB of a huge page, which the kernel would give to each stack as a whole.
STACK_BYTES: Final = 1 << 20

_here = threading.local()  # `.pool`: whose thread this is


@final
class _Thread:
    """Where one thread finds its next work, or nothing when it is to end."""

    __slots__ = ("started", "wake", "work")

    def __init__(self) -> None:
        self.work: Work | None = None
        self.wake = _closed_gate()
        self.started = False


@final
class Pool:
    """Runs work in threads, `slots` at a time. Safe for threads.

    Its threads are daemons: one that waits for a client does not keep the process alive.
    """

    def __init__(self, slots: int) -> None:
        self._lock = threading.Lock()
        self._free = slots
        # Requests that have not begun, and the gates of those that want a slot again.
        self._line: deque[Work | threading.Lock] = deque()
        self._idle: list[_Thread] = []

    def submit(self, work: Work) -> None:
        """Have `work` done in a thread, in its turn; it must not raise."""
        with self._lock:
            if not self._free:
                self._line.append(work)
                return
            self._free -= 1
            thread = self._thread_for(work)
        self._wake(thread)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Give the slot to somebody else while the block waits for a client.

        For threads of this pool only. Whatever the block raises comes when there is a slot
        again.
        """
        self._leave()
        try:
            yield
        finally:
            self._return()

    def shutdown(self, wait: bool = False) -> None:
        """As gunicorn asks its executor to stop; see the class why there is nothing to do."""

    def _leave(self) -> None:
        with self._lock:
            if not self._line:
                self._free += 1
                return
            first = self._line.popleft()
            if not callable(first):
                first.release()  # the slot goes with it
                return
            thread = self._thread_for(first)
        self._wake(thread)

    def _return(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            gate = _closed_gate()
            self._line.append(gate)
        gate.acquire()

    def _thread_for(self, work: Work) -> _Thread:
        thread = self._idle.pop() if self._idle else _Thread()
        thread.work = work
        return thread

    def _wake(self, thread: _Thread) -> None:
        if thread.started:
            thread.wake.release()
            return
        thread.started = True
        try:
            threading.Thread(target=self._run, args=(thread,), name="request", daemon=True).start()
        except RuntimeError:  # the system has no more threads: one that ends its work takes it
            with self._lock:
                assert thread.work is not None
                gate = next((entry for entry in self._line if not callable(entry)), None)
                self._line.appendleft(thread.work)
                if gate is None:
                    self._free += 1
                else:  # a thread that is there already can use the slot
                    self._line.remove(gate)
                    gate.release()

    def _run(self, thread: _Thread) -> None:
        _here.pool = self
        while (work := thread.work) is not None:
            work()
            del work  # an idle thread must not hold a connection
            self._next(thread)

    def _next(self, thread: _Thread) -> None:
        """Find the next work for a thread that has a slot, or sleep without one."""
        thread.work = None
        with self._lock:
            first = self._line.popleft() if self._line else None
            if first is not None and callable(first):
                thread.work = first
                return
            if first is None:
                self._free += 1
            else:
                first.release()
            self._idle.append(thread)
        if thread.wake.acquire(timeout=_IDLE_S):
            return
        with self._lock:
            if thread in self._idle:
                self._idle.remove(thread)
                return
        thread.wake.acquire()  # it was given work just now


def outside_slot() -> AbstractContextManager[None]:
    """`Pool.waiting` of the pool that runs this thread, for waits for others than the client;
    nothing in a thread that belongs to none."""
    pool: Pool | None = getattr(_here, "pool", None)
    return nullcontext() if pool is None else pool.waiting()


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate
