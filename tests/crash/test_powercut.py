"""A power cut at every moment: any part of what was not synced is lost (invariant 4)."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from cas.catalog.local import CatalogSettings
from tests.crash.ledger import LARGE, TINY, audit, enter, open_catalog
from tests.crash.powercut import Cut, RecordingDisk
from tests.crash.steps import StepDisk
from tests.crash.test_kill import BEFORE, SCENARIOS


def singles(disk: RecordingDisk, settings: CatalogSettings) -> set[str]:
    catalog = open_catalog(disk.root, settings, disk)
    for number in range(5):
        catalog.write(enter(f"s-{number}"))
        disk.note(f"s-{number}")
    catalog.close()
    return {f"s-{number}" for number in range(5)}


def groups(disk: RecordingDisk, settings: CatalogSettings) -> set[str]:
    catalog = open_catalog(disk.root, settings, disk)

    def write(thread: int) -> None:
        for number in range(3):
            catalog.write(enter(f"t{thread}-{number}"))
            disk.note(f"t{thread}-{number}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    catalog.close()
    return {f"t{thread}-{number}" for thread in range(4) for number in range(3)}


def checkpoints(disk: RecordingDisk, settings: CatalogSettings) -> set[str]:
    catalog = open_catalog(disk.root, settings, disk)
    for number in range(4):
        catalog.write(enter(f"c-{number}"))
        disk.note(f"c-{number}")
        catalog.checkpoint()
    catalog.close()
    return {f"c-{number}" for number in range(4)}


def recovery(disk: RecordingDisk, settings: CatalogSettings) -> set[str]:
    catalog = open_catalog(disk.root, settings, disk)
    catalog.write(enter("after"))
    disk.note("after")
    catalog.close()
    return {"after"}


def look(cut: Cut, platter: Path, before: list[str], tried: set[str]) -> None:
    """The state after `cut`, opened in the next boot."""
    place = platter / "root"
    cut.build(place)
    try:
        audit(place, [*before, *cut.acknowledged], tried, disk=StepDisk("next boot"))
    except BaseException as error:
        error.add_note(str(cut))
        raise
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("work", "settings"),
    [(singles, LARGE), (singles, TINY), (groups, LARGE), (groups, TINY), (checkpoints, TINY)],
    ids=["singles", "rotation", "groups", "groups with rotation", "checkpoints"],
)
@pytest.mark.parametrize("new", [True, False], ids=["new", "in use"])
def test_a_power_cut_loses_nothing_acknowledged(
    root: Path, platter: Path, work: object, settings: CatalogSettings, new: bool
) -> None:
    before = [] if new else BEFORE
    if not new:
        SCENARIOS["singles"][0](root)
    disk = RecordingDisk(root)
    assert callable(work)
    tried = {*before, *work(disk, settings)}
    for cut in disk.cuts(seed=0, some=3):
        look(cut, platter, before, tried)


@pytest.mark.parametrize("name", ["roll-forward", "torn", "rebuild"])
def test_a_power_cut_during_recovery_loses_nothing(root: Path, platter: Path, name: str) -> None:
    SCENARIOS[name][0](root)
    disk = RecordingDisk(root)
    tried = {*BEFORE, *recovery(disk, TINY)}
    for cut in disk.cuts(seed=0, some=4):
        look(cut, platter, BEFORE, tried)


def test_a_second_power_cut_during_the_recovery_from_the_first(root: Path, platter: Path) -> None:
    disk = RecordingDisk(root)
    tried = groups(disk, TINY)
    for number, cut in enumerate(disk.cuts(seed=1, some=1)):
        if number % 9:
            continue
        again = platter / "again"
        cut.build(again)
        second = RecordingDisk(again, "next boot")
        recovery(second, TINY)
        for later in second.cuts(seed=number, some=1):
            look(later, platter, cut.acknowledged, {*tried, "after"})
        shutil.rmtree(again)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(20))
def test_many_power_cuts(root: Path, platter: Path, seed: int) -> None:
    disk = RecordingDisk(root)
    tried = groups(disk, TINY)
    for cut in disk.cuts(seed=seed * 1000, some=40):
        look(cut, platter, [], tried)


def test_a_disk_that_does_not_sync_is_found_out(root: Path, platter: Path) -> None:
    """The simulator itself: with syncs left out, a cut must lose acknowledged writes."""

    class Forgetful(RecordingDisk):
        def sync_data(self, fd: int) -> None:
            """Says so and does nothing."""

    disk = Forgetful(root)
    tried = singles(disk, LARGE)

    def look_everywhere() -> None:
        for cut in disk.cuts(seed=0, some=1):
            look(cut, platter, [], tried)

    with pytest.raises(AssertionError, match="acknowledged and lost"):
        look_everywhere()
