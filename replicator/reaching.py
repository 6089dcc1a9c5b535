"""Reaching: a target is probed when it first answers, and nothing is written there before.

What the probe found out is kept in the target's record, so that a restart asks nothing; a
probe by hand (`blobcask replicate probe`) replaces it there, and is followed within a minute.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, final

import msgspec

from cas.records import Target
from cas.replicas import keep_profile
from cas.store import Store
from replicator.link import Link
from replicator.probe import Profile

_LOOK_S: Final = 60.0  # for a probe by hand
_SOON_S: Final = 1.0

_log = logging.getLogger("blobcask.replicator")


@final
class Reach:
    """Sees to it that a link has a profile. A `replicator.loop.Job`, one for each target."""

    def __init__(self, store: Store, link: Link) -> None:
        self.name = f"reach {link.name}"
        self._store = store
        self._link = link

    @property
    def interval_s(self) -> float:
        return _LOOK_S if self._link.profile else _SOON_S

    async def step(self, _now_us: int) -> bool:
        """Take over what is known; probe where nothing is. Raises TargetError."""
        known = profile_of(self._store, self._link.name)
        if known is None:
            from replicator.probe import probe, words

            known = await asyncio.to_thread(probe, self._link.target)
            await asyncio.to_thread(
                keep_profile, self._store.catalog, self._link.name, known.to_json()
            )
            _log.info("%s was probed. %s", self._link.name, " ".join(words(known)))
        self._link.profile = known
        return False

    async def close(self) -> None:
        """Nothing is left open between steps."""


def profile_of(store: Store, name: str) -> Profile | None:
    """What a probe found out about a target; None: it was never probed, or by another version."""
    with store.catalog.read() as snapshot:
        record = snapshot.get(Target, name)
    if record is None or not record.profile:
        return None
    try:
        return Profile.from_json(record.profile)
    except msgspec.MsgspecError:
        return None
