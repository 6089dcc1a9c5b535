"""The upload page in a real Chromium, as a person uses it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.gateway.served import Served

PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
# Refusals are answers with an error status, which Chromium reports as if they were faults.
EXPECTED_REPORTS = (
    "Failed to load resource: the server responded with a status of 4",
    "Failed to load resource: net::ERR_INTERNET_DISCONNECTED",
)


@pytest.fixture(scope="module")
def browser(program: Callable[[str], str]) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program("chromium"), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser, served: Served) -> Iterator[Callable[..., Page]]:
    """Opens an address; the page may ask nobody but the server, and break no policy."""
    contexts = []
    faults: list[str] = []

    def note(message: Any) -> None:
        if message.type == "error" and not message.text.startswith(EXPECTED_REPORTS):
            faults.append(message.text)

    def open_at(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(served.address) else faults.append(request.url)
            ),
        )
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert faults == []


def write(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def slow_down(page: Page, bytes_per_s: int) -> None:
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1}
    session.send("Network.emulateNetworkConditions", {**limits, "uploadThroughput": bytes_per_s})


def info(served: Served, asked: dict[str, Any]) -> dict[str, Any]:
    return served.ask("GET", f"/api/v1/uploads/{asked['upload_token']}/info").form


def test_a_person_sends_files_and_gets_a_receipt(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(
        name="KYC documents", prompt="Your IDs, please", max_files=4, allowed_types=["pdf"],
        redirect_url="https://bank.example/next",
    )  # fmt: skip
    page = open_page(asked["upload_url"])
    expect(page.get_by_role("heading", level=1)).to_have_text("KYC documents")
    expect(page.get_by_text("Your IDs, please")).to_be_visible()
    expect(page.get_by_text("up to 4 files")).to_be_visible()
    one, two = PDF + b"1", PDF + b"22"
    page.set_input_files(
        "#picker", [write(tmp_path, "one.pdf", one), write(tmp_path, "zwei ü.pdf", two)]
    )
    expect(page.locator("#files li.saved")).to_have_count(2)
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("heading", level=2)).to_have_text("Thank you, the files have arrived")
    receipt = page.locator("#receipt li")
    expect(receipt).to_have_count(2)
    expect(receipt.nth(0)).to_contain_text("one.pdf")
    expect(receipt.nth(0)).to_contain_text(hashlib.sha256(one).hexdigest())
    expect(receipt.nth(1)).to_contain_text("zwei ü.pdf")
    expect(receipt.nth(1)).to_contain_text(f"{len(two)} bytes")
    onward = page.get_by_role("link", name="Continue to bank.example")
    expect(onward).to_have_attribute("href", "https://bank.example/next")
    assert info(served, asked)["status"] == "completed"
    assert hashlib.sha256(two).hexdigest() in served.objects()

    page.reload()
    expect(page.locator("#receipt li")).to_have_count(2)


def test_the_page_completes_by_itself_when_all_places_are_filled(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=1)
    page = open_page(asked["upload_url"])
    page.set_input_files("#picker", write(tmp_path, "only.txt", b"only"))
    expect(page.locator("#verdict")).to_have_text("Thank you, the files have arrived")
    assert info(served, asked)["status"] == "completed"


def test_files_may_be_dropped(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served.request_upload(max_files=3)["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    dropped = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["dropped"], "dropped.txt", { type: "text/plain" }));
            transfer.items.add(new File([], "empty.txt", { type: "text/plain" }));
            return transfer;
        }"""
    )
    page.dispatch_event("#drop", "dragenter", {"dataTransfer": dropped})
    expect(page.locator("#drop.over")).to_be_visible()
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    expect(page.locator("#drop.over")).to_have_count(0)
    expect(page.locator("#files li.saved")).to_have_count(2)
    expect(page.locator("#files")).to_contain_text("0 bytes · stored")


def test_progress_is_shown_and_a_file_can_be_removed_on_its_way(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2)
    page = open_page(asked["upload_url"])
    slow_down(page, 400_000)
    page.set_input_files("#picker", write(tmp_path, "large.bin", os.urandom(4_000_000)))
    bar = page.locator("#files progress")
    expect(bar).not_to_have_attribute("value", "0")
    assert 0 < float(bar.get_attribute("value") or 0) < 1
    expect(page.locator("#overall")).to_have_text("Uploading 1 file…")
    expect(page.get_by_role("button", name="Done")).to_be_disabled()
    page.get_by_role("button", name="Remove large.bin").click()
    expect(page.locator("#files li")).to_have_count(0)
    assert info(served, asked)["files"] == []


