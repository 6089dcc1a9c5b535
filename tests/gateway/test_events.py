"""Events over HTTP: given to who waits, held, refused; each by the tenant's own token."""

from __future__ import annotations

import hmac
import json
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import pytest

from tests.conftest import CHECKOUT
from tests.gateway.served import Answer, Served, serving

HERE = "/api/v1/events/default"
WAIT = f"{HERE}/wait?event_name="


def post(served: Served, name: str, payload: Any = None, **members: Any) -> Answer:
    body = json.dumps({"event_name": name, "payload": payload, **members})
    return served.ask("POST", HERE, body, token=served.admin)


def begin(served: Served, name: str, waiter: str, more: str = "") -> Answer:
    """Begin a wait that goes on when this is answered, or look whether it has ended."""
    url = f"{WAIT}{name}&waiter={quote(waiter)}&timeout=0{more}"
    return served.ask("GET", url, token=served.admin)


def refused(answer: Answer, status: int, code: str) -> bool:
    assert answer.form["message"]
    return (answer.status, answer.code) == (status, code)


# --- posting


def test_an_event_goes_to_the_one_that_waits_for_it(served: Served) -> None:
    waiting = begin(served, "payment.confirmed", "one", "&correlation_key=order_123")
    assert waiting.form == {
        "status": "timeout",
        "subscription_id": waiting.form["subscription_id"],
        "waiter": "one",
    }
    payload = {"transaction_id": "txn_abc", "amount": 100.0}
    posted = post(served, "payment.confirmed", payload, correlation_key="order_123")
    assert posted.status == 200
    assert posted.form == {
        "status": "accepted",
        "event_id": posted.form["event_id"],
        "delivered_to": 1,
        "message": "Event delivered to waiting workflow",
    }
    delivered = begin(served, "payment.confirmed", "one", "&correlation_key=order_123")
    assert delivered.form == {
        "status": "delivered",
        "subscription_id": waiting.form["subscription_id"],
        "waiter": "one",
        "event_id": posted.form["event_id"],
        "event_name": "payment.confirmed",
        "correlation_key": "order_123",
        "payload": payload,
    }


def test_an_event_for_which_nothing_waits_is_refused_and_not_kept(served: Served) -> None:
    answer = post(served, "nobody.waits", 1)
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.form == {
        "status": "error",
        "code": "NO_WAITING_WORKFLOW",
        "message": "No workflow waiting for this event",
        "event_name": "nobody.waits",
    }
    assert begin(served, "nobody.waits", "late").form["status"] == "timeout"


@pytest.mark.parametrize("key", ["&correlation_key=other", ""])
def test_another_key_is_another_event(served: Served, key: str) -> None:
    name = f"keyed{len(key)}"
    assert begin(served, name, name, key).form["status"] == "timeout"
    answer = post(served, name, correlation_key="mine")
    assert refused(answer, 404, "NO_WAITING_WORKFLOW")
    how = "with another" if key else "without a"
    told = f"No workflow waiting for this event: 1 waits for this name {how} correlation key"
    assert answer.form["message"] == told


def test_without_a_key_all_that_wait_get_it(served: Served) -> None:
    for waiter in ("first", "second"):
        begin(served, "deployed", waiter)
    posted = post(served, "deployed", "v2").form
    assert (posted["delivered_to"], posted["message"]) == (
        2,
        "Event delivered to 2 waiting workflows",
    )
    found = [begin(served, "deployed", waiter).form for waiter in ("first", "second")]
    assert {each["event_id"] for each in found} == {posted["event_id"]}


def test_with_a_key_a_second_waiter_is_refused(served: Served) -> None:
    begin(served, "single", "the one", "&correlation_key=k")
    another = begin(served, "single", "another one", "&correlation_key=k")
    assert refused(another, 409, "SUBSCRIPTION_TAKEN")


@pytest.mark.parametrize("hold", [True, 3600, "2h"])
def test_an_event_that_is_held_goes_to_the_first_waiter_and_to_no_other(
    served: Served, hold: bool | int | str
) -> None:
    name = f"early-{hold}"
    posted = post(served, name, {"n": 1}, hold=hold).form
    assert posted["delivered_to"] == 0
    first = begin(served, name, f"first-{hold}").form
    assert (first["event_id"], first["payload"]) == (posted["event_id"], {"n": 1})
    assert begin(served, name, f"second-{hold}").form["status"] == "timeout"


def test_a_waiter_that_was_told_is_told_the_same_again(served: Served) -> None:
    posted = post(served, "again", hold=True).form
    told = [begin(served, "again", "again").form["event_id"] for _ in range(3)]
    assert told == [posted["event_id"]] * 3


def test_a_waiter_that_waits_for_something_else_is_refused(served: Served) -> None:
    begin(served, "this", "busy")
    assert refused(begin(served, "that", "busy"), 400, "INVALID_REQUEST")


