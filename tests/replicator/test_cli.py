"""`blobcask replicate`, `deliveries` and `callbacks` as commands on a real ROOT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from cas.clock import HOUR_US, SystemClock
from cas.deliveries import enqueue
from cas.records import Delivery
from cas.replicas import register
from cas.store import Store
from tests.clocks import HandClock
from tests.conftest import CHECKOUT
from tests.replicator.receivers import receiving, status

ENVIRON = {
    **{name: value for name, value in os.environ.items() if "BLOBCASK" not in name},
    "BLOBCASK_CALLBACKS__ALLOWED_NETWORKS": "127.0.0.0/8",
    "PYTHONWARNINGS": "error",
}
FOUND_WRONG = 11


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "cas", *words, "--root", str(root)]


def blobcask(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, *words), env=ENVIRON, cwd=CHECKOUT, capture_output=True, text=True, timeout=60
    )


@contextmanager
def running(root: Path) -> Iterator[subprocess.Popen[str]]:
    """`replicate run`, up to its first words."""
    process = subprocess.Popen(
        command(root, "replicate", "run"),
        env=ENVIRON,
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def enqueued(root: Path, target: str, tenant_id: str = "default") -> Delivery:
    with Store.open(root) as store:
        return store.catalog.write(
            lambda txn: enqueue(txn, tenant_id, "callback", "u1", target, {"n": 1})
        )


def test_once_sends_what_is_due_and_the_secret_verifies_it(root: Path) -> None:
    with receiving() as receiver:
        delivery = enqueued(root, receiver.url("127.0.0.1"))
        done = blobcask(root, "replicate", "once")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        request = receiver.next()
    made = blobcask(root, "callbacks", "secret")
    assert made.stderr == ""
    (secret,) = made.stdout.split()
    assert Webhook(secret).verify(request.body, dict(request.headers)) == {"n": 1}
    listed = json.loads(blobcask(root, "deliveries", "--json").stdout)["deliveries"]
    assert [(each["delivery_id"], each["status"]) for each in listed] == [
        (delivery.delivery_id, "done")
    ]


def test_failed_deliveries_are_listed_and_sent_again(root: Path) -> None:
    with receiving() as receiver:
        receiver.answers = [status(410)]
        delivery = enqueued(root, receiver.url("127.0.0.1"), "t1")
        assert blobcask(root, "replicate", "once").returncode == 0
        failed = blobcask(root, "deliveries", "--status", "failed", "--tenant", "t1")
        assert delivery.delivery_id in failed.stdout
        assert "answered 410" in failed.stdout
        assert blobcask(root, "deliveries").stdout.count(delivery.delivery_id) == 0

        again = blobcask(root, "deliveries", "resend", delivery.delivery_id, "--json")

        assert json.loads(again.stdout)["deliveries"][0]["status"] == "waiting"
        assert blobcask(root, "replicate", "once").returncode == 0
        sent = [request.headers["webhook-id"] for request in receiver.received]
        assert sent == [delivery.delivery_id] * 2
    unknown = blobcask(root, "deliveries", "resend", "nothing")
    assert (unknown.returncode, unknown.stdout) == (3, "")
    foreign = blobcask(root, "deliveries", "resend", delivery.delivery_id, "--tenant", "t2")
    assert foreign.returncode == 3


def test_a_target_is_forgotten_by_word_alone_and_first_only_shown(root: Path) -> None:
    with Store.open(root) as store:
        register(store.catalog, [("far", "folder /far")])
        store.files("t1", "tests").put(b"it", name="it")
    refused = blobcask(root, "replicate", "once")
    assert refused.returncode == 8
    assert "replicate forget far" in refused.stderr
    for words in (["--dry-run"], []):
        told = blobcask(root, "replicate", "forget", "far", *words, "--json")
        assert json.loads(told.stdout) == {
            "name": "far",
            "place": "folder /far",
            "rows": 1,
            "needed": 0,
            "dry_run": bool(words),
        }
    assert blobcask(root, "replicate", "forget", "far").returncode == 3
    assert blobcask(root, "replicate", "once").returncode == 0


def test_status_tells_who_runs_what_waits_and_that_nobody_does(root: Path) -> None:
    enqueued(root, "http://127.0.0.1:1/")
    idle = blobcask(root, "replicate", "status", "--json")
    assert idle.returncode == FOUND_WRONG
    form = json.loads(idle.stdout)
    assert (form["running"], form["deliveries"]["waiting"]) == (False, 1)
    assert form["trouble"] == [
        "no background process runs: callbacks and mails wait, and nothing expires"
    ]
    with running(root) as process:
        assert "Replicating" in first_line(process)
        for _ in range(50):
            shown = blobcask(root, "replicate", "status", "--json")
            form = json.loads(shown.stdout)
            if form["jobs"] and all(job["last_run_at"] for job in form["jobs"]):
                break
        assert shown.returncode == 0, shown.stderr
        assert (form["running"], form["pid"]) == (True, process.pid)
        names = [job["name"] for job in form["jobs"]]
        assert names == ["deliveries", "date", "sweep", "forget", "collect", "upkeep", "scrub"]
        assert "1 message to send" in blobcask(root, "replicate", "status").stdout
        refused = blobcask(root, "replicate", "once")
        assert (refused.returncode, str(process.pid) in refused.stderr) == (5, True)


def test_status_tells_that_nothing_is_tried_again_while_the_clock_is_behind(root: Path) -> None:
    ahead = HandClock(SystemClock().now_us() + HOUR_US)
    with Store.open(root, clock=ahead) as store:
        store.files("default", "tests").put(b"a", name="a")
    with running(root) as process:
        assert "Replicating" in first_line(process)
        shown = blobcask(root, "replicate", "status", "--json")
    assert shown.returncode == FOUND_WRONG
    told = [each for each in json.loads(shown.stdout)["trouble"] if "nothing is tried" in each]
    assert "behind the last write" in told[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_and_well(root: Path, number: signal.Signals) -> None:
    enqueued(root, "http://127.0.0.1:1/")
    with running(root) as process:
        assert "Replicating" in first_line(process)
        process.send_signal(number)
        assert process.wait(timeout=60) == 0


def test_a_second_one_waits_for_its_turn_and_takes_over_from_a_killed_one(root: Path) -> None:
    with receiving() as receiver:
        first_delivery = enqueued(root, receiver.url("127.0.0.1"))
        with running(root) as first, running(root) as second:
            waiting, serving = (first, second)
            said = {process.pid: first_line(process) for process in (first, second)}
            if "Replicating" in said[first.pid]:
                waiting, serving = second, first
            assert f"PID {serving.pid}" in said[waiting.pid]
            assert receiver.next().headers["webhook-id"] == first_delivery.delivery_id
            serving.kill()
            assert "Replicating" in first_line(waiting)
            second_delivery = enqueued(root, receiver.url("127.0.0.1"))
            ids = [receiver.next().headers["webhook-id"]]
            if ids[0] == first_delivery.delivery_id:  # killed before it had written that down
                ids.append(receiver.next().headers["webhook-id"])
            assert ids[-1] == second_delivery.delivery_id


def test_a_folder_that_is_no_store_is_left_alone(root: Path) -> None:
    for words in (("replicate", "run"), ("replicate", "once"), ("callbacks", "secret")):
        refused = blobcask(root, *words)
        assert (refused.returncode, refused.stdout) == (3, "")
    assert list(root.iterdir()) == []
