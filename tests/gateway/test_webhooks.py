"""Webhooks over HTTP: registered by a token, called by a signature, and nobody else's."""

from __future__ import annotations

import hmac
import ipaddress
import json
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

import msgspec
import pytest
from standardwebhooks import Webhook as StandardWebhook

from cas.catalog import Transaction
from cas.config import Settings, Size, StoreSettings
from cas.records import CANCELLED, Event, Run, Secret
from cas.store import Store
from tests.conftest import CHECKOUT
from tests.gateway.served import Answer, Served, serving

PATH = "/api/v1/webhooks"
SECRET = "It's a Secret to Everybody"
SLACK_SECRET = "8f742231b10e8888abcd99yyyzzz85a5"
STANDARD_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PUBLIC = "https://hooks.example"
BODY_BYTES_MAX = 4096

_numbers = count(1)


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    """Behind a proxy that is trusted, so that each test may come from addresses of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(
            Path(folder),
            GATEWAY__WORKERS="2",
            GATEWAY__PUBLIC_URL=PUBLIC,
            GATEWAY__TRUSTED_PROXIES="127.0.0.1",
            EVENTS__PAYLOAD_MAX="4KiB",
            LIMITS__GUESSES="3/d",
            LIMITS__TENANT_EVENTS="50/d",
        ) as server,
    ):
        for name, value in (
            ("github", SECRET), ("standard", STANDARD_SECRET), ("twilio", "12345"),
            ("slack", SLACK_SECRET),
        ):  # fmt: skip
            keep(server, name, value)
        yield server


def keep(served: Served, name: str, value: str, *words: str) -> None:
    """`blobcask secret set`, beside the running server."""
    command = [sys.executable, "-m", "cas", "secret", "set", name, *words]
    subprocess.run(
        command, env=served.environ, cwd=CHECKOUT, input=value, text=True,
        capture_output=True, check=True,
    )  # fmt: skip


def register(served: Served, *, token: str = "", key: str = "", **wanted: Any) -> Answer:
    headers = {"Idempotency-Key": key} if key else {}
    form = {"name": "github_pr", "kind": "github", "secret_id": "github", **wanted}
    body = json.dumps(form)
    return served.ask("POST", PATH, body, token=token or served.admin, headers=headers)


def registered(served: Served, **wanted: Any) -> str:
    answer = register(served, **wanted)
    assert answer.status == 201, answer.form
    return str(answer.form["webhook_id"])


def signed(body: bytes, secret: str = SECRET) -> dict[str, str]:
    signature = hmac.digest(secret.encode(), body, "sha256").hex()
    return {"X-Hub-Signature-256": f"sha256={signature}", "Content-Type": "application/json"}


def call(
    served: Served,
    webhook_id: str,
    body: bytes = b"{}",
    headers: dict[str, str] | None = None,
    *,
    at: str = "",
    query: str = "",
) -> Answer:
    """A call from an address of its own, unless it is told."""
    sent = {
        "X-Forwarded-For": at or str(ipaddress.IPv4Address("10.0.0.0") + next(_numbers)),
        **(signed(body) if headers is None else headers),
    }
    return served.ask("POST", f"{PATH}/{webhook_id}{query}", body, headers=sent)


def code(answer: Answer) -> str:
    """The code of a refusal in the form of this family."""
    assert answer.form["status"] == "error"
    assert answer.form["message"]
    return str(answer.form["code"])


def payload(served: Served, event_id: str) -> dict[str, Any]:
    settings = Settings(store=StoreSettings(root=served.root, min_free=Size(0)))
    with Store.open(served.root, settings) as store, store.catalog.read() as snapshot:
        found = snapshot.get(Event, event_id)
    assert found is not None
    told: dict[str, Any] = json.loads(found.payload)
    return told


def payloads(served: Served, webhook_id: str) -> list[dict[str, Any]]:
    """Of all events of one webhook."""
    settings = Settings(store=StoreSettings(root=served.root, min_free=Size(0)))
    with Store.open(served.root, settings) as store, store.catalog.read() as snapshot:
        found = [json.loads(event.payload) for event in snapshot.range(Event, "", limit=1000)]
    return [told for told in found if told.get("webhook_id") == webhook_id]


def test_a_webhook_is_registered_and_shown(served: Served) -> None:
    answer = register(served, expires_in=3600, correlation_key="k", allowed_networks=["::1/128"])
    form = answer.form
    assert answer.status == 201
    assert form["webhook_url"] == f"{PUBLIC}{PATH}/{form['webhook_id']}"
    assert answer.headers["location"] == f"{PATH}/{form['webhook_id']}"
    assert (form["event_name"], form["correlation_key"]) == ("webhook_github_pr", "k")
    assert (form["single_use"], form["calls"], form["workflow_run_id"]) == (False, 0, "direct")
    shown = served.ask("GET", f"{PATH}/{form['webhook_id']}", token=served.admin)
    assert (shown.status, shown.form) == (200, form)
    assert shown.headers["cache-control"] == "no-store"
    assert SECRET not in json.dumps(form)


def test_the_same_key_registers_one(served: Served) -> None:
    first = register(served, key="once-please")
    assert register(served, key="once-please").form == first.form
    again = register(served, key="once-please", name="other")
    assert (again.status, code(again)) == (422, "IDEMPOTENCY_KEY_REUSED")


def test_webhooks_are_listed_by_page_and_run(served: Served) -> None:
    token = served.token("manage_workflows", tenant="lister")
    keep(served, "github", SECRET, "--tenant", "lister")
    made = [registered(served, token=token, run=run) for run in ("r1", "r2", "r1")]
    page = served.ask("GET", f"{PATH}?limit=2", token=token).form
    assert [one["webhook_id"] for one in page["webhooks"]] == made[:0:-1]
    rest = served.ask("GET", f"{PATH}?limit=2&cursor={page['next_cursor']}", token=token).form
    assert [one["webhook_id"] for one in rest["webhooks"]] == made[:1]
    own = served.ask("GET", f"{PATH}?run=r1", token=token).form["webhooks"]
    assert [one["webhook_id"] for one in own] == [made[2], made[0]]


def test_only_who_manages_workflows_may_and_only_the_own_ones(served: Served) -> None:
    webhook_id = registered(served)
    weak = served.token("emit_events", "manage_storage")
    other = served.token("manage_workflows", tenant="other")
    assert register(served, token=weak).status == 403
    assert served.ask("GET", PATH, token=weak).status == 403
    for token in (weak, other):
        for method in ("GET", "DELETE"):
            for name in (webhook_id, "nothing"):
                answer = served.ask(method, f"{PATH}/{name}", token=token)
                assert (answer.status, code(answer)) == (404, "NOT_FOUND")
    refused = register(served, token=other)  # the secret is another tenant's
    assert (refused.status, code(refused)) == (400, "INVALID_REQUEST")
    nobody = served.ask("POST", PATH, b"{}")
    assert (nobody.status, code(nobody)) == (401, "UNAUTHORIZED")


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"name": 1}', b"[" * 60_000,
     b'{"name": "x", "kind": "gitlab", "secret_id": "github"}',
     b'{"name": "x", "kind": "github", "secret_id": "github", "more": 1}',
     b'{"name": "x", "kind": "github", "secret_id": "unknown"}',
     b'{"name": "x", "kind": "github", "secret_id": "github", "event_name": "approval_x"}'],
)  # fmt: skip
def test_a_body_that_is_no_registration_is_refused(served: Served, body: bytes) -> None:
    answer = served.ask("POST", PATH, body, token=served.admin)
    assert answer.status == 400
    assert code(answer).startswith("INVALID_")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"kind": "standard"}, "generic, which by itself is Standard Webhooks"),
        ({"kind": "generic", "signature": {"header_name": "X-Sig"}}, "`header_name`"),
        ({"kind": "generic", "signature": {"algorithm": "sha512"}}, "`header`"),
        ({"kind": "generic", "signature": {"header": "X", "encoding": "base32"}}, "encoding"),
        ({"kind": "slack", "signature": {"header": "X"}}, "`header`"),
        ({"signature": {"tolerance": 60}}, "nothing to say of github"),
    ],
)
def test_a_signature_that_cannot_be_right_is_refused_with_what_is_wrong(
    served: Served, wanted: dict[str, Any], says: str
) -> None:
    answer = register(served, **wanted)
    assert (answer.status, code(answer)) == (400, "INVALID_REQUEST")
    assert says in answer.form["message"]


def test_how_calls_are_signed_is_shown_as_it_was_described(served: Served) -> None:
    described = {
        "header": "X-Sig",
        "signed": "{timestamp}.{body}",
        "timestamp_header": "X-Time",
        "id_header": None,
        "tolerance": 60,
    }
    answer = register(served, kind="generic", signature=described)
    kept = answer.form["signature"]
    assert answer.status == 201
    assert {name: kept[name] for name in described} == described
    assert (kept["prefix"], kept["encoding"], kept["secret"]) == ("", "hex", "text")
    again = register(served, kind="generic", signature=kept)
    assert again.form["signature"] == kept


# --- calls


def test_a_call_is_an_event_once(served: Served) -> None:
    webhook_id = registered(served)
    body = b'{"action": "opened", "number": 1}'
    headers = {**signed(body), "X-GitHub-Event": "pull_request", "X-GitHub-Delivery": "d1"}
    first = call(served, webhook_id, body, headers)
    assert first.status == 200
    assert (first.form["status"], first.form["delivered_to"]) == ("accepted", 0)
    assert not first.form["duplicate"]
    again = call(served, webhook_id, body, {**headers, "X-GitHub-Delivery": "d2"})
    assert (again.status, again.form["event_id"]) == (200, first.form["event_id"])
    assert again.form["duplicate"]
    told = payload(served, first.form["event_id"])
    assert (told["body"], told["delivery_id"]) == ({"action": "opened", "number": 1}, "d1")
    assert told["headers"]["x-github-event"] == "pull_request"
    shown = served.ask("GET", f"{PATH}/{webhook_id}", token=served.admin).form
    assert shown["calls"] == 1


def test_a_build_that_says_the_same_each_night_is_an_event_each_night(served: Served) -> None:
    webhook_id = registered(served, repeats="accept")
    shown = served.ask("GET", f"{PATH}/{webhook_id}", token=served.admin).form
    assert shown["repeats"] == "accept"
    body = b'{"job": "nightly", "status": "success"}'
    duplicates = []
    for night in "112":
        answer = call(served, webhook_id, body, {**signed(body), "X-GitHub-Delivery": night})
        duplicates.append(answer.form["duplicate"])
    assert duplicates == [False, True, False]
    assert [told["delivery_id"] for told in payloads(served, webhook_id)] == ["1", "2"]
    assert registered(served, kind="generic", repeats="accept",
                      signature={"header": "X-S", "delivery_header": "X-D"})  # fmt: skip
    for wanted in ({"repeats": "often"}, {"kind": "stripe", "repeats": "accept"}):
        assert code(register(served, **wanted)) == "INVALID_REQUEST"


def test_a_call_wakes_who_waits(served: Served) -> None:
    name = "ci_done"
    webhook_id = registered(served, name=name)
    token = served.token("wait_events")
    with ThreadPoolExecutor(1) as pool:
        url = f"/api/v1/events/default/wait?event_name=webhook_{name}&timeout=50&waiter=w"
        waiting = pool.submit(served.ask, "GET", url, token=token)
        body = b'{"state": "green"}'
        taken = call(served, webhook_id, body)
        woken = waiting.result()
    # Whichever came first, the wait has got it.
    assert (woken.status, woken.form["event_id"]) == (200, taken.form["event_id"])
    assert woken.form["payload"]["body"] == {"state": "green"}


def test_github_is_answered_its_ping(served: Served) -> None:
    webhook_id = registered(served, single_use=True)
    body = b'{"zen": "Design for failure.", "hook_id": 1, "hook": {}}'
    for event in ("ping", "push"):  # which nobody signed
        answer = call(served, webhook_id, body, {**signed(body), "X-GitHub-Event": event})
        assert (answer.status, answer.form["status"]) == (200, "accepted")
        assert (answer.form["event_id"], answer.form["delivered_to"]) == (None, 0)
    assert call(served, webhook_id, b"1").status == 200
    spent = call(served, webhook_id, b"2")
    assert (spent.status, code(spent)) == (409, "WEBHOOK_CLOSED")


def test_standard_webhooks_are_taken_and_old_ones_refused(served: Served) -> None:
    webhook_id = registered(served, kind="generic", secret_id="standard")
    library = StandardWebhook(STANDARD_SECRET)

    def message(name: str, at: datetime) -> Answer:
        headers = {
            "webhook-id": name,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": library.sign(name, at, "{}"),
        }
        return call(served, webhook_id, b"{}", headers)

    assert message("msg_1", datetime.now(UTC)).status == 200
    assert message("msg:1=a/b", datetime.now(UTC)).status == 200
    old = message("msg_2", datetime(2021, 2, 25, 15, 2, 10, tzinfo=UTC))
    assert (old.status, code(old)) == (400, "INVALID_REQUEST")
    assert "signed" in old.form["message"]


@pytest.mark.parametrize("query", ["", "?foo=1&bar=a%20b"])
def test_twilio_signs_the_public_address(served: Served, query: str) -> None:
    webhook_id = registered(served, kind="twilio", secret_id="twilio")
    parameters = {"MessageSid": "SM1", "MessageStatus": "sent", "Body": "é & ü"}
    text = f"{PUBLIC}{PATH}/{webhook_id}{query}"
    text += "".join(name + parameters[name] for name in sorted(parameters))
    headers = by_twilio(text)
    body = urlencode(parameters).encode()
    assert_twiml(call(served, webhook_id, body, headers, query=query))
    assert [told["body"] for told in payloads(served, webhook_id)] == [parameters]
    assert call(served, webhook_id, body, headers, query="?baz=1").status == 404


def by_twilio(text: str, media_type: str = "application/x-www-form-urlencoded") -> dict[str, str]:
    signature = b64encode(hmac.digest(b"12345", text.encode(), "sha1")).decode()
    return {"X-Twilio-Signature": signature, "Content-Type": media_type}


def assert_twiml(answer: Answer) -> None:
    """What Twilio takes for "do nothing": any other type is its error 12300, and what is no
    such document 12100 and 12200."""
    assert (answer.status, answer.headers["content-type"]) == (200, "text/xml; charset=utf-8")
    root = ElementTree.fromstring(answer.body)
    assert (root.tag, root.attrib, list(root), root.text) == ("Response", {}, [], None)
    assert answer.body.startswith(b"<?xml ")
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("media_type", ["", "; charset=UTF-8", ";charset=utf-8; x=y"])
def test_twilio_is_answered_twiml_and_again_when_it_calls_again(
    served: Served, media_type: str
) -> None:
    webhook_id = registered(served, kind="twilio", secret_id="twilio", single_use=True)
    text = f"{PUBLIC}{PATH}/{webhook_id}"
    form = "application/x-www-form-urlencoded" + media_type
    headers = {**by_twilio(text + "BodyyesMessageSidSM1", form), "Accept": "application/json"}
    for _ in range(2):
        assert_twiml(call(served, webhook_id, b"MessageSid=SM1&Body=yes", headers))
    assert len(payloads(served, webhook_id)) == 1
    # What is refused is no TwiML: Twilio logs it as what it is, by its status.
    other = call(served, webhook_id, b"MessageSid=SM2", by_twilio(text + "MessageSidSM2"))
    assert (other.status, code(other)) == (409, "WEBHOOK_CLOSED")
    wrong = call(served, webhook_id, b"MessageSid=SM3", by_twilio(text + "MessageSidSM2"))
    unknown = call(served, "01900000-0000-7000-8000-000000000000")
    assert (wrong.status, wrong.body) == (404, unknown.body)
    assert wrong.headers["content-type"] == unknown.headers["content-type"]


# --- Slack

CHALLENGE = "3eZbrw1aBm2rZgRNFdxV2595E9CY3gmdALWMmHkvFXO7tYXAYM8P"


def by_slack(
    body: bytes, *, ago_s: int = 0, media_type: str = "application/json"
) -> dict[str, str]:
    at_s = int(time.time()) - ago_s
    signature = hmac.digest(SLACK_SECRET.encode(), b"v0:%d:%s" % (at_s, body), "sha256").hex()
    return {
        "X-Slack-Request-Timestamp": str(at_s),
        "X-Slack-Signature": f"v0={signature}",
        "Content-Type": media_type,
    }


def verification(challenge: str) -> bytes:
    told = {"token": "t", "challenge": challenge, "type": "url_verification"}
    return json.dumps(told).encode()


@pytest.mark.parametrize("challenge", [CHALLENGE, "<script>alert(1)</script>", "</title>%00&lt;"])
def test_slacks_challenge_is_answered_as_text_that_no_browser_runs(
    served: Served, challenge: str
) -> None:
    webhook_id = registered(served, kind="slack", secret_id="slack", single_use=True)
    body = verification(challenge)
    headers = {
        **by_slack(body, media_type="application/json; charset=utf-8"),
        "Accept": "text/html",
    }
    for _ in range(2):
        answer = call(served, webhook_id, body, headers)
        assert (answer.status, answer.body) == (200, challenge.encode())
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert payloads(served, webhook_id) == []
    event = b'{"type": "event_callback", "event_id": "Ev1"}'
    assert call(served, webhook_id, event, by_slack(event)).status == 200


def test_a_challenge_that_slack_did_not_sign_is_answered_as_an_unknown_webhook(
    served: Served,
) -> None:
    webhook_id = registered(served, kind="slack", secret_id="slack")
    body = verification(CHALLENGE)
    unknown = call(served, "01900000-0000-7000-8000-000000000000", body, by_slack(body))
    for headers in ({}, by_slack(verification("x")), signed(body), signed(body, SLACK_SECRET)):
        answer = call(served, webhook_id, body, headers)
        assert (answer.status, answer.body) == (404, unknown.body)
        assert CHALLENGE.encode() not in answer.body
    old = call(served, webhook_id, body, by_slack(body, ago_s=400))
    assert (old.status, code(old)) == (400, "INVALID_REQUEST")
    for length, status in ((257, 400), (1 << 20, 413)):
        body = verification("x" * length)
        answer = call(served, webhook_id, body, by_slack(body))
        assert (answer.status, b"xxx" in answer.body) == (status, False)


def test_slack_is_answered_nothing_that_it_would_show_to_people(served: Served) -> None:
    webhook_id = registered(served, kind="slack", secret_id="slack")
    command = b"command=%2Fdeploy&text=now&trigger_id=1"
    form = "application/x-www-form-urlencoded"
    headers = by_slack(command, media_type=form)
    for _ in range(2):
        answer = call(served, webhook_id, command, headers)
        assert (answer.status, answer.body) == (200, b"")
    (told,) = payloads(served, webhook_id)
    assert (told["body_form"], told["body"]["text"]) == ("form", "now")


def test_handshakes_count_for_no_event(served: Served) -> None:
    token = served.token("manage_workflows", tenant="greeter")
    keep(served, "slack", SLACK_SECRET, "--tenant", "greeter")
    webhook_id = registered(served, token=token, kind="slack", secret_id="slack")
    body = verification(CHALLENGE)
    statuses = [call(served, webhook_id, body, by_slack(body)).status for _ in range(60)]
    assert set(statuses) == {200}


def test_both_secrets_are_good_beside_a_running_server(served: Served) -> None:
    keep(served, "rolled", SECRET)
    webhook_id = registered(served, secret_id="rolled")
    keep(served, "rolled", "the next one", "--keep-old", "24h")
    for number, secret in enumerate((SECRET, "the next one")):
        body = b"%d" % number
        assert call(served, webhook_id, body, signed(body, secret)).status == 200
    keep(served, "rolled", "the next one")
    assert call(served, webhook_id, b"2", signed(b"2")).status == 404
    assert call(served, webhook_id, b"2", signed(b"2", "the next one")).status == 200


def test_what_twilio_signed_is_one_event_wherever_its_address_is_said_to_end(
    served: Served,
) -> None:
    webhook_id = registered(served, kind="twilio", secret_id="twilio")
    text = f"{PUBLIC}{PATH}/{webhook_id}?lang=deBodyyesMessageSidSM1"
    headers = by_twilio(text)
    for query, body in (
        ("?lang=de", b"Body=yes&MessageSid=SM1"),
        ("?lang=deBodyyes", b"MessageSid=SM1"),
        ("?lang=deBodyyesMessageSidSM1", b""),
        ("?lang=de", b"Bodyyes=Message&SidSM1="),
    ):
        assert_twiml(call(served, webhook_id, body, headers, query=query))
        assert len(payloads(served, webhook_id)) == 1
    shown = served.ask("GET", f"{PATH}/{webhook_id}", token=served.admin).form
    assert shown["calls"] == 1


def test_only_allowed_networks_may_call(served: Served) -> None:
    webhook_id = registered(served, allowed_networks=["192.0.2.0/24"])
    refused = call(served, webhook_id)
    assert (refused.status, code(refused)) == (404, "NOT_FOUND")
    assert call(served, webhook_id, at="192.0.2.9").status == 200


def test_a_wrong_signature_is_answered_as_an_unknown_webhook(served: Served) -> None:
    webhook_id = registered(served)
    wrong = call(served, webhook_id, b"{}", signed(b"{}", "another"))
    unsigned = call(served, webhook_id, b"{}", {})
    unknown = call(served, "01900000-0000-7000-8000-000000000000")
    assert wrong.status == 404
    assert wrong.body == unsigned.body == unknown.body
    assert code(wrong) == "NOT_FOUND"


def test_a_secret_that_no_key_opens_is_answered_as_an_unknown_webhook(served: Served) -> None:
    keep(served, "lost", SECRET)
    webhook_id = registered(served, secret_id="lost")
    assert call(served, webhook_id, b"before").status == 200
    settings = Settings(store=StoreSettings(root=served.root, min_free=Size(0)))

    def lose(txn: Transaction) -> None:
        kept = txn.get(Secret, "default", "lost")
        assert kept is not None
        txn.replace(msgspec.structs.replace(kept, sealed=kept.sealed[:-1]))

    with Store.open(served.root, settings) as store:
        store.catalog.write(lose, actor="test")
    unknown = call(served, "01900000-0000-7000-8000-000000000000")
    for headers in (signed(b"after"), {}):
        answer = call(served, webhook_id, b"after", headers)
        assert (answer.status, answer.body) == (404, unknown.body)
    for _ in range(20):
        call(served, webhook_id, b"after", {})
    sealed = f"webhook {webhook_id}: its secret lost cannot be opened"
    lines = served.logged(lambda lines: any(sealed in line for line in lines))
    # By two processes, which are not asked for a minute.
    assert sum(sealed in line for line in lines) <= 2
    assert any("ROOT/keys/secrets" in line for line in lines)


def test_a_webhook_says_nothing_of_another_tenants_run(served: Served) -> None:
    token = served.token("manage_workflows", tenant="nosy")
    keep(served, "github", SECRET, "--tenant", "nosy")
    own = registered(served, run="run-of-another")
    run = Run("run-of-another", "default", "x", CANCELLED, 1, "ann", open=None)
    settings = Settings(store=StoreSettings(root=served.root, min_free=Size(0)))
    with Store.open(served.root, settings) as store:
        store.catalog.write(lambda txn: txn.insert(run), actor="test")
    for name in ("run-of-another", "run-of-nobody"):
        made = register(served, token=token, run=name)
        assert made.status == 201
        taken = call(served, made.form["webhook_id"])
        assert (taken.status, taken.form["delivered_to"]) == (200, 0)
    assert code(call(served, own)) == "WEBHOOK_CLOSED"
    late = register(served, run="run-of-another")
    assert (late.status, code(late)) == (409, "RUN_ENDED")


def test_wrong_signatures_are_guesses_and_good_ones_pass(served: Served) -> None:
    webhook_id = registered(served)
    at = "203.0.113.1"
    wrong = signed(b"{}", "another")
    statuses = [call(served, webhook_id, b"{}", wrong, at=at).status for _ in range(5)]
    assert statuses == [404, 404, 404, 429, 429]
    # Others may send from the same address, as all do who are called by GitHub.
    assert call(served, webhook_id, b"good", at=at).status == 200


def test_a_call_has_a_limit(served: Served) -> None:
    webhook_id = registered(served)
    assert call(served, webhook_id, b"x" * BODY_BYTES_MAX).status == 200
    for name in (webhook_id, "unknown"):  # told before anything is looked up
        refused = call(served, name, b"x" * (BODY_BYTES_MAX + 1))
        assert (refused.status, code(refused)) == (413, "TOO_LARGE")


def test_a_coded_body_is_refused(served: Served) -> None:
    headers = {**signed(b"{}"), "Content-Encoding": "gzip"}
    assert call(served, registered(served), b"{}", headers).status == 400


def test_a_removed_webhook_takes_no_calls(served: Served) -> None:
    webhook_id = registered(served)
    assert served.ask("DELETE", f"{PATH}/{webhook_id}", token=served.admin).status == 204
    assert served.ask("DELETE", f"{PATH}/{webhook_id}", token=served.admin).status == 404
    assert call(served, webhook_id).status == 404


def test_a_call_stands_in_the_audit_log_as_its_webhooks(served: Served) -> None:
    webhook_id = registered(served)
    body = b'{"audited": true}'
    headers = {**signed(body), "X-Request-Id": "audited-call"}
    assert call(served, webhook_id, body, headers).status == 200
    command = [sys.executable, "-m", "cas", "journal", "tail", "--json"]
    run = subprocess.run(
        command, env=served.environ, cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert f"webhook:{webhook_id}" in run.stdout
    assert "audited-call" in run.stdout
    assert SECRET not in run.stdout


def test_calls_of_a_tenant_are_limited_and_unsigned_ones_count_for_nothing(
    served: Served,
) -> None:
    token = served.token("manage_workflows", tenant="busy")
    keep(served, "github", SECRET, "--tenant", "busy")
    webhook_id = registered(served, token=token)
    for _ in range(60):
        assert call(served, webhook_id, b"", {}).status == 404
    for _ in range(60):  # the same one is one, however often it comes
        assert call(served, webhook_id, b"0").status == 200
    statuses = [call(served, webhook_id, str(n).encode()).status for n in range(52)]
    assert statuses == [200] * 50 + [429] * 2
