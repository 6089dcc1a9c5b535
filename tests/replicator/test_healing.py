"""Healing: in the background of those who wait for bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from cas.records import StoredFile
from cas.store import Store
from replicator.fetching import FETCHES_MAX
from replicator.healing import Heal
from tests.clocks import HandClock
from tests.replicator.crates import Node, background


@pytest.fixture
def node(root: Path, clock: HandClock) -> Iterator[Node]:
    with Store.open(root, clock=clock) as store:
        yield Node(store, ("hangs", "well"))


def missing(node: Node, content: bytes) -> StoredFile:
    """A file whose blob is nowhere that anybody knows of."""
    file = node.evicted(content)
    node.store.catalog.write(
        lambda txn: txn.replace(replace(node.blob(file), missing_at=1, evicted_at=None)),
        actor="tests",
    )
    return file


def test_a_target_that_hangs_holds_up_healing_and_no_reader(node: Node) -> None:
    go_on = threading.Event()
    went_on: list[bool] = []
    node.crates["hangs"].before = lambda _position: went_on.append(go_on.wait(60))
    for number in range(FETCHES_MAX + 2):
        file = missing(node, b"%d" % number)
        node.crates["well"].objects.clear()
    file = node.evicted(b"asked for")
    node.links[0].down = "it hangs"
    with background(node) as back:
        heal = Heal(node.store, node.links, back.fetches)
        back.do(heal.step(0))
        with node.store.opener.stream(file.checksum_sha256, file.size_bytes) as stream:
            assert stream.read(100) == b"asked for"
        assert not went_on
        go_on.set()
        back.do(heal.close())


def test_what_only_targets_that_are_down_may_have_waits(node: Node) -> None:
    file = missing(node, b"there only")
    node.store.catalog.write(lambda txn: txn.delete(node.row(file, "well")), actor="tests")
    node.links[0].down = "it hangs"
    with background(node) as back:
        heal = Heal(node.store, node.links, back.fetches)
        assert back.do(heal.step(0)) is False
        assert node.crates["hangs"].asked == []
        node.links[0].down = ""
        while back.do(heal.step(0)):
            pass
    assert node.blob(file).local
