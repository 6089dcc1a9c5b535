"""The background process's sign of life, read by `cas.background`."""

from __future__ import annotations

import logging
from pathlib import Path

from cas.background import HEARTBEAT, Heartbeat
from cas.beats import write_beat

_log = logging.getLogger("blobcask.replicator")


def write_heartbeat(root: Path, beat: Heartbeat) -> bool:
    """Replace it; False when that failed, which is logged and no reason to stop.

    Only for who holds the lock.
    """
    try:
        write_beat(root / HEARTBEAT, beat)
    except OSError as error:
        _log.warning("no heartbeat: %s", error)
        return False
    return True
