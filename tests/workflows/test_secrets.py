"""Secrets: kept sealed, for one tenant and one name, by keys that can be changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from cas.catalog.images import encode
from cas.cli import main
from cas.clock import DAY_US, HOUR_US
from cas.config import Settings, Size, StoreSettings
from cas.errors import InvalidName, InvalidRequest, NotFound, SecretSealed
from cas.keys import load_keys
from cas.records import Secret
from cas.sealing import seal
from cas.store import Store
from tests.clocks import START_US, HandClock
from workflows.complaints import Complaints
from workflows.secrets import (
    KEEP_OLD_US_MAX,
    LINES_MAX,
    SECRETS_MAX,
    VALUE_BYTES_MAX,
    Secrets,
    old_until,
    reseal,
    verifying,
)

VALUE = b"It's a Secret to Everybody"
KEY = bytes(range(32))
NEXT_KEY = bytes(range(32, 64))


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        yield store


def secrets(store: Store, tenant: str = "acme", ring: tuple[bytes, ...] = (KEY,)) -> Secrets:
    return Secrets(store.catalog, ring, tenant_id=tenant, actor="ann", request_id="r1")


def test_a_secret_is_what_was_put(store: Store) -> None:
    kept = secrets(store).put("github", VALUE)
    assert (kept.secret_id, kept.created_at, kept.created_by) == ("github", START_US, "ann")
    assert secrets(store).get("github") == VALUE
    assert [found.secret_id for found in secrets(store).list()] == ["github"]


def test_a_secret_is_replaced_and_removed(store: Store) -> None:
    own = secrets(store)
    own.put("github", VALUE)
    own.put("github", b"another")
    assert own.get("github") == b"another"
    own.remove("github")
    assert own.list() == []
    for act in (own.get, own.remove):
        with pytest.raises(NotFound):
            act("github")


def test_all_lines_of_an_old_value_are_good_beside_the_new_one(store: Store) -> None:
    """Also where it was set when a value could have more than two."""
    own = secrets(store)
    first = own.put("github", b"x")
    many = [b"line %d" % number for number in range(30)]
    sealed = seal((KEY,), ("secret", "acme", "github"), b"\n".join(many))
    old = msgspec.structs.replace(first, sealed=sealed)
    store.catalog.write(lambda txn: txn.replace(old))

    def good() -> list[bytes]:
        with store.catalog.read() as snapshot:
            now_us = store.now_us(snapshot)
            value = verifying(snapshot, (KEY,), "acme", "github", now_us, Complaints())
        return value.splitlines()

    assert good() == many[:20]
    own.put("github", b"new\n\nnewer", keep_old_us=DAY_US)
    assert good() == [b"new", b"newer", *many[:20]]


def test_secrets_of_others_are_not_there(store: Store) -> None:
    secrets(store).put("github", VALUE)
    other = secrets(store, "globex")
    assert other.list() == []
    for act in (other.get, other.remove):
        with pytest.raises(NotFound):
            act("github")


@pytest.mark.parametrize("value", [b"", b" \n", b"x" * (VALUE_BYTES_MAX + 1)])
def test_what_is_no_secret_is_refused_without_telling_it(store: Store, value: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        secrets(store).put("github", value)
    assert "x" * 20 not in str(refused.value)
    for name in ("", "a/b", "a b"):
        with pytest.raises(InvalidName):
            secrets(store).put(name, VALUE)


def test_nothing_on_the_disk_holds_the_value(store: Store) -> None:
    secrets(store).put("github", VALUE)
    store.catalog.checkpoint()
    held = [path for path in store.root.rglob("*") if path.is_file()]
    assert held
    assert not [path for path in held if VALUE in path.read_bytes()]


def test_the_same_value_is_sealed_anew_each_time(store: Store) -> None:
    own = secrets(store)
    assert own.put("one", VALUE).sealed != own.put("one", VALUE).sealed


@pytest.mark.parametrize("change", ["tenant", "name", "bytes", "form", "short", "key"])
def test_what_was_sealed_for_something_else_does_not_open(store: Store, change: str) -> None:
    sealed = secrets(store).put("github", VALUE).sealed
    tenant = "globex" if change == "tenant" else "acme"
    name = "stripe" if change == "name" else "github"
    moved = {
        "bytes": sealed[:-1] + bytes([sealed[-1] ^ 1]),
        "form": b"\2" + sealed[1:],
        "short": sealed[:5],
    }.get(change, sealed)
    record = Secret(tenant, name, moved, START_US, "eve")

    def put(txn):  # type: ignore[no-untyped-def]
        found = txn.get(Secret, tenant, name)
        txn.insert(record) if found is None else txn.replace(record)

    store.catalog.write(put, actor="eve")
    ring = (NEXT_KEY,) if change == "key" else (KEY,)
    with pytest.raises(SecretSealed):
        secrets(store, tenant, ring).get(name)


def test_the_newest_key_seals_and_all_open(store: Store) -> None:
    secrets(store).put("old", VALUE)
    both = secrets(store, ring=(KEY, NEXT_KEY))
    both.put("new", VALUE)
    assert both.get("old") == both.get("new") == VALUE
    with pytest.raises(SecretSealed):
        secrets(store).get("new")


def test_after_resealing_the_old_key_is_needed_no_more(store: Store) -> None:
    for tenant in ("acme", "globex"):
        secrets(store, tenant).put("github", VALUE)
    assert reseal(store.catalog, (KEY, NEXT_KEY)) == 2
    for tenant in ("acme", "globex"):
        assert secrets(store, tenant, (NEXT_KEY,)).get("github") == VALUE


def test_a_tenant_has_only_so_many(store: Store) -> None:
    own = secrets(store)
    sealed = own.put("s0", VALUE)

    def fill(txn):  # type: ignore[no-untyped-def]
        for number in range(1, SECRETS_MAX):
            txn.insert(msgspec.structs.replace(sealed, secret_id=f"s{number}"))

    store.catalog.write(fill, actor="ann")
    with pytest.raises(InvalidRequest, match="at most"):
        own.put("one-more", VALUE)
    own.put("s1", VALUE)  # in place of one


# --- changed


def good(store: Store, ring: tuple[bytes, ...] = (KEY,)) -> list[bytes]:
    with store.catalog.read() as snapshot:
        now_us = store.now_us(snapshot)
        return verifying(snapshot, ring, "acme", "github", now_us, Complaints()).splitlines()


def test_what_is_replaced_is_good_no_more(store: Store) -> None:
    secrets(store).put("github", b"old")
    assert secrets(store).put("github", b"new").old_until is None
    assert good(store) == [b"new"]


def test_the_old_one_is_kept_for_as_long_as_is_said(store: Store, clock: HandClock) -> None:
    secrets(store).put("github", b"old")
    kept = secrets(store).put("github", b"new", keep_old_us=DAY_US)
    assert kept.old_until == START_US + DAY_US
    assert secrets(store).get("github") == b"new"
    clock.advance(DAY_US - 1)
    assert good(store) == [b"new", b"old"]
    assert old_until(kept, clock.time_us) == START_US + DAY_US
    clock.advance(1)
    assert good(store) == [b"new"]
    assert old_until(kept, clock.time_us) is None


def test_the_first_one_has_none_before_it(store: Store) -> None:
    kept = secrets(store).put("github", b"new", keep_old_us=DAY_US)
    assert (kept.old_sealed, kept.old_until, good(store)) == (b"", None, [b"new"])


def test_only_the_last_one_is_kept(store: Store) -> None:
    for value in (b"first", b"second", b"third"):
        secrets(store).put("github", value, keep_old_us=DAY_US)
    assert good(store) == [b"third", b"second"]
    secrets(store).put("github", b"fourth")
    assert good(store) == [b"fourth"]


def test_the_same_value_again_keeps_what_was_before_it(store: Store, clock: HandClock) -> None:
    own = secrets(store)
    own.put("github", b"old")
    own.put("github", b"new", keep_old_us=HOUR_US)
    clock.advance(HOUR_US - 1)
    own.put("github", b"new", keep_old_us=HOUR_US)  # as after an answer that was lost
    assert good(store) == [b"new", b"old"]
    clock.advance(HOUR_US)
    kept = own.put("github", b"new", keep_old_us=HOUR_US)  # what is over does not come back
    assert (kept.old_sealed, good(store)) == (b"", [b"new"])
    own.put("github", b"newer", keep_old_us=HOUR_US)
    own.put("github", b"newer")  # and so it ends sooner
    assert good(store) == [b"newer"]


@pytest.mark.parametrize("keep_old_us", [-1, 0, 999_999, KEEP_OLD_US_MAX + 1])
def test_what_is_no_time_to_keep_the_old_one_is_refused(store: Store, keep_old_us: int) -> None:
    secrets(store).put("github", b"old")
    with pytest.raises(InvalidRequest, match="kept"):
        secrets(store).put("github", b"new", keep_old_us=keep_old_us)
    assert good(store) == [b"old"]


def test_the_old_one_that_no_key_opens_cannot_be_kept_and_is_not_good(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    secrets(store).put("github", b"old")
    later = secrets(store, ring=(NEXT_KEY,))
    with pytest.raises(SecretSealed):
        later.put("github", b"new", keep_old_us=DAY_US)
    assert good(store) == [b"old"]
    secrets(store, ring=(KEY, NEXT_KEY)).put("github", b"new", keep_old_us=DAY_US)
    assert good(store, (KEY, NEXT_KEY)) == [b"new", b"old"]
    assert good(store, (NEXT_KEY,)) == [b"new"]
    assert "github" in caplog.text
    later.put("github", b"newest")
    assert good(store, (NEXT_KEY,)) == [b"newest"]


def test_resealing_seals_the_old_one_too_and_forgets_what_is_over(
    store: Store, clock: HandClock
) -> None:
    secrets(store).put("github", b"old")
    secrets(store).put("github", b"new", keep_old_us=DAY_US)
    assert reseal(store.catalog, (KEY, NEXT_KEY)) == 1
    assert good(store, (NEXT_KEY,)) == [b"new", b"old"]
    clock.advance(DAY_US)
    reseal(store.catalog, (NEXT_KEY,))
    (kept,) = secrets(store).list()
    assert (kept.old_sealed, kept.old_until, kept.undated_at) == (b"", None, None)


def test_a_value_has_only_so_many_lines(store: Store) -> None:
    lines = b"\n".join(b"%d" % number for number in range(LINES_MAX))
    secrets(store).put("github", lines + b"\n\n")
    with pytest.raises(InvalidRequest, match="lines"):
        secrets(store).put("github", lines + b"\nmore")


def test_a_record_from_before_old_ones_were_kept_is_read(store: Store) -> None:
    kept = secrets(store).put("github", VALUE)
    before = msgspec.msgpack.encode(msgspec.msgpack.decode(encode(kept))[:5])
    assert msgspec.msgpack.decode(before, type=Secret) == kept


# --- blobcask secret


def run(*words: str, given: bytes = b"", code: int = 0) -> str:
    result = CliRunner().invoke(main, words, input=given)
    assert result.exit_code == code, result.output
    return result.stdout


def test_the_command_keeps_lists_and_removes(tmp_path: Path) -> None:
    root = ("--root", str(tmp_path / "store"))
    run("secret", "list", *root, code=3)  # no store is made by looking
    assert not (tmp_path / "store").exists()

    assert run("secret", "set", "github", *root, given=VALUE + b"\n") == "github\n"
    listed = json.loads(run("secret", "list", "--json", *root))
    assert [kept["secret_id"] for kept in listed["secrets"]] == ["github"]
    assert VALUE.decode() not in run("secret", "list", *root)
    assert "No" not in run("secret", "list", "--tenant", "acme", *root)

    settings = Settings(store=StoreSettings(root=tmp_path / "store", min_free=Size(0)))
    with Store.open(tmp_path / "store", settings) as store:
        ring = load_keys(settings).secrets
        own = Secrets(store.catalog, ring, tenant_id="default", actor="", request_id="")
        assert own.get("github") == VALUE

    run("secret", "rm", "github", *root)
    assert json.loads(run("secret", "list", "--json", *root))["secrets"] == []
    run("secret", "rm", "github", *root, code=3)


def test_the_command_keeps_the_old_one_and_says_until_when(tmp_path: Path) -> None:
    root = ("--root", str(tmp_path / "store"))
    run("secret", "set", "github", *root, given=b"old\n")
    assert json.loads(run("secret", "list", "--json", *root))["secrets"][0]["old_until"] is None
    made = run("secret", "set", "github", "--keep-old", "24h", "--json", *root, given=b"new\n")
    until = json.loads(made)["old_until"]
    (kept,) = json.loads(run("secret", "list", "--json", *root))["secrets"]
    assert kept["old_until"] == until > kept["created_at"]
    shown = run("secret", "list", *root)
    assert until in shown
    assert "old\n" not in shown
    for wrong in ("24", "soon", "0s", "91d"):
        run("secret", "set", "github", "--keep-old", wrong, *root, given=b"newer\n", code=2)
    run("secret", "set", "github", *root, given=b"new\n")
    assert until not in run("secret", "list", *root)


def test_the_command_takes_a_file_and_reseals(tmp_path: Path) -> None:
    root = ("--root", str(tmp_path / "store"))
    source = tmp_path / "both"
    source.write_bytes(b"new\nold\n")
    run("secret", "set", "github", "--tenant", "acme", "--from", str(source), *root)
    ring = tmp_path / "store" / "keys" / "secrets"
    assert ring.stat().st_mode & 0o777 == 0o600
    old = ring.read_text()
    ring.write_text(old + "A" * 43 + "=\n")
    assert run("secret", "reseal", *root) == "1 secret resealed\n"
    ring.write_text("A" * 43 + "=\n")
    settings = Settings(store=StoreSettings(root=tmp_path / "store", min_free=Size(0)))
    with Store.open(tmp_path / "store", settings) as store:
        keys = load_keys(settings).secrets
        own = Secrets(store.catalog, keys, tenant_id="acme", actor="", request_id="")
        assert own.get("github") == b"new\nold"
