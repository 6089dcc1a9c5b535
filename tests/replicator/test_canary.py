"""The canary: it only counts when it came back whole from the target itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.clock import DAY_US
from cas.config import TargetSettings
from cas.digest import Digest
from cas.records import Replica
from cas.replicas import Done, Failed, due, register, settle
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from replicator.canary import TENANT, Canary
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.probe import Profile
from replicator.targets import BytesDiffer, ObjectAbsent, object_key
from tests.clocks import KEEP_US, HandClock


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root / "node", clock=clock) as store:
        register(store.catalog, [("far", f"folder {root / 'far'}")])
        yield store


@pytest.fixture
def link(root: Path) -> Link:
    place = root / "far"
    return Link(FolderTarget("far", place), TargetSettings("far", "folder", place), Profile())


@pytest.fixture
def canary(store: Store, link: Link) -> Canary:
    return Canary(store, link, now_s=lambda: 77.0)


def step(canary: Canary) -> bool:
    return asyncio.run(canary.step(0))


def came_back(link: Link) -> float | None:
    """A call, since a checker takes an attribute for what it was a line before."""
    return link.canary_at_s


def waiting(store: Store) -> list[Replica]:
    with store.catalog.read() as snapshot:
        return due(snapshot, "far", store.now_us(snapshot))


def mirror(store: Store, link: Link, *, says_only: bool = False) -> Digest:
    """Copy the one that waits, or only say so."""
    (row,) = waiting(store)
    if not says_only:
        with open(store.opener.here(row.digest), "rb") as body:
            link.target.put(object_key(row.digest), body, row.size_bytes)
    settle(store.catalog, [Done(row)])
    return row.digest


def test_one_goes_the_whole_way_and_is_forgotten_when_it_came_back(
    store: Store, link: Link, canary: Canary
) -> None:
    assert not step(canary)
    assert not step(canary)
    assert came_back(link) is None  # it has not been copied yet
    assert canary.interval_s < 1
    mirror(store, link)
    assert not step(canary)
    assert came_back(link) == 77.0
    assert canary.interval_s == 15 * 60
    assert store.files(TENANT, "test").usage().files == 0


def test_a_mirror_that_only_says_so_makes_it_fail_and_is_asked_again(
    store: Store, link: Link, canary: Canary
) -> None:
    step(canary)
    digest = mirror(store, link, says_only=True)
    with pytest.raises(ObjectAbsent):
        step(canary)
    assert came_back(link) is None
    assert digest.hex() in link.canary_error
    assert [row.digest for row in waiting(store)] == [digest]
    mirror(store, link)
    step(canary)
    assert (came_back(link), link.canary_error) == (77.0, "")


def test_other_bytes_are_no_canary(store: Store, link: Link, canary: Canary, root: Path) -> None:
    step(canary)
    digest = mirror(store, link)
    path = root / "far" / object_key(digest)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(BytesDiffer, match="other ones"):
        step(canary)
    assert [row.digest for row in waiting(store)] == [digest]


def test_none_is_sent_before_the_target_was_reached(
    store: Store, link: Link, canary: Canary
) -> None:
    link.profile = None
    assert not step(canary)
    assert waiting(store) == []
    assert canary.interval_s < 1


def test_another_is_sent_when_one_was_swept_on_its_way(
    store: Store, link: Link, canary: Canary, clock: HandClock
) -> None:
    """The target was away for longer than a canary is kept."""
    step(canary)
    (row,) = waiting(store)
    settle(store.catalog, [Failed(row, "down", clock.now_us())])
    for _ in range(3):
        clock.advance(DAY_US)
        with store.catalog.read() as snapshot:
            sweep = plan_sweep(
                snapshot,
                store.now_us(snapshot),
                1000,
                partial_files=store.partial_files,
                keep_us=KEEP_US,
            )
        execute_sweep(store.catalog, sweep, partial_files=store.partial_files)
        with store.catalog.read() as snapshot:
            plan = store.collector.plan(snapshot, store.now_us(snapshot))
        store.collector.execute(plan)
    assert waiting(store) == []  # its row waits for its DELETE
    step(canary)
    step(canary)
    assert mirror(store, link) != row.digest
    step(canary)
    assert came_back(link) == 77.0
