"""Plans: those of the runs that are carried out, kept at hand: one is needed at each step."""

from __future__ import annotations

import threading
from typing import Final, final

from workflows.engine.plan import Plan

# Of definitions, as text. What a definition has in it takes up to 25 times as much as objects.
BYTES_MAX: Final = 8 << 20


@final
class Plans:
    """The plans of one process, as many as there is room for. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Plan, int]] = {}  # the one longest unused first
        self._bytes = 0

    def get(self, run: str) -> Plan | None:
        """The plan of a run; None where it is not at hand."""
        with self._lock:
            found = self._kept.pop(run, None)
            if found is None:
                return None
            self._kept[run] = found
            return found[0]

    def keep(self, run: str, plan: Plan, text_bytes: int) -> None:
        """Have it at hand, in the place of those longest unused."""
        with self._lock:
            self._drop(run)
            self._kept[run] = (plan, text_bytes)
            self._bytes += text_bytes
            while self._bytes > BYTES_MAX and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))

    def forget(self, run: str) -> None:
        """The run has ended."""
        with self._lock:
            self._drop(run)

    def _drop(self, run: str) -> None:
        _, text_bytes = self._kept.pop(run, (None, 0))
        self._bytes -= text_bytes
