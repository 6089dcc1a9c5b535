"""Uploads that are interrupted: by the line, the browser, the server, another window."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect

from tests.browser.person import (
    LARGE_BYTES,
    Line,
    OpenPage,
    Wire,
    info,
    sha256,
    stored,
    write,
)
from tests.gateway.served import PATIENCE_S, Served, held_port, serving

# A tenth of a large file takes two seconds, the rest twenty: so long may a busy machine take
# for what is to happen in between.
SLOW_BYTES_PER_S = 400_000


def send_a_part(page: Page, name: str, path: str) -> Line:
    """Have a part of a file sent, and the rest still to come."""
    line = Line(page)
    line.slow(SLOW_BYTES_PER_S)
    page.set_input_files("#picker", path)
    page.wait_for_function(
        """name => {
            const bar = document.querySelector(`[aria-label="Progress of ${name}"]`);
            return bar && bar.value > 0.1;
        }""",
        arg=name,
    )
    return line


def sent_offsets(page: Page) -> list[int]:
    """Where the pieces begin that the page sends from now on."""
    offsets: list[int] = []

    def note(request: Request) -> None:
        if request.method == "PATCH":
            offsets.append(int(request.headers["upload-offset"]))

    page.on("request", note)
    return offsets


def finished(page: Page, count: int = 1) -> None:
    expect(page.locator("#files li.saved")).to_have_count(count)


def begun(served: Served, asked: dict[str, Any]) -> None:
    """Some of the file is durable: what a killed browser finds again."""
    partials = info(served, asked)["partials"]
    assert len(partials) == 1


# --- the line


@pytest.mark.slow
def test_a_lost_connection_goes_on_by_itself(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    wire = Wire(served.port)
    page = open_page(f"{wire.address}/u/{asked['upload_token']}")
    data = os.urandom(LARGE_BYTES)
    line = send_a_part(page, "large.bin", write(tmp_path, "large.bin", data))
    wire.cut()
    expect(page.locator("#files li.retrying")).to_contain_text("Goes on by itself")
    expect(page.locator("#overall")).to_contain_text("No connection")
    page.set_input_files("#picker", write(tmp_path, "small.txt", b"small"))
    expect(page.locator("#files li.retrying")).to_have_count(2)
    offsets = sent_offsets(page)
    line.free()
    wire.mend()
    finished(page, 2)
    wire.cut()
    assert offsets[0] > 0
    assert stored(served, asked) == {"large.bin": sha256(data), "small.txt": sha256(b"small")}


def test_a_line_that_comes_back_is_used_at_once(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(served.request_upload(max_files=2)["upload_url"])
    expect(page.locator("#drop")).to_be_visible()
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)  # no pause between attempts ends
    page.context.set_offline(True)
    page.set_input_files("#picker", write(tmp_path, "a.txt", b"a"))
    expect(page.locator("#files li.retrying")).to_have_count(1)
    page.context.set_offline(False)
    finished(page)


@pytest.mark.parametrize(("method", "data"), [("PUT", b"a"), ("PATCH", bytes(LARGE_BYTES))])
def test_a_file_whose_answer_was_lost_is_not_stored_twice(
    served: Served, open_page: OpenPage, tmp_path: Path, method: str, data: bytes
) -> None:
    asked = served.request_upload(max_files=3)
    wire = Wire(served.port)
    page = open_page(f"{wire.address}/u/{asked['upload_token']}")
    expect(page.locator("#drop")).to_be_visible()
    wire.lose_answer_to(method)
    page.set_input_files("#picker", write(tmp_path, "a.txt", data))
    finished(page)
    wire.cut()
    assert stored(served, asked) == {"a.txt": sha256(data)}
    assert len(info(served, asked)["files"]) == 1


# --- the browser


def test_an_upload_goes_on_after_a_reload(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    page = open_page(asked["upload_url"])
    data = os.urandom(LARGE_BYTES)
    path = write(tmp_path, "large.bin", data)
    line = send_a_part(page, "large.bin", path)
    page.reload()
    line.free()
    unfinished = page.locator("#files li.unfinished")
    expect(unfinished).to_contain_text("large.bin")
    expect(unfinished).to_contain_text("Choose the same file again to go on")
    expect(page.get_by_role("button", name="Done")).to_be_disabled()
    offsets = sent_offsets(page)
    with page.expect_file_chooser() as choosing:
        page.get_by_role("button", name="Choose large.bin again to go on").click()
    choosing.value.set_files(path)
    finished(page)
    assert offsets[0] > 0
    assert stored(served, asked) == {"large.bin": sha256(data)}
    assert page.evaluate("Object.keys(localStorage)") == []


@pytest.mark.slow
def test_a_file_that_changed_since_is_sent_anew(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=1)
    page = open_page(asked["upload_url"])
    path = write(tmp_path, "large.bin", os.urandom(LARGE_BYTES))
    line = send_a_part(page, "large.bin", path)
    page.reload()
    line.free()
    expect(page.locator("#files li.unfinished")).to_have_count(1)
    changed = os.urandom(LARGE_BYTES)
    write(tmp_path, "large.bin", changed)
    os.utime(path, (1, 1))
    offsets = sent_offsets(page)
    page.set_input_files("#picker", path)
    expect(page.get_by_role("alert")).to_contain_text("has changed since its upload began")
    finished(page)
    assert offsets[0] == 0
    assert stored(served, asked) == {"large.bin": sha256(changed)}


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_another_browser_goes_on_and_proves_that_it_is_the_same_file(
    served: Served, open_page: OpenPage, tmp_path: Path, same: bool
) -> None:
    asked = served.request_upload(max_files=1)
    wire = Wire(served.port)
    wire.carry_no_more_than(LARGE_BYTES // 2)
    page = open_page(f"{wire.address}/u/{asked['upload_token']}")
    data = os.urandom(LARGE_BYTES)
    page.set_input_files("#picker", write(tmp_path, "large.bin", data))
    assert wire.lost.wait(PATIENCE_S)
    page.context.close()
    wire.cut()
    other = open_page(asked["upload_url"])
    expect(other.locator("#files li.unfinished")).to_have_count(1)
    chosen = data if same else os.urandom(LARGE_BYTES)
    offsets = sent_offsets(other)
    other.set_input_files("#picker", write(tmp_path / "other", "large.bin", chosen))
    finished(other)
    assert offsets[0] > 0
    assert (0 in offsets) is not same
    assert stored(served, asked) == {"large.bin": sha256(chosen)}
    if not same:
        expect(other.get_by_role("alert")).to_contain_text("is not the file whose upload began")


def test_an_unfinished_file_can_be_removed(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2)
    page = open_page(asked["upload_url"])
    line = send_a_part(page, "large.bin", write(tmp_path, "large.bin", os.urandom(LARGE_BYTES)))
    page.reload()
    line.free()
    page.get_by_role("button", name="Remove large.bin").click()
    expect(page.locator("#files li")).to_have_count(0)
    assert info(served, asked)["partials"] == []


# --- the server


@pytest.fixture
def mortal_root(disk_folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder:
        yield Path(folder)


@pytest.fixture
def port() -> Iterator[int]:
    with held_port() as held:
        yield held


def family(pid: int) -> list[int]:
    """A process and all its descendants, the parents first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


