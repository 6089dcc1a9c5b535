"""Workloads over HTTP on loopback: one client, one worker, two processes."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.corpus import KIB, MIB, LargeFile, Stream
from bench.measure import Memory, Run, Side, alternate, settle
from bench.peers import nginx
from bench.report import Quantity, Row, Target
from bench.scale import Bench
from bench.serving import Serving, serving
from bench.storing import rate, shown
from cas.digest import Digest

_ANSWER_S = 600.0
_PROGRAMS = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


@contextmanager
def connected(host: str, port: int) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
    connection.connect()
    try:
        yield connection
    finally:
        connection.close()


def store_body(
    connection: http.client.HTTPConnection,
    server: Serving,
    size_bytes: int,
    send: Callable[[http.client.HTTPConnection], object],
) -> dict[str, Any]:
    """POST one body, which `send` puts onto the connection; returns the file's record."""
    connection.putrequest("POST", "/api/v1/storage?name=measured.bin&filename=measured.bin")
    connection.putheader("Authorization", f"Bearer {server.token}")
    connection.putheader("Content-Length", str(size_bytes))
    connection.endheaders()
    send(connection)
    response = connection.getresponse()
    body = response.read()
    if response.status not in (200, 201):
        raise RuntimeError(f"{response.status}: {body.decode(errors='replace')}")
    answer: dict[str, Any] = json.loads(body)
    return answer


def fetch(
    connection: http.client.HTTPConnection, path: str, token: str, buffer: memoryview
) -> None:
    """GET, every byte received into one reused buffer."""
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
    response = connection.getresponse()
    expected = int(response.headers["Content-Length"])
    received = 0
    while size := response.readinto(buffer):
        received += size
    if response.status != 200 or received != expected:
        raise RuntimeError(f"{response.status}, {received} of {expected} bytes")


def send_file(path: Path) -> Callable[[http.client.HTTPConnection], object]:
    def send(connection: http.client.HTTPConnection) -> None:
        with path.open("rb") as file:
            connection.sock.sendfile(file)

    return send


def send_stream(stream: Stream) -> Callable[[http.client.HTTPConnection], object]:
    def send(connection: http.client.HTTPConnection) -> None:
        buffer = memoryview(bytearray(MIB))
        while size := stream.readinto(buffer):
            connection.sock.sendall(buffer[:size])

    return send


def path_of(file: dict[str, Any]) -> str:
    return "/api/v1/storage/" + str(file["storage_ref"]).partition("://")[2]


def get_http(bench: Bench) -> list[Row]:
    """GET of stored files, against nginx with sendfile of the very same objects."""
    program = shutil.which("nginx", path=_PROGRAMS)
    if program is None:
        raise FileNotFoundError("nginx is not installed (Debian: nginx-light)")
    folder = bench.folder / "nginx"
    folder.mkdir()
    buffer = memoryview(bytearray(MIB))
    rows = []
    with (
        serving(bench.folder / "root") as server,
        nginx(folder, bench.folder / "root" / "objects", program) as peer,
    ):
        host, _, port = peer.removeprefix("http://").rpartition(":")
        for size_bytes, requests, target in (
            (bench.scale.large_bytes, 1, Target(0.85)),
            (16 * KIB, bench.scale.requests, None),
        ):
            body = Stream(size_bytes, 1)
            with connected(server.host, server.port) as connection:
                file = store_body(connection, server, size_bytes, send_stream(body))
            ours_path, digest = path_of(file), Digest(bytes.fromhex(_digest(file)))
            peer_path = f"/{digest.hex()[:2]}/{digest.hex()}"

            # Connected when the disk has settled: one made before might be closed as idle.
            def get(run: Run, path: str = ours_path, requests: int = requests) -> None:
                with run.timed(), connected(server.host, server.port) as connection:
                    for _ in range(requests):
                        fetch(connection, path, server.token, buffer)

            def sendfile(run: Run, path: str = peer_path, requests: int = requests) -> None:
                with run.timed(), connected(host, int(port)) as connection:
                    for _ in range(requests):
                        fetch(connection, path, "", buffer)

            ours, limit = alternate(
                bench.folder,
                bench.scale.rounds,
                [Side("gateway", get), Side("nginx", sendfile)],
            )
            large = requests == 1
            amount, unit = (size_bytes / 1e6, "MB/s") if large else (requests, "/s")
            rows.append(
                Row(
                    "get_http",
                    f"GET of {shown(size_bytes)} over loopback",
                    rate(ours, amount, unit),
                    limit.median_s / ours.median_s,
                    rate(limit, amount, unit),
                    "nginx sendfile of the same file",
                    target,
                )
            )
    return rows


def put_http(bench: Bench) -> list[Row]:
    """POST of a large body, against gunicorn's own body object: received, and stored too."""
    size = shown(bench.scale.large_bytes)
    received = _put(bench, bench.folder / "drained", drain=True)
    stored = _put(bench, bench.folder / "stored", drain=False)
    return [
        msgspec.structs.replace(
            received, what=f"PUT of {size} over loopback, body received", target=Target(2.5)
        ),
        msgspec.structs.replace(stored, what=f"PUT of {size} over loopback, stored, durable"),
    ]


def _put(bench: Bench, folder: Path, *, drain: bool) -> Row:
    folder.mkdir()
    source = LargeFile(bench.folder / "source", bench.scale.large_bytes)
    with (
        serving(folder / "direct", drain=drain) as ours_server,
        serving(folder / "buffered", buffered=True, drain=drain) as peer_server,
    ):

        def side(name: str, server: Serving) -> Side:
            def put(run: Run) -> None:
                source.renew()
                with run.timed(), connected(server.host, server.port) as connection:
                    file = store_body(connection, server, source.size_bytes, send_file(source.path))
                if not drain:
                    digest = _digest(file)
                    (server.root / "objects" / digest[:2] / digest).unlink()

            return Side(name, put)

        ours, limit = alternate(
            bench.folder,
            bench.scale.rounds,
            [side("gateway", ours_server), side("buffered", peer_server)],
        )
    source.path.unlink()
    megabytes = source.size_bytes / 1e6
    return Row(
        "put_http",
        "",
        rate(ours, megabytes, "MB/s"),
        limit.median_s / ours.median_s,
        rate(limit, megabytes, "MB/s"),
        "the same app reading wsgi.input in 1 MiB reads",
    )


def memory(bench: Bench) -> list[Row]:
    """How far the worker grows while one very large file streams in and out."""
    size_bytes = bench.scale.stream_bytes
    with serving(bench.folder / "root") as server:
        idle = Memory.of(server.worker_pid)
        with connected(server.host, server.port) as connection:
            file = store_body(connection, server, size_bytes, send_stream(Stream(size_bytes, 1)))
        settle(bench.folder)
        with connected(server.host, server.port) as connection:
            fetch(connection, path_of(file), server.token, memoryview(bytearray(MIB)))
        grown = Memory.of(server.worker_pid).peak_bytes - idle.resident_bytes
    grown_mib = grown / 2**20
    return [
        Row(
            "memory",
            f"memory of the worker, {shown(size_bytes)} streamed in and out, above idle",
            Quantity(grown_mib, "MiB"),
            grown_mib,
            target=Target(64, at_most=True, unit="MiB"),
            note=f"idle {idle.resident_bytes / 2**20:.1f} MiB resident",
        )
    ]


def _digest(file: dict[str, Any]) -> str:
    return str(file["storage_ref"]).rpartition("/")[2].partition(".")[0]
