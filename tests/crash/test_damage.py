"""The damage table: one flipped bit, and what becomes of every acknowledged write.

`TABLE` is the promise. Each row is made for real, at every part of a frame: recovered means
that nothing acknowledged is lost; refused, that opening names the damaged place and touches
nothing; cut, the one honest limit: the last frame of the journal, flipped, with no index
left to say that it was acknowledged, looks like a write torn by a power cut, and only that
write goes.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import pytest

from cas.catalog.journal import Placed, frames, segments_in
from cas.catalog.recovery import Folders
from cas.errors import BlobcaskError, IndexDamaged, JournalDamaged
from tests.crash.ledger import (
    LARGE,
    TINY,
    audit,
    enter,
    entry,
    journal_damage,
    labels,
    open_catalog,
    strike,
)
from tests.crash.rounds import copy_root
from tests.crash.steps import StepDisk
from tests.crash.victims import Report, Victim

COUNT = 9
CHECKPOINT_AFTER = 6
WRITES = [f"w-{number}" for number in range(1, COUNT + 1)]


class Outcome(StrEnum):
    RECOVERED = "recovered"
    REFUSED = "refused"
    CUT = "cut"


class Index(StrEnum):
    THERE = "index"
    GONE = "no index"
    OTHER_BOOT = "index of another boot"


@dataclass(frozen=True)
class Row:
    """A bit flips in frame `frame` (from 1); `checkpoint`: one was made after frame 6."""

    frame: int
    index: Index
    checkpoint: bool
    outcome: Outcome
    why: str

    def __str__(self) -> str:
        made = "checkpoint" if self.checkpoint else "no checkpoint"
        return f"frame {self.frame}, {self.index}, {made}: {self.outcome}"


_STANDS = "the index of this boot shows what was acknowledged; `journal verify` names the frame"
_SAVED = "the index of this boot becomes a checkpoint, and the journal goes on after it"
_COVERED = "the checkpoint holds what the frame did"
_NAMED = "a valid frame after it proves that it was acknowledged"
_TORN = "nothing tells it from a write that was torn before it was acknowledged"

FIRST, MIDDLE, LATE, LAST = 1, 4, 8, COUNT
TABLE = [
    *(Row(frame, Index.THERE, made, Outcome.RECOVERED, _STANDS)
      for frame in (FIRST, MIDDLE, LATE) for made in (False, True)),
    *(Row(LAST, Index.THERE, made, Outcome.RECOVERED, _SAVED) for made in (False, True)),
    *(Row(frame, index, False, Outcome.REFUSED, _NAMED)
      for frame in (FIRST, MIDDLE, LATE) for index in (Index.GONE, Index.OTHER_BOOT)),
    *(Row(frame, index, True, Outcome.RECOVERED, _COVERED)
      for frame in (FIRST, MIDDLE) for index in (Index.GONE, Index.OTHER_BOOT)),
    *(Row(LATE, index, True, Outcome.REFUSED, _NAMED)
      for index in (Index.GONE, Index.OTHER_BOOT)),
    *(Row(LAST, index, made, Outcome.CUT, _TORN)
      for index in (Index.GONE, Index.OTHER_BOOT) for made in (False, True)),
]  # fmt: skip

# Where in a frame the bit flips: offset from its start, or from its end when negative.
PLACES = {"magic": 1, "length": 4, "low length": 7, "checksum": 9, "payload": 40, "end": -1}


@pytest.fixture(scope="module", params=[False, True], ids=["no checkpoint", "checkpoint"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("damage")
    write(root, checkpoint=request.param)
    return root


def write(root: Path, *, checkpoint: bool) -> None:
    catalog = open_catalog(root)
    for number, label in enumerate(WRITES, start=1):
        catalog.write(enter(label))
        if checkpoint and number == CHECKPOINT_AFTER:
            catalog.checkpoint()
    catalog.close()


def placed(root: Path) -> list[tuple[Path, Placed]]:
    """Every frame of the journal and its segment, oldest first."""
    folder = Folders(root).journal
    found = []
    for segment in segments_in(folder):
        path = folder / segment.filename
        for item in frames(path, segment):
            assert isinstance(item, Placed)
            found.append((path, item))
    return found


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Turn one bit over, in place: the file stays the same file."""
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 1 << bit]), offset)
    finally:
        os.close(fd)


