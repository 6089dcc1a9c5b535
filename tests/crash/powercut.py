"""Power cuts: a disk that records its steps, and the states that a cut may leave.

A cut keeps what was synced. Of what was not, it may keep any part: each 512-byte sector of
a file's bytes, each change of a file's length, and each change of a folder is kept or lost
on its own. That is more than any one filesystem does, and all that POSIX promises.

    disk = RecordingDisk(root)
    ... work with it, calling disk.note(label) whenever something was acknowledged ...
    for cut in disk.cuts(): cut.build(folder); open there with another boot_id, and look

The index is never in a state: LMDB's pages are not synced, so nothing can be said of them.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cas.durable import Disk, Temporary

_SECTOR_BYTES = 512
_LOSSY = ("catalog/index",)  # and index.aside: never synced, by design

Folder = str  # relative to the root; "" is the root itself
Node = int | Folder  # a file is a number of our own, since the kernel's are used again


@dataclass(frozen=True)
class Wrote:
    """Bytes written to a file."""

    node: Node
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resized:
    node: Node
    size: int


@dataclass(frozen=True)
class Renamed:
    """A change of one folder: `gone` loses its node, `name` gets `node` (either may be "")."""

    folder: Folder
    gone: str
    name: str
    node: Node | None


@dataclass(frozen=True)
class Synced:
    """Everything about `node` (None: about all) that was recorded before `upto` is kept."""

    node: Node | None
    upto: int


@dataclass(frozen=True)
class Noted:
    label: str


Event = Wrote | Resized | Renamed | Synced | Noted


class Kept(StrEnum):
    """Which of the unsynced changes survive."""

    NOTHING = "nothing"
    EVERYTHING = "everything"
    BYTES = "bytes, no names"
    NAMES = "names, no bytes"
    SOME = "some"


class RecordingDisk(Disk):
    """Does the real work and keeps a trace of it. Safe for threads."""

    def __init__(self, root: Path, boot: str = "") -> None:
        """What lies under `root` now counts as synced."""
        self.root = root.resolve()
        self._boot = boot
        self._lock = threading.RLock()
        self.events: list[Event] = []
        self._nodes: dict[int, int] = {}  # the kernel's number of a file: ours
        self._count = 0
        self.files: dict[Node, bytes] = {}
        self.folders: dict[Folder, dict[str, Node]] = {}
        for path, folders, names in os.walk(self.root):
            here = self._folder(path)
            if here is None:
                continue
            entries: dict[str, Node] = {}
            for name in folders:
                inner = self._folder(os.path.join(path, name))
                if inner is not None:
                    entries[name] = inner
            for name in names:
                full = Path(path, name)
                node = self._new(full.stat().st_ino)
                self.files[node] = full.read_bytes()
                entries[name] = node
            self.folders[here] = entries

    def boot_id(self) -> str:
        return self._boot or super().boot_id()

    def note(self, label: str) -> None:
        """Mark that `label` was acknowledged, so every later cut must keep it."""
        with self._lock:
            self.events.append(Noted(label))

    def cuts(self, seed: int, some: int) -> Iterator[Cut]:
        """Each moment of the trace, with every fixed choice of `Kept` and `some` random ones."""
        for moment in range(len(self.events) + 1):
            # Right after a sync a cut finds what it finds after the next step, but for that.
            synced = moment > 0 and isinstance(self.events[moment - 1], Synced)
            if synced and moment < len(self.events):
                continue
            for kept in Kept:
                for number in range(some if kept is Kept.SOME else 1):
                    yield Cut(self, moment, kept, seed + number)

    # --- bytes

    def temporary(self, folder: Path) -> Temporary:
        with self._lock:
            made = super().temporary(folder)
            if made.path is None:
                self._new(os.fstat(made.fd).st_ino)
            return made

    def create(self, path: Path, mode: int = 0o644) -> int:
        with self._lock:
            fd = super().create(path, mode)
            self._enter(path, self._new(os.fstat(fd).st_ino))
            return fd

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        with self._lock:
            offset = os.lseek(fd, 0, os.SEEK_CUR)
            super().write(fd, data)
            self.events.append(Wrote(self._node(fd), offset, bytes(data)))

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        with self._lock:
            super().write_at(fd, data, offset)
            self.events.append(Wrote(self._node(fd), offset, bytes(data)))

    def truncate(self, fd: int, size_bytes: int) -> None:
        with self._lock:
            super().truncate(fd, size_bytes)
            self.events.append(Resized(self._node(fd), size_bytes))

    def sync_data(self, fd: int) -> None:
        with self._lock:
            synced = Synced(self._node(fd), len(self.events))
        super().sync_data(fd)
        with self._lock:
            self.events.append(synced)

    def sync_filesystem(self, fd: int) -> None:
        with self._lock:
            synced = Synced(None, len(self.events))
        super().sync_filesystem(fd)
        with self._lock:
            self.events.append(synced)

    # --- names

    def link(self, fd: int, path: Path | str) -> None:
        with self._lock:
            super().link(fd, path)
            self._enter(path, self._node(fd))

    def rename(self, source: Path | str, target: Path | str) -> None:
        with self._lock:
            folder = self._folder(os.path.dirname(source))
            into = self._folder(os.path.dirname(target))
            gone, name = os.path.basename(source), os.path.basename(target)
            is_folder = os.path.isdir(source)
            node = None if is_folder else self._nodes.get(os.stat(source).st_ino)
            super().rename(source, target)
            if is_folder or folder is None or into is None or node is None:
                return
            if folder == into:
                self.events.append(Renamed(folder, gone, name, node))
            else:
                # Two folders, two changes: either may be on the disk without the other.
                self.events.append(Renamed(into, "", name, node))
                self.events.append(Renamed(folder, gone, "", None))

    def unlink(self, path: Path | str) -> bool:
        with self._lock:
            was_there = super().unlink(path)
            folder = self._folder(os.path.dirname(path))
            if was_there and folder is not None:
                self.events.append(Renamed(folder, os.path.basename(path), "", None))
            return was_there

    def make_folder(self, path: Path, mode: int = 0o755) -> bool:
        with self._lock:
            made = super().make_folder(path, mode)
            folder = self._folder(path)
            if made and folder is not None:
                self._enter(path, folder)
            return made

    def sync_folder(self, path: Path | str) -> None:
        folder = self._folder(path)
        with self._lock:
            synced = Synced(folder, len(self.events))
        super().sync_folder(path)
        if folder is not None:
            with self._lock:
                self.events.append(synced)

    # --- who is who

    def _folder(self, path: Path | str) -> Folder | None:
        """`path` relative to the root; None where nothing is promised."""
        relative = os.path.relpath(path, self.root)
        if relative == ".":
            return ""
        lossy = any(relative.startswith(prefix) for prefix in _LOSSY)
        return None if lossy or relative.startswith("..") else relative

    def _new(self, inode: int) -> Node:
        self._count += 1
        self._nodes[inode] = self._count
        return self._count

    def _node(self, fd: int) -> Node:
        inode = os.fstat(fd).st_ino
        # A file made behind our back (LOCK, the ballast) gets a number and never a name.
        return self._nodes[inode] if inode in self._nodes else self._new(inode)

    def _enter(self, path: Path | str, node: Node) -> None:
        folder = self._folder(os.path.dirname(path))
        if folder is not None:
            self.events.append(Renamed(folder, "", os.path.basename(path), node))


@dataclass
class _State:
    """What is on the platter."""

    folders: dict[Folder, dict[str, Node]]
    files: dict[Node, bytearray]

    def apply(self, event: Wrote | Resized | Renamed) -> None:
        if isinstance(event, Renamed):
            entries = self.folders.setdefault(event.folder, {})
            entries.pop(event.gone, None)
            if event.name and event.node is not None:
                entries[event.name] = event.node
            return
        data = self.files.setdefault(event.node, bytearray())
        if isinstance(event, Resized):
            del data[event.size :]
            data.extend(bytes(event.size - len(data)))
            return
        end = event.offset + len(event.data)
        data.extend(bytes(max(0, end - len(data))))
        data[event.offset : end] = event.data


@dataclass(frozen=True)
class Cut:
    """The power is cut after `moment` events of the trace; `seed` decides what is kept."""

    disk: RecordingDisk
    moment: int
    kept: Kept
    seed: int = field(default=0)

    def __str__(self) -> str:
        return f"cut after {self.moment} events, keeping {self.kept}, seed {self.seed}"

    @property
    def acknowledged(self) -> list[str]:
        past = self.disk.events[: self.moment]
        return [event.label for event in past if isinstance(event, Noted)]

    def build(self, target: Path) -> None:
        """Lay out in the empty folder `target` what is on the disk after the cut."""
        state = self._state()
        laid: dict[Node, Path] = {}

        def lay(folder: Folder, path: Path) -> None:
            path.mkdir(exist_ok=True)
            for name, node in state.folders.get(folder, {}).items():
                if isinstance(node, str):
                    lay(node, path / name)
                elif node in laid:
                    os.link(laid[node], path / name)
                else:
                    (path / name).write_bytes(state.files.get(node, b""))
                    laid[node] = path / name

        lay("", target)

    def _state(self) -> _State:
        state = _State(
            {folder: dict(entries) for folder, entries in self.disk.folders.items()},
            {node: bytearray(data) for node, data in self.disk.files.items()},
        )
        pending: list[tuple[int, Wrote | Resized | Renamed]] = []
        for number, event in enumerate(self.disk.events[: self.moment]):
            if isinstance(event, Noted):
                continue
            if not isinstance(event, Synced):
                pending.append((number, event))
                continue
            left = []
            for when, change in pending:
                about = change.folder if isinstance(change, Renamed) else change.node
                if when < event.upto and event.node in (None, about):
                    state.apply(change)
                else:
                    left.append((when, change))
            pending = left
        chance = random.Random(f"{self.moment} {self.seed}")
        for _, change in pending:
            for part in self._survivors(change, chance):
                state.apply(part)
        return state

    def _survivors(
        self, change: Wrote | Resized | Renamed, chance: random.Random
    ) -> Iterator[Wrote | Resized | Renamed]:
        is_name = isinstance(change, Renamed)
        if self.kept is not Kept.SOME:
            whole = {Kept.EVERYTHING, Kept.NAMES if is_name else Kept.BYTES}
            if self.kept in whole:
                yield change
            return
        if not isinstance(change, Wrote):
            if chance.random() < 0.5:
                yield change
            return
        end = change.offset + len(change.data)
        if chance.random() < 0.3:
            # The length is written before the bytes: they read as zeros.
            yield Wrote(change.node, end, b"")
        odds = chance.random()
        start = change.offset
        while start < end:
            stop = min(end, (start // _SECTOR_BYTES + 1) * _SECTOR_BYTES)
            if chance.random() < odds:
                part = change.data[start - change.offset : stop - change.offset]
                yield Wrote(change.node, start, part)
            start = stop
