"""Bytes to the server as they are, and all that it answers until it closes."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any, NamedTuple

from tests.gateway.served import Served

# Behind each message: were it read as a second request, there would be a second answer.
FOLLOWING = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


class Reply(NamedTuple):
    """One answer; names of headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The stable code of a problem, whose form is whole."""
        assert self.headers["content-type"] == "application/problem+json"
        problem: dict[str, Any] = json.loads(self.body)
        assert problem["status"] == self.status
        assert problem["type"] == f"urn:blobcask:{problem['code']}"
        assert {"title", "detail"} <= problem.keys()
        return str(problem["code"])


def exchange(served: Served, message: bytes, following: bytes = FOLLOWING) -> list[Reply]:
    """Send, and read until the server closes."""
    with served.connect() as connection:
        connection.sendall(message + following)
        if not following:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(65536):
                received += data
    return _replies(received)


def _replies(received: bytes) -> list[Reply]:
    found: list[Reply] = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, received
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (f.partition(": ") for f in fields)}
        length = int(headers.get("content-length", "0"))
        found.append(Reply(int(line.split()[1]), headers, rest[:length]))
        received = rest[length:]
    return found
