"""The storage API: store, list, read, delete, hold; and who may."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from typing import Any
from urllib.parse import quote

import pytest

from cas.errors import InvalidReference
from gateway.storage import parse_path
from tests.gateway.served import Served

DIGEST = "ab" * 32


def store(served: Served, data: bytes, token: str | None = None, **query: str) -> dict[str, Any]:
    pairs = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    answer = served.ask("POST", f"/api/v1/storage?{pairs}", data, token=token or served.admin)
    assert answer.status == 201, answer.body
    return answer.form


def path(file: dict[str, Any], verb: str = "") -> str:
    return f"/api/v1/storage/{quote(file['storage_ref'], safe='')}{verb}"


def test_a_stored_file_is_described_listed_and_read(served: Served) -> None:
    data = b"a report"
    file = store(served, data, name="report", filename="report.txt", run="run1")
    digest = hashlib.sha256(data).hexdigest()
    assert file["storage_ref"] == f"hwy://uploads/default/run1/{digest}.txt"

    meta = served.ask("GET", path(file, "/meta"), token=served.admin).form
    assert meta.pop("created_at").endswith("Z")
    assert meta == {
        "storage_type": "local",
        "bucket": "local",
        "key": f"objects/{digest[:2]}/{digest}",
        "content_type": meta["content_type"],
        "size_bytes": len(data),
        "checksum_sha256": digest,
        "original_filename": "report.txt",
        "retention_policy": "days:30",
        "workflow_run_id": "run1",
        "tenant_id": "default",
    }
    listed = served.ask("GET", "/api/v1/storage?run=run1", token=served.admin).form
    assert [one["storage_ref"] for one in listed["files"]] == [file["storage_ref"]]
    got = served.ask("GET", path(file), token=served.admin)
    assert (got.status, got.body) == (200, data)
    head = served.ask("HEAD", path(file), token=served.admin)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(data))


def test_storing_the_same_twice_is_one_file(served: Served) -> None:
    first = store(served, b"twice", name="a", filename="a.bin")
    second = store(served, b"twice", name="a", filename="a.bin")
    assert first["file_id"] == second["file_id"]


def test_a_file_of_another_tenant_is_as_unknown_as_none(served: Served) -> None:
    file = store(served, b"private", name="p")
    foreign = served.token("admin", tenant="other")
    unknown = path({"storage_ref": f"hwy://uploads/default/direct/{DIGEST}.bin"})
    for method, verb in (
        ("GET", ""), ("HEAD", ""), ("GET", "/meta"), ("GET", "/url"),
        ("DELETE", ""), ("PUT", "/hold"), ("DELETE", "/hold"),
    ):  # fmt: skip
        theirs = served.ask(method, path(file, verb), token=foreign)
        none = served.ask(method, unknown + verb, token=foreign)
        assert theirs.status == none.status == 404
        assert theirs.body == none.body
    assert served.ask("GET", "/api/v1/storage", token=foreign).form["files"] == []


def test_each_verb_wants_its_permission(served: Served) -> None:
    file = store(served, b"guarded", name="g")
    viewer, uploader = served.token("view_storage"), served.token("manage_uploads")
    assert served.ask("GET", path(file), token=viewer).status == 200
    for method, verb in (("DELETE", ""), ("PUT", "/hold"), ("DELETE", "/hold")):
        answer = served.ask(method, path(file, verb), token=viewer)
        assert (answer.status, answer.code) == (403, "permission_missing")
        assert answer.form["permission"] == "manage_storage"
    # Who may not even see files is not told that there is one.
    assert served.ask("GET", path(file), token=uploader).status == 404
    assert served.ask("DELETE", path(file), token=uploader).status == 404
    assert served.ask("POST", "/api/v1/storage?name=x", b"x", token=viewer).status == 403
    assert served.ask("GET", "/api/v1/storage", token=uploader).status == 403


@pytest.mark.parametrize(
    "header", [None, "Basic YTpi", "Bearer", "Bearer x", "Bearer " + "e" * 5000, "Bearer é"]
)
def test_without_a_valid_token_nothing_is_told(served: Served, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = served.ask("GET", "/api/v1/storage", headers=headers)
    assert (answer.status, answer.code) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_held_file_is_not_deleted_before_the_hold_is_lifted(served: Served) -> None:
    file = store(served, b"evidence", name="e")
    assert served.ask("PUT", path(file, "/hold"), token=served.admin).form["hold"] is True
    refused = served.ask("DELETE", path(file), token=served.admin)
    assert (refused.status, refused.code) == (409, "held")
    assert served.ask("DELETE", path(file, "/hold"), token=served.admin).form["hold"] is False
    assert served.ask("DELETE", path(file), token=served.admin).status == 204
    assert served.ask("GET", path(file), token=served.admin).status == 404


def test_promised_digests_are_checked_and_returned(served: Served) -> None:
    data = b"promised"
    raw = hashlib.sha256(data).digest()
    right = f"sha-256=:{b64encode(raw).decode()}:"
    wrong = f"sha-256=:{b64encode(bytes(32)).decode()}:"
    url = "/api/v1/storage?name=p"
    for name in ("Content-Digest", "Repr-Digest"):
        ok = served.ask("POST", url, data, token=served.admin, headers={name: right})
        assert (ok.status, ok.headers["repr-digest"]) == (201, right)
        sha512 = {name: f"sha-512=:AAAA:, {right}"}
        assert served.ask("POST", url, data, token=served.admin, headers=sha512).status == 201
        bad = served.ask("POST", url, data, token=served.admin, headers={name: wrong})
        assert (bad.status, bad.code) == (422, "digest_mismatch")
        assert bad.form["received"] == raw.hex()
        for nonsense in ("sha-256=abc", "sha-256=:AAAA:", "sha-256", "sha-256=:!!:"):
            odd = served.ask("POST", url, data, token=served.admin, headers={name: nonsense})
            assert (odd.status, odd.code) == (400, "invalid_digest")
    both = {"Content-Digest": right, "Repr-Digest": wrong}
    assert served.ask("POST", url, data, token=served.admin, headers=both).status == 400


@pytest.mark.parametrize(
    "headers", [{"Content-Encoding": "gzip"}, {"Content-Range": "bytes 0-1/9"}]
)
def test_coded_or_partial_bodies_are_not_stored(served: Served, headers: dict[str, str]) -> None:
    answer = served.ask("POST", "/api/v1/storage?name=x", b"x", token=served.admin, headers=headers)
    assert (answer.status, answer.code) == (400, "invalid_request")


@pytest.mark.parametrize("prefix", ["hwy://", "hwy:/", ""])
@pytest.mark.parametrize("verb", ["", "meta", "url", "hold"])
def test_one_parser_reads_references_however_proxies_left_them(prefix: str, verb: str) -> None:
    rest = f"{prefix}uploads/t/r/{DIGEST}.pdf" + (f"/{verb}" if verb else "")
    reference, found = parse_path(rest, "hwy")
    assert str(reference) == f"hwy://uploads/t/r/{DIGEST}.pdf"
    assert found == verb


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "hwy://",
        "other://uploads/t/r/" + DIGEST + ".pdf",
        f"uploads/t/r/{DIGEST}",
        f"uploads/t/r/{DIGEST.upper()}.pdf",
        f"uploads/t/../{DIGEST}.pdf",
        f"uploads/t//r/{DIGEST}.pdf",
        f"/uploads/t/r/{DIGEST}.pdf",
        f"uploads/t/r/{DIGEST}.pdf/meta/url",
        f"uploads/t/r/{DIGEST}.pdf/",
        f"uploads/t/r/{DIGEST}.pdf\n",
        f"uploads/t/é/{DIGEST}.pdf",
    ],
)
def test_what_is_no_reference_is_refused(rest: str) -> None:
    with pytest.raises(InvalidReference):
        parse_path(rest, "hwy")


def test_a_reference_works_encoded_plain_and_merged(served: Served) -> None:
    file = store(served, b"same", name="s")
    plain = file["storage_ref"].removeprefix("hwy://")
    for form in (quote(file["storage_ref"], safe=""), plain, f"hwy:/{plain}", f"hwy://{plain}"):
        answer = served.ask("GET", f"/api/v1/storage/{form}", token=served.admin)
        assert (answer.status, answer.body) == (200, b"same")
    assert served.ask("GET", f"/api/v1/storage/{plain}/nothing", token=served.admin).status == 404
