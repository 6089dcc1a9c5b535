"""Room: how much of the bodies that are read whole one process holds, and for whom.

Such a body lies in memory until its request is answered, and its sender says when it comes to its
end. So that a crowd of slow ones costs no more than a few, what all of them hold together has a
limit, and nobody may take more than half of it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable
from typing import Final, final

from cas.errors import BlobcaskError

BYTES_MAX: Final = 64 << 20


class NoRoom(BlobcaskError):
    """No more of a body can be held at this moment; whose others take the room is not told."""

    def __init__(self) -> None:
        super().__init__("too many large bodies come at this moment; try again")


@final
class Room:
    """The bytes that are held, by whose they are. Safe for threads."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        """One may hold half of `bytes_max`."""
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._held: Counter[Hashable] = Counter()
        self.held_bytes = 0  # of all together

    def take(self, whose: Hashable, count: int) -> None:
        """Hold so many more bytes; raises NoRoom, and takes none."""
        with self._lock:
            if (
                self.held_bytes + count > self._bytes_max
                or self._held[whose] + count > self._bytes_max // 2
            ):
                raise NoRoom
            self.held_bytes += count
            self._held[whose] += count

    def give_back(self, whose: Hashable, count: int) -> None:
        """So many of its bytes are held no more."""
        with self._lock:
            self.held_bytes -= count
            self._held[whose] -= count
            if not self._held[whose]:
                del self._held[whose]
