"""Workers are replaced under load, and no client notices."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from urllib.parse import quote

import pytest

from tests.gateway.served import ALONE, Served, serving, until

RELOADS = 3
PATIENCE_S = 60.0
RESTED_S_MAX = 1.0  # half of what a stopping worker keeps a connection for; a busy machine rests


def serving_pids(served: Served) -> set[int]:
    """The processes that answer requests; the server may have others."""
    found = set()
    for pid in served.workers():
        try:
            if b"replicate" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
        except OSError:
            continue  # it has ended just now
    return found


@final
@dataclass
class Load:
    """Clients that store and fetch without a pause, and remember what went wrong."""

    served: Served
    stop: threading.Event = field(default_factory=threading.Event)
    failures: list[str] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    asked_at: dict[int, float] = field(default_factory=dict)

    def ask(
        self, connection: http.client.HTTPConnection, method: str, url: str, body: bytes | None
    ) -> bytes:
        headers = {"Authorization": f"Bearer {self.served.admin}"}
        now = time.monotonic()
        before = self.asked_at.pop(id(connection), now)
        if connection.sock is None or now - before > RESTED_S_MAX:
            connection.close()  # a server may end a connection that rests
            before = now
        try:
            try:
                connection.request(method, url, body, headers)
            finally:
                sent_at = time.monotonic()
            response = connection.getresponse()
        except ConnectionError:
            # So it may where this thread rested between that look and the sending.
            if before == now or sent_at - before <= RESTED_S_MAX:
                raise
            connection.close()
            return self.ask(connection, method, url, body)
        data = response.read()
        if response.status not in (200, 201):
            raise http.client.HTTPException(f"{response.status} {data!r}")
        self.answered.append(response.status)
        self.asked_at[id(connection)] = now
        return data

    def client(self, number: int, kept_alive: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=60)
        turn = 0
        while not self.stop.is_set():
            turn += 1
            try:
                self.once(connection, b"%d-%d" % (number, turn))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{kept_alive=}: {error!r}")
                connection.close()
            if not kept_alive:
                connection.close()
        connection.close()

    def once(self, connection: http.client.HTTPConnection, data: bytes) -> None:
        made = json.loads(self.ask(connection, "POST", "/api/v1/storage?name=load", data))
        ref = quote(made["storage_ref"], safe="")
        if self.ask(connection, "GET", f"/api/v1/storage/{ref}", None) != data:
            raise http.client.HTTPException("other bytes")


@final
class SlowUpload:
    """A body whose second half comes when the test wants it."""

    def __init__(self, served: Served) -> None:
        self._data = os.urandom(200_000)
        self._connection = served.connect()
        self._connection.sendall(
            b"POST /api/v1/storage?name=slow HTTP/1.1\r\nHost: a\r\n"
            b"Authorization: Bearer %s\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n"
            % (served.admin.encode(), len(self._data))
        )
        # Not before a thread has the request is it in flight.
        assert self._connection.recv(4096).startswith(b"HTTP/1.1 100")
        self._connection.sendall(self._data[:100_000])

    def cut_off(self) -> bool:
        """Whether the connection has ended without an answer."""
        try:
            return self._connection.recv(1) == b""
        except ConnectionError:
            return True

    def abandon(self) -> None:
        self._connection.close()

    def finish(self) -> dict[str, Any]:
        self._connection.sendall(self._data[100_000:])
        with self._connection as connection:
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 201
            form = json.loads(response.read())
        assert form["checksum_sha256"] == hashlib.sha256(self._data).hexdigest()
        assert isinstance(form, dict)
        return form


@pytest.mark.slow
def test_no_request_fails_while_workers_are_replaced(root: Path) -> None:
    with serving(root) as server:
        load = Load(server)
        clients = [
            threading.Thread(target=load.client, args=(number, number % 3 != 0))
            for number in range(6)
        ]
        for client in clients:
            client.start()
        try:
            for _ in range(RELOADS):
                before = serving_pids(server)
                slow = SlowUpload(server)
                counted = len(load.answered)
                server.process.send_signal(signal.SIGHUP)
                until(lambda old=before: bool(serving_pids(server) - old), "no new workers")  # type: ignore[misc]
                until(lambda n=counted: len(load.answered) > n + 50, "no answers")  # type: ignore[misc]
                slow.finish()  # its old worker waited for it
                until(lambda old=before: not serving_pids(server) & old, "the old workers stay")  # type: ignore[misc]
        finally:
            load.stop.set()
            for client in clients:
                client.join(PATIENCE_S)
        assert load.failures == []
        assert len(load.answered) > 200
        levels = [json.loads(line)["level"] for line in server.logged()]
        assert "error" not in levels


# A stop that waits for a second only, so that a test can outlast it.
_HASTY = "import gateway.wsgi; gateway.wsgi.STOP_TIMEOUT_S = 1; import cas.cli; cas.cli.main()"


@pytest.mark.slow
def test_an_upload_goes_on_across_a_reload_for_longer_than_a_stop_waits(root: Path) -> None:
    with serving(root, program=("-c", _HASTY), GATEWAY__WORKERS="1") as server:
        first, second = SlowUpload(server), SlowUpload(server)
        before = serving_pids(server)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: bool(serving_pids(server) - before), "no new worker")
        after = serving_pids(server) - before
        # A replaced worker does not count as one that serves.
        os.kill(after.pop(), signal.SIGKILL)
        until(lambda: bool(serving_pids(server) - before - after), "no other worker")
        time.sleep(3.0)  # longer than a stop would wait
        assert serving_pids(server) & before
        first.finish()
        server.process.send_signal(signal.SIGTERM)  # that one is not waited for
        server.process.wait(timeout=PATIENCE_S)
        assert second.cut_off()  # had it been, it would be told that it is too slow
        second.abandon()


def test_an_idle_connection_that_is_used_while_its_worker_stops_is_answered(root: Path) -> None:
    with serving(root, GATEWAY__WORKERS="1") as server:
        while not _answered_while_its_worker_stops(server):
            pass  # this test rested for longer than a stopping worker waits


def _answered_while_its_worker_stops(server: Served) -> bool:
    """False where nothing is told, as so much time went by between two requests."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    asked_at = time.monotonic()
    assert not _said_close(connection)
    before = serving_pids(server)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: bool(serving_pids(server) - before), "no new worker")
    try:
        while not _said_close(connection):
            asked_at = time.monotonic()
    except ConnectionError:
        assert time.monotonic() - asked_at > RESTED_S_MAX
        return False
    finally:
        connection.close()
    return True


@pytest.mark.slow
def test_a_restart_refuses_nobody_where_systemd_holds_the_socket(root: Path) -> None:
    """As `deploy/blobcask.socket` does: who comes meanwhile waits in the socket's queue."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with serving(root, ALONE, listener) as server:
            assert server.port == listener.getsockname()[1]
            load = Load(server)
            clients = [
                threading.Thread(target=load.client, args=(number, False)) for number in range(3)
            ]
            for client in clients:
                client.start()
            until(lambda: len(load.answered) > 20, "no answers")
        try:
            counted = len(load.answered)
            with serving(root, ALONE, listener):
                until(lambda: len(load.answered) > counted + 20, "no answers")
                load.stop.set()
                for client in clients:
                    client.join(PATIENCE_S)
        finally:
            load.stop.set()
        assert load.failures == []


def _said_close(connection: http.client.HTTPConnection) -> bool:
    """Ask once more on the same connection: the answer must come, and in the end say close."""
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200
    return answer.headers["Connection"] == "close"


def test_systemd_is_told_when_the_server_is_ready(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root.parent / f"{root.name}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        told.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        try:
            with serving(root):
                assert told.recv(4096).startswith(b"READY=1\n")
        finally:
            path.unlink()
