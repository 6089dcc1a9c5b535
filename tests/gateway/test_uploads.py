"""Uploads over HTTP: request, look, fill slots, complete, cancel, list."""

from __future__ import annotations

import hashlib
import io
import json
from base64 import b64encode
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import falcon.testing
import pytest

from cas.catalog import Snapshot
from cas.config import Settings, StoreSettings
from cas.keys import load_keys
from cas.remote import RemoteStore, values
from cas.store import Store
from cas.uploads import UploadRequest
from gateway.app import create_app
from gateway.auth import ADMIN, Tokens
from tests.clocks import HandClock
from tests.gateway.served import Answer, Served, until

PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"


def info(served: Served, token: str) -> dict[str, Any]:
    answer = served.ask("GET", f"/api/v1/uploads/{token}/info")
    assert answer.status == 200
    return answer.form


def digest_header(data: bytes) -> str:
    return f"sha-256=:{b64encode(hashlib.sha256(data).digest()).decode()}:"


def test_a_first_serve_prints_a_token_and_a_link_that_work(served: Served) -> None:
    page = served.ask("GET", served.first)
    assert page.status == 200
    assert b"first upload" in page.body
    assert served.ask("GET", "/api/v1/uploads", token=served.admin).status == 200


def test_files_are_asked_for_sent_and_completed(served: Served) -> None:
    asked = served.request_upload(
        name="kyc", allowed_types=["pdf"], max_files=2, max_size_mb=1, prompt="IDs please"
    )
    assert set(asked) == {
        "upload_id", "upload_token", "upload_url", "presigned_urls", "event_name", "expires_at",
    }  # fmt: skip
    assert len(asked["presigned_urls"]) == 2
    assert len(asked["upload_token"]) == 8
    assert asked["event_name"] == f"upload_{asked['upload_id']}"
    token = asked["upload_token"]

    shown = info(served, token)
    assert (shown["name"], shown["prompt"], shown["status"]) == ("kyc", "IDs please", "pending")
    assert (shown["max_files"], shown["max_size_bytes"]) == (2, 1024 * 1024)

    url = shown["presigned_urls"][0]
    sent = served.ask("PUT", f"{url}&filename={quote('Pass – 1.pdf')}", PDF)
    assert sent.status == 200
    assert sent.form["checksum_sha256"] == hashlib.sha256(PDF).hexdigest()
    assert (sent.form["index"], sent.form["filename"]) == (0, "Pass – 1.pdf")
    assert sent.headers["repr-digest"] == digest_header(PDF)
    assert [file["filename"] for file in info(served, token)["files"]] == ["Pass – 1.pdf"]

    done = served.ask("POST", f"/api/v1/uploads/{token}/complete")
    assert done.status == 200
    assert set(done.form) == {"files", "uploaded_at"}
    (file,) = done.form["files"]
    assert set(file) == {
        "storage_ref", "filename", "content_type", "size_bytes", "checksum_sha256",
    }  # fmt: skip
    digest = hashlib.sha256(PDF).hexdigest()
    assert file["storage_ref"] == f"hwy://uploads/default/direct/{digest}.pdf"
    assert digest in served.objects()

    again = served.ask("POST", f"/api/v1/uploads/{token}/complete")
    assert (again.status, again.code) == (409, "upload_closed")
    assert again.form["files"] == done.form["files"]
    late = served.ask("PUT", f"{url}&filename=late.pdf", PDF)
    assert (late.status, late.code) == (409, "upload_closed")
    assert info(served, token)["files"] == done.form["files"]
    assert info(served, token)["presigned_urls"] == []


def test_a_second_put_replaces_the_slot_and_a_delete_empties_it(served: Served) -> None:
    asked = served.request_upload(max_files=2)
    url, token = asked["presigned_urls"][1], asked["upload_token"]
    for data in (b"first", b"second"):
        assert served.ask("PUT", f"{url}&filename=a.txt", data).status == 200
    (slot,) = info(served, token)["files"]
    assert slot["checksum_sha256"] == hashlib.sha256(b"second").hexdigest()
    assert slot["index"] == 1

    assert served.ask("DELETE", url).status == 404  # signed for PUT
    assert served.ask("DELETE", slot["delete_url"]).status == 204
    assert info(served, token)["files"] == []
    assert served.ask("DELETE", slot["delete_url"]).status == 204


