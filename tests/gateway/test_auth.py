"""Bearer tokens: whose are believed, for what, and for how long; and what they open."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from falcon.inspect import inspect_routes
from hypothesis import given, settings
from hypothesis import strategies as st

from cas.clock import SECOND_US
from cas.config import Settings, StoreSettings
from cas.keys import load_keys
from cas.store import Store
from gateway.app import create_app
from gateway.auth import CLOCK_SKEW_S, PERMISSIONS, Tokens
from gateway.errors import Unauthorized
from gateway.issuers import IssuerKey, Issuers, keys_of_jwks, keys_of_pem
from tests.clocks import START_US, HandClock
from tests.gateway.publishers import (
    CLAIMS,
    Publisher,
    ed_key,
    jwk,
    jwks,
    pem,
    publishing,
    rsa_key,
    token,
)
from tests.gateway.served import Served, serving

SECRET = b"s" * 32
RSA, ED, STRANGER = rsa_key("a"), ed_key("a"), ed_key("stranger")
FORMER, LATTER = ed_key("former"), ed_key("latter")
NOW_S = START_US // SECOND_US


class Fixed:
    """A source whose list never changes."""

    def __init__(self, *found: tuple[IssuerKey, ...]) -> None:
        self._keys = tuple(key for keys in found for key in keys)

    def known(self) -> tuple[IssuerKey, ...]:
        return self._keys

    def learn(self) -> None:
        pass


LISTED = Fixed(keys_of_jwks(jwks(jwk(RSA, "r1"), jwk(ED, "e1"))))


def reader(clock: HandClock, *sources: Fixed, issuer: str = "", audience: str = "") -> Tokens:
    issuers = Issuers(sources or (LISTED,), issuer=issuer, audience=audience)
    return Tokens(SECRET, clock.now_us, issuers)


def segment(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def hmac_token(header: dict[str, Any], secret: bytes, claims: object = CLAIMS) -> str:
    """Made without a library that would refuse to make it."""
    signed = f"{segment(header)}.{segment(claims)}"
    return f"{signed}.{segment(hmac.digest(secret, signed.encode(), 'sha256'))}"


# --- who is believed


@pytest.mark.parametrize(
    "good",
    [
        jwt.encode(dict(CLAIMS), SECRET, "HS256"),
        token(RSA, "r1"),
        token(ED, "e1"),
        token(RSA),
        token(ED),
    ],
)
def test_each_algorithm_opens_with_its_own_key(clock: HandClock, good: str) -> None:
    caller = reader(clock).read(good)
    assert (caller.tenant_id, caller.actor) == ("t", "ann")
    assert caller.may("admin")


def test_a_key_of_a_pem_file_counts_under_any_identifier(clock: HandClock) -> None:
    tokens = reader(clock, Fixed(keys_of_pem(pem(RSA) + pem(ED))))
    for made in (token(RSA), token(RSA, "whatever"), token(ED, "x")):
        assert tokens.read(made).tenant_id == "t"


PUBLIC = pem(RSA)
FORGED = {
    "a stranger's key": token(STRANGER),
    "a stranger's key under a known identifier": token(STRANGER, "e1"),
    "an identifier of another key": token(ED, "r1"),
    "an identifier nobody has": token(ED, "e2"),
    "none": jwt.encode(dict(CLAIMS), "", "none"),
    "none, in another case": f"{segment({'alg': 'nOnE'})}.{segment(CLAIMS)}.",
    "the public key as a secret": hmac_token({"alg": "HS256"}, PUBLIC),
    "the public key as a secret, named": hmac_token({"alg": "HS256", "kid": "r1"}, PUBLIC),
    "the raw public key as a secret": hmac_token(
        {"alg": "HS256", "kid": "e1"}, ED.public_key().public_bytes_raw()
    ),
    "the modulus as a secret": hmac_token(
        {"alg": "HS256"}, RSA.public_key().public_numbers().n.to_bytes(256)
    ),
    "our secret under RS256": hmac_token({"alg": "RS256", "kid": "r1"}, SECRET),
    "our secret under EdDSA": hmac_token({"alg": "EdDSA", "kid": "e1"}, SECRET),
    "our secret under HS512": jwt.encode(dict(CLAIMS), SECRET * 2, "HS512"),
    "another hash of a known key": jwt.encode(dict(CLAIMS), RSA, "RS512", {"kid": "r1"}),
    "another padding of a known key": jwt.encode(dict(CLAIMS), RSA, "PS256", {"kid": "r1"}),
    "a key of its own in the header": jwt.encode(
        dict(CLAIMS), STRANGER, "EdDSA", {"jwk": jwk(STRANGER, "e1"), "kid": "e1"}
    ),
    "an address of keys in the header": jwt.encode(
        dict(CLAIMS), STRANGER, "EdDSA", {"jku": "http://127.0.0.1:1/", "kid": "e9"}
    ),
    "something critical": hmac_token({"alg": "HS256", "crit": ["exp"], "exp": 1}, SECRET),
    "an unencoded payload": hmac_token({"alg": "HS256", "crit": ["b64"], "b64": True}, SECRET),
    "nothing critical": hmac_token({"alg": "HS256", "crit": []}, SECRET),
    "no algorithm": hmac_token({}, SECRET),
    "a list of algorithms": hmac_token({"alg": ["HS256"]}, SECRET),
    "an identifier that is no text": hmac_token({"alg": "HS256", "kid": 5}, SECRET),
    "a header that is no object": f"{segment([])}.{segment(CLAIMS)}.AAAA",
    "claims that are no object": hmac_token({"alg": "HS256"}, SECRET, [1]),
    "claims too deep": hmac_token({"alg": "HS256"}, SECRET, b"[" * 5000),
    "too long": token(ED, "e1", padding="x" * 9000),
    "no signature": token(ED, "e1").rpartition(".")[0],
    "an empty signature": token(ED, "e1").rpartition(".")[0] + ".",
    "two tokens": token(ED, "e1") + "." + token(ED, "e1"),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_token_is_refused(clock: HandClock, how: str) -> None:
    with pytest.raises(Unauthorized):
        reader(clock).read(FORGED[how])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("made", [token(RSA, "r1"), token(ED, "e1")])
def test_a_changed_token_is_refused(clock: HandClock, made: str, part: int) -> None:
    parts = made.split(".")
    middle = len(parts[part]) // 2
    for changed in "Ab0":
        text = parts[part]
        if text[middle] == changed:
            continue
        other = [*parts[:part], text[:middle] + changed + text[middle + 1 :], *parts[part + 1 :]]
        with pytest.raises(Unauthorized):
            reader(clock).read(".".join(other))


def test_without_public_keys_only_the_secret_counts(clock: HandClock) -> None:
    tokens = Tokens(SECRET, clock.now_us)
    for made in (token(RSA, "r1"), token(ED), token(RSA)):
        with pytest.raises(Unauthorized):
            tokens.read(made)


# --- what it says


@pytest.mark.parametrize(
    "claims",
    [
        {"permissions": "admin"},
        {"permissions": {"admin": True}},
        {"permissions": ["admin", 5]},
        {"permissions": [["admin"]]},
        {"tenant": None},
        {"tenant": ["t"]},
        {"tenant": "../t"},
        {"tenant": ""},
        {"sub": None},
        {"sub": 5},
        {"sub": "a\nb"},
        {"sub": "upload:0198"},
        {"sub": "approval:0198"},
        {"sub": "webhook:0198"},
        {"sub": "run:0198"},
        {"exp": None},
        {"exp": "4000000000"},
        {"exp": True},
        {"nbf": "now"},
        {"iat": [1]},
        {"aud": 5},
        {"iss": 5},
    ],
)
def test_claims_of_other_types_are_refused(clock: HandClock, claims: dict[str, Any]) -> None:
    said = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not None}
    with pytest.raises(Unauthorized):
        reader(clock).read(hmac_token({"alg": "HS256"}, SECRET, said))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_time_that_is_no_number_never_passes_for_a_late_one(
    clock: HandClock, number: str
) -> None:
    claims = json.dumps(dict(CLAIMS)).replace("4000000000.0", number).encode()
    assert number.encode() in claims
    with pytest.raises(Unauthorized):
        reader(clock).read(hmac_token({"alg": "HS256"}, SECRET, claims))


def test_no_permissions_are_none(clock: HandClock) -> None:
    caller = reader(clock).read(token(ED, "e1", permissions=None))
    assert not any(caller.may(permission) for permission in PERMISSIONS)


def test_issuer_and_audience_must_be_the_wanted_ones(clock: HandClock) -> None:
    tokens = reader(clock, issuer="https://id.example", audience="blobcask")
    for audience in ("blobcask", ["other", "blobcask"]):
        good = token(ED, "e1", iss="https://id.example", aud=audience)
        assert tokens.read(good).tenant_id == "t"
    for iss, aud in (
        (None, "blobcask"),
        ("https://id.example/", "blobcask"),
        ("https://id.example", None),
        ("https://id.example", "blobcask2"),
        ("https://id.example", ["other"]),
        ("https://id.example", []),
    ):
        with pytest.raises(Unauthorized):
            tokens.read(token(ED, "e1", iss=iss, aud=aud))
    ours = tokens.issue("t", "ann", ("admin",), 60)
    assert tokens.read(ours).tenant_id == "t", "our own need neither"


# --- for how long


def test_a_token_ends_on_the_second_and_begins_within_the_skew(clock: HandClock) -> None:
    tokens = reader(clock)
    tokens.read(token(ED, "e1", exp=NOW_S + 1))
    for over in (NOW_S, NOW_S - 1, NOW_S - CLOCK_SKEW_S + 1):
        with pytest.raises(Unauthorized):
            tokens.read(token(ED, "e1", exp=over))
    for name in ("nbf", "iat"):
        tokens.read(token(ED, "e1", **{name: NOW_S + CLOCK_SKEW_S}))
        with pytest.raises(Unauthorized):
            tokens.read(token(ED, "e1", **{name: NOW_S + CLOCK_SKEW_S + 1}))


# --- nothing is a fault of the server

TOKENS = Tokens(SECRET, lambda: START_US, Issuers((LISTED,)))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@given(st.text() | st.from_regex(r"[\w-]+\.[\w-]*\.[\w-]*", fullmatch=True))
def test_any_text_is_refused_and_no_more(text: str) -> None:
    with pytest.raises(Unauthorized):
        TOKENS.read(text)


@given(st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64"]), JSON_VALUES))
def test_any_header_is_refused_and_no_more(header: dict[str, Any]) -> None:
    for alg in ("HS256", "RS256", "EdDSA", None):
        said = {**header, "alg": alg} if alg else header
        with pytest.raises(Unauthorized):
            TOKENS.read(hmac_token(said, b"guessed" * 5))


NAMES = st.sampled_from(["tenant", "sub", "exp", "nbf", "iat", "permissions", "aud", "iss"])


@given(st.dictionaries(NAMES, JSON_VALUES) | JSON_VALUES)
def test_any_signed_claims_are_read_or_refused(claims: Any) -> None:
    for made in ({**CLAIMS, **claims} if isinstance(claims, dict) else claims, claims):
        try:
            TOKENS.read(hmac_token({"alg": "HS256"}, SECRET, made))
        except Unauthorized:
            pass


# --- at a real server


@pytest.fixture(scope="module")
def publisher() -> Iterator[Publisher]:
    with publishing(jwks(jwk(RSA, "r1"))) as found:
        yield found


@pytest.fixture(scope="module")
def served(disk_folder: Path, publisher: Publisher) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder:
        keys = Path(folder) / "issuers.pem"
        keys.write_bytes(pem(ED))
        (Path(folder) / "jwks.json").write_bytes(jwks(jwk(FORMER, "former")))
        with serving(
            Path(folder) / "root",
            AUTH__JWKS_URL=publisher.url,
            AUTH__PUBLIC_KEYS=str(keys),
            AUTH__JWKS_FILE=str(Path(folder) / "jwks.json"),
            AUTH__AUDIENCE="blobcask",
            GATEWAY__WORKERS="1",
        ) as server:
            yield server


def test_a_server_believes_its_issuers_and_tells_why_not(served: Served) -> None:
    for made in (token(RSA, "r1", aud="blobcask"), token(ED, aud="blobcask"), served.admin):
        assert served.ask("GET", "/api/v1/storage", token=made).status == 200
    for made in (token(RSA, "r1"), token(STRANGER, aud="blobcask"), "x.y.z", FORGED["none"]):
        refused = served.ask("GET", "/api/v1/storage", token=made)
        assert (refused.status, refused.code) == (401, "unauthorized")
        assert refused.headers["www-authenticate"].startswith("Bearer")


@settings(max_examples=60)
@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f")))
def test_whatever_stands_in_the_header_is_the_clients_fault(served: Served, text: str) -> None:
    for value in (text, f"Bearer {text}", f"bearer\t{text}", f"Bearer {text}.{text}.{text}"):
        answer = served.ask("GET", "/api/v1/storage", headers={"Authorization": value})
        assert answer.status in (400, 401)


def test_a_running_server_follows_the_file_of_its_keys(served: Served) -> None:
    former, latter = token(FORMER, "former", aud="blobcask"), token(LATTER, "new", aud="blobcask")

    def statuses() -> list[int]:
        path = "/api/v1/storage"
        return [served.ask("GET", path, token=made).status for made in (former, latter)]

    assert statuses() == [200, 401]
    path = served.root.parent / "jwks.json"
    path.with_suffix(".new").write_bytes(jwks(jwk(LATTER, "new")))
    path.with_suffix(".new").replace(path)
    assert statuses() == [401, 200]


def test_a_key_file_that_is_no_use_stops_the_start(disk_folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder:
        path = Path(folder) / "keys.json"
        path.write_text('{"keys": []}')
        with (
            pytest.raises(AssertionError, match=r"\[auth\] jwks_file"),
            serving(Path(folder) / "root", AUTH__JWKS_FILE=str(path)),
        ):
            pass


# --- what a token opens: every route, with what is a foreign tenant's


@pytest.fixture(scope="module")
def foreign(served: Served) -> dict[str, str]:
    """What tenant `default` has: an upload, a stored file."""
    made = served.request_upload()
    sent = served.ask("POST", "/api/v1/storage?name=a.txt", b"hello", token=served.admin)
    assert sent.status == 201
    return {
        "upload": made["upload_token"],
        "ref": sent.form["storage_ref"].partition("://")[2],
    }


UNKNOWN = {
    "upload": "Zz9zZz9z",
    "ref": f"uploads/default/direct/{hashlib.sha256(b'other').hexdigest()}.txt",
}
# (method, path, permission to change or see it)
ROUTES = [
    ("GET", "/api/v1/uploads/{upload}", "view_uploads"),
    ("POST", "/api/v1/uploads/{upload}/cancel", "manage_uploads"),
    ("GET", "/api/v1/storage/{ref}", "view_storage"),
    ("HEAD", "/api/v1/storage/{ref}", "view_storage"),
    ("GET", "/api/v1/storage/{ref}/stat", "view_storage"),
    ("GET", "/api/v1/storage/{ref}/meta", "view_storage"),
    ("GET", "/api/v1/storage/{ref}/url", "view_storage"),
    ("DELETE", "/api/v1/storage/{ref}", "manage_storage"),
    ("PUT", "/api/v1/storage/{ref}/hold", "manage_storage"),
    ("DELETE", "/api/v1/storage/{ref}/hold", "manage_storage"),
]


# Every other route, and what opens it: a new one must be put into one of the two tables.
OTHER_RIGHTS = {
    "/api/v1/uploads": "a bearer token; lists and makes one's own",
    "/api/v1/storage": "a bearer token; lists and makes one's own",
    "/api/v1/uploads/{token}/info": "the upload's token",
    "/api/v1/uploads/{token}/complete": "the upload's token",
    "/api/v1/uploads/{token}/receipt": "the upload's token",
    "/api/v1/uploads/{token}/tus": "the upload's token",
    "/api/v1/uploads/{token}/tus/": "the upload's token",
    "/api/v1/uploads/{token}/tus/{partial_id}": "the upload's token",
    "/u/{token}": "the upload's token",
    "/api/v1/uploads/{token}/files/{index:int(min=0, max=99999)}": "a signature",
    "/d/{file_id}/{filename}": "a signature",
    "/api/v1/approvals": "a bearer token; lists and makes one's own",
    "/api/v1/approvals/{approval_id}": "a bearer token; one's own, see test_approvals",
    "/api/v1/approvals/{approval_id}/cancel": "a bearer token; one's own, see test_approvals",
    "/api/v1/approvals/{approval_id}/respond": "a signature",
    "/api/v1/events/{tenant_id}": "a bearer token of this tenant, see test_events",
    "/api/v1/events/{tenant_id}/wait": "a bearer token of this tenant, see test_events",
    "/api/v1/webhooks": "a bearer token; lists and makes one's own",
    "/api/v1/webhooks/{webhook_id}": "a bearer token; to call it, a signature, see test_webhooks",
    "/api/v1/workflows": "a bearer token; lists and makes one's own",
    "/api/v1/workflows/{run_id}": "a bearer token; one's own, see test_workflows",
    "/api/v1/workflows/{run_id}/cancel": "a bearer token; one's own, see test_workflows",
    "/api/v1/workflows/{run_id}/steps": "a bearer token; one's own, see test_workflows",
    "/api/v1/workflows/{run_id}/steps/{step_id}": "a bearer token; one's own, see test_workflows",
    "/api/v1/workflows/{run_id}/steps/{step_id}/result": "the same",
    "/api/v1/receipts/keys": "nothing: public",
    "/static/{version}/{name}": "nothing: public",
    "/healthz": "nothing: tells of no tenant",
    "/readyz": "nothing: tells of no tenant",
    "/metrics": "the address; tells of no tenant",
    "/api/v1/openapi.json": "nothing: public",
    "/docs": "nothing: public",
}


def test_every_route_says_what_opens_it(root: Path) -> None:
    chosen = Settings(store=StoreSettings(root=root))
    keys = load_keys(chosen)
    with Store.open(root, chosen) as store:
        routes = inspect_routes(create_app(store, chosen, keys))
    walked = {"/api/v1/uploads/{token}", "/api/v1/uploads/{token}/cancel"}
    walked.add("/api/v1/storage/{rest:path}")
    assert {route.path for route in routes} - walked - set(OTHER_RIGHTS) == set()


@pytest.mark.parametrize(("method", "path", "permission"), ROUTES)
def test_what_is_anothers_is_answered_as_what_is_not_there(
    served: Served, foreign: dict[str, str], method: str, path: str, permission: str
) -> None:
    spy = token(ED, aud="blobcask", tenant="spy", sub="spy")
    answers = [
        served.ask(method, path.format(**names), token=spy, headers={"X-Request-Id": "same"})
        for names in (foreign, UNKNOWN)
    ]
    assert [answer.status for answer in answers] == [404, 404]
    told = [(answer.body, {**answer.headers, "date": ""}) for answer in answers]
    assert told[0] == told[1]


@pytest.mark.parametrize(("method", "path", "permission"), ROUTES)
def test_what_may_not_be_seen_is_not_there_and_what_may_not_be_changed_is_forbidden(
    served: Served, foreign: dict[str, str], method: str, path: str, permission: str
) -> None:
    blind = token(ED, aud="blobcask", tenant="default", permissions=["emit_events"])
    assert served.ask(method, path.format(**foreign), token=blind).status == 404
    viewer = token(
        ED, aud="blobcask", tenant="default", permissions=["view_uploads", "view_storage"]
    )
    if permission.startswith("manage"):
        for names in (foreign, UNKNOWN):  # told before anything is looked up
            refused = served.ask(method, path.format(**names), token=viewer)
            assert (refused.status, refused.code) == (403, "permission_missing")
    else:
        assert served.ask(method, path.format(**foreign), token=viewer).status == 200


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/v1/uploads"), ("GET", "/api/v1/storage")]
)
def test_a_listing_holds_ones_own_only(
    served: Served, foreign: dict[str, str], method: str, path: str
) -> None:
    spy = token(ED, aud="blobcask", tenant="spy")
    listed = served.ask(method, path, token=spy).form
    assert [value for value in listed.values() if value] == []
    blind = token(ED, aud="blobcask", permissions=["emit_events"])
    assert served.ask(method, path, token=blind).status == 403
    assert served.ask("POST", path, b"{}", token=blind).status == 403
