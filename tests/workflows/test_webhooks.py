"""Webhooks: what is signed well becomes one event, once, for whom it is."""

from __future__ import annotations

import hmac
import ipaddress
import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, urlencode

import msgspec
import pytest

from cas.catalog import Transaction
from cas.catalog.images import encode
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import EventSettings, Settings, Size, StoreSettings
from cas.dating import date_all
from cas.endings import end
from cas.errors import (
    BadSignature,
    InvalidName,
    InvalidRequest,
    KeyReused,
    NotFound,
    RunEnded,
    TooLarge,
    TooManyHeld,
    TooManyKept,
    WebhookClosed,
)
from cas.events import NO_LIMIT, Room, append_event, claim, subscribe
from cas.forgetting import BATCH
from cas.once import OnceKey, step_key
from cas.records import (
    CANCELLED,
    COMPLETED,
    KEY_BYTES,
    RUNNING,
    Event,
    Once,
    Run,
    Subscription,
    Webhook,
)
from cas.repeats import QUIET_S, Repeats
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.totals import held_of, kept_of
from tests.audit import audit
from tests.clocks import KEEP_US, START_US, HandClock
from workflows.complaints import Complaints
from workflows.notation import LEVELS_MAX, is_too_deep
from workflows.secrets import Secrets
from workflows.signatures import Address, Call
from workflows.webhooks import (
    CALLS_FORGOTTEN_MAX,
    Reception,
    Taken,
    WebhookCall,
    WebhookRequest,
    Webhooks,
)

KEY = bytes(range(32))
SECRET = b"It's a Secret to Everybody"
STANDARD_SECRET = b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SETTINGS = EventSettings()
RUN = "01900000-0000-7000-8000-000000000001"
GITHUB_CALL = WebhookRequest("github_pr", "github", "github", run=RUN)


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        own = secrets(store)
        own.put("github", SECRET)
        own.put("stripe", b"whsec_test_secret")
        own.put("standard", STANDARD_SECRET)
        own.put("twilio", b"12345")
        yield store


def secrets(store: Store, tenant: str = "acme") -> Secrets:
    return Secrets(store.catalog, (KEY,), tenant_id=tenant, actor="ann", request_id="")


def webhooks(store: Store, tenant: str = "acme") -> Webhooks:
    return Webhooks(store.catalog, tenant_id=tenant, actor="ann", request_id="r1")


def opened(store: Store, webhook: Webhook, settings: EventSettings = SETTINGS) -> WebhookCall:
    return called(store, webhook.webhook_id, settings)


def called(
    store: Store,
    webhook_id: str,
    settings: EventSettings = SETTINGS,
    ring: tuple[bytes, ...] = (KEY,),
    complaints: Complaints | None = None,
    room: Room = NO_LIMIT,
) -> WebhookCall:
    complaints = complaints or Complaints()
    reception = Reception(store.catalog, ring, settings, store.now_us, complaints, room)
    return reception.open(webhook_id, "r2")


def take(store: Store, webhook: Webhook, call: Call, settings: EventSettings = SETTINGS) -> Taken:
    """What becomes of a call that is signed well."""
    return opened(store, webhook, settings).prove(call).take()


def github(
    body: bytes,
    address: Address | None = None,
    media_type: str = "application/json",
    **headers: str,
) -> Call:
    signature = "sha256=" + hmac.digest(SECRET, body, "sha256").hex()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    given = {"X-Hub-Signature-256": signature, "Content-Type": media_type, **named}
    return Call(given, body, "https://hooks.example/", address)


def stripe(body: bytes, at_us: int) -> Call:
    at_s = at_us // SECOND_US
    signed = b"%d.%s" % (at_s, body)
    signature = hmac.digest(b"whsec_test_secret", signed, "sha256").hex()
    header = {"Stripe-Signature": f"t={at_s},v1={signature}", "Content-Type": "application/json"}
    return Call(header, body, "https://hooks.example/")


def event(store: Store, taken: Taken) -> Event:
    assert taken.event_id is not None
    with store.catalog.read() as snapshot:
        found = snapshot.get(Event, taken.event_id)
    assert found is not None
    return found


def events(store: Store) -> list[Event]:
    with store.catalog.read() as snapshot:
        return snapshot.range(Event, "", limit=1000)


def waited(
    store: Store, name: str, run: str, key: str | None = None, step: str = "wait"
) -> Subscription:
    return store.catalog.write(
        lambda txn: subscribe(txn, "acme", run, step, name, key, None), actor="ann"
    )


def claimed(store: Store, wait: Subscription) -> dict[str, Any] | None:
    """The payload of the event that a wait was given."""

    def change(txn: Transaction) -> dict[str, Any] | None:
        current = txn.get(Subscription, wait.subscription_id)
        assert current is not None
        current = claim(txn, current, keep_us=KEEP_US)
        found = txn.get(Event, current.event_id) if current.event_id else None
        return None if found is None else json.loads(found.payload)

    return store.catalog.write(change, actor="ann")


# --- registering


def test_a_webhook_is_what_was_asked_for(store: Store) -> None:
    wanted = WebhookRequest(
        "github_pr",
        "github",
        "github",
        event_name="pr.merged",
        correlation_key="repo-1",
        allowed_networks=["192.0.2.0/24", "2001:db8::/32"],
        single_use=True,
        expires_in_s=3600,
        run=RUN,
    )
    webhook = webhooks(store).register(wanted)
    assert webhook == webhooks(store).get(webhook.webhook_id)
    assert (webhook.event_name, webhook.correlation_key) == ("pr.merged", "repo-1")
    assert webhook.allowed_networks == ["192.0.2.0/24", "2001:db8::/32"]
    assert (webhook.created_at, webhook.expires_at) == (START_US, START_US + HOUR_US)
    assert (webhook.created_by, webhook.workflow_run_id, webhook.calls) == ("ann", RUN, 0)


def test_an_event_has_the_name_of_its_webhook_when_none_is_asked_for(store: Store) -> None:
    wanted = WebhookRequest("/github/pr", "github", "github")
    assert webhooks(store).register(wanted).event_name == "webhook_/github/pr"


def test_listing_is_newest_first_by_tenant_and_run(store: Store, clock: HandClock) -> None:
    secrets(store, "globex").put("github", SECRET)
    made = []
    for run in (RUN, "direct", RUN):
        clock.advance(SECOND_US)
        made.append(webhooks(store).register(WebhookRequest("x", "github", "github", run=run)))
    webhooks(store, "globex").register(WebhookRequest("x", "github", "github"))
    page = webhooks(store).list(limit=2)
    assert page.items == [made[2], made[1]]
    assert webhooks(store).list(cursor=page.next_cursor).items == [made[0]]
    assert webhooks(store).list(run=RUN).items == [made[2], made[0]]


