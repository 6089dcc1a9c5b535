"""JSON and forms that are too deep, too large, doubtful or not what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.uploads import REQUEST_BYTES_MAX
from tests.gateway.served import Served

INVALID = (400, "invalid_request")


def ask(**members: Any) -> bytes:
    return json.dumps({"name": "n", **members}).encode()


REFUSED: dict[str, tuple[bytes, int, str]] = {
    # not JSON
    "nothing": (b"", *INVALID),
    "no JSON": (b"name=n", *INVALID),
    "two documents": (b'{"name": "n"} {"name": "n"}', *INVALID),
    "a comma too many": (b'{"name": "n",}', *INVALID),
    "a comment": (b'{"name": "n" /* x */}', *INVALID),
    "no UTF-8": (b'{"name": "\xff"}', *INVALID),
    "overlong UTF-8": (b'{"name": "\xc0\xaf"}', *INVALID),
    "a surrogate in UTF-8": (b'{"name": "\xed\xa0\x80"}', *INVALID),
    "UTF-16": ('{"name": "n"}'.encode("utf-16"), *INVALID),
    "a byte order mark": (b'\xef\xbb\xbf{"name": "n"}', *INVALID),
    "NaN": (b'{"name": "n", "max_size_mb": NaN}', *INVALID),
    "Infinity": (b'{"name": "n", "max_size_mb": Infinity}', *INVALID),
    # too much
    "10,000 lists": (b"[" * 10_000, *INVALID),
    "10,000 lists in a member": (b'{"name": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", *INVALID),
    "10,000 objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, *INVALID),
    "10,000 lists in another member": (b'{"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", *INVALID),
    "a mebibyte": (ask(prompt="p" * (1 << 20)), 413, "too_large"),
    "a byte too many": (b'{"name": "n"}'.ljust(REQUEST_BYTES_MAX + 1), 413, "too_large"),
    "a long prompt": (ask(prompt="p" * 4001), *INVALID),
    "many types": (ask(allowed_types=["pdf"] * 51), *INVALID),
    "many files": (ask(max_files=1001), *INVALID),
    # doubtful
    "a member twice": (b'{"name": "n", "name": "m"}', *INVALID),
    "a member twice, once in disguise": (b'{"name": "n", "n\\u0061me": "m"}', *INVALID),
    "an unknown member": (ask(tenant="rival"), *INVALID),
    "a member of other languages": (ask(__proto__={"admin": True}), *INVALID),
    # other types and values
    "null": (b"null", *INVALID),
    "a list": (b"[]", *INVALID),
    "text": (b'"name"', *INVALID),
    "no name": (b"{}", *INVALID),
    "a name that is none": (ask(name=None), *INVALID),
    "a name that is a number": (ask(name=1), *INVALID),
    "a name that is a list": (ask(name=["n"]), *INVALID),
    "an empty name": (ask(name=""), 400, "invalid_name"),
    "a name with a line break": (ask(name="a\nb"), 400, "invalid_name"),
    "half a character": (b'{"name": "\\ud800"}', *INVALID),
    "files as text": (ask(max_files="1"), *INVALID),
    "files as truth": (ask(max_files=True), *INVALID),
    "no files": (ask(max_files=0), *INVALID),
    "less than no files": (ask(max_files=-1), *INVALID),
    "half a file": (ask(max_files=1.5), *INVALID),
    "a huge number": (b'{"name": "n", "max_files": ' + b"9" * 5_000 + b"}", *INVALID),
    "a huge exponent": (b'{"name": "n", "max_size_mb": 1e999}', *INVALID),
    "a huge size": (ask(max_size_mb=2**63), *INVALID),
    "a negative size": (ask(max_size_mb=-1), *INVALID),
    "no time": (ask(expires_in=0), *INVALID),
    "a negative time": (ask(expires_in=-1), *INVALID),
    "a long time": (ask(expires_in=2**63), *INVALID),
    "types as text": (ask(allowed_types="pdf"), *INVALID),
    "a type that is a path": (ask(allowed_types=["../pdf"]), *INVALID),
    "a type that is a tag": (ask(allowed_types=['"><script>']), *INVALID),
    "a run that is a path": (ask(run="../x"), 400, "invalid_name"),
    "a retention that is none": (ask(retention_policy="days:-1"), 400, "invalid_retention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_doubtful_request_is_refused_and_says_why(served: Served, name: str) -> None:
    body, status, code = REFUSED[name]
    before = served.ask("GET", "/api/v1/uploads?limit=1", token=served.admin).body
    answer = served.ask("POST", "/api/v1/uploads", body, token=served.admin)
    assert (answer.status, answer.code) == (status, code)
    assert answer.form["detail"]
    assert len(answer.body) < 2_000  # what was sent is not sent back
    assert served.ask("GET", "/api/v1/uploads?limit=1", token=served.admin).body == before


ELSEWHERE = [
    "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)", "\x01javascript:alert()",
    "javascript://host/%0aalert(1)", "data:text/html,x", "data://host/x", "vbscript:x", "blob:x",
    "file:///etc/passwd", "file://host/etc/passwd", "ftp://host/x", "ws://host/x", "gopher://host/",
    "//evil.example", "///evil.example", "/relative", "relative", "?query", "#fragment", "", " ",
    "http:", "http://", "http:///path", "https:evil.example", "http:\\\\evil.example",
    "https://good.example@evil.example/", "https://user:secret@host/", "https://@host/",
    "https://evil.example\\.good.example/", "https://good.example\\@evil.example/",
    "https://good.example/\r\nLocation: https://evil.example/", "https://good.example/\nx",
    "https://ev\til.example/", "https://good.example /", "https://good.example/\x00",
    "https://good.example/\u202ex", "https://host:99999/", "https://host:x/", "https://[::1",
    "https://" + "a" * 2000,
]  # fmt: skip


@pytest.mark.parametrize("member", ["redirect_url", "callback_url"])
@pytest.mark.parametrize("url", ELSEWHERE)
def test_an_address_that_leads_elsewhere_is_refused(served: Served, member: str, url: str) -> None:
    body = ask(**{member: url})
    answer = served.ask("POST", "/api/v1/uploads", body, token=served.admin)
    assert (answer.status, answer.code) == INVALID


@pytest.mark.parametrize(
    "url", ["https://good.example/done?a=b&c=%20#x", "http://[2001:db8::1]:8080/", "https://bücher.example/"]
)  # fmt: skip
def test_an_honest_address_is_kept_exactly(served: Served, url: str) -> None:
    token = served.request_upload(redirect_url=url)["upload_token"]
    assert served.ask("GET", f"/api/v1/uploads/{token}/info").form["redirect_url"] == url


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=1001", "limit=1e3", "limit=%D9%A3", "limit=", "limit=" + "9" * 9,
     "cursor=x", "cursor=%00", "cursor='%20OR%201=1", "cursor=" + "f" * 5000, "status=done",
     "status=pending%00"],
)  # fmt: skip
def test_a_listing_takes_what_it_offers_only(served: Served, query: str) -> None:
    answer = served.ask("GET", f"/api/v1/uploads?{query}", token=served.admin)
    assert (answer.status, answer.code) == INVALID


# --- the plain form of the page

BOUNDARY = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (BOUNDARY, PART + b"cut off"),
        (BOUNDARY, PART.replace(b'a.bin"', b'a.bin"' + b"; x=" + b"y" * 9000) + b"x\r\n--b--\r\n"),
        (BOUNDARY, PART.replace(b"a.bin", b"\xff\xfe") + b"x\r\n--b--\r\n"),
        (BOUNDARY, b"--b\r\n" * 5000),
        (BOUNDARY, b"no parts"),
        (BOUNDARY, b""),
        (BOUNDARY + "x" * 200, PART + b"x\r\n--b--\r\n"),
        ("multipart/form-data", PART + b"x\r\n--b--\r\n"),
        ("multipart/form-data; boundary=", PART + b"x\r\n--b--\r\n"),
        ("multipart/mixed; boundary=b", PART + b"x\r\n--b--\r\n"),
        ("application/x-www-form-urlencoded", b"finish=1"),
        ("application/json", b"{}"),
        ("", b""),
    ],
)
def test_a_broken_form_is_refused_with_the_page(served: Served, kind: str, body: bytes) -> None:
    token = served.request_upload()["upload_token"]
    answer = served.ask("POST", f"/u/{token}", body, headers={"Content-Type": kind})
    assert answer.status == 400
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    info = served.ask("GET", f"/api/v1/uploads/{token}/info").form
    assert (info["status"], info["files"]) == ("pending", [])


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("name", ["../a", "..\\a", "a\0b", "C:\\a.bin", "a\u202eb"])
def test_a_form_can_name_no_place(served: Served, name: str) -> None:
    token = served.request_upload()["upload_token"]
    body = PART.replace(b"a.bin", name.replace("\\", "\\\\").encode()) + b"x\r\n--b--\r\n"
    answer = served.ask("POST", f"/u/{token}", body, headers={"Content-Type": BOUNDARY})
    assert answer.status in (400, 422)
