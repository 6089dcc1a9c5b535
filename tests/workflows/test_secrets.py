"""Secrets: kept sealed, for one tenant and one name, by keys that can be changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from cas.cli import main
from cas.config import Settings, Size, StoreSettings
from cas.errors import InvalidName, InvalidRequest, NotFound, SecretSealed
from cas.keys import load_keys
from cas.records import Secret
from cas.store import Store
from tests.clocks import START_US, HandClock
from workflows.secrets import SECRETS_MAX, VALUE_BYTES_MAX, Secrets, reseal

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
