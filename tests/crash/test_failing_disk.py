"""A disk that reports errors: fail-stop on a failed sync, and a full one that still deletes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cas.catalog.ballast import BALLAST_BYTES
from cas.catalog.local import CatalogSettings
from cas.errors import CatalogError, CatalogFailed, StoreFull
from cas.records import Mark
from tests.crash.ledger import LARGE, TINY, audit, enter, labels, open_catalog, strike
from tests.crash.rounds import IndexIs, change_index, copy_root
from tests.crash.steps import FailingDisk, StepDisk
from tests.crash.test_kill import BEFORE, SCENARIOS
from tests.crash.victims import Report, Victim
from tests.mounts import fill, mounted

WRITES = [f"w-{number}" for number in range(4)]


class Switched:
    """Says yes from step `number` on, for as long as the test likes."""

    def __init__(self, number: int, once: bool) -> None:
        self.number = number
        self.once = once

    def __call__(self, name: str, number: int) -> bool:
        return number == self.number if self.once else number >= self.number


def work(root: Path, settings: CatalogSettings, disk: FailingDisk) -> list[str]:
    """Writes until the catalog stops; returns what was acknowledged."""
    acknowledged = []
    try:
        catalog = open_catalog(root, settings, disk)
    except (OSError, CatalogError):
        return []
    for label in WRITES:
        try:
            catalog.write(enter(label))
        except (CatalogFailed, OSError):
            continue
        acknowledged.append(label)
    catalog.close()
    return acknowledged


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("name", ["singles", "rotation", "roll-forward", "torn", "rebuild"])
def test_eio_at_every_step_loses_nothing_acknowledged(platter: Path, name: str, once: bool) -> None:
    template = platter / "template"
    template.mkdir()
    SCENARIOS[name][0](template)
    settings = LARGE if name == "singles" else TINY
    for number in range(1, 1000):
        root = platter / str(number)
        copy_root(template, root)
        disk = FailingDisk(errno.EIO, Switched(number, once))
        acknowledged = work(root, settings, disk)
        becomes = list(IndexIs)[number % len(IndexIs)]
        change_index(root, becomes, template / "catalog/index")
        healthy = StepDisk("another boot" if becomes is IndexIs.OTHER_BOOT else "")
        audit(root, [*BEFORE, *acknowledged], {*BEFORE, *WRITES}, disk=healthy)
        shutil.rmtree(root)
        if not disk.failed:
            return


def test_after_a_failed_sync_nobody_writes_until_the_catalog_is_reopened(root: Path) -> None:
    """One failed fdatasync stops this process and the others; a second one proves nothing."""
    sick: list[str] = []
    disk = FailingDisk(errno.EIO, lambda name, _: name == "sync_data" and bool(sick))

    def other(report: Report) -> None:
        catalog = open_catalog(root)
        report.acknowledge("ready")
        report.wait_for_word()
        with pytest.raises(CatalogFailed):
            catalog.write(enter("other"))
        with catalog.read() as snapshot:
            assert labels(snapshot) == {"w-0"}
        report.acknowledge("stopped")
        catalog.close()

    open_catalog(root).close()
    beside = Victim(other)
    assert beside.hear() == "ready"
    catalog = open_catalog(root, LARGE, disk)
    catalog.write(enter("w-0"))
    sick.append("now")
    with pytest.raises(CatalogFailed, match="could not be synced"):
        catalog.write(enter("w-1"))
    sick.clear()
    with pytest.raises(CatalogFailed):
        catalog.write(enter("w-2"))
    beside.go()
    assert beside.hear() == "stopped"
    assert not beside.end()
    catalog.close()
    assert audit(root, ["w-0"]) == {"w-0"}


def test_a_failed_sync_of_what_a_killed_process_left_stops_everybody_too(root: Path) -> None:
    """Roll-forward syncs before it shows; when that fails, asking again would lie."""
    SCENARIOS["roll-forward"][0](root)
    disk = FailingDisk(errno.EIO, lambda name, _: name == "sync_data")
    for _ in range(2):
        with pytest.raises((CatalogFailed, OSError)):
            open_catalog(root, TINY, disk)
    audit(root, BEFORE, BEFORE)


def test_the_mark_of_a_failed_sync_survives_the_death_of_its_process(root: Path) -> None:
    def victim(report: Report) -> None:
        sick: list[str] = []
        disk = FailingDisk(errno.EIO, lambda name, _: name == "sync_data" and bool(sick))
        catalog = open_catalog(root, LARGE, disk)
        catalog.write(enter("w-0"))
        report.acknowledge("w-0")
        sick.append("now")
        with pytest.raises(CatalogFailed):
            catalog.write(enter("w-1"))
        os._exit(0)

    child = Victim(victim)
    assert not child.end()
    assert audit(root, child.acknowledged) == {"w-0"}


# --- full


@pytest.mark.parametrize("name", ["singles", "rotation"])
def test_enospc_at_every_step_is_told_and_passes(platter: Path, name: str) -> None:
    template = platter / "template"
    template.mkdir()
    SCENARIOS[name][0](template)
    settings = LARGE if name == "singles" else TINY
    told = 0
    for number in range(1, 1000):
        root = platter / str(number)
        copy_root(template, root)
        disk = FailingDisk(errno.ENOSPC, Switched(number, once=False))
        acknowledged = []
        try:
            catalog = open_catalog(root, settings, disk)
        except (OSError, CatalogError, StoreFull):
            pass
        else:
            for label in WRITES:
                try:
                    catalog.write(enter(label))
                    acknowledged.append(label)
                except StoreFull:
                    told += 1
                except CatalogFailed:
                    pass  # a sync that found no space: what is on the disk is unknown
            catalog.close()
        audit(root, [*BEFORE, *acknowledged], {*BEFORE, *acknowledged, *WRITES})
        shutil.rmtree(root)
        if not disk.failed:
            break
    assert told


SMALL_DISK_BYTES = 96 << 20


@pytest.fixture
def small_disk(root: Path, program: Callable[[str], str]) -> Iterator[Path]:
    """An ext4 of its own on a loop device; skipped where this user may not mount."""
    with mounted(root, SMALL_DISK_BYTES, program, ext4=True) as disk:
        yield disk


ROOMY = CatalogSettings(lock_wait_s=60)


def big(number: int) -> Mark:
    return Mark(f"{number:06}", "x" * 4000)


def test_a_disk_that_others_fill_refuses_with_numbers_and_still_deletes(small_disk: Path) -> None:
    root = small_disk / "root"
    root.mkdir()
    catalog = open_catalog(root, ROOMY)
    assert (root / "catalog/ballast").stat().st_blocks * 512 >= BALLAST_BYTES
    for number in range(50):
        catalog.write(lambda txn, number=number: txn.insert(big(number)))  # type: ignore[misc]
    hog = fill(small_disk)
    written = 50
    refused: StoreFull | None = None
    # The ballast is given back when the space ends, and used up by these.
    while refused is None:
        try:
            catalog.write(lambda txn: txn.insert(big(written)))  # noqa: B023
            written += 1
        except StoreFull as error:
            refused = error
        assert written < 20_000
    assert refused.free_bytes < 1 << 20
    hog.unlink()
    catalog.write(lambda txn: txn.insert(big(written)))
    with catalog.read() as snapshot:
        assert len(snapshot.range(Mark, "", limit=1 << 30)) == written + 1
    catalog.verify_state()
    catalog.close()
    audit(root, [], set())


def test_deletes_work_on_a_full_disk(small_disk: Path) -> None:
    root = small_disk / "root"
    root.mkdir()
    catalog = open_catalog(root, ROOMY)
    for number in range(200):
        catalog.write(lambda txn, number=number: txn.insert(big(number)))  # type: ignore[misc]
    fill(small_disk)
    for number in range(200):
        catalog.write(lambda txn, number=number: txn.delete(big(number)))  # type: ignore[misc]
    catalog.verify_state()
    catalog.close()


@pytest.mark.parametrize("becomes", [IndexIs.KEPT, IndexIs.REMOVED, IndexIs.OTHER_BOOT])
def test_a_full_disk_opens_and_deletes(small_disk: Path, becomes: IndexIs) -> None:
    """After a restart too, when the index must be made anew and there is only the ballast."""
    root = small_disk / "root"
    root.mkdir()
    catalog = open_catalog(root, ROOMY)
    for number in range(200):
        catalog.write(lambda txn, number=number: txn.insert(big(number)))  # type: ignore[misc]
    catalog.close()
    change_index(root, becomes, root)
    fill(small_disk)
    disk = StepDisk("another boot" if becomes is IndexIs.OTHER_BOOT else "")
    catalog = open_catalog(root, ROOMY, disk)
    catalog.write(lambda txn: txn.delete(big(1)))
    catalog.verify_state()
    with catalog.read() as snapshot:
        assert len(snapshot.range(Mark, "", limit=1 << 30)) == 199
    catalog.close()


def test_a_label_that_was_struck_stays_struck(root: Path) -> None:
    catalog = open_catalog(root)
    catalog.write(enter("a"))
    catalog.write(strike("a"))
    catalog.close()
    assert audit(root, []) == set()
