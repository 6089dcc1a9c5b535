"""Where public keys come from: what is accepted, how they are rotated, what a flood costs."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from cas.config import AuthSettings, Url
from cas.errors import InvalidSetting
from gateway.issuers import (
    EDDSA,
    JWKS_BYTES_MAX,
    RETRY_S,
    RS256,
    STALE_S_MAX,
    IssuerKey,
    Issuers,
    JwksFile,
    JwksUrl,
    keys_of_jwks,
    keys_of_pem,
)
from gateway.pool import Pool
from tests.gateway.publishers import Publisher, ed_key, jwk, jwks, pem, publishing, rsa_key

OLD, NEW = ed_key("old"), ed_key("new")
TURN_S = 60.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no publisher that is too slow."""
    monkeypatch.setattr("gateway.issuers.FETCH_S", 2 * TURN_S)


class Seconds:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def kids(found: tuple[IssuerKey, ...]) -> list[str | None]:
    return [key.kid for key in found]


# --- what is accepted


def test_a_pem_file_holds_several_keys_each_bound_to_its_algorithm() -> None:
    found = keys_of_pem(b"a comment\n" + pem(rsa_key("a")) + pem(OLD))
    assert [key.algorithm for key in found] == [RS256, EDDSA]


def test_a_pem_file_with_anything_else_is_refused() -> None:
    private = OLD.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    other = curve.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for data, reason in (
        (private, "PRIVATE KEY"),
        (pem(OLD) + other, "Ed25519"),
        (pem(rsa_key("short", 1024)), "2048"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", None),
    ):
        with pytest.raises(ValueError, match=reason):
            keys_of_pem(data)


@pytest.mark.parametrize(
    "entry",
    [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "k"},
        {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"},
        jwk(OLD, "k", alg="RS256"),
        jwk(rsa_key("a"), "k", alg="RS512"),
        jwk(rsa_key("a"), "k", alg="HS256"),
        jwk(rsa_key("a"), "k", alg="none"),
        jwk(rsa_key("a"), "k", alg=["RS256"]),
        jwk(rsa_key("a"), "k", use="enc"),
        jwk(OLD, "k", d="AAAA"),
        jwk(OLD, "k", x=5),
        jwk(OLD, "k", crv="Ed448"),
        {**jwk(OLD, None), "kid": 7},
        jwk(rsa_key("short", 1024), "k"),
        {"kty": ["RSA"]},
        {},
    ],
)
def test_other_keys_of_a_list_are_passed_over(entry: dict[str, Any]) -> None:
    assert kids(keys_of_jwks(jwks(entry, jwk(NEW, "good")))) == ["good"]


_WORDS = st.sampled_from(["kty", "alg", "kid", "n", "e", "x", "crv", "use", "keys"])
_VALUES = st.sampled_from(["RSA", "OKP", "Ed25519", "RS256", "AQAB", "", "x", None, 7, True])


@given(
    st.recursive(
        _VALUES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner),
        max_leaves=12,
    )
)
def test_a_strange_list_is_refused_or_passed_over(found: Any) -> None:
    for data in (json.dumps(found).encode(), json.dumps({"keys": [found]}).encode()):
        try:
            assert isinstance(keys_of_jwks(data), tuple)
        except ValueError:
            pass


def test_a_file_without_a_usable_key_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for name in ("public_keys", "jwks_file"):
        for content in (None, b"", b'{"keys": []}', b"\xff"):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(InvalidSetting, match=name):
                Issuers.of(msgspec.structs.replace(AuthSettings(), **{name: path}))


def test_a_provider_that_signs_for_many_needs_an_audience() -> None:
    settings = AuthSettings(jwks_url=Url("https://id.example/jwks.json"))
    with pytest.raises(InvalidSetting, match="audience"):
        Issuers.of(settings)
    Issuers.of(msgspec.structs.replace(settings, audience="blobcask"))


# --- a list in a file


def replace(path: Path, data: bytes) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(data)
    os.replace(beside, path)


def test_a_file_is_read_again_when_it_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(jwk(OLD, "old")))
    source = JwksFile(path)
    replace(path, jwks(jwk(OLD, "old"), jwk(NEW, "new")))
    assert kids(source.known()) == ["old", "new"]
    replace(path, jwks(jwk(NEW, "new")))
    assert kids(source.known()) == ["new"]


@pytest.mark.parametrize("broken", [b"", b'{"keys": [', b"[]", None])
def test_while_a_file_is_broken_its_former_keys_are_used(
    tmp_path: Path, broken: bytes | None
) -> None:
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks(jwk(OLD, "old")))
    source = JwksFile(path)
    path.unlink() if broken is None else path.write_bytes(broken)
    assert kids(source.known()) == ["old"]
    path.write_bytes(jwks(jwk(NEW, "new")))
    assert kids(source.known()) == ["new"]


# --- a list at an address


def test_a_list_is_fetched_once_and_again_when_it_is_old() -> None:
    seconds = Seconds()
    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        source = JwksUrl(publisher.url, 300.0, seconds)
        assert publisher.asked == 0, "nothing is asked before a token needs it"
        assert [kids(source.known()) for _ in range(3)] == [["old"]] * 3
        assert publisher.asked == 1
        publisher.body = jwks(jwk(NEW, "new"))
        seconds.now += 299
        assert kids(source.known()) == ["old"]
        seconds.now += 1
        assert kids(source.known()) == ["new"]
        assert publisher.asked == 2


