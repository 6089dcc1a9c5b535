"""Both sides compared: what differs is found, and mended either way."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.clock import DAY_US, SystemClock
from cas.config import TargetSettings
from cas.digest import Digest
from cas.records import DONE, WANTED, Blob, Replica
from cas.references import parse_reference
from cas.replicas import register
from cas.store import Store
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.mirror import Mirror
from replicator.targets import ObjectStat, object_key
from replicator.verify import Verification, VerifyReport
from tests.clocks import HandClock
from tests.conftest import CHECKOUT
from tests.replicator.between import BY_READING, MIB, Between

ABSENT, SHORT, ROTTEN, ROTTEN_HERE, GOOD = b"absent", b"short", b"rotten", b"rotten here", b"good"
LATE = b"not copied yet"
STRAYS = 30_000


class Node:
    def __init__(self, root: Path, clock: HandClock | None = None) -> None:
        self.root = root
        self.clock = clock or HandClock()
        self.store = Store.open(root / "store", clock=clock)
        self.target = Between(FolderTarget("other", root / "target"))
        self.target.opaque = True
        self.target.target.put("probe/one", io.BytesIO(b"1"), 1)
        self.link = Link(
            self.target, TargetSettings("other", "folder", root / "target"), BY_READING
        )
        self.link.fenced = ""
        register(self.store.catalog, [("other", self.target.place)])
        self.digests = {content: self.put(content) for content in (ABSENT, SHORT, ROTTEN, GOOD)}
        self.digests[ROTTEN_HERE] = self.put(ROTTEN_HERE)
        self.mirror()

    def put(self, content: bytes) -> Digest:
        return self.store.files("t1", "tests").put(content, name="a").checksum_sha256

    def remove(self, content: bytes) -> None:
        """Delete the file, and let its bytes be collected."""
        files = self.store.files("t1", "tests")
        reference = files.put(content, name="a").storage_ref
        files.delete(parse_reference(reference))
        self.clock.advance(2 * DAY_US)
        with self.store.catalog.read() as snapshot:
            plan = self.store.collector.plan(snapshot, self.store.now_us(snapshot))
        assert self.store.collector.execute(plan).blobs == 1

    def mirror(self) -> None:
        async def story() -> None:
            mirror = Mirror(self.store, self.link)
            while await mirror.step(SystemClock().now_us()):
                pass
            await mirror.close()

        asyncio.run(story())

    def spoil(self) -> None:
        """Each kind of trouble, but none with GOOD."""
        place = self.target.target
        place.delete(object_key(self.digests[ABSENT]))
        place.put(object_key(self.digests[SHORT]), io.BytesIO(SHORT[:-1]), len(SHORT) - 1)
        place.put(object_key(self.digests[ROTTEN]), io.BytesIO(b"ROTTEN"), len(ROTTEN))
        path = self.store.blobs.path(self.digests[ROTTEN_HERE])
        os.chmod(path, 0o600)
        path.write_bytes(ROTTEN_HERE.upper())

    def verify(self, *, by_bytes: bool = False, remove_strays: bool = False) -> VerifyReport:
        verification = Verification(
            self.store, self.target, by_bytes=by_bytes, remove_strays=remove_strays
        )
        while verification.step():
            pass
        return verification.report

    def state(self, content: bytes) -> str:
        with self.store.catalog.read() as snapshot:
            row = snapshot.get(Replica, "other", self.digests[content])
        assert row is not None
        return row.state

    def named(self, *contents: bytes) -> list[str]:
        return sorted(self.digests[content].hex() for content in contents)

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def node(root: Path) -> Iterator[Node]:
    made = Node(root)
    yield made
    made.close()


def test_what_is_right_on_both_sides_is_found_right(node: Node) -> None:
    node.digests[LATE] = node.put(LATE)
    report = node.verify(by_bytes=True)
    assert report.well
    assert report.finished
    assert (report.rows, report.objects, report.good, report.waiting) == (6, 5, 5, 1)
    assert report.read_bytes == sum(map(len, (ABSENT, SHORT, ROTTEN, GOOD, ROTTEN_HERE)))


def test_the_listing_shows_what_is_absent_or_of_another_length(node: Node) -> None:
    node.spoil()
    report = node.verify()
    assert report.absent == node.named(ABSENT)
    assert report.differing == node.named(SHORT)
    assert not report.damaged_here
    assert node.state(ABSENT) == node.state(SHORT) == WANTED
    assert node.state(GOOD) == DONE
    assert node.target.count("get") == 5  # those of the copies' own proofs


def test_the_bytes_show_the_rest_and_all_is_mended(node: Node) -> None:
    node.spoil()
    report = node.verify(by_bytes=True)
    assert sorted(report.differing) == node.named(SHORT, ROTTEN)
    assert report.damaged_here == node.named(ROTTEN_HERE)
    with node.store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, node.digests[ROTTEN_HERE])
    assert blob is not None
    assert blob.missing_at is not None
    assert not report.well
    node.mirror()
    node.put(ROTTEN_HERE)  # or healed from the target, see `healing`
    assert node.verify(by_bytes=True).well


def test_a_copy_made_after_the_listing_was_read_is_not_absent(node: Node) -> None:
    verification = Verification(node.store, node.target)
    node.target.meddle = lambda verb, _key: late() if verb == "list" else None

    def late() -> None:
        node.target.meddle = lambda *_: None

    node.digests[LATE] = node.put(LATE)
    listed = list(node.target.list("objects/"))
    node.mirror()
    node.target.list = lambda *_args, **_more: iter(listed)  # type: ignore[method-assign]
    verification = Verification(node.store, node.target)
    while verification.step():
        pass
    assert verification.report.well
    assert verification.report.good == 6


def test_a_removed_copy_that_is_not_there_is_no_trouble_and_is_made_when_its_blob_is_back(
    root: Path, clock: HandClock
) -> None:
    """Within `delete_delay`: a blob that comes back finds its copy, if that is there still."""
    node = Node(root, clock)
    try:
        for content in (ABSENT, SHORT, ROTTEN):
            node.remove(content)
        node.spoil()
        report = node.verify(by_bytes=True)
        assert (report.absent, report.differing) == ([], [])
        for content in (ABSENT, SHORT, ROTTEN):
            node.put(content)
            assert node.state(content) == WANTED
        node.remove(GOOD)
        node.verify(by_bytes=True)
        node.put(GOOD)
        assert node.state(GOOD) == DONE
        node.mirror()
        for content in (ABSENT, SHORT, ROTTEN):
            assert node.state(content) == DONE
    finally:
        node.close()


def test_strays_are_told_and_go_only_when_that_is_wished(node: Node) -> None:
    stray = Digest(bytes(32))
    node.target.target.put(object_key(stray), io.BytesIO(b"?"), 1)
    node.target.target.put("objects/readme", io.BytesIO(b"?"), 1)
    report = node.verify()
    assert report.strays == [stray.hex()]
    assert report.foreign == ["objects/readme"]
    assert report.well
    node.verify(remove_strays=True)
    with node.store.catalog.read() as snapshot:
        row = snapshot.get(Replica, "other", stray)
    assert row is not None
    assert row.removed_at is not None


def test_the_command_line_tells_both_and_fails_when_something_was_wrong(node: Node) -> None:
    config = node.root / "config.ini"
    config.write_text(
        f"[store]\nroot = {node.root / 'store'}\n[replicator]\ntargets = other\n"
        f"[target:other]\nkind = folder\npath = {node.root / 'target'}\n"
    )
    node.spoil()

    def call(*args: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "cas", "--config", str(config), "--json", *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False)
        return done.returncode, done.stdout

    code, told = call("replicate", "verify", "other")
    assert code != 0
    (report,) = json.loads(told)["targets"]
    assert report["absent"] == node.named(ABSENT)
    code, told = call("replicate", "backfill")
    assert code == 0
    assert json.loads(told)["targets"] == ["other"]
    assert call("replicate", "verify", "nobody")[0] != 0


def test_any_number_of_strays_takes_the_same_memory(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(_prefix: str, *, after: str = "") -> Iterator[ObjectStat]:
        for number in range(STRAYS):
            yield ObjectStat(object_key(Digest(number.to_bytes(32, "big"))), 1, "etag", 0)

    monkeypatch.setattr(node.target, "list", listed)
    verification = Verification(node.store, node.target)
    tracemalloc.start()
    try:
        while verification.step():
            pass
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB  # 15 MiB where all are held
    finally:
        tracemalloc.stop()
    assert verification.report.objects == STRAYS
    assert len(verification.report.strays) == 1000
