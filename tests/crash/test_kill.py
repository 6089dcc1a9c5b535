"""A process killed at every durable step of the catalog (invariants 4 and 5).

Each scenario is killed before, halfway through and after each of its steps; then the ROOT
is opened with its index kept, removed, put back from an older copy or made in another boot,
and, in a second round, after another live process has committed next.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from cas.durable import Disk
from tests.crash.ledger import LARGE, TINY, audit, enter, labels, open_catalog, segment_paths
from tests.crash.rounds import READY, IndexIs, Scenario, change_index, every_step, trust
from tests.crash.steps import StepDisk, When
from tests.crash.victims import Report

BEFORE = ["before-1", "before-2", "before-3"]


def singles(root: Path, disk: Disk, report: Report) -> None:
    catalog = open_catalog(root, LARGE, disk)
    for number in range(4):
        catalog.write(enter(f"s-{number}"))
        report.acknowledge(f"s-{number}")
    catalog.close()


def groups(root: Path, disk: Disk, report: Report) -> None:
    catalog = open_catalog(root, LARGE, disk)

    def write(thread: int) -> None:
        for number in range(3):
            catalog.write(enter(f"t{thread}-{number}"))
            report.acknowledge(f"t{thread}-{number}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    catalog.close()


def checkpoints(root: Path, disk: Disk, report: Report) -> None:
    catalog = open_catalog(root, TINY, disk)
    for number in range(3):
        catalog.write(enter(f"c-{number}"))
        report.acknowledge(f"c-{number}")
        catalog.checkpoint()
    catalog.close()


def rotation(root: Path, disk: Disk, report: Report) -> None:
    """A new segment every other write, and checkpoints in the background."""
    catalog = open_catalog(root, TINY, disk)
    for number in range(8):
        catalog.write(enter(f"r-{number}"))
        report.acknowledge(f"r-{number}")
    catalog.close()


def recovery(root: Path, disk: Disk, report: Report) -> None:
    """Opening is the work: the template says what has to be recovered from."""
    catalog = open_catalog(root, TINY, disk)
    catalog.write(enter("after"))
    report.acknowledge("after")
    catalog.close()


def neighbour(root: Path, report: Report) -> None:
    """Has the catalog open while another process is killed, and commits next."""
    catalog = open_catalog(root)
    report.acknowledge(READY)
    report.wait_for_word()
    catalog.write(enter("neighbour"))
    report.acknowledge("neighbour")
    with catalog.read() as snapshot:
        assert "neighbour" in labels(snapshot)
    catalog.close()


def plain(root: Path) -> None:
    """Three writes, cleanly closed."""
    catalog = open_catalog(root)
    for label in BEFORE:
        catalog.write(enter(label))
    catalog.close()


def behind(root: Path) -> None:
    """The index is behind the journal by several segments."""
    index, aside = root / "catalog/index", root / "aside"
    open_catalog(root, TINY).close()
    shutil.copytree(index, aside)
    catalog = open_catalog(root, TINY)
    for label in BEFORE:
        catalog.write(enter(label))
    catalog.close()
    shutil.copyfile(aside / "data.mdb", index / "data.mdb")
    trust(index)


def torn(root: Path) -> None:
    """The last frame was cut in the middle by somebody who was killed."""
    plain(root)
    *_, last = segment_paths(root)
    data = last.read_bytes()
    last.write_bytes(data + data[: len(data) // 6])


def indexless(root: Path) -> None:
    """Checkpoints and a journal after them, no index."""
    catalog = open_catalog(root, TINY)
    for label in BEFORE:
        catalog.write(enter(label))
        catalog.checkpoint()
    catalog.close()
    shutil.rmtree(root / "catalog/index")


SCENARIOS = {
    "singles": (plain, singles),
    "groups": (plain, groups),
    "checkpoints": (plain, checkpoints),
    "rotation": (plain, rotation),
    "roll-forward": (behind, recovery),
    "torn": (torn, recovery),
    "rebuild": (indexless, recovery),
}


def attempted(acknowledged: list[str]) -> set[str]:
    """What may be there: what was acknowledged, and the one that each writer was at."""
    found = set(acknowledged)
    for label in acknowledged:
        writer, _, number = label.rpartition("-")
        if number.isdigit():
            found.add(f"{writer}-{int(number) + 1}")
    firsts = {"s-0", "c-0", "r-0", "after", *(f"t{thread}-0" for thread in range(4))}
    return found | firsts | set(BEFORE)


@pytest.fixture
def template(platter: Path, request: pytest.FixtureRequest) -> tuple[Path, Scenario]:
    prepare, scenario = SCENARIOS[request.param]
    folder = platter / "template"
    folder.mkdir()
    prepare(folder)
    return folder, scenario


def kill_everywhere(platter: Path, template: tuple[Path, Scenario], turn: int) -> None:
    """Kill at every step; the index is in the next of its states each time."""
    folder, scenario = template
    kills = 0
    for kill in every_step(scenario, folder, platter):
        kills += 1
        becomes = list(IndexIs)[(kill.number + turn) % len(IndexIs)]
        change_index(kill.root, becomes, folder / "catalog/index")
        disk = StepDisk("another boot" if becomes is IndexIs.OTHER_BOOT else "")
        acknowledged = [*BEFORE, *kill.acknowledged]
        audit(kill.root, acknowledged, attempted(kill.acknowledged), disk=disk)
    assert kills > len(When)


@pytest.mark.parametrize("template", SCENARIOS, indirect=True)
def test_a_killed_process_loses_nothing_it_was_told_is_durable(
    platter: Path, template: tuple[Path, Scenario]
) -> None:
    kill_everywhere(platter, template, turn=0)


@pytest.mark.soak
@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize("template", SCENARIOS, indirect=True)
def test_and_with_every_other_state_of_the_index(
    platter: Path, template: tuple[Path, Scenario], turn: int
) -> None:
    kill_everywhere(platter, template, turn)


@pytest.mark.parametrize("name", ["singles", "groups", "rotation", "checkpoints"])
def test_a_second_process_commits_next_and_both_are_kept(platter: Path, name: str) -> None:
    prepare, scenario = SCENARIOS[name]
    template = platter / "template"
    template.mkdir()
    prepare(template)

    rounds = every_step(scenario, template, platter, neighbour=neighbour)
    for number, kill in enumerate(rounds):
        becomes = list(IndexIs)[number % len(IndexIs)]
        change_index(kill.root, becomes, template / "catalog/index")
        disk = StepDisk("another boot" if becomes is IndexIs.OTHER_BOOT else "")
        assert "neighbour" in kill.acknowledged
        audit(kill.root, [*BEFORE, *kill.acknowledged], attempted(kill.acknowledged), disk=disk)
