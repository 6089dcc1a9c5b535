"""A load generator: many kept-alive connections in one thread, requests built beforehand.

It shares the machine with the server it loads, so it does as little as it can: a request
is one `send`, an answer one `recv` and a look at its first line and length. What the
connections do not share is the server's work: each sends its next request when its last
one is answered, as that many clients would.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Iterable, Iterator
from typing import final

import msgspec

_ANSWER_S = 60.0
_RECEIVE_BYTES = 64 * 1024
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class Refused(RuntimeError):
    """The server gave another answer than a success."""


@final
class Load(msgspec.Struct, frozen=True):
    """What came of one load: its length and the time of each answer, in seconds."""

    seconds: float
    latencies_s: list[float]


@final
class _Client:
    """One connection and the answer that is under way on it."""

    def __init__(self, host: str, port: int) -> None:
        self.sock = socket.create_connection((host, port), timeout=_ANSWER_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answer = b""
        self.began = 0.0

    def send(self, request: bytes) -> None:
        self.began = time.perf_counter()
        self.sock.sendall(request)

    def receive(self) -> bool:
        """Take what has come; True when the answer is whole. Raises Refused."""
        data = self.sock.recv(_RECEIVE_BYTES)
        if not data:
            raise Refused("the server closed the connection")
        answer = self._answer = self._answer + data if self._answer else data
        end = answer.find(_HEAD_END)
        if end < 0:
            return False
        length = _LENGTH.search(answer, 0, end)
        if length is None or not answer.startswith(b"HTTP/1.1 20"):
            raise Refused(answer[:300].decode(errors="replace"))
        if len(answer) < end + len(_HEAD_END) + int(length[1]):
            return False
        self._answer = b""
        return True


def load(host: str, port: int, requests: Iterable[bytes], connections: int) -> Load:
    """Send all requests over so many connections, each answered before its next one.

    Connections are made before the time begins. Raises Refused, TimeoutError.
    """
    waiting = iter(requests)
    clients = [_Client(host, port) for _ in range(connections)]
    try:
        began = time.perf_counter()
        latencies_s = list(_run(clients, waiting))
        return Load(time.perf_counter() - began, latencies_s)
    finally:
        for client in clients:
            client.sock.close()


def _run(clients: list[_Client], waiting: Iterator[bytes]) -> Iterator[float]:
    poller = select.epoll()
    by_fd = {}
    try:
        for client, request in zip(clients, waiting, strict=False):
            by_fd[client.sock.fileno()] = client
            poller.register(client.sock, select.EPOLLIN)
            client.send(request)
        under_way = len(by_fd)
        while under_way:
            events = poller.poll(_ANSWER_S)
            if not events:
                raise TimeoutError(f"no answer within {_ANSWER_S:.0f} s")
            for fd, _ in events:
                client = by_fd[fd]
                if not client.receive():
                    continue
                yield time.perf_counter() - client.began
                following = next(waiting, None)
                if following is None:
                    under_way -= 1
                else:
                    client.send(following)
    finally:
        poller.close()
