"""The log: one readable line for each request, nothing in it that opens anything."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import falcon
import falcon.testing
import pytest

from cas.config import LogSettings
from cas.log_forms import LINE_BYTES_MAX
from gateway.lines import Lines
from gateway.logs import (
    Answered,
    Observed,
    RequestLog,
    line_form,
    redacted,
)
from tests.gateway.served import Served, serving

BEARER = "eyJhbGciOiJIUzI1NiJ9.eyJ0ZW5hbnQiOiJ4In0.c2lnbmF0dXJlc2lnbmF0dXJl"


def lines_of(served: Served) -> list[dict[str, Any]]:
    """All lines so far, each one a JSON document."""
    return [json.loads(line) for line in served.logged()]


def line_of(served: Served, request_id: str) -> dict[str, Any]:
    """The one line of a request."""

    def there(lines: list[str]) -> bool:
        return any(request_id in line for line in lines)

    found = [json.loads(line) for line in served.logged(there) if request_id in line]
    requests = [line for line in found if line["event"] == "request"]
    (line,) = requests
    assert isinstance(line, dict)
    return line


def test_a_request_is_one_line_that_tells_what_matters(served: Served) -> None:
    headers = {"X-Request-Id": "one-line"}
    url = "/api/v1/storage?name=a&filename=a.txt"
    answer = served.ask("POST", url, b"hello", token=served.admin, headers=headers)
    assert answer.headers["x-request-id"] == "one-line"
    line = line_of(served, "one-line")
    assert line["route"] == "/api/v1/storage"
    assert (line["level"], line["method"], line["status"]) == ("info", "POST", 201)
    assert (line["bytes_in"], line["bytes_out"]) == (5, len(answer.body))
    assert (line["tenant"], line["actor"], line["address"]) == ("default", "admin", "127.0.0.1")
    assert line["pid"] in served.workers()
    assert line["duration_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["at"])


def test_bytes_that_the_kernel_sent_are_counted(served: Served) -> None:
    data = os.urandom(300_000)
    url = "/api/v1/storage?name=sent&filename=sent.bin"
    ref = quote(served.ask("POST", url, data, token=served.admin).form["storage_ref"], safe="")
    for number, (method, asked, out) in enumerate(
        [("GET", {}, 300_000), ("GET", {"Range": "bytes=0-9"}, 10), ("HEAD", {}, 0)]
    ):
        headers = {"X-Request-Id": f"sent-{number}", **asked}
        served.ask(method, f"/api/v1/storage/{ref}", token=served.admin, headers=headers)
        assert line_of(served, f"sent-{number}")["bytes_out"] == out


def test_a_refusal_names_its_code_and_a_link_shows_as_a_hash(served: Served) -> None:
    served.ask("GET", "/u/abcdefgh", headers={"X-Request-Id": "refused-1"})
    served.ask("GET", "/api/v1/uploads/abcdefgh/info", headers={"X-Request-Id": "refused-2"})
    page, info = line_of(served, "refused-1"), line_of(served, "refused-2")
    assert (info["status"], info["code"]) == (404, "not_found")
    assert page["link"] == info["link"]
    assert re.fullmatch("[0-9a-f]{8}", page["link"])


def test_a_refusal_that_no_resource_made_names_its_code_too(served: Served) -> None:
    slot = "/api/v1/uploads/abcdefgh/files/0"
    served.ask("GET", "/nowhere", headers={"X-Request-Id": "framework-404"})
    served.ask("PATCH", slot, headers={"X-Request-Id": "framework-405"})
    assert line_of(served, "framework-404")["code"] == "not_found"
    line = line_of(served, "framework-405")
    assert line["code"] == "method_not_allowed"
    assert line["route"] == "/api/v1/uploads/{token}/files/{index}"


@pytest.mark.parametrize("given", ["x" * 65, "a b", "ä", "a/b", ""])
def test_an_unfit_request_id_is_replaced(served: Served, given: str) -> None:
    answer = served.ask(
        "GET", "/healthz", headers={"X-Request-Id": given.encode().decode("latin-1")}
    )
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])


def test_a_client_that_leaves_is_logged_as_cut_short(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(
            b"POST /api/v1/storage?name=gone HTTP/1.1\r\nHost: a\r\nX-Request-Id: gone-1\r\n"
            b"Content-Length: 1000\r\nAuthorization: Bearer "
            + served.admin.encode()
            + b"\r\n\r\nabc"
        )
        connection.shutdown(socket.SHUT_WR)
        connection.recv(4096)
    line = line_of(served, "gone-1")
    assert (line["status"], line["code"], line["bytes_in"]) == (400, "body_truncated", 3)


def tour(served: Served) -> Iterator[str]:
    """Every route, well used and badly; yields what must not be in the log."""
    yield served.admin
    yield BEARER
    upload = served.request_upload(max_files=3)
    token = upload["upload_token"]
    yield token
    base = f"/api/v1/uploads/{token}"
    ask = served.ask
    for path in (f"/u/{token}", f"{base}/info", base, f"{base}/receipt", f"/u/{token}x", "/u/"):
        ask("GET", path)
        ask("HEAD", path)
        ask("GET", path, token=BEARER)
        ask("GET", path, token=served.admin)
    for slot in upload["presigned_urls"]:
        yield parse_qs(urlsplit(slot).query)["signature"][0]
        ask("PUT", f"{slot}&filename=a.txt", b"hello")
        ask("PUT", f"{slot}x&filename=a.txt", b"hello")
        ask("PUT", slot, b"hello", headers={"Repr-Digest": "nonsense"})
        ask("DELETE", slot)
        ask("POST", slot)
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
    made = ask(
        "POST", f"{base}/tus/", headers={**tus, "Upload-Metadata": "index MA==,filename YQ=="}
    )
    ask("PATCH", made.headers.get("location", f"{base}/tus/none"), b"xx", headers=tus)
    ask("POST", f"{base}/complete")
    ask("POST", f"{base}/complete")
    ask("POST", f"{base}/cancel", token=served.admin)
    ask("POST", f"{base}/cancel", token=BEARER)
    ask("POST", f"/u/{token}", b"--x", headers={"Content-Type": "multipart/form-data; boundary=x"})
    stored = ask("POST", "/api/v1/storage?name=a&filename=a.txt", b"x", token=served.admin).form
    ref = quote(stored["storage_ref"], safe="")
    for verb in ("", "/stat", "/meta", "/url", "/nothing"):
        ask("GET", f"/api/v1/storage/{ref}{verb}", token=served.admin)
        ask("GET", f"/api/v1/storage/{ref}{verb}", token=BEARER)
    url = ask("GET", f"/api/v1/storage/{ref}/url", token=served.admin).form["url"]
    yield parse_qs(urlsplit(url).query)["signature"][0]
    ask("GET", url)
    ask("GET", f"{url}0")
    ask("GET", url, headers={"Range": "bytes=99-"})
    ask("PUT", url)
    for path in (
        "/healthz",
        "/readyz",
        "/metrics",
        "/static/none/none",
        "/no/such",
        "/api/v1/receipts/keys",
    ):
        ask("GET", path)


def broken(token: str, bearer: str) -> list[bytes]:
    """Requests that gunicorn's parser refuses before any of our code sees them."""
    return [
        f"GET /u/{token} HTTP/9.9\r\n\r\n".encode(),
        f"GE(T /u/{token} HTTP/1.1\r\n\r\n".encode(),
        f"GET /u/{token}\r\n\r\n".encode(),
        f"GET /u/{token} HTTP/1.1 x\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\nAuthorization: Bearer {bearer}\x00\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\nAuthorization : Bearer {bearer}\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\nAuthorization Bearer {bearer}\r\n\r\n".encode(),
        f"GET /u/{token}?signature={bearer} HTTP/1.1\r\nContent-Length: x\r\n\r\n".encode(),
        f"PUT /u/{token} HTTP/1.1\r\nTransfer-Encoding: {bearer}\r\n\r\n".encode(),
    ]


