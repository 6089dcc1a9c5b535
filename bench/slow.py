"""Slow clients: uploads and downloads that trickle, and heads that never end.

One thread serves them all, a few at each tick, so that they load the machine as little as
hundreds of bad mobile connections would.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import final

import msgspec

_TICKS_PER_S = 20
_BODY_BYTES = 1 << 20  # announced by each upload; at 1 KB/s nobody gets so far
_RECEIVE_BUFFER_BYTES = 4096  # the kernel's: what it holds, the server takes for read


@final
class Slow(msgspec.Struct, frozen=True):
    """What is wanted: signed paths, one for each client."""

    uploads: list[str]
    downloads: list[str]
    half_heads: int
    bytes_per_s: int


@final
class Crowd:
    """Slow clients under way."""

    def __init__(self, senders: list[socket.socket], readers: list[socket.socket]) -> None:
        self._all = [(sock, True) for sock in senders] + [(sock, False) for sock in readers]
        self._ended = threading.Event()
        self._lost = 0

    def check(self) -> None:
        """Raise RuntimeError unless all of them are still being served."""
        if self._lost:
            raise RuntimeError(f"{self._lost} slow clients were cut off")

    def trickle(self, bytes_per_s: int) -> None:
        """Move so many bytes a second for each client until `end`."""
        tick = 0
        while not self._ended.wait(1 / _TICKS_PER_S):
            for sock, sends in self._all[tick % _TICKS_PER_S :: _TICKS_PER_S]:
                try:
                    if sends:
                        sock.send(bytes(bytes_per_s))
                    elif not sock.recv(bytes_per_s):
                        self._lost += 1
                except BlockingIOError:
                    continue  # the answer's first bytes are not there yet
                except OSError:
                    self._lost += 1
            tick += 1

    def end(self) -> None:
        self._ended.set()


@contextmanager
def slow_clients(host: str, port: int, wanted: Slow) -> Iterator[Crowd]:
    """All of them connected and begun; gone at the end of the block."""
    with ExitStack() as stack:

        def begin(request: str) -> socket.socket:
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            sock.connect((host, port))
            sock.sendall(request.encode())
            sock.setblocking(False)
            return sock

        head = "HTTP/1.1\r\nHost: a\r\n"
        crowd = Crowd(
            [
                begin(f"PUT {path}&filename=slow {head}Content-Length: {_BODY_BYTES}\r\n\r\n")
                for path in wanted.uploads
            ],
            [begin(f"GET {path} {head}\r\n") for path in wanted.downloads],
        )
        for _ in range(wanted.half_heads):
            begin(f"GET /healthz {head}X-Unfinished: ")
        thread = threading.Thread(target=crowd.trickle, args=(wanted.bytes_per_s,), daemon=True)
        thread.start()
        try:
            yield crowd
        finally:
            crowd.end()
            thread.join()