def settle(root: Path, index: Index) -> StepDisk:
    if index is Index.GONE:
        shutil.rmtree(root / "catalog/index")
    return StepDisk("another boot" if index is Index.OTHER_BOOT else "")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_flipped_bit_in_a_frame(platter: Path, row: Row, place: str) -> None:
    write(platter, checkpoint=row.checkpoint)
    path, item = placed(platter)[row.frame - 1]
    offset = PLACES[place]
    flip(path, offset + (item.start if offset >= 0 else item.end))
    disk = settle(platter, row.index)
    if row.outcome is Outcome.RECOVERED:
        assert audit(platter, WRITES, WRITES, disk=disk, damaged=True) == set(WRITES)
        if row.frame != LAST:
            assert journal_damage(platter)[0].offset == item.start
        return
    if row.outcome is Outcome.CUT:
        assert audit(platter, WRITES[:-1], WRITES[:-1], disk=disk) == set(WRITES[:-1])
        return
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(JournalDamaged) as refused:
            open_catalog(platter, LARGE, disk)
        assert (refused.value.path, refused.value.offset) == (path, item.start)
    # Never truncated: with the bit turned back all is there.
    assert path.read_bytes() == before
    flip(path, offset + (item.start if offset >= 0 else item.end))
    assert audit(platter, WRITES, WRITES, disk=disk) == set(WRITES)


@pytest.mark.parametrize("index", Index)
def test_the_last_frame_of_an_older_segment_is_not_the_last(platter: Path, index: Index) -> None:
    catalog = open_catalog(platter, TINY)
    for label in WRITES[:4]:
        catalog.write(enter(label))
    catalog.close()
    shutil.rmtree(platter / "catalog/checkpoints")
    found = placed(platter)
    path = found[0][0]
    *_, item = (frame for where, frame in found if where == path)
    assert found[-1][0] != path
    flip(path, item.start + PLACES["payload"])
    disk = settle(platter, index)
    if index is Index.THERE:
        audit(platter, WRITES[:4], disk=disk, damaged=True)
        return
    with pytest.raises(JournalDamaged) as refused:
        open_catalog(platter, TINY, disk)
    assert (refused.value.path, refused.value.offset) == (path, item.start)


@pytest.mark.parametrize("lost", ["cut back", "removed"])
def test_a_journal_that_lost_its_end_under_a_running_machine_is_saved_from_the_index(
    platter: Path, lost: str
) -> None:
    write(platter, checkpoint=False)
    path, item = placed(platter)[6]
    if lost == "cut back":
        os.truncate(path, item.start + 20)
    else:
        path.unlink()
    audit(platter, WRITES, WRITES, damaged=True)
    # What was saved holds without that index too.
    shutil.rmtree(platter / "catalog/index")
    audit(platter, WRITES, WRITES, damaged=True)


def test_a_journal_that_loses_its_end_while_it_is_open_stops_the_writers(platter: Path) -> None:
    write(platter, checkpoint=False)
    path, item = placed(platter)[6]
    catalog = open_catalog(platter)
    os.truncate(path, item.start)
    with pytest.raises(JournalDamaged):
        catalog.write(enter("next"))
    with catalog.read() as snapshot:
        assert labels(snapshot) == set(WRITES)
    catalog.close()
    audit(platter, WRITES, WRITES, damaged=True)


def test_an_older_index_never_outvotes_a_newer_checkpoint(platter: Path) -> None:
    """Its segment is pruned, and with it all that could prove it: the journal decides."""
    catalog = open_catalog(platter, TINY)
    catalog.write(enter(WRITES[0]))
    catalog.close()
    index, older = platter / "catalog/index", platter / "older"
    shutil.copytree(index, older)
    catalog = open_catalog(platter, TINY)
    for label in WRITES[1:]:
        catalog.write(enter(label))
        catalog.checkpoint()
    catalog.close()
    assert placed(platter)[0][1].frame.seq > 1
    shutil.copyfile(older / "data.mdb", index / "data.mdb")
    audit(platter, WRITES, WRITES)


# --- checkpoints


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("index", Index)
def test_a_flipped_bit_in_the_newest_checkpoint_costs_time_only(
    platter: Path, index: Index, place: float
) -> None:
    write(platter, checkpoint=True)
    newest = max((platter / "catalog/checkpoints").iterdir())
    flip(newest, int(place * (newest.stat().st_size - 1)))
    audit(platter, WRITES, WRITES, disk=settle(platter, index))


def test_bad_checkpoints_after_which_the_journal_was_pruned_are_refused(platter: Path) -> None:
    catalog = open_catalog(platter, TINY)
    for label in WRITES:
        catalog.write(enter(label))
        catalog.checkpoint()
    catalog.close()
    assert placed(platter)[0][1].frame.seq > 1
    for checkpoint in (platter / "catalog/checkpoints").iterdir():
        flip(checkpoint, 50)
    audit(platter, WRITES, WRITES)  # the index is there
    for checkpoint in (platter / "catalog/checkpoints").iterdir():
        flip(checkpoint, checkpoint.stat().st_size - 2)
    shutil.rmtree(platter / "catalog/index")
    kept = sorted(path.name for path in (platter / "catalog/journal").iterdir())
    with pytest.raises(JournalDamaged, match="no segment holds frame 1"):
        open_catalog(platter, TINY)
    assert sorted(path.name for path in (platter / "catalog/journal").iterdir()) == kept


# --- the index

