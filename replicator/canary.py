"""The canary: a small blob goes the whole way, now and then, and is read back and hashed.

It is stored as any file is, mirrored as any blob is, and then fetched from the target past
everything that is kept here. A mirror that only says that it works does not make it come back.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

from cas.clock import SECOND_US
from cas.digest import Digest
from cas.errors import CopyUnconfirmed, NotFound
from cas.records import Replica
from cas.references import Reference, parse_reference
from cas.replicas import want_again
from cas.retention import parse_retention
from cas.store import Store
from replicator.link import Link
from replicator.reading import read_back
from replicator.targets import BytesDiffer, ObjectAbsent, TargetError

TENANT: Final = "blobcask-canary"  # whose files they are; nobody's token needs it
_ACTOR: Final = "canary"
_SIZE_BYTES: Final = 1024
_LOOK_S: Final = 0.5  # while one is on its way
# For those that no process came to remove.
_KEPT: Final = parse_retention("hours:24")


@final
class Canary:
    """Sends canaries to one target. A `replicator.loop.Job`."""

    def __init__(
        self, store: Store, link: Link, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = f"canary {link.name}"
        self._store = store
        self._link = link
        self._now_s = now_s
        self._every_s = store.settings.replicator.canary_every / SECOND_US
        self._flying: Digest | None = None
        self._reference: Reference | None = None

    @property
    def interval_s(self) -> float:
        """Short until one came back: a step only looks whether it has arrived."""
        waits = self._flying is not None or self._link.canary_at_s is None
        return _LOOK_S if waits else self._every_s

    async def step(self, _now_us: int) -> bool:
        """Send one, or look for the one that was sent. Raises TargetError where it is wrong."""
        if self._flying is None:
            if self._link.profile is not None:  # before, it would only wait
                self._flying = await asyncio.to_thread(self._send)
            return False
        if not self._has_arrived(self._flying):
            return False
        try:
            await asyncio.to_thread(self._read_back, self._flying)
        except TargetError as error:
            self._link.canary_error = str(error)
            raise
        self._link.canary_at_s, self._link.canary_error = self._now_s(), ""
        await asyncio.to_thread(self._forget)
        return False

    async def close(self) -> None:
        """One that is on its way is forgotten by its retention."""

    def _send(self) -> Digest:
        data = os.urandom(_SIZE_BYTES)
        files = self._store.files(TENANT, _ACTOR)
        # `storage_type = s3` may wait in vain: stored it is all the same.
        with suppress(CopyUnconfirmed):
            file = files.put(io.BytesIO(data), name=self._link.name, retention=_KEPT)
            scheme = self._store.settings.references.scheme
            self._reference = parse_reference(file.storage_ref, scheme)
        return Digest(hashlib.sha256(data).digest())

    def _has_arrived(self, digest: Digest) -> bool:
        with self._store.catalog.read() as snapshot:
            row = snapshot.get(Replica, self._link.name, digest)
        # Swept while the target was away, or the target itself was taken away and came back.
        if row is None or row.removed_at is not None:
            self._flying = None  # send another
        return row is not None and row.held

    def _read_back(self, digest: Digest) -> None:
        """Raises TargetError; what is absent or wrong is then copied again."""
        try:
            read_back(self._link.target, digest, _SIZE_BYTES)
        except (ObjectAbsent, BytesDiffer):
            want_again(self._store.catalog, self._link.name, [digest])
            raise

    def _forget(self) -> None:
        reference, self._reference, self._flying = self._reference, None, None
        if reference is not None:
            with suppress(NotFound):
                self._store.files(TENANT, _ACTOR).delete(reference)
