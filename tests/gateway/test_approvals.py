"""Approvals over HTTP: asked with a token, decided with a link and nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from cas.config import Settings, StoreSettings
from cas.deliveries import opened_payload, payload_of
from cas.keys import load_keys
from cas.records import Delivery, Run
from cas.store import Store
from tests.gateway.served import ANSWER_S, Answer, Served, serving
from tests.gateway.test_audit import journal

JSON = {"Accept": "application/json"}
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_NUMBERS = itertools.count()


def ask(served: Served, token: str | None = None, **wanted: Any) -> dict[str, Any]:
    """A question with a key of its own, unless it is given one."""
    key = f"payment-{next(_NUMBERS)}"
    body = json.dumps({"approval_key": key, "title": "Pay 100?", **wanted})
    answer = served.ask("POST", "/api/v1/approvals", body, token=token or served.admin)
    assert answer.status == 201, answer.body
    return answer.form


def look(served: Served, asked: dict[str, Any]) -> dict[str, Any]:
    path = f"/api/v1/approvals/{asked['approval_id']}"
    answer = served.ask("GET", path, token=served.admin)
    assert answer.status == 200, answer.body
    return answer.form


def changed(url: str, **instead: str) -> str:
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    return parts._replace(query=urlencode({**query, **instead})).geturl()


# --- with a token


def test_more_approvals_and_mails_than_may_be_are_refused_with_the_numbers(
    tmp_path: Path,
) -> None:
    mailing = {
        "MAIL__HOST": "127.0.0.1",
        "MAIL__PORT": "1",
        "MAIL__SECURITY": "none",
        "MAIL__SENDER": "us@example.org",
        "GATEWAY__PUBLIC_URL": "https://files.example.org",
    }
    limits = {"LIMITS__TENANT_APPROVALS": "2", "LIMITS__TENANT_MAILS": "1"}
    with serving(tmp_path, **mailing, **limits) as served:

        def refused(*addressees: str) -> Answer:
            body = json.dumps({"approval_key": "k", "title": "t", "addressees": addressees})
            return served.ask("POST", "/api/v1/approvals", body, token=served.admin)

        ask(served, addressees=["ada@example.org"])
        answer = refused("bob@example.org")
        assert (answer.status, answer.code) == (429, "TOO_MANY_MAILS")
        numbers = [answer.form[name] for name in ("limit", "waiting", "needed")]
        assert numbers == [1, 1, 1]
        ask(served, addressees=["the board"])
        answer = refused()
        assert (answer.status, answer.code) == (429, "TOO_MANY_APPROVALS")
        assert [answer.form[name] for name in ("limit", "remembered")] == [2, 2]


def test_a_question_is_asked_looked_at_listed_and_withdrawn(served: Served) -> None:
    asked = ask(
        served, addressees=["ada", "bob@example.org"], message="Please.", expires_in=60, run="r-1"
    )
    assert asked["status"] == "pending"
    assert asked["event_name"] == f"approval_{asked['approval_key']}"
    assert [pair["addressee"] for pair in asked["links"]] == ["ada", "bob@example.org"]
    assert asked["links"][0]["approve_url"].startswith(f"{served.address}/api/v1/approvals/")
    assert look(served, asked) == asked
    listed = served.ask("GET", "/api/v1/approvals?run=r-1", token=served.admin).form
    without_links = {name: value for name, value in asked.items() if name != "links"}
    assert listed == {"approvals": [without_links], "next_cursor": None}
    assert served.ask("GET", "/api/v1/approvals?run=r-2", token=served.admin).form == {
        "approvals": [],
        "next_cursor": None,
    }
    cancel = f"/api/v1/approvals/{asked['approval_id']}/cancel"
    cancelled = served.ask("POST", cancel, token=served.admin)
    assert (cancelled.status, cancelled.form["status"]) == (200, "cancelled")
    assert cancelled.form["links"] == []
    again = served.ask("POST", cancel, token=served.admin)
    assert (again.status, again.code, again.form["state"]) == (
        409,
        "APPROVAL_CLOSED",
        "cancelled",
    )


def test_the_same_question_with_one_key_is_asked_once(served: Served) -> None:
    body = json.dumps({"approval_key": "once", "title": "?"})
    headers = {"Idempotency-Key": "a-key"}

    def post(body: str) -> Answer:
        return served.ask("POST", "/api/v1/approvals", body, token=served.admin, headers=headers)

    first, second = post(body), post(body)
    assert (first.status, first.form) == (second.status, second.form)
    assert (post(body + " ").status, post(body + " ").code) == (422, "IDEMPOTENCY_KEY_REUSED")


def test_a_key_is_for_one_question_of_a_run_at_a_time(served: Served) -> None:
    asked = ask(served, approval_key="one-at-a-time")
    body = json.dumps({"approval_key": "one-at-a-time", "title": "Another?"})
    refused = served.ask("POST", "/api/v1/approvals", body, token=served.admin)
    assert (refused.status, refused.code) == (409, "APPROVAL_KEY_TAKEN")
    told = refused.form
    assert (told["approval_key"], told["run"]) == ("one-at-a-time", "direct")
    assert "foreach" in told["message"]
    assert asked["approval_id"] not in refused.body.decode()
    ask(served, approval_key="one-at-a-time", run="run-of-its-own")
    assert served.ask("POST", asked["links"][0]["reject_url"], headers=JSON).status == 200
    ask(served, approval_key="one-at-a-time")


def test_only_who_manages_workflows_asks_and_looks(served: Served) -> None:
    asked = ask(served)
    paths = ["/api/v1/approvals", f"/api/v1/approvals/{asked['approval_id']}"]
    body = json.dumps({"approval_key": "k", "title": "t"})
    emitter = served.token("emit_events", "manage_uploads")
    assert served.ask("POST", paths[0], body, token=emitter).code == "PERMISSION_MISSING"
    assert served.ask("GET", paths[0], token=emitter).code == "PERMISSION_MISSING"
    assert served.ask("GET", paths[1], token=emitter).code == "NOT_FOUND"
    assert served.ask("POST", f"{paths[1]}/cancel", token=emitter).code == "NOT_FOUND"
    assert served.ask("POST", paths[0], body).code == "UNAUTHORIZED"
    other = served.token("manage_workflows", tenant="other")
    assert served.ask("GET", paths[0], token=other).form["approvals"] == []
    assert served.ask("GET", paths[1], token=other).code == "NOT_FOUND"
    assert served.ask("POST", f"{paths[1]}/cancel", token=other).code == "NOT_FOUND"
    assert look(served, asked)["status"] == "pending"
    ask(served, served.token("manage_workflows"))


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"approval_key": "k"}',
        '{"approval_key": "k", "title": "t", "more": 1}',
        '{"approval_key": "k", "title": "t", "addressees": "ada"}',
        '{"approval_key": "k", "title": "t", "expires_in": 0}',
        '{"approval_key": "k", "title": "t", "redirect_url": "ftp://example.org"}',
        '{"approval_key": "k", "title": "t", "run": "a b"}',
        '{"approval_key": "k", "title": "\\ud800"}',
    ],
)
def test_a_wrong_question_is_refused(served: Served, body: str) -> None:
    answer = served.ask("POST", "/api/v1/approvals", body, token=served.admin)
    assert answer.status == 400
    assert answer.code in ("INVALID_REQUEST", "INVALID_NAME")


# --- with a link


@pytest.mark.parametrize("which", ["approve", "reject"])
def test_a_browser_confirms_and_is_thanked(served: Served, which: str) -> None:
    asked = ask(served, addressees=["ada", "bob"], title="Pay <100>?")
    url = asked["links"][1][f"{which}_url"]
    word = {"approve": "approval", "reject": "rejection"}[which]
    page = served.ask("GET", url, headers=BROWSER)
    assert page.status == 200
    assert "Pay &lt;100&gt;?" in page.body.decode()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["vary"].startswith("Accept")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "form-action 'self';" in policy
    assert look(served, asked)["status"] == "pending"

    sent = served.ask("POST", url, urlencode({"comment": "Grüße"}), headers={**BROWSER, **FORM})
    assert sent.status == 303
    onward = sent.headers["location"]
    assert onward.startswith("respond?")  # relative: whatever a proxy puts before it
    assert parse_qs(onward.partition("?")[2]) == parse_qs(urlsplit(url).query)
    thanks = served.ask("GET", url, headers=BROWSER).body.decode()
    assert "<h1>Thank you</h1>" in thanks
    assert f"Your {word} has been recorded." in thanks
    assert "Grüße" in thanks
    status = look(served, asked)
    assert (status["status"], status["decided_by"], status["comment"]) == (
        {"approve": "approved", "reject": "rejected"}[which],
        "bob",
        "Grüße",
    )


def test_programs_are_answered_json(served: Served) -> None:
    asked = ask(served, addressees=["ada"])
    url = asked["links"][0]["approve_url"]
    before = served.ask("GET", url, headers=JSON)
    assert (before.status, before.form["status"], before.form["decision"]) == (
        200,
        "pending",
        "approved",
    )
    body = json.dumps({"comment": "by a program"})
    headers = {**JSON, "Content-Type": "application/json"}
    decided = served.ask("POST", url, body, headers=headers)
    assert decided.status == 200
    assert (decided.form["status"], decided.form["decided_by"], decided.form["comment"]) == (
        "approved",
        "ada",
        "by a program",
    )
    at = look(served, asked)["decided_at"]
    for method in ("GET", "POST"):
        for which in ("approve", "reject"):
            again = served.ask(method, asked["links"][0][f"{which}_url"], headers=JSON)
            assert again.status == 409
            facts = {name: again.form[name] for name in ("code", "state", "decided_by")}
            assert facts == {
                "code": "APPROVAL_CLOSED",
                "state": "approved",
                "decided_by": "ada",
            }
            assert again.form["decided_at"] == at


def test_who_says_nothing_of_json_gets_the_page(served: Served) -> None:
    url = ask(served)["links"][0]["approve_url"]
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "image/png"}, {"Accept": "text/*"}):
        answer = served.ask("GET", url, headers=accept)
        assert answer.headers["content-type"].startswith("text/html")


def test_a_second_use_tells_a_browser_who_decided_what_and_when(served: Served) -> None:
    asked = ask(served, addressees=["ada@example.org", "bob"])
    served.ask("POST", asked["links"][0]["reject_url"], headers=BROWSER)
    late = served.ask("POST", asked["links"][1]["approve_url"], headers=BROWSER)
    assert late.status == 409
    page = late.body.decode()
    assert "This has been decided already" in page
    assert "Rejected" in page
    assert "ada@example.org" in page
    assert look(served, asked)["decided_at"] in page
    seen = served.ask("GET", asked["links"][1]["approve_url"], headers=BROWSER)
    assert (seen.status, seen.body.decode()) == (200, page)


def test_looking_decides_nothing(served: Served) -> None:
    asked = ask(served, redirect_url="https://app.example.com/done")
    url = asked["links"][0]["approve_url"]
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
        for headers in (BROWSER, JSON):
            served.ask(method, url, headers=headers)
    assert look(served, asked)["status"] == "pending"


def test_one_click_decides_when_it_is_opened_and_not_when_it_is_looked_at(served: Served) -> None:
    asked = ask(served, one_click=True)
    url = asked["links"][0]["approve_url"]
    assert served.ask("HEAD", url, headers=BROWSER).status == 200
    for ahead in (
        {"Sec-Purpose": "prefetch;prerender"},
        {"Sec-Purpose": "Prerender"},
        {"Purpose": "prefetch"},
        {"Purpose": "preview"},
        {"X-Purpose": "preview"},
        {"X-Moz": "prefetch"},
    ):
        assert served.ask("GET", url, headers={**BROWSER, **ahead}).status == 200
    assert look(served, asked)["status"] == "pending"
    opened = served.ask("GET", url, headers=BROWSER)
    assert opened.status == 200
    assert "Your approval has been recorded." in opened.body.decode()
    assert look(served, asked)["status"] == "approved"
    again = served.ask("GET", url, headers=BROWSER)
    assert (again.status, again.body) == (200, opened.body)
    other = served.ask("GET", asked["links"][0]["reject_url"], headers=BROWSER)
    assert "This has been decided already" in other.body.decode()
    asked = ask(served, one_click=True)
    program = served.ask("GET", asked["links"][0]["reject_url"], headers=JSON)
    assert (program.status, program.form["status"]) == (200, "rejected")


@pytest.mark.parametrize(
    ("redirect", "found"),
    [
        ("https://app.example.com/approved", "https://app.example.com/approved?{told}"),
        ("https://app.example.com/a?b=c&d#e", "https://app.example.com/a?b=c&d&{told}#e"),
        ("http://127.0.0.1:99", "http://127.0.0.1:99?{told}"),
        # Whoever takes the first of two by one name is told what was decided, too.
        (
            "https://app.example.com/a?decision=approved&b=%2f+c&i%64=1&id&identity=2&idea",
            "https://app.example.com/a?b=%2f+c&identity=2&idea&{told}",
        ),
    ],
)
def test_who_has_decided_is_sent_on_with_what_was_decided(
    served: Served, redirect: str, found: str
) -> None:
    for one_click, method, status in ((False, "POST", 303), (True, "GET", 302)):
        asked = ask(served, redirect_url=redirect, one_click=one_click)
        url = asked["links"][0]["reject_url"]
        page = served.ask("HEAD", url, headers=BROWSER)
        scheme = redirect.partition(":")[0]
        assert f"{scheme}:" in page.headers["content-security-policy"].partition("form-action")[2]
        answer = served.ask(method, url, headers=BROWSER)
        told = urlencode({"id": asked["approval_id"], "decision": "rejected"})
        assert (answer.status, answer.headers["location"]) == (status, found.format(told=told))
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = served.ask(method, url, headers=BROWSER)
        assert again.status == (409 if method == "POST" else 200)
        assert "location" not in again.headers


def test_what_is_wrong_or_over_opens_nothing(served: Served) -> None:
    asked, other = ask(served, addressees=["ada", "bob"]), ask(served)
    approve = asked["links"][0]["approve_url"]
    token = parse_qs(urlsplit(asked["links"][1]["approve_url"]).query)["token"][0]
    wrong = [
        changed(approve, decision="rejected"),
        changed(approve, decision="maybe"),
        changed(approve, token=f"0{token[1:]}"),
        changed(approve, token=token[:-4] + "AAAA"),
        changed(approve, token=""),
        approve.partition("?")[0],
        approve.replace(asked["approval_id"], other["approval_id"]),
        approve.replace(asked["approval_id"], "00000000-0000-7000-8000-000000000000"),
        approve.replace(asked["approval_id"], "x"),
    ]
    pages = set()
    for url in wrong:
        for method in ("GET", "POST"):
            page = served.ask(method, url, headers=BROWSER)
            assert page.status == 404
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            pages.add(page.body)
            refusal = served.ask(method, url, headers=JSON)
            assert (refusal.status, refusal.code) == (404, "NOT_FOUND")
    assert len(pages) == 1
    assert look(served, asked)["status"] == look(served, other)["status"] == "pending"


def test_what_is_over_says_so(served: Served) -> None:
    asked = ask(served, expires_in=1)
    url = asked["links"][0]["approve_url"]
    while served.ask("GET", url, headers=JSON).status == 200:
        assert look(served, asked)["status"] in ("pending", "expired")
    for method in ("GET", "POST"):
        refusal = served.ask(method, url, headers=JSON)
        assert (refusal.status, refusal.code) == (410, "LINK_EXPIRED")
        page = served.ask(method, url, headers=BROWSER)
        assert (page.status, "This link has expired" in page.body.decode()) == (410, True)
    assert look(served, asked)["status"] == "expired"

    asked = ask(served)
    url = asked["links"][0]["approve_url"]
    served.ask("POST", f"/api/v1/approvals/{asked['approval_id']}/cancel", token=served.admin)
    assert "This question was withdrawn" in served.ask("GET", url, headers=BROWSER).body.decode()
    refusal = served.ask("POST", url, headers=JSON)
    assert (refusal.code, refusal.form["state"]) == ("APPROVAL_CLOSED", "cancelled")
    assert refusal.form["decided_by"] is None


def test_bodies_that_are_no_comment_decide_nothing(served: Served) -> None:
    asked = ask(served)
    url = asked["links"][0]["approve_url"]
    too_long = urlencode({"comment": "ü" * 2001})
    page = served.ask("POST", url, too_long, headers={**BROWSER, **FORM})
    assert (page.status, "The comment is too long" in page.body.decode()) == (422, True)
    assert f">\n{'ü' * 2001}</textarea>" in page.body.decode()
    typed = "\n<b>" + "\U0001f600" * 4000
    page = served.ask("POST", url, urlencode({"comment": typed}), headers={**BROWSER, **FORM})
    assert page.status == 422
    # The first line break is not the comment's.
    assert f">\n\n&lt;b&gt;{typed[4:]}</textarea>" in page.body.decode()
    assert served.ask("POST", url, too_long, headers={**JSON, **FORM}).code == "INVALID_REQUEST"
    huge = b"comment=" + b"x" * 100_000
    assert served.ask("POST", url, huge, headers={**JSON, **FORM}).code == "TOO_LARGE"
    assert served.ask("POST", url, huge, headers={**BROWSER, **FORM}).status == 422
    many = "&".join(f"f{n}=1" for n in range(20))
    assert served.ask("POST", url, many, headers={**JSON, **FORM}).code == "INVALID_REQUEST"
    kind = {**JSON, "Content-Type": "application/json"}
    for body in ("{", "[]", '{"comment": 1}', '{"comment": "' + "x" * 2001 + '"}', '"\\ud800"'):
        assert served.ask("POST", url, body, headers=kind).code == "INVALID_REQUEST", body
    other = {**JSON, "Content-Type": "text/plain"}
    assert served.ask("POST", url, "yes", headers=other).code == "UNSUPPORTED_MEDIA_TYPE"
    assert look(served, asked)["status"] == "pending"
    longest = urlencode({"comment": "\U0001f600" * 2000})
    assert served.ask("POST", url, longest, headers={**JSON, **FORM}).status == 200
    assert look(served, asked)["comment"] == "\U0001f600" * 2000


def test_nothing_that_decides_is_logged(served: Served) -> None:
    asked = ask(served)
    url = asked["links"][0]["approve_url"]
    token = parse_qs(urlsplit(url).query)["token"][0]
    request_id = {"X-Request-Id": "decides-now"}
    served.ask("POST", url, "{", headers={**JSON, **FORM, **request_id})
    lines = served.logged(lambda lines: any("decides-now" in line for line in lines))
    assert not any(token in line or "decision=" in line for line in lines)


def test_the_links_go_to_where_the_request_came_to(served: Served) -> None:
    body = json.dumps({"approval_key": "k", "title": "t"})
    connection = HTTPConnection("127.0.0.1", served.port, timeout=ANSWER_S)
    headers = {"Authorization": f"Bearer {served.admin}", "Host": "files.example.org"}
    connection.request("POST", "/api/v1/approvals", body, headers)
    form = json.loads(connection.getresponse().read())
    connection.close()
    assert form["links"][0]["approve_url"].startswith("http://files.example.org/api/v1/")


def test_who_asked_and_who_decided_is_in_the_journal(served: Served) -> None:
    body = json.dumps({"approval_key": "audited", "title": "?"})
    asked = served.ask(
        "POST", "/api/v1/approvals", body, token=served.admin, headers={"X-Request-Id": "asks"}
    ).form
    url = asked["links"][0]["reject_url"]
    assert served.ask("POST", url, headers={**JSON, "X-Request-Id": "decides"}).status == 200
    actors = {line["request_id"]: line["actor"] for line in journal(served)}
    assert actors["asks"] == "admin"
    assert actors["decides"] == f"approval:{asked['approval_id']}"


def test_mails_lead_to_the_public_url_wherever_the_request_came_to(tmp_path: Path) -> None:
    mail = {"MAIL__HOST": "127.0.0.1", "MAIL__SENDER": "us@example.org"}
    public = "https://files.example.org"
    with serving(tmp_path, **mail, GATEWAY__PUBLIC_URL=public) as served:
        body = json.dumps({"approval_key": "k", "title": "?", "addressees": ["ada@example.org"]})
        headers = {"Host": "evil.example"}
        asked = served.ask("POST", "/api/v1/approvals", body, token=served.admin, headers=headers)
    settings = Settings(store=StoreSettings(root=tmp_path))
    with Store.open(tmp_path, settings) as store, store.catalog.read() as snapshot:
        [delivery] = snapshot.range(Delivery, "")
        sealed = payload_of(snapshot, delivery.delivery_id) or b""
        sent = json.loads(opened_payload(delivery, sealed, load_keys(settings).secrets) or b"")
    assert (delivery.kind, delivery.target) == ("mail", "ada@example.org")
    url = asked.form["links"][0]["approve_url"]
    assert url.startswith(f"{public}/api/v1/approvals/")
    assert url in sent["text"]
    assert "evil" not in sent["text"] + sent["html"]


def test_who_takes_the_links_himself_knows_where_he_has_asked(tmp_path: Path) -> None:
    """So without mail there need be no `public_url`."""
    with serving(tmp_path) as served:
        asked = ask(served, addressees=["ada"])
        assert asked["links"][0]["approve_url"].startswith(f"{served.address}/api/v1/approvals/")


def test_nobody_is_asked_for_a_run_that_has_ended(tmp_path: Path) -> None:
    run = Run("run-over", "default", "x", "cancelled", 1, "ann", open=None)
    settings = Settings(store=StoreSettings(root=tmp_path))
    with Store.open(tmp_path, settings) as store:
        store.catalog.write(lambda txn: txn.insert(run), actor="test")
    body = json.dumps({"approval_key": "k", "title": "?", "run": "run-over"})
    with serving(tmp_path) as served:
        refused = served.ask("POST", "/api/v1/approvals", body, token=served.admin)
    assert (refused.status, refused.code) == (409, "RUN_ENDED")
    assert refused.form["state"] == "cancelled"


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Served]:
    limits = {"LIMITS__GUESSES": "3/m", "LIMITS__TENANT_EVENTS": "5/m"}
    with serving(tmp_path, **limits) as served:
        yield served


def test_guesses_and_answers_are_limited(strict: Served) -> None:
    asked = ask(strict)
    url = asked["links"][0]["approve_url"]
    statuses = [strict.ask("GET", url, headers=BROWSER).status for _ in range(12)]
    assert statuses == [200] * 12  # to look is no event
    for _ in range(4):
        decided = ask(strict)["links"][0]["approve_url"]
        assert strict.ask("POST", decided, headers=JSON).status == 200
        assert strict.ask("POST", decided, headers=JSON).status == 409  # which is none, too
    clicked = ask(strict, one_click=True)["links"][0]["approve_url"]
    assert strict.ask("HEAD", clicked, headers=BROWSER).status == 200
    assert strict.ask("GET", clicked, headers=BROWSER).status == 200
    clicked = ask(strict, one_click=True)["links"][0]["approve_url"]
    for method, link in (("POST", url), ("GET", clicked)):
        slow = strict.ask(method, link, headers=BROWSER)
        assert (slow.status, "Please wait a little" in slow.body.decode()) == (429, True)
        assert int(slow.headers["retry-after"]) > 0
        assert strict.ask(method, link, headers=JSON).code == "TOO_MANY_REQUESTS"
    wrong = changed(url, token="x")
    statuses = [strict.ask("GET", wrong, headers=JSON).status for _ in range(4)]
    assert statuses == [404] * 3 + [429]
    assert look(strict, asked)["status"] == "pending"
