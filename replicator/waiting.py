"""Waiting: the rows of one target that wait for a place, as many as memory should hold.

The catalog keeps the queue, in the order in which rows are due; this reads it from the first
to the last and then from the first again, a bounded piece at a time. Whatever stands in the
way is passed: rows that are taken already, those of blobs that are about to go, and large
ones where enough of them wait here. So nothing waits because of what others wait for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Set
from typing import Final, final

import msgspec

from cas.catalog import Key, Snapshot
from cas.digest import Digest
from cas.records import COPYING, DELETING, Blob, Copy, Replica
from cas.replicas import due, next_due_us

_PAGE: Final = 256  # rows looked at, at once, and taken: some 5 ms of a thread
_LOOK_ROWS: Final = 1024  # of a look where most are passed
_LARGE_MAX: Final = 1024  # that wait here
_ENDS_MAX: Final = 600  # looks at the end of the queue, a minute's worth


@final
class Item(msgspec.Struct, frozen=True):
    """A row to work at, with what the same snapshot tells of its blob."""

    row: Replica
    here: bool  # the bytes are here, and not only at other targets
    unfinished: Copy | None


@final
class Look(msgspec.Struct, frozen=True):
    """What one look at the queue found."""

    items: list[Item]
    after: Key  # the row that was looked at last
    ended: bool  # it was the last one that is due
    passed: bool  # large ones were passed, for which there was no room
    next_us: int | None  # where nothing is due at all: when the first row will be


def item_of(snapshot: Snapshot, row: Replica) -> Item | None:
    """None where the blob of the row is about to go, and the row with it."""
    blob = snapshot.get(Blob, row.digest)
    if blob is None or blob.state == DELETING:
        return None
    unfinished = None
    if row.state == COPYING:
        unfinished = snapshot.get(Copy, row.target, row.digest)
    return Item(row, blob.local, unfinished)


@final
class Waiting:
    """The items that wait for a place: `small` and `large` ones, each longest due first.

    Changed by the event loop's thread only; `look` changes nothing, and may run in another.
    """

    def __init__(self, target: str, is_large: Callable[[Item], bool]) -> None:
        self._target = target
        self._is_large = is_large
        self.small: deque[Item] = deque()
        self.large: deque[Item] = deque()
        self._digests: set[Digest] = set()  # those in both
        self._after: Key = ()  # where the next look goes on
        self._passed = False  # large ones, since the first row was looked at
        self._found = False  # anything, since then
        self._ends = 0  # how often the last row was looked at, since then
        self.dry = False  # from the first row to the last, there was nothing to take
        self.next_us: int | None = None  # where nothing is due: when the first row will be

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def look(self, snapshot: Snapshot, now_us: int, working: Set[Digest]) -> Look:
        """Read on in the queue, some rows; `working` are those that nobody needs here."""
        taken, room = self._digests | working, _LARGE_MAX - len(self.large)
        after = self._after
        items: list[Item] = []
        ended = passed = False
        for _ in range(_LOOK_ROWS // _PAGE):
            rows = due(snapshot, self._target, now_us, _PAGE, after=after)
            for row in rows:
                if row.digest in taken or (item := item_of(snapshot, row)) is None:
                    continue
                if self._is_large(item):
                    if room <= 0:
                        passed = True
                        continue
                    room -= 1
                items.append(item)
            after = (rows[-1].next_attempt_at, rows[-1].digest) if rows else after
            ended = len(rows) < _PAGE
            if ended or len(items) >= _PAGE:
                break
        next_us = None if after else next_due_us(snapshot, self._target)
        return Look(items, after, ended, passed, next_us)

    def add(self, found: Look, working: Set[Digest]) -> None:
        """Have what was found wait; `working` are those that were begun meanwhile."""
        for item in found.items:
            digest = item.row.digest
            if digest in self._digests or digest in working:
                continue
            self._digests.add(digest)
            (self.large if self._is_large(item) else self.small).append(item)
        self._found = self._found or bool(found.items)
        self._passed = self._passed or found.passed
        self._after, self.next_us = found.after, found.next_us
        self.dry = found.ended and not self._found
        # What comes new is due last, so where large ones were passed, for which there is no
        # room yet, the end is the place to look at; but not where catalog time stands still.
        if found.ended:
            self._ends += 1
            if not self._passed or len(self.large) <= _LARGE_MAX // 2 or self._ends >= _ENDS_MAX:
                self._after, self._passed, self._found, self._ends = (), False, False, 0

    def next_small(self) -> Item:
        return self._gone(self.small.popleft())

    def next_large(self) -> Item:
        return self._gone(self.large.popleft())

    def _gone(self, item: Item) -> Item:
        self._digests.discard(item.row.digest)
        return item
