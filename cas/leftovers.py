"""What is thrown away after the answer.

Freeing a large file takes milliseconds that keeping it does not. Done before the answer, it
would tell a tenant that the bytes were thrown away, so that another one has them
(invariant 9). One thread does it, started with the first leftover.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import final

_log = logging.getLogger(__name__)

# Each may hold a descriptor. Above it the disk is far behind, and the caller waits.
_WAITING_MAX = 64


@final
class Leftovers:
    """Removals that wait for their turn. Safe for threads; `close` waits for all."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def add(self, removal: Callable[[], object]) -> None:
        """Run `removal` soon. Its OSError is logged: the scrub finds what stays behind."""
        if self._waiting.qsize() >= _WAITING_MAX:
            _run(removal)
            return
        with self._starting:
            self._waiting.put(removal)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._remove_all, name="leftovers", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """Wait until all are removed, and end the thread. Adding more starts it again."""
        with self._starting:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._waiting.put(None)
                thread.join()

    def _remove_all(self) -> None:
        while (removal := self._waiting.get()) is not None:
            _run(removal)


def _run(removal: Callable[[], object]) -> None:
    try:
        removal()
    except OSError as error:
        _log.warning("a leftover was not removed: %s", error)
