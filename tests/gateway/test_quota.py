"""A quota over HTTP: refused at once with its numbers, which a link alone does not tell."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.gateway.served import Served, serving

LIMIT_BYTES = 1000


@pytest.fixture(scope="module")
def served(disk_folder: Path) -> Iterator[Served]:
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder,
        serving(Path(folder), LIMITS__QUOTA_BYTES=f"{LIMIT_BYTES}B") as server,
    ):
        yield server


def stored(served: Served, data: bytes, tenant: str) -> dict[str, Any]:
    token = served.token("admin", tenant=tenant)
    answer = served.ask("POST", "/api/v1/storage?name=it", data, token=token)
    assert answer.status == 201, answer.body
    return answer.form | {"token": token}


def test_a_file_over_the_quota_is_refused_with_the_numbers(served: Served) -> None:
    token = stored(served, b"x" * 900, "acme")["token"]
    refused = served.ask("POST", "/api/v1/storage?name=it", b"y" * 101, token=token)
    assert refused.status == 507
    told = {name: refused.form[name] for name in ("code", "what", "limit", "used", "needed")}
    assert told == {
        "code": "quota_exceeded",
        "what": "size_bytes",
        "limit": LIMIT_BYTES,
        "used": 900,
        "needed": 101,
    }
    assert served.ask("POST", "/api/v1/storage?name=it", b"y" * 100, token=token).status == 201
    stored(served, b"y" * LIMIT_BYTES, "other")


def test_a_large_body_over_the_quota_is_refused_before_it_is_sent(served: Served) -> None:
    token = served.token("admin", tenant="large")
    with served.connect() as raw:
        raw.sendall(
            b"POST /api/v1/storage?name=it HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: 5368709120\r\n"
            b"Authorization: Bearer " + token.encode() + b"\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 507 ")


def test_who_has_a_link_is_refused_without_the_numbers(served: Served) -> None:
    url = served.request_upload(max_files=2)["presigned_urls"][0]
    refused = served.ask("PUT", url, b"x" * (LIMIT_BYTES + 1))
    assert (refused.status, refused.form["code"]) == (507, "quota_exceeded")
    assert not {"limit", "used", "needed", "what"} & refused.form.keys()
    assert str(LIMIT_BYTES) not in refused.body.decode()
    assert served.ask("PUT", url, b"x" * LIMIT_BYTES).status in (200, 201, 204)


def test_bytes_of_another_length_than_recorded_are_not_served(served: Served) -> None:
    made = stored(served, b"z" * 50, "damaged")
    ref = quote(made["storage_ref"], safe="")
    url = served.ask("GET", f"/api/v1/storage/{ref}/url", token=made["token"]).form["url"]
    digest = made["checksum_sha256"]
    path = served.root / "objects" / digest[:2] / digest
    path.chmod(0o644)
    path.write_bytes(b"z" * 20)
    got = served.ask("GET", url)
    assert (got.status, got.form["code"]) == (503, "blob_unavailable")
