"""Slow clients: they are served to the end, hold up nobody, and cannot stay for ever.

Invariant 11: no request, however slow or broken, holds a worker for ever.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gateway.body import PATIENCE_S, BodyTooSlow, Pace
from gateway.room import BYTES_MAX
from gateway.sending import Outlet, ReaderTooSlow
from gateway.wsgi import STOP_TIMEOUT_S
from tests.conftest import CHECKOUT
from tests.gateway.served import ANSWER_S, Answer, Served, serving, until

THREADS = 2
SLOW = 12  # uploads, and as many downloads: more than threads, and than threads twice
HALF_HEADS = 50
MIB = 1 << 20


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__WORKERS="1", GATEWAY__THREADS=str(THREADS)) as server,
    ):
        yield server


def connect(served: Served) -> socket.socket:
    """A connection whose kernel buffers little: what it holds, the server takes for read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(ANSWER_S)
    sock.connect(("127.0.0.1", served.port))
    return sock


def slots(served: Served, count: int) -> list[str]:
    urls = served.request_upload(max_files=count)["presigned_urls"]
    return [f"{url.removeprefix(served.address)}&filename=a.bin" for url in urls]


def stored(served: Served, body: bytes) -> str:
    """A signed path to download it."""
    answer = served.ask("POST", "/api/v1/storage?name=large", body, token=served.admin)
    path = "/api/v1/storage/" + answer.form["storage_ref"].partition("://")[2]
    url = served.ask("GET", f"{path}/url", token=served.admin).form["url"]
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def half_upload(sock: socket.socket, slot: str, body: bytes) -> None:
    """The head and the first byte of the body."""
    head = f"PUT {slot} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body[:1])


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """The head of an answer, and what came of its body."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        data = sock.recv(512)
        assert data, answer
        answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def read_rest(sock: socket.socket, body: bytes, length: int) -> bytes:
    pieces = [body]
    received = len(body)
    while received < length:
        data = sock.recv(MIB)
        assert data, f"{received} of {length} bytes"
        pieces.append(data)
        received += len(data)
    return b"".join(pieces)


@contextmanager
def slow_crowd(served: Served, content: bytes) -> Iterator[list[socket.socket]]:
    """Half-sent heads, uploads without their end, downloads that nobody reads on.

    Yields the sockets of the uploads, which lack all but the first byte of `content`, and
    then of the downloads, whose first bytes were read.
    """
    large = stored(served, content)
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(served)) for _ in range(2 * SLOW)]
        for sock, slot in zip(socks[:SLOW], slots(served, SLOW), strict=True):
            half_upload(sock, slot, content)
        for sock in socks[SLOW:]:
            sock.sendall(f"GET {large} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert sock.recv(1) == b"H"  # it is being sent
        for _ in range(HALF_HEADS):
            half = stack.enter_context(connect(served))
            half.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Unfinished: ")
        yield socks


def test_a_fast_client_is_answered_among_slow_ones_and_they_come_to_their_end(
    served: Served,
) -> None:
    content = os.urandom(8 * MIB)
    with slow_crowd(served, content) as socks:
        for body in (b"fast", os.urandom(MIB)):
            sent = served.ask("PUT", slots(served, 1)[0], body)
            assert sent.form["checksum_sha256"] == hashlib.sha256(body).hexdigest()
        assert served.ask("GET", stored(served, b"fast")).body == b"fast"

        for sock in socks[:SLOW]:
            sock.sendall(content[1:])
            head, body = read_head(sock)
            assert head.startswith(b"HTTP/1.1 200"), (head, body)
        for sock in socks[SLOW:]:
            head, body = read_head(sock)
            assert head.startswith(b"TTP/1.1 200")
            assert read_rest(sock, body, len(content)) == content


def test_a_chunked_upload_that_pauses_holds_no_slot(served: Served) -> None:
    with ExitStack() as stack:
        uploads = [stack.enter_context(connect(served)) for _ in range(2 * THREADS)]
        for sock, slot in zip(uploads, slots(served, len(uploads)), strict=True):
            head = f"PUT {slot} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            sock.sendall(head.encode() + b"4\r\nslo")
        assert served.ask("PUT", slots(served, 1)[0], b"fast").status == 200
        for sock in uploads:
            sock.sendall(b"w\r\n0\r\n\r\n")
            assert read_head(sock)[0].startswith(b"HTTP/1.1 200")


def test_clients_that_leave_give_their_slots_back(served: Served) -> None:
    content = os.urandom(8 * MIB)
    before = served.objects()
    with slow_crowd(served, content) as socks:
        for sock in socks:
            # A reset instead of a farewell.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    for _ in range(2 * THREADS):
        assert served.ask("PUT", slots(served, 1)[0], b"after").status == 200
    assert len(served.objects() - before) <= 2  # the large file, and b"after"


def half_workflow(served: Served, token: str, length: int) -> socket.socket:
    """A connection that has sent a workflow but for its last byte, or was refused before."""
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=ANSWER_S)
    head = "POST /api/v1/workflows HTTP/1.1\r\nHost: a\r\n"
    head += f"Authorization: Bearer {token}\r\nContent-Length: {length}\r\n\r\n"
    with suppress(ConnectionError):
        sock.sendall(head.encode() + b" " * (length - 1))
    return sock


def test_bodies_without_an_end_take_half_of_the_room_and_leave_others_theirs(
    served: Served,
) -> None:
    other = served.token("manage_workflows", tenant="other")

    def large(token: str) -> Answer:
        """No workflow, and a body that takes room until it is answered."""
        return served.ask("POST", "/api/v1/workflows", b" " * MIB, token=token)

    def answered(status: int, token: str = served.admin) -> Answer:
        """Once all of the others have come, or have left."""
        answers: list[Answer] = []

        def comes() -> bool:
            answers.append(large(token))
            return answers[-1].status == status

        until(comes, f"never {status}")
        return answers[-1]

    with ExitStack() as stack:
        for _ in range(2 * BYTES_MAX // (4 * MIB)):
            stack.enter_context(half_workflow(served, served.admin, 4 * MIB))
        refused = answered(503)
        assert refused.code == "SERVER_BUSY"
        assert int(refused.headers["retry-after"]) > 0
        assert large(other).status == 400
        assert served.ask("POST", "/api/v1/workflows", b"{}", token=served.admin).status == 400
        # Nobody's fault that an operator should hear of, however often: the room tells once.
        assert {line["level"] for line in busy(served)} == {"info"}
        # Two of them fill all of it, and leave others theirs too.
        for _ in range(BYTES_MAX // (4 * MIB)):
            stack.enter_context(half_workflow(served, other, 4 * MIB))
        answered(503, other)
        third = served.token("manage_workflows", tenant="third")
        assert large(third).status == 400
    answered(400)


def busy(served: Served) -> list[dict[str, Any]]:
    """The log lines of requests for which there was no room."""

    def found(lines: list[str]) -> list[dict[str, Any]]:
        forms = [json.loads(line) for line in lines if line.startswith("{")]
        return [form for form in forms if form.get("code") == "server_busy"]

    return found(served.logged(lambda lines: bool(found(lines))))


ADDRESSES = ("127.0.0.1", "127.0.0.2")
STALLED = 100  # connections of each
SENT_BYTES = 192 << 10  # by each of these, of 256 KiB: together more than strangers may have


def stalled_call(served: Served, address: str) -> socket.socket:
    """A call of a webhook that does not exist, whose rest never comes."""
    sock = socket.create_connection(
        ("127.0.0.1", served.port), timeout=ANSWER_S, source_address=(address, 0)
    )
    head = f"POST /api/v1/webhooks/x HTTP/1.1\r\nHost: a\r\nContent-Length: {256 << 10}\r\n\r\n"
    sock.sendall(head.encode() + bytes(SENT_BYTES))
    return sock


def test_who_sends_what_comes_to_its_end_is_served_among_strangers_who_fill_the_room(
    served: Served,
) -> None:
    key = b"whsec"
    subprocess.run(
        [sys.executable, "-m", "cas", "secret", "set", "tool"],
        env=served.environ, cwd=CHECKOUT, input=key, check=True, capture_output=True,
    )  # fmt: skip
    asked = json.dumps({"name": "tool", "kind": "github", "secret_id": "tool"})
    made = served.ask("POST", "/api/v1/webhooks", asked, token=served.admin).form

    def call(number: int) -> int:
        body = json.dumps([number, "x" * (200 << 10)]).encode()
        signature = "sha256=" + hmac.new(key, body, "sha256").hexdigest()
        url = f"/api/v1/webhooks/{made['webhook_id']}"
        return served.ask("POST", url, body, headers={"X-Hub-Signature-256": signature}).status

    with ExitStack() as stack:
        stalled = [
            stack.enter_context(stalled_call(served, address))
            for _ in range(STALLED)
            for address in ADDRESSES
        ]

        def answered() -> list[socket.socket]:
            return select.select(stalled, (), (), 0)[0]

        # Those that were the first to come make way for the last of them.
        kept = BYTES_MAX // 2 // SENT_BYTES
        until(lambda: len(answered()) >= len(stalled) - kept, "none of them gave way")
        assert b"408" in {read_head(sock)[0].split()[1] for sock in answered()}
        assert [call(number) for number in range(10)] == [200] * 10


def test_who_leaves_in_a_body_that_nobody_wanted_is_no_fault_of_the_server(
    served: Served,
) -> None:
    for end in (socket.SHUT_WR, socket.SHUT_RDWR):
        with served.connect() as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
            head, body = read_head(sock)
            assert head.startswith(b"HTTP/1.1 200")
            sock.shutdown(end)
            while end == socket.SHUT_WR and (data := sock.recv(MIB)):
                body += data
            assert b"HTTP/1.1" not in body  # no second answer, to no second request
    assert served.ask("GET", "/healthz").status == 200
    assert not [line for line in served.logged() if "failed outside the app" in line]


@pytest.mark.slow
def test_a_stop_waits_for_slow_clients_but_not_for_ever(disk_folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__WORKERS="1", GATEWAY__THREADS=str(THREADS)) as server,
        slow_crowd(server, os.urandom(8 * MIB)) as socks,
    ):
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        # Who goes on is served to the end.
        socks[0].sendall(bytes(8 * MIB - 1))
        assert read_head(socks[0])[0].startswith(b"HTTP/1.1 200")
        server.process.wait(timeout=STOP_TIMEOUT_S + ANSWER_S)
    assert time.monotonic() - began < STOP_TIMEOUT_S + ANSWER_S


# --- one reader, without a server


class Reader:
    """Both ends of a TCP connection with small buffers."""

    def __init__(self, pace: Pace) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.theirs = socket.socket()
            self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.theirs.connect(listener.getsockname())
            self.ours, _ = listener.accept()
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.outlet = Outlet(self.ours, nullcontext, lambda: pace)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def fast_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the reader every 10 ms, where the server takes seconds."""
    monkeypatch.setattr("gateway.sending._LOOK_S", 0.01)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_reader_that_stops_is_given_up(
    as_file: bool, fast_looks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gateway.sending.SEND_IDLE_S", 0.1)
    reader = Reader(Pace())
    try:
        with pytest.raises(ReaderTooSlow):
            send(reader, tmp_path, as_file)
    finally:
        reader.close()


@pytest.mark.parametrize("as_file", [False, True])
def test_a_reader_that_trickles_is_given_up(
    as_file: bool, fast_looks: None, tmp_path: Path
) -> None:
    pace = Pace(bytes_per_s_min=1 << 40)  # faster than any
    with pytest.raises(BodyTooSlow):
        pace.moved(0, PATIENCE_S + 1)  # now its patience is spent
    reader = Reader(pace)
    ended = threading.Event()

    def trickle() -> None:
        while not ended.is_set():
            if select.select([reader.theirs], [], [], 0.01)[0]:
                reader.theirs.recv(16)

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(ReaderTooSlow):
            send(reader, tmp_path, as_file)
    finally:
        ended.set()
        thread.join()
        reader.close()


def test_a_slow_reader_gets_every_byte(fast_looks: None, tmp_path: Path) -> None:
    reader = Reader(Pace())
    data = os.urandom(MIB)
    path = tmp_path / "file"
    path.write_bytes(data)
    received = bytearray()

    def read() -> None:
        while len(received) < 2 * len(data):
            received.extend(reader.theirs.recv(1000))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        reader.outlet.send(data, more=True)
        with path.open("rb") as file:
            reader.outlet.send_file(file.fileno(), 0, len(data))
        thread.join()
    finally:
        reader.close()
    assert bytes(received) == data + data


def send(reader: Reader, folder: Path, as_file: bool) -> None:
    if not as_file:
        reader.outlet.send(bytes(8 * MIB))
        return
    path = folder / "large"
    path.write_bytes(bytes(8 * MIB))
    with path.open("rb") as file:
        reader.outlet.send_file(file.fileno(), 0, 8 * MIB)


def test_a_file_shorter_than_announced_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    reader = Reader(Pace())
    path = tmp_path / "short"
    path.write_bytes(b"short")
    try:
        with path.open("rb") as file, pytest.raises(EOFError):
            reader.outlet.send_file(file.fileno(), 0, 6)
    finally:
        reader.close()