def test_a_stored_file_can_be_removed_before_completing(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    page = open_page(asked["upload_url"])
    page.set_input_files(
        "#picker", [write(tmp_path, "keep.txt", b"keep"), write(tmp_path, "drop.txt", b"drop")]
    )
    expect(page.locator("#files li.saved")).to_have_count(2)
    page.get_by_role("button", name="Remove drop.txt").click()
    expect(page.locator("#files li")).to_have_count(1)
    assert [file["filename"] for file in info(served, asked)["files"]] == ["keep.txt"]

    page.reload()  # what is stored is still there
    expect(page.locator("#files li.saved")).to_have_count(1)
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_have_count(1)


def test_refusals_say_what_is_wrong(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2, max_size_mb=1, allowed_types=["pdf", "jpg"])
    page = open_page(asked["upload_url"])
    notice = page.get_by_role("alert")
    page.set_input_files("#picker", write(tmp_path, "tool.exe", b"MZ"))
    expect(notice).to_have_text("“tool.exe” was not added: only PDF, JPG can be sent here.")
    page.set_input_files("#picker", write(tmp_path, "big.pdf", PDF + bytes(2 * 1024 * 1024)))
    expect(notice).to_contain_text("it has 2 MB, and at most 1 MB are allowed")

    # By its content, which only the server sees, and only when completing.
    page.set_input_files(
        "#picker", [write(tmp_path, "right.pdf", PDF), write(tmp_path, "lie.pdf", b"MZ" * 50)]
    )
    expect(notice).to_contain_text("cannot be accepted")
    expect(page.locator("#files li.failed")).to_contain_text("lie.pdf")
    page.set_input_files("#picker", write(tmp_path, "third.pdf", PDF))
    expect(notice).to_contain_text("at most 2 files are wanted")
    page.get_by_role("button", name="Remove lie.pdf").click()
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_have_count(1)


def test_a_closed_upload_says_so(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2)
    page = open_page(asked["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    token = asked["upload_token"]
    cancelled = served.ask("POST", f"/api/v1/uploads/{token}/cancel", token=served.admin)
    assert cancelled.status == 200
    # Noticed by a page that was open before, and by one that is opened after.
    page.set_input_files("#picker", write(tmp_path, "late.txt", b"late"))
    expect(page.locator("#verdict")).to_have_text("This request was cancelled")
    again = open_page(asked["upload_url"])
    expect(again.locator("#verdict")).to_have_text("This request was cancelled")
    unknown = open_page(f"{served.address}/u/AAAAAAAA")
    expect(unknown.get_by_role("heading")).to_have_text("This link leads nowhere")


def test_another_tab_that_completes_is_noticed(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2)
    first, second = open_page(asked["upload_url"]), open_page(asked["upload_url"])
    expect(second.locator("#drop")).to_be_visible()
    first.set_input_files("#picker", write(tmp_path, "a.txt", b"a"))
    expect(first.locator("#files li.saved")).to_have_count(1)
    first.get_by_role("button", name="Done").click()
    expect(first.locator("#receipt li")).to_have_count(1)
    second.set_input_files("#picker", write(tmp_path, "b.txt", b"b"))
    expect(second.locator("#verdict")).to_have_text("Thank you, the files have arrived")
    expect(second.locator("#receipt li")).to_have_count(1)


def test_a_lost_connection_can_be_tried_again(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2)
    page = open_page(asked["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    page.context.set_offline(True)
    page.set_input_files("#picker", write(tmp_path, "a.txt", b"a"))
    expect(page.locator("#files li.failed")).to_contain_text("connection was lost")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try a.txt again").click()
    expect(page.locator("#files li.saved")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(
    served: Served, open_page: Callable[..., Page], tmp_path: Path, scheme: str
) -> None:
    name = "a-rather-long-file-name-without-any-space-that-must-not-widen-the-page" * 2 + ".txt"
    asked = served.request_upload(name="W" * 200, max_files=3, prompt="x" * 300)
    page = open_page(asked["upload_url"], color_scheme=scheme, **PHONE)
    page.set_input_files("#picker", write(tmp_path, name, b"a"))
    expect(page.locator("#files li.saved")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for target in page.locator(".button:visible, .acts button:visible").all():
        box = target.bounding_box()
        assert box is not None
        assert box["height"] >= 44  # what a thumb needs
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")


def test_the_keyboard_is_enough(
    served: Served, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(served.request_upload(max_files=2)["upload_url"])
    # Before the key is pressed by some calls: Chromium takes a moment to intercept choosers.
    page.on("filechooser", lambda chooser: chooser.set_files(write(tmp_path, "a.txt", b"a")))
    expect(page.locator("#drop")).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "picker"
    page.keyboard.press("Enter")
    expect(page.locator("#files li.saved")).to_have_count(1)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "done"
    page.keyboard.press("Enter")
    expect(page.locator("#receipt li")).to_have_count(1)
    assert page.evaluate("document.activeElement.id") == "closed"
