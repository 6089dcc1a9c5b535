"""The page for those with a keyboard, a screen reader, a phone, or no script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Page, expect

from tests.browser.person import PDF, PHONE, Line, OpenPage, info, sha256, stored, write
from tests.gateway.served import Served

PLAIN: dict[str, Any] = {"java_script_enabled": False}


def check(page: Page) -> None:
    """No fault that keeps anybody out, by the rules of axe."""
    # Colours on their way from one state to the next are no state.
    page.evaluate(
        "() => Promise.all(document.getAnimations().map(each => each.finished.catch(() => null)))"
    )
    found = Axe().run(page).response["violations"]
    grave = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in grave] == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out_in_any_state(
    served: Served, open_page: OpenPage, tmp_path: Path, scheme: str
) -> None:
    asked = served.request_upload(
        name="Your documents", prompt="Please.", max_files=3, allowed_types=["pdf"], max_size_mb=9,
        redirect_url="https://bank.example/next",
    )  # fmt: skip
    expiring = served.request_upload(expires_in=1)
    page = open_page(asked["upload_url"], color_scheme=scheme)
    expect(page.locator("#drop")).to_be_visible()
    check(page)
    page.set_input_files("#picker", write(tmp_path, "tool.exe", b"MZ"))
    line = Line(page)
    line.slow(100_000)
    moving = [write(tmp_path, f"{n}.pdf", PDF + os.urandom(5_000_000)) for n in range(2)]
    page.set_input_files("#picker", moving)
    page.get_by_role("button", name="Pause 0.pdf").click()
    page.set_input_files("#picker", write(tmp_path, "tool.exe", b"MZ"))
    expect(page.get_by_role("alert")).to_be_visible()
    check(page)  # sending, paused, a notice
    page.get_by_role("button", name="Remove 1.pdf").click()
    line.free()
    page.get_by_role("button", name="Resume 0.pdf").click()
    page.set_input_files("#picker", write(tmp_path, "lie.pdf", b"MZ" * 50))
    expect(page.locator("#files li.saved")).to_have_count(2)
    check(page)  # stored
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#files li.failed")).to_be_visible()
    check(page)  # refused
    page.get_by_role("button", name="Remove lie.pdf").click()
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_have_count(1)
    page.get_by_text("How to prove what was received").click()
    check(page)  # done

    cancelled = served.request_upload()
    path = f"/api/v1/uploads/{cancelled['upload_token']}/cancel"
    assert served.ask("POST", path, token=served.admin).status == 200
    closed = {
        cancelled["upload_url"]: "This request was cancelled",
        expiring["upload_url"]: "This link has expired",
        f"{served.address}/u/AAAAAAAA": "This link leads nowhere",
    }
    for address, heading in closed.items():
        page.goto(address)
        expect(page.get_by_role("heading")).to_have_text(heading)
        check(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(served: Served, open_page: OpenPage, tmp_path: Path, scheme: str) -> None:
    name = "a-rather-long-file-name-without-any-space-that-must-not-widen-the-page" * 2 + ".txt"
    asked = served.request_upload(name="W" * 200, max_files=3, prompt="x" * 300)
    page = open_page(asked["upload_url"], color_scheme=scheme, **PHONE)
    page.set_input_files("#picker", write(tmp_path, name, b"a"))
    expect(page.locator("#files li.saved")).to_have_count(1)
    fits(page)
    check(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_have_count(1)
    fits(page)


def fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for target in page.locator(".button:visible, .acts button:visible, summary:visible").all():
        box = target.bounding_box()
        assert box is not None
        assert box["height"] >= 44  # what a thumb needs


def test_the_keyboard_is_enough(served: Served, open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(served.request_upload(max_files=2)["upload_url"])
    # Before the key is pressed by some calls: Chromium takes a moment to intercept choosers.
    page.on("filechooser", lambda chooser: chooser.set_files(write(tmp_path, "a.txt", b"a")))
    expect(page.locator("#drop")).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "picker"
    page.keyboard.press("Enter")
    expect(page.locator("#files li.saved")).to_have_count(1)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Remove a.txt"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "done"
    page.keyboard.press("Enter")
    expect(page.locator("#receipt li")).to_have_count(1)
    assert page.evaluate("document.activeElement.id") == "verdict"


# --- without script


def test_the_plain_form_sends_files_in_one_go(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3, redirect_url="https://bank.example/next")
    page = open_page(asked["upload_url"], **PLAIN)
    large = os.urandom(3_000_000)
    names = [write(tmp_path, "zwei ü.txt", b"1"), write(tmp_path, 'quo"te.bin', large)]
    page.set_input_files("#plain-files", names)
    page.get_by_label("These are all: send them at once").check()
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#verdict")).to_have_text("Thank you, the files have arrived")
    expect(page.locator("#receipt li").nth(0)).to_contain_text("zwei ü.txt")
    expect(page.locator("#receipt li").nth(1)).to_contain_text(sha256(large))
    expect(page.locator("#receipt li").nth(1)).to_contain_text('quo"te.bin')
    assert info(served, asked)["status"] == "completed"


def test_the_plain_form_can_be_filled_step_by_step(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    page = open_page(asked["upload_url"], **PLAIN)
    for name in ("one.txt", "two.txt"):
        page.set_input_files("#plain-files", write(tmp_path, name, name.encode()))
        page.get_by_role("button", name="Upload").click()
        expect(page.locator("#plain")).to_contain_text(name)
    page.reload()  # asks again for the page, and sends nothing again
    page.get_by_role("button", name="Remove one.txt").click()
    expect(page.locator("#plain")).not_to_contain_text("one.txt")
    assert list(stored(served, asked)) == ["two.txt"]
    page.get_by_role("button", name="Done: send what is stored").click()
    expect(page.locator("#receipt li")).to_have_count(1)


def test_the_plain_form_says_what_was_refused(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2, max_size_mb=1, allowed_types=["pdf"])
    page = open_page(asked["upload_url"], **PLAIN)
    chosen = [("big.pdf", PDF + bytes(2_000_000)), ("good.pdf", PDF), ("lie.pdf", b"MZ" * 50)]
    chosen.append(("more.pdf", PDF))
    page.set_input_files("#plain-files", [write(tmp_path, *each) for each in chosen])
    page.get_by_label("These are all: send them at once").check()
    page.get_by_role("button", name="Upload").click()
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("“big.pdf”: It is larger than allowed.")
    expect(notice).to_contain_text("“more.pdf” was not added: at most 2 files are wanted.")
    page.get_by_role("button", name="Done: send what is stored").click()
    expect(notice).to_have_text("“lie.pdf”: Not accepted: it is plain text, not pdf.")
    page.get_by_role("button", name="Remove lie.pdf").click()
    page.get_by_role("button", name="Done: send what is stored").click()
    expect(page.locator("#receipt li")).to_have_count(1)


@pytest.mark.slow
def test_the_plain_form_comes_when_the_script_does_not(served: Served, open_page: OpenPage) -> None:
    asked = served.request_upload()
    page = open_page(asked["upload_url"], without="upload.js")
    expect(page.locator("#plain-files")).to_be_visible()
    check(page)
