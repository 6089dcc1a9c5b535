"""What workflows ask of a gateway through the client: waits over many polls, and refusals."""

from __future__ import annotations

import json
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from highway_dsl import WorkflowBuilder

from cas.config import Settings, StoreSettings
from cas.errors import (
    AccessDenied,
    ApprovalClosed,
    InvalidRequest,
    KeyReused,
    NotFound,
    NoWaitingWorkflow,
    ServerUnreachable,
    SubscriptionTaken,
    TooLarge,
)
from cas.keys import load_keys
from cas.once import OnceKey
from cas.remote import RemoteStore
from cas.store import Store
from tests.clocks import KEEP_US
from tests.gateway.served import PATIENCE_S, Served, serving, until
from workflows.remote import RemotePlace
from workflows.run_log import RunLog
from workflows.run_view import TOLD_BYTES_MAX
from workflows.runs_cli import LocalRuns
from workflows.tools.toolbox import Toolbox
from workflows.views import Workflows


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(
            Path(folder), EVENTS__POLL_MAX="1s", EVENTS__PAYLOAD_MAX="1KiB", GATEWAY__WORKERS="2"
        ) as server,
    ):
        yield server


@pytest.fixture
def store(served: Served) -> Iterator[RemoteStore]:
    with RemoteStore(served.address, served.admin, patience_s=5) as opened:
        yield opened


def unique(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:12]}"


def test_a_wait_is_longer_than_what_the_server_allows_a_poll(store: RemoteStore) -> None:
    begun = time.monotonic()
    assert store.events().wait(unique("never"), timeout_s=2.2)["status"] == "timeout"
    assert time.monotonic() - begun >= 2.2


def test_a_wait_of_no_time_looks_once(store: RemoteStore) -> None:
    name = unique("paid")
    events = store.events()
    assert events.wait(name, timeout_s=0)["status"] == "timeout"
    events.emit(name, {"a": 1}, hold_s=60)
    assert events.wait(name, timeout_s=0)["payload"] == {"a": 1}


def poll_once(served: Served, query: str) -> None:
    """A poll of a client that goes away after it, and may come again."""
    answer = served.ask("GET", f"/api/v1/events/default/wait?timeout=0&{query}", token=served.admin)
    assert answer.form["status"] == "timeout"


def test_an_event_between_two_polls_is_not_missed(store: RemoteStore, served: Served) -> None:
    name, waiter = unique("paid"), unique("cashier")
    events = store.events()
    poll_once(served, f"event_name={name}&waiter={waiter}")
    assert events.emit(name, 7)["delivered_to"] == 1
    first = events.wait(name, timeout_s=5, waiter=waiter)
    again = events.wait(name, timeout_s=5, waiter=waiter)
    assert (first["payload"], first["event_id"]) == (7, again["event_id"])


def test_a_waiter_that_has_its_event_waits_for_the_next(store: RemoteStore) -> None:
    name, waiter = unique("job"), unique("worker")
    events = store.events()
    for number in range(3):
        events.emit(name, number, hold_s=60)
    for number in range(3):
        told = events.wait(name, timeout_s=5, waiter=waiter)
        assert told["payload"] == number
        for _ in range(2):
            events.end_wait(waiter, told["event_id"])
    events.end_wait(unique("nobody"))


