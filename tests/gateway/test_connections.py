"""Connections: no peer takes them all, those that wait make way, and workers share a burst."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from ipaddress import ip_network
from pathlib import Path

import pytest

from gateway.board import Board, Share
from gateway.peers import Peers
from gateway.wsgi import DESCRIPTORS_RESERVED
from tests.gateway.served import Served, serving, until

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
BURSTS = 25
HALF_HEAD = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Unfinished: "


def answered(sock: socket.socket) -> bool:
    """Whether the server answers a request, rather than having closed."""
    try:
        sock.sendall(HEALTH)
        return sock.recv(4096).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def closed(sock: socket.socket) -> bool:
    """Whether the server closes, unread bytes or not."""
    try:
        return sock.recv(10) == b""
    except ConnectionError:
        return True


def send_half(sock: socket.socket) -> None:
    with suppress(ConnectionError):
        sock.sendall(HALF_HEAD)


def slots(served: Served, count: int) -> list[str]:
    """Paths to upload to, with no connection left that was needed to get them."""
    until(lambda: len(served.workers()) == 1)
    (worker,) = served.workers()
    assert served.ask("GET", "/healthz").status == 200  # it has begun
    urls = served.request_upload(max_files=count)["presigned_urls"]
    until(lambda: not clients(worker))
    return [url.removeprefix(served.address) for url in urls]


def upload(url: str, sock: socket.socket) -> None:
    """Begin one, and wait until a thread has it."""
    head = f"PUT {url}&filename=a HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n"
    sock.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert sock.recv(100).startswith(b"HTTP/1.1 100")


def clients(pid: int) -> int:
    """How many connections a process has, besides those it listens on."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry).removeprefix("socket:[").rstrip("]"))
        except OSError:
            continue
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(words[9] in inodes and words[3] != "0A" for words in lines)


def answers_a_new_one(served: Served) -> bool:
    with served.connect() as sock:
        return answered(sock)


# --- one peer


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_a_peer_with_too_many_loses_its_idle_ones_and_its_uploads_go_on(
    root: Path, stack: ExitStack
) -> None:
    settings = {"GATEWAY__WORKERS": "1", "LIMITS__ADDRESS_CONNECTIONS": "4"}
    with serving(root, **settings) as server:
        urls = slots(server, 2)
        uploads = [stack.enter_context(server.connect()) for _ in range(2)]
        for url, sock in zip(urls, uploads, strict=True):
            upload(url, sock)
        idle = [stack.enter_context(server.connect()) for _ in range(2)]
        assert all(map(answered, idle))
        halves = [stack.enter_context(server.connect()) for _ in range(6)]
        for sock in halves:
            send_half(sock)
        assert closed(halves[0])  # closed at once, for the later ones

        def lost() -> bool:
            # On a busy machine an answered one is not yet known for idle when others come.
            send_half(stack.enter_context(server.connect()))
            return not any(map(answered, idle))

        until(lost)
        for sock in uploads:
            sock.sendall(b"four")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_peer_whose_connections_are_all_busy_gets_no_more(root: Path, stack: ExitStack) -> None:
    settings = {"GATEWAY__WORKERS": "1", "LIMITS__ADDRESS_CONNECTIONS": "2"}
    with serving(root, **settings) as server:
        urls = slots(server, 2)
        uploads = [stack.enter_context(server.connect()) for _ in range(2)]
        for url, sock in zip(urls, uploads, strict=True):
            upload(url, sock)
        with server.connect() as refused:
            assert closed(refused)
        uploads[0].sendall(b"four")
        assert uploads[0].recv(4096).startswith(b"HTTP/1.1 200")
        until(lambda: answers_a_new_one(server))  # once that one is kept alive
        uploads[1].sendall(b"four")
        assert uploads[1].recv(4096).startswith(b"HTTP/1.1 200")


def test_proxies_that_are_trusted_have_no_limit(root: Path, stack: ExitStack) -> None:
    settings = {"GATEWAY__TRUSTED_PROXIES": "127.0.0.1", "LIMITS__ADDRESS_CONNECTIONS": "1"}
    with serving(root, GATEWAY__WORKERS="1", **settings) as server:
        idle = [stack.enter_context(server.connect()) for _ in range(5)]
        assert all(map(answered, idle))
        assert all(map(answered, idle))


