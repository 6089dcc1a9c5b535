"""The one module that knows fsync: every system call on which durability rests.

`Disk` is also the seam where tests break the disk: they pass a subclass that counts,
records, kills, fails or forgets. Nothing else in blobcask syncs, links or renames, so
a test that walks the steps of a `Disk` walks every durable step there is.

What a power cut may take (POSIX; ext4, xfs and btrfs agree): bytes not followed by
`sync_data`, and folder entries (made, replaced or removed) not followed by `sync_folder`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol, final

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# What the os module lacks. ctypes lets other threads run during these calls.
_LIBC = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE = 1  # <linux/falloc.h>
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>
_offset = ctypes.c_int64  # off_t; a bare int would be passed as a 32-bit one


class SupportsRead(Protocol):
    """A stream of bytes; what every source becomes."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


@final
class Temporary:
    """A file being written that has no name yet: `fd`, open for reading and writing.

    `path` is its hidden name where the filesystem knows no nameless files, else None.
    """

    __slots__ = ("fd", "path")

    def __init__(self, fd: int, path: Path | None = None) -> None:
        self.fd = fd
        self.path = path


class Disk:
    """Durable steps on the local filesystem. Stateless and safe for threads.

    Every method raises OSError as the kernel gave it; a short write never returns.
    """

    def boot_id(self) -> str:
        """Identifies this boot of the machine: what was unsynced in another one may be lost."""
        return _BOOT_ID.read_text().strip()

    # --- bytes

    def temporary(self, folder: Path) -> Temporary:
        """A new file in `folder` that has no name, so a crash leaves nothing; see `discard`.

        Where the filesystem lacks O_TMPFILE, a file with a hidden random name that the
        scrub removes when a crash leaves it behind.
        """
        try:
            # 0444, less what the umask takes: a blob's bytes never change (invariant 7).
            return Temporary(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o444))
        except OSError as error:
            # EISDIR and ENOENT are how old kernels say it; the folder itself may be gone too.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            if not folder.is_dir():
                raise
        path = folder / temporary_name()
        return Temporary(self.create(path, 0o444), path)

    def discard(self, temporary: Temporary) -> None:
        """Close it, and take its hidden name if it has one; a name given by `link` stays."""
        os.close(temporary.fd)
        if temporary.path is not None:
            self.unlink(temporary.path)

    def create(self, path: Path, mode: int = 0o644) -> int:
        """A new named file, open for reading and writing; raises FileExistsError."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data` at the descriptor's position."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count

    def truncate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def allocate(self, fd: int, size_bytes: int) -> None:
        """Reserve space for the first `size_bytes`; raises OSError (ENOSPC) when there is none.

        The file's length stays as it is. A filesystem that cannot reserve is left alone:
        posix_fallocate would write zeros there, which costs as much as the bytes themselves.
        """
        try:
            _call(_LIBC.fallocate, fd, _FALLOC_FL_KEEP_SIZE, _offset(0), _offset(size_bytes))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise

    def start_writeback(self, fd: int, offset: int, size_bytes: int) -> None:
        """Let the kernel begin to write out this range, so that `sync_data` has less to wait for.

        Promises nothing and reports nothing: an error in writing comes out of `sync_data`.
        """
        _LIBC.sync_file_range(fd, _offset(offset), _offset(size_bytes), _SYNC_FILE_RANGE_WRITE)

    def sync_data(self, fd: int) -> None:
        """fdatasync: the file's bytes and size are on stable storage on return.

        A failure means that nobody knows what is on the disk; asking again proves nothing,
        since the kernel may have dropped the dirty pages.
        """
        os.fdatasync(fd)

    def sync_filesystem(self, fd: int) -> None:
        """syncfs: all that was written to the filesystem that holds `fd`, names included.

        Since Linux 5.8 it reports every failed write since `fd` was opened, so open `fd`
        before the first write it shall cover.
        """
        _call(_LIBC.syncfs, fd)

    def filesystem_sync_reports(self) -> bool:
        """Whether `sync_filesystem` tells of bytes that could not be written (Linux 5.8)."""
        major, minor = os.uname().release.split(".")[:2]
        return (int(major), int(minor.partition("-")[0])) >= (5, 8)

    # --- names

    def link(self, fd: int, path: Path | str) -> None:
        """Give the file `fd` the absolute name `path`. Durable after sync_folder.

        Raises FileExistsError, and FileNotFoundError also where `fd` had a name and lost
        its last one: the kernel never lets such a file come back.
        """
        # Only with a folder descriptor does os.link become linkat(2) with
        # AT_SYMLINK_FOLLOW, which following /proc/self/fd needs. The kernel ignores the
        # descriptor for an absolute path, so any will do and no folder need be opened.
        os.link(f"/proc/self/fd/{fd}", path, dst_dir_fd=fd, follow_symlinks=True)

    def replace(self, fd: int, path: Path | str) -> None:
        """Put the file `fd` at `path`, over what may be there, in one step for readers."""
        aside = os.path.join(os.path.dirname(path), temporary_name())
        self.link(fd, aside)
        try:
            self.rename(aside, path)
        finally:
            # Still there when the rename failed, and when `path` is this very file
            # already: rename(2) between two names of one file does nothing.
            self.unlink(aside)

    def rename(self, source: Path | str, target: Path | str) -> None:
        os.rename(source, target)

    def unlink(self, path: Path | str) -> bool:
        """Remove a name; False when it was not there. Durable after sync_folder."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        return True

    def make_folder(self, path: Path, mode: int = 0o755) -> bool:
        """Make one folder; False when it is there. Durable after sync_folder of its parent."""
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            return False
        return True

    def sync_folder(self, path: Path | str) -> None:
        """fsync of a folder: the names made and removed in it are on stable storage."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # --- both

    def write_file(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Make or replace a small file; durable on return, old or new after a crash."""
        aside = path.with_name(temporary_name())
        fd = self.create(aside, mode)
        try:
            self.write(fd, data)
            self.sync_data(fd)
            self.rename(aside, path)
        except BaseException:
            self.unlink(aside)
            raise
        finally:
            os.close(fd)
        self.sync_folder(path.parent)


