"""The tools at both places there are: one suite, held against each of them.

Both work on one ROOT that a real gateway serves, so that links are opened over HTTP as people
open them, and what one place makes another finds.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import msgspec
import pytest

from cas.clock import DAY_US, SECOND_US, parse_rfc3339
from cas.config import Settings, Size, StoreSettings, Url
from cas.errors import (
    ApprovalKeyTaken,
    Held,
    InvalidReference,
    InvalidRequest,
    InvalidRetention,
    InvalidWorkflow,
    NotFound,
    SubscriptionTaken,
    TooLarge,
    ToolFailed,
)
from cas.events import topic
from cas.keys import load_keys
from cas.records import Subscription
from cas.references import DIRECT_RUN, parse_reference
from cas.remote import RemoteStore
from cas.store import Store
from tests.gateway.served import Served, serving
from workflows.embedded import EmbeddedPlace
from workflows.remote import RemotePlace
from workflows.tools import Calling, Place, Registry, Waiting, default_registry
from workflows.tools.toolbox import Toolbox
from workflows.views import Workflows

TENANT = "default"
SECRET = b"It's a Secret to Everybody"
WAIT_S = 30  # for what must come


@final
@dataclass
class World:
    """A gateway over a ROOT, and both places at it."""

    server: Served
    store: Store
    workflows: Workflows
    remote: RemoteStore

    def place(self, name: str, tenant: str = TENANT) -> Place:
        if name == "embedded":
            return EmbeddedPlace(self.store, self.workflows, tenant, "tester")
        assert tenant == TENANT
        return RemotePlace(self.remote)

    def waits_for(self, event_name: str) -> bool:
        """Whether anybody waits for this event, and is not given it yet."""
        about = topic(TENANT, event_name, None)
        with self.store.catalog.read() as snapshot:
            return bool(snapshot.range(Subscription, "waiting", (about,), limit=1))


@pytest.fixture(scope="module")
def world(disk_folder: Path) -> Iterator[World]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder)) as server,
        RemoteStore(server.address, server.admin, patience_s=5) as remote,
    ):
        settings = Settings(store=StoreSettings(root=Path(folder)))
        settings = msgspec.structs.replace(
            settings,
            gateway=msgspec.structs.replace(settings.gateway, public_url=Url(server.address)),
        )
        with Store.open(Path(folder), settings) as store:
            workflows = Workflows(store, load_keys(settings))
            workflows.secrets(TENANT, "tester").put("hub", SECRET)
            yield World(server, store, workflows, remote)
            workflows.close()


@pytest.fixture(params=["embedded", "remote"])
def place(request: pytest.FixtureRequest, world: World) -> Place:
    return world.place(request.param)


@pytest.fixture
def run() -> str:
    """A run that nobody else has."""
    return f"run-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def tools(place: Place, run: str) -> Toolbox:
    return Toolbox(place, run=run)


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[Any]]]:
    """Calls something in a thread of its own."""
    with ThreadPoolExecutor(4) as threads:
        yield threads.submit


def calling(place: Place, run: str, step: str = "step", iteration: str = "") -> Calling:
    return Calling(TENANT, run, step, place, iteration=iteration)


def tool(name: str) -> Any:
    return default_registry().tool(name)


# --- files


def test_what_is_stored_is_named_by_its_sha256(tools: Toolbox, place: Place, run: str) -> None:
    stored = tools.storage.store(
        name="digest", data="héllo", content_type="text/plain", retention_policy="days:30"
    )
    digest = hashlib.sha256("héllo".encode()).hexdigest()
    file = place.stat(stored["storage_ref"])
    assert stored == {
        "storage_ref": f"hwy://uploads/{TENANT}/{run}/{digest}.txt",
        "file_id": file.file_id,
        "size_bytes": 6,
        "checksum_sha256": digest,
        "content_type": "text/plain",
        "name": "digest",
        "expires_at": stored["expires_at"],
    }
    kept_us = parse_rfc3339(stored["expires_at"]) - file.created_at
    assert abs(kept_us - 30 * DAY_US) <= SECOND_US
    json.dumps(stored)


def test_what_is_stored_for_ever_has_no_expiry(tools: Toolbox) -> None:
    assert tools.storage.store("a", "x", retention_policy="forever")["expires_at"] is None


@pytest.mark.parametrize("data", [b"\x00\xff", {"base64": base64.b64encode(b"\x00\xff").decode()}])
def test_bytes_come_back_as_base64(tools: Toolbox, data: Any) -> None:
    stored = tools.storage.store(name="bin", data=data)
    assert tools.storage.retrieve(stored["storage_ref"]) == {"base64": "AP8="}


def test_a_text_comes_back_as_itself(tools: Toolbox) -> None:
    stored = tools.storage.store(name="t", data="Ein Satz.\n", filename="satz.md")
    assert stored["storage_ref"].endswith(".md")
    assert tools.storage.retrieve(stored["storage_ref"]) == "Ein Satz.\n"
    assert tools.storage.retrieve(stored) == "Ein Satz.\n"  # as `{{stored_file}}` gives it


def test_a_step_that_is_repeated_stores_one_file(place: Place, run: str) -> None:
    step = calling(place, run)
    one = tool("tools.storage.store")(step, name="a", data="same", retention_policy="forever")
    two = tool("tools.storage.store")(step, name="a", data="same", retention_policy="forever")
    assert one == two


@pytest.mark.parametrize("data", [7, None, ["a"], {"text": "a"}, {"base64": "a", "more": 1}])
def test_data_of_another_kind_is_refused(tools: Toolbox, data: Any) -> None:
    with pytest.raises(InvalidWorkflow, match=r"data: a text or"):
        tools.storage.store(name="a", data=data)


def test_data_that_is_not_base64_is_refused(tools: Toolbox) -> None:
    with pytest.raises(InvalidWorkflow, match=r"data\.base64: not base64"):
        tools.storage.store(name="a", data={"base64": "?"})


def test_an_impossible_retention_is_refused(tools: Toolbox) -> None:
    with pytest.raises(InvalidRetention):
        tools.storage.store(name="a", data="x", retention_policy="days:0")


def test_a_url_downloads_without_a_login(tools: Toolbox, world: World) -> None:
    stored = tools.storage.store(name="digest", data="words", content_type="text/plain")
    url = tools.storage.get_url(stored["storage_ref"], expires_in=60)
    assert isinstance(url, str)
    assert url.startswith(f"{world.server.address}/d/{stored['file_id']}/digest.txt?")
    got = world.server.ask("GET", url)
    assert (got.status, got.body) == (200, b"words")
    assert got.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("expires_in", [0, 31 * 24 * 3600])
def test_a_url_for_an_impossible_time_is_refused(tools: Toolbox, expires_in: int) -> None:
    stored = tools.storage.store(name="a", data="x")
    with pytest.raises(InvalidRequest):
        tools.storage.get_url(stored["storage_ref"], expires_in=expires_in)


def test_a_number_may_come_as_a_text(tools: Toolbox) -> None:
    stored = tools.storage.store(name="a", data="x")
    assert "expires=" in tools.storage.get_url(stored["storage_ref"], expires_in="60")
    with pytest.raises(InvalidWorkflow, match="expires_in: a number"):
        tools.storage.get_url(stored["storage_ref"], expires_in="soon")
    with pytest.raises(InvalidWorkflow, match=r"expires_in: a whole number, not 1\.5"):
        tools.storage.get_url(stored["storage_ref"], expires_in=1.5)


def test_a_deleted_file_is_gone(tools: Toolbox) -> None:
    stored = tools.storage.store(name="a", data="x")
    assert tools.storage.delete(stored["storage_ref"]) == {
        "storage_ref": stored["storage_ref"],
        "deleted": True,
    }
    for name in ("retrieve", "get_url", "delete"):
        with pytest.raises(NotFound):
            tools.call(f"tools.storage.{name}", stored["storage_ref"])


def test_a_deletion_that_was_cut_off_is_not_missed(place: Place, run: str) -> None:
    reference = tool("tools.storage.store")(calling(place, run), "a", "x")["storage_ref"]
    place.delete(reference)
    again = Calling(TENANT, run, "step", place, attempt=2)
    assert tool("tools.storage.delete")(again, reference)["deleted"]


def test_a_held_file_stays(tools: Toolbox, world: World) -> None:
    stored = tools.storage.store(name="a", data="held")
    reference = parse_reference(stored["storage_ref"])
    world.store.files(TENANT, "tester").hold(reference, True)
    with pytest.raises(Held):
        tools.storage.delete(stored["storage_ref"])


def test_another_tenants_file_is_as_absent_as_an_unknown_one(
    tools: Toolbox, world: World, run: str
) -> None:
    foreign = Toolbox(world.place("embedded", "other"), run=run)
    reference = foreign.storage.store(name="a", data="theirs")["storage_ref"]
    for absent in (reference, reference.replace("/other/", f"/{TENANT}/")):
        for name in ("retrieve", "get_url", "delete"):
            with pytest.raises(NotFound):
                tools.call(f"tools.storage.{name}", absent)
    assert foreign.storage.retrieve(reference) == "theirs"


def test_what_is_no_reference_is_refused(tools: Toolbox) -> None:
    with pytest.raises(InvalidReference):
        tools.storage.retrieve("s3://bucket/key")
    with pytest.raises(InvalidWorkflow, match="storage_ref: a text"):
        tools.storage.retrieve({"name": "a"})


def test_what_no_step_could_return_is_not_read(place: Place, run: str) -> None:
    settings = Settings()
    settings = msgspec.structs.replace(
        settings, workflows=msgspec.structs.replace(settings.workflows, result_max=Size(1024))
    )
    tools = Toolbox(place, run=run, settings=settings)
    fits = tools.storage.store(name="a", data="x" * 1024)
    assert len(tools.storage.retrieve(fits)) == 1024
    long = tools.storage.store(name="a", data="x" * 1025)
    with pytest.raises(TooLarge):
        tools.storage.retrieve(long)


def test_a_place_reads_with_type_and_name(place: Place, run: str) -> None:
    kind = "application/pdf"
    file = place.store(b"%PDF-", name="p", run=run, filename="p.pdf", content_type=kind)
    assert place.read(file.storage_ref, 5) == (b"%PDF-", kind, "p.pdf")
    with pytest.raises(TooLarge):
        place.read(file.storage_ref, 4)


# --- uploads


def send(world: World, asked: dict[str, Any], *bodies: bytes) -> None:
    """Fill an upload's slots by their signed URLs, as a browser does."""
    for index, body in enumerate(bodies):
        url = f"{asked['presigned_urls'][index]}&filename=note-{index}.txt"
        assert world.server.ask("PUT", url, body).status in (200, 201)