def test_a_url_used_just_as_it_came_needs_no_filename(served: Served) -> None:
    url = served.request_upload()["presigned_urls"][0]
    sent = served.ask("PUT", url, PDF, headers={"Content-Type": "application/pdf"})
    assert sent.form["filename"] == "file-1.pdf"


def test_completing_without_a_file_is_refused(served: Served) -> None:
    token = served.request_upload()["upload_token"]
    assert served.ask("POST", f"/api/v1/uploads/{token}/complete").status in (400, 409, 422)
    assert info(served, token)["status"] == "pending"


def test_the_content_decides_about_the_type_and_the_reasons_are_listed(served: Served) -> None:
    asked = served.request_upload(allowed_types=["pdf"], max_files=2)
    served.ask("PUT", f"{asked['presigned_urls'][0]}&filename=right.pdf", PDF)
    served.ask("PUT", f"{asked['presigned_urls'][1]}&filename=lie.pdf", b"MZ" + bytes(100))
    complete = f"/api/v1/uploads/{asked['upload_token']}/complete"
    refused = served.ask("POST", complete)
    assert (refused.status, refused.code) == (422, "files_refused")
    (reason,) = refused.form["reasons"]
    assert (reason["index"], reason["filename"]) == (1, "lie.pdf")
    assert reason["reason"]

    (_, lie) = info(served, asked["upload_token"])["files"]
    served.ask("DELETE", lie["delete_url"])
    assert served.ask("POST", complete).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"name": 5}',
        b'{"name": "a", "max_files": 0}',
        b'{"name": "a", "max_files": "many"}',
        b'{"name": "a", "max_size_mb": -1}',
        b'{"name": "a", "max_size_mb": 1e300}',
        b'{"name": "a", "max_file": 3}',
        b'{"name": "a/b"}',
        b'{"name": "a", "retention_policy": "sometimes"}',
        b'{"name": "a", "expires_in": 0}',
        b'{"name": "\xff"}',
        b"[" * 60_000,
    ],
)
def test_a_bad_request_names_what_is_wrong(served: Served, body: bytes) -> None:
    answer = served.ask("POST", "/api/v1/uploads", body, token=served.admin)
    assert answer.status == 400
    assert answer.code.startswith("invalid_")
    assert answer.form["detail"]


def test_a_request_of_any_size_is_not_read(served: Served) -> None:
    answer = served.ask("POST", "/api/v1/uploads", b" " * 100_000, token=served.admin)
    assert (answer.status, answer.code) == (413, "too_large")
    assert answer.form["limit_bytes"] == 64 * 1024


def test_a_cancelled_upload_takes_nothing_more(served: Served) -> None:
    asked = served.request_upload()
    cancel = f"/api/v1/uploads/{asked['upload_token']}/cancel"
    assert served.ask("POST", cancel).status == 401
    foreign = served.token("admin", tenant="other")
    assert served.ask("POST", cancel, token=foreign).code == "not_found"
    viewer = served.token("view_uploads")
    assert served.ask("POST", cancel, token=viewer).code == "permission_missing"

    manager = served.token("manage_uploads")
    assert served.ask("POST", cancel, token=manager).form["status"] == "cancelled"
    late = served.ask("PUT", f"{asked['presigned_urls'][0]}&filename=a", b"late")
    assert (late.status, late.form["state"]) == (409, "cancelled")
    completed = served.ask("POST", f"/api/v1/uploads/{asked['upload_token']}/complete")
    assert (completed.status, completed.form["state"]) == (409, "cancelled")
    assert info(served, asked["upload_token"])["presigned_urls"] == []


