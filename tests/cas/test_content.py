"""What bytes are is told by the bytes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.content import judge, look_at

PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n"
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + b"\xff\xd9"
GIF = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff;"
EXE = b"MZ\x90\x00\x03\x00\x00\x00\x04\x00\x00\x00\xff\xff\x00\x00\xb8" + bytes(100)
ELF = b"\x7fELF\x02\x01\x01" + bytes(100)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "words")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("head", "extension"),
    [
        (PDF, "pdf"),
        (PNG, "png"),
        (JPEG, "jpg"),
        (JPEG, "jpeg"),
        (GIF, "gif"),
        (zipped(), "zip"),
        (b"plain words\n", "txt"),
        (b"a,b\n1,2\n", "csv"),
        (b'{"a": 1}', "json"),
        ("grüße ☃".encode(), "txt"),
        (b"<html><script>alert(1)</script></html>", "html"),
    ],
)
def test_a_kind_is_known_by_its_bytes(head: bytes, extension: str) -> None:
    content = judge(head)
    assert content.is_one_of([extension])
    assert content.is_one_of([f".{extension.upper()}"])
    assert content.is_one_of(["docx", extension])


@pytest.mark.parametrize("head", [PNG, JPEG, GIF, EXE, ELF, zipped(), b"words", b"", bytes(100)])
def test_nothing_else_passes_for_a_pdf(head: bytes) -> None:
    assert not judge(head).is_one_of(["pdf"])


@pytest.mark.parametrize(
    "head",
    [b"<html><body>x</body></html>", b"<!DOCTYPE html>\n<html></html>", b"<svg xmlns='x'></svg>"],
)
def test_what_a_browser_runs_is_no_plain_text(head: bytes) -> None:
    assert not judge(head).is_one_of(["txt", "csv"])


@pytest.mark.parametrize("head", [EXE, ELF, PNG, bytes(100), b"a\x00b"])
def test_binary_is_no_text(head: bytes) -> None:
    assert not judge(head).is_one_of(["txt", "csv", "json", "log"])


def test_empty_bytes_are_of_no_kind() -> None:
    content = judge(b"")
    assert content.described == "empty"
    assert not content.is_one_of(["txt", "pdf"])


@given(st.binary(max_size=300))
def test_any_bytes_are_judged(head: bytes) -> None:
    content = judge(head)
    assert content.described
    assert not content.is_one_of([])


def test_only_the_head_of_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.write(b"words " * 20_000)
        stream.truncate(1 << 40)  # reading it whole would take a while
    assert look_at(path).is_one_of(["txt"])


def test_a_head_may_end_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * ((64 << 10) - 1) + "☃".encode())
    assert look_at(path).is_one_of(["txt"])


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        look_at(tmp_path / "missing")
