"""Bytes on disk: what is named by a digest is whole, and what fails leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from cas.blobs import BlobFiles, Measured, Meeting, Source, Staged
from cas.digest import Digest, digest_of
from cas.durable import Disk, is_temporary
from cas.errors import BlobMissing, DigestMismatch, SizeMismatch, StoreFull, TooLarge
from cas.hashing import LANES_MAX, SMALL_BYTES
from tests.cas.conftest import SMALL_DISK_BYTES
from tests.cas.disks import NamingDisk, OldDisk, TracedDisk

LARGE_BYTES = 3 * SMALL_BYTES + 12_345  # long enough for a lane and a second buffer
HELLO = b"hello, blob"


def data_of(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def place_always(_: Measured) -> Meeting:
    return Meeting.PLACE


def rehearse_always(_: Measured) -> Meeting:
    return Meeting.REHEARSE


class Pieces:
    """A stream that gives what it has in pieces of odd sizes, and may break at the end."""

    def __init__(self, data: bytes, piece_bytes: int = 7_001, error: Exception | None = None):
        self._rest = memoryview(data)
        self._piece_bytes = piece_bytes
        self._error = error

    def readinto(self, buffer: memoryview, /) -> int:
        piece = self._rest[: min(len(buffer), self._piece_bytes)]
        self._rest = self._rest[len(piece) :]
        if not piece and self._error:
            raise self._error
        buffer[: len(piece)] = piece
        return len(piece)


class Endless:
    """A stream of zeros without an end."""

    def __init__(self) -> None:
        self.given_bytes = 0

    def readinto(self, buffer: memoryview, /) -> int:
        self.given_bytes += len(buffer)
        return len(buffer)


@pytest.fixture
def files(root: Path) -> BlobFiles:
    return created(root)


def created(root: Path, disk: Disk | None = None) -> BlobFiles:
    BlobFiles(root).create()
    return BlobFiles(root, disk) if disk else BlobFiles(root)


def put(files: BlobFiles, source: Source) -> Digest:
    with files.stage(source) as staged:
        files.place(staged)
        return staged.digest


def named(root: Path) -> list[Path]:
    """Every file under `root` that has a name."""
    return sorted(path for path in root.rglob("*") if not path.is_dir())


def assert_whole(root: Path) -> None:
    """What is named by a digest has that digest; no hidden file is left."""
    for path in named(root / "objects"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert path.parent.name == path.name[:2]


@contextmanager
def nothing_kept(root: Path, files: BlobFiles | None = None) -> Iterator[None]:
    """No new name under `root`, no descriptor and no thread more than before."""
    before, descriptors, threads = (
        named(root),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
    )
    yield
    if files:
        files.close()
    assert named(root) == before
    # Fewer: what the test before this one threw away after its answer has gone meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert threading.active_count() <= threads


# --- storing


@pytest.mark.parametrize("size", [0, 1, 4096, SMALL_BYTES, SMALL_BYTES + 1, LARGE_BYTES])
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "path", "stream"])
def test_every_source_is_stored_under_its_digest(
    files: BlobFiles, root: Path, tmp_path: Path, kind: str, size: int
) -> None:
    data = data_of(size)
    (tmp_path / "source").write_bytes(data)
    sources: dict[str, Source] = {
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "path": tmp_path / "source",
        "stream": Pieces(data),
    }
    with nothing_kept(tmp_path, files), files.stage(sources[kind]) as staged:
        assert named(root) == []
        placed = files.place(staged)
        assert staged.digest == digest_of(data)
        assert staged.blake3 == blake3(data).digest()
        assert staged.size_bytes == size
    path = files.path(digest_of(data))
    assert path == root / "objects" / path.name[:2] / digest_of(data).hex()
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o222 == 0
    assert files.stat(digest_of(data)) == placed
    assert placed.inode == path.stat().st_ino
    assert named(root) == [path]


@given(st.lists(st.binary(max_size=2_000)), st.integers(1, 999))
def test_the_pieces_in_which_a_source_comes_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], piece_bytes: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "pieces"
    files = created(root)
    data = b"".join(parts)
    with files.stage(Pieces(data, piece_bytes), promised_size=len(data), sync=False) as staged:
        assert staged.digest == digest_of(data)
        assert os.pread(staged.fd, len(data) + 1, 0) == data


def test_a_measured_source_is_as_it_would_be_stored(files: BlobFiles, tmp_path: Path) -> None:
    data = data_of(LARGE_BYTES)
    (tmp_path / "source").write_bytes(data)
    assert files.measure(tmp_path / "source") == Measured(digest_of(data), len(data))
    assert files.measure(tmp_path / "source").digest == put(files, tmp_path / "source")


def test_measuring_begins_at_the_position_and_returns_to_it(files: BlobFiles) -> None:
    stream = io.BytesIO(b"skipped" + HELLO)
    stream.seek(7)
    assert files.measure(stream).digest == digest_of(HELLO)
    assert stream.tell() == 7
    assert put(files, stream) == digest_of(HELLO)


def test_bytes_and_folder_are_durable_before_place_returns(root: Path) -> None:
    disk = TracedDisk()
    put(created(root, disk), HELLO)
    assert disk.steps == ["temporary", "write", "sync_data", "link", "sync_folder"]


def test_a_free_name_is_taken_before_one_sync_of_bytes_and_name(root: Path) -> None:
    disk = TracedDisk()
    files = created(root, disk)
    with files.stage(HELLO, sync=False) as staged:
        files.place(staged)
    assert disk.steps == ["temporary", "write", "link", "sync_data", "sync_folder"]


def test_a_taken_name_is_given_to_synced_bytes_only(root: Path) -> None:
    disk = TracedDisk()
    files = created(root, disk)
    put(files, HELLO)
    disk.steps.clear()
    with files.stage(HELLO, sync=False) as staged:
        files.place(staged)
    assert disk.steps.index("sync_data") < disk.steps.index("rename")
    assert disk.steps[-1] == "sync_folder"


def test_a_rehearsal_takes_the_steps_of_placing_and_leaves_nothing(root: Path) -> None:
    disk = TracedDisk()
    files = created(root, disk)
    with nothing_kept(root, files), files.stage(HELLO, sync=False) as staged:
        files.rehearse(staged)
    rehearsed, disk.steps = disk.steps, []
    with files.stage(HELLO, sync=False) as staged:
        files.place(staged)
    files.close()
    assert disk.steps == ["temporary", "write", "link", "sync_data", "sync_folder"]
    assert rehearsed == [*disk.steps, "unlink"]  # after the answer


def test_many_uploads_at_once_find_no_lane_and_are_stored_all_the_same(files: BlobFiles) -> None:
    # More than there are lanes, each waiting in its lane, or without one, for all others.
    count = LANES_MAX + 3
    together = threading.Barrier(count, timeout=60)

    class Waiting(Pieces):
        waited = False

        def readinto(self, buffer: memoryview, /) -> int:
            if not self.waited:
                self.waited = True
                together.wait()
            return super().readinto(buffer)

    found: dict[int, Digest] = {}

    def upload(number: int) -> None:
        data = data_of(LARGE_BYTES, number)
        with files.stage(Waiting(data, 50_000), promised_size=len(data)) as staged:
            files.place(staged)
            found[number] = staged.digest

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: digest_of(data_of(LARGE_BYTES, n)) for n in range(count)}


_MEMORY = """
import resource, sys, threading
from pathlib import Path
from cas.blobs import BlobFiles