def complete(world: World, asked: dict[str, Any]) -> None:
    path = f"/api/v1/uploads/{asked['upload_token']}/complete"
    assert world.server.ask("POST", path).status == 200


def test_an_upload_is_asked_for_with_all_that_requirement_1_names(
    tools: Toolbox, world: World, run: str
) -> None:
    asked = tools.storage.request_upload(
        name="kyc_documents",
        allowed_types=["pdf", "jpg"],
        max_size_mb=50,
        max_files=5,
        prompt="Please upload your ID documents",
        retention_policy="days:90",
        expires_in=86400,
        callback_url="https://bank.example/webhook",
        redirect_url="https://bank.example/next-step",
    )
    assert set(asked) == {
        "upload_id", "upload_token", "upload_url", "presigned_urls", "event_name", "expires_at",
    }  # fmt: skip
    assert asked["event_name"] == f"upload_{asked['upload_id']}"
    assert asked["upload_url"] == f"{world.server.address}/u/{asked['upload_token']}"
    assert len(asked["presigned_urls"]) == 5
    upload = world.store.uploads(TENANT, "tester").get(asked["upload_token"]).upload
    assert (upload.workflow_run_id, upload.max_size_bytes) == (run, 50 << 20)
    assert (upload.allowed_types, upload.max_files) == (["pdf", "jpg"], 5)
    assert abs(upload.expires_at - upload.created_at - DAY_US) <= SECOND_US
    assert world.server.ask("GET", asked["upload_url"]).status == 200


