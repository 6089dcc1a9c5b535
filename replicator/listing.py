"""A listing: what blobs a target has, walked beside records in the order of digests."""

from __future__ import annotations

from typing import final

from cas.digest import Digest
from replicator.targets import OBJECTS, Target, object_key


@final
class Listing:
    """The blobs that a target has, asked for in the order of digests, which is that of keys.

    In constant memory. Raises TargetError.
    """

    def __init__(self, target: Target) -> None:
        self._objects = target.list(OBJECTS)
        self._key = ""
        self._size_bytes = 0

    def size_of(self, digest: Digest) -> int | None:
        """The length of what is there; None: nothing. No digest before the last one asked."""
        wanted = object_key(digest)
        while self._key < wanted:
            found = next(self._objects, None)
            if found is None:
                return None
            self._key, self._size_bytes = found.key, found.size_bytes
        return self._size_bytes if self._key == wanted else None
