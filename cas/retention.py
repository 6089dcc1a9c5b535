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

    def term(self, now_us: int, *, believed: bool) -> Term:
        """How long a file is kept that is stored at catalog time `now_us`.

        Where the clock is not `believed`, relative policies wait for one that is
        (invariant 10).
        """
        if self.hours is not None and not believed:
            return Term(self.text, None, undated_at=now_us)
        return Term(self.text, self.expires_at(now_us))


@final
class Term(msgspec.Struct, frozen=True):
    """How long a file is kept: the policy, and when it is over (None: never).

    While `undated_at` is set, nobody knows when yet, and it is not over before `promised`:
    the expiry and the policy of an earlier term.
    """

    retention_policy: str
    expires_at: int | None
    undated_at: int | None = None
    promised: tuple[int, str] | None = None

    @property
    def for_ever(self) -> bool:
        return self.expires_at is None and self.undated_at is None

    def longer(self, other: Term) -> Term:
        """The one of the two that ends later, this one where they are equal.

        Of two that have no date the longer one, which keeps the promises of both.
        """
        if self.for_ever or other.for_ever:
            return self if self.for_ever else other
        if self.undated_at is None and other.undated_at is None:
            return self if (self.expires_at or 0) >= (other.expires_at or 0) else other
        longest = self if self._undated_hours >= other._undated_hours else other
        promises = [one for one in (self._promise, other._promise) if one is not None]
        return msgspec.structs.replace(longest, promised=max(promises, default=None))

    def dated(self, now_us: int) -> Term:
        """The term counted from `now_us`, or as promised where that is later."""
        if self.undated_at is None:
            return self
        over_at = parse_retention(self.retention_policy).expires_at(now_us)
        if self.promised is not None and over_at is not None and self.promised[0] > over_at:
            return Term(self.promised[1], self.promised[0])
        return Term(self.retention_policy, over_at)

    @property
    def _undated_hours(self) -> int:
        if self.undated_at is None:
            return 0
        return parse_retention(self.retention_policy).hours or 0

    @property
    def _promise(self) -> tuple[int, str] | None:
        if self.undated_at is not None or self.expires_at is None:
            return self.promised
        return self.expires_at, self.retention_policy


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
