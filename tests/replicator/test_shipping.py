"""Shipping: what a target holds of the journal, whatever happens on the way."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cas.catalog.recovery import Folders
from cas.config import CacheSettings, Settings, Size
from cas.durable import DISK
from cas.records import Mark, Replica
from cas.store import Store
from replicator import shipping as module
from replicator.archive import State, Taken
from replicator.evicting import Evict
from replicator.fence import Head, read_head, swap_head
from replicator.gathering import Gathering
from replicator.shipping import Compact, Ship, Shipper
from replicator.targets import TargetBusy, TargetRefused, TargetUnreachable, object_key
from tests.clocks import HandClock
from tests.replicator.between import Between, storm
from tests.replicator.shippers import (
    NAME,
    Interposed,
    Shipping,
    contents,
    copied,
    folder_target,
    shipping,
    with_history,
)

DAY_US = 86_400_000_000


def journal_of(root: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Folders(root).journal.glob("*.log")))


def gathered(node: Shipping, scratch: Path) -> Any:
    head = read_head(node.target).head
    assert head is not None
    scratch.mkdir()
    return Gathering(node.target, head, Folders(scratch), DISK, print).gather()


def test_frames_are_shipped_byte_for_byte(root: Path, tmp_path: Path, clock: HandClock) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        for number in range(3):
            node.put(b"%d" % number)
            node.ship()
        assert b"".join(contents(node.place, "journal").values()) == journal_of(root)


def test_what_was_shipped_is_told(root: Path, tmp_path: Path, clock: HandClock) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        shipped = node.ship()
        newest = node.catalog.position()
        assert shipped.position is not None
        assert (shipped.position.seq, shipped.position.at_us) == (newest.seq, newest.at_us)


def test_nothing_new_writes_nothing(root: Path, tmp_path: Path, clock: HandClock) -> None:
    place = tmp_path / "away"
    puts: list[str] = []
    target: Any = Interposed(folder_target(place), puts.append)
    with shipping(root, place, clock, target=target) as node:
        node.put(b"one")
        node.ship()
        puts.clear()
        node.ship()
    assert puts == []


def test_long_journals_go_in_several_stretches(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRETCH_BYTES", 1000)
    with shipping(root, tmp_path / "away", clock) as node:
        for number in range(20):
            node.put(b"%d" % number)
        node.ship()
        assert len(contents(node.place, "journal")) > 5
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_a_shipper_killed_between_stretch_and_head_is_followed_by_another(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    place = tmp_path / "away"
    killed: list[bool] = []

    def kill(key: str) -> None:
        if key == "HEAD.json" and killed:
            raise TargetUnreachable(NAME, "killed here")

    target: Any = Interposed(folder_target(place), kill)
    with shipping(root, place, clock, target=target) as node:
        node.put(b"one")
        node.ship_all()
        node.put(b"two")
        killed.append(True)
        with pytest.raises(TargetUnreachable):
            node.ship()
        killed.clear()
        left = contents(place, "journal")
        node.put(b"three")
        node.shipper = Shipper(node.store, node.link, node.profile)
        node.ship()
        now = contents(place, "journal")
        assert left.items() <= now.items()
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_the_same_bytes_under_the_wanted_name_are_as_good_as_shipped(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship()
        (place / "HEAD.json").unlink()
        before = contents(place)
        assert node.ship().fenced == ""
        assert contents(place) == before


def test_a_foreign_object_under_the_wanted_name_is_passed_and_kept(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    place = tmp_path / "away"
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship()
        node.put(b"two")
        node.put(b"three")
        first, last = _unshipped(node)
        foreign = _stretch(node, first, last)
        foreign.write_bytes(b"of another node")
        node.ship()
        assert foreign.read_bytes() == b"of another node"
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_a_single_frame_waits_for_the_next_where_another_node_has_its_name(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        node.ship()
        with Store.open(copied(root, tmp_path / "other"), clock=clock) as other:
            other.catalog.write(_inserting(Mark("of the other", "")), actor="test")
            theirs = journal_of(tmp_path / "other")[len(journal_of(root)) :]
        node.catalog.write(_inserting(Mark("a", "")), actor="test")
        first, last = _unshipped(node)
        foreign = _stretch(node, first, last)
        foreign.write_bytes(theirs)
        with pytest.raises(Taken):
            node.ship()
        assert node.catalog.position().seq == last
        node.catalog.write(_inserting(Mark("b", "")), actor="test")
        node.ship()
        assert foreign.read_bytes() == theirs
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


@pytest.mark.parametrize("kept", [0, 40, -1], ids=["nothing", "less than a header", "all but one"])
def test_a_single_frame_that_was_stored_in_part_is_gone_round_at_once(
    root: Path, tmp_path: Path, clock: HandClock, kept: int
) -> None:
    """The target said that all is well, and the node was killed before it read it back."""
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        node.ship()
        before = journal_of(root)
        node.catalog.write(_inserting(Mark("a", "")), actor="test")
        first, last = _unshipped(node)
        assert first == last
        torn = _stretch(node, first, last)
        half = journal_of(root)[len(before) :][:kept]
        torn.write_bytes(half)
        assert node.ship().fenced == ""
        assert torn.read_bytes() == half
        assert _unshipped(node)[0] > last
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_frames_in_the_middle_of_the_journal_go_round_what_is_torn_without_a_write(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        node.ship()
        monkeypatch.setattr(module, "STRETCH_BYTES", 1)  # a frame is a stretch
        for name in "abc":
            node.catalog.write(_inserting(Mark(name, "")), actor="test")
        first, last = _unshipped(node)
        torn = _stretch(node, first, first)
        torn.write_bytes(b"half of i")
        assert node.ship().fenced == ""
        assert torn.read_bytes() == b"half of i"
        assert node.catalog.position().seq == last
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


@pytest.mark.slow
def test_under_a_storm_that_puts_off_two_of_three_the_journal_is_shipped(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    far = Between(folder_target(tmp_path / "away"))
    far.meddle = storm()
    with shipping(root, tmp_path / "away", clock, target=far) as node:
        node.put(b"one")
        for _ in range(20):
            try:
                shipped = node.ship().position
                if shipped and shipped.seq == node.catalog.position().seq:
                    break
            except (TargetUnreachable, TargetBusy):
                continue
        head = read_head(far.target).head
        assert head is not None
        assert head.seq == node.catalog.position().seq


def test_bytes_that_arrive_changed_never_move_head(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    place = tmp_path / "away"
    bad: list[bool] = []

    def spoil(key: str) -> bytes | None:
        return b"rubbish" if key.startswith("journal/") and bad else None

    target: Any = Interposed(folder_target(place), spoil)
    with shipping(root, place, clock, target=target) as node:
        node.put(b"one")
        node.ship()
        before = read_head(node.target).head
        node.put(b"two")
        bad.append(True)
        with pytest.raises(Taken):
            node.ship()
        assert read_head(node.target).head == before
        bad.clear()
        node.put(b"three")
        node.ship()
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_where_the_journal_was_pruned_a_checkpoint_comes_first(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        node.catalog.checkpoint()
        node.put(b"two")
        node.catalog.checkpoint()
        node.put(b"three")
        _lose_beginning(node)
        node.ship()
        assert len(contents(node.place, "checkpoints")) == 1
        node.put(b"four")
        node.ship()
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_a_damaged_journal_is_passed_by_a_checkpoint(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        node.ship()
        segment = max(Folders(root).journal.glob("*.log"))
        begin = segment.stat().st_size
        node.put(b"two")
        node.put(b"three")
        with segment.open("r+b") as file:
            file.seek(begin + 40)
            file.write(b"\xff\xff")
        assert node.ship().fenced == ""
        assert len(contents(node.place, "checkpoints")) == 1
        assert gathered(node, tmp_path / "scratch").end.seq == node.catalog.position().seq


def test_shipped_journal_is_compacted_and_history_kept(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    settings = with_history(0)
    with shipping(root, tmp_path / "away", clock, settings=settings) as node:
        for number in range(40):
            node.put(b"%d" % number)
            node.ship()
        assert 2 <= len(contents(node.place, "checkpoints")) <= 3
        assert len(contents(node.place, "journal")) < 20
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_history_that_is_kept_is_not_compacted_away(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    with shipping(root, tmp_path / "away", clock, settings=with_history(DAY_US)) as node:
        for number in range(20):
            node.put(b"%d" % number)
            node.ship()
        assert len(contents(node.place, "journal")) == 20


def test_history_is_not_compacted_away_by_a_clock_that_was_wrong_once(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's times are this machine's: HEAD was once written ten years ahead."""
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    with shipping(root, tmp_path / "away", clock, settings=with_history(DAY_US)) as node:
        for number in range(20):
            node.put(b"%d" % number)
            node.ship()
        before = contents(node.place)
        head = node.place / "HEAD.json"
        os.utime(head, (head.stat().st_mtime + 3650 * 86_400,) * 2)
        for number in range(20, 30):
            node.put(b"%d" % number)
            node.ship()
        assert before.items() <= contents(node.place).items()
        clock.advance(2 * DAY_US)  # only where catalog time tells the same
        node.put(b"last")
        node.ship()
        assert not before.items() <= contents(node.place).items()
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_nothing_is_compacted_by_a_clock_that_is_not_believed(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    with shipping(root, tmp_path / "away", clock, settings=with_history(0)) as node:
        for number in range(9):
            node.put(b"%d" % number)
            node.ship()
        clock.trusted = False
        clock.time_us += 3650 * DAY_US
        before = contents(node.place)
        for number in range(9, 20):
            node.put(b"%d" % number)
            node.ship()
        assert before.items() <= contents(node.place).items()


def test_what_a_restore_that_came_to_nothing_left_does_not_end_compaction(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves a checkpoint of an epoch that never was."""
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    with shipping(root, tmp_path / "away", clock, settings=with_history(0)) as node:
        node.put(b"one")
        node.ship()
        left = node.place / "checkpoints" / node.store.store_id() / State(2, 9).filename
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"of another node")
        for number in range(40):
            node.put(b"%d" % number)
            node.ship()
        assert len(contents(node.place, "journal")) < 20
        assert left.read_bytes() == b"of another node"
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def test_a_target_that_deletes_nothing_is_shipped_to_all_the_same(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a process that is started while it refuses."""
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    far = Between(folder_target(tmp_path / "away"))
    with shipping(root, tmp_path / "away", clock, target=far, settings=with_history(0)) as node:
        for number in range(13):
            node.put(b"%d" % number)
            node.shipper.step()
            with suppress(TargetRefused):
                node.shipper.compact(clock.now_us())
            far.meddle = _refusing("delete")
        ship = Ship(node.store, node.link)
        compact = Compact(node.store, node.link, ship)

        async def story() -> None:
            assert await compact.step(clock.now_us()) is False  # not before HEAD was judged
            await _to_its_end(ship, clock)
            with pytest.raises(TargetRefused):
                await _to_its_end(compact, clock)

        asyncio.run(story())
        assert node.link.open
        assert node.link.shipped_seq == node.catalog.position().seq


def test_a_full_target_is_rid_of_history_though_it_takes_no_checkpoint(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    far = Between(folder_target(tmp_path / "away"))
    with shipping(
        root, tmp_path / "away", clock, target=far, settings=with_history(DAY_US)
    ) as node:
        for number in range(20):
            node.put(b"%d" % number)
            node.ship()
        before = len(contents(node.place, "journal"))
        clock.advance(2 * DAY_US)
        os.utime(node.place / "HEAD.json", (time.time() + 2 * 86_400,) * 2)
        far.meddle = _refusing("put")
        node.shipper = Shipper(node.store, node.link, node.profile)
        with suppress(TargetRefused):
            while node.shipper.compact(clock.now_us()):
                pass
        assert len(contents(node.place, "journal")) < before


def test_a_node_that_is_fenced_out_compacts_nothing(
    root: Path, tmp_path: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COMPACT_WEIGHT", 5 * module._OBJECT_WEIGHT)
    with shipping(root, tmp_path / "away", clock, settings=with_history(0)) as node:
        for number in range(13):
            node.put(b"%d" % number)
            node.shipper.step()
        seen = read_head(node.target)
        assert seen.head is not None
        head = replace(seen.head, node="another")
        swap_head(node.target, seen, head, conditional=True)
        before = contents(node.place)
        assert node.shipper.compact(clock.now_us()) is False
        assert contents(node.place) == before


def test_a_target_that_was_emptied_is_closed_until_its_copies_are_wanted_again(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    """Else the last copies that are here would be evicted on the word of the rows."""
    with shipping(root, tmp_path / "away", clock) as node:
        node.put(b"one")
        node.put(b"two", "b.txt")
        node.ship_all()
        _empty(node.place)
        node.shipper = Shipper(node.store, node.link, node.profile)  # nor does a restart help
        shipped = node.shipper.step()
        assert "HEAD.json is gone" in shipped.fenced
        assert shipped.more
        assert node.ship().fenced == ""
        with node.catalog.read() as snapshot:
            rows = snapshot.range(Replica, "", (NAME,))
        assert [row.state for row in rows] == ["wanted", "wanted"]
        node.ship_all()
        assert len(contents(node.place, "objects")) == 2
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()
        _empty(node.place)  # and once more, in the same process
        assert "HEAD.json is gone" in node.shipper.step().fenced


def test_only_what_is_gone_is_copied_again(root: Path, tmp_path: Path, clock: HandClock) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        there = node.put(b"there")
        short = node.put(b"short", "b.txt")
        gone = node.put(b"gone", "c.txt")
        node.ship_all()
        (node.place / "HEAD.json").unlink()
        (node.place / object_key(gone.checksum_sha256)).unlink()
        cut = node.place / object_key(short.checksum_sha256)
        cut.unlink()
        cut.write_bytes(b"sh")
        assert node.ship().fenced == ""
        with node.catalog.read() as snapshot:
            rows = snapshot.range(Replica, "", (NAME,))
        held = [row.digest for row in rows if row.held]
        assert held == [there.checksum_sha256]


def test_nothing_is_evicted_while_a_target_does_not_answer(
    root: Path, tmp_path: Path, clock: HandClock
) -> None:
    """It may be gone for good, and what is here be the last copy."""
    far = Between(folder_target(tmp_path / "away"))
    settings = Settings(cache=CacheSettings(max_size=Size(1)))
    with shipping(root, tmp_path / "away", clock, target=far, settings=settings) as node:
        file = node.put(b"the last copy")
        node.ship_all()
        clock.advance(DAY_US)
        path = node.store.blobs.path(file.checksum_sha256)
        os.utime(path, ns=(1, path.stat().st_mtime_ns))  # read long ago
        ship, evict = Ship(node.store, node.link), Evict(node.store, [node.link], 1)

        async def story() -> None:
            await ship.step(clock.now_us())
            far.meddle = _refusing("get")
            with pytest.raises(TargetRefused):
                await ship.step(clock.now_us())
            await evict.step(clock.now_us())
            assert evict.evicted == 0
            far.meddle = lambda *_: None
            await ship.step(clock.now_us())
            await evict.step(clock.now_us())
            assert evict.evicted == 1

        asyncio.run(story())


async def _to_its_end(job: Ship | Compact, clock: HandClock) -> None:
    while await job.step(clock.now_us()):
        pass


def _refusing(verb: str) -> Callable[[str, str], None]:
    def meddle(asked: str, key: str) -> None:
        if asked == verb and not key.startswith("probe"):
            raise TargetRefused(NAME, "AccessDenied")

    return meddle


def _empty(place: Path) -> None:
    for path in place.iterdir():
        if not path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("writers", [3])
def test_frames_that_are_being_appended_are_shipped_whole(
    root: Path, tmp_path: Path, clock: HandClock, writers: int
) -> None:
    with shipping(root, tmp_path / "away", clock) as node:
        running = [threading.Thread(target=_write_many, args=(node, n)) for n in range(writers)]
        for thread in running:
            thread.start()
        while any(thread.is_alive() for thread in running):
            assert node.shipper.step().fenced == ""
        for thread in running:
            thread.join()
        node.ship()
        assert b"".join(contents(node.place, "journal").values()) == journal_of(root)
        assert gathered(node, tmp_path / "scratch").end == node.catalog.position()


def _write_many(node: Shipping, writer: int) -> None:
    for number in range(40):
        mark = Mark(f"{writer}-{number}", "x" * 200)
        node.catalog.write(_inserting(mark), actor="test")


def _inserting(mark: Mark) -> Callable[[Any], None]:
    return lambda txn: txn.insert(mark)


def _unshipped(node: Shipping) -> tuple[int, int]:
    head = read_head(node.target).head
    assert isinstance(head, Head)
    return head.seq + 1, node.catalog.position().seq


def _stretch(node: Shipping, first: int, last: int) -> Path:
    folder = node.place / "journal" / node.store.store_id()
    return folder / f"1-{first:020}-{last:020}.log"


def _lose_beginning(node: Shipping) -> None:
    """As after a week in which the target was down: the first segment is pruned.

    The frames after the second checkpoint are in a segment of their own.
    """
    journal = Folders(node.store.root).journal
    (segment,) = journal.glob("*.log")
    from cas.catalog.journal import Segment, frames

    position = node.catalog.position()
    placed = [
        item for item in frames(segment, Segment(1, 1)) if getattr(item, "frame", None) is not None
    ]
    last = placed[-1]
    assert last.position == position  # type: ignore[union-attr]
    data = segment.read_bytes()
    node.close()
    (journal / Segment(1, last.frame.seq).filename).write_bytes(data[last.start :])  # type: ignore[union-attr]
    segment.unlink()
    reopened = Shipping(
        node.store.root, node.place, node.clock, profile=node.profile, settings=node.settings
    )
    node.__dict__.update(reopened.__dict__)
