"""Bytes that are not what they say: judged by what they are, and never run on this origin."""

from __future__ import annotations

import gzip
import io
import zipfile
from urllib.parse import quote

import pytest

from tests.gateway.served import Answer, Served

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + bytes(64)
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64)
HTML = b"<!DOCTYPE html><html><body><script>alert(1)</script></body></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"></svg>'
GIF_AND_SCRIPT = b"GIF89a/*" + bytes(16) + b"*/=1;alert(1)//;"


def zipped(data: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("a.txt"), data, zipfile.ZIP_DEFLATED)  # dated 1980
    return held.getvalue()


PDF_AND_ZIP = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n" + zipped(b"inside")
BOMB = zipped(bytes(64 << 20))  # 64 KiB that would become 64 MiB


def completed(
    served: Served, data: bytes, *, name: str, says: str = "", allowed: tuple[str, ...] = ()
) -> Answer:
    """What completing answers to one file that was sent under a name and a type."""
    asked = served.request_upload(allowed_types=list(allowed))
    url = f"{asked['presigned_urls'][0]}&filename={quote(name)}"
    sent = served.ask("PUT", url, data, headers={"Content-Type": says} if says else {})
    assert sent.status == 200
    return served.ask("POST", f"/api/v1/uploads/{asked['upload_token']}/complete")


@pytest.mark.parametrize(
    ("data", "name", "says", "allowed"),
    [
        (HTML, "a.jpg", "image/jpeg", "jpg"),
        (SVG, "a.png", "image/png", "png"),
        (SVG, "a.txt", "text/plain", "txt"),
        (HTML, "a.txt", "text/plain", "txt"),
        (HTML, "a.csv", "text/csv", "csv"),
        (JPEG, "a.html", "text/html", "html"),
        (JPEG, "a.png", "image/png", "png"),
        (PNG, "a.pdf", "application/pdf", "pdf"),
        (zipped(b"x"), "a.pdf", "application/pdf", "pdf"),
        (b"\x7fELF" + bytes(60), "a.jpg", "image/jpeg", "jpg"),
        (b"MZ" + bytes(62), "a.pdf", "application/pdf", "pdf"),
        (bytes(range(100, 164)), "a.zip", "application/zip", "zip"),
        (b"", "a.pdf", "application/pdf", "pdf"),
    ],
)
def test_a_lie_about_the_type_is_found_by_the_bytes(
    served: Served, data: bytes, name: str, says: str, allowed: str
) -> None:
    answer = completed(served, data, name=name, says=says, allowed=(allowed,))
    assert (answer.status, answer.code) == (422, "files_refused")
    assert answer.form["reasons"][0]["filename"] == name


@pytest.mark.parametrize(
    ("data", "name", "says", "allowed"),
    [
        (JPEG, "a.html", "text/html", "jpg"),
        (JPEG, "a", "application/x-msdownload", "jpeg"),
        (HTML, "a.jpg", "image/jpeg", "html"),
        (GIF_AND_SCRIPT, "a.js", "text/javascript", "gif"),
        (PDF_AND_ZIP, "a.zip", "application/zip", "pdf"),
    ],
)
def test_what_the_bytes_are_is_what_is_told(
    served: Served, data: bytes, name: str, says: str, allowed: str
) -> None:
    answer = completed(served, data, name=name, says=says, allowed=(allowed,))
    assert answer.status == 200
    assert answer.form["files"][0]["content_type"] != says


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (HTML, "a.html", "text/html; charset=utf-8"),
        (SVG, "a.svg", "image/svg+xml"),
        (b"<a xmlns='http://www.w3.org/1999/xhtml'/>", "a.xhtml", "application/xhtml+xml"),
        (b"alert(1)", "a.js", "text/javascript"),
        (GIF_AND_SCRIPT, "a.gif", "image/gif"),
        (PDF_AND_ZIP, "a.pdf", "application/pdf"),
        (b"Content-Type: multipart/related\r\n\r\n", "a.mht", "multipart/related"),
        (b"x", "a.swf", "application/x-shockwave-flash"),
        (b"x", "a.bin", "text/html\xa0"),
    ],
)  # fmt: skip
def test_nothing_stored_is_ever_shown_or_run_here(
    served: Served, data: bytes, name: str, says: str
) -> None:
    """On each way to the bytes: the reference, the signed URL, in part, and unchanged."""
    made = served.ask(
        "POST",
        f"/api/v1/storage?filename={name}",
        data,
        token=served.admin,
        headers={"Content-Type": says},
    )
    assert made.status == 201
    ref = f"/api/v1/storage/{quote(made.form['storage_ref'], safe='')}"
    url = served.ask("GET", f"{ref}/url", token=served.admin).form["url"]
    tag = f'"{made.form["checksum_sha256"]}"'
    answers = [
        served.ask(method, place, token=served.admin, headers=headers)
        for method in ("GET", "HEAD")
        for place in (ref, url)
        for headers in ({}, {"Range": "bytes=0-0"}, {"If-None-Match": tag}, {"Accept": "text/html"})
    ]
    assert {answer.status for answer in answers} == {200, 206, 304}
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        if answer.status != 304:
            assert answer.headers["content-disposition"].startswith("attachment;")