RECORDS = 60


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose index is some dozens of pages."""
    root: Path = tmp_path_factory.mktemp("indexed")
    catalog = open_catalog(root)
    for number in range(RECORDS):
        catalog.write(enter(f"i-{number}"))
    catalog.close()
    return root


def everything() -> set[str]:
    return {f"i-{number}" for number in range(RECORDS)}


def use(root: Path) -> Callable[[Report], None]:
    """What a process does with a damaged index until something tells it to stop."""

    def body(report: Report) -> None:
        try:
            catalog = open_catalog(root)
            try:
                catalog.write(enter("new"))
                report.acknowledge("+new")
                catalog.write(strike("i-7"))
                report.acknowledge("-i-7")
                with catalog.read() as snapshot:
                    snapshot.find(type(entry("", 1)), "storage_ref", entry("i-9", 2).storage_ref)
                catalog.verify_state()
                report.acknowledge("verified")
            finally:
                catalog.close()
        except (BlobcaskError, ValueError) as error:
            report.acknowledge(f"told: {type(error).__name__}")

    return body


def damage_and_use(indexed: Path, root: Path, damage: Callable[[Path], None]) -> str:
    """Damage the index, use it in a process of its own, and find nothing lost afterwards.

    Returns what became of the process: "verified", "told: ..." or "died".
    """
    copy_root(indexed, root)
    damage(root / "catalog/index/data.mdb")
    victim = Victim(use(root))
    try:
        victim.end()
    except AssertionError:
        # LMDB's own assertions end the process (SIGABRT), or a page beyond the file does
        # (SIGBUS). Nothing was lost by it, but the index has to be removed.
        victim.acknowledged.append("died")
    outcome = victim.acknowledged[-1]
    told = set(victim.acknowledged)
    expected = everything() | ({"new"} & {label[1:] for label in told})
    expected -= {"i-7"} if "-i-7" in told else set()
    attempted = everything() | {"new"}
    if outcome == "verified":
        # What the audit of the index passes may be trusted.
        audit(root, expected - {"i-7"}, attempted)
    elif outcome.startswith("told: IndexDamaged"):
        # What was told of is made anew at the next opening, by itself.
        audit(root, expected - {"i-7"}, attempted)
    shutil.rmtree(root / "catalog/index", ignore_errors=True)
    found = audit(root, expected - {"i-7"}, attempted)
    if "-i-7" in told:
        assert "i-7" not in found
    shutil.rmtree(root)
    return outcome


def test_a_flipped_bit_anywhere_in_the_index_loses_nothing(indexed: Path, platter: Path) -> None:
    size = (indexed / "catalog/index/data.mdb").stat().st_size
    chance = random.Random(2)
    outcomes = set()
    for page in range(0, size // 4096, 2):
        at = page * 4096 + chance.randrange(4096)
        outcomes.add(damage_and_use(indexed, platter / "root", partial(flip, offset=at)))
    assert "verified" in outcomes
    assert "told: IndexDamaged" in outcomes


def test_torn_pages_of_the_index_lose_nothing(indexed: Path, platter: Path) -> None:
    size = (indexed / "catalog/index/data.mdb").stat().st_size
    chance = random.Random(3)

    def tear(path: Path) -> None:
        with path.open("r+b") as file:
            for page in chance.sample(range(size // 4096), chance.choice([1, 3, 10])):
                file.seek(page * 4096)
                file.write(chance.choice([bytes(4096), chance.randbytes(2048), bytes(512)]))

    outcomes = {damage_and_use(indexed, platter / "root", tear) for _ in range(40)}
    assert outcomes & {"told: IndexDamaged", "died"}


@pytest.mark.parametrize("size", [0, 100, 4096, 8192, 20_000])
def test_an_index_cut_short_is_made_anew(indexed: Path, platter: Path, size: int) -> None:
    root = platter / "root"
    outcome = damage_and_use(indexed, root, lambda path: os.truncate(path, size))
    assert outcome == "verified"


def test_a_flipped_bit_in_the_head_of_the_index_makes_it_anew(indexed: Path, platter: Path) -> None:
    root = platter / "root"
    copy_root(indexed, root)
    catalog = open_catalog(root)
    chain = catalog.position().chain
    catalog.close()
    data = root / "catalog/index/data.mdb"
    content = data.read_bytes()
    at = content.find(chain)
    while at >= 0:
        flip(data, at)
        at = content.find(chain, at + 1)
    audit(root, everything(), everything())


def test_an_index_that_was_found_damaged_is_made_anew_at_the_next_opening(
    indexed: Path, platter: Path
) -> None:
    root = platter / "root"
    copy_root(indexed, root)
    data = root / "catalog/index/data.mdb"
    content = data.read_bytes()
    reference = entry("i-30", 1).storage_ref.encode()
    at = content.find(reference)
    while at >= 0:
        flip(data, at + len(reference) - 1)
        at = content.find(reference, at + 1)
    catalog = open_catalog(root)
    with pytest.raises(IndexDamaged):
        catalog.verify_state()
    catalog.close()
    audit(root, everything(), everything())
