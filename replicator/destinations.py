"""Which addresses a callback may go to: whoever asks for an upload names its URL.

A name is resolved once for each attempt. Every address that it has must be admitted, and
the connection goes to exactly such an address, so that a name which answers differently a
moment later changes nothing. TLS still asks for a certificate of the name.

Admitted are public unicast addresses, and the networks of `[callbacks] allowed_networks`.
An IPv6 address that only wraps an IPv4 one is judged as that one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, final

import httpcore

from cas.config import Networks

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # host, port → addresses as text

# What `ipaddress` takes for global, and nobody should be called at.
_NEVER_V4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "192.0.0.0/24",  # protocol assignments
            "192.88.99.0/24",  # once the relays of 6to4
            "168.63.129.16/32",  # Azure's own services, as each machine there sees them
        ),
    )
)
_NEVER_V6: Final = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
# All public unicast is assigned from here; what Python calls global beyond it (site-local,
# IPv4-compatible, multicast) is not.
_UNICAST_V6: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


class ForbiddenDestination(Exception):
    """A name with an address that is not admitted.

    The text is for the tenant, and hence does not tell what an inside name resolves to;
    `address` is for the operator.
    """

    def __init__(self, host: str, address: str) -> None:
        super().__init__(f"the address of {host} is not a public one")
        self.host = host
        self.address = address


class UnknownName(Exception):
    """A name that has no address, as far as can be found out now."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(f"{host} has no address: {reason}")
        self.host = host


def effective(address: Address) -> Address:
    """The address that packets for `address` end at: what an IPv6 wrapping holds."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    # A zone picks one of this machine's links: what it names is near, and never public.
    address = ipaddress.IPv6Address(int(address))
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether `address` belongs to some host of the public internet."""
    if isinstance(address, ipaddress.IPv6Address) and address.teredo is not None:
        return False  # its packets go to a relay, wherever that is
    address = effective(address)
    if isinstance(address, ipaddress.IPv4Address):
        never = address.is_multicast or any(address in network for network in _NEVER_V4)
    else:
        never = address not in _UNICAST_V6 or any(address in network for network in _NEVER_V6)
    return address.is_global and not never


def admitted(host: str, found: Iterable[str], allowed: Networks = ()) -> list[str]:
    """`found` as it is, when every address in it may be called.

    Raises ForbiddenDestination: a name that leads outside and inside is no receiver's.
    """
    addresses = list(found)
    for text in addresses:
        address = ipaddress.ip_address(text)
        if not is_public(address) and not _is_allowed(effective(address), allowed):
            raise ForbiddenDestination(host, text)
    return addresses


def _is_allowed(address: Address, allowed: Networks) -> bool:
    return any(address in network for network in allowed)


@final
class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to admitted addresses only. All that httpcore sends goes through here."""

    def __init__(self, resolve: Resolve, allowed: Networks = ()) -> None:
        self._resolve = resolve
        self._allowed = allowed
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises UnknownName, ForbiddenDestination, httpcore.ConnectError, ConnectTimeout."""
        addresses = admitted(host, await self._resolve(host.strip("[]"), port), self._allowed)
        if not addresses:
            raise UnknownName(host, "none was found")
        # One after the other, with a fair share of the time each: of two networks that a
        # machine is on, one may lead nowhere.
        share = None if timeout is None else timeout / len(addresses)
        for address in addresses[:-1]:
            try:
                return await self._connect(address, port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._connect(addresses[-1], port, share, local_address, socket_options)

    async def _connect(
        self,
        address: str,
        port: int,
        timeout_s: float | None,
        local_address: str | None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None,
    ) -> httpcore.AsyncNetworkStream:
        return await self._network.connect_tcp(
            address, port, timeout_s, local_address, socket_options
        )

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Refused: a receiver is somewhere on the network."""
        raise ForbiddenDestination(path, path)

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)
