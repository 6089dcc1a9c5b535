"""Beats: the sign of life of a process, a file in ROOT that it replaces every few seconds.

None of it is journalled: it is worth nothing once the process has ended.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from cas.clock import SECOND_US
from cas.durable import DISK

T = TypeVar("T", bound=msgspec.Struct)

BEAT_S: Final = 5.0  # between two
SILENT_US_MAX: Final = 60 * SECOND_US  # since the last one; then something is wrong


def write_beat(path: Path, beat: msgspec.Struct) -> None:
    """Replace the file. Only for who is alone in writing it (`cas.alone`).

    Not synced: after a crash nobody needs it. Raises OSError.
    """
    aside = path.with_suffix(".new")  # one name, so that a killed process leaves one at most
    DISK.unlink(aside)
    fd = DISK.create(aside)
    try:
        DISK.write(fd, msgspec.json.encode(beat) + b"\n")
    finally:
        os.close(fd)
    DISK.rename(aside, path)


def last_beat(path: Path, kind: type[T]) -> T | None:
    """The last one, perhaps of a process that has ended; None where there is none to be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None
