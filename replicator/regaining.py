"""Regaining: what a target has lost is copied there again.

A bucket may be emptied, or made anew, by somebody or by a rule. The rows still say that the
copies are there, and on their word the last local bytes would be let go of (invariant 8). So
the target's listing is compared with them, side by side and in constant memory.
"""

from __future__ import annotations

import threading
from typing import Final

from cas.catalog import Key
from cas.records import DONE, Replica
from cas.replicas import want_again
from cas.store import Store
from replicator.bandwidth import SendingStopped
from replicator.listing import Listing
from replicator.targets import Target

_ROWS: Final = 500  # read at once, and written at once


def want_absent(store: Store, target: Target, stop: threading.Event | None = None) -> int:
    """Want all copies again that the target does not list with their length; returns how
    many. Durable on return. Blocks. Raises TargetError, and SendingStopped once `stop` is set."""
    listing = Listing(target)
    after: Key = ()
    count = 0
    while True:
        if stop is not None and stop.is_set():
            raise SendingStopped
        with store.catalog.read() as snapshot:
            rows = snapshot.range(Replica, "", (target.name,), after=after, limit=_ROWS)
        if not rows:
            return count
        lost = [
            row.digest
            for row in rows
            if row.state == DONE and listing.size_of(row.digest) != row.size_bytes
        ]
        if lost:
            count += want_again(store.catalog, target.name, lost)
        after = (rows[-1].digest,)