def test_an_upload_that_was_completed_before_the_wait_is_found(
    tools: Toolbox, world: World
) -> None:
    asked = tools.storage.request_upload(name="notes", max_files=2)
    send(world, asked, b"one", b"two")
    complete(world, asked)
    resumed = tools.workflow.wait_for_event(event_name=asked["event_name"], timeout_seconds=WAIT_S)
    assert set(resumed) == {"files", "uploaded_at"}
    assert [file["filename"] for file in resumed["files"]] == ["note-0.txt", "note-1.txt"]
    assert tools.storage.retrieve(resumed["files"][1]["storage_ref"]) == "two"


def test_an_upload_that_is_completed_during_the_wait_ends_it(
    tools: Toolbox, world: World, aside: Callable[..., Future[Any]]
) -> None:
    asked = tools.storage.request_upload(name="notes")
    resumed = aside(
        tools.workflow.wait_for_event, event_name=asked["event_name"], timeout_seconds=WAIT_S
    )
    until(lambda: world.waits_for(asked["event_name"]))
    send(world, asked, b"late")
    complete(world, asked)
    assert len(resumed.result(WAIT_S)["files"]) == 1


def test_a_cancelled_upload_fails_the_wait(tools: Toolbox, world: World) -> None:
    asked = tools.storage.request_upload(name="notes")
    world.store.uploads(TENANT, "tester").cancel(asked["upload_token"])
    with pytest.raises(ToolFailed, match="was not completed: it is cancelled"):
        tools.workflow.wait_for_event(asked["event_name"], timeout_seconds=WAIT_S)


