"""Targets on the command line: claimed by a copied ROOT, moved, and fetched back from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cas.alone import Alone
from cas.background import PLACE
from cas.config import Settings
from cas.durable import DISK
from cas.records import Replica, Target
from cas.replicas import evict
from cas.store import Store
from cas.totals import blobs_elsewhere
from replicator.fence import node_of, read_head
from replicator.folder import FolderTarget
from tests.conftest import CHECKOUT
from tests.replicator.shippers import NAME, copied, wrong

SHIPPED = {NAME: 1 << 40}


class Node:
    """A ROOT with a configuration; `call` is the command line in a process of its own."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root = root
        self.config = root.parent / f"{root.name}.ini"
        self.configure(place)

    def configure(self, *places: Path, cache: str = "") -> None:
        names = [NAME, *(f"more{number}" for number in range(1, len(places)))][: len(places)]
        sections = "".join(
            f"[target:{name}]\nkind = folder\npath = {place}\n"
            for name, place in zip(names, places, strict=True)
        )
        self.config.write_text(
            f"[store]\nroot = {self.root}\n[replicator]\ntargets = {', '.join(names)}\n"
            f"{sections}{cache}"
        )

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cas", "--config", str(self.config), "--json", *words]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=CHECKOUT, check=False, timeout=60
        )

    def done(self, *words: str) -> dict[str, object]:
        made = self.call(*words)
        assert made.returncode == 0, made.stdout + made.stderr
        return dict(json.loads(made.stdout)) if made.stdout else {}

    def put(self, *contents: bytes) -> None:
        with Store.open(self.root, Settings()) as store:
            for content in contents:
                store.files("t1", "tests").put(content, name="a")

    def evict(self) -> None:
        with Store.open(self.root, Settings()) as store:
            with store.catalog.read() as snapshot:
                digests = [row.digest for row in snapshot.range(Replica, "", limit=100)]
            assert len(evict(store.catalog, store.blobs, digests, SHIPPED)) == len(digests)

    def elsewhere(self) -> int:
        with Store.open(self.root, Settings()) as store, store.catalog.read() as snapshot:
            return blobs_elsewhere(snapshot).count

    def wrong(self) -> list[str]:
        with Store.open(self.root, Settings()) as store:
            return wrong(store)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "away"


@pytest.fixture
def node(root: Path, place: Path) -> Node:
    """A node that has mirrored and shipped two files."""
    made = Node(root, place)
    made.put(b"one", b"two")
    made.done("replicate", "once")
    return made


# --- once


def test_one_run_ships_what_it_did_itself(node: Node, place: Path) -> None:
    """A timer may come but once a day: what was copied must not wait for the next one."""
    head = read_head(FolderTarget(NAME, place)).head
    assert head is not None
    with Store.open(node.root, Settings()) as store, store.catalog.read() as snapshot:
        rows = snapshot.range(Replica, "", limit=100)
    assert len(rows) == 2
    assert all(row.held and row.seq <= head.seq for row in rows)


# --- claim


def test_a_copied_root_ships_after_a_claim_and_the_first_one_does_not(
    node: Node, tmp_path: Path, place: Path
) -> None:
    copy = Node(copied(node.root, tmp_path / "copy"), place)
    copy.put(b"of the copy")
    copy.call("replicate", "once")
    target = FolderTarget(NAME, place)
    before = read_head(target).head
    assert before is not None
    assert before.node == node_of(node.root, DISK)

    told = copy.done("replicate", "claim", NAME)

    assert before.node in str(told["claimed"])
    copy.done("replicate", "once")
    head = read_head(target).head
    assert head is not None
    assert head.node == node_of(copy.root, DISK) != before.node
    assert head.seq > before.seq
    assert "already" in str(copy.done("replicate", "claim", NAME)["claimed"])
    node.put(b"of the first")
    node.call("replicate", "once")
    assert read_head(target).head == head
    # And all that the copy promised comes back from there.
    shutil.rmtree(copy.root)
    restored = copy.done("restore", "--from", NAME)
    assert (restored["files"], restored["missing_blobs"]) == (3, 0)


# --- moved


