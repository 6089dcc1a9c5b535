"""The fence: one node ships to a target, and all others say why they do not (invariant 12)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, final

import msgspec
import pytest

from cas.durable import DISK
from cas.replicas import keep_profile
from replicator.fence import NODE, Fenced, Node, claim, new_node, node_of, read_head, swap_head
from replicator.probe import Profile
from replicator.reaching import profile_of
from replicator.shipping import Ship
from replicator.targets import Changed, Target
from tests.clocks import HandClock
from tests.replicator.shippers import (
    LOOSE,
    NAME,
    PROFILE,
    Interposed,
    contents,
    copied,
    folder_target,
    shipping,
)


def test_a_node_keeps_its_identifier(root: Path) -> None:
    assert node_of(root, DISK) == node_of(root, DISK)


def test_a_copy_of_root_is_another_node(root: Path, tmp_path: Path) -> None:
    first = node_of(root, DISK)
    copy = copied(root, tmp_path / "copy")
    second = node_of(copy, DISK)
    assert second != first
    assert node_of(copy, DISK) == second
    assert node_of(root, DISK) == first


def test_an_unreadable_node_file_is_made_anew(root: Path) -> None:
    (root / NODE).write_bytes(b"{")
    assert node_of(root, DISK) == node_of(root, DISK)


def test_the_first_to_ship_claims_the_target(root: Path, tmp_path: Path, clock: HandClock) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        assert node.ship_all().fenced == ""
        head = read_head(node.target).head
        assert head is not None
        assert head.node == node_of(root, DISK)
        assert head.seq == node.catalog.position().seq


@pytest.mark.parametrize("profile", [PROFILE, LOOSE])
def test_a_copied_root_ships_nothing_and_says_why(
    root: Path, tmp_path: Path, clock: HandClock, profile: Profile
) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock, profile=profile) as node:
        node.put(b"one")
        node.ship_all()
        before = contents(place)
        with shipping(copied(root, tmp_path / "copy"), place, clock, profile=profile) as copy:
            copy.put(b"of the copy")
            assert "another node" in copy.ship().fenced
            assert contents(place) == before
        node.put(b"two")
        assert node.ship().fenced == ""


def test_who_claims_ships_and_the_other_stops(root: Path, tmp_path: Path, clock: HandClock) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        with shipping(copied(root, tmp_path / "copy"), place, clock) as copy:
            assert copy.ship().fenced
            me = node_of(tmp_path / "copy", DISK)
            before = claim(copy.catalog, copy.store.store_id(), me, copy.target, conditional=True)
            assert before is not None
            assert before.node == node_of(root, DISK)
            copy.put(b"two")
            assert copy.ship().fenced == ""
        node.put(b"three")
        assert "another node" in node.ship().fenced


def test_of_two_machines_cloned_with_their_identifiers_one_ships(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        copy_root = copied(root, tmp_path / "copy")
        _take_for(copy_root, node_of(root, DISK))
        with shipping(copy_root, place, clock) as copy:
            copy.put(b"of the copy")
            copy.put(b"more of the copy")
            node.put(b"of the first")
            assert node.ship().fenced == ""
            before = contents(place)
            assert "went different ways" in copy.ship().fenced
            assert contents(place) == before


def test_an_older_copy_is_fenced_and_cannot_claim(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        older = copied(root, tmp_path / "older")
        _take_for(older, node_of(root, DISK))
        node.put(b"two")
        node.ship_all()
        with shipping(older, place, clock) as copy:
            assert "older copy" in copy.ship().fenced
            with pytest.raises(Fenced, match="older copy"):
                claim(copy.catalog, copy.store.store_id(), "me", copy.target, conditional=True)


def test_another_store_is_refused(root: Path, tmp_path: Path, clock: HandClock) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    before = contents(place)
    with shipping(tmp_path / "other", place, clock) as other:
        assert "another store" in other.ship().fenced
        with pytest.raises(Fenced, match="another store"):
            claim(other.catalog, other.store.store_id(), "me", other.target, conditional=True)
    assert contents(place) == before


@pytest.mark.parametrize("profile", [PROFILE, LOOSE])
def test_who_loses_the_race_for_head_is_fenced(
    root: Path, tmp_path: Path, clock: HandClock, profile: Profile
) -> None:
    """Another node claims between the reading of HEAD and its change."""
    place = tmp_path / "away"
    rival: list[str] = []

    def claim_first(key: str) -> None:
        if key.startswith("journal/") and rival:
            head = msgspec.json.decode((place / "HEAD.json").read_bytes())
            head["node"] = rival.pop()
            (place / "HEAD.json").write_bytes(msgspec.json.encode(head))

    target: Any = Interposed(folder_target(place), claim_first)
    with shipping(root, place, clock, profile=profile, target=target) as node:
        node.put(b"one")
        node.ship_all()
        rival.append("somebody else")
        node.put(b"two")
        assert "at the same time" in node.ship().fenced
        head = read_head(node.target).head
        assert head is not None
        assert head.node == "somebody else"
        assert "another node" in node.ship().fenced


@final
class _Refusing:
    """A server that refuses every change that has a condition, whether it is met or not."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.refused = 0

    def put(self, key: str, body: Any, size_bytes: int, **more: Any) -> str:
        if more.get("if_match") or more.get("if_absent"):
            self.refused += 1
            raise Changed(self._target.name, "412 PreconditionFailed")
        return self._target.put(key, body, size_bytes, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


@pytest.mark.parametrize("since", ["the beginning", "an upgrade of the server"])
def test_a_server_that_refuses_met_conditions_fences_nobody_for_ever(
    root: Path, tmp_path: Path, clock: HandClock, since: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It passed the probe once, and was changed since."""
    place = tmp_path / "away"
    target: Any = _Refusing(folder_target(place))
    if since != "the beginning":
        with shipping(root, place, clock) as node:
            node.put(b"before")
            node.ship_all()
    with shipping(root, place, clock, target=target) as node:
        keep_profile(node.catalog, NAME, PROFILE.to_json())
        node.put(b"one")
        ship = Ship(node.store, node.link)

        async def story() -> None:
            while await ship.step(clock.now_us()):
                pass

        asyncio.run(story())
        assert node.link.fenced == ""
        assert "does not honour conditions" in caplog.text
        head = read_head(target).head
        assert head is not None
        assert head.seq == node.link.shipped_seq
        kept = profile_of(node.store, NAME)
        assert kept is not None
        assert not kept.conditional
        assert node.link.profile == kept
        refused = target.refused
        node.put(b"two")
        asyncio.run(story())
        assert target.refused == refused  # it is not asked again
        assert node.link.shipped_seq == node.catalog.position().seq


def test_without_conditions_another_node_is_still_noticed(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    """The server refuses, and somebody else really changed HEAD meanwhile."""
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        seen = read_head(node.target)
        assert seen.head is not None
        other = msgspec.structs.replace(seen.head, node="somebody else")
        (place / "HEAD.json").write_bytes(msgspec.json.encode(other))
        with pytest.raises(Fenced, match="at the same time"):
            swap_head(_Refusing(node.target), seen, seen.head, conditional=True)
        assert read_head(node.target).head == other


def test_an_unreadable_head_fences(root: Path, tmp_path: Path, clock: HandClock) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        (place / "HEAD.json").write_bytes(b"\0" * 100)
        assert "not readable" in node.ship().fenced


def _take_for(copy: Path, node: str) -> None:
    """Let a copy take itself for the original, as on a machine cloned inode by inode."""
    new_node(copy, DISK)
    mine = msgspec.json.decode((copy / NODE).read_bytes(), type=Node)
    with (copy / NODE).open("r+b") as file:
        file.write(msgspec.json.encode(msgspec.structs.replace(mine, node=node)))
        file.truncate()
    assert node_of(copy, DISK) == node
