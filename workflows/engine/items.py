"""Items: of the loops that begin or sleep, which items have not begun, and which have not ended,
so that the last one rings alone.

A loop that is not counted here began in another process, and counts its items itself when it
is rung.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import final

from workflows.engine.spots import Spot


@final
class Items:
    """Of the loops that this process carries. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[Spot, set[int]] = {}
        self._unbegun: dict[Spot, deque[int]] = {}

    def count(self, loop: Spot, items: set[int]) -> None:
        """From now on, count those that have not ended."""
        with self._lock:
            self._left[loop] = items

    def begin(self, loop: Spot, items: Iterable[int]) -> deque[int]:
        """Keep those that are to begin, until all have. The loop takes out what has begun: only
        one thread is at work at it."""
        unbegun = deque(items)
        with self._lock:
            self._unbegun[loop] = unbegun
        return unbegun

    def unbegun(self, loop: Spot) -> deque[int] | None:
        """What was left of them when the loop put the rest off; None where it did not."""
        with self._lock:
            return self._unbegun.get(loop)

    def all_begun(self, loop: Spot) -> None:
        """Keep nothing of them: when the loop is rung, it looks for itself."""
        with self._lock:
            self._unbegun.pop(loop, None)

    def ended(self, loop: Spot, item: int) -> bool:
        """One ended: whether the loop is to be rung, having none left or not being counted."""
        with self._lock:
            left = self._left.get(loop)
            if left is not None:
                left.discard(item)
            return not left

    def all_ended(self, loop: Spot, items: set[int]) -> bool:
        """Whether all have ended, `items` being among them."""
        with self._lock:
            left = self._left.get(loop, set())
            left -= items
            if not left:
                self._left.pop(loop, None)
            return not left

    def over(self, loop: Spot) -> None:
        """Count them no longer."""
        with self._lock:
            self._left.pop(loop, None)
            self._unbegun.pop(loop, None)

    def forget(self, run: str) -> None:
        """Drop what is kept of a run: it has ended, or begins anew."""
        with self._lock:
            for loop in [loop for loop in (*self._left, *self._unbegun) if loop.run == run]:
                self._left.pop(loop, None)
                self._unbegun.pop(loop, None)