def test_of_a_wait_without_a_name_nothing_is_kept_when_its_event_is_told(
    store: RemoteStore, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.remote.events._FORGETTING_S", PATIENCE_S)  # of a slow machine
    name = unique("job")
    events = store.events()
    events.emit(name, 1, hold_s=60)
    told = events.wait(name, timeout_s=5)
    assert told["payload"] == 1
    poll_once(served, f"event_name={name}&waiter={told['waiter']}")


def test_ending_a_wait_that_goes_on_ends_it_for_who_waits(store: RemoteStore) -> None:
    name, waiter = unique("job"), unique("worker")
    events = store.events()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(events.wait, name, timeout_s=2 * PATIENCE_S, waiter=waiter)

        def ended() -> bool:
            events.end_wait(waiter)  # again: it may have come between two of its polls
            return waiting.done()

        until(ended)
        told = waiting.result()
    assert (told["status"], told["ended"]) == ("timeout", True)
    assert events.wait(unique("other"), timeout_s=0, waiter=waiter)["status"] == "timeout"


@contextmanager
def silent_after_one_answer(form: dict[str, Any]) -> Iterator[tuple[str, Event]]:
    """The address of a server that answers the first request and no other, and whether one more
    has come."""
    body = json.dumps(form).encode()
    asked = Event()

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            client.recv(65536)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            asked_for = client.recv(65536)
            if asked_for.startswith(b"DELETE"):
                asked.set()
            while asked_for:  # until the client gives it up
                asked_for = client.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked


def test_an_event_that_has_come_does_not_wait_for_the_server_to_forget_it() -> None:
    told = {"status": "delivered", "waiter": "w", "event_id": "e", "payload": 1}
    with silent_after_one_answer(told) as (address, asked), RemoteStore(address, "t") as store:
        waited: list[object] = []
        # Not in a pool, which would wait at its end for one that is kept for long.
        waiting = Thread(target=lambda: waited.append(store.events("t").wait("e")), daemon=True)
        waiting.start()
        waiting.join(PATIENCE_S)
        assert waited == [told]
        assert asked.is_set()


def polls(lines: list[str]) -> int:
    """How many polls have ended."""
    return sum("/events/{tenant_id}/wait" in line and '"GET"' in line for line in lines)


def test_an_event_after_many_polls_ends_the_wait(store: RemoteStore, served: Served) -> None:
    name = unique("paid")
    before = polls(served.logged())
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(store.events().wait, name, timeout_s=30)
        served.logged(lambda lines: polls(lines) >= before + 2)
        store.events().emit(name, "late", hold_s=60)
        assert waiting.result(30)["payload"] == "late"


def test_an_event_that_nobody_waits_for_is_refused(store: RemoteStore) -> None:
    name = unique("nobody")
    with pytest.raises(NoWaitingWorkflow) as refused:
        store.events().emit(name)
    assert refused.value.event_name == name
    assert str(refused.value) == "No workflow waiting for this event"


def test_an_event_is_posted_once_under_its_key(store: RemoteStore) -> None:
    name, key = unique("paid"), OnceKey("run:r", unique("step"))
    events = store.events()
    one, two = (events.emit(name, 1, hold_s=60, key=key)["event_id"] for _ in range(2))
    assert one == two
    with pytest.raises(KeyReused):
        events.emit(name, 2, hold_s=60, key=key)


def test_a_payload_that_is_too_long_is_refused(store: RemoteStore) -> None:
    with pytest.raises(TooLarge):
        store.events().emit(unique("long"), "x" * 100_000, hold_s=60)


def test_a_hold_that_is_too_long_is_refused(store: RemoteStore) -> None:
    with pytest.raises(InvalidRequest, match="hold"):
        store.events().emit(unique("long"), 1, hold_s=10**9)


def test_a_key_that_is_waited_for_is_taken(store: RemoteStore, served: Served) -> None:
    name = unique("paid")
    poll_once(served, f"event_name={name}&correlation_key=order&waiter=one")
    with pytest.raises(SubscriptionTaken):
        store.events().wait(name, "order", timeout_s=0)


def test_an_approval_is_looked_at_and_cancelled_once(store: RemoteStore) -> None:
    approvals = store.approvals()
    asked = approvals.request({"approval_key": "go", "title": "Go?", "run": unique("run")})
    assert approvals.get(asked["approval_id"])["status"] == "pending"
    assert approvals.cancel(asked["approval_id"])["status"] == "cancelled"
    with pytest.raises(ApprovalClosed) as refused:
        approvals.cancel(asked["approval_id"])
    assert refused.value.status == "cancelled"


def test_what_is_not_there_is_not_found(store: RemoteStore) -> None:
    with pytest.raises(NotFound):
        store.approvals().get("none")
    with pytest.raises(NotFound):
        store.webhooks().get("none")
    with pytest.raises(NotFound):
        store.webhooks().remove("none")
    with pytest.raises(NotFound):
        store.events("other")


def test_a_webhook_needs_its_secret(store: RemoteStore) -> None:
    with pytest.raises(InvalidRequest, match="secret_id"):
        store.webhooks().register({"name": "pr", "kind": "github", "secret_id": "none"})


def test_the_permissions_of_the_token_say_what_may_be_done(served: Served) -> None:
    with RemoteStore(served.address, served.token("view_storage"), patience_s=5) as store:
        tools = Toolbox(RemotePlace(store))
        with pytest.raises(AccessDenied):
            tools.storage.store(name="a", data="x")
        with pytest.raises(AccessDenied):
            tools.workflow.request_approval("go", "Go?")
        with pytest.raises(AccessDenied):
            tools.workflow.wait_for_event("e", timeout_seconds=0)
        with pytest.raises(AccessDenied):
            store.events().emit("e")


def test_a_token_without_a_tenant_has_no_place(served: Served) -> None:
    with RemoteStore(served.address, "opaque") as store, pytest.raises(AccessDenied):
        RemotePlace(store)


def test_a_server_that_is_away_is_told_as_such(served: Served) -> None:
    with (
        RemoteStore("http://127.0.0.1:9", served.admin, patience_s=0.1) as store,
        pytest.raises(ServerUnreachable),
    ):
        store.events().wait("e", timeout_s=1)


def test_a_wait_that_is_over_takes_no_event_from_others(store: RemoteStore) -> None:
    name = unique("paid")
    events = store.events()
    assert events.wait(name, timeout_s=0.2)["status"] == "timeout"
    with pytest.raises(NoWaitingWorkflow):
        events.emit(name)


def test_runs_are_told_alike_here_and_from_afar(store: RemoteStore, served: Served) -> None:
    flow = WorkflowBuilder(name="told")
    flow.task("50% é", "tools.storage.store", args=["name", "data"])
    settings = Settings(store=StoreSettings(root=served.root))
    with Store.open(served.root, settings) as here:
        workflows = Workflows(here, load_keys(settings))
        local, remote = LocalRuns(here, workflows, "default", "ann"), store.runs()
        run = remote.submit(flow.build().to_json(), {})["run_id"]
        log = RunLog(here.catalog, run, keep_us=KEEP_US, events_keep_us=KEEP_US)
        values = {"": {"a": ["é", None, 1.5]}, "0": "x" * TOLD_BYTES_MAX, "2.0": None}
        for iteration, value in values.items():
            log.begin("50% é", iteration)
            log.finish("50% é", iteration, value)
        log.begin("waits")
        assert remote.get(run) == local.get(run)
        for iteration, value in values.items():
            for runs in (local, remote):
                assert runs.result(run, "50% é", iteration) == value
        assert remote.step(run, "50% é", "0")["result"]["truncated"]
        assert remote.step(run, "waits")["status"] == "running"
        for step, iteration in (("waits", ""), ("none", ""), ("50% é", "1")):
            for runs in (local, remote):
                with pytest.raises(NotFound):
                    runs.result(run, step, iteration)
        with pytest.raises(NotFound):
            remote.step(run, "none")
        workflows.close()
