"""Retention policies: how long a file is kept. Pure: no clock, no catalog.

days:N   hours:N   until:RFC3339   forever
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import final

import msgspec

from cas.errors import InvalidRetention

_HOUR_US = 3600 * 1_000_000
_COUNT = re.compile(r"(days|hours):([0-9]{1,7})", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The last moment a datetime can name: a policy beyond it could not be shown to anybody.
_LAST_US = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp()) * 1_000_000


@final
class Retention(msgspec.Struct, frozen=True):
    """A parsed policy: `hours` after storing, or the moment `until_us`, or neither (forever)."""

    text: str
    hours: int | None = None
    until_us: int | None = None

    def expires_at(self, stored_at_us: int) -> int | None:
        """When a file stored at `stored_at_us` expires, in µs since 1970; None is never."""
        if self.hours is not None:
            return min(stored_at_us + self.hours * _HOUR_US, _LAST_US)
        return self.until_us


FOREVER = Retention("forever")


def parse_retention(text: str) -> Retention:
    """Read a policy; raises InvalidRetention with the reason."""
    if text == "forever":
        return FOREVER
    if match := _COUNT.fullmatch(text):
        unit, count = match[1], int(match[2])
        if count == 0:
            raise InvalidRetention(text, "must keep for at least 1")
        return Retention(text, hours=count * 24 if unit == "days" else count)
    if text.startswith("until:"):
        try:
            moment = datetime.fromisoformat(text.removeprefix("until:"))
        except ValueError:
            raise InvalidRetention(text, "not an RFC 3339 time after 'until:'") from None
        if moment.tzinfo is None:
            raise InvalidRetention(text, "a time needs its offset, as in 2030-01-01T00:00:00Z")
        # Whole numbers throughout: a float of this size is off by microseconds.
        until_us = (moment - _EPOCH) // timedelta(microseconds=1)
        if not 0 <= until_us <= _LAST_US:
            raise InvalidRetention(text, "a time is between 1970 and 9999")
        return Retention(text, until_us=until_us)
    raise InvalidRetention(text, "use days:N, hours:N, until:RFC3339 or forever")


def longer(one: int | None, other: int | None) -> int | None:
    """The later of two expiries, where None is never."""
    return None if one is None or other is None else max(one, other)
