"""Blob files: the bytes, under their digests, on local disk. Knows no catalog.

    ROOT/objects/ab/<digest>    one blob, mode 0444; `ab` are the digest's first two characters
    ROOT/quarantine/            bytes that failed their hash, kept for the operator
    ROOT/partial/               bytes of resumable uploads

A blob is written in an order that a crash may cut anywhere:

    nameless file in objects/     a crash leaves nothing
    write while hashing           what is stored is what was hashed
    check what was promised       wrong bytes never get a name
    fdatasync                     the bytes are durable before anything names them
    link under the digest         (over bad bytes that have the name: rename)
    fsync the shard folder        the name is durable; only now may the catalog speak of it

so a file named by a digest is whole, except that a power cut may tear one whose writer had
not come to the end. Therefore bytes that no record names are never trusted: `place` puts
its own copy over them (invariants 1, 4 and 7).
"""

from __future__ import annotations

import enum
import errno
import hashlib
import os
import stat as modes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, final

import msgspec
from blake3 import blake3 as new_blake3

from cas.digest import Digest
from cas.durable import DISK, Disk, SupportsRead, Temporary, is_temporary, opened, temporary_name
from cas.errors import BlobMissing, DigestMismatch, SizeMismatch, StoreFull, TooLarge
from cas.hashing import LANES_MAX, SMALL_BYTES, Hashing, Source, reading
from cas.leftovers import Leftovers

__all__ = ["Batch", "BlobFiles", "Measured", "Meeting", "Placed", "Seekable", "Source", "Staged"]

SHARDS = 256

# Early enough that little is left for the final sync, rare enough to cost nothing.
_WRITEBACK_BYTES = 16 << 20
# A buffer that stays in the cache of one core between being read and being hashed.
_READ_BYTES = 256 << 10


