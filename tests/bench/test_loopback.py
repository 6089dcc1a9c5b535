"""What a request costs, through a real server on loopback."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bench.corpus import MIB, Stream
from bench.loopback import connected, fetch, path_of, send_stream, store_body
from bench.serving import Serving, serving

SIZES = [4096, 4 * MIB]


@pytest.mark.parametrize("size_bytes", SIZES)
def test_put_over_http(benchmark: Any, server: Serving, size_bytes: int) -> None:
    numbers = count()
    with connected(server.host, server.port) as connection:

        def put() -> dict[str, Any]:
            body = Stream(size_bytes, next(numbers))
            return store_body(connection, server, size_bytes, send_stream(body))

        file = benchmark.pedantic(put, rounds=5)
    assert path_of(file).startswith("/api/v1/storage/uploads/")


@pytest.mark.parametrize("size_bytes", SIZES)
def test_get_over_http(benchmark: Any, server: Serving, size_bytes: int) -> None:
    with connected(server.host, server.port) as connection:
        body = Stream(size_bytes, 1)
        path = path_of(store_body(connection, server, size_bytes, send_stream(body)))
        buffer = memoryview(bytearray(MIB))
        benchmark.pedantic(fetch, (connection, path, server.token, buffer), rounds=5)


@pytest.mark.parametrize(("buffered", "drain"), [(True, False), (False, True), (True, True)])
def test_the_peers_of_the_gateway_answer_as_it_does(
    root: Path, buffered: bool, drain: bool
) -> None:
    with (
        serving(root / "peer", buffered=buffered, drain=drain) as server,
        connected(server.host, server.port) as connection,
    ):
        answer = store_body(connection, server, 3 * MIB, send_stream(Stream(3 * MIB, 1)))
    assert answer["size_bytes"] == 3 * MIB
