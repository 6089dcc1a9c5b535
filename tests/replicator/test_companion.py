"""`blobcask serve` and the background process beside it, from the upload to the receiver."""

from __future__ import annotations

import os
import select
import signal
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from cas.alone import Alone
from cas.background import PLACE
from gateway.companion import Companion
from tests.gateway.served import ACCOMPANIED, COMPLETE, WITH_RUNNER, Served, serving
from tests.replicator.receivers import Received, certificate, receiving, status
from tests.replicator.test_cli import blobcask

LOOPBACK = {"CALLBACKS__ALLOWED_NETWORKS": "127.0.0.0/8"}
GONE_S = 60.0


def replicator_of(served: Served, after: int = 0) -> int:
    """The PID of the background process that came after that one, once it has its place."""
    place = Alone(served.root / PLACE)
    try:
        for _ in _turns():
            pid = place.holder()
            if pid not in ("", str(after)) and int(pid) in served.workers():
                return int(pid)
    finally:
        place.close()
    raise AssertionError("no replicator came")


def _turns(seconds: float = GONE_S) -> Iterator[None]:
    """Turns of a hundredth of a second each."""
    for _ in range(int(seconds * 100)):
        yield
        select.select((), (), (), 0.01)


def gone(pid: int) -> bool:
    """Waits for the end of a process that need not be a child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(GONE_S * 1000))
    finally:
        os.close(pidfd)


def uploaded(served: Served, callback_url: str) -> dict[str, object]:
    """An upload with one file, completed over HTTP."""
    asked = served.request_upload(callback_url=callback_url)
    info = served.ask("GET", f"/api/v1/uploads/{asked['upload_token']}/info").form
    put = served.ask("PUT", info["presigned_urls"][0] + "&filename=a.txt", b"hello callback")
    assert put.status in (200, 201), put.body
    done = served.ask("POST", f"/api/v1/uploads/{asked['upload_token']}/complete")
    assert done.status == 200, done.body
    return {**asked, **done.form}


def verified(served: Served, request: Received) -> dict[str, object]:
    """The message, as a receiver with the tenant's secret verifies it."""
    made = blobcask(served.root, "callbacks", "secret")
    message = Webhook(made.stdout.strip()).verify(request.body, dict(request.headers))
    assert isinstance(message, dict)
    return message


def test_a_completed_upload_calls_back_over_https_and_the_receiver_verifies_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = certificate(tmp_path, "localhost")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    allowed = {"CALLBACKS__ALLOWED_NETWORKS": "127.0.0.0/8, ::1/128"}
    with receiving(tls) as receiver, serving(root, ACCOMPANIED, **allowed) as served:
        done = uploaded(served, receiver.url("localhost"))
        message = verified(served, receiver.next())
        for _ in _turns():  # what came of it is written a moment after it was answered
            shown = served.ask("GET", f"/api/v1/uploads/{done['upload_token']}", token=served.admin)
            if shown.form["callback"]["status"] != "waiting":
                break
        (listed,) = served.ask("GET", "/api/v1/uploads?status=completed", token=served.admin).form[
            "uploads"
        ]
    assert listed["callback"] == shown.form["callback"]
    assert (listed["callback"]["status"], listed["callback"]["attempts"]) == ("done", 1)
    assert message["type"] == "upload.completed"
    assert message["upload_id"] == done["upload_id"]
    assert message["files"] == done["files"]
    assert message["uploaded_at"] == done["uploaded_at"]


def test_after_everything_is_killed_at_completion_the_callback_still_comes(root: Path) -> None:
    with receiving() as receiver:
        # Without a background process nothing can be sent before everything is killed.
        with serving(root, **LOOPBACK) as served:
            done = uploaded(served, receiver.url("127.0.0.1"))
            workers = served.workers()
            served.process.kill()
            for worker in workers:
                with suppress(ProcessLookupError):  # it may have noticed the end of the first
                    os.kill(worker, signal.SIGKILL)
                assert gone(worker)
        assert receiver.received == []
        with serving(root, ACCOMPANIED, **LOOPBACK) as served:
            message = verified(served, receiver.next())
        assert message["upload_id"] == done["upload_id"]
        assert len(receiver.received) == 1


def test_a_background_process_killed_in_the_middle_of_an_attempt_makes_it_again(
    root: Path,
) -> None:
    with receiving() as receiver, serving(root, ACCOMPANIED, **LOOPBACK) as served:
        first = replicator_of(served)

        def kill(request: object, over: object) -> None:
            os.kill(first, signal.SIGKILL)
            status(200)(request, over)  # type: ignore[arg-type]

        receiver.answers = [kill]
        uploaded(served, receiver.url("127.0.0.1"))
        attempts = [receiver.next(), receiver.next()]
        assert len({request.headers["webhook-id"] for request in attempts}) == 1
        assert len({request.body for request in attempts}) == 1
        assert verified(served, attempts[1])["type"] == "upload.completed"
        second = replicator_of(served, after=first)
    assert gone(second)


