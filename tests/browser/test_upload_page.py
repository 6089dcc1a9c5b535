"""The upload page in a real Chromium, as a person uses it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser.person import (
    LARGE_BYTES,
    PDF,
    PHONE,
    Line,
    OpenPage,
    info,
    sha256,
    stored,
    write,
)
from tests.gateway.served import Served

THANKS = "Thank you, the files have arrived"


def test_a_person_sends_files_and_gets_a_receipt(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(
        name="KYC documents", prompt="Your IDs, please", max_files=4, allowed_types=["pdf"],
        redirect_url="https://bank.example/next",
    )  # fmt: skip
    page = open_page(asked["upload_url"])
    expect(page.get_by_role("heading", level=1)).to_have_text("KYC documents")
    expect(page.get_by_text("Your IDs, please")).to_be_visible()
    expect(page.get_by_text("up to 4 files")).to_be_visible()
    expect(page.locator("#plain")).to_have_count(0)
    one, two = PDF + b"1", PDF + os.urandom(LARGE_BYTES)  # the second goes in pieces
    page.set_input_files(
        "#picker", [write(tmp_path, "one.pdf", one), write(tmp_path, "zwei ü.pdf", two)]
    )
    expect(page.locator("#files li.saved")).to_have_count(2)
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(THANKS)
    assert page.evaluate("document.activeElement.id") == "verdict"
    receipt = page.locator("#receipt li")
    expect(receipt).to_have_count(2)
    expect(receipt.nth(0)).to_contain_text("one.pdf")
    expect(receipt.nth(0)).to_contain_text(sha256(one))
    expect(receipt.nth(1)).to_contain_text("zwei ü.pdf")
    expect(receipt.nth(1)).to_contain_text(sha256(two))
    expect(receipt.nth(1)).to_contain_text("8.6 MB")
    onward = page.get_by_role("link", name="Continue to bank.example")
    expect(onward).to_have_attribute("href", "https://bank.example/next")
    assert info(served, asked)["status"] == "completed"
    assert sha256(two) in served.objects()

    page.reload()
    expect(page.locator("#receipt li")).to_have_count(2)
    with page.expect_download() as downloading:
        page.get_by_role("link", name="Download the receipt").click()
    downloaded = json.loads(downloading.value.path().read_text())
    assert sha256(two) in json.dumps(downloaded)


def test_the_page_works_under_a_path_prefix(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    """As behind a proxy that cuts the prefix off."""
    asked = served.request_upload(max_files=3)
    prefix = f"{served.address}/some/prefix"
    address = f"{prefix}/u/{asked['upload_token']}"
    page = open_page(address, prefix=prefix)
    large = os.urandom(LARGE_BYTES)
    page.set_input_files(
        "#picker", [write(tmp_path, "a.txt", b"a"), write(tmp_path, "large.bin", large)]
    )
    expect(page.locator("#files li.saved")).to_have_count(2)
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li").nth(1)).to_contain_text(sha256(large))
    href = page.get_by_role("link", name="Download the receipt").evaluate("link => link.href")
    assert href == f"{prefix}/api/v1/uploads/{asked['upload_token']}/receipt"


@pytest.mark.parametrize("max_files", [1, 2])
def test_the_page_completes_by_itself_when_all_places_are_filled(
    served: Served, open_page: OpenPage, tmp_path: Path, max_files: int
) -> None:
    asked = served.request_upload(max_files=max_files)
    page = open_page(asked["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)  # the countdown is the test's
    names = [f"{number}.txt" for number in range(max_files)]
    page.set_input_files("#picker", [write(tmp_path, name, name.encode()) for name in names])
    expect(page.locator("#overall")).to_contain_text("All is stored. Sending in")
    expect(page.locator("#said")).to_contain_text("Press Wait to keep them back")
    page.clock.run_for(6_000)
    expect(page.locator("#verdict")).to_have_text(THANKS)
    assert info(served, asked)["status"] == "completed"


def test_completing_by_itself_can_be_stopped(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=1)
    page = open_page(asked["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)  # the countdown is the test's
    page.set_input_files("#picker", write(tmp_path, "wrong.txt", b"wrong"))
    page.get_by_role("button", name="Wait").click()
    assert page.evaluate("document.activeElement.id") == "done"
    page.clock.run_for(20_000)
    expect(page.locator("#overall")).to_have_text("The file is stored. Press Done to send it.")
    page.get_by_role("button", name="Remove wrong.txt").click()
    expect(page.locator("#drop")).to_be_visible()
    page.set_input_files("#picker", write(tmp_path, "right.txt", b"right"))
    expect(page.get_by_role("button", name="Wait")).to_be_visible()
    assert info(served, asked)["status"] == "pending"
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_contain_text("right.txt")


def test_files_may_be_dropped(served: Served, open_page: OpenPage) -> None:
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


def test_a_dropped_folder_is_walked(served: Served, open_page: OpenPage, tmp_path: Path) -> None:
    asked = served.request_upload(max_files=5)
    page = open_page(asked["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    write(tmp_path / "scans", "page 1.txt", b"1")
    write(tmp_path / "scans" / "more", "page 2.txt", b"2")
    write(tmp_path / "scans", ".DS_Store", b"litter")
    (tmp_path / "nothing").mkdir()
    session = page.context.new_cdp_session(page)
    folders = [str(tmp_path / "scans"), str(tmp_path / "nothing")]
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": folders, "dragOperationsMask": 1}
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
    expect(page.locator("#files li.saved")).to_have_count(2)
    expect(page.get_by_role("alert")).to_have_text("“nothing” holds no files.")
    assert set(stored(served, asked)) == {"page 1.txt", "page 2.txt"}


def test_a_picture_may_be_pasted(served: Served, open_page: OpenPage) -> None:
    page = open_page(served.request_upload(max_files=2)["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    page.evaluate(
        """() => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File(["png"], "image.png", { type: "image/png" }));
            document.body.dispatchEvent(
                new ClipboardEvent("paste", { clipboardData, bubbles: true }));
        }"""
    )
    expect(page.locator("#files li.saved .name")).to_contain_text("pasted-20")


def test_progress_is_shown_and_a_file_can_be_removed_on_its_way(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    page = open_page(asked["upload_url"])
    Line(page).slow(200_000)
    small = write(tmp_path, "small.bin", os.urandom(4_000_000))
    large = write(tmp_path, "large.bin", os.urandom(LARGE_BYTES))
    page.set_input_files("#picker", [small, large])
    bar = page.get_by_label("Progress of large.bin")
    expect(bar).not_to_have_attribute("value", "0")
    assert 0 < float(bar.get_attribute("value") or 0) < 1
    expect(page.locator("#overall")).to_have_text("Uploading 2 files")
    expect(page.locator("#pace")).to_contain_text("a second · about")
    expect(page.get_by_role("button", name="Done")).to_be_disabled()
    page.get_by_role("button", name="Remove small.bin").click()
    page.get_by_role("button", name="Remove large.bin").click()
    expect(page.locator("#files li")).to_have_count(0)
    left = info(served, asked)
    assert (left["files"], left["partials"]) == ([], [])


def test_files_can_be_paused_one_by_one_and_all_together(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    page = open_page(asked["upload_url"])
    line = Line(page)
    line.slow(400_000)
    sent = {"one.bin": os.urandom(LARGE_BYTES), "two.bin": os.urandom(LARGE_BYTES)}
    page.set_input_files("#picker", [write(tmp_path, name, data) for name, data in sent.items()])
    expect(page.get_by_label("Progress of one.bin")).not_to_have_attribute("value", "0")
    page.get_by_role("button", name="Pause one.bin").click()
    expect(page.locator("#files li.paused")).to_contain_text("Paused at")
    page.get_by_role("button", name="Pause all").click()
    expect(page.locator("#files li.paused")).to_have_count(2)
    expect(page.locator("#overall")).to_have_text("Paused")
    line.free()
    page.get_by_role("button", name="Resume two.bin").click()
    expect(page.locator("#files li.saved")).to_have_count(1)
    page.get_by_role("button", name="Resume all").click()
    expect(page.locator("#files li.saved")).to_have_count(2)
    assert stored(served, asked) == {name: sha256(data) for name, data in sent.items()}


def test_a_stored_file_can_be_removed_before_completing(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    page = open_page(asked["upload_url"])
    page.set_input_files(
        "#picker", [write(tmp_path, "keep.txt", b"keep"), write(tmp_path, "drop.txt", b"drop")]
    )
    expect(page.locator("#files li.saved")).to_have_count(2)
    page.get_by_role("button", name="Remove drop.txt").click()
    expect(page.locator("#files li")).to_have_count(1)
    assert list(stored(served, asked)) == ["keep.txt"]

    page.reload()  # what is stored is still there
    expect(page.locator("#files li.saved")).to_have_count(1)
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_have_count(1)


def test_refusals_say_what_is_wrong(served: Served, open_page: OpenPage, tmp_path: Path) -> None:
    asked = served.request_upload(max_files=2, max_size_mb=1, allowed_types=["pdf", "jpg"])
    page = open_page(asked["upload_url"])
    expect(page.locator("#picker")).to_have_attribute(
        "accept", ".jpeg,.jpg,.pdf,application/pdf,image/jpeg"
    )
    notice = page.get_by_role("alert")
    page.set_input_files("#picker", write(tmp_path, "tool.exe", b"MZ"))
    expect(notice).to_have_text("“tool.exe” was not added: only PDF, JPG can be sent here.")
    page.set_input_files("#picker", write(tmp_path, "big.pdf", PDF + bytes(2 * 1024 * 1024)))
    expect(notice).to_contain_text("it has 2 MB, and at most 1 MB are allowed")

    # By its content, which only the server sees, and only when completing.
    right = write(tmp_path, "right.pdf", PDF)
    page.set_input_files("#picker", [right, write(tmp_path, "lie.pdf", b"MZ" * 50)])
    expect(page.locator("#files li.saved")).to_have_count(2)
    page.set_input_files("#picker", right)
    expect(notice).to_have_text("“right.pdf” is in the list already.")
    page.set_input_files("#picker", write(tmp_path, "third.pdf", PDF))
    expect(notice).to_contain_text("at most 2 files are wanted")
    page.get_by_role("button", name="Done").click()
    expect(notice).to_contain_text("cannot be accepted")
    refused = page.locator("#files li.failed")
    expect(refused).to_contain_text("lie.pdf")
    expect(refused).to_contain_text("Not accepted: it is plain text, not pdf or jpg.")
    page.get_by_role("button", name="Remove lie.pdf").click()
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_have_count(1)


def test_a_closed_upload_says_so(served: Served, open_page: OpenPage, tmp_path: Path) -> None:
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


def test_photos_are_offered_where_pictures_are_wanted_and_fingers_are_used(
    served: Served, open_page: OpenPage
) -> None:
    camera = "label[for=camera]"
    pictures = served.request_upload(allowed_types=["jpg"])["upload_url"]
    expect(open_page(pictures, **PHONE).locator(camera)).to_be_visible()
    desktop = open_page(pictures)
    expect(desktop.locator("#drop")).to_be_visible()
    expect(desktop.locator(camera)).to_be_hidden()
    texts = open_page(served.request_upload(allowed_types=["txt"])["upload_url"], **PHONE)
    expect(texts.locator("#drop")).to_be_visible()
    expect(texts.locator(camera)).to_have_count(0)
