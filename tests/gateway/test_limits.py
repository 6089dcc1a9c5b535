"""Limits over HTTP: exact across workers, blind to spoofing, and honest about when again."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import signal
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cas.clock import DAY_US, SECOND_US, SystemClock
from cas.config import LimitSettings, Rate, Settings, StoreSettings
from cas.errors import TooLarge
from cas.keys import load_keys
from gateway.auth import ADMIN, Tokens
from gateway.counters import Counters
from gateway.errors import TooManyRequests
from gateway.limits import STEP_BYTES, Guesses, Limit, Tally, network_of
from gateway.uploads import REQUEST_BYTES_MAX
from tests.clocks import HandClock
from tests.gateway.served import Answer, Served, serving, until

MIB = 1 << 20
REQUESTS = 40
GUESSES = 5
KIB = 1024

_numbers = count(1)


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    """Behind a proxy that is trusted, so that each test may come from addresses of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(
            Path(folder),
            GATEWAY__WORKERS="2",
            GATEWAY__TRUSTED_PROXIES="127.0.0.1",
            LIMITS__ADDRESS_REQUESTS=f"{REQUESTS}/d",
            LIMITS__TENANT_REQUESTS=f"{2 * REQUESTS}/d",
            LIMITS__GUESSES=f"{GUESSES}/d",
            LIMITS__ADDRESS_BYTES="2MiB/d",
            LIMITS__TENANT_BYTES="3MiB/d",
            LIMITS__LINK_BYTES="1MiB/d",
            LIMITS__QUOTA_FILES="4",
        ) as server,
    ):
        yield server


def fresh() -> str:
    """An address that nobody has used."""
    return str(ipaddress.IPv4Address("10.0.0.0") + next(_numbers))


def ask(
    served: Served, method: str, url: str, body: Any = None, *, at: str = "", **wanted: Any
) -> Answer:
    """One request through the proxy, from an address of its own unless it is told."""
    headers = {"X-Forwarded-For": at or fresh(), **wanted.pop("headers", {})}
    return served.ask(method, url, body, headers=headers, **wanted)


def tenant(served: Served, name: str) -> str:
    """A token of a tenant, which nobody else uses."""
    keys = load_keys(Settings(store=StoreSettings(root=served.root)))
    return Tokens(keys.jwt, SystemClock().now_us).issue(name, "test", (ADMIN,), 3600)


def asked(served: Served, token: str, **wanted: Any) -> dict[str, Any]:
    """A fresh upload of the tenant."""
    body = json.dumps({"name": "documents", **wanted})
    answer = ask(served, "POST", "/api/v1/uploads", body, token=token)
    assert answer.status == 201, answer.body
    return answer.form


def slot(served: Served, token: str) -> str:
    """The URL of one slot, with a filename."""
    return f"{asked(served, token)['presigned_urls'][0]}&filename=a.bin"


def refused(answer: Answer, what: str) -> bool:
    """Whether it is a 429 of this kind, whole and honest; any other refusal fails."""
    if answer.status != 429:
        return False
    assert answer.code == "too_many_requests"
    assert answer.form["what"] == what
    assert answer.form["retry_after_s"] == int(answer.headers["retry-after"]) >= 1
    return True


def whole(connection: socket.socket) -> bytes:
    """All that is answered until the connection is closed."""
    received = b""
    while data := connection.recv(4096):
        received += data
    return received


# --- requests


def test_an_address_has_exactly_its_requests_over_all_workers(served: Served) -> None:
    address = fresh()
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(
                lambda _: ask(served, "GET", "/api/v1/storage", at=address),
                range(REQUESTS + 10),
            )
        )
    assert Counter(answer.status for answer in answers) == {401: REQUESTS, 429: 10}
    assert all(refused(answer, "requests") for answer in answers if answer.status == 429)
    assert ask(served, "GET", "/api/v1/storage").status == 401


def test_a_tenant_has_exactly_its_requests_from_wherever(served: Served) -> None:
    token = tenant(served, "busy")
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(
                lambda _: ask(served, "GET", "/api/v1/storage", token=token),
                range(2 * REQUESTS + 5),
            )
        )
    assert Counter(answer.status for answer in answers) == {200: 2 * REQUESTS, 429: 5}
    assert all(refused(answer, "requests") for answer in answers if answer.status == 429)
    assert ask(served, "GET", "/api/v1/storage", token=tenant(served, "idle")).status == 200


