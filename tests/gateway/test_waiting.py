"""Waiting for events over HTTP: long, by many at once, and without a thread for each."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import falcon.testing
import pytest

from cas.config import Settings, StoreSettings
from cas.keys import load_keys
from cas.store import Store
from gateway.app import create_app
from gateway.auth import EMIT_EVENTS, WAIT_EVENTS, Tokens
from gateway.parking import CAN_PARK, PARKED, RESUMED
from gateway.worker import EARLY_BYTES_MAX
from tests.gateway.served import ANSWER_S, Served, serving, until
from workflows.views import Workflows

HERE = "/api/v1/events/default"
WAIT = f"{HERE}/wait?event_name="
LONG = "&timeout=60"
# Of an event to its waiter, well before a poll of LONG would end; `bench/waking.py` measures
# what it really takes.
WAKE_S = 30.0


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One worker with one thread: whoever held it would stop everybody."""
    folder = tmp_path_factory.mktemp("narrow")
    with serving(folder, GATEWAY__WORKERS="1", GATEWAY__THREADS="1") as server:
        yield server


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


class Waiter:
    """A client on a connection of its own that waits for an answer."""

    def __init__(
        self, served: Served, query: str, token: str | None = None, tenant: str = "default"
    ) -> None:
        self.sock = served.connect()
        self.wait = f"/api/v1/events/{tenant}/wait?event_name="
        self.token = token or served.admin
        self.query = query
        # One for all answers: it may hold the beginning of the next.
        self.answers = self.sock.makefile("rb")
        self.ask(query)

    def ask(self, query: str) -> None:
        """Send the request; what comes back is left for `form`."""
        head = f"GET {self.wait}{query} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {self.token}"
        self.sock.sendall(f"{head}\r\n\r\n".encode())

    def form(self, status: int = 200) -> dict[str, Any]:
        line = self.answers.readline()
        headers = http.client.parse_headers(self.answers)
        form = json.loads(self.answers.read(int(headers["Content-Length"])))
        assert int(line.split()[1]) == status, form
        assert isinstance(form, dict)
        return form

    def silent(self) -> bool:
        """Whether no answer has come."""
        return not select.select([self.sock], [], [], 0)[0]

    def __enter__(self) -> Waiter:
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.close()
        self.sock.close()


def post(served: Served, name: str, payload: Any = None, **members: Any) -> int:
    """How many got the event."""
    body = json.dumps({"event_name": name, "payload": payload, **members})
    answer = served.ask("POST", HERE, body, token=served.admin)
    if answer.status == 404:
        return 0
    assert answer.status == 200, answer.body
    return int(answer.form["delivered_to"])


def begin(served: Served, query: str) -> dict[str, Any]:
    """Begin a named wait, which then goes on, or look at it."""
    answer = served.ask("GET", f"{WAIT}{query}&timeout=0", token=served.admin)
    assert answer.status == 200, answer.body
    return answer.form


