"""When a blob was last read, kept where it costs nothing: in the file's time of last access.

Eviction asks which bytes nobody needs; no reading is ever journalled for its sake. The time
is set by us, at most once in `_EVERY_US` for a blob, and only where a cache limit is set: the
kernel's own ways with it depend on the mount, and a scrub that reads everything must not make
everything look used (`BlobFiles.open`). It leaves the time of writing alone, which is part of
what a record knows of its file.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final, final

from cas.clock import HOUR_US, SECOND_US, Clock

_EVERY_US: Final = HOUR_US
# What was used so lately is never evicted: whoever was told that it is here (a proxy that
# sends the file itself) needs a moment to open it.
JUST_NOW_US: Final = 60 * SECOND_US


@final
class Recency:
    """Notes the use of blob files, unless it is off. Safe for threads and processes."""

    def __init__(self, clock: Clock, *, on: bool) -> None:
        self._clock = clock
        self._on = on

    def used(self, fd: int, *, by_name: bool = False) -> None:
        """The file at `fd` is being read; `by_name`: it will be opened once more, soon."""
        if not self._on:
            return
        found = os.fstat(fd)
        now_us = self._clock.now_us()
        every_us = JUST_NOW_US // 2 if by_name else _EVERY_US
        if abs(now_us - found.st_atime_ns // 1000) >= every_us:
            with suppress(OSError):  # another user's file, a read-only filesystem
                os.utime(fd, ns=(now_us * 1000, found.st_mtime_ns))

    def idle_us(self, found: os.stat_result) -> int:
        """How long nobody read it; a time to come, which a wrong clock left, is long ago."""
        idle_us = self._clock.now_us() - found.st_atime_ns // 1000
        return idle_us if idle_us >= 0 else -idle_us
