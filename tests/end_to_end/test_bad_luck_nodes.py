"""Disks that are lost, and nodes of which there is suddenly one too many."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.nodes import (
    KIB,
    MIB,
    Ledger,
    Node,
    blobcask,
    head_of,
    judge_bucket,
    judge_doctor,
    judge_served,
    judge_store,
    looking,
    records_of,
    serving_node,
    settings_of,
    told_of,
    until,
    until_canary_is_home,
    until_mirrored,
    until_shipped,
    waiting,
)
from tests.s3.ceph import Bucket
from tests.s3.fault_proxy import FaultProxy, Flip, Say, every, only

pytestmark = pytest.mark.slow

FILES = 10


def lose_power(node: Node) -> None:
    """Every process of the node ends at once; none writes anything on return."""
    victims = (node.served.process.pid, *node.served.workers())
    for victim in victims:
        with suppress(ProcessLookupError):  # the end of the first tells the others to end
            os.kill(victim, signal.SIGKILL)
    node.served.process.wait()
    until("all have ended", lambda: not any(map(works, victims)))


def works(pid: int) -> bool:
    """Whether a thread of it is left: one in the middle of a sync ends only after that."""
    for stat in Path("/proc").glob(f"{pid}/task/*/stat"):
        with suppress(OSError):  # it has ended just now
            if stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False


def lose_disk(node: Node) -> None:
    """The machine is gone, and its disk with it."""
    lose_power(node)
    shutil.rmtree(node.root)


def shipped(bucket: Bucket, prefix: str = "") -> dict[str, bytes]:
    """The metadata at the target: what is there must never be overwritten."""
    keys = [*bucket.keys(f"{prefix}journal/"), *bucket.keys(f"{prefix}checkpoints/")]
    return {key: bucket.read(key) for key in keys}


def degraded(node: Node) -> str:
    """What `/readyz` says is wrong; requests are served all the same."""
    ready = node.served.ask("GET", "/readyz")
    assert ready.status == 200, ready.body
    return " ".join(ready.form["degraded"])


@pytest.mark.parametrize("source", ["far", pytest.param("s3://", marks=pytest.mark.soak)])
def test_a_lost_node_comes_back_from_the_target_alone(
    root: Path, bucket: Bucket, source: str
) -> None:
    settings = settings_of(bucket, "some/where")
    with serving_node(root / "node", settings) as node:
        node.store_many(FILES)
        node.store(20 * MIB)
        pending = node.served.request_upload()
        until_mirrored(node)
        until_canary_is_home(node)
        until_shipped(node.root, bucket, "some/where")
        ledger = node.ledger
        lose_disk(node)

    place = f"s3://{bucket.name}/some/where" if source == "s3://" else source
    new = root / "elsewhere" / "store"  # where ROOT never was
    new.parent.mkdir()
    restored = blobcask(new, settings, "restore", "--from", place)
    assert restored.returncode == 0, restored.stdout + restored.stderr
    judge_store(new, ledger.stored)
    assert len(records_of(new)) == len(ledger.stored)
    judge_doctor(new, settings)
    with serving_node(new, settings, ledger=ledger) as node:
        judge_served(node.served, ledger.stored)
        info = node.served.ask("GET", f"/api/v1/uploads/{pending['upload_token']}/info")
        assert (info.status, info.form["status"]) == (200, "pending")
        # It is the one that ships now, and mirrors on.
        node.store()
        until_mirrored(node)
        until_shipped(new, bucket, "some/where")
        judge_bucket(bucket, ledger.stored, "some/where")


def test_a_lazily_restored_node_serves_at_once_what_is_only_at_the_target(
    root: Path, bucket: Bucket
) -> None:
    settings = settings_of(bucket)
    with serving_node(root / "node", settings) as node:
        node.store_many(FILES)
        large = node.store(20 * MIB)
        until_mirrored(node)
        until_canary_is_home(node)
        until_shipped(node.root, bucket)
        ledger = node.ledger
        lose_disk(node)

    new = root / "lazy"
    restored = blobcask(new, settings, "restore", "--from", "far", "--lazy")
    assert restored.returncode == 0, restored.stdout + restored.stderr
    assert not [path for path in (new / "objects").rglob("*") if path.is_file()]
    with serving_node(new, settings, ledger=ledger) as node:
        url = "/api/v1/storage/" + large.reference.partition("://")[2]
        part = {"Range": "bytes=10485760-10485859"}

        def served() -> bool:
            answer = node.served.ask("GET", url, token=node.served.admin, headers=part)
            # The background process beside it, which fetches, is waited for while it starts; but
            # not for as long as that may take here.
            assert answer.status in (206, 503), answer.body[:500]
            return answer.status == 206 and len(answer.body) == 100

        until("a part of it is served", served)
        judge_served(node.served, ledger.stored)
    judge_store(new, ledger.stored)  # what was read is here now
    judge_doctor(new, settings)


def test_what_is_lost_with_a_disk_is_what_was_acknowledged_after_the_last_shipment(
    root: Path, bucket: Bucket
) -> None:
    with FaultProxy(bucket) as proxy:
        settings = settings_of(proxy.bucket)
        with serving_node(root / "node", settings) as node:
            node.store_many(FILES)
            until_mirrored(node)
            until_canary_is_home(node)
            until_shipped(node.root, bucket)
            before = node.ledger.stored
            # From now on names get there, and bytes do not.
            proxy.luck = only("PUT", Say(503, "SlowDown"), below="objects/")
            named = [node.store(), node.store()]
            until_shipped(node.root, bucket)
            # And now not even those.
            proxy.luck = only("PUT", Say(503, "SlowDown"))
            late = [node.store() for _ in range(3)]
            lose_disk(node)

        new = root / "new"
        restored = blobcask(new, settings_of(bucket), "restore", "--from", "far")
        assert restored.returncode != 0, restored.stdout  # some bytes are nowhere
        for one in named:
            assert one.digest in restored.stdout + restored.stderr or "2 blobs" in restored.stderr
        judge_store(new, before)
        known = records_of(new)
        assert [told_of(known[one.reference]) for one in named] == [one.told for one in named]
        assert not [one for one in late if one.reference in known]
        with serving_node(new, settings_of(bucket), ledger=node.ledger) as again:
            for one in named:
                url = "/api/v1/storage/" + one.reference.partition("://")[2]
                assert again.served.ask("GET", url, token=again.served.admin).status >= 404


@pytest.mark.soak
def test_a_restore_over_a_corrupting_connection_brings_back_only_good_bytes(
    root: Path, bucket: Bucket
) -> None:
    settings = settings_of(bucket)
    with serving_node(root / "node", settings) as node:
        node.store_many(FILES)
        until_mirrored(node)
        until_canary_is_home(node)
        until_shipped(node.root, bucket)
        ledger = node.ledger
        lose_disk(node)
    new = root / "new"
    with FaultProxy(bucket) as proxy:
        proxy.luck = every(7, Flip("answer"))
        spoilt = settings_of(proxy.bucket)
        runs = [blobcask(new, spoilt, "restore", "--from", "far")]
        proxy.luck = lambda _asked: None
        if runs[0].returncode != 0:
            # It says so; and the same command, or reading, does the rest.
            runs.append(blobcask(new, spoilt, "restore", "--from", "far"))
        told = "\n".join(run.stdout + run.stderr for run in runs)
        for one in ledger.stored:
            path = new / one.key
            if path.exists():
                judge_store(new, [one])
        with serving_node(new, spoilt, ledger=ledger) as again:
            judge_served(again.served, ledger.stored)
    assert told


def test_another_store_at_the_same_prefix_is_refused_and_overwrites_nothing(
    root: Path, bucket: Bucket
) -> None:
    settings = settings_of(bucket, "shared")
    with serving_node(root / "first", settings) as first:
        first.store_many(3)
        until_mirrored(first)
        until_shipped(first.root, bucket, "shared")
        before, head = shipped(bucket, "shared/"), head_of(bucket, "shared")
        assert before
        assert head is not None
        with serving_node(root / "second", settings, ledger=Ledger(1_000)) as second:
            foreign = second.store()
            until("it is told why", lambda: "another store" in str(second.status()[1]))
            code, _ = second.status()
            assert code != 0
            until("readyz tells it", lambda: "far" in degraded(second))
            with looking(second.root) as store:
                assert waiting(store) >= 1
        assert f"shared/{foreign.key}" not in bucket.keys("shared/objects/")
        # The first one was never disturbed.
        first.store()
        until_mirrored(first)
        until_shipped(first.root, bucket, "shared")
        after = head_of(bucket, "shared")
        assert after is not None
        assert (after["store_id"], after["node"]) == (head["store_id"], head["node"])
        now = shipped(bucket, "shared/")
        assert {key: now[key] for key in before} == before
        judge_bucket(bucket, first.ledger.stored, "shared")


def test_of_a_node_and_its_copy_one_ships(root: Path, bucket: Bucket) -> None:
    settings = settings_of(bucket)
    with serving_node(root / "node", settings) as node:
        node.store_many(3)
        until_mirrored(node)
        until_shipped(node.root, bucket)
        head = head_of(bucket)
        assert head is not None
        # As a careless operator does it, while all runs.
        subprocess.run(["cp", "-a", node.root, root / "copy"], check=True)
        before = shipped(bucket)
        with serving_node(root / "copy", settings) as copy:
            copied = copy.store(10 * KIB)
            until("it is told why", lambda: "another node" in str(copy.status()[1]))
            node.store_many(2)
            until_mirrored(node)
            until_shipped(node.root, bucket)
            after = head_of(bucket)
            assert after is not None
            assert after["node"] == head["node"]
            assert copied.key not in bucket.keys("objects/")
            assert copy.status()[0] != 0
            assert "far" not in degraded(node)
            # The copy does not know what the node has shipped since: it cannot go on from there.
            claimed = copy.run("replicate", "claim", "far")
            assert claimed.returncode != 0, claimed.stdout
            late = head_of(bucket)  # which the node may have moved on meanwhile
            assert late is not None
            assert (late["node"], late["epoch"]) == (after["node"], after["epoch"])
        now = shipped(bucket)
        assert {key: now[key] for key in before} == before


def test_a_revived_node_stays_silent_after_its_restore_elsewhere(
    root: Path, bucket: Bucket
) -> None:
    settings = settings_of(bucket)
    with serving_node(root / "old", settings) as old:
        old.store_many(3)
        until_mirrored(old)
        until_canary_is_home(old)
        until_shipped(old.root, bucket)
        lose_power(old)
    restored = blobcask(root / "new", settings, "restore", "--from", "far")
    assert restored.returncode == 0, restored.stdout + restored.stderr
    with serving_node(root / "new", settings, ledger=old.ledger) as new:
        new.store()
        until_mirrored(new)
        until_shipped(new.root, bucket)
        head, before = head_of(bucket), shipped(bucket)
        assert head is not None
        with serving_node(root / "old", settings) as revived:
            late = revived.store(10 * KIB)
            until("it is told why", lambda: "another node" in str(revived.status()[1]))
            new.store()
            until_mirrored(new)
            until_shipped(new.root, bucket)
            after = head_of(bucket)
            assert after is not None
            assert after["node"] == head["node"]
            assert late.key not in bucket.keys("objects/")
        now = shipped(bucket)
        assert {key: now[key] for key in before} == before
        judge_bucket(bucket, new.ledger.stored)
