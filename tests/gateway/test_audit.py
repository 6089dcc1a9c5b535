"""Every change that comes over HTTP is in the journal with who made it, and by which request."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64encode
from typing import Any

from tests.conftest import CHECKOUT
from tests.gateway.served import Served


def blobcask(served: Served, *arguments: str) -> str:
    command = [sys.executable, "-m", "cas", *arguments]
    run = subprocess.run(
        command, env=served.environ, cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    return run.stdout


def journal(served: Served) -> list[dict[str, Any]]:
    lines = blobcask(served, "journal", "tail", "--after", "0", "--json").splitlines()
    return [json.loads(line) for line in lines]


def tour(served: Served) -> dict[str, str]:
    """Make every kind of change; the actor that each request identifier must stand with."""
    wanted: dict[str, str] = {}

    def ask(
        method: str, url: str, body: Any = None, actor: str = "admin", **headers: str
    ) -> dict[str, Any]:
        request_id = f"tour-{len(wanted)}"
        wanted[request_id] = actor
        sent = {"X-Request-Id": request_id, **headers}
        token = served.admin if actor == "admin" else None
        answer = served.ask(method, url, body, token=token, headers=sent)
        assert answer.status < 300, answer.body
        assert answer.headers["x-request-id"] == request_id
        return answer.form if answer.body else {}

    upload = ask("POST", "/api/v1/uploads", json.dumps({"name": "a", "max_files": 3}))
    guest = f"upload:{upload['upload_id']}"
    place = f"/api/v1/uploads/{upload['upload_token']}"
    first, second, _ = upload["presigned_urls"]
    ask("PUT", first + "&filename=a.txt", b"one", guest)
    ask("PUT", second + "&filename=b.txt", b"two", guest)
    info = served.ask("GET", f"{place}/info").form
    ask("DELETE", info["files"][1]["delete_url"], None, guest)
    begin = {
        "Tus-Resumable": "1.0.0",
        "Upload-Length": "5",
        "Upload-Metadata": f"index {b64encode(b'2').decode()}",
    }
    piece = {
        "Tus-Resumable": "1.0.0",
        "Upload-Offset": "0",
        "Content-Type": "application/offset+octet-stream",
    }
    ask("POST", f"{place}/tus/", b"", guest, **begin)
    (unfinished,) = served.ask("GET", f"{place}/info").form["partials"]
    ask("PATCH", unfinished["tus_url"], b"three", guest, **piece)
    ask("POST", f"{place}/complete", b"", guest)
    other = ask("POST", "/api/v1/uploads", json.dumps({"name": "b"}))
    ask("POST", f"/api/v1/uploads/{other['upload_token']}/cancel", b"")
    stored = ask("POST", "/api/v1/storage?name=x&run=r", b"stored")
    reference = "/api/v1/storage/" + stored["storage_ref"].partition("://")[2]
    ask("PUT", f"{reference}/hold", b"")
    ask("DELETE", f"{reference}/hold")
    ask("DELETE", reference)
    events = "/api/v1/events/default"
    ask("POST", events, json.dumps({"event_name": "early", "hold": True}))
    ask("GET", f"{events}/wait?event_name=early&timeout=0")
    return wanted


def test_every_entry_has_an_actor_and_every_request_its_entry(served: Served) -> None:
    wanted = tour(served)
    for verb in ("sweep", "collect", "scrub", "checkpoint"):
        blobcask(served, verb)
    entries = journal(served)
    nameless = [entry for entry in entries if not entry["actor"]]
    assert nameless == []
    found = {entry["request_id"]: entry["actor"] for entry in entries if entry["request_id"]}
    assert {name: found.get(name) for name in wanted} == wanted
    tables = {op["table"] for entry in entries for op in entry["ops"]}
    assert {"stored_files", "pending_uploads", "upload_files", "events", "blobs"} <= tables
    assert "subscriptions" in tables


UNFIT = ["", "a b", "x" * 65, "né", 'a"b', "a;b", "a/b", "<b>", "a=b", "a,b"]


def test_an_identifier_that_is_not_fit_for_a_log_is_replaced(served: Served) -> None:
    made = []
    for given in UNFIT:
        headers = {"X-Request-Id": given.encode().decode("latin-1")}
        body = json.dumps({"name": "a"})
        answer = served.ask("POST", "/api/v1/uploads", body, token=served.admin, headers=headers)
        made.append(answer.headers["x-request-id"])
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in made)
    assert set(made) <= {entry["request_id"] for entry in journal(served)}
