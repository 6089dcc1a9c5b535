"""Room: how much of the bodies that are read whole one process holds, and for whom.

Such a body lies in memory until its request is answered, and its sender says when it comes to its
end. So that a crowd of slow ones costs no more than a few, what all of them hold together has a
limit, and nobody may take more than half of it. All who have shown no token share one half, of
which an address has half: however many addresses somebody has, tenants have the other one.

Strangers who may send (the calls of webhooks) and those who only fill the room look alike, but the
former come to their end. So where strangers, or one of their addresses, have all that they may
have, the body of theirs that has been arriving for longest gives way to the next. A tenant at its
half is refused: its crowd is its own, and of slow ones that end each other none would arrive. Where
everything is taken, who holds most gives way to who holds less; all strangers are one of these.
What has come whole stays until it is answered.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple, final

from cas.errors import BlobcaskError
from cas.repeats import Repeats
from gateway.pool import outside_slot

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
class Place:
    """What one body takes of a room; the room alone changes it."""

    def __init__(self, whose: Holder, end: Callable[[], None]) -> None:
        """`end` has the body end soon, which gives the place back then; it neither waits nor
        raises, and is called in any thread, but only while the place is taken."""
        self.whose = whose
        self.end = end
        self.size_bytes = 0
        # Where it was told to give way: set when it has, or need not any more.
        self.left: threading.Event | None = None
        self.awaited_bytes = 0  # what those take that wait for it to leave


@final
class Room:
    """The bytes that are held, by whose they are. Safe for threads."""

    def __init__(self, bytes_max: int = BYTES_MAX, complaints: Repeats | None = None) -> None:
        """A tenant may hold half of `bytes_max`, all addresses together the same, and one of
        them a quarter."""
        self._bytes_max = bytes_max
        self._complaints = complaints or Repeats()
        self._lock = threading.Lock()
        self._held: Counter[Holder | None] = Counter()  # None: by all addresses together
        # That have not come whole, the one that has been arriving for longest first.
        self._arriving: dict[Place, None] = {}
        self.held_bytes = 0  # of all together

    def take(self, place: Place, count: int) -> None:
        """Hold so many more bytes of this body; raises NoRoom, and takes none. Waits, outside
        the working slot, for the end of others that give way to it."""
        while (left := self._take_or_wait(place, count)) is not None:
            with outside_slot():  # the other one's thread may need it, to leave
                left.wait()

    def keep(self, place: Place) -> None:
        """All of this body has come: it does not give way any more, though its `end` may have
        been called before."""
        with self._lock:
            self._settle(place)

    def give_back(self, place: Place) -> None:
        """This body is held no more."""
        with self._lock:
            self._count(place, -place.size_bytes)
            self._settle(place)

    def _take_or_wait(self, place: Place, count: int) -> threading.Event | None:
        """None where the bytes are taken; else what is set when there may be room for them."""
        with self._lock:
            whose = self._full_with(place.whose, count)
            if whose is None:
                self._count(place, count)
                self._arriving[place] = None
                return None
            left, told = None, None
            if place.left is None:  # else it waits for nobody: so no two wait for each other
                left, told = self._make_way(place, count, whose)
            held_bytes, strangers_bytes = self.held_bytes, self._held[None]
        # Outside the lock: where nobody reads the log, all others must go on.
        if told is not None:
            why, what = "others need the room of", "gave way"
            self._complain(why, what, told, held_bytes, strangers_bytes)
        elif left is None:
            why, what = "there is no room for more of", "were refused"
            self._complain(why, what, place, held_bytes, strangers_bytes)
            raise NoRoom
        return left

    def _full_with(self, whose: Holder, count: int) -> Callable[[Holder], bool] | None:
        """Whose bodies may give way to so many more bytes of this one; None where there is room
        for them."""
        half_bytes = self._bytes_max // 2
        party = _party(whose)
        wanted_bytes = self._held[party] + count
        if whose.is_believed and wanted_bytes > half_bytes:
            return lambda _other: False
        if not whose.is_believed and self._held[whose] + count > half_bytes // 2:
            return lambda other: other == whose
        if wanted_bytes > half_bytes:
            return lambda other: not other.is_believed
        if self.held_bytes + count <= self._bytes_max:
            return None
        parties = {_party(other.whose) for other in self._arriving}
        most = max(parties, key=self._held.__getitem__, default=party)
        if self._held[most] <= wanted_bytes:
            most = party
        if most == whose:  # a tenant's own: see above
            return lambda _other: False
        return lambda other: _party(other) == most

    def _make_way(
        self, place: Place, count: int, whose: Callable[[Holder], bool]
    ) -> tuple[threading.Event | None, Place | None]:
        """Find a body that leaves, with enough for all who wait for it, or else have the one
        end that has been arriving for longest. Its `left`, and itself where it is told only
        now; no `left` where it would be this one itself, and nobody is about to leave."""
        left = None
        for other in self._arriving:
            if not whose(other.whose):
                continue
            if other is place:
                break
            told = None
            if other.left is None:
                other.left, told = threading.Event(), other
                other.end()
            left = other.left
            if told or other.awaited_bytes + count <= other.size_bytes:
                other.awaited_bytes += count
                return left, told
        return left, None

    def _settle(self, place: Place) -> None:
        """It gives way no more."""
        self._arriving.pop(place, None)
        left, place.left, place.awaited_bytes = place.left, None, 0
        if left is not None:
            left.set()

    def _count(self, place: Place, count: int) -> None:
        place.size_bytes += count
        self.held_bytes += count
        for whose in {place.whose, _party(place.whose)}:
            self._held[whose] += count
            if not self._held[whose]:
                del self._held[whose]

    def _complain(
        self, why: str, what: str, place: Place, held_bytes: int, strangers_bytes: int
    ) -> None:
        # One line a minute, whoever asks for more: it must not fill the log too.
        if count := self._complaints.note(what):
            log.warning(
                "%s the body of %r: %d of %d bytes are held, %d for addresses; "
                "%d bodies %s since the last such line",
                why, place.whose.name, held_bytes, self._bytes_max, strangers_bytes,
                count, what,
            )  # fmt: skip


def _party(whose: Holder) -> Holder | None:
    """With whom it has a share of the whole: a tenant for itself, all strangers together."""
    return whose if whose.is_believed else None
