"""Time: microseconds since 1970 UTC, and whether to believe the clock (invariant 10).

Nothing else in `cas` reads a clock. A clock is an argument, so tests never sleep.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, final

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
DAY_US = 24 * HOUR_US

# A clock this little behind is a time service at work, not a wrong clock.
SLACK_US = 60 * SECOND_US

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_ERROR = 5  # adjtimex(2) returns it while the kernel clock is not synchronised


class Clock(Protocol):
    """Where time comes from."""

    def now_us(self) -> int:
        """Wall-clock time in µs since 1970 UTC; may jump."""
        ...

    def synchronised(self) -> bool:
        """Whether the kernel says that a time service keeps the clock right."""
        ...


@final
class SystemClock:
    """The machine's clock."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def synchronised(self) -> bool:
        # struct timex is 208 bytes on 64-bit Linux; zeroed (modes = 0) it only reads.
        timex = ctypes.create_string_buffer(512)
        libc = ctypes.CDLL(None, use_errno=True)
        status: int = libc.adjtimex(timex)
        return 0 <= status < _TIME_ERROR


def believable(now_us: int, last_us: int, gap_us_max: int, synchronised: bool) -> bool:
    """Whether catalog time may move from its last value to the clock's.

    A first reading (`last_us` 0) has nothing to be compared with. A clock behind is never
    believed: catalog time stands still until the clock catches up. A clock far ahead is
    believed only when it is synchronised: a dead battery or a typed year must not expire
    everything at once.
    """
    if last_us == 0:
        return True
    return now_us - last_us >= -SLACK_US and (now_us - last_us <= gap_us_max or synchronised)


@final
@dataclass(frozen=True, slots=True)
class Reading:
    """Catalog time, and whether what begins now may be counted from it.

    It may not while time stands still for a clock that is in doubt: how much later it
    really is, nobody knows.
    """

    at_us: int
    believed: bool


def read(clock: Clock, last_us: int, gap_us_max: int) -> Reading:
    """Catalog time after `last_us`: the clock's, where that is believable, else `last_us`.

    A clock that is behind and synchronised lets time stand still, and is believed all the
    same: it is earlier than catalog time, so what is counted from that ends too late at worst.
    """
    now_us = clock.now_us()
    believed = believable(now_us, last_us, gap_us_max, synchronised=False) or clock.synchronised()
    return Reading(max(now_us, last_us) if believed else last_us, believed)


def advance(clock: Clock, last_us: int, gap_us_max: int) -> int:
    """Catalog time after `last_us`, for those who only read; see `read`."""
    return read(clock, last_us, gap_us_max).at_us


def rfc3339(at_us: int) -> str:
    """`2025-12-11T10:00:00Z`, the form of times at the edges (whole seconds)."""
    return datetime.fromtimestamp(at_us // SECOND_US, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_rfc3339(text: str) -> int:
    """A time with its offset, in µs since 1970 UTC; raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time needs its offset, as in 2030-01-01T00:00:00Z")
    # Whole numbers throughout: a float of this size is off by microseconds.
    return (moment - _EPOCH) // timedelta(microseconds=1)