def routes_of(lines: list[str]) -> set[str]:
    forms = (json.loads(line) for line in lines)
    return {form["route"] for form in forms if form["event"] == "request"}


def test_nothing_that_opens_anything_is_ever_logged(served: Served) -> None:
    secrets = list(tour(served))
    for request in broken(secrets[2], BEARER):
        with served.connect() as connection:
            connection.sendall(request)
            connection.recv(4096)
    served.ask("GET", "/healthz", headers={"X-Request-Id": "tour-end"})
    line_of(served, "tour-end")
    wanted = {"/u/{token}", "/d/{file_id}/{filename}", "none"}
    # The lines of the other worker may come later.
    served.logged(lambda lines: len(lines) > 60 and wanted <= routes_of(lines))
    text = "".join(served.logged())
    for secret in secrets:
        assert secret not in text
        assert secret.rpartition(".")[2] not in text
    lines = lines_of(served)
    assert all(len(json.dumps(line)) < LINE_BYTES_MAX for line in lines)
    assert not [line for line in lines if line["level"] == "error"]


def test_what_others_write_is_searched_for_secrets() -> None:
    for text in (
        "Invalid request line: 'GET /u/abcd2345 x'",
        "no /api/v1/uploads/abcd2345/info?x",
        "signature=abcd2345&x=1",
        "Authorization: Bearer abcd2345",
        "{'authorization': 'bearer abcd2345'}",
        "HTTP_AUTHORIZATION: Basic abcd2345",
    ):
        assert "abcd2345" not in redacted(text), text
    assert BEARER not in redacted(f"token {BEARER} refused")
    assert redacted("a plain message about /u and tokens") == "a plain message about /u and tokens"


