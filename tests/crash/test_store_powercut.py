"""A power cut at every moment of every operation on files.

Of what was not synced any part may be lost: sectors of an object, its length, its name in
its folder, each on its own. Every acknowledged file is there with the right bytes, and what
was torn and never acknowledged poisons no later put (invariants 1 and 4).
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.powercut import Cut, RecordingDisk
from tests.crash.rounds import copy_root
from tests.crash.steps import StepDisk
from tests.crash.stores import ACTS, Act, judge, make_template, open_store

CUTS = 40  # of the hundreds there are; the long form takes all


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory: the cut is played, and no real disk is needed."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="blobcask-", dir=place if place.is_dir() else None
    ) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(memory: Path) -> Path:
    root = memory / "template"
    make_template(root)
    return root


def cuts_of(act: Act, template: Path, root: Path) -> list[Cut]:
    """Do `act` in a copy of the template; every cut that its steps allow."""
    copy_root(template, root)
    disk = RecordingDisk(root)
    with open_store(root, disk, days=4) as store:
        begin = len(disk.events)
        act(store, disk.note)
    return [cut for cut in disk.cuts(seed=1, some=4) if cut.moment >= begin]


def look(cut: Cut, place: Path) -> None:
    cut.build(place)
    try:
        judge(place, cut.acknowledged, disk=StepDisk("next boot"), torn_orphans=True)
    except BaseException as error:
        error.add_note(str(cut))
        raise
    shutil.rmtree(place)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_a_power_cut_loses_no_file(template: Path, memory: Path, act: Act) -> None:
    cuts = cuts_of(act, template, memory / act.__name__)
    for cut in random.Random(1).sample(cuts, min(CUTS, len(cuts))):
        look(cut, memory / "cut")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_no_power_cut_of_all_loses_a_file(template: Path, memory: Path, act: Act) -> None:
    for cut in cuts_of(act, template, memory / act.__name__):
        look(cut, memory / "cut")
