"""Workloads of many clients at once, against a bare app under the same gunicorn settings."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from bench.corpus import KIB, MIB, Stream
from bench.load import load
from bench.loopback import connected, send_stream, store_body
from bench.measure import Memory, Run, Samples, Side, alternate
from bench.report import Quantity, Row, Target
from bench.scale import Bench
from bench.serving import Serving, serving
from bench.slow import Slow, slow_clients
from bench.storing import rate, shown

WORKERS = 2  # the default of the settings
_SMALL_BYTES = 4 * KIB
_SLOTS_MAX = 1000
_SLOW_BYTES_PER_S = 1 * KIB
_HALF_HEADS = 50
_BURSTS = 10
_PAUSE_S = 0.5
_SAMPLE_S = 0.25
_BARE = "a bare Falcon app, same settings"


def put_small(bench: Bench) -> list[Row]:
    """Small files into slots of their own, durable, against as many bare answers."""
    count, connections = bench.scale.crowd_requests, bench.scale.connections
    with _both(bench) as (server, peer):
        body = bytearray(os.urandom(_SMALL_BYTES))

        def put(run: Run) -> None:
            requests = []
            for number, path in enumerate(_slots(server, count)):
                body[:32] = os.urandom(32)  # no two files are equal
                head = f"PUT {path}&filename={number}.bin HTTP/1.1\r\nHost: a\r\n"
                requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            with run.timed():
                load(server.host, server.port, requests, connections)

        ours, limit = alternate(
            bench.folder, bench.scale.rounds, [Side("gateway", put), _bare(peer, bench)]
        )
    what = f"PUT of {shown(_SMALL_BYTES)}, durable, {connections} clients"
    return [_row("put_small", what, ours, limit, count, 0.2)]


def get_small(bench: Bench) -> list[Row]:
    """A small file by its signed URL, against as many bare answers."""
    count, connections = bench.scale.crowd_requests, bench.scale.connections
    with _both(bench) as (server, peer):
        path = _signed(server, _stored(server, _SMALL_BYTES))
        request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()

        def get(run: Run) -> None:
            with run.timed():
                load(server.host, server.port, [request] * count, connections)

        ours, limit = alternate(
            bench.folder, bench.scale.rounds, [Side("gateway", get), _bare(peer, bench)]
        )
    what = f"signed GET of {shown(_SMALL_BYTES)}, {connections} clients"
    return [_row("get_small", what, ours, limit, count, 0.45)]


def slow_crowd(bench: Bench) -> list[Row]:
    """A fast client's latency among slow uploads, slow downloads and half-sent heads,
    against its latency alone. The slow ones come and go with each round."""
    slow, count = bench.scale.slow_clients, bench.scale.requests
    alone: list[float] = []
    crowded: list[float] = []
    with serving(bench.folder / "root", workers=WORKERS) as server:
        path = _signed(server, _stored(server, _SMALL_BYTES))
        request = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        large = _signed(server, _stored(server, bench.scale.slow_bytes))
        for _ in range(bench.scale.rounds):
            alone += _latencies(server, request, count)
            wanted = Slow(
                uploads=_slots(server, slow // 2),
                downloads=[large] * (slow - slow // 2),
                half_heads=_HALF_HEADS,
                bytes_per_s=_SLOW_BYTES_PER_S,
            )
            with slow_clients(server.host, server.port, wanted) as crowd:
                crowded += _latencies(server, request, count)
                crowd.check()
    ours, limit = statistics.median(crowded), statistics.median(alone)
    return [
        Row(
            "slow_crowd",
            f"a fast client's GET among {slow} slow clients and {_HALF_HEADS} half-sent heads",
            Quantity(ours * 1e6, "µs"),
            ours / limit,
            Quantity(limit * 1e6, "µs"),
            "the same client alone",
            Target(2, at_most=True),
            f"99 of 100 within {_percentile(crowded) * 1e6:,.0f} µs, "
            f"alone {_percentile(alone) * 1e6:,.0f} µs",
        )
    ]


def upload_memory(bench: Bench) -> list[Row]:
    """The memory of all workers while many large uploads are under way at once."""
    clients, size_bytes = bench.scale.memory_uploads, bench.scale.memory_bytes
    with serving(bench.folder / "root", workers=WORKERS) as server:
        idle = Memory.together(server.worker_pids)
        uploads = [
            threading.Thread(target=_upload, args=(server, size_bytes, number))
            for number in range(clients)
        ]
        for upload in uploads:
            upload.start()
        peak = idle
        for upload in uploads:
            while upload.is_alive():
                peak = max(peak, Memory.together(server.worker_pids))
                upload.join(_SAMPLE_S)
    return [
        Row(
            "upload_memory",
            f"memory of all workers, {clients} uploads of {shown(size_bytes)} at once",
            Quantity(peak / MIB, "MiB"),
            peak / MIB,
            target=Target(400, at_most=True, unit="MiB"),
            note=f"idle {idle / MIB:.0f} MiB; pages that processes share count once",
        )
    ]


# --- the pieces


@contextmanager
def _both(bench: Bench) -> Iterator[tuple[Serving, Serving]]:
    with (
        serving(bench.folder / "root", workers=WORKERS) as server,
        serving(bench.folder / "bare", workers=WORKERS, bare=True) as peer,
    ):
        yield server, peer


def _bare(peer: Serving, bench: Bench) -> Side:
    requests = [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"] * bench.scale.crowd_requests

    def ask(run: Run) -> None:
        with run.timed():
            load(peer.host, peer.port, requests, bench.scale.connections)

    return Side("bare", ask)


def _row(name: str, what: str, ours: Samples, limit: Samples, count: int, bound: float) -> Row:
    return Row(
        name,
        what,
        rate(ours, count, "/s"),
        limit.median_s / ours.median_s,
        rate(limit, count, "/s"),
        _BARE,
        Target(bound),
    )


def _latencies(server: Serving, request: bytes, count: int) -> list[float]:
    """Of one client, in bursts over some seconds, so that slow ones do come to their turns."""
    latencies_s: list[float] = []
    for _ in range(_BURSTS):
        latencies_s += load(server.host, server.port, [request] * (count // _BURSTS), 1).latencies_s
        time.sleep(_PAUSE_S)
    return latencies_s


def _percentile(latencies_s: list[float]) -> float:
    return statistics.quantiles(latencies_s, n=100)[98]


def _ask(server: Serving, method: str, path: str, form: dict[str, Any] | None) -> dict[str, Any]:
    connection = http.client.HTTPConnection(server.host, server.port)
    body = None if form is None else json.dumps(form)
    connection.request(method, path, body, {"Authorization": f"Bearer {server.token}"})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    if answer.status not in (200, 201):
        raise RuntimeError(f"{answer.status}: {text.decode(errors='replace')}")
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def _slots(server: Serving, count: int) -> list[str]:
    """Signed paths to PUT to, each a slot that was never filled."""
    paths: list[str] = []
    while len(paths) < count:
        wanted = {"name": "bench", "max_files": min(_SLOTS_MAX, count - len(paths))}
        urls = _ask(server, "POST", "/api/v1/uploads", wanted)["presigned_urls"]
        paths += [_path(url) for url in urls]
    return paths


def _stored(server: Serving, size_bytes: int) -> str:
    with connected(server.host, server.port) as connection:
        body = Stream(size_bytes, 1)
        file = store_body(connection, server, size_bytes, send_stream(body))
    return str(file["storage_ref"]).partition("://")[2]


def _signed(server: Serving, reference: str) -> str:
    return _path(_ask(server, "GET", f"/api/v1/storage/{reference}/url", None)["url"])


def _path(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def _upload(server: Serving, size_bytes: int, number: int) -> None:
    with connected(server.host, server.port) as connection:
        store_body(connection, server, size_bytes, send_stream(Stream(size_bytes, number)))
