"""Which addresses may be called, in every disguise that an address can wear."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.destinations import (
    CheckedNetwork,
    ForbiddenDestination,
    UnknownName,
    admitted,
    is_public,
)
from replicator.names import (
    QUESTIONS_MAX,
    TENANT_QUESTIONS_MAX,
    Names,
    TooManyQuestions,
    ask_system,
    asking_for,
)

INSIDE = (
    "127.0.0.1 127.255.255.254 0.0.0.0 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 "
    "169.254.169.254 169.254.0.1 100.64.0.1 100.100.100.200 192.0.0.8 192.0.0.9 192.0.2.1 "
    "192.88.99.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1 "
    "255.255.255.255 168.63.129.16 "
    ":: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 "
    "fe80::1 fe80::1%1 fec0::1 fc00::1 fd00:ec2::254 ff02::1 ff0e::1 100::1 2001:db8::1 "
    "2001:2::1 2001:10::1 2001:20::1 3fff::1 5f00::1 "
    "2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe::1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe "
    "64:ff9b:1::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:0:7f00:1::"
).split()
OUTSIDE = (
    "8.8.8.8 1.1.1.1 172.15.255.255 172.32.0.1 100.63.255.255 100.128.0.1 192.0.1.1 "
    "2001:4860:4860::8888 2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::808:808 "
    "2002:808:808::1"
).split()


@pytest.mark.parametrize("text", INSIDE)
def test_an_inside_address_is_refused_however_it_is_written(text: str) -> None:
    assert not is_public(ip_address(text))
    with pytest.raises(ForbiddenDestination):
        admitted("name.test", [text])


@pytest.mark.parametrize("text", OUTSIDE)
def test_a_public_address_may_be_called(text: str) -> None:
    assert is_public(ip_address(text))
    assert admitted("name.test", [text]) == [text]


@given(st.ip_addresses(v=4))
def test_no_wrapping_makes_an_address_public(address: object) -> None:
    number = int(address)  # type: ignore[call-overload]
    inner = ip_address(number)
    assert is_public(ip_address((0xFFFF << 32) + number)) == is_public(inner)
    assert is_public(ip_address((0x64FF9B << 96) + number)) == is_public(inner)
    assert is_public(ip_address((0x2002 << 112) + (number << 80))) == is_public(inner)
    assert not is_public(ip_address(number)) or not inner.is_private


def test_one_inside_address_among_public_ones_refuses_the_name() -> None:
    with pytest.raises(ForbiddenDestination) as refused:
        admitted("name.test", ["8.8.8.8", "10.0.0.7"])
    assert refused.value.address == "10.0.0.7"
    # The tenant reads this, and must not learn what inside names resolve to.
    assert "10.0.0.7" not in str(refused.value)


def test_an_allowed_network_opens_itself_and_nothing_else() -> None:
    allowed = (ip_network("10.1.0.0/16"), ip_network("fd00::/8"))
    for text in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203", "fd00::1"):
        assert admitted("name.test", [text], allowed) == [text]
    for text in ("10.2.0.1", "127.0.0.1", "::1", "fe80::1"):
        with pytest.raises(ForbiddenDestination):
            admitted("name.test", [text], allowed)


# --- forms that only the resolver of the system understands


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "0", "localhost"],
)
def test_the_other_forms_of_an_inside_address_are_resolved_and_refused(host: str) -> None:
    with pytest.raises(ForbiddenDestination):
        admitted(host, ask_system(host, 80))


# --- connecting


def connected(network: CheckedNetwork, host: str, port: int = 9) -> None:
    async def connect() -> None:
        stream = await network.connect_tcp(host, port, timeout=5)
        await stream.aclose()

    asyncio.run(connect())


def test_a_name_is_asked_for_once_and_the_second_answer_changes_nothing() -> None:
    asked: list[str] = []

    async def rebinding(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) > 1 else ["8.8.8.8"]

    reached: list[str] = []

    class Watched(CheckedNetwork):  # type: ignore[misc]  # final, but for this look inside
        async def _connect(self, address: str, *_rest: object) -> None:  # type: ignore[override]
            reached.append(address)

    asyncio.run(Watched(rebinding).connect_tcp("evil.test", 80))
    assert reached == ["8.8.8.8"]
    with pytest.raises(ForbiddenDestination):
        connected(Watched(rebinding), "evil.test")
    assert reached == ["8.8.8.8"]
    assert asked == ["evil.test"] * 2


def test_a_name_without_addresses_is_said_to_have_none() -> None:
    async def nothing(_host: str, _port: int) -> Sequence[str]:
        return []

    with pytest.raises(UnknownName):
        connected(CheckedNetwork(nothing), "nobody.test")


def test_a_socket_in_the_filesystem_is_no_destination() -> None:
    async def nothing(_host: str, _port: int) -> Sequence[str]:
        return []

    with pytest.raises(ForbiddenDestination):
        asyncio.run(CheckedNetwork(nothing).connect_unix_socket("/run/docker.sock"))


# --- names


def test_a_name_that_nobody_knows_is_told_with_its_reason() -> None:
    def ask(_host: str, _port: int) -> list[str]:
        raise OSError(-2, "Name or service not known")

    with pytest.raises(UnknownName, match="Name or service not known"):
        asyncio.run(Names(ask).resolve("nobody.test", 80))


def test_an_impossible_name_is_no_crash() -> None:
    with pytest.raises(UnknownName):
        asyncio.run(Names(ask_system).resolve("a" * 300 + ".test", 80))


def test_hanging_questions_are_bounded_for_each_tenant_and_nobody_waits_for_them() -> None:
    release = threading.Event()

    def hang(_host: str, _port: int) -> list[str]:
        assert release.wait(60)
        return ["8.8.8.8"]

    async def ask_all(tenant_id: str, questions: int) -> None:
        asking_for.set(tenant_id)
        for _ in range(questions):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await names.resolve("slow.test", 80)
        with pytest.raises(TooManyQuestions):
            await names.resolve("slow.test", 80)

    async def story() -> None:
        for number in range(QUESTIONS_MAX // TENANT_QUESTIONS_MAX):
            await asyncio.create_task(ask_all(f"t{number}", TENANT_QUESTIONS_MAX))
        await asyncio.create_task(ask_all("one more", 0))
        release.set()
        while True:  # the places come back as the questions end
            with suppress(TooManyQuestions):
                assert await names.resolve("slow.test", 80) == ["8.8.8.8"]
                break
            await asyncio.sleep(0)

    names = Names(hang)
    asyncio.run(story())
