"""Ending with one's parent: for processes that `blobcask serve` runs beside itself."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>


def die_with(parent_pid: int) -> None:
    """Have this process told to stop (SIGTERM) when `parent_pid`, its parent, ends.

    Raises SystemExit where that has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit(0)