# The same bytes in every process that collects tests: gzip would write the time into them.
GZIPPED = [gzip.compress(data, mtime=0) for data in (bytes(64 << 20), HTML)]


@pytest.mark.parametrize("data", [BOMB, *GZIPPED], ids=["zip", "gzip bomb", "gzipped page"])
def test_a_bomb_is_only_bytes(served: Served, data: bytes) -> None:
    answer = completed(served, data, name="a.bin")
    assert answer.status == 200
    (file,) = answer.form["files"]
    assert file["size_bytes"] == len(data)
    ref = quote(file["storage_ref"], safe="")
    got = served.ask("GET", f"/api/v1/storage/{ref}", token=served.admin)
    assert got.body == data
    assert "content-encoding" not in got.headers


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, gzip", "x-unknown", "GZIP"])
def test_a_coded_body_is_not_taken_for_what_it_holds(
    served: Served, slot: str, coding: str
) -> None:
    data, headers = gzip.compress(HTML), {"Content-Encoding": coding}
    for method, url in (("PUT", slot), ("POST", "/api/v1/storage?name=a")):
        answer = served.ask(method, url, data, token=served.admin, headers=headers)
        assert (answer.status, answer.code) == (400, "invalid_request")


# --- ranges and conditions

DATA = bytes(range(256)) * 4


@pytest.fixture(scope="module")
def url(served: Served) -> str:
    made = served.ask("POST", "/api/v1/storage?filename=r.bin", DATA, token=served.admin)
    ref = quote(made.form["storage_ref"], safe="")
    link: str = served.ask("GET", f"/api/v1/storage/{ref}/url", token=served.admin).form["url"]
    return link


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=0-0,1-1", 200),
        ("bytes=" + ",".join(f"{n}-{n}" for n in range(1_500)), 200),
        ("bytes=0-,0-,0-,0-,0-", 200),
        ("bytes=" + "," * 10_000, 200),
        ("bytes=5-1", 200),
        ("bytes=-", 200),
        ("bytes=--1", 200),
        ("bytes=a-b", 200),
        ("bytes=0x0-0x1", 200),
        ("bytes=٠-١", 200),
        ("bytes=1.5-2", 200),
        ("bytes = 0-1", 200),
        ("bytes=0-1" + "0" * 10_000, 200),
        ("lines=0-1", 200),
        # Twenty digits are more than any file has bytes: this is no range at all.
        ("bytes=0-18446744073709551616", 200),
        ("bytes=-9999999999999999999", 206),
        ("bytes=0-9223372036854775807", 206),
        ("bytes=9223372036854775808-", 416),
        ("bytes=18446744073709551615-18446744073709551616", 200),
        ("bytes=1024-", 416),
        ("bytes=-0", 416),
    ],
)  # fmt: skip
def test_a_range_costs_no_more_than_the_file(
    served: Served, url: str, asked: str, status: int
) -> None:
    answer = served.ask("GET", url, headers={"Range": asked.encode().decode("latin-1")})
    assert answer.status == status
    if status == 416:
        assert answer.code == "range_not_satisfiable"
    else:
        assert answer.body == DATA


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-None-Match": '"' + "a" * 10_000 + '"'}, 200),
        ({"If-None-Match": ",".join(['"a"'] * 3_000)}, 200),
        ({"If-None-Match": '"' * 10_001}, 200),
        ({"If-None-Match": 'W/"' * 4_000}, 200),
        ({"If-None-Match": "*"}, 304),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": "no tag"}, 412),
        ({"If-Match": '"' * 10_001}, 412),
        ({"If-Range": "no tag", "Range": "bytes=0-0"}, 200),
        ({"If-Modified-Since": "no date"}, 200),
        ({"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"}, 200),
        ({"Accept-Encoding": "gzip, br", "TE": "trailers, gzip"}, 200),
    ],
)
def test_a_condition_is_met_or_not_and_no_more(
    served: Served, url: str, headers: dict[str, str], status: int
) -> None:
    answer = served.ask("GET", url, headers=headers)
    assert answer.status == status
    if status == 412:
        assert answer.code == "precondition_failed"
    elif status == 200:
        assert answer.body == DATA
        assert "content-encoding" not in answer.headers