def test_a_step_asks_for_one_upload_however_often_it_is_begun(place: Place, run: str) -> None:
    request = tool("tools.storage.request_upload")
    asked = [request(calling(place, run), name="notes")["upload_id"] for _ in range(2)]
    other = request(calling(place, run, iteration="1"), name="notes")["upload_id"]
    assert asked[0] == asked[1] != other


@pytest.mark.parametrize(
    "wrong",
    [{"max_files": 0}, {"max_files": 1001}, {"expires_in": 0}, {"allowed_types": ["../x"]}],
)
def test_an_impossible_upload_is_refused(tools: Toolbox, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        tools.storage.request_upload(name="notes", **wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_size_mb": -1}, "max_size_mb: a number from 0 on, not -1"),
        ({"max_size_mb": float("nan")}, "max_size_mb"),
        ({"max_files": True}, "max_files: a number from 0 on, not true or false"),
        ({"allowed_types": "pdf"}, "allowed_types: a list of texts, not this text"),
        ({"allowed_types": [1]}, r"allowed_types\[0\]: a text, not 1"),
        ({"prompt": None}, "prompt: a text, not nothing"),
    ],
)
def test_an_argument_of_another_kind_is_named(
    tools: Toolbox, wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidWorkflow, match=named):
        tools.storage.request_upload(name="notes", **wrong)


# --- events


def until(content: Callable[[], bool]) -> None:
    """Wait for what another thread or process does, where nothing tells of it."""
    ticking = threading.Event()
    for _ in range(WAIT_S * 100):
        if content():
            return
        ticking.wait(0.01)
    raise AssertionError("it did not happen")