def test_a_key_that_is_not_known_yet_has_the_list_fetched() -> None:
    seconds = Seconds()
    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        issuers = Issuers((JwksUrl(publisher.url, 300.0, seconds),))
        assert [key.kid for key in issuers.candidates(EDDSA, "old")] == ["old"]
        publisher.body = jwks(jwk(OLD, "old"), jwk(NEW, "new"))
        seconds.now += RETRY_S
        assert [key.kid for key in issuers.candidates(EDDSA, "new")] == ["new"]
        assert publisher.asked == 2
        assert list(issuers.candidates("none", "x")) == []
        assert list(issuers.candidates("HS256", "x")) == []
        assert publisher.asked == 2


def test_a_flood_of_unknown_keys_makes_one_fetch() -> None:
    seconds = Seconds()
    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        issuers = Issuers((JwksUrl(publisher.url, 300.0, seconds),))
        list(issuers.candidates(EDDSA, "old"))
        for _ in range(2):
            seconds.now += RETRY_S
            asked = publisher.asked
            with ThreadPoolExecutor(8) as callers:
                found = list(
                    callers.map(
                        lambda number: list(issuers.candidates(EDDSA, f"x{number}")), range(100)
                    )
                )
            assert found == [[]] * 100
            assert publisher.asked == asked + 1


def test_while_one_thread_fetches_the_others_use_the_old_keys() -> None:
    seconds, fetching, go_on = Seconds(), threading.Event(), threading.Event()
    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        source = JwksUrl(publisher.url, 300.0, seconds)
        source.known()
        seconds.now += 301

        def hang() -> None:
            fetching.set()
            go_on.wait(TURN_S)

        publisher.before_answer = hang
        publisher.body = jwks(jwk(NEW, "new"))
        with ThreadPoolExecutor(1) as other:
            first = other.submit(source.known)
            assert fetching.wait(TURN_S)
            assert kids(source.known()) == ["old"]
            go_on.set()
            assert kids(first.result()) == ["new"]
        assert publisher.asked == 2


@pytest.mark.parametrize("kid", [None, "unknown"])
def test_a_publisher_that_is_slow_holds_no_working_slot(kid: str | None) -> None:
    """Anybody can show tokens with made-up identifiers of keys (invariant 11)."""
    pool, go_on = Pool(2), threading.Event()
    fetching, ended = threading.Event(), threading.Semaphore(0)

    def hang() -> None:
        fetching.set()
        go_on.wait(TURN_S)

    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        publisher.before_answer = hang
        issuers = Issuers((JwksUrl(publisher.url, 300.0),))

        def verify() -> None:
            list(issuers.candidates(EDDSA, kid))
            ended.release()

        for _ in range(4):
            pool.submit(verify)
        assert fetching.wait(TURN_S)
        quick = threading.Event()
        pool.submit(quick.set)
        assert quick.wait(TURN_S / 2)
        go_on.set()
        for _ in range(4):
            assert ended.acquire(timeout=TURN_S)
        assert publisher.asked == 1


def test_while_a_publisher_is_down_its_keys_are_used_for_a_day() -> None:
    seconds = Seconds()
    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        source = JwksUrl(publisher.url, 300.0, seconds)
        source.known()
    seconds.now += STALE_S_MAX - 1
    assert kids(source.known()) == ["old"]
    seconds.now += 1
    assert kids(source.known()) == []


def test_a_publisher_that_comes_up_late_is_found() -> None:
    seconds = Seconds()
    with publishing(b"") as publisher:
        publisher.status = 503
        source = JwksUrl(publisher.url, 300.0, seconds)
        assert source.known() == ()
        publisher.status, publisher.body = 200, jwks(jwk(OLD, "old"))
        assert source.known() == (), "not asked again at once"
        seconds.now += RETRY_S
        assert kids(source.known()) == ["old"]


def spoil(publisher: Publisher, how: str) -> None:
    if how == "redirect":
        publisher.status, publisher.headers["Location"] = 302, publisher.url
    elif how == "too long":
        publisher.body = jwks(jwk(NEW, "new", pad="x" * JWKS_BYTES_MAX))
    elif how == "packed":
        publisher.headers["Content-Encoding"] = "gzip"
        publisher.body = b"\x1f\x8b"
    else:
        publisher.body = how.encode()


@pytest.mark.parametrize("how", ["redirect", "too long", "packed", "<html>", "[]", '{"keys": 5}'])
def test_an_answer_that_is_no_list_changes_nothing(how: str) -> None:
    seconds = Seconds()
    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        source = JwksUrl(publisher.url, 300.0, seconds)
        source.known()
        spoil(publisher, how)
        seconds.now += 301
        assert kids(source.known()) == ["old"]
        assert publisher.asked == 2


def test_a_list_without_keys_withdraws_them_all() -> None:
    seconds = Seconds()
    with publishing(jwks(jwk(OLD, "old"))) as publisher:
        source = JwksUrl(publisher.url, 300.0, seconds)
        source.known()
        publisher.body = jwks()
        seconds.now += 301
        assert source.known() == ()
