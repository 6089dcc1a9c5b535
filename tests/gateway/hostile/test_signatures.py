"""Signatures and tokens that are somebody's, somewhat like one, or once were good.

Whatever is wrong with a signature, the answer is that of a thing that is not there; only
who holds a genuine one is told that its time is over.
"""

from __future__ import annotations

import tempfile
import time
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import jwt
import pytest

from cas.config import Settings, StoreSettings
from cas.keys import Keys, load_keys
from cas.signing import DOWNLOAD, SLOT, Claim, Signer
from gateway.auth import CLOCK_SKEW_S
from tests.gateway.served import Answer, Served, serving

LATER = 4_102_444_800  # seconds: the year 2100
AGO = 1_577_836_800  # the year 2020
DATA = b"some bytes"


class Scene(NamedTuple):
    """What there is: the tokens of two uploads, and a stored file."""

    one: str
    two: str
    file_id: str
    filename: str
    keys: Keys

    def sign(self, *parts: Any, key: bytes | None = None) -> str:
        """The signature of a Claim of these parts, with a key of this server or another."""
        return Signer([key or self.keys.signing[-1]]).sign(Claim(*parts))


@pytest.fixture(scope="module")
def scene(served: Served) -> Scene:
    one, two = (served.request_upload(max_files=2)["upload_token"] for _ in range(2))
    file = served.ask("POST", "/api/v1/storage?filename=a.bin", DATA, token=served.admin).form
    keys = load_keys(Settings(store=StoreSettings(root=served.root)))
    return Scene(one, two, file["file_id"], "a.bin", keys)


def put(served: Served, token: str, signature: str, expires: object = LATER) -> Answer:
    query = urlencode({"expires": expires, "signature": signature, "filename": "a.bin"})
    return served.ask("PUT", f"/api/v1/uploads/{token}/files/0?{query}", DATA)


def get(
    served: Served, file_id: str, filename: str, signature: str, expires: int = LATER
) -> Answer:
    query = urlencode({"expires": expires, "signature": signature})
    return served.ask("GET", f"/d/{file_id}/{quote(filename, safe='')}?{query}")


