"""Downloads: signed URLs, ranges, conditions, and headers that keep strange bytes harmless."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from gateway.downloads import attachment
from tests.gateway.served import Served, serving

DATA = bytes(range(256)) * 400  # larger than what any one buffer on the way holds


@pytest.fixture(scope="module")
def file(served: Served) -> dict[str, Any]:
    url = f"/api/v1/storage?name=bytes&filename={quote('Bericht „x“.svg')}"
    headers = {"Content-Type": "image/svg+xml"}
    answer = served.ask("POST", url, DATA, token=served.admin, headers=headers)
    assert answer.status == 201
    return answer.form


@pytest.fixture(scope="module")
def url(served: Served, file: dict[str, Any]) -> str:
    ref = quote(file["storage_ref"], safe="")
    answer = served.ask("GET", f"/api/v1/storage/{ref}/url?expires_in=600", token=served.admin)
    assert answer.status == 200
    assert answer.form["expires_in"] == 600
    return str(answer.form["url"])


def test_a_signed_url_gives_the_bytes_without_a_token(served: Served, url: str) -> None:
    got = served.ask("GET", url)
    assert (got.status, got.body) == (200, DATA)
    assert got.headers["etag"] == f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert got.headers["accept-ranges"] == "bytes"
    assert got.headers["repr-digest"].startswith("sha-256=:")
    head = served.ask("HEAD", url)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(DATA))


def test_stored_bytes_are_never_shown_on_this_origin(served: Served, url: str) -> None:
    got = served.ask("GET", url)
    assert got.headers["content-type"] == "image/svg+xml"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in got.headers["content-security-policy"]
    disposition = got.headers["content-disposition"]
    assert disposition.startswith("attachment;")
    assert f"filename*=UTF-8''{quote('Bericht „x“.svg', safe='')}" in disposition


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-70000", 100, 70_001),
        ("bytes=-10", len(DATA) - 10, len(DATA)),
        (f"bytes={len(DATA) - 1}-", len(DATA) - 1, len(DATA)),
    ],
)
def test_a_range_is_sent_alone(served: Served, url: str, asked: str, start: int, stop: int) -> None:
    got = served.ask("GET", url, headers={"Range": asked})
    assert (got.status, got.body) == (206, DATA[start:stop])
    assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"


def test_an_interrupted_download_goes_on_where_it_stopped(served: Served, url: str) -> None:
    first = served.ask("GET", url, headers={"Range": "bytes=0-9999"})
    tag = first.headers["etag"]
    rest = served.ask("GET", url, headers={"Range": "bytes=10000-", "If-Range": tag})
    assert first.body + rest.body == DATA
    other = served.ask("GET", url, headers={"Range": "bytes=10000-", "If-Range": '"other"'})
    assert (other.status, other.body) == (200, DATA)


def test_a_range_behind_the_end_says_where_the_end_is(served: Served, url: str) -> None:
    got = served.ask("GET", url, headers={"Range": f"bytes={len(DATA)}-"})
    assert (got.status, got.code) == (416, "range_not_satisfiable")
    assert got.headers["content-range"] == f"bytes */{len(DATA)}"


def test_conditions_spare_the_bytes(served: Served, url: str) -> None:
    tag = served.ask("HEAD", url).headers["etag"]
    known = served.ask("GET", url, headers={"If-None-Match": tag})
    assert (known.status, known.body) == (304, b"")
    assert known.headers["etag"] == tag
    assert served.ask("GET", url, headers={"If-None-Match": '"other"'}).status == 200
    assert served.ask("GET", url, headers={"If-Match": '"other"'}).status == 412
    assert served.ask("GET", url, headers={"If-Match": tag}).status == 200


def test_a_url_is_good_for_its_file_name_method_and_time_only(served: Served, url: str) -> None:
    path, _, query = url.partition("?")
    folder, _, _name = path.rpartition("/")
    expires = query.partition("expires=")[2].partition("&")[0]
    for forged in (
        f"{folder}/other.svg?{query}",
        f"{path}?{query[:-1]}",
        path,
        f"{path}?{query.replace(expires, str(int(expires) + 1))}",
        f"{path}?{query.replace(expires, 'x')}",
        f"{path}?{query.replace(expires, '9' * 400)}",
    ):
        answer = served.ask("GET", forged)
        assert (answer.status, answer.code) == (404, "not_found")
    assert served.ask("PUT", url, b"x").status == 405


@pytest.mark.parametrize("asked", ["0", "-1", "x", "9999999999", "1e3", "٣"])
def test_a_lifetime_has_bounds(served: Served, file: dict[str, Any], asked: str) -> None:
    ref = quote(file["storage_ref"], safe="")
    path = f"/api/v1/storage/{ref}/url?expires_in={quote(asked)}"
    assert served.ask("GET", path, token=served.admin).code == "invalid_request"


def test_an_empty_file_is_a_file(served: Served) -> None:
    made = served.ask("POST", "/api/v1/storage?name=nothing", b"", token=served.admin)
    assert (made.status, made.form["size_bytes"]) == (201, 0)
    path = f"/api/v1/storage/{quote(made.form['storage_ref'], safe='')}"
    got = served.ask("GET", path, token=served.admin)
    assert (got.status, got.body, got.headers["content-length"]) == (200, b"", "0")
    part = served.ask("GET", path, token=served.admin, headers={"Range": "bytes=0-"})
    assert part.status == 416


def test_missing_bytes_are_not_available_rather_than_wrong(served: Served) -> None:
    made = served.ask("POST", "/api/v1/storage?name=lost", b"lost bytes", token=served.admin).form
    digest = made["checksum_sha256"]
    os.unlink(served.root / "objects" / digest[:2] / digest)
    ref = quote(made["storage_ref"], safe="")
    answer = served.ask("GET", f"/api/v1/storage/{ref}", token=served.admin)
    assert (answer.status, answer.code) == (503, "blob_unavailable")
    assert str(served.root) not in answer.body.decode()
    # And sending the file again heals it.
    served.ask("POST", "/api/v1/storage?name=lost", b"lost bytes", token=served.admin)
    assert served.ask("GET", f"/api/v1/storage/{ref}", token=served.admin).body == b"lost bytes"


def test_a_reader_that_leaves_costs_nothing(served: Served, url: str) -> None:
    path = url.removeprefix(served.address)
    for _ in range(20):
        with served.connect() as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert connection.recv(10)
    assert served.ask("GET", url).body == DATA


def test_an_old_url_says_that_it_is_over(disk_folder: Path) -> None:
    """Signed, so its holder had the right: they are told what to do about it."""
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), GATEWAY__URL_EXPIRY="1s") as server,
    ):
        made = server.ask("POST", "/api/v1/storage?name=x", b"x", token=server.admin).form
        ref = quote(made["storage_ref"], safe="")
        asked = server.ask(
            "POST", "/api/v1/uploads", json.dumps({"name": "x"}), token=server.admin
        ).form
        # Made last, it is over last.
        url = server.ask("GET", f"/api/v1/storage/{ref}/url", token=server.admin).form["url"]
        while (old := server.ask("GET", url)).status == 200:
            pass  # the server's clock decides, within a second
        assert (old.status, old.code) == (410, "link_expired")
        late = server.ask("PUT", asked["presigned_urls"][0], b"x")
        assert (late.status, late.code) == (410, "link_expired")


def test_a_proxy_in_front_may_send_the_bytes(disk_folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(
            Path(folder),
            GATEWAY__ACCEL_REDIRECT="/blobs/",
            GATEWAY__PUBLIC_URL="https://files.example/cask",
        ) as server,
    ):
        made = server.ask("POST", "/api/v1/storage?name=x", b"x", token=server.admin).form
        ref = quote(made["storage_ref"], safe="")
        url = server.ask("GET", f"/api/v1/storage/{ref}/url", token=server.admin).form["url"]
        assert url.startswith("https://files.example/cask/d/")
        # The proxy takes its prefix away; host and prefix are not signed.
        got = server.ask("GET", url.removeprefix("https://files.example/cask"))
        digest = made["checksum_sha256"]
        assert got.headers["x-accel-redirect"] == f"/blobs/{digest[:2]}/{digest}"
        assert got.body == b""


@pytest.mark.parametrize(
    ("name", "plain", "exact"),
    [
        ("a.pdf", "a.pdf", "a.pdf"),
        ('a"b;c.pdf', "a_b_c.pdf", "a%22b%3Bc.pdf"),
        ("ä.pdf", "_.pdf", "%C3%A4.pdf"),
        ("100%.pdf", "100_.pdf", "100%25.pdf"),
    ],
)
def test_a_filename_survives_the_header(name: str, plain: str, exact: str) -> None:
    assert attachment(name) == f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"
