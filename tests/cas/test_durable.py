"""The steps on which durability rests do what they say, on this kernel and filesystem."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cas.durable import DISK, is_temporary, opened, temporary_name


def nameless(folder: Path, data: bytes = b"new") -> int:
    temporary = DISK.temporary(folder)
    assert temporary.path is None
    DISK.write(temporary.fd, data)
    return temporary.fd


def test_a_temporary_file_has_no_name_and_is_not_writable_by_others(root: Path) -> None:
    fd = nameless(root)
    assert os.listdir(root) == []
    assert os.fstat(fd).st_mode & 0o222 == 0
    os.close(fd)


def test_a_discarded_file_is_closed_and_gone(root: Path) -> None:
    temporary = DISK.temporary(root)
    DISK.discard(temporary)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(temporary.fd)
    assert os.listdir(root) == []


def test_without_nameless_files_a_hidden_name_serves_until_discard(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No filesystem without O_TMPFILE can be counted on, so the refusal is played.
    real = os.open

    def refusing(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    temporary = DISK.temporary(root)
    assert temporary.path is not None
    assert is_temporary(temporary.path.name)
    DISK.write(temporary.fd, b"bytes")
    DISK.link(temporary.fd, root / "name")
    DISK.discard(temporary)
    assert os.listdir(root) == ["name"]
    assert (root / "name").read_bytes() == b"bytes"


def test_a_temporary_file_in_a_missing_folder_is_an_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DISK.temporary(root / "missing")


def test_a_link_gives_a_name_once(root: Path) -> None:
    fd = nameless(root)
    DISK.link(fd, root / "name")
    with pytest.raises(FileExistsError):
        DISK.link(fd, root / "name")
    assert (root / "name").read_bytes() == b"new"
    os.close(fd)


def test_a_file_that_lost_its_last_name_cannot_come_back(root: Path) -> None:
    # What BlobFiles.place must live with.
    fd = nameless(root)
    DISK.link(fd, root / "name")
    assert DISK.unlink(root / "name")
    with pytest.raises(FileNotFoundError):
        DISK.link(fd, root / "name")
    os.close(fd)


def test_replacing_puts_the_new_file_over_the_old(root: Path) -> None:
    (root / "name").write_bytes(b"old")
    with opened(root / "name") as reader:
        fd = nameless(root)
        DISK.replace(fd, root / "name")
        assert os.read(reader, 10) == b"old"
    assert (root / "name").read_bytes() == b"new"
    assert os.listdir(root) == ["name"]
    os.close(fd)


def test_replacing_a_file_by_itself_leaves_one_name(root: Path) -> None:
    fd = nameless(root)
    DISK.link(fd, root / "name")
    DISK.replace(fd, root / "name")
    assert os.listdir(root) == ["name"]
    assert os.fstat(fd).st_nlink == 1
    os.close(fd)


def test_reserving_space_leaves_the_length(root: Path) -> None:
    fd = nameless(root)
    DISK.allocate(fd, 1 << 20)
    found = os.fstat(fd)
    assert found.st_size == 3
    assert found.st_blocks * 512 >= 1 << 20
    DISK.truncate(fd, 3)
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)


def test_reserving_more_than_there_is_says_so(small_disk: Path) -> None:
    fd = nameless(small_disk)
    with pytest.raises(OSError, match="No space left"):
        DISK.allocate(fd, 1 << 30)
    os.close(fd)


def test_failed_syncs_are_heard() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        DISK.sync_data(reader)
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        DISK.sync_filesystem(reader)


def test_syncing_succeeds_on_files_folders_and_filesystems(root: Path) -> None:
    fd = nameless(root, b"x" * 100_000)
    DISK.start_writeback(fd, 0, 100_000)
    DISK.sync_data(fd)
    DISK.sync_folder(root)
    DISK.sync_filesystem(fd)
    os.close(fd)


def test_removing_the_absent_and_making_the_present_are_no_errors(root: Path) -> None:
    assert DISK.make_folder(root / "folder")
    assert not DISK.make_folder(root / "folder")
    assert not DISK.unlink(root / "absent")


def test_writing_a_file_replaces_it_whole(root: Path) -> None:
    DISK.write_file(root / "name", b"one", 0o600)
    DISK.write_file(root / "name", b"two", 0o600)
    assert (root / "name").read_bytes() == b"two"
    assert (root / "name").stat().st_mode & 0o777 == 0o600
    assert os.listdir(root) == ["name"]


def test_hidden_names_are_known_and_do_not_repeat() -> None:
    names = {temporary_name() for _ in range(100)}
    assert len(names) == 100
    assert all(map(is_temporary, names))
    assert not is_temporary("ab" * 32)
