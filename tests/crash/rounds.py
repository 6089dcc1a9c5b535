"""One scenario, killed at every durable step, with every state of the index it may meet.

    for kill in every_step(scenario, ...): ...

A scenario is a function of a ROOT, a disk and a report: it does its work with that disk and
acknowledges through the report what it was told is durable. Others are added by writing
such a function and a check; nothing here knows what is stored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cas.catalog.ground import Boot
from cas.durable import DISK, Disk
from tests.crash.steps import KillingDisk, When
from tests.crash.victims import Report, Victim

Scenario = Callable[[Path, Disk, Report], None]
Neighbour = Callable[[Path, Report], None]


class IndexIs(StrEnum):
    """What becomes of the index between the kill and the next opening."""

    KEPT = "kept"
    REMOVED = "removed"
    OLDER = "older"  # put back from a copy made before the scenario, in place
    OTHER_BOOT = "other boot"  # the machine was restarted cleanly


def copy_root(source: Path, target: Path) -> None:
    """A ROOT with the same content, whose index stays trusted (a plain copy's would not be)."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    index = target / "catalog/index"
    if (index / "BOOT").exists():
        trust(index)


def trust(index: Path) -> None:
    """Let BOOT speak of the data file that lies there now."""
    boot = Boot.of(index, DISK)
    text = {field: getattr(boot, field) for field in boot.__struct_fields__}
    (index / "BOOT").write_text(json.dumps(text))


def change_index(root: Path, becomes: IndexIs, older: Path) -> None:
    """Do to the index of the closed `root` what `becomes` says."""
    index = root / "catalog/index"
    if becomes is IndexIs.REMOVED:
        shutil.rmtree(index, ignore_errors=True)
    elif becomes is IndexIs.OLDER and (older / "data.mdb").exists():
        index.mkdir(exist_ok=True)
        for name in ("data.mdb", "BOOT"):
            shutil.copyfile(older / name, index / name)
        trust(index)


READY = "ready"


def _beside(neighbour: Neighbour, root: Path) -> Victim:
    other = Victim(lambda report: neighbour(root, report))
    assert other.hear() == READY
    return other


@dataclass(frozen=True)
class Kill:
    """A killed process: where, and what the parent may count on."""

    number: int
    when: When
    root: Path
    acknowledged: list[str]


def every_step(
    scenario: Scenario,
    template: Path,
    folder: Path,
    *,
    whens: tuple[When, ...] = tuple(When),
    stride: int = 1,
    neighbour: Neighbour | None = None,
) -> Iterator[Kill]:
    """Kill `scenario` at each of its steps, each time in a fresh copy of `template`.

    Ends with the step that the scenario no longer reaches. `stride` passes over steps.
    `neighbour` runs in a second process that has ROOT open all the while: it says READY
    when it has opened, waits for the parent's word, and goes on after the kill.
    """
    for when in whens:
        number = 1
        while True:
            root = folder / f"{when}-{number}"
            copy_root(template, root)
            disk = KillingDisk(number, when)

            def body(report: Report, root: Path = root, disk: Disk = disk) -> None:
                scenario(root, disk, report)

            other = _beside(neighbour, root) if neighbour else None
            victim = Victim(body)
            killed = victim.end()
            acknowledged = list(victim.acknowledged)
            if other is not None:
                other.go()
                assert not other.end()
                acknowledged += other.acknowledged[1:]
            yield Kill(number, when, root, acknowledged)
            shutil.rmtree(root, ignore_errors=True)
            if not killed:
                break
            number += stride