def test_what_a_client_writes_before_its_own_address_changes_nothing(served: Served) -> None:
    address = fresh()
    answers = [
        ask(served, "GET", "/static/none", at=f"{fresh()}, {address}") for _ in range(REQUESTS + 1)
    ]
    assert [answer.status for answer in answers] == [404] * REQUESTS + [429]


def test_the_watchers_of_a_server_are_never_refused(served: Served) -> None:
    address = fresh()
    for _ in range(REQUESTS + 1):
        last = ask(served, "GET", "/static/none", at=address)
    assert refused(last, "requests")
    assert ask(served, "GET", "/healthz", at=address).status == 200
    # Not while a commit takes seconds on a busy disk.
    until(lambda: ask(served, "GET", "/readyz", at=address).status == 200)


def test_a_stranger_cannot_choose_the_address_that_counts(root: Path) -> None:
    with serving(root, LIMITS__ADDRESS_REQUESTS="10/d") as direct:
        answers = [ask(direct, "GET", "/static/none") for _ in range(11)]
        assert [answer.status for answer in answers] == [404] * 10 + [429]
        # It may be a proxy that nobody named: the log says so.
        direct.logged(lambda lines: any("trusted_proxies" in line for line in lines))


def test_counts_outlive_the_workers(root: Path) -> None:
    with serving(root, LIMITS__ADDRESS_REQUESTS="10/d") as mortal:
        for _ in range(6):
            assert mortal.ask("GET", "/static/none").status == 404
        before = mortal.workers()
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        answers = [mortal.ask("GET", "/static/none") for _ in range(5)]
        until(lambda: not set(before) & set(mortal.workers()))
    assert [answer.status for answer in answers] == [404] * 4 + [429]


def test_after_the_told_time_the_next_request_passes(root: Path) -> None:
    with serving(root, LIMITS__TENANT_REQUESTS="3/s") as hurried:
        for _ in range(100):
            answer = hurried.ask("GET", "/api/v1/storage", token=hurried.admin)
            if answer.status == 429:
                break
        assert refused(answer, "requests")
        assert answer.form["retry_after_s"] <= 2
        threading.Event().wait(answer.form["retry_after_s"])  # as it was told to
        assert hurried.ask("GET", "/api/v1/storage", token=hurried.admin).status == 200


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_an_ipv6_network_of_64_bits_is_one_address(address: str, network: str) -> None:
    assert network_of(ipaddress.ip_address(address)) == network


def test_those_whom_nobody_names_are_one() -> None:
    assert network_of(None) == ""


# --- guesses


def guess(served: Served, at: str) -> Answer:
    return ask(served, "GET", f"/api/v1/uploads/{next(_numbers):08}/info", at=at)


def test_an_address_that_guesses_too_often_learns_nothing_more(served: Served) -> None:
    token = asked(served, tenant(served, "guessed"))["upload_token"]
    address = fresh()
    answers = [guess(served, address) for _ in range(GUESSES + 1)]
    assert [answer.status for answer in answers] == [404] * GUESSES + [429]
    assert refused(answers[-1], "guesses")
    for path in (
        f"/api/v1/uploads/{token}/info",
        f"/api/v1/uploads/{token}/tus/",
        f"/api/v1/uploads/{token}/receipt",
    ):
        method = "OPTIONS" if path.endswith("/tus/") else "GET"
        known = ask(served, method, path, at=address)
        unknown = ask(served, method, path.replace(token, "00000000"), at=address)
        assert refused(known, "guesses")
        assert known.form | {"retry_after_s": 0, "detail": ""} == unknown.form | {
            "retry_after_s": 0,
            "detail": "",
        }
    pages = [ask(served, "GET", f"/u/{name}", at=address) for name in (token, "00000000")]
    assert [page.status for page in pages] == [429, 429]
    told = [re.sub(rb"\d+ seconds?", b"", page.body) for page in pages]
    assert told[0] == told[1]
    # The others have nothing to do with it.
    assert ask(served, "GET", f"/api/v1/uploads/{token}/info").status == 200


def test_guesses_at_the_same_time_are_counted_exactly(served: Served) -> None:
    address = fresh()
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: guess(served, address), range(4 * GUESSES)))
    assert Counter(answer.status for answer in answers) == {404: GUESSES, 429: 3 * GUESSES}