def kill_all(pid: int) -> None:
    """kill -9 for a whole family; a child may end by itself when its parent is gone."""
    for one in family(pid):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


@pytest.mark.slow
def test_an_upload_goes_on_after_the_server_was_killed(
    mortal_root: Path, port: int, open_page: OpenPage, tmp_path: Path
) -> None:
    bind = {"GATEWAY__BIND": f"127.0.0.1:{port}"}
    data = os.urandom(LARGE_BYTES)
    with serving(mortal_root, **bind) as mortal:
        asked = mortal.request_upload(max_files=2)
        page = open_page(asked["upload_url"])
        line = send_a_part(page, "large.bin", write(tmp_path, "large.bin", data))
        kill_all(mortal.process.pid)
        mortal.process.wait()
        expect(page.locator("#files li.retrying")).to_have_count(1)
    line.free()
    with serving(mortal_root, **bind) as again:
        finished(page)
        assert stored(again, asked) == {"large.bin": sha256(data)}
        page.get_by_role("button", name="Done").click()
        expect(page.locator("#receipt li")).to_contain_text(sha256(data))


# --- another window


def test_two_windows_see_each_others_files(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    first = open_page(asked["upload_url"])
    second = open_page(asked["upload_url"], beside=first)
    expect(second.locator("#drop")).to_be_visible()
    first.set_input_files("#picker", write(tmp_path, "a.txt", b"a"))
    expect(second.locator("#files li.saved")).to_contain_text("a.txt")
    second.set_input_files("#picker", write(tmp_path, "b.txt", b"b"))
    expect(first.locator("#files li.saved")).to_have_count(2)
    second.get_by_role("button", name="Remove a.txt").click()
    expect(first.locator("#files li")).to_have_count(1)
    expect(first.locator("#files li")).to_contain_text("b.txt")


def test_a_file_on_its_way_in_another_window_is_left_to_it(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2)
    first = open_page(asked["upload_url"])
    second = open_page(asked["upload_url"], beside=first)
    expect(second.locator("#drop")).to_be_visible()
    data = os.urandom(LARGE_BYTES)
    line = send_a_part(first, "large.bin", write(tmp_path, "large.bin", data))
    row = second.locator("#files li")
    expect(row).to_contain_text("Being sent from another window")
    expect(second.get_by_role("button", name="Remove large.bin")).to_be_hidden()
    line.free()
    finished(second)
    assert stored(served, asked) == {"large.bin": sha256(data)}


def test_windows_that_know_nothing_of_each_other_overwrite_nothing(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    """Two browsers: each believes that the first place is free."""
    asked = served.request_upload(max_files=3)
    first, second = open_page(asked["upload_url"]), open_page(asked["upload_url"])
    for page in (first, second):
        expect(page.locator("#drop")).to_be_visible()
        page.evaluate("addEventListener('focus', event => event.stopImmediatePropagation(), true)")
    large = os.urandom(LARGE_BYTES)
    first.set_input_files("#picker", write(tmp_path, "a.txt", b"a"))
    finished(first)
    second.set_input_files(
        "#picker", [write(tmp_path, "large.bin", large), write(tmp_path, "b.txt", b"b")]
    )
    expect(second.locator("#files li.saved")).to_have_count(3)
    expected = {"a.txt": b"a", "b.txt": b"b", "large.bin": large}
    assert stored(served, asked) == {name: sha256(data) for name, data in expected.items()}


def test_what_another_window_has_begun_is_not_thrown_away(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=3)
    page = open_page(asked["upload_url"])
    page.set_input_files("#picker", write(tmp_path, "a.txt", b"a"))
    finished(page)
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
    path = f"/api/v1/uploads/{asked['upload_token']}/tus/"
    assert served.ask("POST", path, headers=tus).status == 201
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#overall")).to_contain_text("1 file is unfinished")
    assert info(served, asked)["status"] == "pending"
    page.get_by_role("button", name="Remove file").click()
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#receipt li")).to_have_count(1)


def test_another_window_that_completes_is_noticed(
    served: Served, open_page: OpenPage, tmp_path: Path
) -> None:
    asked = served.request_upload(max_files=2)
    first, second = open_page(asked["upload_url"]), open_page(asked["upload_url"])
    expect(second.locator("#drop")).to_be_visible()
    first.set_input_files("#picker", write(tmp_path, "a.txt", b"a"))
    finished(first)
    first.get_by_role("button", name="Done").click()
    expect(first.locator("#receipt li")).to_have_count(1)
    second.set_input_files("#picker", write(tmp_path, "b.txt", b"b"))
    expect(second.locator("#verdict")).to_have_text("Thank you, the files have arrived")
    expect(second.locator("#receipt li")).to_have_count(1)