def test_the_secrets_of_the_request_at_hand_are_known_by_value() -> None:
    """An exception may quote a token bare: `KeyError: 'abcd2345'`."""
    headers = {"Authorization": "Bearer opaque-bearer"}
    req = falcon.testing.create_req(
        path="/u/abcd2345", query_string="signature=s1gnature", headers=headers
    )
    resp = falcon.Response()
    observed = Observed()
    observed.process_request(req, resp)
    observed.process_resource(req, resp, None, {"token": "abcd2345"})
    text = "KeyError: 'abcd2345', s1gnature, opaque-bearer"
    assert redacted(text) == "KeyError: '…', …, …"
    RequestLog(LogSettings(requests="none"), b"k" * 32).write(Answered(req.env, None, 0.0))
    assert redacted(text) == text  # another request's words are its own


def record_of(error: Exception | None = None, **facts: Any) -> logging.LogRecord:
    record = logging.LogRecord("blobcask.x", logging.ERROR, "", 0, "fault %s", ("here",), None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    if facts:
        record.facts = facts
    return record


def deep(levels: int) -> None:
    if levels:
        deep(levels - 1)
    raise ValueError("the\nreason ✗ " + "x" * 5000)


def test_an_error_with_its_trace_is_one_line_that_no_pipe_splits() -> None:
    with pytest.raises(ValueError, match="reason") as raised:
        deep(50)
    line = line_form("json").format(record_of(raised.value))
    form = json.loads(line)
    assert "\n" not in line
    assert len(line) < LINE_BYTES_MAX
    assert (form["error"], form["message"]) == ("ValueError", "fault here")
    assert form["trace"].startswith("Traceback")
    wide = json.loads(line_form("json").format(record_of(name="✗" * 3000, rest="✗" * 3000)))
    assert wide["event"] == "fault here"


def test_text_is_for_people_and_cannot_steer_their_terminal() -> None:
    line = line_form("text").format(record_of(route="/x", actor="\x1b[2Jada\nERROR fake"))
    assert line.count("\n") == 0
    assert "\x1b" not in line
    assert " ERROR " in line
    assert "route=/x" in line


def test_a_reader_that_stands_still_costs_lines_and_never_a_request() -> None:
    read_fd, write_fd = os.pipe()
    lines = Lines(write_fd)
    lines.setFormatter(logging.Formatter("%(message)s " + "x" * 500))
    try:
        for _ in range(1000):  # more than a pipe holds
            lines.emit(record_of())
        assert lines.dropped > 0
        before = lines.dropped
        os.close(read_fd)
        lines.emit(record_of())  # nobody reads any more
        assert lines.dropped == before + 1
    finally:
        os.close(write_fd)


def test_lines_come_out_whole_and_in_order_from_their_thread() -> None:
    read_fd, write_fd = os.pipe()
    lines = Lines(write_fd)
    lines.setFormatter(logging.Formatter("%(message)s"))
    lines.start()
    for number in range(100):
        lines.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {number}", (), None))
    lines.stop()
    os.close(write_fd)
    with open(read_fd) as out:
        assert out.read().splitlines() == [f"line {number}" for number in range(100)]
    assert lines.dropped == 0


@pytest.mark.parametrize(("wanted", "routes"), [("errors", ["/readyz"]), ("none", [])])
def test_only_the_requests_that_are_wanted_are_logged(
    root: Path, wanted: str, routes: list[str]
) -> None:
    settings = {"LOG__REQUESTS": wanted, "LOG__FORMAT": "text", "STORE__MIN_FREE": "1000TiB"}
    with serving(root, **settings) as quiet:
        assert quiet.ask("GET", "/healthz").status == 200
        assert quiet.ask("GET", "/nowhere").status == 404
        assert quiet.ask("GET", "/readyz").status == 503
    seen = [line for line in quiet.logged() if " request request_id=" in line]
    assert [re.findall(r"route=(\S+)", line)[0] for line in seen] == routes


def test_a_server_whose_log_nobody_reads_goes_on_serving(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Served, "drain", lambda _self: None)
    with serving(root) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for _ in range(1000):  # their lines are more than a pipe holds
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            response.read()
            assert response.status == 200
        connection.close()