def waiting(served: Served) -> int:
    """How many requests wait, as the server counts."""
    text = served.ask("GET", "/metrics").body.decode()
    found = re.search(r"^blobcask_event_waiters ([0-9.]+)$", text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def parked(served: Served, waiter: Waiter) -> bool:
    """Whether it is counted; it asks again where a short wait was over before anybody looked."""
    if not waiter.silent():
        waiter.form()
        waiter.ask(waiter.query)
    return waiting(served) == 1


# --- one waiter


def test_an_event_wakes_who_waits_for_it(narrow: Served, stack: ExitStack) -> None:
    begin(narrow, "woken&waiter=woken")
    waiter = stack.enter_context(Waiter(narrow, f"woken&waiter=woken{LONG}"))
    until(lambda: waiting(narrow) == 1)
    assert waiter.silent()
    began = time.monotonic()
    assert post(narrow, "woken", {"n": 1}) == 1
    form = waiter.form()
    assert time.monotonic() - began < WAKE_S
    assert (form["status"], form["payload"]) == ("delivered", {"n": 1})
    until(lambda: waiting(narrow) == 0)


def test_an_event_of_another_process_wakes_too(root: Path, stack: ExitStack) -> None:
    with serving(root, GATEWAY__WORKERS="1") as server:
        begin(server, "far&waiter=far")
        waiter = stack.enter_context(Waiter(server, f"far&waiter=far{LONG}"))
        until(lambda: waiting(server) == 1)
        settings = Settings(store=StoreSettings(root=root))
        with Store.open(root, settings) as store:
            workflows = Workflows(store, load_keys(settings))
            workflows.events("default", "tester").emit("far", "hello")
            assert waiter.form()["payload"] == "hello"
            workflows.close()


def test_who_waits_in_vain_is_told_when_the_time_is_over(narrow: Served, stack: ExitStack) -> None:
    began = time.monotonic()
    waiter = stack.enter_context(Waiter(narrow, "vain&timeout=1"))
    form = waiter.form()
    assert form["status"] == "timeout"
    assert 1.0 <= time.monotonic() - began < 1.0 + WAKE_S


def test_what_comes_between_two_polls_is_not_lost(narrow: Served, stack: ExitStack) -> None:
    name = "between"
    first = stack.enter_context(Waiter(narrow, f"between&waiter={name}&timeout=1"))
    assert first.form()["waiter"] == name
    assert post(narrow, "between", 7) == 1
    second = stack.enter_context(Waiter(narrow, f"between&waiter={name}{LONG}"))
    third = stack.enter_context(Waiter(narrow, f"between&waiter={name}{LONG}"))
    told, told_again = second.form(), third.form()
    assert told == told_again
    assert (told["status"], told["payload"]) == ("delivered", 7)


def test_a_connection_that_waited_serves_further_requests(narrow: Served, stack: ExitStack) -> None:
    waiter = stack.enter_context(Waiter(narrow, "first&timeout=1"))
    waiter.ask("second&timeout=1")  # at once: it has to wait for its turn
    waiter.ask("third&timeout=0")
    assert [waiter.form()["status"] for _ in range(3)] == ["timeout"] * 3


def test_a_request_that_comes_in_parts_while_another_waits_is_whole(
    narrow: Served, stack: ExitStack
) -> None:
    waiter = stack.enter_context(Waiter(narrow, "whole&timeout=1"))
    until(lambda: parked(narrow, waiter))
    head = last_request(4000)
    waiter.sock.sendall(head[:1])
    waiter.sock.sendall(head[1:6])
    until(lambda: waiting(narrow) == 0)  # so that a part was there before the answer
    for start in range(6, len(head), 1000):
        waiter.sock.sendall(head[start : start + 1000])
    assert timeout_and_health(waiter)


def test_who_sends_much_while_it_waits_is_answered_at_once(
    narrow: Served, stack: ExitStack
) -> None:
    waiter = stack.enter_context(Waiter(narrow, f"much{LONG}"))
    until(lambda: waiting(narrow) == 1)
    began = time.monotonic()
    waiter.sock.sendall(last_request(EARLY_BYTES_MAX))
    assert timeout_and_health(waiter)
    assert time.monotonic() - began < WAKE_S


def last_request(length: int) -> bytes:
    """The last one of a connection, of at least so many bytes."""
    head = f"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Long: {'x' * length}"
    return f"{head}\r\n\r\n".encode()


def timeout_and_health(waiter: Waiter) -> bool:
    """Whether all that still comes is these two answers."""
    heard = waiter.answers.read()
    first, second = heard.split(b"HTTP/1.1 200 OK")[1:]
    return b'"timeout"' in first and b'{"status":"ok"}' in second


def test_one_name_may_wait_twice(narrow: Served, stack: ExitStack) -> None:
    """As after a connection that only the client knows to be lost."""
    begin(narrow, "twice&waiter=twice")
    both = [stack.enter_context(Waiter(narrow, f"twice&waiter=twice{LONG}")) for _ in range(2)]
    until(lambda: waiting(narrow) == 2)
    assert post(narrow, "twice") == 1
    first, second = (waiter.form() for waiter in both)
    assert first == second


def test_a_wait_that_is_ended_meanwhile_is_told_so(narrow: Served, stack: ExitStack) -> None:
    waiter = stack.enter_context(Waiter(narrow, f"ended&waiter=ended{LONG}"))
    until(lambda: waiting(narrow) == 1, "it is parked")
    url = f"{HERE}/wait?waiter=ended"
    assert narrow.ask("DELETE", url, token=narrow.admin).status == 204
    told = waiter.form()
    assert (told["status"], told["ended"]) == ("timeout", True)
    assert post(narrow, "ended") == 0


def test_a_poll_is_not_told_what_its_name_waits_for_since(narrow: Served, stack: ExitStack) -> None:
    waiter = stack.enter_context(Waiter(narrow, f"alpha&correlation_key=k1&waiter=turns{LONG}"))
    until(lambda: waiting(narrow) == 1, "it is parked")
    url = f"{HERE}/wait?waiter=turns"
    assert narrow.ask("DELETE", url, token=narrow.admin).status == 204
    since = "beta&correlation_key=k2&waiter=turns"
    begin(narrow, since)
    assert post(narrow, "beta", "of beta", correlation_key="k2") == 1
    told = waiter.form()
    assert (told["status"], told["ended"]) == ("timeout", True)
    assert "payload" not in told
    assert begin(narrow, since)["payload"] == "of beta"


def test_events_for_one_run_wake_that_run(narrow: Served, stack: ExitStack) -> None:
    begin(narrow, "of-run&waiter=a&run=r1")
    begin(narrow, "of-run&waiter=a&run=r2")
    assert post(narrow, "of-run") == 2


def test_a_run_that_comes_to_wait_sends_a_client_away(root: Path, stack: ExitStack) -> None:
    with serving(root, GATEWAY__WORKERS="1") as server:
        query = "keyed&correlation_key=k&waiter=me"
        begin(server, query)
        waiter = stack.enter_context(Waiter(server, f"{query}{LONG}"))
        until(lambda: waiting(server) == 1)
        settings = Settings(store=StoreSettings(root=root))
        with Store.open(root, settings) as store:
            workflows = Workflows(store, load_keys(settings))
            workflows.events("default", "runner").subscribe("run-1", "pay", "keyed", "k")
            workflows.close()
        assert waiter.form()["status"] == "timeout"
        again = server.ask("GET", f"{WAIT}{query}&timeout=0", token=server.admin)
        assert (again.status, again.code) == (409, "SUBSCRIPTION_TAKEN")


# --- no thread


def test_waiters_hold_no_thread(narrow: Served, stack: ExitStack) -> None:
    for number in range(20):
        begin(narrow, f"many&waiter=many-{number}")
    waiters = [
        stack.enter_context(Waiter(narrow, f"many&waiter=many-{number}{LONG}"))
        for number in range(20)
    ]
    until(lambda: waiting(narrow) == 20)
    threads = Path(f"/proc/{narrow.workers()[0]}/task")
    assert len(list(threads.iterdir())) < 20
    url = narrow.request_upload()["presigned_urls"][0]
    assert narrow.ask("PUT", url, b"meanwhile").status == 200
    assert post(narrow, "many", "all") == 20
    assert [waiter.form()["payload"] for waiter in waiters] == ["all"] * 20


# --- clients that leave


def test_a_client_that_leaves_stops_waiting(narrow: Served, stack: ExitStack) -> None:
    key = "left&correlation_key=k"
    with Waiter(narrow, f"{key}{LONG}"):
        until(lambda: waiting(narrow) == 1)
    until(lambda: waiting(narrow) == 0)
    # Nobody knows the name that it was given, so that the key is free.
    until(lambda: narrow.ask("GET", f"{WAIT}{key}&timeout=0", token=narrow.admin).status == 200)


def test_a_client_that_leaves_behind_a_further_byte_stops_waiting(narrow: Served) -> None:
    with Waiter(narrow, f"behind{LONG}") as waiter:
        until(lambda: waiting(narrow) == 1)
        waiter.sock.sendall(b"G")
    until(lambda: waiting(narrow) == 0)


def test_a_named_waiter_that_leaves_may_come_again(narrow: Served, stack: ExitStack) -> None:
    with Waiter(narrow, f"back&waiter=back{LONG}"):
        until(lambda: waiting(narrow) == 1)
    until(lambda: waiting(narrow) == 0)
    assert post(narrow, "back", "kept") == 1
    assert begin(narrow, "back&waiter=back")["payload"] == "kept"


def test_a_client_that_sends_no_more_is_answered_at_once(narrow: Served, stack: ExitStack) -> None:
    waiter = stack.enter_context(Waiter(narrow, f"half{LONG}"))
    until(lambda: waiting(narrow) == 1)
    waiter.sock.shutdown(socket.SHUT_WR)
    assert waiter.form()["status"] == "timeout"


def test_a_client_that_resets_is_let_go_of(narrow: Served) -> None:
    with Waiter(narrow, f"reset{LONG}") as waiter:
        until(lambda: waiting(narrow) == 1)
        linger = (1).to_bytes(4, "little") + bytes(4)
        waiter.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    until(lambda: waiting(narrow) == 0)
    assert narrow.ask("GET", "/healthz").status == 200


# --- what is told of them


def test_a_wait_is_one_line_in_the_log_and_one_request_of_the_limits(
    root: Path, stack: ExitStack
) -> None:
    limits = {"LIMITS__TENANT_REQUESTS": "3/m", "LIMITS__ADDRESS_REQUESTS": "3/m"}
    with serving(root, GATEWAY__WORKERS="1", **limits) as server:
        forms = []
        for number in range(3):
            waiter = stack.enter_context(Waiter(server, f"logged-{number}&timeout=1"))
            forms.append(waiter.form())
        assert [form["status"] for form in forms] == ["timeout"] * 3

        def all_told(lines: list[str]) -> bool:
            return sum("/wait" in line for line in lines) >= 3

        lines = [json.loads(line) for line in server.logged(all_told) if "/wait" in line]
        assert [line["status"] for line in lines] == [200] * 3
        assert all(line["duration_ms"] >= 1000 for line in lines)
        assert all(line["tenant"] == "default" for line in lines)
        assert len({line["request_id"] for line in lines}) == 3


def test_the_request_keeps_its_identifier(narrow: Served) -> None:
    answers = [
        narrow.ask(
            "GET", f"{WAIT}named&timeout={timeout}", token=narrow.admin,
            headers={"X-Request-Id": f"mine-{timeout}"},
        )
        for timeout in (0, 1)
    ]  # fmt: skip
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine-0", "mine-1"]


# --- the cap


def test_no_more_wait_than_there_are_places(root: Path, stack: ExitStack) -> None:
    with serving(root, EVENTS__WAITERS_MAX="2") as server:
        waiters = [stack.enter_context(Waiter(server, f"cap-0{LONG}"))]
        until(lambda: waiting(server) == 1)
        # Half of them are for others.
        greedy = server.ask("GET", f"{WAIT}cap-1", token=server.admin)
        assert (greedy.status, greedy.code) == (503, "TOO_MANY_WAITERS")
        other = server.token(WAIT_EVENTS, tenant="other")
        waiters.append(stack.enter_context(Waiter(server, f"cap-1{LONG}", other, "other")))
        until(lambda: waiting(server) == 2)
        refused = server.ask("GET", f"{WAIT}cap-2", token=server.admin)
        assert (refused.status, refused.code) == (503, "TOO_MANY_WAITERS")
        assert int(refused.headers["retry-after"]) > 0
        until(lambda: post(server, "cap-0") == 1)
        assert waiters[0].form()["status"] == "delivered"
        until(lambda: waiting(server) == 1)
        assert begin(server, "cap-2")["status"] == "timeout"


def test_a_poll_is_cut_to_what_the_server_allows(root: Path, stack: ExitStack) -> None:
    with serving(root, GATEWAY__WORKERS="1", EVENTS__POLL_MAX="1s") as server:
        for query in ("cut&timeout=60", "cut"):
            began = time.monotonic()
            assert stack.enter_context(Waiter(server, query)).form()["status"] == "timeout"
            assert time.monotonic() - began < 30


# --- stopping


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_stops_or_reloads_sends_its_waiters_away_at_once(
    root: Path, stack: ExitStack, how: signal.Signals
) -> None:
    with serving(root) as server:
        waiters = [
            stack.enter_context(Waiter(server, f"stop&waiter=w{number}{LONG}"))
            for number in range(6)
        ]
        until(lambda: waiting(server) == 6)
        began = time.monotonic()
        server.process.send_signal(how)
        forms = [waiter.form() for waiter in waiters]
        assert time.monotonic() - began < WAKE_S
        assert [form["status"] for form in forms] == ["timeout"] * 6
        if how == signal.SIGHUP:
            again = stack.enter_context(Waiter(server, f"stop&waiter=w0{LONG}"))
            until(lambda: waiting(server) == 1)
            assert post(server, "stop") == 6  # their waits went on
            assert again.form()["status"] == "delivered"
        else:
            assert server.process.wait(timeout=ANSWER_S) == 0


def test_a_poll_without_a_name_that_was_killed_keeps_nothing_from_others(
    root: Path, stack: ExitStack
) -> None:
    """Its wait ends with its time: there is no next poll of the same waiter."""
    with serving(root, GATEWAY__WORKERS="1") as server:
        waiter = stack.enter_context(Waiter(server, "killed&correlation_key=k&timeout=1"))
        until(lambda: parked(server, waiter))
        [worker] = server.workers()
        os.kill(worker, signal.SIGKILL)
        until(lambda: server.workers() not in ([worker], []))

        def may_wait() -> bool:
            try:
                answer = server.ask(
                    "GET", f"{WAIT}killed&correlation_key=k&timeout=0", token=server.admin
                )
            except OSError:  # the successor begins
                return False
            assert (answer.status, answer.headers["content-type"]) in (
                (200, "application/json"),
                (409, "application/json"),
            )
            return answer.status == 200

        until(may_wait)
        assert post(server, "killed", 1, correlation_key="k", hold=True) == 0
        query = f"{WAIT}killed&correlation_key=k&timeout=0"
        answer = server.ask("GET", query, token=server.admin)
        assert (answer.form["status"], answer.form["payload"]) == ("delivered", 1)


# --- a client that sends no more


@pytest.mark.parametrize("query", ["half", "half&waiter=half"])
@pytest.mark.parametrize("hold", [False, True])
def test_who_has_closed_its_sending_side_is_told_what_nobody_else_may_have(
    root: Path, query: str, *, hold: bool
) -> None:
    settings = Settings(store=StoreSettings(root=root))
    keys = load_keys(settings)
    with Store.open(root, settings) as store:
        app = create_app(store, settings, keys)
        client = falcon.testing.TestClient(app)
        token = Tokens(keys.jwt, store.about_now_us).issue("default", "ada", ("admin",), 3600)
        headers = {"Authorization": f"Bearer {token}"}

        def ask(**environ: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            env = falcon.testing.create_environ(
                f"{HERE}/wait", query_string=f"event_name={query}&timeout=60", headers=headers
            )
            env.update(environ)
            body = b"".join(app(env, falcon.testing.StartResponseMock()))
            return env, json.loads(body or b"{}")

        parked = ask(**{CAN_PARK: True})[0][PARKED]
        asked = {"event_name": "half", "payload": 1, "hold": hold}
        posted = client.simulate_post(HERE, json=asked, headers=headers)
        assert posted.json["delivered_to"] == 1
        parked.gone = True
        told = ask(**{RESUMED: parked})[1]
        if hold and "waiter" not in query:
            # Nobody can ask for it, and others may have it.
            assert told["status"] == "timeout"
            told = client.simulate_get(
                f"{HERE}/wait", query_string="event_name=half&timeout=0", headers=headers
            ).json
        assert (told["status"], told["payload"]) == ("delivered", 1)


# --- on another server


def test_a_server_that_cannot_park_waits_in_the_thread(root: Path) -> None:
    settings = Settings(store=StoreSettings(root=root))
    keys = load_keys(settings)
    with Store.open(root, settings) as store:
        client = falcon.testing.TestClient(create_app(store, settings, keys))
        tokens = Tokens(keys.jwt, store.about_now_us)
        token = tokens.issue("default", "tester", (EMIT_EVENTS, WAIT_EVENTS), 3600)
        headers = {"Authorization": f"Bearer {token}"}

        def ask(query: str) -> dict[str, Any]:
            answer = client.simulate_get(
                f"{HERE}/wait", query_string=f"event_name={query}", headers=headers
            )
            assert isinstance(answer.json, dict)
            return answer.json

        ask("plain&waiter=plain&timeout=0")
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(ask, "plain&waiter=plain&timeout=30")
            posted = client.simulate_post(HERE, json={"event_name": "plain"}, headers=headers)
            assert posted.json["delivered_to"] == 1
            assert told.result(timeout=ANSWER_S)["event_id"] == posted.json["event_id"]
        assert ask("vain&timeout=1")["status"] == "timeout"


# --- very many


WAITERS = 1000
FOR_ALL = "&timeout=600"  # the first still waits when the last is told


def give(served: Served, number: int) -> None:
    """One that is counted may be about to begin its wait."""
    until(lambda: post(served, "each", number, correlation_key=str(number)) == 1)


@pytest.mark.slow
def test_a_thousand_wait_on_two_workers_while_uploads_go_on(root: Path, stack: ExitStack) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * WAITERS), hard))
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    many = {"GATEWAY__WORKERS": "2", "GATEWAY__THREADS": "8", "EVENTS__POLL_MAX": "10m"}
    with serving(root, **many) as server:
        each = [
            stack.enter_context(Waiter(server, f"each&correlation_key={n}{FOR_ALL}"))
            for n in range(WAITERS // 2)
        ]
        everybody = [
            stack.enter_context(Waiter(server, f"everybody{FOR_ALL}")) for _ in range(WAITERS // 2)
        ]
        until(lambda: waiting(server) == WAITERS)
        ended = threading.Event()

        def upload() -> int:
            count = 0
            while not ended.is_set():
                url = server.request_upload()["presigned_urls"][0]
                assert server.ask("PUT", url, b"x" * 100_000).status == 200
                count += 1
            return count

        with ThreadPoolExecutor(4) as pool:
            uploading = [pool.submit(upload) for _ in range(4)]
            try:
                for _ in range(5):  # not while a commit takes seconds on a busy disk
                    until(lambda: server.ask("GET", "/readyz").status == 200)
                for number, waiter in enumerate(each):
                    give(server, number)
                    if number % 50 == 0:
                        assert waiter.form()["payload"] == number
                told = 0
                while told < len(everybody):
                    told += post(server, "everybody", "all")
                found = [waiter.form()["payload"] for waiter in everybody]
                rest = [w.form()["payload"] for n, w in enumerate(each) if n % 50]
            finally:
                ended.set()
            uploads = [one.result(timeout=120) for one in uploading]
        assert found == ["all"] * len(everybody)
        assert rest == [number for number in range(len(each)) if number % 50]
        assert min(uploads) > 0
        until(lambda: waiting(server) == 0)