def test_a_poll_without_a_name_leaves_nothing_behind(served: Served) -> None:
    """Else an event would be given to a wait that nobody can ask for."""
    url = f"{WAIT}unnamed&correlation_key=k"
    for timeout in (0, 1):
        form = served.ask("GET", f"{url}&timeout={timeout}", token=served.admin).form
        assert form["status"] == "timeout"
    assert post(served, "unnamed", correlation_key="k", hold=True).form["delivered_to"] == 0
    form = served.ask("GET", f"{url}&timeout=0", token=served.admin).form
    assert form["status"] == "delivered"


def test_what_is_for_a_run_is_for_those_who_may_manage_workflows(served: Served) -> None:
    url = f"{WAIT}approval_pay&timeout=0&run="
    waits = served.token("wait_events")
    assert refused(served.ask("GET", f"{url}run-1", token=waits), 403, "PERMISSION_MISSING")
    assert served.ask("GET", f"{url}direct", token=waits).status == 200
    manages = served.token("manage_workflows")
    assert served.ask("GET", f"{url}run-1", token=manages).status == 200


def test_an_event_without_payload_has_an_empty_one(served: Served) -> None:
    body = json.dumps({"event_name": "bare", "hold": True})
    assert served.ask("POST", HERE, body, token=served.admin).status == 200
    assert begin(served, "bare", "bare").form["payload"] == {}


# --- posting once


def test_a_request_that_is_sent_again_makes_one_event(served: Served) -> None:
    def send(name: str) -> Answer:
        return served.ask(
            "POST",
            HERE,
            json.dumps({"event_name": name}),
            token=served.admin,
            headers={"Idempotency-Key": "a-key"},
        )

    begin(served, "once", "once")
    first = send("once")
    assert first.form["delivered_to"] == 1
    assert send("once").form == first.form
    assert refused(send("other"), 422, "IDEMPOTENCY_KEY_REUSED")


# --- who may


def test_a_token_of_another_tenant_finds_nothing(served: Served) -> None:
    body = json.dumps({"event_name": "secret", "hold": True})
    for tenant in ("other", "nobody", "x" * 200):
        url = f"/api/v1/events/{tenant}"
        for answer in (
            served.ask("POST", url, body, token=served.admin),
            served.ask("POST", url, b"no JSON", token=served.admin),
            served.ask("GET", f"{url}/wait?event_name=a&timeout=0", token=served.admin),
        ):
            assert refused(answer, 404, "NOT_FOUND")


def test_tenants_do_not_hear_each_other(served: Served) -> None:
    theirs = served.token("emit_events", tenant="theirs")
    begin(served, "shared.name", "mine")
    body = json.dumps({"event_name": "shared.name"})
    answer = served.ask("POST", "/api/v1/events/theirs", body, token=theirs)
    assert refused(answer, 404, "NO_WAITING_WORKFLOW")
    assert begin(served, "shared.name", "mine").form["status"] == "timeout"


def test_permissions(served: Served) -> None:
    body = json.dumps({"event_name": "permitted", "hold": True})
    may_emit = served.token("emit_events")
    may_manage = served.token("manage_workflows")
    may_wait = served.token("wait_events")
    may_nothing = served.token("manage_uploads", "manage_storage")
    assert served.ask("POST", HERE, body, token=may_emit).status == 200
    for token in (may_manage, may_wait, may_nothing):
        assert refused(served.ask("POST", HERE, body, token=token), 403, "PERMISSION_MISSING")
    for token, waiter in ((may_wait, "a"), (may_manage, "b")):
        url = f"{WAIT}permitted&timeout=0&waiter={waiter}"
        assert served.ask("GET", url, token=token).status == 200
    # What others are to hear is not for who posts: a payment system, say.
    for token in (may_emit, may_nothing):
        for name in ("permitted", "approval_pay", "webhook_pr", "never"):
            answer = served.ask("GET", f"{WAIT}{name}&timeout=0", token=token)
            assert refused(answer, 403, "PERMISSION_MISSING")
            assert answer.form["permission"] == "wait_events"
    for method, url in (("POST", HERE), ("GET", f"{WAIT}a")):
        assert refused(served.ask(method, url), 401, "UNAUTHORIZED")


