"""`blobcask serve` with targets: it mirrors, ships and sends canaries, and says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cas.records import Target
from replicator.probe import Profile
from tests.end_to_end.nodes import (
    FAR,
    Node,
    blobcask,
    looking,
    serving_node,
    settings_of,
    until,
    until_mirrored,
)
from tests.s3.ceph import Bucket

pytestmark = pytest.mark.slow

FILES = 6


@pytest.fixture
def far(root: Path) -> Path:
    return root / FAR


@pytest.fixture
def to_folder(far: Path) -> Mapping[str, str]:
    return {
        "REPLICATOR__TARGETS": FAR,
        "REPLICATOR__SHIP_EVERY": "1s",
        "TARGET_FAR__KIND": "folder",
        "TARGET_FAR__PATH": str(far),
    }


def target_of(node: Node) -> dict[str, Any]:
    (target,) = node.status()[1]["targets"]
    assert isinstance(target, dict)
    return target


def until_well(node: Node) -> dict[str, Any]:
    """Until nothing waits, all is shipped and a canary has come back; what status says then."""
    until_mirrored(node)
    until("a canary came back", lambda: target_of(node)["canary_seconds"] is not None)
    until("all is shipped", lambda: target_of(node)["metadata_behind_seconds"] == 0)
    code, told = node.status()
    assert (code, told["trouble"]) == (0, [])
    return target_of(node)


def judge(told: dict[str, Any], keys: set[str], head: bytes, node: Node) -> None:
    """What `replicate status` says against what is there."""
    assert told["reached"]
    assert (told["waiting_rows"], told["stalled"], told["fenced"]) == (0, [], "")
    assert told["last_error"] == ""
    assert {stored.key for stored in node.ledger.stored} <= keys
    assert any(key.startswith("journal/") for key in keys)
    assert json.loads(head)["seq"] > 0
    found = node.served.ask("GET", "/metrics").body.decode()
    assert f'blobcask_target_waiting{{target="{FAR}"}} 0.0' in found
    assert f'blobcask_target_stalled{{target="{FAR}"}} 0.0' in found
    assert f'blobcask_target_canary_seconds{{target="{FAR}"}}' in found
    assert node.served.ask("GET", "/readyz").form == {"status": "ready", "degraded": []}


def keys_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_all_and_status_says_so(
    root: Path, far: Path, to_folder: Mapping[str, str]
) -> None:
    with serving_node(root / "node", to_folder) as node:
        stored = node.store_many(FILES)
        told = until_well(node)
        judge(told, keys_in(far), (far / "HEAD.json").read_bytes(), node)
        for one in stored:
            assert hashlib.sha256((far / one.key).read_bytes()).hexdigest() == one.digest
        assert told["place"] == f"folder {far}"


@pytest.mark.soak  # test_bad_luck.py has it too
def test_ceph_gets_all_and_status_says_so(root: Path, bucket: Bucket) -> None:
    with serving_node(root / "node", settings_of(bucket)) as node:
        stored = node.store_many(FILES)
        told = until_well(node)
        judge(told, set(bucket.keys()), bucket.read("HEAD.json"), node)
        for one in stored:
            assert hashlib.sha256(bucket.read(one.key)).hexdigest() == one.digest
        with looking(node.root) as store, store.catalog.read() as snapshot:
            record = snapshot.get(Target, FAR)
        assert record is not None
        assert Profile.from_json(record.profile).verification in ("md5", "sha256", "read_back")


@pytest.mark.soak  # test_edge.py has it too
def test_an_upload_with_storage_type_s3_is_acknowledged_when_its_copy_is_there(
    root: Path, bucket: Bucket
) -> None:
    options = bucket.options()
    settings = {
        "UPLOADS__STORAGE_TYPE": "s3",
        "UPLOADS__S3_ENDPOINT": options["endpoint"],
        "UPLOADS__S3_BUCKET": options["bucket"],
        "UPLOADS__S3_REGION": options["region"],
        "UPLOADS__S3_ACCESS_KEY": options["access_key"],
        "UPLOADS__S3_SECRET_KEY": options["secret_key"],
        "TARGET_PRIMARY__ADDRESSING": "path",
    }
    with serving_node(root / "node", settings) as node:
        until("the target was reached", lambda: target_of(node)["shipped_at"] is not None)
        for _ in range(FILES):
            stored = node.store()
            assert hashlib.sha256(bucket.read(stored.key)).hexdigest() == stored.digest


def test_once_does_all_that_is_due(root: Path, far: Path, to_folder: Mapping[str, str]) -> None:
    with serving_node(root / "node", to_folder, accompanied=False) as node:
        stored = node.store_many(FILES)
        assert node.run("replicate", "once").returncode == 0
        assert {one.key for one in stored} <= keys_in(far)


@pytest.fixture
def stalled(root: Path, far: Path, to_folder: Mapping[str, str]) -> Iterator[tuple[Node, set[str]]]:
    """A node whose target cannot be written to, its folder is another node's; and what was
    there before it: what it tries out at first comes and goes."""
    with serving_node(root / "first", to_folder) as first:
        first.store()
        until_mirrored(first)
    before = keys_in(far)
    with serving_node(root / "second", to_folder) as second:
        yield second, before


def test_a_target_of_another_store_is_told_everywhere_and_gets_nothing(
    stalled: tuple[Node, set[str]], far: Path
) -> None:
    node, before = stalled
    _, stored = node.store(), node.store()  # the first one is alike in all nodes
    until("the fence is told", lambda: target_of(node)["fenced"])
    code, told = node.status()
    assert code != 0
    (why,) = [line for line in told["trouble"] if FAR in line]
    assert "belongs to another store" in why
    ready = node.served.ask("GET", "/readyz")
    assert ready.status == 200
    assert why in ready.form["degraded"]
    assert stored.key not in before
    assert keys_in(far) == before


def test_a_target_that_no_process_has_met_is_told_by_name(
    root: Path, to_folder: Mapping[str, str]
) -> None:
    with serving_node(root / "node", to_folder, accompanied=False) as node:
        code, told = node.status()
        assert code != 0
        assert told["targets"][0]["place"] == ""
    run = blobcask(root / "node", to_folder, "replicate", "status")
    assert "not known yet" in run.stdout