def test_webhooks_of_others_are_not_there(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    other = webhooks(store, "globex")
    for act in (other.get, other.remove):
        with pytest.raises(NotFound):
            act(webhook.webhook_id)
    with pytest.raises(InvalidRequest, match="`blobcask secret set github --tenant globex`"):
        other.register(GITHUB_CALL)


def test_a_step_that_begins_again_finds_its_webhook(store: Store) -> None:
    key = step_key(RUN, "register", "webhook")
    first = webhooks(store).register(GITHUB_CALL, key)
    assert webhooks(store).register(GITHUB_CALL, key) == first
    asked = OnceKey("webhooks", "k", b"one")
    webhooks(store).register(GITHUB_CALL, asked)
    with pytest.raises(KeyReused):
        webhooks(store).register(GITHUB_CALL, OnceKey("webhooks", "k", b"two"))


@pytest.mark.parametrize(
    "changed",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": "x" * 201},
        {"kind": "gitlab"},
        {"secret_id": "unknown"},
        {"signature": {"header": "X"}},
        {"event_name": "approval_payment"},  # who may post could approve
        {"event_name": "upload_1"},
        {"event_name": "x" * 300},
        {"correlation_key": ""},
        {"allowed_networks": ["192.0.2.1/24"]},
        {"allowed_networks": ["github.com"]},
        {"allowed_networks": ["192.0.2.1"] * 101},
        {"expires_in_s": 0},
        {"expires_in_s": 367 * 24 * 3600},
    ],
)
def test_what_cannot_be_right_is_refused(store: Store, changed: dict[str, Any]) -> None:
    asked = {"name": "x", "kind": "github", "secret_id": "github", **changed}
    with pytest.raises(InvalidRequest):
        webhooks(store).register(WebhookRequest(**asked))


def test_names_that_no_reference_could_hold_are_refused(store: Store) -> None:
    for wanted in (
        WebhookRequest("x", "github", "github", run="a/b"),
        WebhookRequest("x", "github", "a/b"),
    ):
        with pytest.raises(InvalidName):
            webhooks(store).register(wanted)


# --- a call


