"""`/metrics`: right across processes, bounded in labels, for those alone who may see it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import falcon.testing
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cas.alone import Alone
from cas.beats import write_beat
from cas.catalog import Transaction
from cas.clock import SECOND_US
from cas.config import Settings
from cas.digest import Digest
from cas.records import COMPLETED, QUEUED, RUNNING, WAITING, Blob, Mark, Record, Run
from cas.references import parse_reference
from cas.runner import PLACE, STATUS, RunnerBeat
from cas.store import Store
from cas.totals import miscounted_totals
from cas.vitals import vitals_of
from gateway.addresses import client_address
from gateway.board import Board, Meter
from gateway.logs import Answered
from tests.clocks import HandClock
from tests.conftest import CHECKOUT
from tests.gateway.served import WITH_RUNNER, Served, serving

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
PATIENCE_S = 60.0


def samples(served: Served, **headers: str) -> Samples:
    answer = served.ask("GET", "/metrics", headers=headers)
    assert answer.status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((f"blobcask_{name}", tuple(sorted(labels.items()))), 0.0)


def eventually(read: Callable[[], Any], wanted: Any) -> None:
    """A request is counted when it is over, which its client may know before."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := read()) != wanted:
        assert time.monotonic() < deadline, f"{found} is not {wanted}"


def test_every_process_is_counted(served: Served) -> None:
    labels = {"route": "/healthz", "method": "GET", "status": "2xx"}

    def counted() -> float:
        return value(samples(served), "requests_total", **labels)

    before = counted()
    for _ in range(50):  # new connections: both workers get some
        served.ask("GET", "/healthz")
    eventually(counted, before + 50)
    eventually(
        lambda: value(samples(served), "request_seconds_count", route="/healthz"), before + 50
    )
    found = samples(served)
    assert value(found, "workers") == 2
    assert value(found, "in_flight") >= 1  # this one


def test_counts_survive_a_worker_that_is_killed(root: Path) -> None:
    with serving(root, GATEWAY__WORKERS="1") as server:
        labels = {"route": "/healthz", "method": "GET", "status": "2xx"}
        for _ in range(5):
            server.ask("GET", "/healthz")

        def counted() -> float:
            return value(samples(server), "requests_total", **labels)

        eventually(counted, 5)
        (victim,) = workers(server)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim in workers(server), False)
        server.ask("GET", "/healthz")
        eventually(counted, 6)
        found = samples(server)
        assert value(found, "worker_starts_total") == 2
        assert value(found, "workers") == 1
        # Itself; the request before it may have been answered and not have ended.
        eventually(lambda: value(samples(server), "in_flight"), 1)


def workers(served: Served) -> list[int]:
    """The processes that answer requests; the server may have others."""
    found = []
    for pid in served.workers():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"replicate" not in words:
            found.append(pid)
    return found


def test_bytes_and_commits_are_counted(root: Path) -> None:
    with serving(root) as server:
        data = os.urandom(100_000)
        for name in ("a", "b"):
            url = f"/api/v1/storage?name={name}&filename={name}.bin&run={name}"
            assert server.ask("POST", url, data, token=server.admin).status == 201
        route = "/api/v1/storage"
        eventually(
            lambda: value(samples(server), "request_bytes_total", route=route), 2 * len(data)
        )
        # Carried over after the request was counted.
        eventually(lambda: value(samples(server), "commit_writes_total") >= 2, True)
        found = samples(server)
        assert 1 <= value(found, "commit_groups_total") <= value(found, "commit_writes_total")
        # The same bytes twice: what deduplication saves.
        assert (value(found, "logical_bytes"), value(found, "logical_files")) == (200_000, 2)
        assert (value(found, "stored_bytes"), value(found, "stored_blobs")) == (100_000, 1)
        assert (value(found, "evicted_bytes"), value(found, "evicted_blobs")) == (0, 0)
        assert value(found, "uploads_pending") == 1  # the first link of a new store
        assert value(found, "events_held_bytes") == 0
        assert value(found, "free_bytes") > 0
        assert value(found, "free_inodes") > 0
        assert value(found, "journal_seq") > 0
        assert value(found, "oldest_reader_commits") == 0
        waiting = {name[1][0][1] for name in found if name[0] == "blobcask_waiting"}
        assert {"deliveries", "deliveries_failed", "blobs_to_collect", "blobs_missing"} <= waiting


