"""The audit log: `journal tail --tenant` shows a tenant's records, all of them, and no other's."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cas.cli import main
from cas.config import CatalogSettings, Duration, Settings, Size, StoreSettings
from cas.references import parse_reference
from cas.store import Store
from cas.uploads import UploadRequest

Tail = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def tail(root: Path, monkeypatch: pytest.MonkeyPatch) -> Tail:
    for name in list(os.environ):
        if name.startswith("BLOBCASK_"):
            monkeypatch.delenv(name)

    def call(*arguments: str) -> list[dict[str, Any]]:
        command = ["journal", "tail", "--json", *arguments, "--root", str(root)]
        result = CliRunner().invoke(main, command, prog_name="blobcask")
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    return call


def settings_for(root: Path) -> Settings:
    return Settings(
        store=StoreSettings(root=root, min_free=Size(0)),
        catalog=CatalogSettings(checkpoint_every=Size(4096), journal_keep=Duration(0)),
    )


def put(store: Store, tenant: str, data: bytes) -> str:
    return store.files(tenant, f"{tenant}-actor").put(io.BytesIO(data), name="x").storage_ref


def tables(changes: list[dict[str, Any]], *, removed: bool) -> set[str]:
    ops = [op for change in changes for op in change["ops"]]
    return {op["table"] for op in ops if (op["record"] is None) == removed}


def test_a_tenant_sees_what_was_made_and_removed_of_its_own_and_no_more(
    root: Path, tail: Tail
) -> None:
    with Store.open(root, settings_for(root)) as store:
        for tenant in ("t1", "t2"):
            reference = put(store, tenant, b"shared")
            wanted = UploadRequest("papers", max_files=2)
            token = store.uploads(tenant, f"{tenant}-actor").request(wanted).upload_token
            store.upload_link(token).put(0, io.BytesIO(b"y"), filename="a")
            store.upload_link(token).empty(0)
            store.files(tenant, f"{tenant}-actor").delete(parse_reference(reference))
    everything = tail("--after", "0")
    for tenant, other in (("t1", "t2"), ("t2", "t1")):
        changes = tail("--after", "0", "--tenant", tenant)
        assert other not in json.dumps(changes)
        assert {"stored_files", "upload_files"} <= tables(changes, removed=True)
        assert {"stored_files", "pending_uploads"} <= tables(changes, removed=False)
        assert "blobs" not in tables(changes, removed=False), "shared, so nobody's"
        own = [change["seq"] for change in changes]
        assert own == sorted(own)
        assert set(own) < {change["seq"] for change in everything}
    assert tail("--after", "0", "--tenant", "t") == []
    ops = [op for change in everything for op in change["ops"] if op["table"] == "upload_files"]
    made = {op["key"] for op in ops if op["record"] is not None}
    assert made == {op["key"] for op in ops if op["record"] is None}, "one name for both"


def test_a_removal_is_shown_when_what_it_removes_was_written_long_before(
    root: Path, tail: Tail
) -> None:
    with Store.open(root, settings_for(root)) as store:
        mine, others = put(store, "t1", b"a"), put(store, "t2", b"b")
        for reference, tenant in ((mine, "t1"), (others, "t2")):
            store.files(tenant, tenant).delete(parse_reference(reference))
    removed = tail("--frames", "2", "--tenant", "t1")
    assert [change["actor"] for change in removed] == ["t1"]
    assert "stored_files" in tables(removed, removed=True)


def test_a_removal_is_shown_when_the_journal_of_before_was_pruned(root: Path, tail: Tail) -> None:
    with Store.open(root, settings_for(root)) as store:
        mine = put(store, "t1", b"a")
        put(store, "t2", b"b")
        for _ in range(3):
            put(store, "t2", os.urandom(9))
            store.catalog.checkpoint()
        journal = root / "catalog" / "journal"
        assert min(path.name for path in journal.iterdir()).split("-")[1] != f"{1:020}.log"
        store.files("t1", "t1").delete(parse_reference(mine))
        put(store, "t2", b"c")
    changes = tail("--tenant", "t1")
    assert [change["actor"] for change in changes] == ["t1"]
    assert "stored_files" in tables(changes, removed=True)