def test_a_call_wakes_the_run_that_waits_for_it(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    wait = waited(store, webhook.event_name, RUN)
    call = github(
        b'{"action": "closed"}',
        X_GitHub_Event="pull_request",
        X_GitHub_Delivery="d1",
        User_Agent="GitHub-Hookshot/1",
        Cookie="not told",
    )
    taken = take(store, webhook, call)
    assert (taken.delivered_to, taken.duplicate) == (1, False)
    assert claimed(store, wait) == {
        "webhook_id": webhook.webhook_id,
        "name": "github_pr",
        "kind": "github",
        "delivery_id": "d1",
        "received_at": "2026-01-01T00:00:00Z",
        "headers": {
            "content-type": "application/json",
            "user-agent": "GitHub-Hookshot/1",
            "x-github-event": "pull_request",
            "x-github-delivery": "d1",
        },
        "body_form": "json",
        "body": {"action": "closed"},
    }
    kept = webhooks(store).get(webhook.webhook_id)
    assert (kept.calls, kept.consumed_at) == (1, START_US)
    assert list(store.catalog.changes(0))[-2].actor == f"webhook:{webhook.webhook_id}"


def test_a_call_that_comes_first_is_kept_for_one_wait_of_its_run(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    taken = take(store, webhook, github(b"{}"))
    assert taken.delivered_to == 0
    other = waited(store, webhook.event_name, "01900000-0000-7000-8000-000000000002")
    first = waited(store, webhook.event_name, RUN)
    second = waited(store, webhook.event_name, RUN, step="again")
    assert claimed(store, other) is None
    assert claimed(store, second) is None
    told = claimed(store, first)
    assert told is not None
    assert told["webhook_id"] == webhook.webhook_id


def test_calls_for_no_run_are_for_any_of_the_tenant(store: Store) -> None:
    webhook = webhooks(store).register(WebhookRequest("ci", "github", "github"))
    waits = [waited(store, webhook.event_name, run) for run in (RUN, "direct")]
    assert take(store, webhook, github(b"{}")).delivered_to == 2
    assert all(claimed(store, wait) for wait in waits)


def test_a_correlation_key_says_for_which_wait_it_is(store: Store) -> None:
    wanted = WebhookRequest("ci", "github", "github", correlation_key="a")
    webhook = webhooks(store).register(wanted)
    wrong = waited(store, webhook.event_name, RUN, "b")
    right = waited(store, webhook.event_name, RUN, "a", step="other")
    take(store, webhook, github(b"{}"))
    assert (claimed(store, wrong), bool(claimed(store, right))) == (None, True)


def test_a_wrong_signature_leaves_no_trace(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    before = store.catalog.position()
    call = Call({"X-Hub-Signature-256": "sha256=" + "0" * 64}, b"{}", "")
    with pytest.raises(BadSignature):
        take(store, webhook, call)
    assert store.catalog.position() == before


@pytest.mark.parametrize("name", ["00000000-0000-7000-8000-000000000000", "f", "", "a\0b"])
def test_a_webhook_that_is_not_there_is_not_told_apart_from_a_wrong_signature(
    store: Store, name: str
) -> None:
    with pytest.raises(NotFound):
        called(store, name)
    webhooks(store).register(GITHUB_CALL)
    call = called(store, name)
    with pytest.raises(BadSignature):
        call.prove(Call({}, b"{}", ""))
    with pytest.raises(BadSignature):  # not even by who signs for the one beside it
        call.prove(github(b"{}"))


def test_the_secret_of_another_tenant_signs_nothing_here(store: Store) -> None:
    secrets(store, "globex").put("github", b"theirs")
    webhook = webhooks(store, "globex").register(WebhookRequest("x", "github", "github"))
    with pytest.raises(BadSignature):
        take(store, webhook, github(b"{}"))


def test_a_secret_that_is_removed_or_changed_is_good_no_more(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    secrets(store).put("github", b"new\n" + SECRET)
    take(store, webhook, github(b"1"))
    secrets(store).put("github", b"new")
    with pytest.raises(BadSignature):
        take(store, webhook, github(b"2"))
    secrets(store).remove("github")
    with pytest.raises(BadSignature):
        take(store, webhook, github(b"2"))
    empty = "sha256=" + hmac.digest(b"", b"2", "sha256").hex()
    with pytest.raises(BadSignature):
        take(store, webhook, Call({"X-Hub-Signature-256": empty}, b"2", ""))


def test_lost_keys_are_told_to_the_operator_and_to_nobody_who_calls(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    lost = (bytes(32),)
    unknown = "00000000-0000-7000-8000-000000000000"
    refused = called(store, unknown, ring=lost)
    with pytest.raises(BadSignature):
        refused.prove(github(b"{}"))
    assert not caplog.records
    call = called(store, webhook.webhook_id, ring=lost)
    empty = "sha256=" + hmac.digest(b"", b"{}", "sha256").hex()
    for signed in (
        github(b"{}"),
        Call({}, b"{}", ""),
        Call({"X-Hub-Signature-256": empty}, b"{}", ""),
    ):
        with pytest.raises(BadSignature):
            call.prove(signed)
    (record,) = caplog.records
    assert (record.levelname, webhook.webhook_id in record.message) == ("ERROR", True)
    assert "ROOT/keys/secrets" in record.message


def test_who_calls_and_proves_nothing_writes_a_line_a_minute(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    complaints = Complaints(Repeats(lambda: now_s))
    made = [webhooks(store).register(GITHUB_CALL) for _ in range(2)]
    newer = bytes(32)

    def call() -> int:
        """How many lines each webhook has, called many times by anybody."""
        for webhook in made * 5:
            opened = called(store, webhook.webhook_id, ring=lost, complaints=complaints)
            with pytest.raises(BadSignature):
                opened.prove(Call({}, b"{}", ""))
        return len(caplog.records)

    lost: tuple[bytes, ...] = (newer,)
    assert call() == 2
    now_s += QUIET_S - 1
    assert call() == 2
    now_s += 1
    assert call() == 4
    # What a secret was before is of the secret, not of the webhook.
    own = Secrets(store.catalog, (KEY, newer), tenant_id="acme", actor="ann", request_id="")
    own.put("github", b"next", keep_old_us=HOUR_US)
    for _ in range(2):
        assert call() == 5
    assert "secret github of acme" in caplog.records[-1].message


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("192.0.2.7", True),
        ("2001:db8::7", True),
        ("198.51.100.7", False),
        (None, False),  # nobody says who it is
    ],
)
def test_only_allowed_networks_may_call(store: Store, address: str | None, may: bool) -> None:
    wanted = WebhookRequest(
        "x", "github", "github", allowed_networks=["192.0.2.0/24", "2001:db8::/32"]
    )
    webhook = webhooks(store).register(wanted)
    call = github(b"{}", None if address is None else ipaddress.ip_address(address))
    if may:
        assert take(store, webhook, call).event_id
    else:
        with pytest.raises(BadSignature):
            take(store, webhook, call)
        assert events(store) == []


def test_a_body_has_a_limit(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    settings = EventSettings(payload_max=Size(1024))
    take(store, webhook, github(b"x" * 1024), settings)
    with pytest.raises(TooLarge):
        take(store, webhook, github(b"x" * 1025), settings)


PAYLOAD_MAX = 64 * 1024


@pytest.mark.parametrize(
    ("media_type", "body", "form"),
    [
        ("text/plain", b"\x01" * PAYLOAD_MAX, "base64"),  # six times as long in JSON
        ("application/json", b"[" + b"1e9," * (PAYLOAD_MAX // 4 - 1) + b"1]", "base64"),
        ("application/x-www-form-urlencoded", b"a=" + b"\x01" * (PAYLOAD_MAX - 2), "base64"),
        ("application/octet-stream", b"\xff" * PAYLOAD_MAX, "base64"),
        ("text/plain", b"x" * PAYLOAD_MAX, "text"),
        ("application/json", b'"' + b"x" * (PAYLOAD_MAX - 2) + b'"', "json"),
        # Little of it is no matter.
        ("text/plain", b"\x01" * (PAYLOAD_MAX // 5), "text"),
        ("application/json", b"[1e9,1e9]", "json"),
    ],
)
def test_an_event_is_not_much_longer_than_the_longest_call(
    store: Store, media_type: str, body: bytes, form: str
) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    settings = EventSettings(payload_max=Size(PAYLOAD_MAX))
    call = github(body, media_type=media_type, X_GitHub_Delivery="d" * 8000)
    payload = event(store, take(store, webhook, call, settings)).payload
    assert len(payload) <= PAYLOAD_MAX * 4 / 3 + 4096
    told = json.loads(payload)
    assert told["body_form"] == form
    assert told["delivery_id"] == "d" * 1000
    if form == "base64":
        assert b64decode(told["body"]) == body


@pytest.mark.parametrize(
    ("media_type", "body", "form", "value"),
    [
        ("application/json", b'{"a": [1, null]}', "json", {"a": [1, None]}),
        ("application/vnd.github+json; charset=utf-8", b"[]", "json", []),
        ("application/json", b"null", "json", None),
        ("application/json", b"{broken", "text", "{broken"),
        ("application/json", b"[" * 5000, "text", "[" * 5000),
        ("application/x-www-form-urlencoded", b"a=1&b=&a=2&a=3", "form",
         {"a": ["1", "2", "3"], "b": ""}),
        ("application/x-www-form-urlencoded", b"payload=%7B%22a%22%3A1%7D", "json", {"a": 1}),
        ("application/x-www-form-urlencoded", b"payload=no", "form", {"payload": "no"}),
        ("application/x-www-form-urlencoded", b"a=%ff", "text", "a=%ff"),
        ("text/plain", "é".encode(), "text", "é"),
        ("", b"", "text", ""),
        ("application/octet-stream", b"\xff\x00", "base64", "/wA="),
    ],
)  # fmt: skip
def test_a_workflow_reads_the_body_as_what_it_is(
    store: Store, media_type: str, body: bytes, form: str, value: Any
) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    taken = take(store, webhook, github(body, media_type=media_type))
    payload = json.loads(event(store, taken).payload)
    assert (payload["body_form"], payload["body"]) == (form, value)


# --- handshakes

PING = b'{"zen": "Design for failure.", "hook_id": 1, "hook": {"type": "Repository"}}'
PINGS = [
    (PING, "application/json"),
    (PING, "application/vnd.github+json; charset=utf-8"),
    (b"payload=" + quote_plus(PING).encode(), "application/x-www-form-urlencoded"),
    # The content type is signed by nobody, nor is the header that names the event.
    (PING, "text/plain"),
    (PING, "application/x-www-form-urlencoded"),
    (b"payload=" + quote_plus(PING).encode(), ""),
]


@pytest.mark.parametrize(("body", "media_type"), PINGS)
@pytest.mark.parametrize("event", ["ping", "push", ""])
def test_githubs_ping_is_no_event_and_spends_nothing(
    store: Store, body: bytes, media_type: str, event: str
) -> None:
    wanted = WebhookRequest("x", "github", "github", single_use=True)
    webhook = webhooks(store).register(wanted)
    wait = waited(store, webhook.event_name, "direct")
    before = store.catalog.position()
    ping = github(body, media_type=media_type, X_GitHub_Event=event)
    assert take(store, webhook, ping) == Taken(None, 0)
    assert (events(store), claimed(store, wait)) == ([], None)
    assert webhooks(store).get(webhook.webhook_id) == webhook
    assert [change.actor for change in store.catalog.changes(before.seq)] == []
    assert take(store, webhook, github(b"{}")).event_id


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[]", b'"zen"', b'{"zen": "x"}', b'{"zen": 1, "hook_id": 1}', b'{"hook": {}}',
     b"zen=x&hook_id=1", b"payload=%7B%22zen%22%3A%22x%22%7D&payload=1", b"[" * 5000, b"\xff"],
)  # fmt: skip
def test_who_says_ping_in_a_header_alone_makes_no_call_one(store: Store, body: bytes) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    assert take(store, webhook, github(body, X_GitHub_Event="ping")).event_id


def test_a_handshake_is_answered_only_while_calls_are_taken(store: Store, clock: HandClock) -> None:
    wanted = WebhookRequest("x", "github", "github", expires_in_s=60)
    webhook = webhooks(store).register(wanted)
    assert take(store, webhook, github(PING)).event_id is None
    clock.advance(60 * SECOND_US)
    with pytest.raises(WebhookClosed):
        take(store, webhook, github(PING))
    with pytest.raises(BadSignature):
        take(store, webhook, Call({"X-GitHub-Event": "ping"}, PING, ""))


SLACK_SECRET = b"8f742231b10e8888abcd99yyyzzz85a5"
# As Slack documents it.
CHALLENGE = "3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P"


def slack(
    body: bytes, at_us: int, media_type: str = "application/json", key: bytes = SLACK_SECRET
) -> Call:
    at_s = at_us // SECOND_US
    signature = hmac.digest(key, b"v0:%d:%s" % (at_s, body), "sha256").hex()
    headers = {
        "X-Slack-Request-Timestamp": str(at_s),
        "X-Slack-Signature": f"v0={signature}",
        "Content-Type": media_type,
    }
    return Call(headers, body, "https://hooks.example/")


def verification(challenge: Any) -> bytes:
    told = {"token": "Jhj5dZrVaK7ZwHHjRyZWjbDl", "type": "url_verification"}
    return json.dumps({**told, "challenge": challenge}).encode()


def takes_slack(store: Store, **more: Any) -> Webhook:
    secrets(store).put("slack", SLACK_SECRET)
    return webhooks(store).register(WebhookRequest("chat", "slack", "slack", **more))


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", ""])
def test_slacks_challenge_is_answered_and_is_no_event(
    store: Store, clock: HandClock, media_type: str
) -> None:
    webhook = takes_slack(store, single_use=True)
    call = slack(verification(CHALLENGE), clock.time_us, media_type)
    for _ in range(2):
        assert take(store, webhook, call) == Taken(None, 0, challenge=CHALLENGE)
    assert (events(store), remembered(store, webhook)) == ([], [])
    assert webhooks(store).get(webhook.webhook_id) == webhook
    event = slack(b'{"type": "event_callback", "event_id": "Ev1"}', clock.time_us)
    assert take(store, webhook, event).event_id


def test_an_old_challenge_and_one_that_slack_did_not_sign_are_not_answered(
    store: Store, clock: HandClock
) -> None:
    webhook = takes_slack(store)
    body = verification(CHALLENGE)
    call = slack(body, clock.time_us)
    with pytest.raises(BadSignature):
        take(store, webhook, slack(body, clock.time_us, key=b"another"))
    with pytest.raises(BadSignature):  # nor any other challenge
        take(store, webhook, Call(call.headers, verification("x"), ""))
    clock.advance(300 * SECOND_US)
    assert take(store, webhook, call).challenge == CHALLENGE
    clock.advance(SECOND_US)
    with pytest.raises(InvalidRequest, match="301 s"):
        take(store, webhook, call)
    # Another kind does not answer it: it is told what happened, whatever that says.
    other = webhooks(store).register(GITHUB_CALL)
    assert take(store, other, github(body)).challenge is None


@pytest.mark.parametrize("challenge", [None, 1, "", "x" * 257, "a\r\nb", "é", "\0", ["x"], {}])
def test_a_challenge_that_slack_does_not_send_is_refused(
    store: Store, clock: HandClock, challenge: Any
) -> None:
    webhook = takes_slack(store)
    with pytest.raises(InvalidRequest, match="challenge"):
        take(store, webhook, slack(verification(challenge), clock.time_us))
    assert events(store) == []


def test_slacks_next_attempt_has_a_new_time_and_is_the_same_event(
    store: Store, clock: HandClock
) -> None:
    webhook = takes_slack(store)
    body = b'{"type": "event_callback", "event_id": "Ev0LAN670R", "event": {"type": "message"}}'
    first = take(store, webhook, slack(body, clock.time_us))
    clock.advance(HOUR_US)
    again = take(store, webhook, slack(body, clock.time_us))
    assert (again.event_id, again.duplicate) == (first.event_id, True)
    payload = json.loads(event(store, first).payload)
    assert (payload["kind"], payload["delivery_id"]) == ("slack", "Ev0LAN670R")


def test_commands_and_what_people_do_in_slack_are_read(store: Store, clock: HandClock) -> None:
    webhook = takes_slack(store)
    form = "application/x-www-form-urlencoded"
    button = b"payload=" + quote_plus('{"type": "block_actions", "trigger_id": "1.2"}').encode()
    command = b"command=%2Fdeploy&text=payload%3D1&trigger_id=1.3"
    told = []
    for body in (button, command):
        taken = take(store, webhook, slack(body, clock.time_us, form))
        payload = json.loads(event(store, taken).payload)
        told.append((payload["body_form"], payload["body"]["trigger_id"]))
    assert told == [("json", "1.2"), ("form", "1.3")]
    # Said again a second later it was said twice.
    clock.advance(SECOND_US)
    assert not take(store, webhook, slack(command, clock.time_us, form)).duplicate


# --- a secret that is changed


def test_both_secrets_are_good_while_the_old_one_is_kept(store: Store, clock: HandClock) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    secrets(store).put("github", b"the next one", keep_old_us=HOUR_US)
    clock.advance(HOUR_US - 1)
    new = hmac.digest(b"the next one", b"1", "sha256").hex()
    take(store, webhook, Call({"X-Hub-Signature-256": f"sha256={new}"}, b"1", ""))
    take(store, webhook, github(b"2"))
    clock.advance(1)
    with pytest.raises(BadSignature):
        take(store, webhook, github(b"3"))
    new = hmac.digest(b"the next one", b"3", "sha256").hex()
    take(store, webhook, Call({"X-Hub-Signature-256": f"sha256={new}"}, b"3", ""))


def test_the_same_call_by_the_new_secret_is_the_same_event(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    first = take(store, webhook, github(b"1"))
    secrets(store).put("github", b"the next one", keep_old_us=HOUR_US)
    new = hmac.digest(b"the next one", b"1", "sha256").hex()
    call = Call({"X-Hub-Signature-256": f"sha256={new}"}, b"1", "")
    assert take(store, webhook, call).event_id == first.event_id


def test_an_old_secret_is_kept_while_the_clock_is_in_doubt(store: Store, clock: HandClock) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    clock.trusted = False
    clock.advance(3650 * DAY_US)
    secrets(store).put("github", b"the next one", keep_old_us=HOUR_US)
    clock.advance(HOUR_US)
    take(store, webhook, github(b"1"))
    # Its hour begins when the clock is believed, and not before.
    clock.trusted = True
    take(store, webhook, github(b"2"))
    assert date_all(store.catalog).workflows
    clock.advance(HOUR_US - 1)
    take(store, webhook, github(b"3"))
    clock.advance(1)
    with pytest.raises(BadSignature):
        take(store, webhook, github(b"4"))


def test_twilio_signs_the_address_it_calls(store: Store) -> None:
    webhook = webhooks(store).register(WebhookRequest("sms", "twilio", "twilio"))
    parameters = {"MessageSid": "SM1", "MessageStatus": "sent"}
    url = f"https://hooks.example/api/v1/webhooks/{webhook.webhook_id}"
    signed = url + "".join(name + parameters[name] for name in sorted(parameters))
    signature = b64encode(hmac.digest(b"12345", signed.encode(), "sha1")).decode()
    headers = {
        "X-Twilio-Signature": signature,
        "Content-Type": "application/x-www-form-urlencoded",
    }
    body = urlencode(parameters).encode()
    taken = take(store, webhook, Call(headers, body, url))
    assert json.loads(event(store, taken).payload)["body"] == parameters
    with pytest.raises(BadSignature):
        take(store, webhook, Call(headers, body, url.replace("hooks", "other")))


@pytest.mark.parametrize("query", ["", "?lang=de"])
def test_a_call_of_twilio_is_one_event_wherever_its_address_is_said_to_end(
    store: Store, query: str
) -> None:
    webhook = webhooks(store).register(WebhookRequest("sms", "twilio", "twilio"))
    parameters = [("AccountSid", "AC1"), ("Amount", "100"), ("Body", "?yes")]
    url = f"https://hooks.example/api/v1/webhooks/{webhook.webhook_id}{query}"
    signed = url + "".join(name + value for name, value in parameters)
    signature = b64encode(hmac.digest(b"12345", signed.encode(), "sha1")).decode()
    headers = {
        "X-Twilio-Signature": signature,
        "Content-Type": "application/x-www-form-urlencoded",
    }

    def sent(url: str, parameters: list[tuple[str, str]]) -> Taken:
        call = Call(headers, urlencode(parameters).encode(), url)
        return take(store, webhook, call)

    first = sent(url, parameters)
    for moved in range(1, 4):
        address = url + "".join(name + value for name, value in parameters[:moved])
        again = sent(address, parameters[moved:])
        assert (again.event_id, again.duplicate) == (first.event_id, True)
    cut = [("AccountSid", "AC1"), ("Amount1", "00"), ("Body", "?yes")]
    assert sent(url, cut).event_id == first.event_id
    assert len(events(store)) == 1


# --- the same call again


def test_the_same_call_is_one_event_however_often_it_comes(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    waited(store, webhook.event_name, RUN)
    first = take(store, webhook, github(b"{}", X_GitHub_Delivery="d1"))
    # Another identifier of the delivery makes it no other call: that is not signed.
    for delivery in ("d1", "d2"):
        again = take(store, webhook, github(b"{}", X_GitHub_Delivery=delivery))
        assert again == Taken(first.event_id, 1, duplicate=True)
    assert len(events(store)) == 1
    assert webhooks(store).get(webhook.webhook_id).calls == 1
    assert take(store, webhook, github(b"{ }")).event_id != first.event_id


NIGHTLY = b'{"job": "nightly", "status": "success"}'
PLAIN = {"header": "X-Hub-Signature-256", "prefix": "sha256="}


@pytest.mark.parametrize(
    ("kind", "signature"),
    [("github", None), ("generic", {**PLAIN, "delivery_header": "X-GitHub-Delivery"})],
)
def test_what_is_said_again_each_night_wakes_who_waits_where_repeats_are_accepted(
    store: Store, clock: HandClock, kind: str, signature: dict[str, Any] | None
) -> None:
    wanted = WebhookRequest("ci", kind, "github", signature, repeats="accept")
    webhook = webhooks(store).register(wanted)
    taken = []
    for night in ("0000-1", "0000-2", "0000-3"):
        wait = waited(store, webhook.event_name, RUN, step=night)
        call = github(NIGHTLY, X_GitHub_Delivery=night)
        taken.append(take(store, webhook, call))
        told = claimed(store, wait)
        assert told is not None
        assert told["delivery_id"] == night
        # Its sender tries again, or somebody sends what was captured.
        for _ in range(2):
            again = Taken(taken[-1].event_id, 1, duplicate=True)
            assert take(store, webhook, call) == again
        clock.advance(DAY_US)
    assert len({one.event_id for one in taken}) == 3
    other = take(store, webhook, github(b"{}", X_GitHub_Delivery="0000-3"))
    assert not other.duplicate  # the identifier alone is nobody's
    unnamed = [take(store, webhook, github(NIGHTLY)) for _ in range(2)]
    assert [one.duplicate for one in unnamed] == [False, True]


@pytest.mark.parametrize(
    ("kind", "signature"),
    [("github", None), ("generic", {**PLAIN, "delivery_header": "X-GitHub-Delivery"})],
)
def test_repeats_are_refused_unless_they_are_asked_for(
    store: Store, kind: str, signature: dict[str, Any] | None
) -> None:
    webhook = webhooks(store).register(WebhookRequest("ci", kind, "github", signature))
    assert webhook.repeats == "refuse"
    taken = [take(store, webhook, github(NIGHTLY, X_GitHub_Delivery=night)) for night in "12"]
    assert [one.duplicate for one in taken] == [False, True]


@pytest.mark.parametrize(
    ("kind", "signature", "repeats", "says"),
    [
        ("github", None, "once", "refuse or accept"),
        ("slack", None, "accept", "signed"),
        ("stripe", None, "accept", "signed"),
        ("generic", None, "accept", "signed"),
        ("generic", PLAIN, "accept", "delivery_header"),
        ("generic", {**PLAIN, "id_header": "I", "signed": "{id}.{body}"}, "accept", "signed"),
        ("generic", {**PLAIN, "timestamp_header": "T", "signed": "{timestamp}.{body}",
                     "delivery_header": "D"}, "accept", "signed"),
    ],
)  # fmt: skip
def test_repeats_are_accepted_only_where_nothing_signed_tells_calls_apart(
    store: Store, kind: str, signature: dict[str, Any] | None, repeats: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        webhooks(store).register(WebhookRequest("x", kind, "github", signature, repeats=repeats))


def test_a_webhook_from_before_repeats_were_asked_for_refuses_them(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    place = Webhook.__struct_fields__.index("repeats")
    before = msgspec.msgpack.encode(msgspec.msgpack.decode(encode(webhook))[:place])
    assert msgspec.msgpack.decode(before, type=Webhook) == webhook


def test_a_call_of_githubs_is_remembered_as_long_as_its_webhook(
    store: Store, clock: HandClock
) -> None:
    wanted = WebhookRequest("x", "github", "github", expires_in_s=300 * 24 * 3600)
    webhook = webhooks(store).register(wanted)
    first = take(store, webhook, github(b"{}"))
    clock.advance(299 * DAY_US)
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, clock.time_us, keep_us=KEEP_US)
    execute_sweep(store.catalog, plan)
    assert take(store, webhook, github(b"{}")).event_id == first.event_id


def test_the_same_call_at_two_webhooks_is_two_events(store: Store) -> None:
    made = [webhooks(store).register(GITHUB_CALL) for _ in range(2)]
    assert len({take(store, webhook, github(b"{}")).event_id for webhook in made}) == 2


def test_calls_at_the_same_moment_are_one_event(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: take(store, webhook, github(b"{}")), range(16)))
    assert len({one.event_id for one in taken}) == 1
    assert sum(not one.duplicate for one in taken) == 1


def test_stripes_next_attempt_has_a_new_time_and_is_the_same_event(
    store: Store, clock: HandClock
) -> None:
    webhook = webhooks(store).register(WebhookRequest("pay", "stripe", "stripe"))
    first = take(store, webhook, stripe(b'{"id": "evt_1", "pending": 2}', clock.time_us))
    clock.advance(DAY_US)
    again = take(store, webhook, stripe(b'{"id": "evt_1", "pending": 1}', clock.time_us))
    assert (again.event_id, again.duplicate) == (first.event_id, True)
    assert json.loads(event(store, first).payload)["delivery_id"] == "evt_1"
    other = take(store, webhook, stripe(b'{"id": "evt_2"}', clock.time_us))
    assert not other.duplicate


@pytest.mark.parametrize("by_s", [-301, 301])
def test_a_call_from_long_ago_or_from_the_future_is_refused(
    store: Store, clock: HandClock, by_s: int
) -> None:
    webhook = webhooks(store).register(WebhookRequest("pay", "stripe", "stripe"))
    call = stripe(b'{"id": "evt_1"}', clock.time_us + by_s * SECOND_US)
    with pytest.raises(InvalidRequest, match="301 s"):
        take(store, webhook, call)
    assert events(store) == []
    near = stripe(b'{"id": "evt_1"}', clock.time_us + (by_s // 301) * 300 * SECOND_US)
    assert take(store, webhook, near).event_id


def test_the_tolerance_is_the_registrations(store: Store, clock: HandClock) -> None:
    wanted = WebhookRequest("pay", "stripe", "stripe", signature={"tolerance": 10})
    webhook = webhooks(store).register(wanted)
    with pytest.raises(InvalidRequest):
        take(store, webhook, stripe(b"{}", clock.time_us - 11 * SECOND_US))


def test_an_old_call_that_was_taken_is_answered_as_it_was(store: Store, clock: HandClock) -> None:
    webhook = webhooks(store).register(WebhookRequest("pay", "stripe", "stripe"))
    call = stripe(b'{"id": "evt_1"}', clock.time_us)
    first = take(store, webhook, call)
    clock.advance(DAY_US)
    assert take(store, webhook, call).event_id == first.event_id


def test_a_clock_in_doubt_refuses_nobody_and_takes_nothing_twice(
    memory: Path, clock: HandClock
) -> None:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        secrets(store).put("stripe", b"whsec_test_secret")
        clock.trusted = False
        clock.advance(3650 * DAY_US)
        wanted = WebhookRequest("pay", "stripe", "stripe", expires_in_s=3600)
        webhook = webhooks(store).register(wanted)
        assert webhook.undated_at == START_US
        call = stripe(b'{"id": "evt_1"}', clock.time_us)
        first = take(store, webhook, call)
        assert take(store, webhook, call) == Taken(first.event_id, 0, duplicate=True)


TIMED = {"header": "X-S", "timestamp_header": "X-T", "signed": "{timestamp}.{body}"}


def timed(kind: str, body: bytes, at_us: int) -> Call:
    """A call that is signed with a time, and has no identifier."""
    if kind == "stripe":
        return stripe(body, at_us)
    at_s = str(at_us // SECOND_US)
    signature = hmac.digest(SECRET, at_s.encode() + b"." + body, "sha256").hex()
    return Call({"X-S": signature, "X-T": at_s}, body, "https://hooks.example/")


def takes_timed(store: Store, kind: str, **more: Any) -> Webhook:
    config = {"tolerance": 60} if kind == "stripe" else {**TIMED, "tolerance": 60}
    secret_id = "stripe" if kind == "stripe" else "github"
    return webhooks(store).register(
        WebhookRequest("backup", kind, secret_id, signature=config, **more)
    )


def remembered(store: Store, webhook: Webhook) -> list[Once]:
    with store.catalog.read() as snapshot:
        scope = ("acme", f"webhook:{webhook.webhook_id}")
        return snapshot.range(Once, "", scope, limit=20_000)


def swept(store: Store, clock: HandClock) -> None:
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, clock.time_us, keep_us=KEEP_US)
    execute_sweep(store.catalog, plan)


@pytest.mark.parametrize("kind", ["generic", "stripe"])
def test_what_happens_again_is_another_event_where_no_identifier_says_otherwise(
    store: Store, clock: HandClock, kind: str
) -> None:
    webhook = takes_timed(store, kind)
    body = b'{"status": "backup done"}'
    taken = []
    for _ in range(3):
        call = timed(kind, body, clock.time_us)
        taken.append(take(store, webhook, call))
        assert take(store, webhook, call) == Taken(taken[-1].event_id, 0, duplicate=True)
        clock.advance(SECOND_US)
    assert len({one.event_id for one in taken}) == 3


@pytest.mark.parametrize("kind", ["generic", "stripe"])
@pytest.mark.parametrize("ahead_s", [-60, 0, 60])
@pytest.mark.parametrize("part_us", [0, 1, SECOND_US - 1])
def test_a_call_that_is_forgotten_is_too_old(
    store: Store, clock: HandClock, kind: str, ahead_s: int, part_us: int
) -> None:
    webhook = takes_timed(store, kind)
    call = timed(kind, b"{}", clock.time_us + ahead_s * SECOND_US)
    clock.advance(part_us)
    first = take(store, webhook, call)
    ends = [key.expires_at for key in remembered(store, webhook)]
    assert ends == [clock.time_us + 121 * SECOND_US]
    # As long as it is near enough in time it is known; then it is refused by its time.
    clock.advance(121 * SECOND_US - 1)
    swept(store, clock)
    assert take(store, webhook, call).event_id == first.event_id
    clock.advance(1)
    swept(store, clock)
    assert remembered(store, webhook) == []
    with pytest.raises(InvalidRequest, match="signed"):
        take(store, webhook, call)
    assert len(events(store)) == 1


def test_a_call_is_remembered_no_longer_than_its_webhook(store: Store) -> None:
    webhook = takes_timed(store, "generic", expires_in_s=30)
    take(store, webhook, timed("generic", b"{}", START_US))
    assert [key.expires_at for key in remembered(store, webhook)] == [webhook.expires_at]


def test_a_clock_in_doubt_takes_no_call_that_may_be_forgotten(
    store: Store, clock: HandClock
) -> None:
    webhook = takes_timed(store, "generic")
    old = timed("generic", b"{}", clock.time_us)
    take(store, webhook, old)
    clock.advance(HOUR_US)
    webhooks(store).register(GITHUB_CALL)  # a write: catalog time is an hour later
    swept(store, clock)
    assert remembered(store, webhook) == []
    clock.trusted = False
    clock.advance(3650 * DAY_US)
    with pytest.raises(InvalidRequest, match="signed"):
        take(store, webhook, old)
    # Of what was signed since nobody can tell, and it is remembered for as long as it is good.
    new = timed("generic", b"{}", clock.time_us - 3649 * DAY_US)
    taken = take(store, webhook, new)
    assert not taken.duplicate
    clock.advance(-3649 * DAY_US)
    clock.trusted = True
    date_all(store.catalog)
    swept(store, clock)
    assert take(store, webhook, new).event_id == taken.event_id
    clock.advance(400 * DAY_US)
    swept(store, clock)
    with pytest.raises(InvalidRequest, match="signed"):
        take(store, webhook, new)


def test_a_call_from_the_future_that_a_clock_in_doubt_took_is_known_until_then(
    store: Store, clock: HandClock
) -> None:
    webhook = takes_timed(store, "generic")
    clock.trusted = False
    clock.advance(3650 * DAY_US)
    call = timed("generic", b"{}", START_US + 5 * HOUR_US)
    first = take(store, webhook, call)
    clock.time_us = START_US + HOUR_US
    clock.trusted = True
    date_all(store.catalog)
    clock.time_us = START_US + 5 * HOUR_US
    swept(store, clock)
    assert take(store, webhook, call).event_id == first.event_id


# --- the end


def test_a_webhook_for_one_call_takes_no_other(store: Store) -> None:
    wanted = WebhookRequest("x", "github", "github", single_use=True)
    webhook = webhooks(store).register(wanted)
    first = take(store, webhook, github(b"1"))
    assert take(store, webhook, github(b"1")).event_id == first.event_id
    with pytest.raises(WebhookClosed):
        take(store, webhook, github(b"2"))


def test_a_webhook_past_its_time_takes_no_calls(store: Store, clock: HandClock) -> None:
    webhook = webhooks(store).register(WebhookRequest("x", "github", "github", expires_in_s=60))
    clock.advance(59 * SECOND_US)
    take(store, webhook, github(b"1"))
    clock.advance(SECOND_US)
    for body in (b"1", b"2"):
        with pytest.raises(WebhookClosed):
            take(store, webhook, github(body))


def test_what_was_said_to_be_kept_is_kept_when_its_webhooks_time_is_over(
    store: Store, clock: HandClock
) -> None:
    webhook = webhooks(store).register(WebhookRequest("x", "github", "github", expires_in_s=60))
    taken = take(store, webhook, github(b"{}"))
    clock.advance(60 * SECOND_US)
    swept(store, clock)
    assert remembered(store, webhook) == []
    with pytest.raises(NotFound):
        webhooks(store).get(webhook.webhook_id)
    assert event(store, taken).expires_at == START_US + SETTINGS.keep
    wait = waited(store, webhook.event_name, RUN)
    told = claimed(store, wait)
    assert told is not None
    assert told["webhook_id"] == webhook.webhook_id


def test_a_removed_webhook_takes_no_calls(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    call = opened(store, webhook)
    webhooks(store).remove(webhook.webhook_id)
    with pytest.raises(NotFound):
        opened(store, webhook)
    with pytest.raises(NotFound):
        call.prove(github(b"{}")).take()
    with pytest.raises(NotFound):
        webhooks(store).remove(webhook.webhook_id)


def called_often(store: Store, webhook: Webhook, calls: int) -> None:
    """So many calls came."""
    take(store, webhook, github(b"{}"))
    (key,) = remembered(store, webhook)

    def fill(txn: Transaction) -> None:
        for number in range(1, calls):
            txn.insert(msgspec.structs.replace(key, name=f"sha256:{number}"))

    store.catalog.write(fill, actor="ann")


def kept_bytes(store: Store) -> int:
    with store.catalog.read() as snapshot:
        return kept_of(snapshot, "acme")


def test_the_calls_of_a_removed_webhook_are_forgotten_with_it(
    store: Store, clock: HandClock
) -> None:
    own, key = webhooks(store), step_key(RUN, "register", "webhook")
    webhook, other = own.register(GITHUB_CALL, key), own.register(GITHUB_CALL)
    take(store, other, github(b"{}"))
    before = kept_bytes(store)
    called_often(store, webhook, CALLS_FORGOTTEN_MAX + 7)
    own.remove(webhook.webhook_id)
    # Not all by one request: the sweep has the rest, and no call comes in between.
    assert len(remembered(store, webhook)) == 7
    for look in (own.get, own.remove):
        with pytest.raises(NotFound):
            look(webhook.webhook_id)
    with pytest.raises(NotFound):
        own.register(GITHUB_CALL, key)
    assert [one.webhook_id for one in own.list().items] == [other.webhook_id]
    with pytest.raises(WebhookClosed):
        take(store, webhook, github(b"{}"))
    swept(store, clock)
    assert remembered(store, webhook) == []
    with pytest.raises(NotFound):
        own.get(webhook.webhook_id)
    assert len(remembered(store, other)) == 1
    assert len(events(store)) == 2
    assert kept_bytes(store) == before + (before - KEY_BYTES)  # the event of the call
    audit(store)


@pytest.mark.parametrize("status", [CANCELLED, COMPLETED])
def test_the_calls_of_a_webhook_are_forgotten_with_its_run(
    store: Store, clock: HandClock, status: str
) -> None:
    """A run that is cancelled ends it at once; one that came to its own end, when it goes."""
    run = Run(RUN, "acme", "x", RUNNING, START_US, "ann")
    webhook, other = (webhooks(store).register(GITHUB_CALL) for _ in range(2))
    called_often(store, webhook, 2 * BATCH)
    called_often(store, other, BATCH + 7)
    store.catalog.write(lambda txn: txn.insert(run), actor="ann")
    clock.advance(SECOND_US)
    over = msgspec.structs.replace(
        run, status=status, open=None, ended_at=clock.time_us, forget_at=clock.time_us + HOUR_US
    )
    store.catalog.write(lambda txn: end(txn, over, KEEP_US), actor="ann")
    swept(store, clock)
    left = [len(remembered(store, one)) for one in (webhook, other)]
    assert left == ([0, 0] if status == CANCELLED else [2 * BATCH, BATCH + 7])
    clock.advance(HOUR_US)
    swept(store, clock)
    assert [remembered(store, one) for one in (webhook, other)] == [[], []]
    with store.catalog.read() as snapshot:
        assert [*snapshot.range(Webhook, ""), *snapshot.range(Run, "")] == []
    audit(store)


def test_a_webhook_of_a_run_that_ended_takes_no_calls(store: Store) -> None:
    run = Run(RUN, "acme", "x", CANCELLED, START_US, "ann", open=None)
    webhook = webhooks(store).register(GITHUB_CALL)
    store.catalog.write(lambda txn: txn.insert(run), actor="ann")
    with pytest.raises(WebhookClosed, match="cancelled"):
        take(store, webhook, github(b"{}"))


@pytest.mark.parametrize("status", ["", "running", CANCELLED])
def test_the_run_of_another_tenant_is_not_told_from_one_that_is_not_there(
    store: Store, status: str
) -> None:
    theirs = store.catalog.write(
        lambda txn: subscribe(txn, "globex", RUN, "wait", "webhook_github_pr", None, None),
        actor="bob",
    )
    if status:
        still = None if status == CANCELLED else "open"
        run = Run(RUN, "globex", "x", status, START_US, "bob", open=still)
        store.catalog.write(lambda txn: txn.insert(run), actor="bob")
    webhook = webhooks(store).register(GITHUB_CALL)
    assert (webhook.workflow_run_id, webhook.expires_at) == (RUN, None)
    assert webhook.event_name == "webhook_github_pr"
    taken = take(store, webhook, github(b"{}"))
    assert (taken.delivered_to, taken.duplicate) == (0, False)
    with store.catalog.read() as snapshot:
        assert snapshot.get(Subscription, theirs.subscription_id) == theirs


# --- how much is held


def test_what_has_no_room_is_refused_and_the_log_tells_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    webhook = webhooks(store).register(WebhookRequest("h", "github", "github"))
    complaints = Complaints()

    def come(body: bytes, held_bytes_max: int) -> Taken:
        room = Room(held_bytes_max)
        ready = called(store, webhook.webhook_id, complaints=complaints, room=room)
        return ready.prove(github(body)).take()

    # What the store tells, and nobody waits for, keeps no call out.
    for number in range(3):
        name = f"upload_{number}"
        store.catalog.write(
            lambda txn, name=name: append_event(txn, "acme", name, {}, keep_us=KEEP_US)  # type: ignore[misc]
        )
    come(b"1", 1000)
    with store.catalog.read() as snapshot:
        limit = held_of(snapshot, "acme") + 10
    for body in (b"2", b"22"):
        with pytest.raises(TooManyHeld):
            come(body, limit)
    (record,) = caplog.records
    assert f"webhook {webhook.webhook_id} of acme" in record.message
    assert come(b"1", limit).duplicate
    assert not come(b"2", 0).duplicate, "nothing of it was remembered"


def test_a_call_that_may_not_be_kept_beside_all_others_is_refused_and_logged(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    webhook = webhooks(store).register(WebhookRequest("h", "github", "github"))
    waited(store, webhook.event_name, "direct")  # so that it would not be held
    ready = called(store, webhook.webhook_id, room=Room(kept_bytes_max=10))
    with pytest.raises(TooManyKept):
        ready.prove(github(b"1")).take()
    (record,) = caplog.records
    assert "as [limits] tenant_kept_events allows" in record.message


def test_what_a_call_is_known_by_counts_beside_its_event(store: Store, clock: HandClock) -> None:
    webhook = webhooks(store).register(WebhookRequest("pay", "stripe", "stripe"))
    # The sender chooses the identifier, and how long it is.
    call = stripe(b'{"id": "evt_%s"}' % (b"1" * 5000), clock.time_us)

    def come(call: Call, room: Room) -> Taken:
        return called(store, webhook.webhook_id, room=room).prove(call).take()

    taken = come(call, NO_LIMIT)
    (known,) = remembered(store, webhook)
    assert len(known.name) < 100
    with store.catalog.read() as snapshot:
        full = Room(kept_bytes_max=kept_of(snapshot, "acme"))
    assert full.kept_bytes_max == event(store, taken).size_bytes + KEY_BYTES
    # What is known by a long name is known for as long as by a short one.
    clock.advance(DAY_US)
    assert come(call, full) == Taken(taken.event_id, 0, duplicate=True)
    with pytest.raises(TooManyKept):
        come(stripe(b'{"id": "evt_2"}', clock.time_us), full)
    audit(store)


def test_the_deepest_body_makes_an_event_that_is_not_too_deep(store: Store) -> None:
    webhook = webhooks(store).register(GITHUB_CALL)
    for levels, form in ((LEVELS_MAX - 1, "json"), (LEVELS_MAX, "text")):
        taken = take(store, webhook, github(b"[" * levels + b"]" * levels))
        payload = json.loads(event(store, taken).payload)
        assert payload["body_form"] == form
        assert not is_too_deep(payload)


def test_no_webhook_is_for_a_run_that_has_ended(store: Store) -> None:
    def run(tenant: str) -> None:
        run = Run(RUN, tenant, "it", CANCELLED, START_US, "ann", open=None)
        store.catalog.write(lambda txn: txn.insert(run))

    run("acme")
    with pytest.raises(RunEnded):
        webhooks(store).register(GITHUB_CALL)
    secrets(store, "globex").put("github", SECRET)
    webhooks(store, "globex").register(GITHUB_CALL)  # another tenant's is not told of
