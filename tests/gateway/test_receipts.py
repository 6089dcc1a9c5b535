"""Receipts over HTTP: who gets one, of what, and the keys that prove it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cas.receipts import keys_of_jwks, verify
from tests.conftest import CHECKOUT
from tests.gateway.served import Served


def completed(served: Served, *bodies: bytes) -> dict[str, str]:
    upload = served.request_upload(max_files=len(bodies))
    for number, (url, body) in enumerate(zip(upload["presigned_urls"], bodies, strict=True)):
        sent = served.ask("PUT", f"{url}&filename=file-{number}.txt", body)
        assert sent.status == 200
    done = served.ask("POST", f"/api/v1/uploads/{upload['upload_token']}/complete", b"")
    assert done.status == 200
    return {**upload, "storage_ref": done.form["files"][0]["storage_ref"]}


def receipt_path(upload: dict[str, str]) -> str:
    return f"/api/v1/uploads/{upload['upload_token']}/receipt"


def test_whoever_has_the_link_gets_a_receipt_that_the_public_keys_prove(served: Served) -> None:
    upload = completed(served, b"hello", b"world")
    answer = served.ask("GET", receipt_path(upload))
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    name = f"receipt-{upload['upload_id']}.json"
    assert f'attachment; filename="{name}"' in answer.headers["content-disposition"]
    assert answer.headers["cache-control"] == "no-store"
    keys = served.ask("GET", "/api/v1/receipts/keys")
    assert keys.status == 200
    assert "d" not in keys.form["keys"][0]
    stated = verify(answer.body, keys_of_jwks(keys.body))
    assert (stated.upload_id, stated.name) == (upload["upload_id"], "documents")
    assert [file.checksum_sha256 for file in stated.files] == [
        hashlib.sha256(data).hexdigest() for data in (b"hello", b"world")
    ]
    assert stated.issuer is None, "no public_url; the Host of a request proves nothing"
    assert served.ask("GET", receipt_path(upload), headers={"Host": "evil"}).body == answer.body


def test_it_is_there_when_the_files_are_not(served: Served) -> None:
    upload = completed(served, b"to be deleted")
    before = served.ask("GET", receipt_path(upload)).body
    path = upload["storage_ref"].partition("://")[2]
    assert served.ask("DELETE", f"/api/v1/storage/{path}", token=served.admin).status == 204
    assert served.ask("GET", receipt_path(upload)).body == before


def test_there_is_none_before_the_end_and_none_of_anothers(served: Served) -> None:
    pending = served.request_upload()
    refused = served.ask("GET", receipt_path(pending))
    assert (refused.status, refused.code) == (409, "upload_not_completed")
    assert refused.form["state"] == "pending"
    served.ask("PUT", pending["presigned_urls"][0], b"x")
    assert served.ask("GET", receipt_path(pending)).status == 409
    token = pending["upload_token"]
    served.ask("POST", f"/api/v1/uploads/{token}/cancel", b"", token=served.admin)
    assert served.ask("GET", receipt_path(pending)).form["state"] == "cancelled"
    mine, others = completed(served, b"mine"), completed(served, b"others")
    got = [served.ask("GET", receipt_path(upload)).form["receipt"] for upload in (mine, others)]
    assert [one["upload_id"] for one in got] == [mine["upload_id"], others["upload_id"]]
    for unknown in ("Zz9zZz9z", mine["upload_id"], "x" * 500, "%00"):
        answer = served.ask("GET", f"/api/v1/uploads/{unknown}/receipt")
        assert (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_a_receipt_cannot_be_written(served: Served, method: str) -> None:
    upload = completed(served, b"x")
    assert served.ask(method, receipt_path(upload), b"").status == 405
    assert served.ask("HEAD", receipt_path(upload)).status == 200


def test_the_command_proves_what_the_server_gave(served: Served, tmp_path: Path) -> None:
    upload = completed(served, b"hello")
    (tmp_path / "receipt.json").write_bytes(served.ask("GET", receipt_path(upload)).body)
    (tmp_path / "keys.json").write_bytes(served.ask("GET", "/api/v1/receipts/keys").body)
    (tmp_path / "file").write_bytes(b"hello")
    paths = [str(tmp_path / name) for name in ("receipt.json", "file")]
    command = [sys.executable, "-m", "cas", "receipt", "verify", *paths]
    command += ["--keys", str(tmp_path / "keys.json"), "--json"]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["files"][0]["path"] == paths[1]