def test_a_posted_event_ends_the_wait_with_its_payload(
    tools: Toolbox, world: World, aside: Callable[..., Future[Any]]
) -> None:
    name = f"payment-{uuid.uuid4().hex}"
    paid = aside(tools.workflow.wait_for_event, name, timeout_seconds=WAIT_S)
    until(lambda: world.waits_for(name))
    answer = world.remote.events().emit(name, {"amount": 100.5})
    assert answer["delivered_to"] == 1
    assert paid.result(WAIT_S) == {"amount": 100.5}


def test_a_held_event_is_for_the_wait_with_its_key(tools: Toolbox, world: World) -> None:
    name = f"payment-{uuid.uuid4().hex}"
    emit = world.remote.events().emit
    for key in ("order_1", "order_2"):
        emit(name, key, correlation_key=key, hold_s=60)
    wait = tools.workflow.wait_for_event
    assert wait(name, correlation_key="order_2", timeout_seconds=WAIT_S) == "order_2"
    assert wait(name, correlation_key="order_1", timeout_seconds=WAIT_S) == "order_1"


def test_a_wait_is_over_when_its_time_is(tools: Toolbox) -> None:
    with pytest.raises(ToolFailed, match="'never' did not come: timed out after 1 s"):
        tools.workflow.wait_for_event("never", timeout_seconds=1)


def test_a_key_is_for_one_wait(place: Place, world: World, run: str) -> None:
    name = f"payment-{uuid.uuid4().hex}"
    events = world.workflows.events(TENANT, "tester")
    wait = events.subscribe("elsewhere", "s", name, "order", 60 * SECOND_US)
    with pytest.raises(SubscriptionTaken):
        place.wait(name, "order", 5, run=run)
    events.cancel(wait.subscription_id)


def test_an_event_has_a_name(tools: Toolbox) -> None:
    with pytest.raises(InvalidWorkflow, match="event_name"):
        tools.workflow.wait_for_event("")


# --- approvals


def decide(world: World, url: str, comment: str = "") -> int:
    """Press the button of the page that a link opens."""
    assert world.server.ask("GET", url).status == 200
    body = f"comment={comment}"
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return world.server.ask("POST", url, body, headers=headers).status  # 303: to what became


@pytest.mark.parametrize("decision", ["approved", "rejected"])
def test_an_approval_waits_for_a_decision(
    place: Place, world: World, run: str, decision: str
) -> None:
    ask = tool("tools.workflow.request_approval")
    waiting = ask(
        calling(place, run), "payment", "Pay 100?", message="To Ada", addressees=["Ada", "Bob"]
    )
    assert isinstance(waiting, Waiting)
    assert waiting.shown is not None
    assert waiting.timeout_s is None
    links = waiting.shown["links"]
    assert [one["addressee"] for one in links] == ["Ada", "Bob"]
    assert [one["mailed"] for one in links] == [False, False]
    which = "approve_url" if decision == "approved" else "reject_url"
    assert links[1][which].startswith(f"{world.server.address}/api/v1/approvals/")
    assert decide(world, links[1][which], "fine") in (200, 303)
    claimed = place.wait(waiting.event_name, None, WAIT_S, run=run)
    result = waiting.result(claimed)
    assert result == {
        "status": decision,
        "approved_by": "Bob" if decision == "approved" else None,
        "decided_by": "Bob",
        "decided_at": result["decided_at"],
        "comment": "fine",
        "approval_id": waiting.shown["approval_id"],
    }
    assert parse_rfc3339(result["decided_at"]) > 0


def test_an_approval_need_not_be_waited_for(tools: Toolbox, world: World, run: str) -> None:
    asked = tools.workflow.request_approval("go", "Go?", expires_in=3600, wait=False)
    assert set(asked) == {"approval_id", "event_name", "links", "expires_at"}
    approval = world.workflows.approvals(TENANT, "tester").get(asked["approval_id"])
    assert (approval.workflow_run_id, approval.status) == (run, "pending")
    assert decide(world, asked["links"][0]["approve_url"]) in (200, 303)
    told = tools.workflow.wait_for_event(asked["event_name"], timeout_seconds=WAIT_S)
    assert told["status"] == "approved"