def test_a_bad_signature_is_a_guess_and_a_good_one_always_opens(served: Served) -> None:
    token = tenant(served, "signing")
    stored = ask(served, "POST", "/api/v1/storage?name=a", b"bytes", token=token).form
    path = f"/api/v1/storage/{stored['storage_ref'].partition('://')[2]}/url"
    good = ask(served, "GET", path, token=token).form["url"]
    forged = good.replace("signature=", "signature=x")
    address = fresh()
    answers = [ask(served, "GET", forged, at=address) for _ in range(GUESSES + 1)]
    assert [answer.status for answer in answers] == [404] * GUESSES + [429]
    assert ask(served, "GET", good, at=address).body == b"bytes"
    unknown = f"/api/v1/uploads/{'0' * 8}/info"
    assert refused(ask(served, "GET", unknown, at=address), "guesses")


def test_a_bad_signature_for_a_known_slot_is_a_guess(served: Served) -> None:
    url = slot(served, tenant(served, "slots")).replace("signature=", "signature=x")
    address = fresh()
    answers = [ask(served, "PUT", url, b"x", at=address) for _ in range(GUESSES + 1)]
    assert [answer.status for answer in answers] == [404] * GUESSES + [429]


def test_a_program_with_an_old_token_closes_no_page_at_its_address(served: Served) -> None:
    link = asked(served, tenant(served, "old"))["upload_token"]
    address = fresh()
    for _ in range(2 * GUESSES):
        assert ask(served, "GET", "/api/v1/storage", token="eyJ.eyJ.x", at=address).status == 401
    assert ask(served, "GET", f"/u/{link}", at=address).status == 200


def test_when_all_guess_together_those_with_a_link_go_on(root: Path) -> None:
    with serving(
        root,
        GATEWAY__TRUSTED_PROXIES="127.0.0.1",
        LIMITS__GUESSES="3/d",
        LIMITS__ALL_GUESSES="6/d",
    ) as shared:
        link = f"/api/v1/uploads/{shared.request_upload()['upload_token']}/info"
        guessers = [fresh() for _ in range(6)]
        assert [guess(shared, address).status for address in guessers] == [404] * 6
        late, honest = fresh(), fresh()
        assert refused(guess(shared, late), "guesses")
        # Who has guessed lately is looked up nothing any more, who has not goes on.
        assert refused(ask(shared, "GET", link, at=late), "guesses")
        assert refused(ask(shared, "GET", link, at=guessers[0]), "guesses")
        for _ in range(3):
            assert ask(shared, "GET", link, at=honest).status == 200


def test_guesses_are_forgiven_with_time(clock: HandClock) -> None:
    limits = LimitSettings(guesses=Rate(2, 60 * SECOND_US), all_guesses=Rate(3, 60 * SECOND_US))
    guesses = Guesses(Counters(None, clock.now_us), limits)
    guesses.note("a")
    guesses.note("a")
    with pytest.raises(TooManyRequests) as own:
        guesses.refuse("a")
    guesses.note("b")
    with pytest.raises(TooManyRequests) as together:
        guesses.note("c")
    for error in (own.value, together.value):
        assert 60 <= error.retry_after_s <= 120
    guesses.refuse("d")
    clock.advance(max(own.value.retry_after_s, together.value.retry_after_s) * SECOND_US)
    guesses.refuse("a")
    guesses.refuse("c")


@pytest.mark.parametrize("which", ["guesses", "all_guesses"])
def test_either_limit_on_guesses_works_without_the_other(clock: HandClock, which: str) -> None:
    one, none = Rate(1, 60 * SECOND_US), Rate(0, 60 * SECOND_US)
    settings = LimitSettings(
        guesses=one if which == "guesses" else none,
        all_guesses=one if which == "all_guesses" else none,
    )
    guesses = Guesses(Counters(None, clock.now_us), settings)
    guesses.note("a")
    with pytest.raises(TooManyRequests):
        guesses.refuse("a")
    if which == "guesses":
        guesses.note("b")
    else:
        with pytest.raises(TooManyRequests):
            guesses.note("b")


# --- bytes


def test_a_link_takes_its_bytes_with_those_that_were_replaced(served: Served) -> None:
    url = slot(served, tenant(served, "replaces"))
    assert ask(served, "PUT", url, bytes(500 * KIB)).status == 200
    assert ask(served, "PUT", url, bytes(500 * KIB)).status == 200
    assert refused(ask(served, "PUT", url, bytes(500 * KIB)), "bytes")
    assert ask(served, "PUT", url, bytes(24 * KIB)).status == 200