class Seekable(SupportsRead, Protocol):
    """A stream that can be read twice."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


@final
class Measured(msgspec.Struct, frozen=True):
    """What bytes are: their name, length, and BLAKE3 (empty where it was not asked for)."""

    digest: Digest
    size_bytes: int
    blake3: bytes = b""


@final
class Placed(msgspec.Struct, frozen=True):
    """A blob file as it was seen or written: whatever differs, it is another file.

    The time of its last write is part of it, since the kernel gives the number of a removed
    inode to the next file that is made; linking and renaming leave that time alone.
    """

    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Placed:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class Meeting(enum.Enum):
    """What is done with an own copy of bytes, once it is known what the store has of them."""

    PLACE = "place"  # nobody has them: this copy counts
    HEAL = "heal"  # a record names them, but nobody can be sure of them: this copy counts
    REHEARSE = "rehearse"  # another tenant has them: work as hard, throw the result away
    LEAVE = "leave"  # the same tenant has them, and may know it


@final
class Staged:
    """An own verified copy without a name. Closing it unplaced leaves nothing on disk."""

    __slots__ = ("_disk", "_hidden", "_leftovers", "_temporary", "measured", "synced")

    def __init__(self, disk: Disk, temporary: Temporary, measured: Measured, synced: bool) -> None:
        self._disk = disk
        self._temporary: Temporary | None = temporary
        self._leftovers: Leftovers | None = None
        self._hidden: list[str] = []  # names it was given only to be taken away
        self.measured = measured
        self.synced = synced

    @property
    def digest(self) -> Digest:
        return self.measured.digest

    @property
    def size_bytes(self) -> int:
        return self.measured.size_bytes

    @property
    def blake3(self) -> bytes:
        return self.measured.blake3

    @property
    def fd(self) -> int:
        """The copy, open for reading (`os.pread`: its position is nobody's) until `close`."""
        if self._temporary is None:
            raise ValueError("the staged copy is closed")
        return self._temporary.fd

    def sync(self) -> None:
        """Make the bytes durable, if they are not yet."""
        if not self.synced:
            self._disk.sync_data(self.fd)
            self.synced = True

    def become(self, other: Staged) -> None:
        """Take over the copy that `other` holds; the own one is closed."""
        temporary, self._temporary = self._temporary, other._temporary
        other._temporary = temporary
        self.synced = other.synced
        other.close()

    def close(self) -> None:
        """Let go of the copy; what was placed stays. May be called twice."""
        temporary, self._temporary = self._temporary, None
        if temporary is None:
            return
        let_go = partial(_let_go, self._disk, temporary, self._hidden)
        if self._leftovers is None:
            let_go()
        else:
            self._leftovers.add(let_go)

    def leave_to(self, leftovers: Leftovers, hidden: str | None = None) -> None:
        """Let `leftovers` let go of it after `close`, which then takes no time.

        `hidden` is a name of it that goes too.
        """
        if hidden is not None:
            self._hidden.append(hidden)
        self._leftovers = leftovers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _let_go(disk: Disk, temporary: Temporary, hidden: list[str]) -> None:
    try:
        for name in hidden:
            disk.unlink(name)
    finally:
        disk.discard(temporary)


@final
class BlobFiles:
    """The blob files of one ROOT. Safe for threads and for many processes.

    Besides the errors named below every method raises OSError as the kernel gave it; after
    a failed step nothing is named that was not named before, except that a failed folder
    sync may leave a whole, verified file whose name is not durable: an orphan, for the
    collector. (It is not unlinked: by now it may be another writer's file.)
    """

    def __init__(self, root: Path, disk: Disk = DISK, min_free_bytes: int = 0) -> None:
        """Nothing is staged where less than `min_free_bytes` would stay free."""
        self._root = root.absolute()
        self._min_free_bytes = min_free_bytes
        self._disk = disk
        self._objects = self._root / "objects"
        self._quarantine = self._root / "quarantine"
        self._prefix = f"{self._objects}/"
        self._lanes = threading.BoundedSemaphore(LANES_MAX)
        self._leftovers = Leftovers()

    def close(self) -> None:
        """Wait until all that was rehearsed is freed. May be called twice."""
        self._leftovers.close()

    def create(self) -> None:
        """Make the folders; durable on return, harmless when they are there.

        All 256 shards are made here, so that no put makes one: no put has a parent folder
        to sync, and none takes longer because it is the first of its shard (invariant 9).
        """
        self._root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self._root, self._objects, self._quarantine, self._root / "partial"):
            self._disk.make_folder(folder)
        for number in range(SHARDS):
            self._disk.make_folder(self._objects / f"{number:02x}")
        # Also when all were there: who made them may have died before syncing.
        self._disk.sync_folder(self._objects)
        self._disk.sync_folder(self._root)
        with suppress(PermissionError):  # then somebody else made ROOT, and not just now
            self._disk.sync_folder(self._root.parent)

    @property
    def root(self) -> Path:
        return self._root

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        return Path(self._name(digest))

    # --- storing

    def measure(self, source: Path | Seekable) -> Measured:
        """The digest and length of what `source` holds from here to its end; no BLAKE3.

        Writes nothing. A stream is put back to where it stood.
        """
        if isinstance(source, Path):
            with reading(source) as (reader, _):
                return _measure(reader.chunk)
        position = source.tell()
        try:
            with reading(source) as (reader, _):
                return _measure(reader.chunk)
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
    ) -> Staged:
        """Copy `source` to its end into a file without a name, hashing what is written.

        The bytes are durable on return when `sync` is set. `limit_bytes` 0 is no limit.
        Constant memory, whatever the length. The space for a promised size is reserved
        before the first byte is read.

        Raises TooLarge, SizeMismatch (as soon as it is clear), DigestMismatch, StoreFull,
        and whatever reading the source raises; nothing is left behind then.
        """
        if promised_size is not None and limit_bytes and promised_size > limit_bytes:
            raise TooLarge(limit_bytes)
        writing = _Writing(self._disk, promised_size, limit_bytes, self.need_room)
        self.need_room(promised_size or 0)
        try:
            temporary = self._disk.temporary(self._objects)
            try:
                writing.fd = temporary.fd
                if isinstance(source, bytes) and len(source) <= SMALL_BYTES:
                    measured = _write_small(source, writing)
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
            self._tell_full(error, max(writing.expected_bytes, promised_size or 0))
            raise
        return Staged(self._disk, temporary, measured, sync)

    def place(self, staged: Staged) -> Placed:
        """Give the staged copy its digest as name; durable on return (invariant 4).

        Whatever has the name already is replaced in one step, so bad bytes are healed and
        readers see either file whole. May be called again, also after the name was removed.
        Raises StoreFull.
        """
        name = self._name(staged.digest)
        try:
            staged.sync()
            self._give_name(staged, name)
            # As in `rehearse`, for the time it takes to wake that thread.
            staged.leave_to(self._leftovers)
            self._disk.sync_folder(os.path.dirname(name))
        except OSError as error:
            self._tell_full(error, staged.size_bytes)
            raise
        return Placed.of(os.fstat(staged.fd))

    def rehearse(self, staged: Staged) -> None:
        """Do what `place` does, to the same folder, and throw the name away (invariant 9).

        For bytes that another tenant has already: the time taken tells nobody so.
        """
        folder = os.path.dirname(self._name(staged.digest))
        hidden = f"{folder}/{temporary_name()}"
        try:
            staged.sync()
            # Not a bare link: the copy may have been rehearsed, or placed and replaced, before.
            self._give_name(staged, hidden)
            # Name and copy go after the answer: placing has nothing to take away. Done
            # before it, that shows: 20 to 40 µs of 1,100, in 2,000 puts.
            staged.leave_to(self._leftovers, hidden)
            self._disk.sync_folder(folder)
        except OSError as error:
            self._tell_full(error, staged.size_bytes)
            raise

    def batch(self) -> Batch:
        """Begin a batch: many blobs, one wait for the disk at its end."""
        return Batch(self, self._disk)

    # --- what is there

    def stat(self, digest: Digest) -> Placed | None:
        """The file that has the name, or None. Says nothing of its bytes."""
        try:
            found = os.stat(self._name(digest), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return Placed.of(found) if modes.S_ISREG(found.st_mode) else None

    def open(self, digest: Digest) -> int:
        """A read-only descriptor, the caller's to close; raises BlobMissing."""
        try:
            return os.open(self._name(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise BlobMissing(digest.hex(), "no file has its name") from None

    def sync_existing(self, digest: Digest) -> Placed | None:
        """Make the file that has the name durable, name included; None when there is none.

        For a file that somebody linked and may not have synced. Makes good bytes durable,
        not bad ones good: after a power cut compare the length, or `check`.
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
        self._disk.sync_folder(os.path.dirname(self._name(digest)))
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
        name = self._name(digest)
        removed = self._disk.unlink(name)
        # Also when it was gone: who unlinked it may have died before syncing.
        self._disk.sync_folder(os.path.dirname(name))
        return removed

    def remove_many(self, digests: Iterable[Digest], *, durable: bool = True) -> None:
        """Remove several files with one sync a folder; durable on return, unless told not to."""
        folders = set()
        for digest in digests:
            name = self._name(digest)
            self._disk.unlink(name)
            folders.add(os.path.dirname(name))
        if durable:
            for folder in sorted(folders):
                self._disk.sync_folder(folder)

    def quarantine(self, digest: Digest) -> Path:
        """Move the file aside for the operator; durable on return. Raises BlobMissing.

        Returns its new place, `ROOT/quarantine/<digest>.<random>`: a blob may go bad twice.
        """
        name = self._name(digest)
        aside = self._quarantine / f"{digest.hex()}.{os.urandom(4).hex()}"
        try:
            self._disk.rename(name, aside)
        except FileNotFoundError:
            raise BlobMissing(digest.hex(), "no file has its name") from None
        # The new name first: a crash in between may show the bytes twice, never nowhere.
        self._disk.sync_folder(self._quarantine)
        self._disk.sync_folder(os.path.dirname(name))
        return aside

    # --- inside

    def _name(self, digest: Digest) -> str:
        # Text, not Path: building a Path takes longer than opening the file.
        name = digest.hex()
        return f"{self._prefix}{name[:2]}/{name}"

    def _give_name(self, staged: Staged, name: str) -> None:
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
                    self._leftovers.add(partial(os.close, old_fd))

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

    def _write_all(self, source: Source, writing: _Writing) -> Measured:
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

    def _tell_full(self, error: OSError, needed_bytes: int) -> None:
        """Turn a full disk, or a full quota, into StoreFull with its numbers."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(self.free_bytes(), needed_bytes, self._root) from error


@final
class Batch:
    """Many blobs, one wait for the disk. For one thread; a context manager.

    Nothing is durable before `sync` returns, and then all is. Holds one descriptor in all, and a
    few hundred bytes per blob. Leaving it without `sync` leaves orphans, which no record
    names and the collector removes.

    One syncfs beats all else: 20,000 files of 0.6-16 KB are durable 0.2 s after the last
    was written; with writeback begun early and fdatasync of each it takes 1.05 s, with
    fdatasync alone 3.2 s. It may wait for other programs' writes to the same filesystem.
    """

    def __init__(self, files: BlobFiles, disk: Disk) -> None:
        self._files = files
        self._disk = disk
        # syncfs reports the failed writes since this descriptor was opened: open it first.
        self._fd: int | None = os.open(files._objects, os.O_RDONLY | os.O_CLOEXEC)
        self._placed: dict[Digest, tuple[Measured, Placed]] = {}
        self._unsynced: list[str] = []
        self._hidden: list[str] = []

    def store(
        self, source: Source, meet: Callable[[Measured], Meeting], *, limit_bytes: int = 0
    ) -> tuple[Measured, Placed | None]:
        """Store one blob under its digest, durable only after `sync`.

        `meet` decides, once the bytes are known, whether the copy is placed, rehearsed
        (`close` throws it away) or left. What has the name already is replaced by synced
        bytes only, since a record may name it. Raises what `BlobFiles.stage` and `place`
        raise. Returns where the copy was placed, None where it was not.
        """
        files = self._files
        staged = files.stage(source, limit_bytes=limit_bytes, sync=False)
        try:
            measured = staged.measured
            known = self._placed.get(measured.digest)
            if known is not None and files.stat(measured.digest) == known[1]:
                return known
            meeting = meet(measured)
            if meeting is Meeting.LEAVE:
                return measured, None
            name = files._name(measured.digest)
            if meeting is Meeting.REHEARSE:
                hidden = f"{os.path.dirname(name)}/{temporary_name()}"
                self._disk.link(staged.fd, hidden)
                self._hidden.append(hidden)
                self._unsynced.append(hidden)
                return measured, None
            if meeting is Meeting.HEAL:
                # Whoever reads what the record names must not get torn bytes, even where
                # there are none now.
                staged.sync()
            files._give_name(staged, name)
            self._unsynced.append(name)
            placed = Placed.of(os.fstat(staged.fd))
            self._placed[measured.digest] = (measured, placed)
            return measured, placed
        except OSError as error:
            files._tell_full(error, staged.size_bytes)
            raise
        finally:
            staged.close()

    def sync(self) -> None:
        """Make all blobs of the batch durable, names included. May be called repeatedly."""
        if self._fd is None:
            raise ValueError("the batch is closed")
        if not self._unsynced:
            return
        try:
            if self._disk.filesystem_sync_reports():
                self._disk.sync_filesystem(self._fd)
            else:
                self._sync_each()
        except OSError as error:
            self._files._tell_full(error, 0)
            raise
        self._unsynced.clear()

    def _sync_each(self) -> None:
        for name in self._unsynced:
            # A collector may have removed it meanwhile; adopting it will tell.
            with suppress(FileNotFoundError), opened(name) as fd:
                self._disk.sync_data(fd)
        for folder in sorted({os.path.dirname(name) for name in self._unsynced}):
            self._disk.sync_folder(folder)

    def close(self) -> None:
        """Throw away what was rehearsed, after the answer. May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
        hidden, self._hidden = self._hidden, []
        if hidden:
            # One leftover, however many they are: they hold no descriptors.
            self._files._leftovers.add(partial(_unlink_all, self._disk, hidden))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _unlink_all(disk: Disk, names: list[str]) -> None:
    for name in names:
        disk.unlink(name)


@final
class _Writing:
    """The growing copy: keeps the promises about its length while it is written."""

    __slots__ = (
        "_disk",
        "_limit",
        "_need_room",
        "_promised",
        "_started",
        "expected_bytes",
        "fd",
        "size_bytes",
    )

    def __init__(
        self,
        disk: Disk,
        promised_size: int | None,
        limit_bytes: int,
        need_room: Callable[[int], None],
    ) -> None:
        self._disk = disk
        self._need_room = need_room
        self._promised = promised_size
        self._limit = limit_bytes
        self._started = 0
        self.fd = -1
        self.expected_bytes = 0
        self.size_bytes = 0

    def expect(self, seeming_bytes: int) -> int:
        """How many bytes the source is expected to bring; 0 is unknown."""
        if self._limit and seeming_bytes > self._limit:
            raise TooLarge(self._limit)
        self.expected_bytes = seeming_bytes if self._promised is None else self._promised
        return self.expected_bytes

    def write(self, chunk: bytes | memoryview) -> None:
        size = self.size_bytes + len(chunk)
        if self._promised is not None and size > self._promised:
            raise SizeMismatch(self._promised, size)
        if self._limit and size > self._limit:
            raise TooLarge(self._limit)
        self._disk.write(self.fd, chunk)
        self.size_bytes = size
        if size - self._started >= _WRITEBACK_BYTES:
            self._disk.start_writeback(self.fd, self._started, size - self._started)
            self._started = size
            if size >= self.expected_bytes:
                # Nothing was reserved for what still comes: an endless source must not
                # take the last of the disk.
                self._need_room(0)

    def end(self) -> None:
        if self._promised is not None and self.size_bytes != self._promised:
            raise SizeMismatch(self._promised, self.size_bytes)
        if self.size_bytes < self.expected_bytes:
            # The source was shorter than it seemed: give back the rest of the reservation.
            self._disk.truncate(self.fd, self.size_bytes)


def _write_small(data: bytes, writing: _Writing) -> Measured:
    writing.expected_bytes = len(data)
    writing.write(data)
    writing.end()
    return Measured(Digest(hashlib.sha256(data).digest()), len(data), new_blake3(data).digest())


def _measure(chunk_into: Callable[[memoryview], memoryview]) -> Measured:
    sha256 = hashlib.sha256()
    size_bytes = 0
    buffer = memoryview(bytearray(_READ_BYTES))
    while chunk := chunk_into(buffer):
        sha256.update(chunk)
        size_bytes += len(chunk)
    return Measured(Digest(sha256.digest()), size_bytes)


def _read_from_disk(
    fd: int, update: Callable[[memoryview], object], rate: Callable[[int], None] | None
) -> int:
    """Feed the file to `update`, past the page cache; returns its length."""
    # What memory holds is dropped first, or the check would not see the disk. Pages not
    # written out yet stay: nobody can say anything about those.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    buffer = memoryview(bytearray(_READ_BYTES))
    done = 0
    while count := os.preadv(fd, [buffer], done):
        update(buffer[:count])
        os.posix_fadvise(fd, done, count, os.POSIX_FADV_DONTNEED)
        done += count
        if rate is not None:
            rate(count)
    return done