def test_a_cancelled_approval_ends_the_wait_and_says_so(
    tools: Toolbox, world: World, aside: Callable[..., Future[Any]], run: str
) -> None:
    approvals = world.workflows.approvals(TENANT, "tester")
    decided = aside(tools.workflow.request_approval, approval_key="go", title="Go?")
    until(lambda: bool(approvals.list(run=run).items))
    [approval] = approvals.list(run=run).items
    approvals.cancel(approval.approval_id)
    result = decided.result(WAIT_S)
    assert (result["status"], result["approved_by"]) == ("cancelled", None)


def test_two_runs_may_use_one_key(place: Place, world: World) -> None:
    runs = [f"run-{uuid.uuid4().hex[:12]}" for _ in range(2)]
    boxes = [Toolbox(place, run=run) for run in runs]
    asked = [box.workflow.request_approval("go", "Go?", wait=False) for box in boxes]
    decide(world, asked[0]["links"][0]["reject_url"])
    decide(world, asked[1]["links"][0]["approve_url"])
    told = [
        box.workflow.wait_for_event("approval_go", timeout_seconds=WAIT_S)["status"]
        for box in boxes
    ]
    assert told == ["rejected", "approved"]


def test_a_step_asks_people_once_however_often_it_is_begun(
    place: Place, world: World, run: str
) -> None:
    ask = tool("tools.workflow.request_approval")
    shown = [ask(calling(place, run), "go", "Go?").shown for _ in range(2)]
    assert shown[0] == shown[1]
    assert len(world.workflows.approvals(TENANT, "tester").list(run=run).items) == 1


def test_no_decision_answers_another_approval(
    place: Place, world: World, run: str, aside: Callable[..., Future[Any]]
) -> None:
    """An earlier one, where each call is a step of its own, as in the run `direct`."""
    box, key = Toolbox(place), f"deploy-{run}"
    old = box.workflow.request_approval(key, "Deploy 1?", wait=False)
    assert decide(world, old["links"][0]["approve_url"]) in (200, 303)
    decided = aside(box.workflow.request_approval, approval_key=key, title="Deploy 2?")
    until(lambda: world.waits_for(f"approval_{key}"))
    with pytest.raises(ApprovalKeyTaken):
        box.workflow.request_approval(key, "Deploy 3?")
    approvals = world.workflows.approvals(TENANT, "tester")
    newest = approvals.list(limit=1).items[0]
    assert newest.title == "Deploy 2?"
    decide(world, approvals.links(world.server.address, newest)[0].reject_url)
    result = decided.result(WAIT_S)
    assert (result["status"], result["approval_id"]) == ("rejected", newest.approval_id)


def test_items_that_ask_by_one_key_are_not_answered_by_one_decision(
    place: Place, world: World, run: str
) -> None:
    ask = tool("tools.workflow.request_approval")
    first = ask(calling(place, run, iteration="0"), "pay", "Pay 1?")
    with pytest.raises(ApprovalKeyTaken):
        ask(calling(place, run, iteration="1"), "pay", "Pay 1,000,000?")
    second = ask(calling(place, run, iteration="1"), "pay-1", "Pay 1,000,000?")
    decide(world, first.shown["links"][0]["approve_url"])
    wait = world.place("embedded").wait
    assert first.result(wait(first.event_name, None, WAIT_S, run=run))["status"] == "approved"
    assert wait(second.event_name, None, 0, run=run).event is None


