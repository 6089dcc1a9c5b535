"""Evicting: a full cache lets go of what nobody reads and every target holds (invariant 8).

`[cache] max_size` bounds the bytes in `objects/`. What was not read for long goes first: no
list of all blobs is kept for that, but a sample of them is looked at, whose longest idle go.
Digests are random, so a few stretches of the index are as good as a lottery; where the sample
was everything, the order is exact.

`cas.replicas.evict` looks at everything once more in its transaction: a blob that is not held
at every target, or whose verification is not in the journal there, stays.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Final, final

from cas.catalog import Snapshot
from cas.digest import Digest
from cas.errors import StoreFull
from cas.recency import JUST_NOW_US
from cas.records import DELETING, Blob, Replica
from cas.replicas import evict
from cas.store import Store
from cas.totals import blobs_here
from replicator.link import Link

_INTERVAL_S: Final = 10.0
_STRETCHES: Final = 8  # of the index, in one sample
_STRETCH: Final = 128  # blobs: together about 10 ms of looking
# Of a sample that was not everything, so much goes at once: those left are likely to be
# idler than the next best of another sample.
_SHARE: Final = 8
_ROUNDS_MAX: Final = 64  # for one step, or for one fetch
# Beyond what is asked for, so that not every fetch has to look.
_SLACK: Final = 32


@final
class Evict:
    """Keeps the cache within its limit; a `replicator.loop.Job`. `room` makes room at once."""

    name: Final = "evict"
    interval_s: Final = _INTERVAL_S

    def __init__(self, store: Store, links: Sequence[Link], max_bytes: int) -> None:
        """`max_bytes` 0 is no limit: nothing is evicted then."""
        self._store = store
        self._links = links
        self._max_bytes = max_bytes
        self.evicted = 0

    async def step(self, _now_us: int) -> bool:
        """Evict down to the limit, or until there is room on the disk for the next uploads, as
        far as that is possible now."""
        if not self._max_bytes:
            return False
        local_bytes, slack_bytes = self.local_bytes(), self._max_bytes // _SLACK
        if local_bytes > self._max_bytes:
            return await asyncio.to_thread(self._some, self._max_bytes - slack_bytes)
        if not self._fits_on_disk(slack_bytes):  # others fill the disk, too
            return await asyncio.to_thread(self._some, local_bytes - slack_bytes)
        return False

    async def close(self) -> None:
        """Nothing lasts from step to step."""

    def local_bytes(self) -> int:
        """The bytes of all blobs that are here."""
        with self._store.catalog.read() as snapshot:
            return blobs_here(snapshot).size_bytes

    def room(self, size_bytes: int) -> bool:
        """Whether so many bytes more may be kept, for which others are evicted. In a thread."""
        if not self._max_bytes:
            return self._fits_on_disk(size_bytes)
        if size_bytes > self._max_bytes:
            return False
        wanted_bytes = self._max_bytes - size_bytes
        for _ in range(_ROUNDS_MAX):
            local_bytes, fits = self.local_bytes(), self._fits_on_disk(size_bytes)
            if fits and local_bytes <= wanted_bytes:
                return True
            goal_bytes = wanted_bytes if fits else min(wanted_bytes, local_bytes - size_bytes)
            if not self._some(goal_bytes - goal_bytes // _SLACK):
                return False
        return False

    def _fits_on_disk(self, size_bytes: int) -> bool:
        try:
            self._store.blobs.need_room(size_bytes)
        except StoreFull:
            return False
        return True

    def _some(self, wanted_bytes: int) -> bool:
        """Evict some of a sample, down to `wanted_bytes` here; False where nothing went."""
        with self._store.catalog.read() as snapshot:
            excess_bytes = blobs_here(snapshot).size_bytes - wanted_bytes
        sample, whole = self._sample()
        idlest = sorted(sample, reverse=True)
        if not whole:
            idlest = idlest[: max(1, len(idlest) // _SHARE)]
        chosen: list[Digest] = []
        for _, size_bytes, digest in idlest:
            if excess_bytes <= 0:
                break
            excess_bytes -= size_bytes
            chosen.append(digest)
        gone = evict(self._store.catalog, self._store.blobs, chosen, self._shipped(), self._is_idle)
        self.evicted += len(gone)
        return bool(gone)

    def _sample(self) -> tuple[list[tuple[int, int, Digest]], bool]:
        """Blobs that may go, as (µs idle, bytes, digest), and whether those are all."""
        with self._store.catalog.read() as snapshot:
            blobs = snapshot.range(Blob, "", limit=_STRETCHES * _STRETCH)
            whole = len(blobs) < _STRETCHES * _STRETCH
            if not whole:
                blobs = [
                    blob
                    for _ in range(_STRETCHES)
                    for blob in snapshot.range(Blob, "", after=(os.urandom(32),), limit=_STRETCH)
                ]
            shipped = self._shipped()
            able = {blob.digest: blob for blob in blobs if _may_go(snapshot, blob, shipped)}
        found = [
            (idle_us, blob.size_bytes, blob.digest)
            for blob in able.values()
            if (idle_us := self._idle_us(blob.digest)) > JUST_NOW_US
        ]
        return found, whole

    def _shipped(self) -> dict[str, int]:
        """The newest frame at each target that answers, and is ours to write to."""
        return {link.name: link.shipped_seq for link in self._links if link.open and link.answers}

    def _is_idle(self, digest: Digest) -> bool:
        """Whether nobody was told just now that it is here."""
        return self._idle_us(digest) > JUST_NOW_US

    def _idle_us(self, digest: Digest) -> int:
        """How long it was not read; 0 where it is not here."""
        try:
            found = os.stat(self._store.blobs.name_of(digest), follow_symlinks=False)
        except FileNotFoundError:
            return 0
        return self._store.recency.idle_us(found)


def _may_go(snapshot: Snapshot, blob: Blob, shipped: Mapping[str, int]) -> bool:
    """Whether every target that answers for itself holds it; `evict` judges for good."""
    if not shipped or not blob.local or blob.missing_at is not None or blob.state == DELETING:
        return False
    rows = ((seq, snapshot.get(Replica, name, blob.digest)) for name, seq in shipped.items())
    return all(row is not None and row.held and row.seq <= seq for seq, row in rows)
