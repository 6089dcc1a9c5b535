"""A folder as a target: another disk, a network mount.

    PATH/<key>               objects; no part of a key begins with a dot
    PATH/.lock               flock: what a condition compares does not change meanwhile
    PATH/.arriving/          objects on their way; empty but after a crash
    PATH/.parts/<upload>/    a multipart upload: its key, and its parts as <number>-<etag>

What a call has stored or removed is on stable storage when it returns. An object's etag is
its time of writing, inode and size; the time grows with each writing of a key, so that no etag
comes twice while the object is there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat as stat_module
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final, final

from cas.clock import DAY_US, SystemClock
from cas.durable import DISK, Disk, Temporary, opened
from replicator.targets import (
    Body,
    BytesDiffer,
    Changed,
    Incoming,
    ObjectAbsent,
    ObjectRefused,
    ObjectStat,
    Part,
    TargetRefused,
    TargetUnreachable,
    Traits,
    Unfinished,
)

Telling = Callable[[], AbstractContextManager[None]]

_LOCK: Final = ".lock"
_ARRIVING: Final = ".arriving"
_PARTS: Final = ".parts"
_KEY: Final = "key"  # in the folder of an upload
_PIECE_BYTES: Final = 1 << 20
_COPY_BYTES: Final = 1 << 30
# How a filesystem says that it copies no ranges; what was copied before is skipped then.
_NO_RANGES: Final = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Nothing helps but somebody who acts; the rest of what a system says may pass by itself.
_REFUSING: Final = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENOENT,
        errno.EOPNOTSUPP,
    }
)
_OBJECT_REFUSING: Final = frozenset(
    {errno.ENAMETOOLONG, errno.EFBIG, errno.EINVAL, errno.ENOTDIR, errno.EISDIR}
)


@final
class FolderTarget:
    """See the module. A `Target`."""

    def __init__(self, name: str, path: Path, *, known: bool = False, disk: Disk = DISK) -> None:
        """Touches nothing yet. A target that is `known` was written to before: an empty folder
        in its place is most often one where nothing is mounted, and is refused."""
        self._name = name
        self._path = path.absolute()
        self._known = known
        self._disk = disk
        self._identity: tuple[int, int] | None = None  # device and inode, once seen
        self._is_ready = False
        self._readying = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    @property
    def place(self) -> str:
        return f"folder {self._path}"

    # --- objects

    def put(
        self,
        key: str,
        body: Body,
        size_bytes: int,
        *,
        md5: bytes | None = None,
        sha256: bytes | None = None,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> str:
        with self._telling():
            path = self._path_of(key)
            self._ready()
            arriving = self._disk.temporary(self._path / _ARRIVING)
            try:
                self._write(arriving, body, size_bytes, md5, sha256)
                self._disk.sync_data(arriving.fd)
                self._make_folders(path.parent)
                conditional = if_match is not None or if_absent
                with self._locked(fcntl.LOCK_EX if conditional else fcntl.LOCK_SH):
                    found = _stat_of(path)
                    if conditional:
                        self._compare(key, found, if_match)
                    self._place(arriving.fd, path, found)
                    etag = _etag(os.fstat(arriving.fd))
            finally:
                self._disk.discard(arriving)
            self._disk.sync_folder(path.parent)
            return etag

    @contextmanager
    def get(
        self, key: str, *, first_byte: int = 0, last_byte: int | None = None
    ) -> Iterator[Incoming]:
        with self._telling():
            fd = self._open(key)
        try:
            # Not below `_telling`: what befalls the reader is no matter of the target.
            yield self._incoming(key, fd, first_byte, last_byte)
        finally:
            os.close(fd)

    def stat(self, key: str) -> ObjectStat:
        with self._telling():
            path = self._path_of(key)
            self._look()
            found = _stat_of(path)
            if found is None:
                raise ObjectAbsent(self._name, f"no object {key}")
            return _object(key, found)

    def delete(self, key: str) -> None:
        with self._telling():
            path = self._path_of(key)
            self._look()
            if not path.parent.is_dir():
                return
            self._ready()
            with self._locked(fcntl.LOCK_SH):
                if _stat_of(path) is not None:
                    self._disk.unlink(path)
            # Also where none was there: another call's removal may not be durable yet.
            self._disk.sync_folder(path.parent)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectStat]:
        with self._telling():
            self._look()
            for key, path in _walk(str(self._path), "", prefix, after):
                found = _stat_of(path)
                if found is not None:  # else removed meanwhile
                    yield _object(key, found)

    # --- in parts

    def begin(self, key: str) -> str:
        with self._telling():
            self._path_of(key)
            self._ready()
            upload_id = uuid.uuid4().hex
            folder = self._path / _PARTS / upload_id
            self._disk.make_folder(folder)
            self._disk.sync_folder(folder.parent)
            self._disk.write_file(folder / _KEY, key.encode())
            return upload_id

    def put_part(
        self, key: str, upload_id: str, number: int, body: Body, size_bytes: int, md5: bytes | None
    ) -> str:
        with self._telling():
            folder = self._upload(key, upload_id)
            if not 1 <= number <= 10_000:
                raise ObjectRefused(self._name, f"{number} is no number of a part")
            arriving = self._disk.temporary(self._path / _ARRIVING)
            try:
                etag = self._write(arriving, body, size_bytes, md5 or b"").hex()
                if md5 is not None and etag != md5.hex():
                    raise BytesDiffer(self._name, f"part {number} of {key} arrived as other bytes")
                self._disk.sync_data(arriving.fd)
                with self._locked(fcntl.LOCK_EX):
                    self._disk.replace(arriving.fd, folder / f"{number:05}-{etag}")
                    self._forget_others(folder, number, etag)
            except FileNotFoundError as error:  # aborted meanwhile
                raise ObjectAbsent(self._name, f"no upload {upload_id}") from error
            finally:
                self._disk.discard(arriving)
            self._disk.sync_folder(folder)
            return etag

    def parts(self, key: str, upload_id: str) -> Sequence[Part]:
        with self._telling():
            return _parts(self._upload(key, upload_id))

    def complete(self, key: str, upload_id: str, etags: Sequence[str]) -> str:
        with self._telling():
            folder = self._upload(key, upload_id)
            there = {part.number: part for part in _parts(folder)}
            for number, etag in enumerate(etags, start=1):
                if number not in there or there[number].etag != etag:
                    raise BytesDiffer(self._name, f"part {number} of {key} is not {etag}")
            arriving = self._disk.temporary(self._path / _ARRIVING)
            try:
                for number, etag in enumerate(etags, start=1):
                    self._append(arriving, folder / f"{number:05}-{etag}")
                self._disk.sync_data(arriving.fd)
                path = self._path_of(key)
                self._make_folders(path.parent)
                with self._locked(fcntl.LOCK_SH):
                    self._place(arriving.fd, path, _stat_of(path))
                    made = _etag(os.fstat(arriving.fd))
            finally:
                self._disk.discard(arriving)
            self._disk.sync_folder(path.parent)
            self._forget(folder)
            return made

    def abort(self, key: str, upload_id: str) -> None:
        with self._telling():
            try:
                folder = self._upload(key, upload_id)
            except ObjectAbsent:
                return
            self._forget(folder)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        with self._telling():
            self._look()
            for upload_id in _names(self._path / _PARTS):
                folder = self._path / _PARTS / upload_id
                try:
                    key = (folder / _KEY).read_text()
                    begun_us = (folder / _KEY).stat().st_mtime_ns // 1000
                except FileNotFoundError:
                    continue  # being made or being forgotten
                if key.startswith(prefix):
                    yield Unfinished(key, upload_id, begun_us)

    # --- of itself

    def traits(self, key: str) -> Traits:
        # In parts, all bytes would be written twice.
        return Traits(
            in_parts=False,
            sha256_checked=True,
            presigned=False,
            versioning=False,
            object_lock=False,
            clock_offset_us=0,
        )

    def close(self) -> None:
        """Nothing is kept open."""

    # --- inside: the folder

    def _look(self) -> None:
        """Refuse a folder that is another one than before; one not made yet is empty."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            if self._known or self._identity:
                raise TargetRefused(self._name, f"{self._path} is not there") from None
            return
        identity = (found.st_dev, found.st_ino)
        if self._identity is None:
            if self._known and not (self._path / _LOCK).exists():
                reason = f"{self._path} is not what was written to before: is nothing mounted?"
                raise TargetRefused(self._name, reason)
            self._identity = identity
        elif self._identity != identity:
            raise TargetRefused(self._name, f"{self._path} is another folder: was it unmounted?")

    def _ready(self) -> None:
        """The folder and what is ours in it are there on return."""
        if self._is_ready:
            self._look()
            return
        with self._readying:
            if not self._known and self._identity is None:
                self._make_folders(self._path)
            self._look()
            for name in (_ARRIVING, _PARTS):
                self._make_folders(self._path / name)
            with suppress(FileExistsError):
                # Made once and never replaced: a lock on another file would hold nobody.
                os.close(self._disk.create(self._path / _LOCK))
                self._disk.sync_folder(self._path)
            self._forget_arrivals()
            self._is_ready = True

    def _forget_arrivals(self) -> None:
        """Remove what a crash left behind, where the filesystem knows no nameless files."""
        for name in _names(self._path / _ARRIVING):
            path = self._path / _ARRIVING / name
            found = _stat_of(path)
            if found and SystemClock().now_us() - found.st_mtime_ns // 1000 > DAY_US:
                self._disk.unlink(path)

    def _make_folders(self, path: Path) -> None:
        if path.is_dir():
            return
        self._make_folders(path.parent)
        self._disk.make_folder(path)
        self._disk.sync_folder(path.parent)

    def _path_of(self, key: str) -> Path:
        parts = key.split("/")
        if any(not part or part.startswith(".") or "\0" in part for part in parts):
            raise ObjectRefused(self._name, f"{key!r} is no key of an object here")
        return self._path.joinpath(*parts)

    def _upload(self, key: str, upload_id: str) -> Path:
        self._ready()
        absent = ObjectAbsent(self._name, f"no upload {upload_id} of {key}")
        if not upload_id.isalnum():
            raise absent
        folder = self._path / _PARTS / upload_id
        try:
            if (folder / _KEY).read_text() != key:
                raise absent
        except FileNotFoundError:
            raise absent from None
        return folder

    def _forget(self, folder: Path) -> None:
        # The key goes first: without it there is no upload.
        self._disk.unlink(folder / _KEY)
        self._disk.sync_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def _forget_others(self, folder: Path, number: int, etag: str) -> None:
        for part in _parts(folder):
            if part.number == number and part.etag != etag:
                self._disk.unlink(folder / f"{number:05}-{part.etag}")

    # --- inside: bytes

    def _write(
        self,
        arriving: Temporary,
        body: Body,
        size_bytes: int,
        md5: bytes | None,
        sha256: bytes | None = None,
    ) -> bytes:
        """Write the body; returns its MD5 where `md5` was given (b"": any will do)."""
        md5_found = hashlib.md5(usedforsecurity=False)
        sha256_found = hashlib.sha256()
        left = size_bytes
        while left and (piece := body.read(min(left, _PIECE_BYTES))):
            self._disk.write(arriving.fd, piece)
            left -= len(piece)
            if md5 is not None:
                md5_found.update(piece)
            if sha256 is not None:
                sha256_found.update(piece)
        if left:
            raise BytesDiffer(self._name, f"{left} of {size_bytes} bytes did not come")
        if (md5 and md5_found.digest() != md5) or (sha256 and sha256_found.digest() != sha256):
            raise BytesDiffer(self._name, "what arrived are other bytes than was said")
        return md5_found.digest()

    def _append(self, arriving: Temporary, path: Path) -> None:
        with opened(path) as fd:
            try:
                # Where the filesystem can share blocks, nothing is copied.
                while os.copy_file_range(fd, arriving.fd, _COPY_BYTES):
                    pass
            except OSError as error:
                if error.errno not in _NO_RANGES:
                    raise
                while piece := os.read(fd, _PIECE_BYTES):
                    self._disk.write(arriving.fd, piece)

    def _place(self, fd: int, path: Path, found: os.stat_result | None) -> None:
        """Give the file its name; its etag is none that the object ever had."""
        if found is None:
            try:
                self._disk.link(fd, path)
            except FileExistsError:  # by another one, at the same moment
                found = _stat_of(path)
            else:
                return
        if found is not None:
            later_ns = max(os.fstat(fd).st_mtime_ns, found.st_mtime_ns + 1)
            os.utime(fd, ns=(later_ns, later_ns))
        self._disk.replace(fd, path)

    def _compare(self, key: str, found: os.stat_result | None, if_match: str | None) -> None:
        if if_match is None and found is not None:
            raise Changed(self._name, f"{key} is there already")
        if if_match is not None and (found is None or _etag(found) != if_match):
            raise Changed(self._name, f"{key} is another one now")

    # --- inside: the rest

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with opened(self._path / _LOCK) as fd:  # a descriptor of its own: flock is its lock
            fcntl.flock(fd, how)
            yield

    def _open(self, key: str) -> int:
        path = self._path_of(key)
        self._look()
        absent = ObjectAbsent(self._name, f"no object {key}")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise absent from None
        if _is_folder(fd):
            os.close(fd)
            raise absent
        return fd

    def _incoming(self, key: str, fd: int, first: int, last: int | None) -> _Opened:
        stat = _object(key, os.fstat(fd))
        if first and first >= stat.size_bytes:
            raise BytesDiffer(self._name, f"{key} has only {stat.size_bytes} bytes")
        end = stat.size_bytes if last is None else min(last + 1, stat.size_bytes)
        return _Opened(self._telling, stat, fd, first, end)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Errors of the system as those of a target."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror or error}: {error.filename or self._path}"
            if error.errno in _REFUSING:
                raise TargetRefused(self._name, reason) from error
            if error.errno in _OBJECT_REFUSING:
                raise ObjectRefused(self._name, reason) from error
            raise TargetUnreachable(self._name, reason) from error