def test_a_step_that_is_begun_again_late_is_told_of_its_own_approval(
    place: Place, world: World, run: str
) -> None:
    """It was down while its approval was decided, and while another one took the key."""
    ask = tool("tools.workflow.request_approval")
    waiting = ask(calling(place, run, iteration="0"), "pay", "Pay 1?")
    decide(world, waiting.shown["links"][0]["approve_url"], "mine")
    later = ask(calling(place, run, iteration="1"), "pay", "Pay 1,000,000?")
    again = ask(calling(place, run, iteration="0"), "pay", "Pay 1?")
    assert (again["status"], again["comment"]) == ("approved", "mine")
    assert again["approval_id"] == waiting.shown["approval_id"]
    # Begun before the decision, but its wait after the other question: what that comes to is
    # no answer for it.
    decide(world, later.shown["links"][0]["reject_url"])
    claimed = place.wait("approval_pay", None, WAIT_S, run=run)
    assert claimed.payload["status"] == "rejected"
    assert waiting.result(claimed) == again
    assert later.result(claimed)["status"] == "rejected"


def test_what_decides_another_approval_is_no_result(place: Place, world: World, run: str) -> None:
    ask = tool("tools.workflow.request_approval")
    one = ask(calling(place, run), "one", "?")
    other = ask(calling(place, run, "other"), "other", "?")
    decide(world, other.shown["links"][0]["approve_url"])
    claimed = place.wait(other.event_name, None, WAIT_S, run=run)
    with pytest.raises(ToolFailed, match="another approval"):
        one.result(claimed)


def test_an_impossible_approval_is_refused(tools: Toolbox) -> None:
    with pytest.raises(InvalidRequest):
        tools.workflow.request_approval("go", "", wait=False)
    with pytest.raises(InvalidWorkflow, match="one_click: true or false, not this text"):
        tools.workflow.request_approval("go", "Go?", one_click="yes")


# --- webhooks


def test_a_signed_call_is_an_event_of_the_run(tools: Toolbox, world: World, run: str) -> None:
    hook = tools.workflow.register_webhook(
        "github_pr", {"kind": "github", "secret_id": "hub"}, event_name="pull_request"
    )
    assert hook == {
        "webhook_id": hook["webhook_id"],
        "webhook_url": f"{world.server.address}/api/v1/webhooks/{hook['webhook_id']}",
        "event_name": "pull_request",
        "correlation_key": None,
        "expires_at": None,
    }
    body = json.dumps({"action": "opened"})
    headers = {
        "Content-Type": "application/json",
        "X-GitHub-Event": "pull_request",
        "X-GitHub-Delivery": str(uuid.uuid4()),
        "X-Hub-Signature-256": "sha256=" + hmac.digest(SECRET, body.encode(), "sha256").hex(),
    }
    assert world.server.ask("POST", hook["webhook_url"], body, headers=headers).status == 200
    told = tools.workflow.wait_for_event("pull_request", timeout_seconds=WAIT_S)
    assert told["body"] == {"action": "opened"}


def test_a_step_registers_one_webhook_however_often_it_is_begun(
    place: Place, world: World, run: str
) -> None:
    register = tool("tools.workflow.register_webhook")
    config = {"kind": "stripe", "secret_id": "hub"}
    hooks = [register(calling(place, run), "paid", config) for _ in range(2)]
    assert hooks[0] == hooks[1]
    assert len(world.workflows.webhooks(TENANT, "tester").list(run=run).items) == 1


def test_repeats_are_accepted_where_a_step_asks_for_them(
    tools: Toolbox, world: World, run: str
) -> None:
    config = {"kind": "github", "secret_id": "hub"}
    hooks = [
        tools.workflow.register_webhook("nightly", config, repeats=repeats)
        for repeats in ("accept", "refuse")
    ]
    webhooks = world.workflows.webhooks(TENANT, "tester")
    repeats = [webhooks.get(hook["webhook_id"]).repeats for hook in hooks]
    assert repeats == ["accept", "refuse"]