def test_events_are_counted_for_each_tenant(tmp_path: Any) -> None:
    with serving(tmp_path, LIMITS__TENANT_EVENTS="2/m") as server:
        answers = [post(server, "many", hold=True) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert answers[-1].code == "TOO_MANY_REQUESTS"
        assert int(answers[-1].headers["retry-after"]) > 0
        theirs = server.token("emit_events", tenant="theirs")
        body = json.dumps({"event_name": "many", "hold": True})
        assert server.ask("POST", "/api/v1/events/theirs", body, token=theirs).status == 200


def test_what_is_held_for_a_tenant_has_a_limit(tmp_path: Any) -> None:
    with serving(tmp_path, LIMITS__TENANT_HELD_EVENTS="4KiB") as server:
        name, key = "tool", b"whsec"
        subprocess.run(
            [sys.executable, "-m", "cas", "secret", "set", name],
            env=server.environ, cwd=CHECKOUT, input=key, check=True, capture_output=True,
        )  # fmt: skip
        wanted = json.dumps({"name": name, "kind": "github", "secret_id": name})
        made = server.ask("POST", "/api/v1/webhooks", wanted, token=server.admin).form

        def call(body: bytes) -> Answer:
            signature = "sha256=" + hmac.new(key, body, "sha256").hexdigest()
            url = f"/api/v1/webhooks/{made['webhook_id']}"
            return server.ask("POST", url, body, headers={"X-Hub-Signature-256": signature})

        assert post(server, "held", "x" * 3000, hold=True).status == 200
        for answer in (post(server, "other", "x" * 1000, hold=True), call(b"{}" * 200)):
            assert refused(answer, 429, "TOO_MANY_HELD")
            # Nothing of what the tenant has, which is not for all who post.
            assert set(answer.form) == {"status", "code", "message", "limit_bytes"}
        assert begin(server, "held", "one").form["status"] == "delivered"
        again = call(b"{}" * 200)
        assert (again.status, again.form["duplicate"]) == (200, False)


def test_what_is_kept_for_a_tenant_has_a_limit_and_so_have_its_waiters(tmp_path: Any) -> None:
    with serving(tmp_path, LIMITS__TENANT_KEPT_EVENTS="2KiB") as server:
        assert post(server, "kept", "x" * 600, hold=True).status == 200
        told = begin(server, "kept", "one").form
        assert told["status"] == "delivered"
        for answer in (
            post(server, "other", "x" * 600, hold=True),
            begin(server, "kept", "two"),
        ):
            assert refused(answer, 429, "TOO_MANY_KEPT")
            assert set(answer.form) == {"status", "code", "message", "limit_bytes"}
        assert begin(server, "kept", "one").form == told


def end(served: Served, waiter: str, more: str = "", token: str | None = None) -> Answer:
    url = f"{HERE}/wait?waiter={quote(waiter)}{more}"
    return served.ask("DELETE", url, token=token or served.admin)


def test_a_waiter_that_says_it_has_its_event_waits_for_any_number_of_them(tmp_path: Any) -> None:
    """Under one name, or under a new one each time: what it has counts no more."""
    with serving(tmp_path, LIMITS__TENANT_KEPT_EVENTS="2KiB") as server:
        for number in range(8):
            waiter = "one" if number % 2 else f"w{number}"
            posted = post(server, "job", {"n": number, "x": "x" * 600}, hold=True)
            assert posted.status == 200
            told = begin(server, "job", waiter).form
            assert (told["event_id"], told["payload"]["n"]) == (posted.form["event_id"], number)
            assert end(server, waiter, f"&event_id={told['event_id']}").status == 204


def test_ending_a_wait_once_more_is_harmless(served: Served) -> None:
    events = [post(served, "turns", {"n": n}, hold=True).form["event_id"] for n in range(2)]
    assert begin(served, "turns", "turner").form["event_id"] == events[0]
    for _ in range(3):
        assert end(served, "turner", f"&event_id={events[0]}").status == 204
        assert begin(served, "turns", "turner").form["event_id"] == events[1]
    for _ in range(2):
        assert end(served, "turner").status == 204


def test_an_ended_wait_takes_no_event_from_others(served: Served) -> None:
    begin(served, "left", "leaver", "&correlation_key=k")
    ended = end(served, "leaver")
    assert (ended.status, ended.body) == (204, b"")
    assert begin(served, "left", "heir", "&correlation_key=k").status == 200
    assert post(served, "left", correlation_key="k").form["delivered_to"] == 1
    never = end(served, "never heard of")
    assert (never.status, never.body) == (ended.status, ended.body)
    assert set(never.headers) == set(ended.headers)


def test_who_may_not_wait_ends_no_wait(served: Served) -> None:
    posted = post(served, "mine", hold=True).form["event_id"]
    assert begin(served, "mine", "me").form["event_id"] == posted
    theirs = served.token("wait_events", tenant="theirs")
    for waiter in ("me", "nobody"):
        assert refused(end(served, waiter, token=theirs), 404, "NOT_FOUND")
    may_emit, may_wait = served.token("emit_events"), served.token("wait_events")
    assert refused(end(served, "me", token=may_emit), 403, "PERMISSION_MISSING")
    assert refused(end(served, "me", "&run=run-1", may_wait), 403, "PERMISSION_MISSING")
    assert begin(served, "mine", "me").form["event_id"] == posted
    assert end(served, "me", token=may_wait).status == 204
    for query in ("", "?waiter=", "?waiter=a%2Fb"):
        answer = served.ask("DELETE", f"{HERE}/wait{query}", token=served.admin)
        assert answer.status == 400


def test_the_log_and_the_journal_say_who_posted(served: Served) -> None:
    token = served.token("emit_events")
    body = json.dumps({"event_name": "audited", "hold": True})
    served.ask("POST", HERE, body, token=token, headers={"X-Request-Id": "who-posted"})

    def told(lines: list[str]) -> bool:
        return any("who-posted" in line for line in lines)

    [line] = [line for line in served.logged(told) if "who-posted" in line]
    facts = json.loads(line)
    assert (facts["route"], facts["tenant"]) == ("/api/v1/events/{tenant_id}", "default")


# --- what is no event


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"event_name": 1}',
        b'{"payload": {}}',
        b'{"event_name": ""}',
        b'{"event_name": "a\\nb"}',
        b'{"event_name": "a", "unknown": 1}',
        b'{"event_name": "a", "event_name": "b"}',
        b'{"event_name": "a", "payload": {"x": 1, "x": 2}}',
        b'{"event_name": "a", "payload": NaN}',
        b'{"event_name": "a", "payload": "\\ud800"}',
        b'{"event_name": "a", "payload": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"event_name": "a", "hold": true, "payload": ' + b"[" * 101 + b"]" * 101 + b"}",
        b'{"event_name": "a", "correlation_key": ""}',
        b'{"event_name": "a", "hold": "long"}',
        b'{"event_name": "a", "hold": 0}',
        b'{"event_name": "a", "hold": -5}',
        b'{"event_name": "a", "hold": 99999999999999999999999}',
        b'{"event_name": "a", "hold": 1' + b"0" * 400 + b"}",
        b'{"event_name": "a", "hold": -1' + b"0" * 400 + b"}",
        b'{"event_name": "a", "hold": 1' + b"0" * 6000 + b"}",
        b'{"event_name": "a", "hold": "1' + b"0" * 400 + b'w"}',
        b'{"event_name": "a", "hold": "1000w"}',
        b'{"event_name": "a", "hold": 1.5}',
        b'{"event_name": "approval_payment", "hold": true}',
        b'{"event_name": "upload_0123", "hold": true}',
        b'{"event_name": "webhook_github_pr", "hold": true}',
    ],
)
def test_what_is_no_event_is_refused(served: Served, body: bytes) -> None:
    assert refused(served.ask("POST", HERE, body, token=served.admin), 400, "INVALID_REQUEST")


