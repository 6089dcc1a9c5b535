"""The folder of resumable uploads: `ROOT/partial/<partial_id>`, a file each.

A file is written by one writer at a time (see `takeover`). Its record comes before it and
goes before it, so that a file without a record is a leftover, which anybody may remove at
any time. It is never linked as a blob, since an earlier writer may still have it open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import final

from cas.catalog import Catalog, pages
from cas.durable import Disk
from cas.records import Partial
from cas.takeover import PATIENCE_S, Takeovers, take

_IDENTIFIER = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


@final
class PartialFiles:
    """The files of one ROOT. Safe for threads and for many processes."""

    def __init__(self, root: Path, disk: Disk) -> None:
        self._folder = root / "partial"
        self.disk = disk
        self.takeovers = Takeovers()

    def path(self, partial_id: str) -> Path:
        return self._folder / partial_id

    @contextmanager
    def held(self, partial_id: str, *, make: bool) -> Iterator[int]:
        """A descriptor of the file, which nobody else writes to meanwhile.

        Raises FileNotFoundError unless it is to be made, PartialBusy.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = self._made(partial_id) if make else os.open(self.path(partial_id), flags)
        try:
            take(fd, PATIENCE_S)
            yield fd
        finally:
            os.close(fd)  # which ends the lock

    def sync_name(self) -> None:
        """Make the names in the folder durable."""
        self.disk.sync_folder(self._folder)

    def remove(self, partial_id: str) -> None:
        """Remove the file of a partial that has no record any more.

        Not durably: one that a power cut brings back is a leftover like any other.
        """
        self.disk.unlink(self.path(partial_id))

    def names(self) -> list[str]:
        """The partials that have a file, in no order."""
        return [name for name in os.listdir(self._folder) if _IDENTIFIER.fullmatch(name)]

    def leftovers(self, catalog: Catalog) -> list[str]:
        """The files that no record names; costs what is in the folder.

        The names are read before the snapshot is taken, and a record comes before its file:
        so one that has none in the snapshot never will.
        """
        names = self.names()
        with catalog.read() as snapshot:
            return sorted(name for name in names if snapshot.get(Partial, name) is None)

    def short(self, catalog: Catalog) -> list[Partial]:
        """The partials whose file has lost bytes that were recorded; costs what is unfinished."""
        with catalog.read() as snapshot:
            suspects = [
                partial
                for page in pages(snapshot, Partial)
                for partial in page
                if self._size(partial) < partial.offset_bytes
            ]
        with catalog.read() as snapshot:  # some may have been finished meanwhile
            return [
                partial
                for partial in suspects
                if snapshot.get(Partial, partial.partial_id) == partial
            ]

    def _size(self, partial: Partial) -> int:
        try:
            return self.path(partial.partial_id).stat().st_size
        except FileNotFoundError:
            return 0

    def _made(self, partial_id: str) -> int:
        path = self.path(partial_id)
        with suppress(FileExistsError):
            return self.disk.create(path, 0o600)
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._made(partial_id)  # removed in between
