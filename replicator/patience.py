"""Patience: when to try again, by what went wrong; and when to leave a whole target alone.

Two things are told apart. A *row* that failed waits, longer each time, while others go on.
A *target* that failed for several in a row, whoever they were, is left alone altogether (its
circuit is open): after a pause one copy is tried, and when that succeeds all go on at once.
So a dead target costs one attempt a pause, and one bad blob costs the others nothing. A target
that answers *some* requests is not dead: in a row means that none succeeded in between. Under
a storm that puts off two of three all goes slowly, and nothing stands still.

    TargetUnreachable   the row half a second, doubled up to 10 s; the target after 5 in a row
    TargetBusy          the same, and half as many copies at a time, one more after each success
    TargetRefused       the row a second, up to a minute; the target after 3 in a row, also
                        where other requests succeed: it is not one that gets better
    BytesDiffer         the row a second, up to 10 minutes; the target after 10 blobs in a row
    ObjectRefused       the row a minute, up to 6 hours: somebody has to act
    bad bytes here      the row 5 seconds, up to 10 minutes: an upload or another target heals
    anything else       the row a minute, up to an hour: a fault of ours

All waits vary by up to a third, so that what failed together does not come back together.

Within one piece of work small requests are made again at once, see `patient`: five times,
with pauses of 0.1 s, doubled, or 0.2 s where the server asks for patience.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, final

import msgspec

from cas.clock import HOUR_US, SECOND_US
from cas.errors import BlobcaskError, BlobUnavailable
from replicator.targets import (
    BytesDiffer,
    ObjectAbsent,
    ObjectRefused,
    TargetBusy,
    TargetError,
    TargetRefused,
    TargetUnreachable,
)

PAUSE_US_MAX: Final = 9 * HOUR_US  # no row waits longer, jitter included
_JITTER: Final = 1 / 3
_OPEN_S: Final = 1.0  # the first pause of a target; doubled with each more
_OPEN_S_MAX: Final = 60.0
_AT_ONCE_TRIES: Final = 5


@final
class Manner(msgspec.Struct, frozen=True):
    """How one class of errors is met."""

    first_s: float
    most_s: float
    strikes: int = 0  # so many in a row open the circuit; 0: it is the row's own trouble
    lasting: bool = False  # nothing is gained by trying it again within a minute
    passing: bool = False  # a success in between shows that the target is there
    at_once_s: float = 0  # before a small request, or a part, is sent again; 0: it is not


_MANNERS: Final[tuple[tuple[type[Exception], Manner], ...]] = (
    (TargetBusy, Manner(0.5, 10, strikes=5, passing=True, at_once_s=0.2)),
    (TargetUnreachable, Manner(0.5, 10, strikes=5, passing=True, at_once_s=0.1)),
    (TargetRefused, Manner(1, 60, strikes=3)),
    (BytesDiffer, Manner(1, 600, strikes=10, at_once_s=0.1)),
    (ObjectAbsent, Manner(1, 600)),
    (ObjectRefused, Manner(60, 6 * 3600, lasting=True)),
    (TargetError, Manner(1, 600)),
    (BlobUnavailable, Manner(5, 600, lasting=True)),
    (OSError, Manner(5, 600, lasting=True)),
    (Exception, Manner(60, 3600, lasting=True)),
)


def manner_of(error: Exception) -> Manner:
    """How `error` is met."""
    return next(manner for kind, manner in _MANNERS if isinstance(error, kind))


def again_in_s(error: Exception, tried: int) -> float | None:
    """The pause before a small request that failed now, and `tried` times before, is made
    again within the same piece of work; None: it is not."""
    manner = manner_of(error)
    if not manner.at_once_s or tried + 1 >= _AT_ONCE_TRIES:
        return None
    return manner.at_once_s * 2.0**tried * (1 + _JITTER * random.uniform(-1, 1))


def foreseen(error: Exception) -> bool:
    """Whether it is of a kind that happens; any other is a fault of ours."""
    return isinstance(error, BlobcaskError | OSError)


@final
class Patience:
    """The patience with one target. Times are seconds of a clock that only goes forward.

    For one thread. `width` is how many copies may be made at a time now; 0 while the target
    is left alone.
    """

    def __init__(
        self,
        most: int,
        *,
        jitter: Callable[[], float] = lambda: random.uniform(-1, 1),
    ) -> None:
        """`most` copies at a time; `jitter` gives numbers from -1 to 1."""
        self._most = most
        self._jitter = jitter
        self._width = most
        self._strikes = 0
        self._openings = 0  # without a success in between
        self._open_until_s = 0.0
        self._judged_from_s = 0.0  # failures of what began before say nothing new
        self._answers = 0  # when a failure was last judged
        self._passing = False  # what it is left alone for
        self.down = ""  # why the target is left alone, in words; "" while it is not

    def width(self, now_s: float) -> int:
        """How many copies may be under way at `now_s`."""
        if self.down:
            return 0 if now_s < self._open_until_s else 1
        return self._width

    def worked(self) -> None:
        """A copy was made: the target is there."""
        self._is_there()
        self._width = min(self._most, self._width + 1)

    def heard(self, answers: int) -> None:
        """`answers` requests have succeeded so far. One since the last failure shows that a
        target which was away is there again, long before a large copy is made."""
        if self.down and self._passing and answers != self._answers:
            self._is_there()

    def failed(self, error: Exception, began_s: float, now_s: float, answers: int = 0) -> None:
        """A copy that began at `began_s` failed at `now_s`; `answers` is how many requests
        have succeeded so far, of this copy or of any other."""
        manner = manner_of(error)
        if answers != self._answers and manner.passing:
            self._is_there()
        self._answers = answers
        if not manner.strikes or began_s < self._judged_from_s:
            return
        if isinstance(error, TargetBusy):
            self._width = max(1, self._width // 2)
        self._strikes += 1
        if self.down or self._strikes >= manner.strikes:
            self._passing = manner.passing
            self._open(str(error), now_s)

    def pause_us(self, error: Exception, attempts: int) -> int:
        """How long a row waits that failed now and `attempts` times before, in µs."""
        manner = manner_of(error)
        return int(self._varied(manner.first_s, manner.most_s, attempts) * SECOND_US)

    def _is_there(self) -> None:
        self._strikes = 0
        self._openings = 0
        self.down = ""

    def _open(self, reason: str, now_s: float) -> None:
        self.down = reason
        self._open_until_s = now_s + self._varied(_OPEN_S, _OPEN_S_MAX, self._openings)
        self._openings += 1
        # What is on its way was sent before: when it fails, too, that is no news.
        self._judged_from_s = now_s

    def _varied(self, first_s: float, most_s: float, doublings: int) -> float:
        pause_s = min(first_s * 2.0 ** min(doublings, 32), most_s)
        return pause_s * (1 + _JITTER * self._jitter())