def test_no_label_is_a_clients_choice(served: Served) -> None:
    for path in ("/no/such/thing-1", "/u/abcdefgh", "/api/v1/uploads/zzzzzzzz/info", "/static/x/y"):
        served.ask("GET", path)
    served.ask("BREW", "/healthz")
    answer = served.ask("GET", "/metrics")
    text = answer.body.decode()
    for chosen in ("thing-1", "abcdefgh", "zzzzzzzz", "BREW"):
        assert chosen not in text
    eventually(
        lambda: (
            value(samples(served), "requests_total", route="none", method="GET", status="4xx") >= 1
        ),
        True,
    )


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", b"BREW /x HTTP/1.1\r\nHost: a\r\n\r\n", b"x" * 70_000]
)
def test_what_is_no_request_is_counted_and_logged_once(root: Path, sent: bytes) -> None:
    with serving(root) as server:
        for _ in range(3):
            with server.connect() as connection:
                connection.sendall(sent)
                assert connection.recv(4096).startswith(b"HTTP/1.1 ")

        def counted() -> float:
            return sum(
                value(
                    samples(server), "requests_total", route="none", method="other", status=status
                )
                for status in ("4xx", "5xx")
            )

        eventually(counted, 3)

        def told(log: list[str]) -> list[str]:
            return [line for line in log if '"no request"' in line]

        lines = told(server.logged(lambda log: bool(told(log))))
        assert len(lines) <= 2  # one of each worker
        assert all('"address": "127.0.0.1"' in line for line in lines)


def test_a_field_of_a_route_is_shown_by_its_name(served: Served) -> None:
    served.ask("GET", "/api/v1/uploads/abcdefgh/files/0")
    route = "/api/v1/uploads/{token}/files/{index}"
    eventually(
        lambda: value(samples(served), "request_seconds_count", route=route) >= 1,
        True,
    )
    assert b"int(" not in served.ask("GET", "/metrics").body


def test_the_form_is_what_a_scraper_asks_for(served: Served) -> None:
    plain = served.ask("GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    accepted = {"Accept": "application/openmetrics-text; version=1.0.0"}
    modern = served.ask("GET", "/metrics", headers=accepted)
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.body.endswith(b"# EOF\n")


def test_others_are_told_that_there_is_nothing(root: Path) -> None:
    with serving(
        root, GATEWAY__METRICS_FROM="10.9.0.0/16", GATEWAY__TRUSTED_PROXIES="127.0.0.1"
    ) as server:
        unknown = server.ask("GET", "/no-such-page")
        refused = server.ask("GET", "/metrics")
        assert (refused.status, refused.body) == (404, unknown.body)
        for forwarded, status in (
            ("10.9.1.1", 200),
            ("10.8.1.1", 404),
            ("10.9.1.1, 8.8.8.8", 404),  # what stands before a stranger, the stranger wrote
            ("8.8.8.8, 10.9.1.1", 200),
            ("nonsense", 404),
        ):
            headers = {"X-Forwarded-For": forwarded}
            assert server.ask("GET", "/metrics", headers=headers).status == status, forwarded


def test_a_proxy_that_nobody_named_does_not_lend_its_address(served: Served) -> None:
    assert served.ask("GET", "/metrics").status == 200
    for header in ("X-Forwarded-For", "Forwarded", "Via"):
        assert served.ask("GET", "/metrics", headers={header: "127.0.0.1"}).status == 404


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.1", "10.0.0.1", "192.0.2.1"),  # a stranger's word
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "192.0.2.9", "192.0.2.9"),
        ("10.0.0.1", "192.0.2.9, 10.0.0.2", "192.0.2.9"),
        ("10.0.0.1", "1.1.1.1, 192.0.2.9, 10.0.0.2", "192.0.2.9"),
        ("10.0.0.1", "bad, 10.0.0.2", "10.0.0.2"),
        ("::ffff:10.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("", "192.0.2.9", "192.0.2.9"),  # a Unix socket
        ("", "", None),
    ],
)
def test_the_client_is_whom_the_last_trusted_proxy_names(
    peer: str, forwarded: str, client: str | None
) -> None:
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": forwarded}
    found = client_address(environ, (ip_network("10.0.0.0/8"),))
    assert found == (None if client is None else ip_address(client))


def test_a_successor_counts_on_where_a_worker_ended(root: Path) -> None:
    """The rows of the board are handed on, so their number and the counts stay right."""
    board = Board(slots=3)
    with Store.open(root) as store:
        for generation in range(1, 6):
            slots = [board.take(), board.take()]
            for slot in slots:
                meter = Meter(board, slot, store)
                meter.know_routes(["/x"])
                meter.began()
                environ = falcon.testing.create_environ("/x")
                meter.ended(Answered(environ, None, 0.001))
            assert sum(board.totals()[:3072]) == 2 * generation
            for slot in slots:
                board.give_back(slot)


def insert_all(records: Sequence[Record], txn: Transaction) -> None:
    for record in records:
        txn.insert(record)


def test_many_blobs_are_counted_and_not_estimated(root: Path) -> None:
    blobs = [
        Blob(Digest(hashlib.sha256(b"%d" % n).digest()), n % 100, bytes(32), n, 0, 0, local=n > 9)
        for n in range(2_000)
    ]
    with Store.open(root) as store:
        assert vitals_of(store).stored_blobs == 0
        store.catalog.write(partial(insert_all, blobs), actor="test")
        found = vitals_of(store)
    assert (found.stored_blobs, found.evicted_blobs, found.evicted_bytes) == (1_990, 10, 45)
    assert found.stored_bytes == sum(blob.size_bytes for blob in blobs) - 45


