"""Opening the bytes of a blob: here where they are, else as they come from a target.

Nothing is looked up before: the file is opened by its name, and only where that fails does
the record tell whether the bytes may be elsewhere. So reading what is here costs nothing more
for the sake of a cache, and an eviction between two looks goes unnoticed.
"""

from __future__ import annotations

import io
import os
from typing import Final, final

from cas.blobs import BlobFiles
from cas.catalog import Catalog
from cas.digest import Digest
from cas.elsewhere import Elsewhere, Fetched
from cas.errors import BlobUnavailable
from cas.recency import Recency
from cas.records import DELETING, Blob, Replica

# Up to here a reader waits until all is fetched, and then reads a file like any other.
_TOGETHER_BYTES_MAX: Final = 1 << 20


@final
class Opener:
    """Opens blobs of one ROOT. Safe for threads. `hits` and `misses` count what it opened."""

    def __init__(
        self, catalog: Catalog, blobs: BlobFiles, recency: Recency, elsewhere: Elsewhere
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._recency = recency
        self._elsewhere = elsewhere
        self.hits = 0  # both wrong by a few where threads meet: they are for curves
        self.misses = 0

    def here(self, digest: Digest, size_bytes: int | None = None) -> int:
        """A read-only descriptor of the bytes that are here, the caller's to close.

        Raises BlobMissing; with the `size_bytes` of the record, another length raises
        BlobDamaged.
        """
        fd = self._blobs.open(digest, size_bytes)
        try:
            self._recency.used(fd)
        except BaseException:
            os.close(fd)
            raise
        self.hits += 1
        return fd

    def open(self, digest: Digest, size_bytes: int) -> int | Fetched:
        """The bytes wherever they are, the caller's to close: a descriptor, or a stream of
        what is on its way.

        Raises BlobMissing, BlobDamaged; BlobElsewhere where they are at targets only and could
        not be fetched.
        """
        try:
            return self.here(digest, size_bytes)
        except BlobUnavailable as error:
            if not self._may_be_elsewhere(digest):
                raise
            missing = error
        self.misses += 1
        try:
            return self._fetched(digest, size_bytes)
        except BlobUnavailable as error:
            raise error from missing

    def stream(self, digest: Digest, size_bytes: int) -> io.RawIOBase:
        """The same as a stream, the caller's to close."""
        found = self.open(digest, size_bytes)
        return found if isinstance(found, Fetched) else io.FileIO(found)

    def named(self, digest: Digest) -> bool:
        """Whether the object is here for another process, which opens it by its name within
        a minute: it is not evicted before."""
        try:
            fd = self._blobs.open(digest)
        except BlobUnavailable:
            return False
        try:
            self._recency.used(fd, by_name=True)
        finally:
            os.close(fd)
        # Again: an eviction that looked at the time of use before it was set has, all but surely,
        # removed the name by now.
        return self._blobs.stat(digest) is not None

    def _may_be_elsewhere(self, digest: Digest) -> bool:
        with self._catalog.read() as snapshot:
            blob = snapshot.get(Blob, digest)
            return (
                blob is not None
                and blob.state != DELETING
                and bool(snapshot.range(Replica, "blob", (digest,), limit=1))
            )

    def _fetched(self, digest: Digest, size_bytes: int) -> int | Fetched:
        fetched = self._elsewhere.open(digest, size_bytes)
        try:
            if size_bytes <= _TOGETHER_BYTES_MAX and (fd := fetched.whole()) is not None:
                fetched.close()
                return fd
        except BaseException:
            fetched.close()
            raise
        return fetched