def test_the_deepest_payload_that_is_taken_is_told(served: Served) -> None:
    deep = b"[" * 100 + b"]" * 100
    body = b'{"event_name": "deepest", "hold": true, "payload": ' + deep + b"}"
    assert served.ask("POST", HERE, body, token=served.admin).status == 200
    assert begin(served, "deepest", "deepest").form["payload"] == json.loads(deep)


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_what_is_no_idempotency_key_is_refused(served: Served, key: str) -> None:
    body = json.dumps({"event_name": "a", "hold": True})
    headers = {"Idempotency-Key": key}
    answer = served.ask("POST", HERE, body, token=served.admin, headers=headers)
    assert refused(answer, 400, "INVALID_REQUEST")


@pytest.mark.parametrize("size_bytes", [256 << 10, 4 << 20])
def test_a_payload_that_is_too_large_is_refused(served: Served, size_bytes: int) -> None:
    answer = post(served, "large", "x" * size_bytes, hold=True)
    assert refused(answer, 413, "TOO_LARGE")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?event_name=",
        "?event_name=a&timeout=-1",
        "?event_name=a&timeout=soon",
        "?event_name=a&timeout=1.5",
        "?event_name=a&correlation_key=%00",
        "?event_name=%E2%80%AE",
    ],
)
def test_what_is_no_wait_is_refused(served: Served, query: str) -> None:
    answer = served.ask("GET", f"{HERE}/wait{query}", token=served.admin)
    assert refused(answer, 400, "INVALID_REQUEST")


@pytest.mark.parametrize("query", ["waiter=a/b", "waiter=" + "x" * 300, "run=../x"])
def test_names_that_are_none_are_refused(served: Served, query: str) -> None:
    answer = served.ask("GET", f"{WAIT}a&timeout=0&{query}", token=served.admin)
    assert refused(answer, 400, "INVALID_NAME")


def test_a_head_takes_no_event(served: Served) -> None:
    post(served, "headed", hold=True)
    assert served.ask("HEAD", f"{WAIT}headed&timeout=0", token=served.admin).status == 405
    assert begin(served, "headed", "headed").form["status"] == "delivered"
