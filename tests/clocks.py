"""A clock that stands still until a test moves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from cas.clock import DAY_US

# 2026-01-01T00:00:00Z: any moment would do, a fixed one makes failures repeat.
START_US = 20_454 * DAY_US


@final
@dataclass
class HandClock:
    """A `cas.clock.Clock` set by hand; both fields may be assigned at any time."""

    time_us: int = START_US
    trusted: bool = True

    def now_us(self) -> int:
        return self.time_us

    def synchronised(self) -> bool:
        return self.trusted

    def advance(self, by_us: int) -> None:
        """Move by `by_us` µs; back when it is negative."""
        self.time_us += by_us
