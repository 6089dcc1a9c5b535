"""The folder target: what lasts, what is refused, and what many processes may do at once."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cas.durable import Disk, locked
from replicator.folder import FolderTarget
from replicator.targets import (
    BytesDiffer,
    Changed,
    ObjectAbsent,
    ObjectRefused,
    TargetError,
    TargetRefused,
    TargetUnreachable,
)

CONTENT = b"what is mirrored"


@pytest.fixture
def target(root: Path) -> FolderTarget:
    return FolderTarget("disk", root / "a" / "target")


def put(target: FolderTarget, key: str, content: bytes = CONTENT, **how: str | bool) -> str:
    return target.put(key, io.BytesIO(content), len(content), **how)  # type: ignore[arg-type]


def read(target: FolderTarget, key: str) -> bytes:
    with target.get(key) as incoming:
        return incoming.read(1 << 20)


# --- where


def test_nothing_is_made_before_something_is_put(root: Path, target: FolderTarget) -> None:
    assert list(target.list("")) == []
    target.delete("objects/aa/k")
    with pytest.raises(ObjectAbsent):
        target.stat("objects/aa/k")
    assert list(target.unfinished()) == []
    assert list(root.iterdir()) == []


def test_a_folder_that_is_known_is_not_made_anew(root: Path) -> None:
    """What was mounted there is not, and the root disk must not be taken for it."""
    place = root / "mounted"
    put(FolderTarget("disk", place), "k")
    put(FolderTarget("disk", place, known=True), "l")
    place.rename(root / "unplugged")
    _refuses_all(FolderTarget("disk", place, known=True))
    place.mkdir()
    _refuses_all(FolderTarget("disk", place, known=True))
    assert list(place.iterdir()) == []


def _refuses_all(target: FolderTarget) -> None:
    for ask in (lambda: put(target, "k"), lambda: target.stat("k"), lambda: read(target, "k")):
        with pytest.raises(TargetRefused):
            ask()


def test_a_folder_that_is_exchanged_while_running_is_refused(root: Path) -> None:
    place = root / "mounted"
    target = FolderTarget("disk", place)
    put(target, "k")
    place.rename(root / "unplugged")
    with pytest.raises(TargetRefused, match="is not there"):
        target.stat("k")
    place.mkdir()
    with pytest.raises(TargetRefused, match="unmounted"):
        put(target, "k")
    place.rmdir()
    (root / "unplugged").rename(place)
    assert read(target, "k") == CONTENT


@pytest.mark.parametrize("key", ["", "/k", "k/", "a//b", "../k", "a/../b", ".lock", "a/.b", "a\0"])
def test_a_key_stays_in_the_folder(target: FolderTarget, key: str) -> None:
    for ask in (lambda: put(target, key), lambda: target.stat(key), lambda: target.delete(key)):
        with pytest.raises(ObjectRefused):
            ask()


def test_an_upload_s_identifier_stays_in_the_folder(target: FolderTarget) -> None:
    put(target, "k")
    for upload in ("..", "../..", ""):
        with pytest.raises(ObjectAbsent):
            target.parts("k", upload)
        target.abort("k", upload)
    assert read(target, "k") == CONTENT


# --- the disk


class _FullAt(Disk):
    """Fails at one durable step, and notes those before."""

    def __init__(self, step: str, code: int = errno.ENOSPC) -> None:
        self.step = step
        self.code = code
        self.steps: list[str] = []

    def _do(self, step: str) -> None:
        self.steps.append(step)
        if step == self.step:
            raise OSError(self.code, os.strerror(self.code))

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        self._do("write")
        super().write(fd, data)

    def sync_data(self, fd: int) -> None:
        self._do("sync_data")
        super().sync_data(fd)

    def link(self, fd: int, path: Path | str) -> None:
        self._do("link")
        super().link(fd, path)

    def sync_folder(self, path: Path | str) -> None:
        self._do("sync_folder")
        super().sync_folder(path)


def test_bytes_are_synced_before_they_have_a_name_and_the_name_before_the_answer(
    root: Path,
) -> None:
    put(FolderTarget("disk", root / "t"), "a/before")
    disk = _FullAt("")
    put(FolderTarget("disk", root / "t", disk=disk), "a/k")
    assert disk.steps[-4:] == ["write", "sync_data", "link", "sync_folder"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, TargetRefused),
        (errno.EROFS, TargetRefused),
        (errno.EIO, TargetUnreachable),
        (errno.ESTALE, TargetUnreachable),
        (errno.EFBIG, ObjectRefused),
    ],
)
@pytest.mark.parametrize("step", ["write", "sync_data", "link"])
def test_what_a_disk_says_is_told_by_its_class_and_nothing_is_left(
    root: Path, step: str, code: int, expected: type[TargetError]
) -> None:
    good = FolderTarget("disk", root / "t")
    put(good, "k", b"before")
    target = FolderTarget("disk", root / "t", disk=_FullAt(step, code))
    with pytest.raises(expected, match=os.strerror(code)):
        put(target, "k")
    with pytest.raises(expected):
        put(target, "new")
    assert read(good, "k") == b"before"
    assert [stat.key for stat in good.list("")] == ["k"]
    assert list((root / "t" / ".arriving").iterdir()) == []


def test_the_reader_s_own_trouble_stays_its_own(target: FolderTarget) -> None:
    put(target, "k")
    with pytest.raises(FileNotFoundError), target.get("k"):
        Path("/nowhere/at/all").read_bytes()


def test_an_object_that_shrinks_while_it_is_read_is_not_taken_for_whole(
    target: FolderTarget, root: Path
) -> None:
    put(target, "k", bytes(1000))
    with target.get("k") as incoming:
        incoming.read(10)
        os.chmod(root / "a" / "target" / "k", 0o644)
        os.truncate(root / "a" / "target" / "k", 20)
        assert len(incoming.read(990)) == 10
        with pytest.raises(TargetUnreachable):
            incoming.read(980)


def test_what_a_crash_left_is_removed_when_it_is_old(root: Path, target: FolderTarget) -> None:
    put(target, "k")
    arriving = root / "a" / "target" / ".arriving"
    for name, age_s in (("old", 2 * 86_400), ("new", 60)):
        (arriving / name).write_bytes(b"half")
        stat = (arriving / name).stat()
        os.utime(arriving / name, (stat.st_atime, stat.st_mtime - age_s))
    put(FolderTarget("disk", root / "a" / "target"), "l")
    assert [path.name for path in arriving.iterdir()] == ["new"]


# --- conditions


def test_no_etag_comes_twice(target: FolderTarget) -> None:
    """Inodes and clock ticks are used again at once; times of writing are not."""
    etags = [put(target, "k", b"%d" % (number % 2)) for number in range(200)]
    assert len(set(etags)) == len(etags)
    for etag in etags[:-1]:
        with pytest.raises(Changed):
            put(target, "k", if_match=etag)


_COUNT = """
import io, sys
from pathlib import Path
from replicator.folder import FolderTarget
from replicator.targets import Changed

