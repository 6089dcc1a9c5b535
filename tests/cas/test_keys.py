"""The secrets of a ROOT: made once, private, rotated by hand; and the tokens they sign."""

from __future__ import annotations

import stat
from base64 import urlsafe_b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jwt
import msgspec
import pytest

from cas.clock import SECOND_US
from cas.config import AuthSettings, Settings, SigningSecret, StoreSettings
from cas.errors import InvalidInput, InvalidSetting
from cas.keys import load_keys
from gateway.auth import Tokens
from gateway.errors import PermissionMissing, Unauthorized
from tests.clocks import HandClock

SECRET = b"s" * 32


def settings_for(root: Path, secret: str = "") -> Settings:
    return Settings(
        store=StoreSettings(root=root), auth=AuthSettings(jwt_secret=SigningSecret(secret))
    )


def test_keys_are_made_once_and_readable_by_nobody_else(root: Path) -> None:
    made = load_keys(settings_for(root))
    again = load_keys(settings_for(root))
    assert (made.fresh, again.fresh) == (True, False)
    assert msgspec.structs.replace(made, fresh=False) == again
    assert stat.S_IMODE((root / "keys").stat().st_mode) == 0o700
    for name in ("signing", "jwt", "callbacks", "receipts"):
        assert stat.S_IMODE((root / "keys" / name).stat().st_mode) == 0o600


def test_commands_that_start_at_once_share_the_keys(root: Path) -> None:
    with ThreadPoolExecutor(8) as starters:
        made = list(starters.map(lambda _: load_keys(settings_for(root)), range(8)))
    assert len({(keys.signing, keys.jwt) for keys in made}) == 1
    assert sum(keys.fresh for keys in made) == 1


def test_an_appended_key_signs_and_the_old_one_stays_good(root: Path) -> None:
    old = load_keys(settings_for(root)).signing
    path = root / "keys" / "signing"
    path.write_bytes(path.read_bytes() + urlsafe_b64encode(b"n" * 32) + b"\n")
    assert load_keys(settings_for(root)).signing == (*old, b"n" * 32)


@pytest.mark.parametrize("content", [b"", b"\n", b"short\n", b"no base64 \xff\n"])
def test_a_broken_key_stops_the_start(root: Path, content: bytes) -> None:
    load_keys(settings_for(root))
    (root / "keys" / "signing").write_bytes(content)
    with pytest.raises(InvalidSetting):
        load_keys(settings_for(root))


def test_a_given_secret_takes_the_place_of_the_made_one(root: Path) -> None:
    keys = load_keys(settings_for(root, "given secret of thirty-two bytes"))
    assert keys.jwt == b"given secret of thirty-two bytes"
    assert b"given" not in (root / "keys" / "jwt").read_bytes()


# --- tokens


def test_a_token_says_who_calls_until_it_expires(clock: HandClock) -> None:
    tokens = Tokens(SECRET, clock.now_us)
    token = tokens.issue("t1", "ann", ("view_storage",), 60)
    caller = tokens.read(token)
    assert (caller.tenant_id, caller.actor) == ("t1", "ann")
    clock.advance(60 * SECOND_US)
    with pytest.raises(Unauthorized):
        tokens.read(token)


def test_managing_implies_viewing_and_admin_everything(clock: HandClock) -> None:
    tokens = Tokens(SECRET, clock.now_us)
    manager = tokens.read(tokens.issue("t", "a", ("manage_storage",), 60))
    assert manager.may("view_storage")
    assert not manager.may("view_uploads")
    with pytest.raises(PermissionMissing):
        manager.need("manage_uploads")
    admin = tokens.read(tokens.issue("t", "a", ("admin",), 60))
    assert all(admin.may(one) for one in ("manage_storage", "view_uploads", "emit_events"))
    nobody = tokens.read(tokens.issue("t", "a", (), 60))
    assert not nobody.may("view_storage")
    assert not nobody.may("admin")


CLAIMS = {"tenant": "t", "sub": "a", "permissions": ["admin"], "exp": 4e9}


@pytest.mark.parametrize(
    "token",
    [
        jwt.encode(CLAIMS, b"x" * 32, "HS256"),
        jwt.encode(CLAIMS, "", "none"),
        jwt.encode(CLAIMS, SECRET + SECRET, "HS512"),
        jwt.encode({**CLAIMS, "tenant": "../x"}, SECRET, "HS256"),
        jwt.encode({**CLAIMS, "tenant": 5}, SECRET, "HS256"),
        jwt.encode({**CLAIMS, "permissions": 5}, SECRET, "HS256"),
        jwt.encode({**CLAIMS, "permissions": [["admin"]]}, SECRET, "HS256"),
        jwt.encode({**CLAIMS, "exp": "soon"}, SECRET, "HS256"),
        jwt.encode({key: CLAIMS[key] for key in CLAIMS if key != "exp"}, SECRET, "HS256"),
        jwt.encode({key: CLAIMS[key] for key in CLAIMS if key != "tenant"}, SECRET, "HS256"),
        "a.b.c",
        "",
    ],
)
def test_other_tokens_are_refused(clock: HandClock, token: str) -> None:
    with pytest.raises(Unauthorized):
        Tokens(SECRET, clock.now_us).read(token)


def test_a_token_is_not_issued_for_what_does_not_exist(clock: HandClock) -> None:
    tokens = Tokens(SECRET, clock.now_us)
    with pytest.raises(InvalidInput):
        tokens.issue("t", "a", ("manage_everything",), 60)
    with pytest.raises(InvalidInput):
        tokens.issue("not a tenant", "a", ("admin",), 60)
    with pytest.raises(InvalidInput):
        tokens.issue("t", "upload:somebody's", ("admin",), 60)