def test_the_claims_below_are_good_but_for_what_is_changed(served: Served, scene: Scene) -> None:
    signature = scene.sign(SLOT, "PUT", (scene.one, "0"), LATER, (0,))
    assert put(served, scene.one, signature).status == 200
    signature = scene.sign(DOWNLOAD, "GET", (scene.file_id, scene.filename), LATER)
    assert get(served, scene.file_id, scene.filename, signature).body == DATA


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": DOWNLOAD},
        {"purpose": "receipt"},
        {"method": "GET"},
        {"method": "HEAD"},
        {"method": "DELETE"},
        {"method": "POST"},
        {"index": "1"},
        {"index": "00"},
        {"upload": "two"},
        {"expires": LATER + 1},
        {"expires": AGO},
        {"limits": (1,)},
        {"limits": ()},
        {"key": b"another key of thirty-two bytes!"},
        {"key": bytes(32)},
        {"key": "jwt"},
        {"key": "callbacks"},
    ],
    ids=str,
)
def test_a_signature_for_something_else_opens_no_slot(
    served: Served, scene: Scene, change: dict[str, Any]
) -> None:
    before = served.objects()
    key = change.get("key")
    signature = scene.sign(
        change.get("purpose", SLOT),
        change.get("method", "PUT"),
        (scene.two if "upload" in change else scene.one, change.get("index", "0")),
        change.get("expires", LATER),
        change.get("limits", (0,)),
        key=getattr(scene.keys, key) if isinstance(key, str) else key,
    )
    answer = put(served, scene.one, signature)
    assert (answer.status, answer.code) == (404, "not_found")
    assert served.objects() == before


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": SLOT},
        {"method": "PUT"},
        {"method": "DELETE"},
        {"file_id": "0" * 36},
        {"filename": "b.bin"},
        {"filename": "a.bin/../a.bin"},
        {"filename": ""},
        {"expires": LATER + 1},
        {"limits": (0,)},
        {"key": b"another key of thirty-two bytes!"},
    ],
    ids=str,
)
def test_a_signature_for_something_else_reads_no_file(
    served: Served, scene: Scene, change: dict[str, Any]
) -> None:
    signature = scene.sign(
        change.get("purpose", DOWNLOAD),
        change.get("method", "GET"),
        (change.get("file_id", scene.file_id), change.get("filename", scene.filename)),
        change.get("expires", LATER),
        change.get("limits", ()),
        key=change.get("key"),
    )
    answer = get(served, scene.file_id, scene.filename, signature)
    assert (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize(
    "changed",
    [
        lambda good: "",
        lambda good: good[:-1],
        lambda good: good + "=",
        lambda good: good + "A",
        lambda good: good.swapcase(),
        lambda good: good[::-1],
        lambda good: f" {good}",
        lambda good: f"{good}\n",
        lambda good: f"{good}\0",
        lambda good: good * 50,
        lambda good: "ä" * 43,
    ],
)
def test_nearly_a_signature_is_none(served: Served, scene: Scene, changed: Any) -> None:
    good = scene.sign(SLOT, "PUT", (scene.one, "0"), LATER, (0,))
    answer = put(served, scene.one, changed(good))
    assert (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize(
    "expires",
    ["", "0", f"0{LATER}", f"+{LATER}", f"-{LATER}", f"{LATER}.0", f"{LATER}e0", f" {LATER}",
     "٩" * 10, "9" * 12, "9" * 13, "9" * 4000, "NaN", "inf", f"{LATER},{LATER}"],
)  # fmt: skip
def test_another_way_to_write_the_time_is_another_time(
    served: Served, scene: Scene, expires: str
) -> None:
    signature = scene.sign(SLOT, "PUT", (scene.one, "0"), LATER, (0,))
    answer = put(served, scene.one, signature, expires)
    # What reads as the signed number is the signed number.
    assert (answer.status == 200) == (expires == f"0{LATER}")
    if answer.status != 200:
        assert (answer.status, answer.code) == (404, "not_found")


def test_only_a_genuine_link_is_told_that_it_is_over(served: Served, scene: Scene) -> None:
    genuine = scene.sign(SLOT, "PUT", (scene.one, "0"), AGO, (0,))
    answer = put(served, scene.one, genuine, AGO)
    assert (answer.status, answer.code) == (410, "link_expired")
    assert put(served, scene.one, "A" * 43, AGO).code == "not_found"
    genuine = scene.sign(DOWNLOAD, "GET", (scene.file_id, scene.filename), AGO)
    assert get(served, scene.file_id, scene.filename, genuine, AGO).code == "link_expired"


@pytest.mark.parametrize(
    "line",
    [
        {"Date": "Thu, 01 Jan 1970 00:00:00 GMT"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-HTTP-Method-Override": "GET"},
    ],
    ids=str,
)
def test_nothing_that_a_client_says_gives_a_link_more_time(
    served: Served, scene: Scene, line: dict[str, str]
) -> None:
    signature = scene.sign(DOWNLOAD, "GET", (scene.file_id, scene.filename), AGO)
    query = urlencode({"expires": AGO, "signature": signature})
    url = f"/d/{scene.file_id}/{scene.filename}?{query}"
    assert served.ask("GET", url, headers=line).code == "link_expired"


def test_a_replayed_link_does_no_more_than_it_did(served: Served, scene: Scene) -> None:
    """While the upload waits it replaces what it sent; afterwards it changes nothing."""
    asked = served.request_upload()
    token = asked["upload_token"]
    url = f"{asked['presigned_urls'][0]}&filename=a.bin"
    assert [served.ask("PUT", url, data).status for data in (b"one", b"two")] == [200, 200]
    assert served.ask("POST", f"/api/v1/uploads/{token}/complete").status == 200
    before = served.objects()
    late = served.ask("PUT", url, b"three")
    assert (late.status, late.code) == (409, "upload_closed")
    assert served.objects() == before
    empty = urlsplit(asked["presigned_urls"][0])
    assert served.ask("DELETE", f"{empty.path}?{empty.query}").code == "not_found"


def test_links_of_an_older_key_work_until_it_leaves_the_ring(disk_folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder:
        root = Path(folder)
        settings = Settings(store=StoreSettings(root=root))
        old = load_keys(settings).signing[-1]
        new, gone = b"n" * 32, b"g" * 32
        ring = root / "keys" / "signing"
        ring.write_bytes(b"\n".join(urlsafe_b64encode(key) for key in (old, new)) + b"\n")
        with serving(root) as served:
            token = served.token("admin")
            file = served.ask("POST", "/api/v1/storage?filename=a.bin", DATA, token=token).form
            claim = Claim(DOWNLOAD, "GET", (file["file_id"], "a.bin"), LATER)
            statuses = [
                get(served, file["file_id"], "a.bin", Signer([key]).sign(claim)).status
                for key in (old, new, gone)
            ]
            ref = quote(file["storage_ref"], safe="")
            made = served.ask("GET", f"/api/v1/storage/{ref}/url?expires_in=60", token=token).form
        assert statuses == [200, 200, 404]
        query = dict(part.split("=") for part in urlsplit(made["url"]).query.split("&"))
        claim = Claim(DOWNLOAD, "GET", (file["file_id"], "a.bin"), int(query["expires"]))
        assert query["signature"] == Signer([new]).sign(claim)


# --- tokens of the API


def bearer(scene: Scene, key: bytes | None = None, **claims: Any) -> str:
    said = {"tenant": "default", "sub": "ada", "permissions": ["admin"], "exp": LATER, **claims}
    return jwt.encode(said, key or scene.keys.jwt, "HS256")


@pytest.mark.parametrize(
    ("ahead_s", "status"), [(0, 200), (CLOCK_SKEW_S - 20, 200), (CLOCK_SKEW_S + 60, 401)]
)
@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_an_issuer_whose_clock_leads_is_believed_for_a_minute(
    served: Served, scene: Scene, claim: str, ahead_s: int, status: int
) -> None:
    token = bearer(scene, None, **{claim: int(time.time()) + ahead_s})
    assert served.ask("GET", "/api/v1/storage", token=token).status == status


def test_a_token_that_is_over_is_over(served: Served, scene: Scene) -> None:
    answer = served.ask("GET", "/api/v1/storage", token=bearer(scene, exp=int(time.time()) - 1))
    assert (answer.status, answer.code) == (401, "unauthorized")


@pytest.mark.parametrize("key", ["signing", "callbacks", "receipts"])
def test_no_other_key_of_the_store_makes_tokens(served: Served, scene: Scene, key: str) -> None:
    secret = getattr(scene.keys, key)
    token = bearer(scene, secret[-1] if isinstance(secret, tuple) else secret)
    assert served.ask("GET", "/api/v1/storage", token=token).code == "unauthorized"


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?access_token={}", {}),
        ("?token={}", {}),
        ("", {"Cookie": "Authorization=Bearer {}; token={}"}),
        ("", {"X-Authorization": "Bearer {}"}),
        ("", {"Proxy-Authorization": "Bearer {}"}),
        ("", {"Authorization": "Basic {}"}),
        ("", {"Authorization": "{}"}),
    ],
)
def test_a_token_counts_in_its_own_field_only(
    served: Served, query: str, headers: dict[str, str]
) -> None:
    filled = {name: text.replace("{}", served.admin) for name, text in headers.items()}
    url = f"/api/v1/storage{query.replace('{}', served.admin)}"
    answer = served.ask("GET", url, headers=filled)
    assert (answer.status, answer.code) == (401, "unauthorized")


# --- links lead where the request came to


@pytest.mark.parametrize(
    "line",
    [
        {"X-Forwarded-Host": "evil.example"},
        {"X-Forwarded-Proto": "https"},
        {"X-Forwarded-Ssl": "on"},
        {"X-Forwarded-Port": "666"},
        {"X-Forwarded-Prefix": "/evil"},
        {"X-Forwarded-For": "203.0.113.7"},
        {"X-Script-Name": "/evil"},
        {"Forwarded": "for=203.0.113.7;host=evil.example;proto=https"},
        {"X-Host": "evil.example"},
        {"Origin": "https://evil.example", "Referer": "https://evil.example/"},
    ],
    ids=str,
)
def test_links_lead_where_no_stranger_says(served: Served, line: dict[str, str]) -> None:
    asked = served.ask(
        "POST", "/api/v1/uploads", b'{"name": "n"}', token=served.admin, headers=line
    )
    assert asked.status == 201
    form = asked.form
    info = served.ask("GET", f"/api/v1/uploads/{form['upload_token']}/info", headers=line).form
    for url in (form["upload_url"], *form["presigned_urls"], *info["presigned_urls"]):
        assert url.startswith(f"{served.address}/")
