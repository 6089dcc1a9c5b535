"""Recovery, rule by rule; whole scenarios are in tests/crash."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cas.catalog.journal import Segment, segments_in
from cas.catalog.local import CatalogSettings
from cas.catalog.recovery import Folders, verify_journal
from cas.errors import JournalDamaged
from tests.crash.ledger import (
    LARGE,
    TINY,
    audit,
    enter,
    journal_damage,
    labels,
    open_catalog,
    segment_paths,
)
from tests.crash.rounds import trust
from tests.crash.steps import StepDisk

WRITES = [f"w-{number}" for number in range(9)]
# Segments of two or three frames, none of them pruned.
KEPT = CatalogSettings(checkpoint_bytes=4 << 10, min_free_bytes=1 << 60)


@pytest.fixture
def written(root: Path) -> Path:
    """Writes in several segments, nothing pruned."""
    catalog = open_catalog(root, KEPT)
    for label in WRITES:
        catalog.write(enter(label))
    catalog.close()
    return root


def test_an_older_index_shows_everything_before_anybody_writes(root: Path) -> None:
    catalog = open_catalog(root)
    catalog.write(enter("old"))
    catalog.close()
    index = root / "catalog/index"
    shutil.copytree(index, root / "older")
    catalog = open_catalog(root)
    catalog.write(enter("new"))
    position = catalog.position()
    catalog.close()
    shutil.copyfile(root / "older/data.mdb", index / "data.mdb")
    catalog = open_catalog(root)
    assert catalog.position() == position
    with catalog.read() as snapshot:
        assert labels(snapshot) == {"old", "new"}
    catalog.close()


def test_a_rebuilt_index_is_at_the_same_place(written: Path) -> None:
    catalog = open_catalog(written)
    position = catalog.position()
    catalog.close()
    for boot in ("", "another"):
        shutil.rmtree(written / "catalog/index", ignore_errors=True)
        catalog = open_catalog(written, LARGE, StepDisk(boot))
        assert catalog.position() == position
        catalog.verify_state()
        catalog.close()


def test_an_index_of_another_history_is_not_believed(root: Path) -> None:
    """A copied index whose journal went another way: the journal is the truth."""
    one, other = root / "one", root / "other"
    for place, label in ((one, "theirs"), (other, "ours")):
        place.mkdir()
        catalog = open_catalog(place)
        catalog.write(enter(label))
        if label == "ours":
            catalog.write(enter("more"))
        catalog.close()
    shutil.copyfile(one / "catalog/index/data.mdb", other / "catalog/index/data.mdb")
    trust(other / "catalog/index")
    found = audit(other, ["ours", "more"])
    assert found == {"ours", "more"}


def test_an_index_that_cannot_be_replaced_is_not_thrown_away(written: Path) -> None:
    shutil.rmtree(written / "catalog/checkpoints")
    middle = segment_paths(written)[1]
    content = middle.read_bytes()
    middle.unlink()
    data = (written / "catalog/index/data.mdb").read_bytes()
    for _ in range(2):
        with pytest.raises(JournalDamaged):
            open_catalog(written, LARGE, StepDisk("another boot"))
        assert (written / "catalog/index/data.mdb").read_bytes() == data
    middle.write_bytes(content)
    audit(written, WRITES, WRITES, disk=StepDisk("another boot"))
    assert not (written / "catalog/index.aside").exists()


def test_a_begun_segment_without_a_frame_is_dropped(written: Path) -> None:
    folder = Folders(written).journal
    last = segments_in(folder)[-1]
    stray = folder / Segment(1, 10).filename
    stray.write_bytes(b"")
    audit(written, WRITES, WRITES, settings=LARGE)
    assert last in segments_in(folder)


def test_verify_names_every_bad_place_and_goes_on(written: Path) -> None:
    folders = Folders(written)
    assert journal_damage(written) == []
    first, second, *_ = segment_paths(written)
    for path in (first, second):
        data = bytearray(path.read_bytes())
        data[30] ^= 1
        path.write_bytes(data)
    found = [item for item in verify_journal(folders) if isinstance(item, JournalDamaged)]
    assert [(item.path, item.offset) for item in found] == [(first, 0), (second, 0)]


def test_verify_names_a_segment_that_is_missing(written: Path) -> None:
    _, second, *_ = segment_paths(written)
    second.unlink()
    (damage,) = journal_damage(written)
    assert "does not follow" in str(damage)


def test_leftovers_of_a_killed_checkpoint_go_with_the_next(written: Path) -> None:
    stray = written / "catalog/checkpoints/.tmp-0123456789abcdef"
    stray.write_bytes(b"half of one")
    catalog = open_catalog(written, TINY)
    catalog.checkpoint()
    catalog.write(enter("more"))
    catalog.checkpoint()
    catalog.close()
    assert not stray.exists()


def test_changes_say_so_where_the_journal_is_damaged(written: Path) -> None:
    catalog = open_catalog(written)
    assert len(list(catalog.changes(0))) == len(WRITES)
    path = segment_paths(written)[1]
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    # Also for one who wants to begin right there.
    with pytest.raises(JournalDamaged):
        list(catalog.changes(int(path.name[2:22]) - 1))
    with pytest.raises(JournalDamaged):
        list(catalog.changes(0))
    catalog.close()
