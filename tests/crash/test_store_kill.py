"""A process killed at every durable step of every operation on files.

The parent keeps what was acknowledged. A second live process commits next; then the store
is opened, every acknowledged file has its bytes, nothing half done shows, and the same
operation done again ends as if nothing had happened.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cas.digest import Digest
from cas.durable import Disk
from tests.audit import assert_readable, audit
from tests.crash.rounds import copy_root, every_step
from tests.crash.steps import StepDisk, When
from tests.crash.stores import (
    ACTS,
    NEW,
    Act,
    judge,
    make_template,
    neighbour,
    open_store,
    put,
    said,
)
from tests.crash.victims import Report

T = TypeVar("T")


class ArmedDisk(StepDisk):
    """Hands its steps to a disk that kills only once it is armed: the opening has its own test."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        assert isinstance(disk, StepDisk)
        self._killing = disk
        self.armed = False

    def step(self, name: str, perform: Callable[[], T], half: Callable[[], object]) -> T:
        return self._killing.step(name, perform, half) if self.armed else perform()


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory: a kill takes nothing from the page cache, so no disk is needed."""
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


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("beside", [None, neighbour], ids=["alone", "neighbour"])
def test_a_kill_at_every_step_loses_nothing(
    template: Path, memory: Path, act: Act, beside: Callable[[Path, Report], None] | None
) -> None:
    def scenario(where: Path, disk: Disk, report: Report) -> None:
        armed = ArmedDisk(disk)
        with open_store(where, armed, days=4) as store:
            armed.armed = True
            act(store, report.acknowledge)
            armed.armed = False

    kills = 0
    # Halfway: half of a write is written; for other steps it is the moment before them,
    # which is the moment after the one before.
    for kill in every_step(
        scenario, template, memory / act.__name__, whens=(When.HALFWAY,), neighbour=beside
    ):
        judge(kill.root, kill.acknowledged)
        kills += 1
    assert kills >= 2


def test_a_store_that_was_being_made_is_made_by_the_next(memory: Path) -> None:
    empty = memory / "empty"
    empty.mkdir()

    def scenario(where: Path, disk: Disk, report: Report) -> None:
        with open_store(where, disk) as store:
            said(report.acknowledge, put(store.files("acme", "ada"), NEW))

    # Every one of the first steps and of the last; the 256 shard folders are alike.
    for kill in every_step(scenario, empty, memory / "made", whens=(When.HALFWAY,), stride=11):
        with open_store(kill.root) as store:
            kept = {
                file_id: Digest(bytes.fromhex(digest))
                for _, file_id, digest in (line.split(" ") for line in kill.acknowledged)
            }
            assert_readable(store, kept)
            put(store.files("acme", "ada"), NEW)
            audit(store)


def test_a_template_is_what_it_says(template: Path, memory: Path) -> None:
    copy_root(template, memory / "copy")
    judge(memory / "copy", [])