@final
class _Opened:
    """An `Incoming`: bytes from `first` up to `end` of an open file."""

    def __init__(self, telling: Telling, stat: ObjectStat, fd: int, first: int, end: int) -> None:
        self._telling = telling
        self.stat = stat
        self._fd = fd
        self._position = first
        self._end = end

    def read(self, size: int) -> bytes:
        left = min(size, self._end - self._position)
        if left <= 0:
            return b""
        with self._telling():
            piece = os.pread(self._fd, left, self._position)
            if not piece:
                raise OSError(errno.EIO, "it ended before its last byte", self.stat.key)
        self._position += len(piece)
        return piece


# --- files


def _stat_of(path: str | Path) -> os.stat_result | None:
    """None: no file is there."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if stat_module.S_ISDIR(found.st_mode) else found


def _is_folder(fd: int) -> bool:
    return stat_module.S_ISDIR(os.fstat(fd).st_mode)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_ino:x}-{found.st_size:x}"


def _object(key: str, found: os.stat_result) -> ObjectStat:
    return ObjectStat(key, found.st_size, _etag(found), found.st_mtime_ns // 1000)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _parts(folder: Path) -> Sequence[Part]:
    found = []
    for name in _names(folder):
        number, _, etag = name.partition("-")
        stat = _stat_of(folder / name) if etag else None
        if stat is not None and not name.startswith("."):
            found.append(Part(int(number), stat.st_size, etag))
    return found


def _walk(folder: str, above: str, prefix: str, after: str) -> Iterator[tuple[str, str]]:
    """(key, path) of the objects below, in order of keys, which a folder's name and "/" begin."""
    try:
        with os.scandir(folder) as entries:
            found = [
                (entry.name + "/" * entry.is_dir(), entry.path)
                for entry in entries
                if not entry.name.startswith(".")
            ]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, path in sorted(found):
        key = above + name
        if not name.endswith("/"):
            if key.startswith(prefix) and key > after:
                yield key, path
        elif _may_hold(key, prefix) and (key > after or after.startswith(key)):
            yield from _walk(path, key, prefix, after)


def _may_hold(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)
