"""Connections: a client's, from its acceptance until it is closed, request after request."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, final

from gunicorn import http
from gunicorn.workers.gthread import TConn

from gateway.body import IDLE_S, Pace, PacedUnreader
from gateway.parking import Parked
from gateway.pool import Pool
from gateway.sending import Outlet


@final
class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """A client connection and the part of the next head that has come."""

    def __init__(
        self,
        cfg: Any,
        sock: socket.socket,
        client: Any,
        server: Any,
        pool: Pool,
        bytes_per_s_min: int,
        left: Callable[[], None],
    ) -> None:
        """`left` is called once, when it is closed."""
        super().__init__(cfg, sock, client, server)
        timeout = struct.pack("ll", int(IDLE_S), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self.parser = http.get_parser(cfg, sock, client)
        self.parser.unreader = PacedUnreader(sock, pool.waiting, bytes_per_s_min)
        # One an answer: each has a patience of its own.
        self.outlet = partial(Outlet, sock, pool.waiting, partial(Pace, bytes_per_s_min))
        self.initialized = True
        self.head = bytearray()
        self.lingered_bytes = 0
        self.whose: str | None = None  # whom it counts for
        self.closed = False
        self.parked: Parked | None = None  # what its request waits for
        self.early_bytes = 0  # that came while it waited
        self._left = left

    def close(self, graceful: bool = False) -> None:
        super().close(graceful)
        if not self.closed:
            self.closed = True
            self._left()