def test_uploads_are_listed_to_their_tenant_alone(served: Served) -> None:
    asked = served.request_upload(name="mine")
    listed = served.ask("GET", "/api/v1/uploads?limit=1000", token=served.admin).form["uploads"]
    (mine,) = [upload for upload in listed if upload["upload_id"] == asked["upload_id"]]
    assert mine["upload_url"] == asked["upload_url"]
    foreign = served.token("view_uploads", tenant="other")
    assert served.ask("GET", "/api/v1/uploads", token=foreign).form["uploads"] == []
    assert served.ask("GET", "/api/v1/uploads?limit=0", token=served.admin).status == 400


def test_pages_of_a_list_join_without_gap_or_repetition(served: Served) -> None:
    tenant = served.token("admin", tenant="pages")
    wanted = []
    for number in range(5):
        body = json.dumps({"name": f"n{number}"})
        answer = served.ask("POST", "/api/v1/uploads", body, token=tenant)
        wanted.append(answer.form["upload_id"])
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        query = f"limit=2&cursor={quote(cursor)}" if cursor else "limit=2"
        page = served.ask("GET", f"/api/v1/uploads?{query}", token=tenant).form
        assert len(page["uploads"]) <= 2
        found += [upload["upload_id"] for upload in page["uploads"]]
        cursor = page["next_cursor"]
    assert sorted(found) == sorted(wanted)


def test_an_unknown_token_is_not_found_anywhere(served: Served) -> None:
    for method, verb in (("GET", "info"), ("POST", "complete")):
        answer = served.ask(method, f"/api/v1/uploads/AAAAAAAA/{verb}")
        assert (answer.status, answer.code) == (404, "not_found")
    assert served.ask("GET", "/u/AAAAAAAA").status == 404


def test_the_page_is_strict_about_what_it_may_do(served: Served) -> None:
    asked = served.request_upload(name="<b>name", prompt="<script>alert(1)</script>")
    page = served.ask("GET", asked["upload_url"])
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-store"
    assert b"<script>alert" not in page.body
    assert b"&lt;b&gt;name" in page.body
    assert b" style=" not in page.body
    assert b"http://" not in page.body.replace(b"http://www.w3.org", b"")


def test_the_files_of_the_page_are_kept_by_version(served: Served) -> None:
    page = served.ask("GET", served.first).body.decode()
    address = page.partition('src="..')[2].partition('"')[0]
    script = served.ask("GET", address)
    assert script.status == 200
    assert "immutable" in script.headers["cache-control"]
    folder, _, name = address.rpartition("/")
    assert served.ask("GET", f"/static/old/{name}").headers["cache-control"] == "no-cache"
    for nothing in ("/static/upload.js", f"{folder}/nothing.js", f"{folder}/..%2fapp.py"):
        assert served.ask("GET", nothing).code == "not_found"


def test_health_is_told_without_a_token(served: Served) -> None:
    assert served.ask("GET", "/healthz").form == {"status": "ok"}
    # Not while a commit takes seconds on a busy disk.
    until(lambda: served.ask("GET", "/readyz").status == 200)
    ready = served.ask("GET", "/readyz").form
    assert (ready["status"], len(ready["degraded"])) == ("ready", 1), "nobody sweeps here"


