"""The right to be the one runner of a ROOT: a lock on ROOT/RUNNER, which holds its PID."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, final

from cas.background import take_place

PLACE: Final = "RUNNER"


@final
class Alone:
    """Ends with the process, or `close`."""

    def __init__(self, root: Path) -> None:
        self._fd = os.open(root / PLACE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self) -> bool:
        """Take it without waiting; False while another process has it."""
        if not take_place(self._fd):
            return False
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def holder(self) -> str:
        """The PID of the process that has it, or had it last; "" until the first wrote it."""
        return os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()

    def close(self) -> None:
        os.close(self._fd)