target = FolderTarget("disk", Path(sys.argv[1]))
won = 0
while won < 50:
    with target.get("counter") as incoming:
        etag, number = incoming.stat.etag, int(incoming.read(100))
    data = b"%d" % (number + 1)
    try:
        target.put("counter", io.BytesIO(data), len(data), if_match=etag)
    except Changed:
        continue
    won += 1
"""


def test_processes_that_compare_and_swap_lose_no_change(root: Path) -> None:
    target = FolderTarget("disk", root / "t")
    put(target, "counter", b"0", if_absent=True)
    line = [sys.executable, "-c", _COUNT, str(root / "t")]
    processes = [subprocess.Popen(line) for _ in range(3)]
    assert [process.wait(200) for process in processes] == [0, 0, 0]
    assert read(target, "counter") == b"150"


def test_processes_that_begin_a_folder_together_share_its_lock(root: Path) -> None:
    first, second = (FolderTarget("disk", root / "t") for _ in range(2))
    put(first, "k")
    inode = (root / "t" / ".lock").stat().st_ino
    put(second, "l")
    assert (root / "t" / ".lock").stat().st_ino == inode


def test_a_folder_that_hangs_holds_nothing_but_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network mount does whose server is gone, in any call of the system."""
    hanging, other = (FolderTarget(name, root / name) for name in ("hanging", "other"))
    put(hanging, "k", b"old")
    lock = root / "hanging" / ".lock"
    lock.unlink()
    os.mkfifo(lock)  # to open it waits for who writes into it
    system, is_opening, is_done = os.open, threading.Event(), threading.Event()

    def told(path: str | Path, *how: int, **where: int) -> int:
        if path == lock:
            is_opening.set()
        return system(path, *how, **where)

    def others() -> None:
        put(other, "k")
        with locked(root):  # as COLLECT is
            is_done.set()

    monkeypatch.setattr(os, "open", told)
    threads = [threading.Thread(target=put, args=(hanging, "k")), threading.Thread(target=others)]
    try:
        threads[0].start()
        assert is_opening.wait(60)
        threads[1].start()
        assert is_done.wait(60)
        assert read(hanging, "k") == b"old"
    finally:
        writer = system(lock, os.O_RDWR)
        for thread in threads:
            thread.join(60)
        os.close(writer)
    assert read(hanging, "k") == CONTENT


# --- in parts


def test_an_upload_outlives_the_process(root: Path, target: FolderTarget) -> None:
    upload = target.begin("k")
    etag = target.put_part("k", upload, 1, io.BytesIO(CONTENT), len(CONTENT), None)
    again = FolderTarget("disk", root / "a" / "target", known=True)
    assert [part.etag for part in again.parts("k", upload)] == [etag]
    again.complete("k", upload, [etag])
    assert read(target, "k") == CONTENT
    assert list((root / "a" / "target" / ".parts").iterdir()) == []


def test_an_upload_belongs_to_its_key(target: FolderTarget) -> None:
    upload = target.begin("k")
    ask: list[Callable[[], object]] = [
        lambda: target.parts("other", upload),
        lambda: target.put_part("other", upload, 1, io.BytesIO(b""), 0, None),
        lambda: target.complete("other", upload, []),
    ]
    for each in ask:
        with pytest.raises(ObjectAbsent):
            each()
    target.abort("other", upload)
    assert list(target.parts("k", upload)) == []


def test_a_completion_that_fails_leaves_the_parts(root: Path, target: FolderTarget) -> None:
    upload = target.begin("k")
    etag = target.put_part("k", upload, 1, io.BytesIO(CONTENT), len(CONTENT), None)
    full = FolderTarget("disk", root / "a" / "target", disk=_FullAt("link"))
    with pytest.raises(TargetRefused):
        full.complete("k", upload, [etag])
    with pytest.raises(BytesDiffer):
        target.complete("k", upload, [etag, etag])
    target.complete("k", upload, [etag])
    assert read(target, "k") == CONTENT