@pytest.mark.parametrize(
    ("config", "error", "named"),
    [
        ({"kind": "github", "secret_id": "none"}, InvalidRequest, "secret"),
        ({"kind": "morse", "secret_id": "hub"}, InvalidRequest, "morse|github"),
        ({"kind": "github"}, InvalidWorkflow, r"signature_config\.secret_id: a text"),
        ("github", InvalidWorkflow, "signature_config: an object"),
    ],
)
def test_an_impossible_webhook_is_refused(
    tools: Toolbox, config: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        tools.workflow.register_webhook("paid", config)


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda tools: tools.storage.request_upload(name="x", max_files=0), "max_files"),
        (lambda tools: tools.storage.request_upload(name="x", callback_url="a"), "callback_url"),
        (lambda tools: tools.workflow.request_approval("k", ""), "title"),
        (
            lambda tools: tools.workflow.register_webhook("a", {"kind": "ci", "secret_id": "hub"}),
            "kind",
        ),
        (
            lambda tools: tools.workflow.register_webhook(
                "a", {"kind": "github", "secret_id": "none"}
            ),
            "secret_id",
        ),
    ],
)
def test_a_refusal_names_the_field_and_says_why(
    tools: Toolbox, ask: Callable[[Toolbox], Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(tools)
    assert refused.value.field == field
    assert str(refused.value) == f"field '{field}': {refused.value.reason}"
    assert field not in refused.value.reason.split(":")[0]


# --- the toolbox


def test_by_default_a_toolbox_works_for_no_run(place: Place) -> None:
    stored = Toolbox(place).storage.store(name="a", data="x")
    assert parse_reference(stored["storage_ref"]).workflow_run_id == DIRECT_RUN


def test_a_tool_that_is_not_there_is_named(tools: Toolbox) -> None:
    with pytest.raises(InvalidWorkflow, match=r"'tools\.mail\.send': no such tool"):
        tools.mail.send(to="a")


def test_arguments_that_a_tool_does_not_take_are_refused(tools: Toolbox) -> None:
    with pytest.raises(InvalidWorkflow, match="unexpected keyword argument 'nam'"):
        tools.storage.store(name="a", data="x", nam="b")
    with pytest.raises(InvalidWorkflow, match="missing a required argument: 'data'"):
        tools.storage.store(name="a")


def test_a_registry_takes_more_tools(place: Place, run: str) -> None:
    registry = Registry()

    def shout(calling: Calling, text: str) -> str:
        return f"{calling.tenant_id}: {text.upper()}"

    registry.add("tools.acme.shout", shout)
    assert Toolbox(place, run=run, registry=registry).acme.shout("ho") == f"{TENANT}: HO"


# --- tools that need more than a place


def test_a_model_reads_a_file_of_the_tenant(tools: Toolbox, world: World, run: str) -> None:
    text = "Tides are caused by the moon. The moon is far away. Cheese is made of milk."
    stored = tools.storage.store(name="paper", data=text, content_type="text/plain")
    attached = [{"type": "storage_ref", "ref": stored["storage_ref"]}]
    said = tools.llm.call(model="gpt-4", prompt="Summarize in 6 words.", attachments=attached)
    assert said["model"] == "local/extractive"
    assert said["content"] in text
    assert said["content"] != text
    foreign = Toolbox(world.place("embedded", "other"), run=run)
    theirs = foreign.storage.store(name="paper", data=text)
    attached = [{"type": "storage_ref", "ref": theirs["storage_ref"]}]
    with pytest.raises(NotFound):
        tools.llm.call(model="gpt-4", prompt="Summarize.", attachments=attached)


def test_a_command_runs_where_the_tools_are(place: Place, run: str) -> None:
    with pytest.raises(ToolFailed, match="allow_shell"):
        Toolbox(place, run=run).shell.run("echo here")
    settings = Settings()
    allowed = msgspec.structs.replace(settings.workflows, allow_shell=True)
    tools = Toolbox(place, run=run, settings=msgspec.structs.replace(settings, workflows=allowed))
    assert tools.shell.run("echo here")["stdout"] == "here"