class Zeros:
    def __init__(self, left): self.left = left
    def readinto(self, buffer):
        count = min(len(buffer), self.left)
        self.left -= count
        return count

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = BlobFiles(Path(sys.argv[1]))
files.create()
files.stage(Zeros(10), sync=False).close()
before = peak()
def upload(): files.stage(Zeros(48 << 20), sync=False).close()
threads = [threading.Thread(target=upload) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY, root], check=True, capture_output=True, text=True
    )
    assert int(run.stdout) < 32 << 10  # KiB


# --- sources that are not what they seem


def test_a_sparse_file_is_stored_whole(files: BlobFiles, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.seek(LARGE_BYTES)
        sparse.write(b"end")
    assert put(files, tmp_path / "sparse") == digest_of(bytes(LARGE_BYTES) + b"end")


def test_a_file_that_says_it_is_empty_is_read_to_its_end(files: BlobFiles) -> None:
    version = Path("/proc/version")
    assert version.stat().st_size == 0
    assert put(files, version) == digest_of(version.read_bytes())


def test_a_pipe_is_read_to_its_end(files: BlobFiles, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    data = data_of(LARGE_BYTES)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert put(files, tmp_path / "pipe") == digest_of(data)
    writer.join()


def test_a_folder_is_no_source(files: BlobFiles, root: Path, tmp_path: Path) -> None:
    with nothing_kept(root), pytest.raises(IsADirectoryError):
        files.stage(tmp_path)


def test_a_missing_file_is_no_source(files: BlobFiles, root: Path, tmp_path: Path) -> None:
    with nothing_kept(root), pytest.raises(FileNotFoundError):
        files.stage(tmp_path / "missing")


class Meddling(Disk):
    """Changes the source while its first chunk is being written."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle: Callable[[], object] | None = meddle

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        meddle, self._meddle = self._meddle, None
        if meddle:
            meddle()
        super().write(fd, data)


@pytest.mark.parametrize("new_size", [SMALL_BYTES + 1, 3 * LARGE_BYTES], ids=["shrinks", "grows"])
def test_a_file_that_changes_while_it_is_read_is_stored_as_it_was_read(
    root: Path, tmp_path: Path, new_size: int
) -> None:
    source = tmp_path / "source"
    source.write_bytes(data_of(LARGE_BYTES))
    files = created(root, Meddling(lambda: os.truncate(source, new_size)))
    with files.stage(source) as staged:
        files.place(staged)
        assert os.fstat(staged.fd).st_size == staged.size_bytes
        # What was reserved for the length it had is given back.
        assert os.fstat(staged.fd).st_blocks * 512 <= staged.size_bytes + (1 << 16)
    assert_whole(root)


@pytest.mark.parametrize("size", [4_000, LARGE_BYTES])
def test_memory_that_changes_while_it_is_read_is_stored_as_it_was_read(
    root: Path, size: int
) -> None:
    data = bytearray(data_of(size))

    def meddle() -> None:
        data[:] = bytes(size)

    put(created(root, Meddling(meddle)), data)
    assert_whole(root)


# --- promises not kept


@pytest.mark.parametrize("size", [100, LARGE_BYTES])
def test_a_wrong_promised_size_keeps_nothing(files: BlobFiles, root: Path, size: int) -> None:
    data = data_of(size)
    for promised in (size - 1, size + 1, 0):
        for source in (data, Pieces(data)):
            with nothing_kept(root), pytest.raises(SizeMismatch) as caught:
                files.stage(source, promised_size=promised)
            assert caught.value.promised_bytes == promised
            assert (caught.value.received_bytes > promised) == (size > promised)


@pytest.mark.parametrize("size", [100, LARGE_BYTES])
def test_a_wrong_promised_digest_keeps_nothing(files: BlobFiles, root: Path, size: int) -> None:
    data = data_of(size)
    with nothing_kept(root), pytest.raises(DigestMismatch) as caught:
        files.stage(data, promised_digest=digest_of(HELLO))
    assert caught.value.promised == digest_of(HELLO).hex()
    assert caught.value.received == digest_of(data).hex()


def test_kept_promises_are_accepted(files: BlobFiles) -> None:
    with files.stage(
        Pieces(HELLO),
        promised_size=len(HELLO),
        promised_digest=digest_of(HELLO),
        limit_bytes=len(HELLO),
    ) as staged:
        assert staged.digest == digest_of(HELLO)


@pytest.mark.parametrize("limit", [10, LARGE_BYTES])
def test_a_source_over_the_limit_keeps_nothing(files: BlobFiles, root: Path, limit: int) -> None:
    for source in (data_of(limit + 1), Pieces(data_of(limit + 1)), Endless()):
        with nothing_kept(root), pytest.raises(TooLarge) as caught:
            files.stage(source, limit_bytes=limit)
        assert caught.value.limit_bytes == limit


def test_a_promise_over_the_limit_is_refused_unread(files: BlobFiles, root: Path) -> None:
    source = Endless()
    with nothing_kept(root), pytest.raises(TooLarge):
        files.stage(source, promised_size=11, limit_bytes=10)
    assert source.given_bytes == 0


def test_a_source_that_goes_on_beyond_its_promise_is_not_read_on(files: BlobFiles) -> None:
    source = Endless()
    with pytest.raises(SizeMismatch):
        files.stage(source, promised_size=LARGE_BYTES)
    assert source.given_bytes < 2 * LARGE_BYTES + 8 * SMALL_BYTES


@pytest.mark.parametrize("size", [0, 100, LARGE_BYTES])
@pytest.mark.parametrize("promised", [None, 2 * LARGE_BYTES])
def test_a_source_that_breaks_keeps_nothing(
    files: BlobFiles, root: Path, size: int, promised: int | None
) -> None:
    gone = ConnectionResetError("the client is gone")
    with nothing_kept(root), pytest.raises(ConnectionResetError):
        files.stage(Pieces(data_of(size), error=gone), promised_size=promised)


def test_a_source_that_does_not_block_is_refused(files: BlobFiles, root: Path) -> None:
    class Impatient:
        def readinto(self, _: memoryview, /) -> None:
            return None

    with nothing_kept(root), pytest.raises(BlockingIOError):
        files.stage(Impatient())


# --- meeting what is there


def test_placing_over_bad_bytes_heals_them(files: BlobFiles, root: Path) -> None:
    path = files.path(digest_of(HELLO))
    path.write_bytes(b"rotten")
    bad = files.stat(digest_of(HELLO))
    with path.open("rb") as reader:
        put(files, HELLO)
        assert reader.read() == b"rotten"
    assert files.stat(digest_of(HELLO)) != bad
    assert named(root) == [path]
    assert_whole(root)


@pytest.mark.parametrize("disk", [Disk(), NamingDisk()], ids=["nameless", "hidden"])
def test_a_copy_can_be_placed_again(root: Path, disk: Disk) -> None:
    files = created(root, disk)
    with files.stage(HELLO) as staged:
        first = files.place(staged)
        assert files.place(staged) == first
    files.close()  # the name it was staged under goes after the answer
    assert named(root) == [files.path(digest_of(HELLO))]


@pytest.mark.parametrize("size", [0, 100, LARGE_BYTES])
@pytest.mark.parametrize("disk", [Disk(), NamingDisk()], ids=["nameless", "hidden"])
def test_a_copy_can_be_placed_again_after_it_was_removed(root: Path, disk: Disk, size: int) -> None:
    files = created(root, disk)
    data = data_of(size)
    with nothing_kept(root / "partial", files), files.stage(data) as staged:
        files.place(staged)
        os.pread(staged.fd, 10, 0)
        for _ in range(2):
            assert files.remove(staged.digest)
            assert files.place(staged) == files.stat(staged.digest)
    files.close()
    assert named(root) == [files.path(digest_of(data))]
    assert_whole(root)


def test_a_removed_copy_that_went_bad_is_not_placed_again(files: BlobFiles, root: Path) -> None:
    with nothing_kept(root, files), files.stage(HELLO) as staged:
        files.place(staged)
        files.remove(staged.digest)
        os.pwrite(staged.fd, b"J", 0)
        with pytest.raises(DigestMismatch):
            files.place(staged)


@pytest.mark.parametrize("size", [100, LARGE_BYTES])
def test_two_writers_of_the_same_bytes_both_succeed(
    files: BlobFiles, root: Path, size: int
) -> None:
    data = data_of(size)
    writers = 4
    together = threading.Barrier(writers, timeout=60)
    inodes: list[int] = []

    def write() -> None:
        with files.stage(data) as staged:
            together.wait()
            inodes.append(files.place(staged).inode)

    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(inodes)) == writers
    found = files.stat(digest_of(data))
    assert found is not None
    assert found.inode in inodes
    assert named(root) == [files.path(digest_of(data))]
    assert_whole(root)


def test_a_copy_may_be_placed_after_a_rehearsal(files: BlobFiles, root: Path) -> None:
    with files.stage(HELLO) as staged:
        files.rehearse(staged)
        files.place(staged)
    files.close()
    assert named(root) == [files.path(digest_of(HELLO))]


def test_a_filesystem_without_nameless_files_stores_as_well(root: Path) -> None:
    files = created(root, NamingDisk())
    with nothing_kept(root, files):
        with files.stage(HELLO) as staged:
            assert [is_temporary(path.name) for path in named(root)] == [True]
        with pytest.raises(SizeMismatch):
            files.stage(HELLO, promised_size=1)
        with files.stage(HELLO) as staged:
            files.rehearse(staged)
    files.path(digest_of(HELLO)).write_bytes(b"rotten")
    put(files, HELLO)
    files.close()
    assert named(root) == [files.path(digest_of(HELLO))]
    assert_whole(root)


def test_a_closed_copy_cannot_be_used(files: BlobFiles) -> None:
    staged = files.stage(HELLO)
    staged.close()
    staged.close()
    with pytest.raises(ValueError, match="closed"):
        files.place(staged)


# --- a disk that fails


def store(files: BlobFiles, data: bytes) -> None:
    put(files, data)


def rehearse(files: BlobFiles, data: bytes) -> None:
    with files.stage(data) as staged:
        files.rehearse(staged)


def store_batch(files: BlobFiles, data: bytes) -> None:
    with files.batch() as batch:
        batch.store(data, place_always)
        batch.store(data + b"2", rehearse_always)
        batch.sync()


def failure_of(
    job: Callable[[BlobFiles, bytes], None], files: BlobFiles, data: bytes
) -> Exception | None:
    try:
        job(files, data)
    except (OSError, StoreFull) as error:
        return error
    finally:
        files.close()
    return None


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("size", [100, LARGE_BYTES])
@pytest.mark.parametrize("bad_bytes", [False, True], ids=["new", "healing"])
@pytest.mark.parametrize("job", [store, rehearse, store_batch])
def test_a_disk_that_fails_at_any_step_leaves_nothing_half_done(
    root: Path,
    job: Callable[[BlobFiles, bytes], None],
    bad_bytes: bool,
    size: int,
    code: int,
) -> None:
    data = data_of(size)
    name = created(root).path(digest_of(data))
    step = 0
    while True:
        name.unlink(missing_ok=True)
        if bad_bytes:
            name.write_bytes(b"rotten")
        disk = TracedDisk(fail_at=step, code=code)
        files = BlobFiles(root, disk)
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        error = failure_of(job, files, data)
        if disk.failed is None:
            break
        if error is None:
            assert disk.failed == "unlink"  # after the answer
            assert job in (rehearse, store_batch)
        elif isinstance(error, StoreFull):
            assert code == errno.ENOSPC
            assert error.free_bytes > 0
        else:
            assert isinstance(error, OSError)
            assert error.errno == code
            assert code == errno.EIO or disk.failed == "unlink"
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert threading.active_count() <= threads
        for path in named(root / "objects"):
            if is_temporary(path.name):
                # Only where the very removal of the hidden name failed; the scrub takes it.
                assert disk.failed == "unlink"
                path.unlink()
            else:
                assert path == name
                assert path.read_bytes() in (data, b"rotten")
                # A name appears with the link and not before.
                assert bad_bytes or disk.steps.count("link") > 0
        step += 1
    assert step == len(disk.steps) > 4


def test_a_full_disk_is_told_with_numbers_and_keeps_nothing(small_disk: Path) -> None:
    files = created(small_disk)
    free = files.free_bytes()
    assert 0 < free <= SMALL_DISK_BYTES
    for source in (data_of(2 * SMALL_DISK_BYTES), Endless(), Pieces(bytes(2 * SMALL_DISK_BYTES))):
        with nothing_kept(small_disk), pytest.raises(StoreFull) as caught:
            files.stage(source)
        assert caught.value.path == small_disk
        assert caught.value.free_bytes <= free
        assert files.free_bytes() == free
    put(files, HELLO)


def test_space_for_a_promised_size_is_asked_for_before_the_bytes(small_disk: Path) -> None:
    files = created(small_disk)
    source = Endless()
    with nothing_kept(small_disk), pytest.raises(StoreFull) as caught:
        files.stage(source, promised_size=2 * SMALL_DISK_BYTES)
    assert source.given_bytes == 0
    assert caught.value.needed_bytes == 2 * SMALL_DISK_BYTES


def test_a_full_disk_in_a_batch_is_told_too(small_disk: Path) -> None:
    files = created(small_disk)
    half = SMALL_DISK_BYTES // 2 + 1
    with files.batch() as batch:
        batch.store(data_of(half), place_always)
        with pytest.raises(StoreFull) as caught:
            batch.store(data_of(half, 2), place_always)
        assert caught.value.needed_bytes == half
        batch.sync()
    assert_whole(small_disk)
    for path in named(small_disk):
        path.unlink()
    put(files, HELLO)


# --- batches


def test_a_batch_waits_for_the_disk_once(root: Path) -> None:
    disk = TracedDisk()
    files = created(root, disk)
    blobs = [data_of(1_000, seed) for seed in range(50)]
    with files.batch() as batch:
        descriptors = len(os.listdir("/proc/self/fd"))
        for data in blobs:
            measured, placed = batch.store(data, place_always)
            assert measured == Measured(digest_of(data), 1_000, blake3(data).digest())
            assert placed == files.stat(digest_of(data))
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert not {"sync_data", "sync_folder", "sync_filesystem"} & set(disk.steps)
        batch.sync()
        batch.sync()
    assert disk.steps[-1] == "sync_filesystem"
    assert disk.steps.count("sync_filesystem") == 1
    assert_whole(root)
    assert len(named(root)) == 50


def test_where_syncfs_hides_errors_each_file_and_folder_is_synced(root: Path) -> None:
    disk = OldDisk()
    files = created(root, disk)
    blobs = [data_of(1_000, seed) for seed in range(20)]
    with files.batch() as batch:
        for data in blobs:
            batch.store(data, place_always)
        batch.sync()
    assert "sync_filesystem" not in disk.steps
    assert disk.steps.count("sync_data") == 20
    assert disk.steps.count("sync_folder") == len({digest_of(data)[0] for data in blobs})


def test_the_same_bytes_twice_in_a_batch_are_one_file(files: BlobFiles, root: Path) -> None:
    with files.batch() as batch:
        first = batch.store(HELLO, place_always)
        assert batch.store(HELLO, place_always) == first
        # Unless somebody took them away meanwhile.
        files.remove(digest_of(HELLO))
        assert batch.store(HELLO, place_always)[1] == files.stat(digest_of(HELLO))
        batch.sync()
    assert_whole(root)


def test_a_batch_replaces_by_synced_bytes_only(root: Path) -> None:
    # A live record may name what is there (invariant 1).
    disk = TracedDisk()
    files = created(root, disk)
    files.path(digest_of(HELLO)).write_bytes(b"rotten")
    with files.batch() as batch:
        batch.store(HELLO, place_always)
        assert disk.steps.index("sync_data") < disk.steps.index("rename")
        batch.sync()
    assert_whole(root)


def test_what_a_batch_rehearses_or_leaves_is_not_kept(files: BlobFiles, root: Path) -> None:
    seen: list[Measured] = []

    def leave(measured: Measured) -> Meeting:
        seen.append(measured)
        return Meeting.LEAVE

    with nothing_kept(root, files), files.batch() as batch:
        measured, placed = batch.store(HELLO, rehearse_always)
        assert (measured.digest, placed) == (digest_of(HELLO), None)
        assert [is_temporary(path.name) for path in named(root)] == [True]
        measured, placed = batch.store(Pieces(data_of(LARGE_BYTES)), leave)
        assert (seen, placed) == ([measured], None)
        batch.sync()


def test_a_closed_batch_does_not_claim_to_have_synced(files: BlobFiles) -> None:
    with files.batch() as batch:
        batch.store(HELLO, place_always)
    batch.close()
    with pytest.raises(ValueError, match="closed"):
        batch.sync()


# --- reading, checking, taking away


def test_a_stored_blob_is_opened_for_reading(files: BlobFiles) -> None:
    digest = put(files, HELLO)
    fd = files.open(digest)
    assert os.read(fd, 100) == HELLO
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)


def test_what_is_not_there_is_missing(files: BlobFiles) -> None:
    absent = digest_of(b"absent")
    assert files.stat(absent) is None
    assert files.sync_existing(absent) is None
    assert not files.remove(absent)
    for call in (files.open, files.check, files.quarantine):
        with pytest.raises(BlobMissing) as caught:
            call(absent)
        assert caught.value.digest == absent.hex()


def test_somebody_elses_file_is_made_durable(root: Path) -> None:
    disk = TracedDisk()
    files = created(root, disk)
    with files.batch() as batch:
        batch.store(HELLO, place_always)
    disk.steps.clear()
    assert files.sync_existing(digest_of(HELLO)) == files.stat(digest_of(HELLO))
    assert disk.steps == ["sync_data", "sync_folder"]


@pytest.mark.parametrize("size", [0, 100, LARGE_BYTES])
def test_checking_tells_good_bytes_from_bad(files: BlobFiles, size: int) -> None:
    data = data_of(size)
    with files.stage(data) as staged:
        files.place(staged)
        good = staged.measured
    assert files.check(good.digest) == good
    pieces: list[int] = []
    assert files.check(good.digest, good.blake3, pieces.append) == good
    assert sum(pieces) == size

    bad = data[: size // 2] + b"!" + data[size // 2 + 1 :]
    path = files.path(good.digest)
    path.chmod(0o644)
    path.write_bytes(bad)
    found = Measured(digest_of(bad), len(bad), blake3(bad).digest())
    assert files.check(good.digest) == found
    assert files.check(good.digest, good.blake3) == found


def test_removing_is_durable_on_return(root: Path) -> None:
    disk = TracedDisk()
    files = created(root, disk)
    one, two = put(files, b"one"), put(files, b"two")
    disk.steps.clear()
    assert files.remove(one)
    assert disk.steps == ["unlink", "sync_folder"]
    files.remove_many([one, two])
    assert named(root) == []


def test_bad_bytes_are_put_aside_every_time(files: BlobFiles, root: Path) -> None:
    asides = set()
    for bad in (b"rotten", b"foul"):
        files.path(digest_of(HELLO)).write_bytes(bad)
        aside = files.quarantine(digest_of(HELLO))
        assert aside.parent == root / "quarantine"
        assert aside.name.startswith(digest_of(HELLO).hex())
        assert aside.read_bytes() == bad
        asides.add(aside)
    assert named(root) == sorted(asides)


def test_a_shard_lists_what_is_in_it(files: BlobFiles) -> None:
    digest = put(files, HELLO)
    found = {entry.name for number in range(256) for entry in files.shard(number)}
    assert found == {digest.hex()}
    assert [entry.name for entry in files.shard(digest[0])] == [digest.hex()]


def test_the_folders_are_made_once_and_for_all(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    for _ in range(2):
        BlobFiles(root).create()
    assert len(list((root / "objects").iterdir())) == 256
    assert {path.name for path in root.iterdir()} == {"objects", "quarantine", "partial"}


def test_a_relative_root_is_found_after_the_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = BlobFiles(Path("root"))
    files.create()
    monkeypatch.chdir("/")
    put(files, HELLO)
    assert_whole(tmp_path / "root")


def test_staged_copies_are_readable_until_closed(files: BlobFiles) -> None:
    staged: Staged = files.stage(HELLO)
    assert os.pread(staged.fd, 5, 7) == HELLO[7:12]
    staged.close()
