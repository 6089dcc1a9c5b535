"""Blob files: the bytes, under their digests, on local disk. Knows no catalog.

    ROOT/objects/ab/<digest>    one blob, mode 0444; `ab` are the digest's first two characters
    ROOT/quarantine/            bytes that failed their hash, kept for the operator
    ROOT/partial/               bytes of resumable uploads

A blob is written in an order that a crash may cut anywhere:

    nameless file in objects/     a crash leaves nothing
    write while hashing           what is stored is what was hashed
    check what was promised       wrong bytes never get a name
    link under the digest         where the name is free, since nothing trusts it yet
    fdatasync                     the bytes are durable
    fsync the shard folder        the name is durable; only now may the catalog speak of it

(over bytes that have the name already: fdatasync before the rename). In this order the
filesystem makes bytes and name durable in one commit of its own journal, and the folder's
sync finds little to do. So a file named by a digest is whole, except that a power cut may
tear one whose writer had not come to the end. Therefore bytes that no record names are never
trusted: `place` puts its own copy over them (invariants 1, 4 and 7).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat as modes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import final

from blake3 import blake3 as new_blake3

from cas.batch import Batch
from cas.digest import Digest
from cas.durable import DISK, Disk, is_temporary, temporary_name
from cas.errors import BlobDamaged, BlobMissing, DigestMismatch, StoreFull, TooLarge
from cas.hashing import LANES_MAX, SMALL_BYTES, Hashing, Source, reading
from cas.leftovers import Leftovers
from cas.staged import (
    READ_BYTES,
    Measured,
    Meeting,
    Placed,
    Seekable,
    Staged,
    Watcher,
    Writing,
    measure,
    write_small,
)

__all__ = ["Batch", "BlobFiles", "Measured", "Meeting", "Placed", "Seekable", "Source", "Staged"]

SHARDS = 256
_READ_UNNOTICED = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOATIME


@final
class BlobFiles:
    """The blob files of one ROOT. Safe for threads and for many processes.

    Besides the errors named below every method raises OSError as the kernel gave it; after
    a failed step nothing is named that was not named before, except that a failed sync may
    leave a verified file that is not durable: an orphan. (It is not unlinked here, where it
    may be another writer's file before it is looked at twice: `adoption` does that.)
    """

    def __init__(self, root: Path, disk: Disk = DISK, min_free_bytes: int = 0) -> None:
        """Nothing is staged where less than `min_free_bytes` would stay free."""
        self._root = root.absolute()
        self._min_free_bytes = min_free_bytes
        self._disk = disk
        self.objects = self._root / "objects"
        self._quarantine = self._root / "quarantine"
        self._prefix = f"{self.objects}/"
        self._lanes = threading.BoundedSemaphore(LANES_MAX)
        self.leftovers = Leftovers()

    def close(self) -> None:
        """Wait until all that was rehearsed is freed. May be called twice."""
        self.leftovers.close()

    def create(self) -> None:
        """Make the folders; durable on return, harmless when they are there.

        All 256 shards are made here, so that no put makes one: no put has a parent folder
        to sync, and none takes longer because it is the first of its shard (invariant 9).
        """
        self._root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self._root, self.objects, self._quarantine, self._root / "partial"):
            self._disk.make_folder(folder)
        for number in range(SHARDS):
            self._disk.make_folder(self.objects / f"{number:02x}")
        # Also when all were there: who made them may have died before syncing.
        self._disk.sync_folder(self.objects)
        self._disk.sync_folder(self._root)
        with suppress(PermissionError):  # then somebody else made ROOT, and not just now
            self._disk.sync_folder(self._root.parent)

    @property
    def root(self) -> Path:
        return self._root

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        return Path(self.name_of(digest))

    # --- storing

    def measure(self, source: Path | Seekable) -> Measured:
        """The digest and length of what `source` holds from here to its end; no BLAKE3.

        Writes nothing. A stream is put back to where it stood.
        """
        if isinstance(source, Path):
            with reading(source) as (reader, _):
                return measure(reader.chunk)
        position = source.tell()
        try:
            with reading(source) as (reader, _):
                return measure(reader.chunk)
        finally:
            source.seek(position)

    def stage(
        self,
        source: Source,
        *,
        promised_size: int | None = None,
        promised_digest: Digest | None = None,
        limit_bytes: int = 0,
        sync: bool = True,
        watcher: Watcher | None = None,
    ) -> Staged:
        """Copy `source` to its end into a file without a name, hashing what is written.

        The bytes are durable on return when `sync` is set. `limit_bytes` 0 is no limit.
        Constant memory, whatever the length. The space for a promised size is reserved
        before the first byte is read. `watcher` is told how the copy grows.

        Raises TooLarge, SizeMismatch (as soon as it is clear), DigestMismatch, StoreFull,
        and whatever reading the source raises; nothing is left behind then.
        """
        if promised_size is not None and limit_bytes and promised_size > limit_bytes:
            raise TooLarge(limit_bytes)
        writing = Writing(self._disk, promised_size, limit_bytes, self.need_room, watcher)
        self.need_room(promised_size or 0)
        try:
            temporary = self._disk.temporary(self.objects)
            try:
                writing.begin(temporary.fd)
                if isinstance(source, bytes) and len(source) <= SMALL_BYTES:
                    measured = write_small(source, writing)
                else:
                    measured = self._write_all(source, writing)
                if promised_digest is not None and measured.digest != promised_digest:
                    raise DigestMismatch(promised_digest.hex(), measured.digest.hex())
                if sync:
                    self._disk.sync_data(temporary.fd)
            except BaseException:
                self._disk.discard(temporary)
                raise
        except OSError as error:
            self.tell_full(error, max(writing.expected_bytes, promised_size or 0))
            raise
        return Staged(self._disk, temporary, measured, sync)

    def place(self, staged: Staged) -> Placed:
        """Give the staged copy its digest as name; durable on return (invariant 4).

        A free name is given before the bytes are synced; where a record speaks of the name
        although it is free, the caller syncs them first.
        Whatever has the name already is replaced in one step, so bad bytes are healed and
        readers see either file whole. May be called again, also after the name was removed.
        Raises StoreFull.
        """
        name = self.name_of(staged.digest)
        try:
            self.give_name(staged, name)
            # As in `rehearse`, for the time it takes to wake that thread.
            staged.leave_to(self.leftovers)
            staged.sync()
            self._disk.sync_folder(os.path.dirname(name))
        except OSError as error:
            self.tell_full(error, staged.size_bytes)
            raise
        return staged.seen()

    def rehearse(self, staged: Staged) -> None:
        """Do what `place` does, to the same folder, and throw the name away (invariant 9).

        For bytes that another tenant has already: the time taken tells nobody so.
        """
        folder = os.path.dirname(self.name_of(staged.digest))
        hidden = f"{folder}/{temporary_name()}"
        try:
            # Not a bare link: the copy may have been rehearsed, or placed and replaced, before.
            self.give_name(staged, hidden)
            # Name and copy go after the answer: placing has nothing to take away. Done
            # before it, that shows: 20 to 40 µs of 1,100, in 2,000 puts.
            staged.leave_to(self.leftovers, hidden)
            staged.sync()
            self._disk.sync_folder(folder)
        except OSError as error:
            self.tell_full(error, staged.size_bytes)
            raise

    def batch(self) -> Batch:
        """Begin a batch: many blobs, one wait for the disk at its end."""
        return Batch(self, self._disk)

    # --- what is there

    def stat(self, digest: Digest) -> Placed | None:
        """The file that has the name, or None. Says nothing of its bytes."""
        try:
            found = os.stat(self.name_of(digest), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return Placed.of(found) if modes.S_ISREG(found.st_mode) else None

    def open(self, digest: Digest, size_bytes: int | None = None) -> int:
        """A read-only descriptor, the caller's to close; raises BlobMissing.

        With `size_bytes`, those of its record, a file of another length raises BlobDamaged:
        no reader begins an answer that cannot end well.
        """
        try:
            fd = _open_unnoticed(self.name_of(digest))
        except FileNotFoundError:
            raise BlobMissing(digest.hex(), "no file has its name") from None
        found_bytes = size_bytes if size_bytes is None else os.fstat(fd).st_size
        if found_bytes != size_bytes:
            os.close(fd)
            raise BlobDamaged(digest.hex(), f"it has {found_bytes} bytes of {size_bytes}")
        return fd

    def sync_existing(self, digest: Digest) -> Placed | None:
        """Make the file that has the name durable, name included; None when there is none.

        For a file that somebody linked and may not have synced. Makes good bytes durable,
        not bad ones good, and a sync that failed for somebody else before may succeed here
        without the bytes: `check` them, from the disk.
        """
        try:
            fd = self.open(digest)
        except BlobMissing:
            return None
        try:
            self._disk.sync_data(fd)
            found = os.fstat(fd)
        finally:
            os.close(fd)
        self._disk.sync_folder(os.path.dirname(self.name_of(digest)))
        return Placed.of(found)

    def check(
        self,
        digest: Digest,
        blake3: bytes | None = None,
        rate: Callable[[int], None] | None = None,
    ) -> Measured:
        """Hash the file again and say what its bytes are; the caller compares.

        With the blob's `blake3` known, BLAKE3 alone is computed, at about four times the
        speed; where it agrees so does the digest (both are collision-free), and where it
        does not, SHA-256 is computed too. `rate` is called after each piece with its bytes
        and may wait. Reads the disk rather than memory, and leaves the page cache to those
        who serve. Raises BlobMissing; OSError (EIO) is damage too.
        """
        fd = self.open(digest)
        try:
            if blake3:
                found = new_blake3()
                size_bytes = _read_from_disk(fd, found.update, rate)
                if found.digest() == blake3:
                    return Measured(digest, size_bytes, blake3)
            both = new_blake3()
            sha256 = hashlib.sha256()

            def update(piece: memoryview) -> None:
                sha256.update(piece)
                both.update(piece)

            size_bytes = _read_from_disk(fd, update, rate)
            return Measured(Digest(sha256.digest()), size_bytes, both.digest())
        finally:
            os.close(fd)

    def shard(self, number: int) -> Iterator[os.DirEntry[str]]:
        """The entries of shard folder `number` (0-255), in no order; foreign names too."""
        with os.scandir(f"{self._prefix}{number:02x}") as entries:
            yield from entries

    def need_room(self, needed_bytes: int) -> None:
        """Raise StoreFull where so many bytes more would go below the watermark."""
        free_bytes = self.free_bytes()
        if free_bytes - needed_bytes < self._min_free_bytes:
            raise StoreFull(free_bytes, needed_bytes, self._root)

    def has_blobs(self) -> bool:
        """Whether there is any blob file."""
        return any(
            not is_temporary(entry.name) for number in range(SHARDS) for entry in self.shard(number)
        )

    def free_bytes(self) -> int:
        """Space that this process may still write, rounded down to a 1024th of the disk.

        Refusals tell it: exact, it would say whether an upload took space, and so whether
        anybody had its bytes already (invariant 9).
        """
        found = os.statvfs(self._root)
        unit = max(1, found.f_blocks >> 10)
        return found.f_bavail // unit * unit * found.f_frsize

    # --- taking away

    def remove(self, digest: Digest) -> bool:
        """Remove the file; its absence is durable on return. False when there was none.

        The caller's record says `deleting` (invariant 2).
        """
        name = self.name_of(digest)
        removed = self._disk.unlink(name)
        # Also when it was gone: who unlinked it may have died before syncing.
        self._disk.sync_folder(os.path.dirname(name))
        return removed

    def remove_many(self, digests: Iterable[Digest], *, durable: bool = True) -> None:
        """Remove several files with one sync a folder; durable on return, unless told not to."""
        folders = set()
        for digest in digests:
            name = self.name_of(digest)
            self._disk.unlink(name)
            folders.add(os.path.dirname(name))
        if durable:
            for folder in sorted(folders):
                self._disk.sync_folder(folder)

    def quarantine(self, digest: Digest) -> Path:
        """Move the file aside for the operator; durable on return. Raises BlobMissing.

        Returns its new place, `ROOT/quarantine/<digest>.<random>`: a blob may go bad twice.
        """
        name = self.name_of(digest)
        aside = self._quarantine / f"{digest.hex()}.{os.urandom(4).hex()}"
        try:
            self._disk.rename(name, aside)
        except FileNotFoundError:
            raise BlobMissing(digest.hex(), "no file has its name") from None
        # The new name first: a crash in between may show the bytes twice, never nowhere.
        self._disk.sync_folder(self._quarantine)
        self._disk.sync_folder(os.path.dirname(name))
        return aside

    # --- inside, and for `Batch`

    def name_of(self, digest: Digest) -> str:
        """The path of the blob as text."""
        # Text, not Path: building a Path takes longer than opening the file.
        name = digest.hex()
        return f"{self._prefix}{name[:2]}/{name}"

    def give_name(self, staged: Staged, name: str) -> None:
        """Link the copy at `name`, over what is there; the bytes to be synced already
        unless the name is free."""
        try:
            self._link(staged, name)
        except FileNotFoundError:
            # It had this name before and lost it, and the kernel lets no file return that
            # has lost its last name. Its bytes are still ours to read.
            self._renew(staged)
            self._link(staged, name)

    def _link(self, staged: Staged, name: str) -> None:
        try:
            self._disk.link(staged.fd, name)
        except FileExistsError:
            # A record may name what is there: only durable bytes may take its place.
            staged.sync()
            # Held open, the old file is freed after the answer, as a rehearsed copy is: the
            # time must not tell that there was one (invariant 9).
            old_fd = -1
            with suppress(OSError):
                old_fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                self._disk.replace(staged.fd, name)
            finally:
                if old_fd >= 0:
                    self.leftovers.add(partial(os.close, old_fd))

    def _renew(self, staged: Staged) -> None:
        os.lseek(staged.fd, 0, os.SEEK_SET)
        with open(staged.fd, "rb", buffering=0, closefd=False) as stream:
            fresh = self.stage(
                stream,
                promised_size=staged.size_bytes,
                promised_digest=staged.digest,
                sync=staged.synced,
            )
        staged.become(fresh)

    def _write_all(self, source: Source, writing: Writing) -> Measured:
        with reading(source) as (reader, seeming_bytes):
            needed_bytes = writing.expect(seeming_bytes)
            if needed_bytes > SMALL_BYTES:
                # Asked first: a reservation that fails half-way holds, for that moment,
                # all the space there is, and would make other writers fail too.
                self.need_room(needed_bytes)
                self._disk.allocate(writing.fd, needed_bytes)
            hashing = Hashing(self._lanes)
            hashing.drain(reader, needed_bytes, writing.write)
        writing.end()
        return Measured(hashing.digest, writing.size_bytes, hashing.blake3)

    def tell_full(self, error: OSError, needed_bytes: int) -> None:
        """Turn a full disk, or a full quota, into StoreFull with its numbers."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(self.free_bytes(), needed_bytes, self._root) from error


def _open_unnoticed(name: str) -> int:
    """Open for reading without a change of the time of last access, which `recency` sets:
    a scrub must not make all blobs look used."""
    try:
        return os.open(name, _READ_UNNOTICED)
    except PermissionError:  # another user's file
        return os.open(name, _READ_UNNOTICED & ~os.O_NOATIME)


def _read_from_disk(
    fd: int, update: Callable[[memoryview], object], rate: Callable[[int], None] | None
) -> int:
    """Feed the file to `update`, past the page cache; returns its length."""
    # What memory holds is dropped first, or the check would not see the disk. Pages not
    # written out yet stay: nobody can say anything about those.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer = memoryview(bytearray(READ_BYTES))
    done = 0
    while count := os.preadv(fd, [buffer], done):
        update(buffer[:count])
        os.posix_fadvise(fd, done, count, os.POSIX_FADV_DONTNEED)
        done += count
        if rate is not None:
            rate(count)
    return done
