"""Who is at the other end of a request: the peer, or whom a trusted proxy names."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, final

from cas.config import Networks

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def client_address(environ: Mapping[str, Any], proxies: Networks) -> Address | None:
    """The client of a request; None where nobody says (a Unix socket without a proxy).

    X-Forwarded-For is read from its end, for as long as those who wrote it are trusted
    (`proxies`): what stands before the first stranger, that stranger may have made up. Who
    may open a Unix socket is trusted.
    """
    peer = environ.get("REMOTE_ADDR") or ""
    hops = [hop.strip() for hop in str(environ.get("HTTP_X_FORWARDED_FOR", "")).split(",")]
    address = _parse(peer)
    if address is not None and not within(address, proxies):
        return address
    for hop in reversed(hops):
        named = _parse(hop)
        if named is None:
            return address
        address = named
        if not within(address, proxies):
            return address
    return address


@final
class Watchers:
    """Those who watch the server: only they are told how it is inside."""

    _FORWARDED: Final = ("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED", "HTTP_VIA")

    def __init__(self, networks: Networks, proxies: Networks) -> None:
        self._networks = networks
        self._proxies = proxies

    def include(self, environ: Mapping[str, Any]) -> bool:
        """Whether who sent this request is one of them."""
        peer = _parse(environ.get("REMOTE_ADDR") or "")
        forwarded = any(name in environ for name in self._FORWARDED)
        if forwarded and not (peer and within(peer, self._proxies)):
            # From a proxy that nobody has told us of: its own address says nothing.
            return False
        address = client_address(environ, self._proxies)
        return address is not None and within(address, self._networks)


def within(address: Address, networks: Networks) -> bool:
    """Whether an address is in any of the networks."""
    return any(address in network for network in networks)


@lru_cache(4096)  # parsing costs more than all else that is done with an address
def _parse(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # ::ffff:10.0.0.7 is 10.0.0.7 that came to a socket for both families.
    return getattr(address, "ipv4_mapped", None) or address
