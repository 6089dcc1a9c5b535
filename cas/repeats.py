"""Repeats: what happens again and again is told once in a while, with how often it did.

How often is often decided by those who call from outside, who may have proved nothing: whatever
they do, it neither fills the log nor costs memory without bounds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, final

QUIET_S: Final = 60.0  # in which the same is not told again
KEYS_MAX: Final = 1024  # that are known to have been told; the oldest go first


@final
class Repeats:
    """What one process has told of, and when. Safe for threads."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        # (when it was last told, how often it happened since), the oldest first
        self._told: dict[str, tuple[float, int]] = {}

    def note(self, key: str) -> int:
        """It happened. Returns how often since it was last told, this time included, where it
        is to be told now; 0 where it was told in the last `QUIET_S`."""
        now_s = self._monotonic()
        with self._lock:
            told_s, count = self._told.get(key, (-QUIET_S, 0))
            if now_s - told_s < QUIET_S:
                self._told[key] = (told_s, count + 1)
                return 0
            self._told.pop(key, None)  # so that it becomes the last
            if len(self._told) >= KEYS_MAX:
                del self._told[next(iter(self._told))]
            self._told[key] = (now_s, 0)
        return count + 1

    @property
    def known(self) -> int:
        """How many keys are remembered; KEYS_MAX at most."""
        return len(self._told)