DISK = Disk()

_TEMPORARY_PREFIX = ".tmp-"


def temporary_name() -> str:
    """A hidden random name for a file that gets its real one later."""
    return _TEMPORARY_PREFIX + secrets.token_hex(8)


def is_temporary(name: str) -> bool:
    """Whether a name is one that `temporary_name` made, left behind by a crash."""
    return name.startswith(_TEMPORARY_PREFIX)


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of `path`, closed at the end."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(path: Path | str, flags: int = os.O_RDONLY) -> Iterator[None]:
    """Hold the exclusive flock of `path`, waited for; a child that is forked meanwhile lets go
    of the file at once.

    A lock belongs to the open file, which such a child shares: it would keep the lock after its
    parent let go of it, or was killed. Only for files in ROOT: while the system opens or closes
    one, no other thread locks a file or forks, so a mount that hangs would hold all of them.
    """
    ours = object()
    with _opening:
        fd = _locked[ours] = os.open(path, flags | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        with _opening:
            # Not in a child, where the number may be that of a file of its own by now.
            if _locked.pop(ours, None) is not None:
                os.close(fd)


_locked: Final[dict[object, int]] = {}
# Held while such a file is opened or closed, and over a fork: no child comes between a file and
# its entry. Reentrant, for what is collected here may be such a file itself.
_opening: Final = threading.RLock()


def _after_fork_in_child() -> None:
    for fd in _locked.values():
        os.close(fd)
    _locked.clear()
    _opening.release()


os.register_at_fork(
    before=_opening.acquire,
    after_in_child=_after_fork_in_child,
    after_in_parent=_opening.release,
)


def _call(function: Callable[..., int], *arguments: object) -> None:
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:  # a signal, which the os module's own calls retry as well
            raise OSError(code, os.strerror(code))
