"""Healing: blobs that are listed as missing here are fetched back from the targets.

The scrub sets rotten bytes aside and lists their blob as missing; so does a disk that lost
some. Any target that was ever to hold such a blob is asked, also one whose copy is not believed
in: what comes is adopted only with the right SHA-256. What heals is local again, and the mirror
makes the copies that were wrong. A blob waits while all that may have it are down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, final

from cas.catalog import Key
from cas.digest import Digest
from cas.errors import BlobcaskError
from cas.records import TARGETS_MAX, Blob, Replica
from cas.store import Store
from replicator.fetching import Fetches
from replicator.link import Link

_INTERVAL_S: Final = 60.0
_STEP_S: Final = 1.0
_BLOBS_A_STEP: Final = 16

_log = logging.getLogger("blobcask.replicator")


@final
class Heal:
    """Tries all missing blobs in turn, round after round; a `replicator.loop.Job`."""

    name: Final = "heal"
    interval_s: Final = _INTERVAL_S

    def __init__(self, store: Store, links: Sequence[Link], fetches: Fetches) -> None:
        self._store = store
        self._links = links
        self._fetches = fetches
        self._after: Key = ()
        self._at_work: set[asyncio.Task[bool]] = set()

    async def step(self, _now_us: int) -> bool:
        """Try some, waiting a moment for them: a fetch may last for hours. True while the round
        goes on, which ends early where no target answers."""
        if not self._at_work:
            if all(link.down for link in self._links):
                return False
            self._at_work = {asyncio.create_task(self._heal(one)) for one in self._next()}
        if self._at_work:
            done, self._at_work = await asyncio.wait(self._at_work, timeout=_STEP_S)
            if healed := sum(task.result() for task in done):
                _log.warning("%d missing blobs were fetched back", healed)
        return bool(self._at_work or self._after)

    async def close(self) -> None:
        """What is under way ends with the fetches."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    def _next(self) -> list[Digest]:
        """The next missing blobs that a target which answers may have; the round is over when
        there is none."""
        up = {link.name for link in self._links if not link.down}
        with self._store.catalog.read() as snapshot:
            found = snapshot.range(Blob, "missing", after=self._after, limit=_BLOBS_A_STEP)
            wanted = [
                blob.digest
                for blob in found
                if any(
                    row.target in up
                    for row in snapshot.range(Replica, "blob", (blob.digest,), limit=TARGETS_MAX)
                )
            ]
        last = found[-1] if len(found) == _BLOBS_A_STEP else None
        self._after = () if last is None or last.missing_at is None else _key(last)
        return wanted

    async def _heal(self, digest: Digest) -> bool:
        try:
            return await self._fetches.bring(digest)
        except BlobcaskError:  # the record has gone meanwhile
            return False


def _key(blob: Blob) -> Key:
    assert blob.missing_at is not None
    return blob.missing_at, blob.digest
