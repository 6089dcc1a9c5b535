"""Beating: the runner tells that it is alive (`cas.runner`), from its own loop.

A thread that beats for it would also do so for a loop that is stuck. So the loop beats, at each
of its turns and between two runs where it has many to look at, and a file is written of that
every few seconds.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

from cas.beats import BEAT_S, write_beat
from cas.clock import SECOND_US
from cas.runner import STATUS, RunnerBeat
from cas.store import Store

_log = logging.getLogger(__name__)


@final
class AtWork:
    """The steps that are at work at this moment. Safe for threads."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._since_s: dict[object, float] = {}  # in the order in which they began
        self._of: Counter[str] = Counter()  # by run
        self._counting = threading.Lock()

    @contextmanager
    def one(self, run: str = "") -> Iterator[None]:
        """While this lasts, one more is, of this run."""
        key = object()
        with self._counting:
            self._since_s[key] = self._now_s()
            self._of[run] += 1
        try:
            yield
        finally:
            with self._counting:
                del self._since_s[key]
                self._of -= Counter({run: 1})

    def of(self, run: str) -> int:
        """How many of a run are."""
        with self._counting:
            return self._of[run]

    def told(self) -> tuple[int, int]:
        """How many they are, and for how long the oldest is at work, in µs."""
        with self._counting:
            steps, since_s = len(self._since_s), next(iter(self._since_s.values()), None)
        return steps, 0 if since_s is None else round((self._now_s() - since_s) * SECOND_US)


@final
class Beating:
    """For the one thread that has the place of the runner."""

    def __init__(
        self,
        store: Store,
        at_work: AtWork,
        now_s: Callable[[], float] = time.monotonic,
        late: Callable[[], int] = int,
        barred: Mapping[str, str] | None = None,
    ) -> None:
        """`late` says how many calls of tools go on past their time; `barred` are the tools that
        may not be called, each with the reason."""
        self._store = store
        self._late = late
        self._barred = dict(barred or {})
        self._at_work = at_work
        self._now_s = now_s
        self._started_at: int | None = None
        self._due_s = now_s()
        self._failures = 0

    def beat(self, runs: int = 0, *, only: int | None = None, waits: bool = False) -> None:
        """Tell, where that is due, how many runs were taken up, how many it is for (None: all),
        and whether a restored store waits for acceptance. That it cannot be told is logged, and
        no reason to stop."""
        if self._now_s() < self._due_s:
            return
        steps, oldest_us = self._at_work.told()
        now_us = self._store.clock.now_us()
        if self._started_at is None:
            self._started_at = now_us
        beat = RunnerBeat(
            os.getpid(),
            self._started_at,
            now_us,
            runs,
            steps,
            oldest_us,
            self._failures,
            waits,
            self._late(),
            only,
            self._barred,
        )
        try:
            write_beat(self._store.root / STATUS, beat)
        except OSError as error:
            _log.warning("no sign of life: %s", error)
        self._due_s = self._now_s() + BEAT_S

    def looked(self) -> None:
        """A look at what there is to do went well."""
        self._failures = 0

    def failed(self) -> None:
        """A look failed, and comes again."""
        self._failures += 1
