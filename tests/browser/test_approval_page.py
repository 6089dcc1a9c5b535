"""The page of an approval, as people meet it: with a keyboard, a phone, no script, a proxy."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.person import PHONE, OpenPage
from tests.browser.test_everybody import check, fits
from tests.gateway.served import Served

_NUMBERS = itertools.count()


def ask(served: Served, **wanted: Any) -> dict[str, Any]:
    """A question with a key of its own."""
    key = f"payment-{next(_NUMBERS)}"
    body = json.dumps({"approval_key": key, "title": "Pay the invoice?", **wanted})
    answer = served.ask("POST", "/api/v1/approvals", body, token=served.admin)
    assert answer.status == 201, answer.body
    return answer.form


def look(served: Served, asked: dict[str, Any]) -> dict[str, Any]:
    path = f"/api/v1/approvals/{asked['approval_id']}"
    return served.ask("GET", path, token=served.admin).form


@pytest.mark.parametrize("decision", ["approve", "reject"])
def test_a_person_decides(served: Served, open_page: OpenPage, decision: str) -> None:
    asked = ask(served, addressees=["ada@example.org", "bob"], message="Invoice 17\nto <Acme>")
    page = open_page(asked["links"][0][f"{decision}_url"], java_script_enabled=False)
    expect(page.get_by_role("heading")).to_have_text("Pay the invoice?")
    expect(page.locator(".prompt")).to_have_text("Invoice 17\nto <Acme>")
    expect(page.locator(".facts")).to_contain_text("asked of ada@example.org")
    expect(page.locator(".facts")).to_contain_text("2 people are asked")
    page.get_by_label("Comment (optional)").fill("As agreed,\nby phone")
    assert look(served, asked)["status"] == "pending"
    page.get_by_role("button", name=decision.title()).click()
    expect(page.get_by_role("heading")).to_have_text("Thank you")
    expect(page.locator(".verdict")).to_contain_text("ada@example.org")
    expect(page.locator(".remark")).to_have_text("As agreed,\nby phone")
    page.reload()  # asks for the page again, and decides nothing again
    expect(page.get_by_role("heading")).to_have_text("Thank you")
    found = look(served, asked)
    assert (found["status"], found["comment"]) == (
        {"approve": "approved", "reject": "rejected"}[decision],
        "As agreed,\nby phone",
    )

    late = open_page(asked["links"][1]["approve_url"])
    expect(late.get_by_role("heading")).to_have_text("This has been decided already")
    expect(late.locator(".verdict")).to_contain_text("ada@example.org")
    expect(late.get_by_role("button")).to_have_count(0)


def test_two_windows_decide_once(served: Served, open_page: OpenPage) -> None:
    asked = ask(served, addressees=["ada", "bob"])
    first = open_page(asked["links"][0]["approve_url"])
    second = open_page(asked["links"][1]["reject_url"])
    first.get_by_role("button", name="Approve").click()
    expect(first.get_by_role("heading")).to_have_text("Thank you")
    second.get_by_role("button", name="Reject").click()
    expect(second.get_by_role("heading")).to_have_text("This has been decided already")
    expect(second.locator(".verdict")).to_contain_text("Approved")


def test_what_was_typed_is_there_again_where_it_was_too_long(
    served: Served, open_page: OpenPage
) -> None:
    """As from a browser that does not keep to the length that the page says."""
    asked = ask(served)
    page = open_page(asked["links"][0]["approve_url"])
    typed = "\n<As> agreed,\n" + "x" * 2000
    page.locator("textarea").evaluate("field => field.removeAttribute('maxlength')")
    page.get_by_role("textbox").fill(typed)
    page.get_by_role("button", name="Approve").click()
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("textbox")).to_have_value(typed)
    assert look(served, asked)["status"] == "pending"
    page.get_by_role("textbox").fill("As agreed")
    page.get_by_role("button", name="Approve").click()
    expect(page.get_by_role("heading")).to_have_text("Thank you")
    assert look(served, asked)["comment"] == "As agreed"


def test_one_click_decides_as_it_opens(served: Served, open_page: OpenPage) -> None:
    asked = ask(served, one_click=True)
    page = open_page(asked["links"][0]["reject_url"])
    expect(page.get_by_role("heading")).to_have_text("Thank you")
    expect(page.locator(".verdict")).to_contain_text("Rejected")


def test_the_keyboard_is_enough(served: Served, open_page: OpenPage) -> None:
    asked = ask(served)
    page = open_page(asked["links"][0]["approve_url"])
    page.keyboard.press("Tab")
    page.keyboard.type("yes")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading")).to_have_text("Thank you")
    assert look(served, asked)["comment"] == "yes"


def test_it_works_under_a_prefix_of_a_proxy(served: Served, open_page: OpenPage) -> None:
    prefix = f"{served.address}/some/where"
    asked = ask(served)
    url = asked["links"][0]["approve_url"].replace(served.address, prefix)
    page = open_page(url, prefix=prefix)
    assert page.evaluate("getComputedStyle(document.querySelector('main')).borderRadius") == "18px"
    # Where the answer leads from there is relative (`tests/gateway/test_approvals.py`).
    assert page.locator("form").evaluate("form => form.action") == page.url == url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out_in_any_state(served: Served, open_page: OpenPage, scheme: str) -> None:
    wanted: dict[str, Any] = {
        "title": "W" * 200,
        "message": "x" * 300,
        "addressees": ["a" * 60 + "@" + "example." * 20 + "org", "bob"],
        "redirect_url": "https://bank.example/next",
    }
    asked, gone = ask(served, **wanted), ask(served, expires_in=1)
    withdrawn = ask(served, **wanted)
    path = f"/api/v1/approvals/{withdrawn['approval_id']}/cancel"
    assert served.ask("POST", path, token=served.admin).status == 200
    links, others = asked["links"]
    page = open_page(links["approve_url"], color_scheme=scheme, **PHONE)
    for url in (links["approve_url"], links["reject_url"]):
        page.goto(url)
        expect(page.get_by_role("heading")).to_have_text("W" * 200)
        check(page)
        fits(page)
        page.get_by_role("textbox").focus()
        check(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
    json_only = {"Accept": "application/json"}
    assert served.ask("POST", links["approve_url"], headers=json_only).status == 200
    headings = {
        links["approve_url"]: "Thank you",
        others["reject_url"]: "This has been decided already",
        withdrawn["links"][0]["approve_url"]: "This question was withdrawn",
        gone["links"][0]["approve_url"]: "This link has expired",
        links["approve_url"] + "x": "This link leads nowhere",
    }
    while look(served, gone)["status"] == "pending":
        pass
    for url, heading in headings.items():
        page.goto(url)
        expect(page.get_by_role("heading")).to_have_text(heading)
        check(page)
        fits(page)


# --- on to elsewhere


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """An application that sends whoever comes on to its login, at another origin."""

    class Application(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/login"):
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(b"<h1>Log in</h1>")
                return
            self.send_response(302)
            told = self.path.partition("?")[2]
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/login?{told}")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    # Chromium may keep a connection on which it asks nothing.
    server = ThreadingHTTPServer(("127.0.0.1", 0), Application)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://localhost:{server.server_port}/approved"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_person_is_sent_on_and_further_on(
    served: Served, browser: Browser, elsewhere: str
) -> None:
    asked = ask(served, redirect_url=elsewhere)
    context = browser.new_context()
    page = context.new_page()
    page.goto(asked["links"][0]["approve_url"])
    page.get_by_role("button", name="Approve").click()
    expect(page.get_by_role("heading")).to_have_text("Log in")
    assert page.url.endswith(f"/login?id={asked['approval_id']}&decision=approved")
    page.goto(asked["links"][0]["approve_url"])
    expect(page.get_by_role("link")).to_have_text(f"Continue to {elsewhere.split('/')[2]}")
    context.close()
