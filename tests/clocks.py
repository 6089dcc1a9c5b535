"""A clock that stands still until a test moves it, and one that is wrong for real processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest

from cas.clock import DAY_US, SystemClock

# 2026-01-01T00:00:00Z: any moment would do, a fixed one makes failures repeat.
START_US = 20_454 * DAY_US
# `[events] keep`, and `[workflows] keep`, where they are not set.
KEEP_US = 30 * DAY_US


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


def wrong_clock(fake: str) -> dict[str, str]:
    """The environment of processes whose wall clock is wrong, and no other clock: by
    `+3650d` or `-3650d`, or standing at `@1970-01-02`. Skips where that cannot be."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        reason = "faketime is not installed; requirements/system.txt names its package"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    if SystemClock().synchronised():
        pytest.skip("the kernel vouches for its clock here, and faketime cannot change that")
    stamp = f"{fake} 00:00:00" if fake.startswith("@") else fake
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": stamp,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
    }
