"""Disks that go wrong: verified doubles of `cas.durable.Disk` that do the real work too."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from cas.durable import Disk, Temporary, temporary_name


class SteppedDisk(Disk, ABC):
    """Tells of each step that changes something, before it is done."""

    @abstractmethod
    def _step(self, name: str) -> None:
        """`name` is about to be done; what this raises fails it."""

    def temporary(self, folder: Path) -> Temporary:
        self._step("temporary")
        return super().temporary(folder)

    def create(self, path: Path, mode: int = 0o644) -> int:
        self._step("create")
        return super().create(path, mode)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        self._step("write")
        super().write(fd, data)

    def truncate(self, fd: int, size_bytes: int) -> None:
        self._step("truncate")
        super().truncate(fd, size_bytes)

    def allocate(self, fd: int, size_bytes: int) -> None:
        self._step("allocate")
        super().allocate(fd, size_bytes)

    def sync_data(self, fd: int) -> None:
        self._step("sync_data")
        super().sync_data(fd)

    def sync_filesystem(self, fd: int) -> None:
        self._step("sync_filesystem")
        super().sync_filesystem(fd)

    def link(self, fd: int, path: Path | str) -> None:
        self._step("link")
        super().link(fd, path)

    def rename(self, source: Path | str, target: Path | str) -> None:
        self._step("rename")
        super().rename(source, target)

    def unlink(self, path: Path | str) -> bool:
        self._step("unlink")
        return super().unlink(path)

    def sync_folder(self, path: Path | str) -> None:
        self._step("sync_folder")
        super().sync_folder(path)


class TracedDisk(SteppedDisk):
    """Keeps the names of the steps it was asked for; may fail one of them, once.

    The step fails before it does anything, as a full or broken disk does it.
    """

    def __init__(self, fail_at: int | None = None, code: int = 0) -> None:
        self.steps: list[str] = []
        self.failed: str | None = None
        self._fail_at = fail_at
        self._code = code

    def _step(self, name: str) -> None:
        number = len(self.steps)
        self.steps.append(name)
        if number == self._fail_at:
            self.failed = name
            raise OSError(self._code, os.strerror(self._code))


class NamingDisk(Disk):
    """A filesystem that knows no nameless files."""

    def temporary(self, folder: Path) -> Temporary:
        path = folder / temporary_name()
        return Temporary(self.create(path, 0o444), path)


class OldDisk(TracedDisk):
    """A Linux whose syncfs is silent about bytes that could not be written."""

    def filesystem_sync_reports(self) -> bool:
        return False
