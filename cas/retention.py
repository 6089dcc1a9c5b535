"""Retention policies: how long a file is kept. Pure: no clock, no catalog.

days:N   hours:N   until:RFC3339   forever
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import final

import msgspec

from cas.clock import parse_rfc3339
from cas.errors import InvalidRetention

_HOUR_US = 3600 * 1_000_000
_COUNT = re.compile(r"(days|hours):([0-9]{1,7})", re.ASCII)
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
            until_us = parse_rfc3339(text.removeprefix("until:"))
        except ValueError as error:
            reason = f"not an RFC 3339 time after 'until:': {error}"
            raise InvalidRetention(text, reason) from None
        if not 0 <= until_us <= _LAST_US:
            raise InvalidRetention(text, "a time is between 1970 and 9999")
        return Retention(text, until_us=until_us)
    raise InvalidRetention(text, "use days:N, hours:N, until:RFC3339 or forever")


def longer(one: int | None, other: int | None) -> int | None:
    """The later of two expiries, where None is never."""
    return None if one is None or other is None else max(one, other)
