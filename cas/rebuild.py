"""Rebuild: the index made anew from checkpoint and journal (invariant 5), on request.

Opening a store does it by itself where the index cannot be trusted; this is for the
operator who wants it now, and wants to know what came out.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import final

import msgspec

from cas.catalog import Position
from cas.catalog.bulk import Progress
from cas.catalog.local import CatalogSettings, LocalCatalog
from cas.clock import Clock, SystemClock
from cas.durable import DISK, Disk

_LOCK_WAIT_S = 3.0  # for a command that is just ending; a server does not let go


@final
class Rebuilt(msgspec.Struct, frozen=True):
    """An index that was made anew and proved by the state digest."""

    position: Position
    ops: int  # after-images applied, from checkpoint and journal
    build_s: float  # to apply them
    proof_s: float  # to add up all records again, from the index

    @property
    def ops_per_s(self) -> int:
        """Of the building alone."""
        return round(self.ops / self.build_s) if self.build_s else 0


def rebuild(
    root: Path,
    *,
    clock: Clock | None = None,
    disk: Disk = DISK,
    progress: Progress | None = None,
) -> Rebuilt:
    """Make the index of the store at `root` anew, with ROOT held alone.

    Constant memory. `progress` is called with the bytes read and the bytes in all. Raises
    StoreBusy when other processes have the store open, JournalDamaged with the place of a
    bad frame, IndexDamaged when the records do not add up to the journal's state.
    """
    catalog = LocalCatalog(
        root.absolute(),
        CatalogSettings(lock_wait_s=_LOCK_WAIT_S),
        clock=clock or SystemClock(),
        disk=disk,
    )
    applied = 0
    moments = [time.monotonic()]

    def built(ops: int) -> None:
        nonlocal applied
        applied = ops
        moments.append(time.monotonic())

    try:
        position = catalog.rebuild(progress, built)
    finally:
        catalog.close()
    moments.append(time.monotonic())
    began, proving, ended = moments
    return Rebuilt(position, applied, proving - began, ended - proving)
