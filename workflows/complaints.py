"""Complaints: what the log tells an operator of something that is wrong, and stays so.

How often it is noticed is decided by those who call from outside, who may have proved nothing.
So each complaint is a line once a minute at most, however often it is made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, final

log = logging.getLogger("blobcask.workflows")

QUIET_S: Final = 60.0
TOLD_MAX: Final = 1000  # complaints that are known to have been made; the oldest go first


@final
class Complaints:
    """The complaints of one process. Safe for threads."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}  # when it was last told, the oldest first

    def make(self, text: str, *facts: str) -> None:
        """Tell it as an error, with its facts in it, unless it was told in the last minute."""
        complaint = text % facts
        now_s = self._monotonic()
        with self._lock:
            told_s = self._told.get(complaint)
            if told_s is not None and now_s - told_s < QUIET_S:
                return
            self._told.pop(complaint, None)  # so that it becomes the last
            if len(self._told) >= TOLD_MAX:
                del self._told[next(iter(self._told))]
            self._told[complaint] = now_s
        log.error("%s", complaint)
