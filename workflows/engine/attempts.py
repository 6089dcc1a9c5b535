"""Attempts: calls with a limit of time, and when a step may be tried again.

After an attempt that failed, the next one begins when the delay of the step's policy is over.
The catalog says when that is (`Step.retry_at`), so that no runner forgets it; by the monotonic
clock a runner waits no longer than the delay, however wrong the wall clock is (invariant 10).

A thread cannot be ended: a call whose time is over goes on, and what it comes to is dropped. A
step is not called again beside itself: its delay counts from the end of such a call. And where
a tenant has LATE_MAX of these, no further call of it that has a limit begins.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, final

from cas.errors import ToolFailed
from workflows.engine.spots import Spot

LATE_MAX: Final = 100  # threads of one tenant
_LOOK_S: Final = 0.1  # between two looks at a call that goes on: at least,
_LOOK_S_MAX: Final = 60.0  # at most,
_LOOK_SHARE: Final = 0.25  # and as a part of the time for which it has gone on
_CROWDED_LOOK_S: Final = 1.0


@final
class _Call:
    """A call whose time is over."""

    def __init__(self, tenant: str, late_s: float) -> None:
        self.tenant = tenant
        self.late_s = late_s  # since when
        self.ended_s: float | None = None


@final
class Attempts:
    """Of the steps that this process carries. Safe for threads."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._due_s: dict[Spot, float] = {}
        self._late: dict[Spot, _Call] = {}
        self._going_on: Counter[str] = Counter()  # calls of each tenant

    def within(
        self, spot: Spot, tenant: str, limit_s: float | None, tool: str, call: Callable[[], Any]
    ) -> Any:
        """What `call` returns; raises ToolFailed where that takes longer than `limit_s`, OSError
        where there is no thread for it."""
        if limit_s is None:
            return call()
        outcome: list[tuple[Any, BaseException | None]] = []
        late: list[_Call] = []

        def work() -> None:
            try:
                came: tuple[Any, BaseException | None] = (call(), None)
            except BaseException as error:  # noqa: BLE001  it is raised in the thread that waits
                came = (None, error)
            with self._lock:
                outcome.append(came)
                for one in late:
                    one.ended_s = self._now_s()
                    self._going_on -= Counter({one.tenant: 1})

        thread = threading.Thread(target=work, name=f"limited {tool}", daemon=True)
        try:
            thread.start()
        except RuntimeError as none:  # the machine's trouble, which passes: nothing was called
            raise OSError(errno.EAGAIN, str(none)) from none
        thread.join(limit_s)
        with self._lock:
            if not outcome:
                late.append(_Call(tenant, self._now_s()))
                self._late[spot] = late[0]
                self._going_on[tenant] += 1
        if late:
            raise ToolFailed(tool, f"it took longer than {limit_s:g} s", again=True)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def crowded_s(self, tenant: str) -> float:
        """How long until it is looked again whether a call with a limit may begin; 0: it may."""
        with self._lock:
            return _CROWDED_LOOK_S if self._going_on[tenant] >= LATE_MAX else 0.0

    def late(self) -> int:
        """How many calls go on past their time, of all tenants."""
        with self._lock:
            return self._going_on.total()

    def failed(self, spot: Spot, delay_s: float) -> None:
        """An attempt failed just now, and another one follows after so long."""
        with self._lock:
            self._due_s[spot] = self._now_s() + delay_s

    def left_s(self, spot: Spot, delay_s: float, left_s: float) -> float:
        """How long until the next attempt, which follows the failed one after `delay_s`; 0: it
        begins. Where the failed one was in another process, `left_s` is what is left."""
        with self._lock:
            now_s = self._now_s()
            due_s = self._due_s.setdefault(spot, now_s + min(left_s, delay_s))
            late = self._late.get(spot)
            if late is not None and late.ended_s is None:
                goes_on_s = (now_s - late.late_s) * _LOOK_SHARE
                return max(due_s - now_s, min(max(_LOOK_S, goes_on_s), _LOOK_S_MAX))
            if late is not None and late.ended_s is not None:
                due_s = max(due_s, late.ended_s + delay_s)
            return max(0.0, due_s - now_s)

    def over(self, spot: Spot) -> None:
        """The next attempt begins, or none follows."""
        with self._lock:
            self._due_s.pop(spot, None)
            self._late.pop(spot, None)

    def forget(self, run: str) -> None:
        """Drop what is kept of a run that has ended."""
        with self._lock:
            for spot in {spot for spot in (*self._due_s, *self._late) if spot.run == run}:
                self._due_s.pop(spot, None)
                self._late.pop(spot, None)
