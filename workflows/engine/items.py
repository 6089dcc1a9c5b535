"""Items: of the loops that sleep, those that have not ended, so that the last one rings alone.

A loop that is not counted here began in another process, and counts its items itself when it
is rung.
"""

from __future__ import annotations

import threading
from typing import final

from workflows.engine.spots import Spot


@final
class Items:
    """Of the loops that this process carries. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[Spot, set[int]] = {}

    def count(self, loop: Spot, items: set[int]) -> None:
        """From now on, count those that have not ended."""
        with self._lock:
            self._left[loop] = items

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

    def forget(self, run: str) -> None:
        """Drop what is kept of a run that has ended."""
        with self._lock:
            for loop in [loop for loop in self._left if loop.run == run]:
                del self._left[loop]
