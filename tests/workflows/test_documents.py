"""The text of files: PDFs as people make them, and as they should not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.papers import Paper, locked_pdf, papers, pdf_of
from tests.workflows.running import until
from workflows.llm import confined, text_process
from workflows.llm.documents import Document, Unreadable, one_line, read_document

PLENTY = 1 << 20
_FONT = "/Resources << /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Times >> >> >>"


def pdf(data: bytes, text_bytes_max: int = PLENTY, tenant: str = "acme") -> Document:
    return read_document(tenant, data, "application/pdf", "x.pdf", text_bytes_max)


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("paper", papers(), ids=lambda paper: paper.filename)
def test_all_prose_of_a_paper_is_read(paper: Paper) -> None:
    found = pdf(paper.data)
    assert found.title == paper.title
    text = plain(found.text)
    for paragraph in paper.text.splitlines():
        assert paragraph in text


def test_a_pdf_is_known_by_its_bytes_and_by_its_type() -> None:
    data = pdf_of(["Whatever the browser said about this file, it is what it is."])
    found = read_document("acme", data, "application/octet-stream", "x", PLENTY)
    assert (found.content_type, found.text[:8]) == ("application/pdf", "Whatever")
    with pytest.raises(Unreadable, match="damaged, or none"):
        pdf(b"I am no PDF")


def test_a_text_that_begins_later_with_the_mark_is_no_pdf() -> None:
    assert read_document("acme", b"A file begins with %PDF-1.7", "text/plain", "x", PLENTY).text


def test_a_scan_is_refused_rather_than_passed_on_empty() -> None:
    with pytest.raises(Unreadable, match="no text: a scan"):
        pdf(pdf_of(["", ""]))


def test_a_locked_pdf_says_that_it_is_locked() -> None:
    with pytest.raises(Unreadable, match="encrypted"):
        pdf(locked_pdf("secret"))


@pytest.mark.parametrize("cut", [100, 1000, 4000])
def test_a_pdf_that_is_cut_short_gives_what_is_there_or_says_so(cut: int) -> None:
    try:
        found = pdf(papers()[0].data[:cut])
    except Unreadable:
        return
    assert found.text


def test_more_text_than_allowed_is_refused_while_it_is_read() -> None:
    with pytest.raises(Unreadable, match=r"\[llm\] text_max"):
        pdf(papers()[0].data, 1000)


def test_more_pages_than_allowed_are_refused() -> None:
    with pytest.raises(Unreadable, match="2000 pages"):
        pdf(_bare_pdf(["BT ET"] * 2001))


def test_a_page_that_unpacks_to_far_more_than_it_is_worth_is_refused() -> None:
    bomb = zlib.compress(zlib.compress(b"\0" * (1 << 27), 9), 9)
    with pytest.raises(Unreadable, match="more time or memory"):
        pdf(_bare_pdf([bomb], "/Filter [/FlateDecode /FlateDecode]"))


def test_a_pdf_that_takes_too_much_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "CPU_S_MAX", 1)
    endless = zlib.compress(b"BT /F 9 Tf (a) Tj ET\n" * 500_000)
    with pytest.raises(Unreadable, match="more time or memory"):
        pdf(_bare_pdf([endless], "/Filter /FlateDecode"))


def test_a_pdf_whose_reader_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "SECONDS_MAX", 0.01)  # less than a process needs to begin
    with pytest.raises(Unreadable, match="within"):
        pdf(papers()[0].data)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        pytest.param("a" * 200_000, "a" * 100, id="one word"),
        pytest.param(
            " ".join(rf"x{number}-\nx" for number in range(50_000)),
            "x49998x x49999x",
            id="many divided words",
        ),
    ],
)
def test_a_text_made_to_be_slow_is_tidied_within_the_limit(
    text: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confined, "CPU_S_MAX", 10)  # seconds of one core; it needs one or two
    found = pdf(_bare_pdf([f"BT /F 1 Tf 10 10 Td ({text}) Tj ET"]))
    assert found.text.endswith(ends)


def test_only_a_few_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = confined.AT_ONCE
    together = threading.Barrier(count)
    running: set[int] = set()
    most = 0
    real = subprocess.run

    def run(*given: Any, **more: Any) -> Any:
        nonlocal most
        running.add(threading.get_ident())
        most = max(most, len(running))
        together.wait(60)  # as many as may are here at the same time
        done = real(*given, **more)
        running.discard(threading.get_ident())
        return done

    monkeypatch.setattr(subprocess, "run", run)
    data = pdf_of(["Read me."])
    tenants = ["acme", "zeta"] * count
    with ThreadPoolExecutor(len(tenants)) as pool:
        texts = [one.text for one in pool.map(lambda tenant: pdf(data, tenant=tenant), tenants)]
    assert texts == ["Read me."] * len(tenants)
    assert most == count


def test_the_files_of_one_tenant_leave_a_place_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()
    held: list[int] = []
    real = subprocess.run

    def run(*given: Any, **more: Any) -> Any:
        if threading.current_thread().name.startswith("acme") and not go_on.is_set():
            held.append(threading.get_ident())
            begun.release()
            go_on.wait(60)
        return real(*given, **more)

    monkeypatch.setattr(subprocess, "run", run)
    data = pdf_of(["Read me."])
    with ThreadPoolExecutor(2 * confined.AT_ONCE, thread_name_prefix="acme") as pool:
        slow = [pool.submit(pdf, data) for _ in range(2 * confined.AT_ONCE)]
        for _ in range(confined.AT_ONCE_OF_A_TENANT):
            assert begun.acquire(timeout=60)
        assert pdf(data, tenant="zeta").text == "Read me."
        assert len(held) == confined.AT_ONCE_OF_A_TENANT < confined.AT_ONCE
        go_on.set()
    assert [one.result().text for one in slow] == ["Read me."] * len(slow)


def test_running_heads_and_page_numbers_are_left_out() -> None:
    body = "The work goes on and on\nin lines that differ: {}."
    pages = [f"Journal of Examples 12\n{body.format(word)}\n{i}" for i, word in enumerate("abcd")]
    found = pdf(pdf_of(pages)).text
    assert "Journal" not in found
    assert found.splitlines()[-1] == "in lines that differ: d."


def test_words_that_a_line_end_divided_are_whole_again() -> None:
    found = pdf(
        pdf_of(["A bumble-\nbee met a self-\nmade man of a GPT-\n4 kind; self-made men are few."])
    ).text
    assert plain(found) == "A bumblebee met a self-made man of a GPT-4 kind; self-made men are few."


@pytest.mark.parametrize("title", ["untitled document", "paper.pdf", "Microsoft Word - x", "x"])
def test_a_title_that_is_none_is_not_taken(title: str) -> None:
    assert pdf(pdf_of(["Some text."], title)).title == ""


@pytest.mark.parametrize(
    ("content_type", "data", "text"),
    [
        ("text/plain; charset=utf-8", "Grüße\r\nvon hier".encode(), "Grüße\nvon hier"),
        ("text/markdown", b"\xef\xbb\xbf# Head\x00ing", "# Head ing"),
        ("application/json", b'{"a": 1}', '{"a": 1}'),
        ("application/ld+json", b"{}", "{}"),
    ],
)
def test_texts_are_read_as_utf8(content_type: str, data: bytes, text: str) -> None:
    assert read_document("acme", data, content_type, "x", PLENTY).text == text


@pytest.mark.parametrize(
    ("content_type", "data", "says"),
    [
        ("text/plain", "Grüße".encode("latin-1"), "UTF-8"),
        ("image/png", b"\x89PNG", "image/png has no text"),
        ("", b"?", "a file without a type"),
        ("text/plain", b"x" * 11, "text_max"),
    ],
)
def test_what_has_no_text_is_refused(content_type: str, data: bytes, says: str) -> None:
    with pytest.raises(Unreadable, match=says):
        read_document("acme", data, content_type, "x", 10)


def test_a_name_stays_in_its_line() -> None:
    assert one_line("a\n--- b\x00\u2028c" + "d" * 300) == ("a --- b c" + "d" * 300)[:200]


def _bare_pdf(contents: Sequence[str | bytes], more: str = "") -> bytes:
    """A PDF written by hand, with these contents of its pages; readers repair the rest."""
    kids = " ".join(f"{3 + 2 * index} 0 R" for index in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} >>".encode(),
    ]
    for index, content in enumerate(contents):
        raw = content.encode() if isinstance(content, str) else content
        place = f"/Parent 2 0 R /MediaBox [0 0 9 9] {_FONT} /Contents {4 + 2 * index} 0 R"
        objects.append(f"<< /Type /Page {place} >>".encode())
        head = f"<< /Length {len(raw)} {more} >>\nstream\n".encode()
        objects.append(head + raw + b"\nendstream")
    body = b"%PDF-1.7\n"
    places = []
    for number, one in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    table += b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
    return body + table + tail % (len(objects) + 1, len(body))


STARTS = """
import subprocess, sys, time
words = [sys.executable, "-I", sys.argv[1], "60", "pdf", "1"]
print(subprocess.Popen(words, stdin=int(sys.argv[2])).pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_the_one_that_waits_for_it() -> None:
    never, held = os.pipe()  # held open here: it does not end because nothing more comes
    try:
        words = [sys.executable, "-c", STARTS, text_process.__file__, str(never)]
        starter = subprocess.Popen(words, stdout=subprocess.PIPE, pass_fds=[never])
        try:
            assert starter.stdout is not None
            place = Path("/proc", starter.stdout.readline().decode().strip())
            until(lambda: (place / "oom_score_adj").read_text().strip() == "1000", "its limits")
        finally:
            starter.kill()
            starter.communicate()
        until(lambda: not goes_on(place), "its end")
    finally:
        os.close(never)
        os.close(held)


def goes_on(place: Path) -> bool:
    """Whether a process does, and is no mere entry that nobody waited for."""
    try:
        return (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
