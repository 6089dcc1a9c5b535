"""Ports of loopback for servers that cannot be told to take any."""

from __future__ import annotations

import random
import socket
from typing import Final

# Below those that Linux hands out by itself (from 32768 on): between the look and the server's
# own bind, which may be seconds later, none of the connections made on this machine takes it.
_FIRST: Final = 20_000
_LAST: Final = 32_767
_chance = random.SystemRandom()


def free_port() -> int:
    """A port that nobody listens at now."""
    while True:
        port = _chance.randint(_FIRST, _LAST)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
