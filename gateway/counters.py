"""Counters that all worker processes of a server share: how often lately, and when again.

The counting is that of the `limits` package (sliding window counter): a count for the
window that runs and one for the window before, which weighs less the more of it has slid
out of sight. A window begins with the first thing that is counted in it.

The counts live in an LMDB environment of their own, which is thrown away: a write
transaction is the one step that looks and counts, whichever process takes it. Nothing here
is synced or journalled; a restarted server begins anew.

    key                         value
    space "n"                   how many entries the space has
    space "e" name              Window: start, previous, current; and its period
    space "d" due time, name    empty: the entries in the order in which they end

`name` is a digest: entries are all of one size, and no address is written anywhere. A space
(addresses, tenants, links, everybody) holds at most ENTRIES_MAX; another one then takes the
place of the one that ends soonest, so that a flood of addresses makes the counts of
addresses short of memory, and never those of tenants or of the whole.

When the environment fails (full, damaged, taken away), each process goes on with counts of
its own and says so in the log: limits are then up to `workers` times as wide. Refusing would
stop the store for a file of no worth, and letting everything pass would let tokens be
guessed at any rate.

Time is the monotonic clock: one for all processes of a machine, and no step of the clock
opens or closes a limit.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeVar, final

import lmdb
from limits.storage import Storage
from limits.storage.base import SlidingWindowCounterSupport

from cas.clock import SECOND_US

log = logging.getLogger("blobcask.gateway")

T = TypeVar("T")

ENTRIES_MAX: Final = 100_000  # of each space, at about 200 bytes
OWN_ENTRIES_MAX: Final = 10_000  # of a process that counts alone
MAP_BYTES: Final = 256 << 20  # more than all spaces can fill
RETRY_US: Final = 30 * SECOND_US  # how long a process counts alone before it tries again

SPACES: Final = {"address": b"a", "tenant": b"t", "link": b"l", "everybody": b"w"}
_NAME_BYTES: Final = 16
_VALUE: Final = struct.Struct(">QQQQ")
_DUE: Final = struct.Struct(">Q")
_EXPIRED_PER_ENTRY: Final = 4  # removed for each one that is made: more than can come


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000


class Window(NamedTuple):
    """What was counted in the window that began at `start_us`, and in the one before."""

    start_us: int
    previous: int
    current: int

    def at(self, now_us: int, period_us: int) -> Window:
        """The same once time has moved on to `now_us`."""
        passed_us = now_us - self.start_us
        if passed_us < period_us:
            return self
        if passed_us < 2 * period_us:
            return Window(self.start_us + period_us, self.current, 0)
        return Window(now_us, 0, 0)

    def previous_left_us(self, now_us: int, period_us: int) -> int:
        """How much of the window before is still in sight."""
        return min(period_us, max(0, self.start_us + period_us - now_us))

    def weight(self, now_us: int, period_us: int) -> int:
        """What counts now, rounded down."""
        left_us = self.previous_left_us(now_us, period_us)
        return self.previous * left_us // period_us + self.current

    def add(self, amount: int) -> Window:
        """With so many more; fewer when it is negative, of the latest first."""
        current = self.current + amount
        return Window(self.start_us, max(0, self.previous + min(0, current)), max(0, current))

    def wait_us(self, now_us: int, period_us: int, limit: int, cost: int) -> int:
        """How long until `cost` (at most `limit`) more are within the limit."""
        if self.weight(now_us, period_us) + cost <= limit:
            return 0
        room = limit - cost + 1  # what counts must come to be below this
        ends_us = self.start_us + period_us - now_us
        if self.current < room:
            return ends_us - _left_below(self.previous, room - self.current, period_us)
        return ends_us + period_us - _left_below(self.current, room, period_us)


def _left_below(count: int, room: int, period_us: int) -> int:
    """The most of a window that may be in sight for its `count` to weigh less than `room`."""
    return min(period_us, (room * period_us - 1) // count)


@final
class Key(NamedTuple):
    """Which counter, in which space, and how long its window is."""

    space: bytes
    name: bytes
    period_us: int

    @classmethod
    def of(cls, text: str, period_s: int) -> Key:
        """The key for one of the `limits` package, whose first part is our space."""
        name = blake2b(text.encode(), digest_size=_NAME_BYTES).digest()
        return cls(SPACES[text.partition("/")[0]], name, period_s * SECOND_US)


# Looks at a window that is up to date and says what it becomes.
Step = Callable[[Window, int], tuple[Window, T]]


class Table(Protocol):
    """Where windows are kept."""

    def change(self, key: Key, step: Step[T]) -> T:
        """Do one step, with no other at the same time."""
        ...


@final
class OwnTable:
    """The windows of this process alone."""

    def __init__(self, now_us: Callable[[], int]) -> None:
        self._now_us = now_us
        self._lock = threading.Lock()
        self._windows: dict[Key, Window] = {}  # the oldest entry first

    def change(self, key: Key, step: Step[T]) -> T:
        with self._lock:
            now_us = self._now_us()
            found = self._windows.get(key, Window(now_us, 0, 0))
            window, result = step(found.at(now_us, key.period_us), now_us)
            if window.previous or window.current:  # else it was only looked at
                if key not in self._windows and len(self._windows) >= OWN_ENTRIES_MAX:
                    del self._windows[next(iter(self._windows))]
                self._windows[key] = window
            return result


@final
class SharedTable:
    """The windows of all processes that open the same folder. Open it after fork.

    Every call may raise lmdb.Error, or struct.error where a value is none of ours.
    """

    def __init__(
        self, folder: Path, now_us: Callable[[], int], entries_max: int = ENTRIES_MAX
    ) -> None:
        self._now_us = now_us
        self._entries_max = entries_max
        # Readers hold pages back and occupy slots: there are none, looking is a step too.
        self._env: lmdb.Environment = lmdb.open(
            str(folder), map_size=MAP_BYTES, sync=False, metasync=False, max_readers=1
        )

    def change(self, key: Key, step: Step[T]) -> T:
        place = key.space + b"e" + key.name
        with self._env.begin(write=True) as txn:
            # Under the lock, so that time does not go back from one step to the next.
            now_us = self._now_us()
            raw = txn.get(place)
            found = None if raw is None else Window(*_VALUE.unpack(raw)[:3])
            fresh = Window(now_us, 0, 0)
            window, result = step((found or fresh).at(now_us, key.period_us), now_us)
            if window != (found or fresh):
                self._keep(txn, key, found, window)
                txn.put(place, _VALUE.pack(*window, key.period_us))
            return result

    def entries(self) -> int:
        """How many windows there are."""
        with self._env.begin(write=True) as txn:
            return sum(_number(txn, space) for space in SPACES.values())

    def close(self) -> None:
        self._env.close()

    def _keep(
        self, txn: lmdb.Transaction[bytes], key: Key, found: Window | None, window: Window
    ) -> None:
        """Have the order of endings right; it changes once a period."""
        if found is None:
            number = _number(txn, key.space) - self._make_room(txn, key.space, window.start_us)
            txn.put(key.space + b"n", _DUE.pack(number + 1))
        elif found.start_us != window.start_us:
            txn.delete(_due(key.space, key.name, found.start_us, key.period_us))
        else:
            return
        txn.put(_due(key.space, key.name, window.start_us, key.period_us), b"")

    def _make_room(self, txn: lmdb.Transaction[bytes], space: bytes, now_us: int) -> int:
        """Remove a few that have ended, or the next to end where there is no room."""
        full = _number(txn, space) >= self._entries_max
        removed = 0
        prefix = space + b"d"
        with txn.cursor() as cursor:
            while removed < _EXPIRED_PER_ENTRY and cursor.set_range(prefix):
                due = cursor.key()
                if not due.startswith(prefix):
                    break
                if _DUE.unpack_from(due, len(prefix))[0] > now_us and (removed or not full):
                    break
                cursor.delete()
                txn.delete(space + b"e" + due[-_NAME_BYTES:])
                removed += 1
        return removed


def _number(txn: lmdb.Transaction[bytes], space: bytes) -> int:
    raw = txn.get(space + b"n")
    return 0 if raw is None else int(_DUE.unpack(raw)[0])


def _due(space: bytes, name: bytes, start_us: int, period_us: int) -> bytes:
    """When a window counts for nothing any more: it is the one before, and has slid out."""
    return space + b"d" + _DUE.pack(start_us + 2 * period_us) + name


@final
class Counters(Storage, SlidingWindowCounterSupport):
    """A storage of the `limits` package, over a shared table while that works.

    Safe for threads; never raises for what happens to the table.
    """

    STORAGE_SCHEME = None  # made by hand, never by a URI

    def __init__(
        self, shared: Table | None = None, now_us: Callable[[], int] = monotonic_us
    ) -> None:
        super().__init__()
        self._shared = shared
        self._own = OwnTable(now_us)
        self._now_us = now_us
        self._alone_until_us = 0

    @classmethod
    def open(cls, folder: Path | None) -> Counters:
        """The counters of this process. Without a folder they are its own."""
        if folder is None:
            return cls()
        try:
            return cls(SharedTable(folder, monotonic_us))
        except (lmdb.Error, OSError) as error:
            log.error("counters in %s: %s; this process counts for itself", folder, error)
            return cls()

    @property
    def base_exceptions(self) -> type[Exception]:
        return lmdb.Error

    def wait_us(self, key: str, limit: int, expiry: int, cost: int) -> int:
        """How long until `cost` more are within `limit`, if nobody else counts meanwhile."""
        place = Key.of(key, expiry)

        def look(window: Window, now_us: int) -> tuple[Window, int]:
            return window, window.wait_us(now_us, place.period_us, limit, cost)

        return self._change(place, look)

    def count(self, key: str, expiry: int) -> int:
        """How many count now, rounded down."""
        place = Key.of(key, expiry)

        def look(window: Window, now_us: int) -> tuple[Window, int]:
            return window, window.weight(now_us, place.period_us)

        return self._change(place, look)

    def charge(self, key: str, expiry: int, amount: int) -> int:
        """Count so many, whatever the limit; a negative amount is given back."""

        def add(window: Window, _now_us: int) -> tuple[Window, int]:
            window = window.add(amount)
            return window, window.current

        return self._change(Key.of(key, expiry), add)

    # --- what the strategies of the package call

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        place = Key.of(key, expiry)

        def take(window: Window, now_us: int) -> tuple[Window, bool]:
            if window.weight(now_us, place.period_us) + amount > limit:
                return window, False
            return window.add(amount), True

        return self._change(place, take)

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        place = Key.of(key, expiry)

        def look(window: Window, now_us: int) -> tuple[Window, tuple[int, float, int, float]]:
            left_s = window.previous_left_us(now_us, place.period_us) / SECOND_US
            return window, (window.previous, left_s, window.current, left_s + expiry)

        return self._change(place, look)

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._change(Key.of(key, expiry), lambda _window, now_us: (Window(now_us, 0, 0), None))

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        return self.charge(key, expiry, amount)

    def check(self) -> bool:
        """Whether the shared table is in use."""
        return self._shared is not None and self._now_us() >= self._alone_until_us

    # A key alone does not say which window is meant, and no strategy in use here asks.

    def get(self, key: str) -> int:
        raise NotImplementedError

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError

    def reset(self) -> int | None:
        raise NotImplementedError

    def clear(self, key: str) -> None:
        raise NotImplementedError

    def _change(self, key: Key, step: Step[T]) -> T:
        if self._shared is not None and self._now_us() >= self._alone_until_us:
            try:
                return self._shared.change(key, step)
            except (lmdb.Error, struct.error) as error:
                self._alone_until_us = self._now_us() + RETRY_US
                log.error("shared counters: %s; this process counts for itself", error)
        return self._own.change(key, step)
