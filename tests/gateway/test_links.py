"""Signed URLs as they are handed out: what each opens, for how long, and nothing else."""

from __future__ import annotations

import dataclasses
from urllib.parse import parse_qsl, urlencode, urlsplit

import falcon
import msgspec
import pytest
from falcon.testing import create_req

from cas.clock import HOUR_US, SECOND_US
from cas.config import Duration, GatewaySettings, Url
from cas.errors import BadSignature, LinkExpired
from cas.records import PENDING, PendingUpload
from cas.signing import Signer
from gateway.links import Links
from tests.clocks import START_US, HandClock
from tests.gateway.served import Served

UPLOAD = PendingUpload(
    upload_id="id",
    upload_token="Xk9mP2qR",
    tenant_id="t",
    workflow_run_id="direct",
    event_name="upload_id",
    name="papers",
    allowed_types=[],
    max_size_bytes=50,
    max_files=1000,
    prompt="",
    status=PENDING,
    retention_policy="days:1",
    callback_url=None,
    redirect_url=None,
    created_at=START_US,
    created_by="ann",
    expires_at=START_US + 24 * HOUR_US,
)
SETTINGS = GatewaySettings(public_url=Url("https://a.example"), url_expiry=Duration(HOUR_US))
ANY = create_req()


@dataclasses.dataclass
class Counted:
    """A clock that counts how often it is read."""

    clock: HandClock
    reads: int = 0

    def __call__(self) -> int:
        self.reads += 1
        return self.clock.time_us


@pytest.fixture
def links(clock: HandClock) -> Links:
    return Links(Signer([b"k" * 32]), Counted(clock), SETTINGS)


def request(url: str, method: str, **query: str) -> falcon.Request:
    parts = urlsplit(url)
    said = {**dict(parse_qsl(parts.query)), **query}
    return create_req(path=parts.path, method=method, query_string=urlencode(said))


def test_the_urls_of_a_thousand_slots_read_the_time_once(clock: HandClock) -> None:
    counted = Counted(clock)
    urls = Links(Signer([b"k" * 32]), counted, SETTINGS).slots(ANY, UPLOAD)
    assert len(set(urls)) == 1000
    assert counted.reads == 1


def test_a_url_opens_its_slot_until_its_time_is_over(links: Links, clock: HandClock) -> None:
    url = links.slots(ANY, UPLOAD)[7]
    assert url.startswith("https://a.example/api/v1/uploads/Xk9mP2qR/files/7?")
    links.check_slot(request(url, "PUT"), UPLOAD, 7)
    links.check_slot(request(url, "PUT"), UPLOAD, 7)  # again: a slot may be replaced
    clock.advance(HOUR_US - SECOND_US)
    links.check_slot(request(url, "PUT"), UPLOAD, 7)
    clock.advance(SECOND_US)
    with pytest.raises(LinkExpired):
        links.check_slot(request(url, "PUT"), UPLOAD, 7)


def test_no_url_outlives_its_upload(links: Links, clock: HandClock) -> None:
    clock.time_us = UPLOAD.expires_at - 10 * SECOND_US
    url = links.slots(ANY, UPLOAD)[0]
    assert dict(parse_qsl(urlsplit(url).query))["expires"] == str(UPLOAD.expires_at // SECOND_US)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "PATCH"])
def test_a_url_to_put_is_good_for_no_other_method(links: Links, method: str) -> None:
    url = links.slots(ANY, UPLOAD)[0]
    with pytest.raises(BadSignature):
        links.check_slot(request(url, method), UPLOAD, 0)
    delete = links.slot(ANY, UPLOAD, 0, "DELETE")
    links.check_slot(request(delete, "DELETE"), UPLOAD, 0)
    with pytest.raises(BadSignature):
        links.check_slot(request(delete, "PUT"), UPLOAD, 0)


@pytest.mark.parametrize(
    "changed",
    [{"upload_token": "Xk9mP2qS"}, {"max_size_bytes": 51}, {"max_size_bytes": 0}],
)
def test_a_url_is_good_for_no_other_upload_and_no_other_limit(
    links: Links, changed: dict[str, object]
) -> None:
    url = links.slots(ANY, UPLOAD)[0]
    other = msgspec.structs.replace(UPLOAD, **changed)
    with pytest.raises(BadSignature):
        links.check_slot(request(url, "PUT"), other, 0)
    with pytest.raises(BadSignature):
        links.check_slot(request(url, "PUT"), UPLOAD, 1)


@pytest.mark.parametrize(
    "query",
    [
        {"expires": "99999999999"},
        {"expires": "9999999999999"},
        {"expires": ""},
        {"expires": "-1"},
        {"expires": "1e9"},
        {"expires": "١"},
        {"expires": "0x10"},
        {"signature": ""},
        {"signature": "A" * 43},
        {"signature": "\x00"},
    ],
)
def test_a_changed_url_opens_nothing(links: Links, query: dict[str, str]) -> None:
    url = links.slots(ANY, UPLOAD)[0]
    with pytest.raises(BadSignature):
        links.check_slot(request(url, "PUT", **query), UPLOAD, 0)


def test_a_forger_is_told_the_same_as_who_asks_for_nothing(served: Served) -> None:
    """Body and all headers alike, whether upload, slot or signature is made up."""
    mine, others = (served.request_upload(max_files=2) for _ in range(2))
    path, _, query = mine["presigned_urls"][0].partition("?")
    foreign = others["presigned_urls"][0].partition("?")[2]
    unknown = path.replace(mine["upload_token"], "Zz9zZz9z")
    told = [
        served.ask(method, url, b"x", headers={"X-Request-Id": "same"})
        for method, url in (
            ("PUT", f"{unknown}?{query}"),
            ("PUT", f"{path}?{foreign}"),
            ("PUT", f"{path[:-1]}1?{query}"),
            ("PUT", f"{path}?{query[:-1]}"),
            ("PUT", path),
            ("DELETE", f"{path}?{query}"),
        )
    ]
    assert [answer.code for answer in told] == ["not_found"] * 6
    assert len({answer.body for answer in told}) == 1
    assert len({str({**answer.headers, "date": ""}) for answer in told}) == 1


def test_a_url_of_a_completed_upload_changes_nothing_any_more(served: Served) -> None:
    upload = served.request_upload()
    url = upload["presigned_urls"][0]
    assert served.ask("PUT", url, b"first").status == 200
    assert served.ask("PUT", url, b"second").status == 200, "replaced, while it is pending"
    complete = f"/api/v1/uploads/{upload['upload_token']}/complete"
    done = served.ask("POST", complete, b"").form
    replayed = served.ask("PUT", url, b"third")
    assert (replayed.status, replayed.code) == (409, "upload_closed")
    assert served.ask("POST", complete, b"").form["files"] == done["files"]


def test_a_url_to_get_admits_head_and_no_more(served: Served) -> None:
    stored = served.ask("POST", "/api/v1/storage?name=x", b"bytes", token=served.admin).form
    ref = stored["storage_ref"].partition("://")[2]
    url = served.ask("GET", f"/api/v1/storage/{ref}/url", token=served.admin).form["url"]
    head = served.ask("HEAD", url)
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "5")
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        assert served.ask(method, url, b"").status == 405
    assert served.ask("GET", url).body == b"bytes"
