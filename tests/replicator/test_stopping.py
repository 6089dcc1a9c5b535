"""Told to stop, the process does not wait until what is on its way has arrived."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from replicator.fence import read_head
from replicator.shipping import Compact, Ship
from tests.clocks import HandClock
from tests.replicator.shippers import Interposed, contents, folder_target, shipping


def test_a_stretch_that_is_being_shipped_is_ended_in_the_middle(
    root: Path, place: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.ship_all()
        before = contents(place, "journal")
        head = read_head(node.target)
        node.put(b"one")
        job = Ship(node.store, node.link)

        def stop(key: str) -> None:
            if key.startswith("journal/"):
                job.stop()

        target: Any = Interposed(folder_target(place), stop)
        node.link.target = target
        assert asyncio.run(job.step(clock.now_us())) is False
        assert contents(place, "journal") == before
        assert read_head(folder_target(place)) == head
        again = Ship(node.store, node.link)
        node.link.target = folder_target(place)
        asyncio.run(again.step(clock.now_us()))
        assert contents(place, "journal") != before


def test_a_checkpoint_that_is_being_shipped_is_ended_in_the_middle(
    root: Path, place: Path, clock: HandClock, monkeypatch: Any
) -> None:
    monkeypatch.setattr("replicator.shipping._COMPACT_WEIGHT", 1)
    with shipping(root, place, clock) as node:
        node.put(b"one")
        job = Ship(node.store, node.link)
        compact = Compact(node.store, node.link, job)

        def stop(key: str) -> None:
            if key.startswith("checkpoints/"):
                job.stop()

        target: Any = Interposed(folder_target(place), stop)
        node.link.target = target
        asyncio.run(job.step(clock.now_us()))
        assert node.link.open
        assert asyncio.run(compact.step(clock.now_us())) is False
        assert contents(place, "checkpoints") == {}
