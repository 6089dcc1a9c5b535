"""What ROOT stands on: who has it open, since which boot, on what kind of filesystem.

LMDB's locks and its reader table work between processes of one PID namespace on a local
filesystem, and its unsynced pages are worth something only while the machine, the mount
and the very file live. Anything else is refused or rebuilt here, before LMDB is touched.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import msgspec

from cas.durable import Disk
from cas.errors import StoreBusy, UnsuitableRoot

# Filesystems whose locks or memory maps are not shared between hosts, or not at all.
_NETWORK = frozenset(
    "nfs nfs4 cifs smb3 smbfs 9p afs ceph lustre gfs gfs2 ocfs2 glusterfs beegfs orangefs "
    "virtiofs coda ncpfs".split()
)


@final
class Mount(msgspec.Struct, frozen=True):
    """The mount a path is on."""

    mount_id: int
    filesystem: str


def mount_of(path: Path) -> Mount:
    """The mount that holds `path`, from the kernel's table of this process."""
    wanted = str(path.resolve())
    found, best = Mount(0, ""), -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
        fields = line.split(" ")
        point = fields[4].replace("\\040", " ")
        inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        # The last of several mounts on one point is the visible one.
        if inside and len(point) >= best:
            found = Mount(int(fields[0]), fields[fields.index("-", 6) + 1])
            best = len(point)
    return found


def refuse_network(path: Path, mount: Mount) -> None:
    """Raise UnsuitableRoot where LMDB's locks do not hold."""
    kind = mount.filesystem
    if kind in _NETWORK or (kind.startswith("fuse") and kind != "fuseblk"):
        raise UnsuitableRoot(path, f"{kind} is no local filesystem; the index needs one")


def _namespace(disk: Disk) -> bytes:
    return f"{disk.boot_id()} {os.readlink('/proc/self/ns/pid')}\n".encode()


@final
class Lock:
    """`ROOT/LOCK`: shared by everybody who has the store open, exclusive to remake the index.

    flock belongs to the open file, so it ends with the process however that dies.
    """

    _POLL_S = 0.02

    def __init__(self, path: Path, disk: Disk, wait_s: float) -> None:
        """Take it shared; raises UnsuitableRoot when another PID namespace holds it."""
        self._path = path
        self._wait_s = wait_s
        self._held = False  # alone
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            mine = _namespace(disk)
            self.alone = self._try_exclusive()
            if self.alone:
                # Nobody has it open: whose namespace it was no longer matters.
                os.ftruncate(self.fd, 0)
                os.pwrite(self.fd, mine, 0)
            fcntl.flock(self.fd, fcntl.LOCK_SH)
            theirs = os.pread(self.fd, 4096, 0)
            if theirs != mine:
                raise UnsuitableRoot(
                    path,
                    f"open in another PID namespace or boot ({theirs.decode().strip()}, "
                    f"here {mine.decode().strip()}); LMDB's locks do not reach across",
                )
        except BaseException:
            os.close(self.fd)
            raise

    def _try_exclusive(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def exclusive(self, wanted: str, done: Callable[[], bool]) -> Iterator[bool]:
        """Hold it alone; raises StoreBusy when others do not let go in time.

        Yields False, holding its share only, as soon as `done()` says that somebody else
        did what was wanted: of many workers that start at once one makes the index, and
        the others must not wait for that one to stop serving.

        Two processes that both want it first let go of their share, so that neither waits
        for the other. What was true before must therefore be looked at again inside.
        """
        if self._held:
            yield True  # wanted by a part of what already has it
            return
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        deadline = time.monotonic() + self._wait_s
        try:
            while not self._try_exclusive():
                if time.monotonic() >= deadline:
                    raise StoreBusy(self._path.parent, wanted)
                time.sleep(self._POLL_S)
                fcntl.flock(self.fd, fcntl.LOCK_SH)
                if done():
                    yield False
                    return
                fcntl.flock(self.fd, fcntl.LOCK_UN)
            self._held = True
            yield True
        finally:
            self._held = False
            fcntl.flock(self.fd, fcntl.LOCK_SH)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@final
class Boot(msgspec.Struct, frozen=True):
    """`index/BOOT`: under which circumstances the index was made.

    In any others its unsynced pages may be lost or another file's, and it is remade.
    """

    boot_id: str
    device: int
    inode: int  # of data.mdb
    mount_id: int

    @classmethod
    def of(cls, folder: Path, disk: Disk) -> Boot:
        """The circumstances now; raises FileNotFoundError without an index."""
        data = (folder / "data.mdb").stat()
        return cls(disk.boot_id(), data.st_dev, data.st_ino, mount_of(folder).mount_id)

    @classmethod
    def read(cls, folder: Path) -> Boot | None:
        try:
            return msgspec.json.decode((folder / "BOOT").read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def holds(self, now: Boot, alone: bool) -> bool:
        """Whether an index made under these circumstances may be trusted under `now`.

        The mount counts only for the first to open: mount ids differ between mount
        namespaces (systemd gives its services their own), and while another process has
        the store open, its filesystem cannot have been unmounted.
        """
        same = (self.boot_id, self.device, self.inode) == (now.boot_id, now.device, now.inode)
        return same and (not alone or self.mount_id == now.mount_id)