def test_a_body_that_is_not_let_pass_is_not_invited(served: Served) -> None:
    url = slot(served, tenant(served, "invited")).removeprefix(served.address)
    assert ask(served, "PUT", url, bytes(MIB)).status == 200
    with served.connect() as connection:
        head = (
            f"PUT {url} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {fresh()}\r\n"
            f"Content-Length: {KIB}\r\nExpect: 100-continue\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert whole(connection).startswith(b"HTTP/1.1 429 ")  # and not with "100 Continue"


def test_a_body_that_fits_into_no_period_is_too_large(served: Served) -> None:
    url = slot(served, tenant(served, "large"))
    answer = ask(served, "PUT", url, bytes(MIB + 1))
    assert (answer.status, answer.code) == (413, "too_large")
    assert answer.form["limit_bytes"] == MIB


def test_bytes_of_a_failed_upload_count_and_those_that_never_came_do_not(served: Served) -> None:
    url = slot(served, tenant(served, "fails")).removeprefix(served.address)
    with served.connect() as connection:
        head = f"PUT {url} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {fresh()}\r\n"
        connection.sendall(f"{head}Content-Length: {MIB}\r\n\r\n".encode() + bytes(300 * KIB))
        connection.shutdown(1)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 400
    assert refused(ask(served, "PUT", url, bytes(725 * KIB)), "bytes")
    assert ask(served, "PUT", url, bytes(724 * KIB)).status == 200


def test_a_body_of_unknown_length_ends_where_its_limit_is_reached(served: Served) -> None:
    token = tenant(served, "endless")
    before = served.objects()
    with suppress(BrokenPipeError, ConnectionResetError):  # it goes on sending
        answer = ask(
            served, "POST", "/api/v1/storage?name=a", iter([bytes(64 * KIB)] * 64), token=token
        )
        assert refused(answer, "bytes")
        assert answer.headers["connection"] == "close"
    # What others sent of the same bytes may be cleaned up only now.
    until(lambda: served.objects() <= before)
    small = ask(served, "POST", "/api/v1/storage?name=a", iter([b"x" * KIB]), token=token)
    assert small.status in (201, 429)  # how much of the endless one came is the network's


def test_what_comes_by_a_link_counts_for_its_tenant(served: Served) -> None:
    token = tenant(served, "both")
    for _ in range(2):
        assert ask(served, "PUT", slot(served, token), bytes(MIB)).status == 200
    path = "/api/v1/storage?name=a"
    assert ask(served, "POST", path, bytes(900 * KIB), token=token).status == 201
    assert refused(ask(served, "POST", path, bytes(200 * KIB), token=token), "bytes")
    told = ask(served, "PUT", slot(served, token), bytes(200 * KIB))
    assert refused(told, "bytes")
    assert "limit" not in told.form  # nor any number of the tenant's


def test_an_address_has_its_bytes_for_all_tenants_together(served: Served) -> None:
    address = fresh()
    path = "/api/v1/storage?name=a"
    for name in ("one", "two"):
        answer = ask(served, "POST", path, bytes(MIB), token=tenant(served, name), at=address)
        assert answer.status == 201
    third = ask(served, "POST", path, b"x", token=tenant(served, "three"), at=address)
    assert refused(third, "bytes")
    assert ask(served, "POST", path, b"x", token=tenant(served, "three")).status == 201


def test_concurrent_bodies_do_not_pass_together_what_one_of_them_may(served: Served) -> None:
    token = tenant(served, "crowd")
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(
                lambda number: ask(
                    served, "POST", f"/api/v1/storage?name={number}", bytes(MIB), token=token
                ),
                range(8),
            )
        )
    assert Counter(answer.status for answer in answers) == {201: 3, 429: 5}


def test_a_body_that_is_announced_and_does_not_come_leaves_a_tenant_the_rest(
    served: Served,
) -> None:
    token, path = tenant(served, "trickled"), "/api/v1/storage?name=a"
    with served.connect() as trickling:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {fresh()}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Length: {2 * MIB}\r\n"
            "Expect: 100-continue\r\n\r\n"
        )
        trickling.sendall(head.encode())
        assert trickling.recv(1024).startswith(b"HTTP/1.1 100 ")  # it is paid for by now
        for number in range(2):
            other = ask(served, "POST", f"{path}{number}", bytes(MIB), token=token)
            assert other.status == 201
        # And it ends where it has used up what is left.
        with suppress(BrokenPipeError, ConnectionResetError):
            trickling.sendall(bytes(2 * MIB))
        assert trickling.recv(1024).startswith(b"HTTP/1.1 429 ")


