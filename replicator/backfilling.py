"""Backfilling: a target that is new gets rows for all blobs that were there before it."""

from __future__ import annotations

import asyncio
from typing import Final, final

from cas.replicas import backfill
from cas.store import Store


@final
class Backfill:
    """Gives rows to the blobs that were there before their target: some at each step."""

    interval_s: Final = 10.0

    def __init__(self, store: Store, name: str) -> None:
        """`name` is the target's."""
        self.name = f"backfill {name}"
        self._store = store
        self._target = name

    async def step(self, _now_us: int) -> bool:
        """One write; True while there may be more."""
        return await asyncio.to_thread(backfill, self._store.catalog, self._target)

    async def close(self) -> None:
        """Nothing is left open between steps."""
