"""Names and addresses that deceive, escape or break what reads them.

A name is refused or kept exactly, never repaired: a repaired name could be another file's.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any
from urllib.parse import quote, unquote

import markupsafe
import pytest

from tests.gateway.hostile.raw import exchange
from tests.gateway.served import Served

DATA = b"known bytes"
DIGEST = hashlib.sha256(DATA).hexdigest()
KNOWN = f"uploads/default/direct/{DIGEST}.bin"


@pytest.fixture(scope="module", autouse=True)
def known(served: Served) -> dict[str, Any]:
    answer = served.ask("POST", "/api/v1/storage?filename=k.bin", DATA, token=served.admin)
    assert answer.form["storage_ref"] == f"hwy://{KNOWN}"
    return answer.form


# --- references


@pytest.mark.parametrize(
    "ref", [KNOWN, quote(KNOWN, safe=""), f"hwy://{KNOWN}", quote(f"hwy://{KNOWN}", safe=""),
            f"hwy:/{KNOWN}", KNOWN.replace("uploads", "%75ploads")],
)  # fmt: skip
def test_a_reference_is_found_however_it_was_encoded(served: Served, ref: str) -> None:
    assert served.ask("GET", f"/api/v1/storage/{ref}", token=served.admin).body == DATA


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "ref",
    [
        f"uploads/rival/../default/direct/{DIGEST}.bin",
        f"uploads/default/./direct/{DIGEST}.bin",
        f"uploads/default/%2e%2e/default/direct/{DIGEST}.bin",
        f"uploads/default/direct/x/../{DIGEST}.bin",
        f"uploads/default/%2e%2e/{DIGEST}.bin",
        f"uploads//default/direct/{DIGEST}.bin",
        f"/{KNOWN}",
        f"{KNOWN}/",
        f"{KNOWN}/../../../../etc/passwd",
        quote(quote(KNOWN, safe=""), safe=""),
        KNOWN.replace("/", "%5C"),
        KNOWN.replace("/", "%c0%af"),
        KNOWN.replace("/", "\u2215").replace("\u2215", "%E2%88%95"),
        f"{KNOWN}%00",
        f"{KNOWN}%00.txt",
        f"uploads/default%00/direct/{DIGEST}.bin",
        f"{KNOWN}%0d%0aX-Injected:%20a",
        f"uploads/d%C3%A9fault/direct/{DIGEST}.bin",
        f"uploads/%EF%BC%A4efault/direct/{DIGEST}.bin",
        f"uploads/default/direct/{DIGEST.upper()}.bin",
        f"uploads/default/direct/{DIGEST[:-1]}.bin",
        f"uploads/default/direct/{DIGEST}0.bin",
        f"uploads/default/direct/{DIGEST}",
        f"uploads/default/direct/{DIGEST}.",
        f"uploads/default/direct/{DIGEST}.bin.bin",
        f"uploads/default/direct/{DIGEST}.{'b' * 17}",
        f"uploads/{'d' * 129}/direct/{DIGEST}.bin",
        f"uploads/{'d' * 6000}/direct/{DIGEST}.bin",
        f"file://{KNOWN}",
        f"https://{KNOWN}",
        f"HWY://{KNOWN}",
        "%ff",
        "..",
        "%2e",
    ],
)
def test_what_is_not_one_reference_is_none(served: Served, ref: str, method: str) -> None:
    answer = served.ask(method, f"/api/v1/storage/{ref}", token=served.admin)
    assert (answer.status, answer.code) == (400, "invalid_reference")
    assert "x-injected" not in answer.headers


@pytest.mark.parametrize(
    ("verb", "status"), [("raw", 404), ("stat/..", 400), ("META", 400), ("url%00", 400)]
)
def test_an_unknown_verb_is_no_way_around(served: Served, verb: str, status: int) -> None:
    answer = served.ask("GET", f"/api/v1/storage/{KNOWN}/{verb}", token=served.admin)
    assert answer.status == status
    assert answer.code in ("not_found", "invalid_reference")


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/uploads/{t}/files/-1",
        "/api/v1/uploads/{t}/files/x",
        "/api/v1/uploads/{t}/files/99",
        "/api/v1/uploads/{t}/files/0/..",
        "/api/v1/uploads/{t}/files/%30%00",
        "/api/v1/uploads//info",
        "/api/v1/uploads/%00/info",
        "/api/v1/uploads/{t}%00/info",
        "/api/v1/uploads/{t}%20/info",
        "/api/v1/uploads/{t}/../{t}/info",
        "/u/%2e%2e",
        "/u/..%2f..",
        "/u/" + "a" * 4000,
        "/%ff",
        "/static/../../etc/passwd",
        "/static/x/..%2f..%2fapp.py",
        "/static/x/upload.html",
        "/keys/jwt",
        "/objects/",
        "/healthz/",
        "/HEALTHZ",
        "/healthz%00",
        "/healthz;a=b",
    ],
)
def test_odd_paths_lead_nowhere(served: Served, slot: str, path: str) -> None:
    token, query = slot.split("/")[4], slot.partition("?")[2]
    target = quote(path.format(t=token), safe="/%;.")
    for method in ("GET", "PUT"):
        answer = served.ask(method, f"{target}?{query}", b"x" * (method == "PUT"))
        assert answer.status in (400, 404, 405)
        assert b"root:" not in answer.body


# --- names of files

DECEIVING = [
    "a/b.pdf", "../a.pdf", "..\\a.pdf", "a\\b.pdf", "C:\\a.pdf", "nul\0.pdf", "line\nbreak",
    "a\r\nX-Injected: b", "tab\tname", "del\x7f", "\x85next", ".", "..", "photo\u202egpj.exe",
    "\u2066a\u2069", "\u200fa", "zero\u200bwidth", "\ufeffbom", "\u2028line", "soft\u00adhyphen",
    " lead", "trail ", "\u00a0lead", "trail\u3000", "a" * 256, "a" * 4096, "ä" * 256,
]  # fmt: skip
KEPT = [
    "Übersicht – Straße.pdf", unicodedata.normalize("NFD", "Übersicht.pdf"), "报告.pdf",
    "a b+c&d=e.pdf", "100%.pdf", "%2e%2e%2fa.pdf", "\u0646\u200c\u0647.png", "דוח שנתי.pdf",
    "👩\u200d👩\u200d👧.jpg", "🏳️\u200d🌈.png", "z̸̢͎a̷.txt", "ﬁle.txt", "a'b\"c`d$(e).txt",
    "<script>alert(1)", "{{7*7}}", "a;b.txt", "-rf", ".hidden", "CON", "nul.txt", "a.",
    "=cmd|'a'!A1.csv", "a" * 255, "😀" * 255,
]  # fmt: skip


def test_the_two_forms_of_one_letter_are_two_names() -> None:
    """The table above holds both, so that keeping them apart is tried."""
    assert unicodedata.normalize("NFC", KEPT[1]) != KEPT[1]


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("name", DECEIVING)
def test_names_that_could_deceive_or_escape_are_refused(
    served: Served, slot: str, name: str
) -> None:
    sent = served.ask("PUT", f"{slot}&filename={quote(name)}", b"x")
    assert (sent.status, sent.code) == (400, "invalid_name")
    assert sent.form["reason"]
    for field in ("name", "filename"):
        url = f"/api/v1/storage?{field}={quote(name)}"
        assert served.ask("POST", url, b"x", token=served.admin).code == "invalid_name"


@pytest.mark.usefixtures("nothing_kept")
def test_a_name_longer_than_an_address_is_refused(served: Served, slot: str) -> None:
    line = f"PUT {slot}&filename={'a' * 9000} HTTP/1.1\r\n"
    (reply,) = exchange(served, f"{line}Host: a\r\nContent-Length: 1\r\n\r\nx".encode())
    assert (reply.status, reply.code) == (414, "uri_too_long")


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("coded", ["%ff%fe", "%c0%ae%c0%ae", "%ed%a0%80", "a%f0%9f%98"])
def test_names_that_are_no_text_are_never_stored_as_they_are(served: Served, coded: str) -> None:
    url = f"/api/v1/storage?name=n&filename={coded}"
    answer = served.ask("POST", url, DATA, token=served.admin)
    if answer.status == 201:  # read with a mark in place of what is no text
        assert "\ufffd" in answer.form["filename"] or answer.form["filename"] == "k.bin"
    else:
        assert (answer.status, answer.code) == (400, "invalid_name")


@pytest.mark.parametrize("name", KEPT)
def test_names_of_the_world_are_kept_exactly(served: Served, name: str) -> None:
    """From the slot over completion to the header of the download."""
    asked = served.request_upload()
    link = f"/api/v1/uploads/{asked['upload_token']}"
    url = f"{asked['presigned_urls'][0]}&filename={quote(name, safe='')}"
    data = name.encode()
    sent = served.ask("PUT", url, data)
    assert (sent.status, sent.form["filename"]) == (200, name)
    assert served.ask("GET", f"{link}/info").form["files"][0]["filename"] == name
    assert served.ask("GET", f"/u/{asked['upload_token']}").status == 200
    done = served.ask("POST", f"{link}/complete").form["files"][0]
    assert done["filename"] == name
    ref = quote(done["storage_ref"], safe="")
    made = served.ask("GET", f"/api/v1/storage/{ref}/url", token=served.admin).form["url"]
    got = served.ask("GET", made)
    assert (got.status, got.body) == (200, data)
    exact = got.headers["content-disposition"].rpartition("filename*=UTF-8''")[2]
    assert unquote(exact, errors="strict") == name
    assert got.headers["content-disposition"].isascii()


@pytest.mark.parametrize("name", ["<script>alert(1)", "\"onload='x'", "{{7*7}}", "&lt;"])
def test_a_name_is_only_text_on_the_page(served: Served, name: str) -> None:
    asked = served.request_upload(name=name, prompt=name)
    url = f"{asked['presigned_urls'][0]}&filename={quote(name, safe='')}"
    assert served.ask("PUT", url, b"x").status == 200
    page = served.ask("GET", f"/u/{asked['upload_token']}")
    assert b"<script>alert" not in page.body
    assert str(markupsafe.escape(name)) in page.body.decode()
    assert "script-src 'self'" in page.headers["content-security-policy"]