def test_stopping_the_server_stops_the_background_process(root: Path) -> None:
    with serving(root, ACCOMPANIED) as served:
        replicator = replicator_of(served)
    assert gone(replicator)
    assert served.process.returncode == 0


def test_killing_the_server_ends_the_background_process(root: Path) -> None:
    with serving(root, ACCOMPANIED) as served:
        replicator = replicator_of(served)
        workers = [pid for pid in served.workers() if pid != replicator]
        served.process.kill()
        assert gone(replicator)
        assert all(map(gone, workers))


def test_the_background_process_holds_no_listening_socket(root: Path) -> None:
    with serving(root, ACCOMPANIED) as served:
        replicator = replicator_of(served)
        held = {os.readlink(path) for path in Path(f"/proc/{replicator}/fd").iterdir()}
        inode = listening_inode(served.port)
        assert f"socket:[{inode}]" not in held
        arbiter = {os.readlink(path) for path in Path(f"/proc/{served.process.pid}/fd").iterdir()}
        assert f"socket:[{inode}]" in arbiter


def listening_inode(port: int) -> str:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":  # LISTEN
            return fields[9]
    raise AssertionError("nobody listens")


def test_without_it_only_workers_run(root: Path) -> None:
    with serving(root, GATEWAY__WORKERS="1") as served:
        assert served.ask("GET", "/healthz").status == 200
        assert len(served.workers()) == 1
        assert not (root / "REPLICATOR").exists()


def test_a_companion_knows_what_it_was_told_and_ends_when_asked(root: Path) -> None:
    companion = Companion("replicator", ["replicate", "run", "--root", str(root)])
    companion.tell({"BLOBCASK_GATEWAY__PUBLIC_URL": "https://files.example.org"})
    others = set(children(os.getpid()))  # such as the S3 server of other tests
    companion.tend()
    (pid,) = set(children(os.getpid())) - others
    try:
        assert environ(pid)["BLOBCASK_GATEWAY__PUBLIC_URL"] == "https://files.example.org"
        companion.ask_to_end()
        companion.end()
    finally:
        os.waitpid(pid, 0)  # the arbiter's part
    companion.tend()
    assert set(children(os.getpid())) <= others


def test_both_companions_run_beside_it_and_end_with_it(root: Path) -> None:
    with serving(root, COMPLETE) as served:
        replicator, runner = replicator_of(served), runner_of(served)
        assert replicator != runner
        told = environ(runner)["BLOBCASK_GATEWAY__PUBLIC_URL"]
        assert told == served.address  # the port was any free one
    assert gone(replicator)
    assert gone(runner)
    assert served.process.returncode == 0


def test_a_runner_learns_the_address_that_the_settings_give(root: Path) -> None:
    url = "https://files.example.org"
    with serving(root, WITH_RUNNER, GATEWAY__PUBLIC_URL=url) as served:
        assert environ(runner_of(served))["BLOBCASK_GATEWAY__PUBLIC_URL"] == url


def test_a_runner_is_not_told_that_all_addresses_are_one(root: Path) -> None:
    with serving(root, WITH_RUNNER, GATEWAY__BIND="0.0.0.0:0") as served:
        told = environ(runner_of(served))["BLOBCASK_GATEWAY__PUBLIC_URL"]
        assert told == f"http://127.0.0.1:{served.port}"


def test_a_runner_that_is_killed_is_started_anew_and_the_log_names_it(root: Path) -> None:
    with serving(root, WITH_RUNNER) as served:
        first = runner_of(served)
        os.kill(first, signal.SIGKILL)
        assert runner_of(served, after=first)
        served.logged(lambda lines: any(f"the runner (PID {first}) ended" in x for x in lines))
        assert served.ask("GET", "/healthz").status == 200


def runner_of(served: Served, after: int = 0) -> int:
    """The PID of the process that runs workflows, once it has its place; not `after`."""
    for _ in _turns():
        place = served.root / "RUNNER"
        pid = place.read_text().strip() if place.exists() else ""
        if pid not in ("", str(after)) and int(pid) in served.workers():
            return int(pid)
    raise AssertionError("no runner came")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def environ(pid: int) -> dict[str, str]:
    given = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(each.split("=", 1) for each in given if each)


def test_workers_that_are_replaced_take_the_background_process_with_them(root: Path) -> None:
    with serving(root, ACCOMPANIED) as served:
        first = replicator_of(served)
        served.process.send_signal(signal.SIGHUP)
        assert gone(first)
        assert replicator_of(served, after=first)
        assert served.ask("GET", "/healthz").status == 200