def test_every_answer_has_a_request_id(served: Served) -> None:
    given = served.ask("GET", "/healthz", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    odd = served.ask("GET", "/healthz", headers={"X-Request-Id": "a b\tc"})
    assert odd.headers["x-request-id"] != "a b\tc"
    assert served.ask("GET", "/nowhere").headers["x-request-id"]


# --- what opens an upload


def test_who_may_only_view_is_told_nothing_that_opens_an_upload(served: Served) -> None:
    asked = served.request_upload()
    viewer, manager = served.token("view_uploads"), served.token("manage_uploads")
    one = f"/api/v1/uploads/{asked['upload_token']}"
    for path in ("/api/v1/uploads", one):
        answer = served.ask("GET", path, token=viewer)
        assert answer.status == 200
        found = answer.form["uploads"][0] if path != one else answer.form
        assert found["upload_id"] == asked["upload_id"]
        assert (found["upload_token"], found["upload_url"]) == (None, None)
        assert asked["upload_token"] not in answer.body.decode()
        assert values.pending_upload(found).upload_token == ""
    found = served.ask("GET", "/api/v1/uploads", token=manager).form["uploads"][0]
    assert found["upload_token"] == asked["upload_token"]
    assert found["upload_url"] == asked["upload_url"]


def test_a_remote_viewer_lists_uploads_and_keeps_the_token_he_has(served: Served) -> None:
    asked = served.request_upload()
    with RemoteStore(served.address, served.token("view_uploads")) as remote:
        uploads = remote.uploads()
        [newest] = uploads.list(limit=1).items
        assert (newest.upload_id, newest.upload_token) == (asked["upload_id"], "")
        assert uploads.url(newest) == ""
        assert uploads.get(asked["upload_token"]).upload.upload_token == asked["upload_token"]


def test_a_page_of_completed_uploads_asks_for_their_callbacks_once(
    root: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(store=StoreSettings(root=root))
    with Store.open(root, settings, clock=clock) as store:
        uploads = store.uploads("t", "ada")
        for number in range(3):
            upload = uploads.request(
                UploadRequest(f"n{number}", callback_url="https://a.example/hook")
            )
            link = store.upload_link(upload.upload_token)
            link.put(0, io.BytesIO(b"x"), filename="a.txt")
            link.complete()
        keys = load_keys(settings)
        client = falcon.testing.TestClient(create_app(store, settings, keys))
        token = Tokens(keys.jwt, store.about_now_us).issue("t", "ada", (ADMIN,), 60)
        asked: list[None] = []
        read = store.catalog.read

        def ask() -> AbstractContextManager[Snapshot]:
            asked.append(None)
            return read()

        monkeypatch.setattr(store.catalog, "read", ask)
        costs = []
        for limit in (1, 3):
            asked.clear()
            headers = {"Authorization": f"Bearer {token}"}
            found = client.simulate_get(
                "/api/v1/uploads", params={"limit": limit}, headers=headers
            ).json["uploads"]
            costs.append(len(asked))
            assert [upload["callback"]["status"] for upload in found] == ["waiting"] * limit
        assert costs[0] == costs[1]


# --- the same request, made again


def asked_with_key(
    served: Served, key: str, name: str = "once", token: str | None = None
) -> Answer:
    body = json.dumps({"name": name})
    headers = {"Idempotency-Key": key}
    token = served.admin if token is None else token
    return served.ask("POST", "/api/v1/uploads", body, token=token, headers=headers)


def test_a_request_that_comes_again_with_its_key_makes_no_second_link(served: Served) -> None:
    first, again = (asked_with_key(served, "d2c6/collect#1") for _ in range(2))
    assert (first.status, again.status) == (201, 201)
    opening = ("upload_id", "upload_token", "upload_url", "event_name", "expires_at")
    assert [first.form[name] for name in opening] == [again.form[name] for name in opening]
    sent = served.ask("PUT", again.form["presigned_urls"][0] + "&filename=a.pdf", PDF)
    assert sent.status == 200


def test_a_key_that_comes_with_another_body_is_refused(served: Served) -> None:
    asked_with_key(served, "reused")
    refused = asked_with_key(served, "reused", name="another")
    assert (refused.status, refused.code) == (422, "idempotency_key_reused")


def test_a_key_of_one_tenant_says_nothing_to_another(served: Served) -> None:
    other = served.token("manage_uploads", tenant="other")
    ours = asked_with_key(served, "shared").form
    theirs = asked_with_key(served, "shared", name="theirs", token=other)
    assert theirs.status == 201
    assert theirs.form["upload_id"] != ours["upload_id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "caf\u00e9"])
def test_what_is_no_key_is_refused(served: Served, key: str) -> None:
    refused = asked_with_key(served, key)
    assert (refused.status, refused.code) == (400, "invalid_request")