def test_peers_count_by_network_and_are_forgotten() -> None:
    peers = Peers(2, (ip_network("10.0.0.0/8"),))
    one, other = peers.whose(("2001:db8::1", 1, 0, 0)), peers.whose(("2001:db8::2:1", 2, 0, 0))
    assert one == other != peers.whose(("2001:db8:0:1::1", 1, 0, 0))
    for address in ("", b"", ("10.1.2.3", 1), ("::ffff:10.1.2.3", 1, 0, 0)):
        assert peers.whose(address) is None
    peers.enter(one)
    assert not peers.full(one)
    peers.enter(other)
    assert peers.full(one)
    peers.leave(one)
    peers.leave(other)
    assert vars(peers)["_counts"] == {}


# --- all together


def descriptors(served: Served, most: int) -> None:
    """Let the worker have so many open files and no more."""
    (worker,) = served.workers()
    _, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (most, hard))


def test_a_worker_whose_descriptors_are_spent_goes_on_with_those_it_has(
    root: Path, stack: ExitStack
) -> None:
    with serving(root, GATEWAY__WORKERS="1") as server:
        (url,) = slots(server, 1)
        (worker,) = server.workers()
        kept = stack.enter_context(server.connect())
        assert answered(kept)
        upload(url, busy := stack.enter_context(server.connect()))
        open_now = len(list(Path(f"/proc/{worker}/fd").iterdir()))
        descriptors(server, open_now)
        further = stack.enter_context(server.connect())
        assert answered(further)  # the idle one made way
        assert closed(kept)
        lines = server.logged(lambda lines: any("not accepted" in line for line in lines))
        assert len([line for line in lines if "not accepted" in line]) <= 5
        descriptors(server, open_now + 100)
        busy.sendall(b"four")
        assert busy.recv(4096).startswith(b"HTTP/1.1 200")


def test_where_all_connections_are_taken_the_oldest_idle_one_makes_way(
    root: Path, stack: ExitStack
) -> None:
    # A quarter of them is for those who wait for events: so nine connections.
    with limited(root, DESCRIPTORS_RESERVED + 24) as served:
        halves = [stack.enter_context(served.connect()) for _ in range(30)]
        for sock in halves:
            send_half(sock)
        assert served.ask("GET", "/healthz").status == 200
        assert closed(halves[0])


def limited(root: Path, descriptors_max: int) -> AbstractContextManager[Served]:
    """A server that may have so many descriptors, as by `LimitNOFILE=` of systemd."""
    set_limit = f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({descriptors_max},) * 2)"
    program = f"{set_limit}; import cas.cli; cas.cli.main(prog_name='blobcask')"
    return serving(root, program=("-c", program), GATEWAY__WORKERS="1", GATEWAY__THREADS="2")


# --- workers among themselves


def test_a_burst_is_shared_by_the_workers(root: Path) -> None:
    with serving(root, GATEWAY__WORKERS="2") as server:
        until(lambda: both_serve(server))
        seen = [shares_of_a_burst(server) for _ in range(5)]
        while len(seen) < BURSTS and not well_shared(seen):
            seen.append(shares_of_a_burst(server))  # one that had no processor took fewer
        assert well_shared(seen), seen


def well_shared(seen: list[list[int]]) -> bool:
    """Whether four of five bursts were; where nothing shares, it is one of four."""
    return 5 * sum(min(shares) >= 10 for shares in seen) >= 4 * len(seen)


def shares_of_a_burst(served: Served) -> list[int]:
    """How many of 32 connections each worker takes."""
    until(lambda: not any(map(clients, served.workers())))
    shares: list[int] = []

    def all_found() -> bool:  # the kernel's table may change while it is read
        shares[:] = map(clients, served.workers())
        return sum(shares) == 32

    with ExitStack() as stack:
        crowd = [stack.enter_context(served.connect()) for _ in range(32)]
        assert all(map(answered, crowd))
        until(all_found)
        return shares


def both_serve(served: Served) -> bool:
    with ExitStack() as stack:
        crowd = [stack.enter_context(served.connect()) for _ in range(16)]
        assert all(map(answered, crowd))
        return len(served.workers()) == 2 and all(map(clients, served.workers()))


def test_a_worker_hears_only_of_those_that_accept() -> None:
    board = Board(4)
    mine, busy, full, ended = (Share(board, board.take()) for _ in range(4))
    assert mine.least_of_others() == float("inf")
    mine.tell(9, accepts=True)
    busy.tell(5, accepts=True)
    full.tell(1, accepts=False)
    ended.tell(0, accepts=True)
    board.give_back(3)
    assert (mine.least_of_others(), busy.least_of_others()) == (5, 9)
