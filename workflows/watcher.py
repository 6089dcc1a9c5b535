"""Watcher: wakes who waits for events, when another process commits one or a time is over.

One thread a process, begun by the first who waits and asleep while nobody does. Every 10 ms it
looks at the number of LMDB's last commit, which costs a microsecond and shows the commits of
all processes; only where that moved does it read, and then what was delivered since.

A ring is a doorbell: it says "look", carries nothing, and may come twice or for nothing. What
a wait was given is in the catalog, and `Events.claim` reads it. Should a ring be missed, all
that is watched is looked at again within a second.

What a look costs is what is new: each wait says in which frame of the journal it was last begun
or given something, and looks go by that; those whose time is over are read once, when it ends.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, final

from cas.catalog import Snapshot
from cas.catalog.local import LocalCatalog
from cas.errors import CatalogClosed, WrongProcess
from cas.events import is_over, is_waiting
from cas.records import Subscription

_LOOK_S: Final = 0.01  # between two looks: half of it is what an event waits on average
_RECHECK_S: Final = 1.0  # between two looks at all that is watched
_AFTER_ERROR_S: Final = 1.0
_PAGE: Final = 500

_log = logging.getLogger(__name__)

Ring = Callable[[], None]
Unwatch = Callable[[], None]


@final
class Watcher:
    """Rings for waits of one ROOT. Safe for threads.

    Rings are called in its thread (or in the one that begins to watch), one after the other:
    they set an event or put into a queue, and do no work. What they raise is logged.
    """

    def __init__(self, catalog: LocalCatalog) -> None:
        self._catalog = catalog
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._of_wait: dict[str, dict[int, Ring]] = {}
        self._of_all: dict[int, Callable[[Subscription], None]] = {}
        self._of_commits: dict[int, Ring] = {}
        self._untold: list[int] = []  # of `_of_all`: they have not heard what was there before
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nobody is woken any more."""
        return self._closed

    def watch(self, subscription_id: str, ring: Ring) -> Unwatch:
        """Ring when this wait has been given its event, or its time is over, or it is gone;
        returns how to stop that. Where it is so already, it rings before this returns.

        Raises CatalogClosed after `close`.
        """
        number = next(self._numbers)
        with self._changed:
            self._begin()
            self._of_wait.setdefault(subscription_id, {})[number] = ring

        def unwatch() -> None:
            with self._changed:
                rings = self._of_wait.get(subscription_id, {})
                rings.pop(number, None)
                if not rings:
                    self._of_wait.pop(subscription_id, None)

        try:
            with self._catalog.read() as snapshot:
                decided = self._decided(snapshot, subscription_id)
        except BaseException:
            unwatch()
            raise
        if decided:
            _call(ring)
        return unwatch

    def watch_all(self, ring: Callable[[Subscription], None]) -> Unwatch:
        """Ring for every wait that is given an event or whose time is over, and soon for each
        that was before and is not claimed; returns how to stop that.

        Raises CatalogClosed after `close`.
        """
        number = next(self._numbers)
        with self._changed:
            self._begin()
            self._of_all[number] = ring
            self._untold.append(number)
            self._changed.notify_all()

        def unwatch() -> None:
            with self._changed:
                self._of_all.pop(number, None)

        return unwatch

    def watch_commits(self, ring: Ring) -> Unwatch:
        """Ring after every commit of any process, once for those between two looks.

        Raises CatalogClosed after `close`.
        """
        number = next(self._numbers)
        with self._changed:
            self._begin()
            self._of_commits[number] = ring

        def unwatch() -> None:
            with self._changed:
                self._of_commits.pop(number, None)

        return unwatch

    def close(self) -> None:
        """Ring for everybody who watches one wait or commits, and end the thread. Twice is fine."""
        with self._changed:
            if self._closed and self._thread is None:
                return
            self._closed = True
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._ring_everybody()

    # --- the thread

    def _begin(self) -> None:
        if self._closed:
            raise CatalogClosed
        if self._thread is None:
            # Before anybody watches, so that nothing comes between.
            look = _Look(self)
            self._thread = threading.Thread(
                target=self._run, args=(look,), name="watcher", daemon=True
            )
            self._thread.start()
        else:
            self._changed.notify_all()

    def _watched(self) -> bool:
        return bool(self._of_wait or self._of_all or self._of_commits)

    def _run(self, look: _Look) -> None:
        while not self._closed:
            try:
                while self._awaited(_LOOK_S):
                    look.again()
            except (CatalogClosed, WrongProcess):
                break
            except Exception:  # noqa: BLE001  # the thread that all who wait depend on
                _log.exception("the watcher cannot read the catalog; it tries again")
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, _AFTER_ERROR_S)
        with self._changed:
            self._closed = True  # whoever comes now would wait for a ring that nobody makes
        self._ring_everybody()

    def _awaited(self, pause_s: float) -> bool:
        """Pause, and while nobody watches rest; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._untold), pause_s)
            self._changed.wait_for(lambda: self._closed or self._watched())
            return not self._closed

    def _ring_everybody(self) -> None:
        with self._changed:
            rings = [ring for rings in self._of_wait.values() for ring in rings.values()]
            rings += self._of_commits.values()
        for ring in rings:
            _call(ring)

    def _ring(self, wait: Subscription) -> None:
        """Ring for one wait, by all who watch it."""
        self._ring_one(wait.subscription_id)
        self._tell(wait, None)

    def _tell(self, wait: Subscription, told: list[int] | None) -> None:
        """Ring by those who watch all; with `told`, by those only that are named there."""
        with self._changed:
            rings = [
                ring for number, ring in self._of_all.items() if told is None or number in told
            ]
        for ring in rings:
            _call(partial(ring, wait))

    def _ring_one(self, subscription_id: str) -> None:
        with self._changed:
            rings = list(self._of_wait.get(subscription_id, {}).values())
        for ring in rings:
            _call(ring)

    def _decided(self, snapshot: Snapshot, subscription_id: str) -> bool:
        wait = snapshot.get(Subscription, subscription_id)
        return wait is None or not is_waiting(wait) or is_over(wait, self._catalog.time().at_us)


@final
class _Look:
    """What the thread has seen so far."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._catalog = watcher._catalog
        self._commit = -1
        # All that was delivered before this moment is told by a look at it, not by its index.
        with self._catalog.read() as snapshot:
            self._seq = snapshot.position.seq  # what changed in frames up to this was read
        self._overdue_us = self._catalog.time().at_us  # who was over by then was rung for
        self._next_over_us: int | None = None
        self._recheck_s = time.monotonic()  # when all were looked at last
        self._moved = True  # since then

    def again(self) -> None:
        """Ring for what happened since the last look."""
        watcher = self._watcher
        commit = self._catalog.last_commit()
        if commit != self._commit:
            with self._catalog.read() as snapshot:
                self._news(snapshot)
                self._next_over_us = self._first_over(snapshot)
            self._commit, self._moved = commit, True  # only now: a failed look is repeated
            with watcher._changed:
                rings = list(watcher._of_commits.values())
            for ring in rings:
                _call(ring)
        if watcher._untold:
            self._tell()
        if self._next_over_us is not None and self._next_over_us <= self._catalog.time().at_us:
            self._over()
        if time.monotonic() - self._recheck_s >= _RECHECK_S:
            self._recheck()

    def _news(self, snapshot: Snapshot) -> None:
        after: tuple[int | str, ...] = (self._seq,)
        while page := snapshot.range(Subscription, "changed", after=after, limit=_PAGE):
            for wait in page:
                # Begun, or dated, so late that the time of its end has been looked at already:
                # its commit took long.
                late = is_waiting(wait) and is_over(wait, self._overdue_us)
                if late or not is_waiting(wait):
                    self._watcher._ring(wait)
            after = (page[-1].seq or 0, page[-1].subscription_id)
        self._seq = snapshot.position.seq

    def _first_over(self, snapshot: Snapshot) -> int | None:
        """When the next wait is over."""
        after = (self._overdue_us,)
        found = snapshot.range(Subscription, "timer", after=after, limit=1)
        return found[0].open_until if found else None

    def _over(self) -> None:
        now_us = max(self._overdue_us, self._catalog.time().at_us)
        with self._catalog.read() as snapshot:
            after: tuple[int | str, ...] = (self._overdue_us,)
            before = (now_us + 1,)
            while page := snapshot.range(
                Subscription, "timer", after=after, before=before, limit=_PAGE
            ):
                for wait in page:
                    self._watcher._ring(wait)
                after = (page[-1].open_until or 0, page[-1].subscription_id)
            self._overdue_us = now_us
            self._next_over_us = self._first_over(snapshot)

    def _tell(self) -> None:
        """Tell who watches all since lately what was there before."""
        watcher = self._watcher
        with watcher._changed:
            told = list(watcher._untold)
        before = (self._catalog.time().at_us + 1,)
        with self._catalog.read() as snapshot:
            after: tuple[int | str, ...] = ()
            while page := snapshot.range(Subscription, "delivered", after=after, limit=_PAGE):
                for wait in page:
                    watcher._tell(wait, told)
                after = (page[-1].delivered_at or 0, page[-1].subscription_id)
            after = ()
            while page := snapshot.range(
                Subscription, "timer", after=after, before=before, limit=_PAGE
            ):
                for wait in page:
                    watcher._tell(wait, told)
                after = (page[-1].open_until or 0, page[-1].subscription_id)
        with watcher._changed:  # only now: a failed look is repeated
            watcher._untold = [number for number in watcher._untold if number not in told]

    def _recheck(self) -> None:
        """Look at each watched wait itself: claimed by somebody else, cancelled, or missed."""
        self._recheck_s = time.monotonic()
        if not self._moved:
            return
        watcher = self._watcher
        with watcher._changed:
            watched = list(watcher._of_wait)
        with self._catalog.read() as snapshot:
            decided = [name for name in watched if watcher._decided(snapshot, name)]
        self._moved = False
        for name in decided:
            watcher._ring_one(name)


def _call(ring: Ring) -> None:
    try:
        ring()
    except Exception:  # noqa: BLE001  # it must not keep the others from being woken
        _log.exception("who was to be woken failed at it")