def test_what_waits_is_counted_with_its_age(root: Path, clock: HandClock) -> None:
    with Store.open(root, Settings(), clock=clock) as store:
        files = store.files("acme", "ada")
        stored = files.put(b"bytes", name="a", filename="a.txt")
        files.delete(parse_reference(stored.storage_ref))
        assert vitals_of(store).queues["blobs_to_collect"].count == 0
        clock.advance(25 * 3600 * 1_000_000)
        queue = vitals_of(store).queues["blobs_to_collect"]
        assert (queue.count, round(queue.oldest_s)) == (1, 3600)


def test_open_runs_are_counted_with_the_age_of_the_one_that_waits(
    root: Path, clock: HandClock
) -> None:
    with Store.open(root, Settings(), clock=clock) as store:
        began_us = clock.now_us()
        states = [QUEUED, QUEUED, RUNNING, WAITING, WAITING, WAITING]
        runs = [
            Run(f"run-{number}", "acme", "one", status, began_us + number, "ada")
            for number, status in enumerate(states)
        ]
        ended = Run("run-9", "acme", "one", COMPLETED, began_us, "ada", open=None)
        store.catalog.write(partial(insert_all, [*runs, ended]), actor="test")
        clock.advance(3600 * SECOND_US)
        vitals = vitals_of(store)
        assert vitals.runs == {QUEUED: 2, RUNNING: 1, WAITING: 3}
        queue = vitals.queues["runs_queued"]
        assert (queue.count, round(queue.oldest_s)) == (2, 3600)
        first = msgspec.structs.replace(runs[0], status=COMPLETED, open=None)
        store.catalog.write(lambda txn: txn.replace(first), actor="test")
        vitals = vitals_of(store)
        assert (vitals.runs[QUEUED], vitals.queues["runs_queued"].count) == (1, 1)
        assert miscounted_totals_of(store) == []


def miscounted_totals_of(store: Store) -> list[Any]:
    with store.catalog.read() as snapshot:
        return list(miscounted_totals(snapshot))


def test_the_runner_is_told(root: Path, clock: HandClock) -> None:
    with Store.open(root, Settings(), clock=clock) as store:
        vitals = vitals_of(store)
        assert (vitals.runner_up, vitals.runner_silent_seconds) == (0, None)
        beat = RunnerBeat(
            1, 0, clock.now_us(), runs=7, steps=2, oldest_step_us=5 * SECOND_US, late=4
        )
        write_beat(root / STATUS, beat)
        clock.advance(3 * SECOND_US)
        place = Alone(root / PLACE)
        try:
            assert place.take()
            vitals = vitals_of(store)
        finally:
            place.close()
        assert (vitals.runner_up, vitals.runner_silent_seconds) == (1, 3.0)
        assert (vitals.runner_runs, vitals.runner_steps) == (7, 2)
        assert (vitals.runner_oldest_step_seconds, vitals.runner_late_calls) == (5.0, 4)
        vitals = vitals_of(store)
        assert (vitals.runner_up, vitals.runner_steps) == (0, None)  # what was at work is not


def test_a_server_tells_of_the_runner_beside_it(root: Path) -> None:
    with serving(root, WITH_RUNNER) as server:
        eventually(lambda: value(samples(server), "runner_up"), 1.0)
        found = samples(server)
        assert {name[1] for name in found if name[0] == "blobcask_runs"} == {
            (("status", "queued"),), (("status", "running"),), (("status", "waiting"),)
        }  # fmt: skip
        assert ("blobcask_waiting_seconds", (("what", "runs_queued"),)) in found
        eventually(lambda: ("blobcask_runner_silent_seconds", ()) in samples(server), True)
        assert value(samples(server), "runner_steps") == 0


def test_an_old_reader_is_told_and_a_dead_one_lets_go(root: Path) -> None:
    """A forgotten read transaction keeps every page since, and a killed one its slot."""
    with Store.open(root) as store:
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER, str(root)],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        for number in range(3):
            mark = Mark(f"mark-{number}", "")
            store.catalog.write(partial(insert_all, [mark]), actor="test")
        assert vitals_of(store).oldest_reader_commits >= 3
        reader.kill()
        reader.wait()
        reader.stdout.close()
        vitals = vitals_of(store)
        assert (vitals.dead_readers, vitals.oldest_reader_commits) == (1, 0)


_READER = """
import sys, time
from pathlib import Path
from cas.store import Store
from cas.totals import miscounted_totals

with Store.open(Path(sys.argv[1])) as store, store.catalog.read():
    print("reading", flush=True)
    time.sleep(600)
"""
