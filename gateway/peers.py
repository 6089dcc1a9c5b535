"""How many connections each peer has to this process, so that one leaves the others theirs.

Counted by network, as in `gateway.limits`. Trusted proxies speak for many, and who may open
a Unix socket is trusted: neither is counted.
"""

from __future__ import annotations

from typing import Any, final

from cas.config import Networks
from gateway.addresses import client_address, within
from gateway.limits import network_of


@final
class Peers:
    """The connections of one process, by whose they are. For one thread."""

    def __init__(self, most: int, proxies: Networks) -> None:
        """A peer may have `most`; 0 is no limit."""
        self._most = most
        self._proxies = proxies
        self._counts: dict[str, int] = {}

    def whose(self, address: Any) -> str | None:
        """Whom a connection from `address`, as accept(2) tells it, counts for; None: nobody."""
        if not self._most or not isinstance(address, tuple):
            return None
        peer = client_address({"REMOTE_ADDR": address[0]}, ())
        return None if peer is None or within(peer, self._proxies) else network_of(peer)

    def full(self, whose: str | None) -> bool:
        """Whether there may be no further one."""
        return whose is not None and self._counts.get(whose, 0) >= self._most

    def enter(self, whose: str | None) -> None:
        """There is one more."""
        if whose is not None:
            self._counts[whose] = self._counts.get(whose, 0) + 1

    def leave(self, whose: str | None) -> None:
        """One has ended."""
        if whose is not None:
            left = self._counts.pop(whose) - 1
            if left:
                self._counts[whose] = left