def test_a_target_that_moved_keeps_what_was_copied(node: Node, place: Path, tmp_path: Path) -> None:
    node.evict()
    new = tmp_path / "mounted" / "elsewhere"
    new.parent.mkdir()
    place.rename(new)
    node.configure(new)
    refused = node.call("replicate", "once")
    assert refused.returncode != 0
    assert f"replicate moved {NAME}" in refused.stderr

    told = node.done("replicate", "moved", NAME)

    assert str(place) in str(told["was"])
    assert str(new) in str(told["place"])
    node.put(b"three")
    node.done("replicate", "once")
    assert node.elsewhere() == 2
    node.done("replicate", "verify", NAME, "--bytes")
    with Store.open(node.root, Settings()) as store, store.catalog.read() as snapshot:
        (record,) = snapshot.range(Target, "", limit=10)
        rows = snapshot.range(Replica, "", limit=10)
    assert record.profile  # probed anew
    assert [row.held for row in rows] == [True] * 3


@pytest.mark.parametrize("there", ["nothing", "another store"])
def test_another_place_is_not_taken_for_the_same(node: Node, tmp_path: Path, there: str) -> None:
    node.evict()
    new = tmp_path / "other"
    new.mkdir()
    if there == "another store":
        other = Node(tmp_path / "store", new)
        other.put(b"something else")
        other.done("replicate", "once")
    node.configure(new)
    refused = node.call("replicate", "moved", NAME)
    assert refused.returncode != 0
    assert ("no journal there" if there == "nothing" else "another store") in refused.stderr
    assert node.call("replicate", "once").returncode != 0  # all is as it was


def test_a_target_is_not_moved_under_a_running_process(node: Node) -> None:
    alone = Alone(node.root / PLACE)
    try:
        assert alone.take()
        refused = node.call("replicate", "moved", NAME)
    finally:
        alone.close()
    assert refused.returncode != 0
    assert "stop it first" in refused.stderr
    assert node.call("replicate", "moved", "nobody").returncode != 0


# --- fetch


def test_all_evicted_bytes_come_back_and_the_target_may_go(node: Node) -> None:
    node.evict()
    assert node.elsewhere() == 2

    told = node.done("replicate", "fetch")

    assert (told["fetched_blobs"], told["fetched_bytes"], told["not_fetched"]) == (2, 6, {})
    assert node.elsewhere() == 0
    assert node.done("replicate", "fetch")["fetched_blobs"] == 0
    node.done("replicate", "forget", NAME)
    node.config.write_text(f"[store]\nroot = {node.root}\n")
    node.done("replicate", "once")
    assert node.wrong() == []


def test_what_one_target_lost_is_fetched_from_another(
    node: Node, place: Path, tmp_path: Path
) -> None:
    node.configure(place, tmp_path / "second")
    node.done("replicate", "once")
    with Store.open(node.root, Settings()) as store:
        with store.catalog.read() as snapshot:
            digests = {row.digest for row in snapshot.range(Replica, "", limit=100)}
        shipped = {NAME: 1 << 40, "more1": 1 << 40}
        assert len(evict(store.catalog, store.blobs, list(digests), shipped)) == 2
    for path in (place / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
            break
    assert node.done("replicate", "fetch")["fetched_blobs"] == 2
    assert node.wrong() == []


def test_fetching_refuses_what_the_cache_would_undo_and_what_has_no_room(
    node: Node, place: Path
) -> None:
    node.evict()
    node.configure(place, cache="[cache]\nmax_size = 1 GiB\n")
    refused = node.call("replicate", "fetch")
    assert refused.returncode != 0
    assert "max_size" in refused.stderr
    node.configure(place)
    node.config.write_text(
        node.config.read_text().replace("[store]\n", "[store]\nmin_free = 1000 TiB\n")
    )
    refused = node.call("replicate", "fetch")
    assert refused.returncode != 0
    assert node.elsewhere() == 2


def test_what_cannot_be_fetched_is_told(node: Node, place: Path) -> None:
    node.evict()
    shutil.rmtree(place / "objects")
    told = node.call("replicate", "fetch")
    assert told.returncode != 0
    assert len(json.loads(told.stdout)["not_fetched"]) == 2
    assert node.elsewhere() == 2
