"""Pieces: what one request brings of a resumable upload, written and recorded in slices.

    piece = Piece(fd, partial, …)      the file is held, and cut to the recorded offset
    piece.receive(source, …)           write what comes; now and then sync and record it
    piece.keep()                       sync and record the rest

Whatever ends the source, the bytes that came before are kept: a sender that resumes goes on
there. Only a piece with a promised digest is kept as a whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import final

from cas.blobs import BlobFiles
from cas.durable import Disk, SupportsRead
from cas.errors import (
    BlobcaskError,
    CatalogError,
    ChecksumMismatch,
    PartialTaken,
    StoreFull,
    TooLarge,
)
from cas.records import Partial
from cas.takeover import Writer

# A killed server loses what came since the last record: at most so many bytes, and no more
# than came in so many seconds and one read. Slices of 32 MiB wait twice as often for the disk
# and take in half as much a second.
SLICE_BYTES = 64 << 20
SLICE_S = 5.0
SHA1_BYTES = 20
_READ_BYTES = 256 << 10
_WRITEBACK_BYTES = 16 << 20

Record = Callable[[Partial, int], Partial]  # writes down a new offset; durable on return


def _hasher(promised_digest: bytes) -> hashlib._Hash:
    if len(promised_digest) == SHA1_BYTES:
        return hashlib.sha1(usedforsecurity=False)
    return hashlib.sha256()


@final
class Piece:
    """One piece: its place in the file, and how far the record is behind it. One thread."""

    def __init__(
        self, fd: int, partial: Partial, *, disk: Disk, blobs: BlobFiles, record: Record
    ) -> None:
        self._disk = disk
        self._blobs = blobs
        self._record = record
        self._started = self._began = partial.offset_bytes  # writing out has begun up to there
        self._due_s = time.monotonic() + SLICE_S
        self.fd = fd
        self.partial = partial  # as recorded
        self.position = partial.offset_bytes

    @property
    def whole(self) -> bool:
        """Whether the last byte has come."""
        return self.position == self.partial.length_bytes

    def receive(
        self,
        source: SupportsRead,
        writer: Writer,
        *,
        promised_size: int | None,
        promised_digest: bytes | None,
    ) -> None:
        """Write what comes, until the source ends or somebody else wants the file.

        `promised_digest` is a SHA-256, or a SHA-1, which the protocol of resumable uploads
        obliges us to know: told apart by their lengths, and good against accidents only.

        Raises what the source raises, PartialTaken, TooLarge, ChecksumMismatch, StoreFull,
        and what recording raises.
        """
        os.lseek(self.fd, self.position, os.SEEK_SET)
        check = None if promised_digest is None else _hasher(promised_digest)
        # One byte more than fits, where the source may be longer than it should.
        beyond = 1 if promised_size is None else 0
        buffer = memoryview(bytearray(_READ_BYTES))
        while not writer.wanted:
            room = self.partial.length_bytes - self.position + beyond
            try:
                chunk = buffer[: source.readinto(buffer[: min(room, _READ_BYTES)]) or 0]
            except Exception as error:
                self._save(checked=check is None)
                if writer.wanted:
                    raise PartialTaken from error
                raise
            if not chunk:
                break
            self._write(chunk, in_slices=check is None)
            if check is not None:
                check.update(chunk)
        if writer.wanted:
            self._save(checked=check is None)
            raise PartialTaken
        if check is not None and promised_digest is not None and check.digest() != promised_digest:
            self._cut()
            raise ChecksumMismatch(promised_digest.hex(), check.hexdigest())

    def keep(self, offset_bytes: int | None = None) -> Partial:
        """Make what came durable and record it, up to `offset_bytes` where given."""
        offset_bytes = self.position if offset_bytes is None else offset_bytes
        if offset_bytes > self.partial.offset_bytes:
            with self._cut_when_refused():
                self._disk.sync_data(self.fd)
                self.partial = self._record(self.partial, offset_bytes)
        self._due_s = time.monotonic() + SLICE_S
        return self.partial

    def _write(self, chunk: memoryview, *, in_slices: bool) -> None:
        if self.position + len(chunk) > self.partial.length_bytes:
            self._cut()
            raise TooLarge(self.partial.length_bytes - self._began)
        with self._cut_when_refused():
            self._disk.write(self.fd, chunk)
            self.position += len(chunk)
            if self.position - self._started >= _WRITEBACK_BYTES:
                self._disk.start_writeback(self.fd, self._started, self.position - self._started)
                self._started = self.position
                self._blobs.need_room(0)
        behind_bytes = self.position - self.partial.offset_bytes
        due = behind_bytes >= SLICE_BYTES or time.monotonic() >= self._due_s
        if in_slices and due and not self.whole:
            self.keep()

    def _save(self, *, checked: bool) -> None:
        """At a failure: keep what may be kept, but for the last byte of all. The sender brings
        that again, so that the slot is filled while somebody lives to hear of it."""
        if checked:
            self.keep(min(self.position, self.partial.length_bytes - 1))
        else:
            self._cut()

    def _cut(self) -> None:
        """Forget what is not recorded."""
        self.position = self.partial.offset_bytes
        with suppress(OSError):  # what is not cut off now is cut off by the next piece
            self._disk.truncate(self.fd, self.position)

    @contextmanager
    def _cut_when_refused(self) -> Iterator[None]:
        """Give the space back of what cannot be recorded; a full disk is told with numbers.

        Not after a failure of the catalog, or of the disk: what is recorded is unknown then,
        and the next piece will see.
        """
        try:
            yield
        except CatalogError:
            raise
        except BlobcaskError:
            self._cut()
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._cut()
            rest_bytes = self.partial.length_bytes - self.position
            raise StoreFull(self._blobs.free_bytes(), rest_bytes, self._blobs.root) from error
