"""What bad clients and bad luck get: a clear answer, nothing left behind, nothing frozen.

Invariants 9 (a token opens its own upload only) and 11 (nobody holds a worker for ever).
"""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from gateway.body import DRAIN_BYTES_MAX
from tests.gateway.served import Served, serving

THREADS = 4


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    """One worker with few threads: whatever holds a thread for ever is seen."""
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__WORKERS="1", GATEWAY__THREADS=str(THREADS)) as server,
    ):
        yield server
        assert server.ask("GET", "/healthz").status == 200
        assert len(server.workers()) == 1


@pytest.fixture
def slot(served: Served) -> str:
    """The path and query of a fresh slot's URL, with a filename."""
    url = served.request_upload(max_files=2)["presigned_urls"][0]
    return f"{url.removeprefix(served.address)}&filename=a.bin"


def put(slot: str, *lines: str) -> bytes:
    return "\r\n".join([f"PUT {slot} HTTP/1.1", "Host: a", *lines, "", ""]).encode()


def answer_of(connection: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response


def filled(served: Served, slot: str) -> list[dict[str, Any]]:
    token = urlsplit(slot).path.split("/")[4]
    files = served.ask("GET", f"/api/v1/uploads/{token}/info").form["files"]
    assert isinstance(files, list)
    return files


# --- bodies


def test_a_truncated_body_makes_no_slot_and_leaves_nothing(served: Served, slot: str) -> None:
    before = served.objects()
    with served.connect() as connection:
        connection.sendall(put(slot, "Content-Length: 1000") + b"half")
        connection.shutdown(socket.SHUT_WR)
        answer = answer_of(connection)
        assert answer.status == 400
        assert b"body_truncated" in answer.read()
        assert answer.getheader("Connection") == "close"
    assert filled(served, slot) == []
    assert served.objects() == before


@pytest.mark.parametrize(
    "chunks", [b"4\r\nhalf\r\n", b"4\r\nha", b"zz\r\n", b"-1\r\n", b"4\r\nhalfXX0\r\n\r\n"]
)
def test_a_broken_chunked_body_makes_no_slot(served: Served, slot: str, chunks: bytes) -> None:
    before = served.objects()
    with served.connect() as connection:
        connection.sendall(put(slot, "Transfer-Encoding: chunked") + chunks)
        connection.shutdown(socket.SHUT_WR)
        assert answer_of(connection).status == 400
    assert filled(served, slot) == []
    assert served.objects() == before


def test_clients_gone_in_the_middle_leave_nothing(served: Served, slot: str) -> None:
    before = served.objects()
    for _ in range(2 * THREADS):
        with served.connect() as connection:
            # A reset instead of a farewell.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(put(slot, "Content-Length: 1000000") + bytes(70_000))
    assert served.ask("GET", "/healthz").status == 200
    assert filled(served, slot) == []
    assert served.objects() == before


def test_a_chunked_body_is_stored(served: Served, slot: str) -> None:
    data = os.urandom(300_000)
    # Without a length http.client sends chunks.
    sent = served.ask("PUT", slot, iter([data[:1], data[1:100_000], data[100_000:]]))
    assert (sent.status, sent.form["size_bytes"]) == (200, len(data))
    assert sent.form["checksum_sha256"] == hashlib.sha256(data).hexdigest()


def test_an_empty_body_is_an_empty_file(served: Served, slot: str) -> None:
    sent = served.ask("PUT", slot, b"")
    assert (sent.status, sent.form["size_bytes"]) == (200, 0)


def test_a_wrong_promise_keeps_nothing(served: Served, slot: str) -> None:
    before = served.objects()
    headers = {"Content-Digest": "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"}
    sent = served.ask("PUT", slot, b"not nothing", headers=headers)
    assert (sent.status, sent.code) == (422, "digest_mismatch")
    assert filled(served, slot) == []
    assert served.objects() == before


@pytest.mark.parametrize("announced", [True, False])
def test_more_than_the_limit_is_refused_and_keeps_nothing(served: Served, announced: bool) -> None:
    url = served.request_upload(max_size_mb=1)["presigned_urls"][0]
    before = served.objects()
    pieces = [bytes(64 * 1024)] * 17
    body: Any = b"".join(pieces) if announced else iter(pieces)
    sent = served.ask("PUT", f"{url}&filename=a", body)
    assert (sent.status, sent.code) == (413, "too_large")
    assert sent.form["limit_bytes"] == 1024 * 1024
    assert served.objects() == before


def test_an_invitation_is_sent_only_when_the_body_is_wanted(served: Served, slot: str) -> None:
    with served.connect() as connection:
        connection.sendall(put(slot, "Content-Length: 4", "Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(b"data")
        assert answer_of(connection).status == 200
    refused = slot.replace("signature=", "signature=x")
    with served.connect() as connection:
        connection.sendall(put(refused, "Content-Length: 4", "Expect: 100-continue"))
        answer = answer_of(connection)
        assert answer.status == 404
        assert answer.getheader("Connection") == "close"


# --- connections


@pytest.mark.parametrize("unread_bytes", [0, 1_000, DRAIN_BYTES_MAX - 1, DRAIN_BYTES_MAX * 20])
def test_an_unread_body_freezes_nothing(served: Served, slot: str, unread_bytes: int) -> None:
    """Refused before a byte of its body was read: the rest is drained, or the connection
    closed, but the answer arrives and what follows is not taken for part of a body."""
    refused = slot.replace("signature=", "signature=x")
    for _ in range(2 * THREADS):
        with served.connect() as connection:
            head = put(refused, f"Content-Length: {unread_bytes}")
            connection.sendall(head + bytes(unread_bytes))
            answer = answer_of(connection)
            assert answer.status == 404
            answer.read()
            if answer.getheader("Connection") == "close":
                assert unread_bytes > DRAIN_BYTES_MAX
                continue
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert answer_of(connection).status == 200


def test_an_announced_body_that_never_comes_freezes_nothing(served: Served, slot: str) -> None:
    refused = slot.replace("signature=", "signature=x")
    connections = [served.connect() for _ in range(2 * THREADS)]
    try:
        for connection in connections:
            connection.sendall(put(refused, f"Content-Length: {DRAIN_BYTES_MAX * 2}"))
        assert served.ask("GET", "/healthz").status == 200
        assert all(answer_of(connection).status == 404 for connection in connections)
    finally:
        for connection in connections:
            connection.close()


def test_half_sent_heads_hold_no_thread(served: Served) -> None:
    connections = [served.connect() for _ in range(8 * THREADS)]
    try:
        for number, connection in enumerate(connections):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n"[: 1 + number])
        assert served.ask("GET", "/healthz").status == 200
        # And each is served as soon as the rest comes.
        for number, connection in enumerate(connections):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"[1 + number :])
            assert answer_of(connection).status == 200
    finally:
        for connection in connections:
            connection.close()


def test_idle_connections_hold_no_thread(served: Served) -> None:
    connections = [served.connect() for _ in range(8 * THREADS)]
    try:
        assert served.ask("GET", "/healthz").status == 200
    finally:
        for connection in connections:
            connection.close()


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(
            b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
            b"GET /api/v1/receipts/keys HTTP/1.1\r\nHost: a\r\n\r\n"
            b"GET /nowhere HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        received = b""
        while data := connection.recv(4096):
            received += data
    places = [received.find(part) for part in (b'"ok"', b'"keys"', b'"not_found"')]
    assert -1 not in places
    assert places == sorted(places)


# --- many at once, and bad luck


def test_the_same_file_from_32_clients_is_stored_once(served: Served) -> None:
    data = os.urandom(200_000)
    digest = hashlib.sha256(data).hexdigest()
    before = served.objects()
    with ThreadPoolExecutor(32) as clients:
        paths = [f"/api/v1/storage?name=n{number}&run=r{number}" for number in range(32)]
        answers = list(
            clients.map(lambda path: served.ask("POST", path, data, token=served.admin), paths)
        )
    assert [answer.status for answer in answers] == [201] * 32
    assert {answer.form["checksum_sha256"] for answer in answers} == {digest}
    assert served.objects() - before == {digest}


def test_a_slot_replaced_while_completing_is_one_or_the_other(served: Served) -> None:
    """Whatever wins, what complete says is what is stored, and no late put is acknowledged."""
    for round_ in range(8):
        asked = served.request_upload()
        url, token = f"{asked['presigned_urls'][0]}&filename=a.bin", asked["upload_token"]
        old, new = os.urandom(50_000), os.urandom(50_000 + round_)
        assert served.ask("PUT", url, old).status == 200
        start = threading.Barrier(2)

        def replace(start: threading.Barrier = start, url: str = url, new: bytes = new) -> Any:
            start.wait()
            return served.ask("PUT", url, new)

        def complete(start: threading.Barrier = start, token: str = token) -> Any:
            start.wait()
            return served.ask("POST", f"/api/v1/uploads/{token}/complete")

        with ThreadPoolExecutor(2) as clients:
            replacing, completing = clients.submit(replace), clients.submit(complete)
            replaced, completed = replacing.result(), completing.result()
        assert completed.status == 200
        (file,) = completed.form["files"]
        expected = new if replaced.status == 200 else old
        assert replaced.status in (200, 409)
        assert file["checksum_sha256"] == hashlib.sha256(expected).hexdigest()


def test_two_completes_at_once_agree(served: Served) -> None:
    asked = served.request_upload()
    served.ask("PUT", f"{asked['presigned_urls'][0]}&filename=a.bin", b"data")
    path = f"/api/v1/uploads/{asked['upload_token']}/complete"
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: served.ask("POST", path), range(8)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 7
    files = [answer.form["files"] for answer in answers]
    assert all(one == files[0] for one in files)


def test_a_killed_worker_loses_nothing_acknowledged(disk_folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__WORKERS="1") as served,
    ):
        kept = served.ask("POST", "/api/v1/storage?name=k", b"kept", token=served.admin)
        assert kept.status == 201
        slot = served.request_upload()["presigned_urls"][0].removeprefix(served.address)
        with served.connect() as connection:
            connection.sendall(put(slot, "Content-Length: 1000000", "Expect: 100-continue"))
            assert connection.recv(100).startswith(b"HTTP/1.1 100")  # its body is being read
            connection.sendall(bytes(500_000))
            (worker,) = served.workers()
            os.kill(worker, signal.SIGKILL)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        ref = quote(kept.form["storage_ref"], safe="")
        # The arbiter's listening socket outlives the worker: the next one answers.
        got = served.ask("GET", f"/api/v1/storage/{ref}", token=served.admin)
        assert (got.status, got.body) == (200, b"kept")
        assert served.workers() != [worker]
        assert filled(served, slot) == []
        assert served.objects() == {kept.form["checksum_sha256"]}