def test_a_body_of_known_length_never_passes_more_than_is_paid(clock: HandClock) -> None:
    limit = Limit(Counters(None, clock.now_us), "tenant", "bytes", 5 * STEP_BYTES, DAY_US)
    first, second = Tally(4 * STEP_BYTES), Tally(4 * STEP_BYTES)
    for tally in (first, second):
        tally.bill(limit, "a")
    assert limit.count("a") == 2 * STEP_BYTES
    for _ in range(8):
        first.received(STEP_BYTES // 2)
    assert limit.count("a") == 5 * STEP_BYTES
    second.received(STEP_BYTES)
    with pytest.raises(TooManyRequests):
        second.received(1)
    second.settle()
    first.settle()
    assert limit.count("a") == 5 * STEP_BYTES + 1


def test_a_short_body_is_paid_as_a_whole_and_a_link_pays_all_ahead(clock: HandClock) -> None:
    limit = Limit(Counters(None, clock.now_us), "link", "bytes", 5 * STEP_BYTES, DAY_US)
    Tally(10).bill(limit, "short")
    Tally(3 * STEP_BYTES).bill(limit, "ahead", ahead=True)
    assert (limit.count("short"), limit.count("ahead")) == (10, 3 * STEP_BYTES)


def test_pieces_of_a_resumable_upload_count(served: Served) -> None:
    link = asked(served, tenant(served, "pieces"), max_files=2)["upload_token"]
    tus = {"Tus-Resumable": "1.0.0"}
    made = ask(
        served,
        "POST",
        f"/api/v1/uploads/{link}/tus/",
        headers={**tus, "Upload-Length": str(2 * MIB)},
    )
    assert made.status == 201, made.body
    piece = {**tus, "Content-Type": "application/offset+octet-stream"}
    url, half = made.headers["location"], 600 * KIB
    first = ask(served, "PATCH", url, bytes(half), headers={**piece, "Upload-Offset": "0"})
    assert first.status == 204, first.body
    second = ask(served, "PATCH", url, bytes(half), headers={**piece, "Upload-Offset": str(half)})
    assert refused(second, "bytes")


def test_a_tally_pays_once_and_settles_once(clock: HandClock) -> None:
    limit = Limit(Counters(None, clock.now_us), "link", "bytes", 10 * STEP_BYTES, DAY_US)
    tally = Tally(None)
    tally.bill(limit, "a")
    tally.bill(limit, "a")
    for _ in range(5):
        tally.received(STEP_BYTES // 2)
    tally.settle()
    tally.settle()
    assert limit.count("a") == 5 * (STEP_BYTES // 2)
    with pytest.raises(TooLarge):
        Tally(11 * STEP_BYTES).bill(limit, "a")


# --- sizes, and the disk


def test_json_that_is_too_long_or_too_deep_is_refused_by_name(served: Served) -> None:
    token = tenant(served, "json")
    long = ask(served, "POST", "/api/v1/uploads", b" " * (REQUEST_BYTES_MAX + 1), token=token)
    assert (long.status, long.code) == (413, "too_large")
    deep = ask(served, "POST", "/api/v1/uploads", b'{"name":' + b"[" * 60_000, token=token)
    assert (deep.status, deep.code) == (400, "invalid_request")


def test_a_slot_beyond_the_quota_of_its_tenant_is_refused_before_the_body(served: Served) -> None:
    token = tenant(served, "many")
    for _ in range(4):
        assert ask(served, "PUT", slot(served, token), b"x").status == 200
    url = slot(served, token).removeprefix(served.address)
    head = (
        f"PUT {url} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {fresh()}\r\n"
        "Content-Length: 1\r\nExpect: 100-continue\r\n\r\n"
    )
    with served.connect() as connection:
        connection.sendall(head.encode())
        answer = whole(connection)
    assert answer.startswith(b"HTTP/1.1 507 ")
    assert b'"code":"quota_exceeded"' in answer
    assert b'"limit"' not in answer


def test_a_store_without_room_refuses_before_the_body_is_sent(root: Path) -> None:
    with serving(root, STORE__MIN_FREE="4096TiB") as full:
        head = (
            "POST /api/v1/storage?name=a HTTP/1.1\r\nHost: a\r\n"
            f"Authorization: Bearer {full.admin}\r\n"
            "Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"
        )
        with full.connect() as connection:
            connection.sendall(head.encode())
            answer = whole(connection)
        assert answer.startswith(b"HTTP/1.1 507 ")  # and not with "100 Continue"
        assert b'"code":"store_full"' in answer
