"""Room: how much of the bodies that are read whole one process holds, and for whom.

Such a body lies in memory until its request is answered, and its sender says when it comes to its
end. So that a crowd of slow ones costs no more than a few, what all of them hold together has a
limit, and nobody may take more than half of it. All who have shown no token share one half, of
which an address has half: however many addresses somebody has, tenants have the other one.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Final, NamedTuple, final

from cas.errors import BlobcaskError
from cas.repeats import Repeats

log = logging.getLogger("blobcask.gateway")

BYTES_MAX: Final = 64 << 20


class NoRoom(BlobcaskError):
    """No more of a body can be held at this moment; whose others take the room is not told."""

    def __init__(self) -> None:
        super().__init__("too many large bodies come at this moment; try again")


class Holder(NamedTuple):
    """For whom something is held: a tenant, of whom a token was believed, or an address."""

    name: str
    is_believed: bool = False


@final
class Room:
    """The bytes that are held, by whose they are. Safe for threads."""

    def __init__(self, bytes_max: int = BYTES_MAX, complaints: Repeats | None = None) -> None:
        """A tenant may hold half of `bytes_max`, all addresses together the same, and one of
        them a quarter."""
        self._bytes_max = bytes_max
        self._complaints = complaints or Repeats()
        self._lock = threading.Lock()
        self._held: Counter[Holder] = Counter()
        self._strangers_bytes = 0
        self.held_bytes = 0  # of all together

    def take(self, whose: Holder, count: int) -> None:
        """Hold so many more bytes; raises NoRoom, and takes none."""
        with self._lock:
            if not self._has_room(whose, count):
                self._complain(whose)
                raise NoRoom
            self._count(whose, count)

    def give_back(self, whose: Holder, count: int) -> None:
        """So many of its bytes are held no more."""
        with self._lock:
            self._count(whose, -count)

    def _has_room(self, whose: Holder, count: int) -> bool:
        half_bytes = self._bytes_max // 2
        if self.held_bytes + count > self._bytes_max:
            return False
        if whose.is_believed:
            return self._held[whose] + count <= half_bytes
        return (
            self._strangers_bytes + count <= half_bytes
            and self._held[whose] + count <= half_bytes // 2
        )

    def _count(self, whose: Holder, count: int) -> None:
        self.held_bytes += count
        self._strangers_bytes += 0 if whose.is_believed else count
        self._held[whose] += count
        if not self._held[whose]:
            del self._held[whose]

    def _complain(self, whose: Holder) -> None:
        # One line a minute, whoever asks for more: it must not fill the log too.
        if count := self._complaints.note("no room"):
            log.warning(
                "no room for more of the body of %r: %d of %d bytes are held, %d for addresses; "
                "%d bodies were refused since the last such line",
                whose.name, self.held_bytes, self._bytes_max, self._strangers_bytes, count,
            )  # fmt: skip
