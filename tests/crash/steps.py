"""Disks that do something at a durable step: count it, die at it, or fail it.

`StepDisk` names every step and hands it to `step`; a subclass decides what becomes of it.
Each one does the real work too, so that a test walks the steps of the real thing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from cas.durable import Disk, Temporary

T = TypeVar("T")


class When(StrEnum):
    """At which moment of a step something happens."""

    BEFORE = "before"
    HALFWAY = "halfway"  # half of the bytes are written; the same as before for other steps
    AFTER = "after"


class StepDisk(Disk):
    """Hands every durable step to `step`, which performs it unless a subclass objects."""

    def __init__(self, boot: str = "") -> None:
        self._boot = boot

    def boot_id(self) -> str:
        return self._boot or super().boot_id()

    def step(self, name: str, perform: Callable[[], T], half: Callable[[], object]) -> T:
        """Do the step called `name`; `half` does a part of it."""
        return perform()

    def temporary(self, folder: Path) -> Temporary:
        return self.step("temporary", lambda: Disk.temporary(self, folder), _nothing)

    def create(self, path: Path, mode: int = 0o644) -> int:
        return self.step("create", lambda: Disk.create(self, path, mode), _nothing)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        part = memoryview(data)[: len(data) // 2]
        self.step("write", lambda: Disk.write(self, fd, data), lambda: Disk.write(self, fd, part))

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        part = memoryview(data)[: len(data) // 2]
        self.step(
            "write_at",
            lambda: Disk.write_at(self, fd, data, offset),
            lambda: Disk.write_at(self, fd, part, offset),
        )

    def truncate(self, fd: int, size_bytes: int) -> None:
        self.step("truncate", lambda: Disk.truncate(self, fd, size_bytes), _nothing)

    def allocate(self, fd: int, size_bytes: int) -> None:
        self.step("allocate", lambda: Disk.allocate(self, fd, size_bytes), _nothing)

    def sync_data(self, fd: int) -> None:
        self.step("sync_data", lambda: Disk.sync_data(self, fd), _nothing)

    def sync_filesystem(self, fd: int) -> None:
        self.step("sync_filesystem", lambda: Disk.sync_filesystem(self, fd), _nothing)

    def link(self, fd: int, path: Path | str) -> None:
        self.step("link", lambda: Disk.link(self, fd, path), _nothing)

    def rename(self, source: Path | str, target: Path | str) -> None:
        self.step("rename", lambda: Disk.rename(self, source, target), _nothing)

    def unlink(self, path: Path | str) -> bool:
        return self.step("unlink", lambda: Disk.unlink(self, path), _nothing)

    def make_folder(self, path: Path, mode: int = 0o755) -> bool:
        return self.step("make_folder", lambda: Disk.make_folder(self, path, mode), _nothing)

    def sync_folder(self, path: Path | str) -> None:
        self.step("sync_folder", lambda: Disk.sync_folder(self, path), _nothing)


def _nothing() -> None:
    """Half of a step that the kernel does whole or not at all."""


# After one step is before the next, unless a thread comes between: so only what others can
# count on from then on is killed after it as well, and only what has halves halfway.
_WHEN_ELSE = {
    "write": When.HALFWAY,
    "write_at": When.HALFWAY,
    "sync_data": When.AFTER,
    "sync_filesystem": When.AFTER,
    "sync_folder": When.AFTER,
    "rename": When.AFTER,
    "link": When.AFTER,
}


class KillingDisk(StepDisk):
    """Kills its process at step `number` (from 1) of those that `when` is about.

    Only for a child of the test.
    """

    def __init__(self, number: int, when: When, boot: str = "") -> None:
        super().__init__(boot)
        self._number = number
        self._when = when
        self._counting = threading.Lock()
        self._steps = 0

    def step(self, name: str, perform: Callable[[], T], half: Callable[[], object]) -> T:
        if self._when not in (When.BEFORE, _WHEN_ELSE.get(name, When.BEFORE)):
            return perform()
        with self._counting:
            self._steps += 1
            mine = self._steps == self._number
        if not mine:
            return perform()
        if self._when is When.HALFWAY:
            half()
        if self._when is When.AFTER:
            perform()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process does not get here")


class FailingDisk(StepDisk):
    """Fails with `code` (an errno) from the moment that `fail` says so.

    `fail` is asked at each step, by its name and number (from 1). What fails has not
    happened; a write has happened by half.
    """

    def __init__(self, code: int, fail: Callable[[str, int], bool], boot: str = "") -> None:
        super().__init__(boot)
        self._code = code
        self._fail = fail
        self.steps: list[str] = []
        self.failed: list[str] = []

    def step(self, name: str, perform: Callable[[], T], half: Callable[[], object]) -> T:
        self.steps.append(name)
        if not self._fail(name, len(self.steps)):
            return perform()
        self.failed.append(name)
        half()
        raise OSError(self._code, os.strerror(self._code))
