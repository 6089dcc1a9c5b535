"""What ROOT stands on, and who else stands there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from cas.catalog.ground import Boot, Lock, Mount, mount_of, refuse_network
from cas.catalog.local import CatalogSettings
from cas.durable import DISK
from cas.errors import StoreBusy, UnsuitableRoot, WrongProcess
from tests.crash.ledger import LARGE, audit, enter, labels, open_catalog
from tests.crash.victims import Report, Victim

IMPATIENT = CatalogSettings(min_free_bytes=1 << 60, lock_wait_s=0.1)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "ceph", "virtiofs", "fuse.sshfs", "fuse"])
def test_a_filesystem_whose_locks_do_not_hold_is_refused(root: Path, kind: str) -> None:
    with pytest.raises(UnsuitableRoot, match=kind) as refused:
        refuse_network(root, Mount(1, kind))
    assert refused.value.path == root


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk"])
def test_a_local_filesystem_is_accepted(root: Path, kind: str) -> None:
    refuse_network(root, Mount(1, kind))


def test_the_mount_of_a_path_is_the_innermost_one(root: Path) -> None:
    assert mount_of(Path("/proc/self")).filesystem == "proc"
    assert mount_of(root).filesystem not in ("", "proc")
    assert mount_of(Path("/")).mount_id > 0


def test_an_index_is_trusted_in_its_own_circumstances_only() -> None:
    made = Boot("boot", 1, 2, 3)
    assert made.holds(Boot("boot", 1, 2, 3), alone=True)
    assert not made.holds(Boot("other", 1, 2, 3), alone=False)
    assert not made.holds(Boot("boot", 9, 2, 3), alone=False)
    assert not made.holds(Boot("boot", 1, 9, 3), alone=False)
    # Mount ids differ between the mount namespaces of services that run side by side.
    assert not made.holds(Boot("boot", 1, 2, 9), alone=True)
    assert made.holds(Boot("boot", 1, 2, 9), alone=False)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"boot_id": 1}'])
def test_a_boot_file_that_says_nothing_is_none(root: Path, text: bytes) -> None:
    assert Boot.read(root) is None
    (root / "BOOT").write_bytes(text)
    assert Boot.read(root) is None


def test_a_lock_is_shared_and_ends_with_the_last_one(root: Path) -> None:
    first = Lock(root / "LOCK", DISK, wait_s=0)
    second = Lock(root / "LOCK", DISK, wait_s=0)
    assert first.alone
    assert not second.alone
    with pytest.raises(StoreBusy), first.exclusive("test", lambda: False):
        pass
    second.close()
    with first.exclusive("test", lambda: False) as held:
        assert held
        with first.exclusive("a part of it", lambda: False) as still:
            assert still
        with pytest.raises(BlockingIOError):
            _share_without_waiting(root / "LOCK")
    _share_without_waiting(root / "LOCK")
    first.close()
    first.close()


def _share_without_waiting(path: Path) -> None:
    import fcntl

    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_nobody_waits_for_what_another_one_has_done(root: Path) -> None:
    server = Lock(root / "LOCK", DISK, wait_s=0)
    late = Lock(root / "LOCK", DISK, wait_s=60)
    with late.exclusive("make the index", lambda: True) as held:
        assert not held
    late.close()
    server.close()


def test_opening_twice_in_one_process_is_refused(root: Path) -> None:
    catalog = open_catalog(root)
    with pytest.raises(StoreBusy):
        open_catalog(root)
    link = root.with_name(root.name + "-link")
    link.symlink_to(root)
    try:
        with pytest.raises(StoreBusy):
            open_catalog(link)
    finally:
        link.unlink()
        catalog.close()
    open_catalog(root).close()


def test_an_opening_that_failed_lets_go_of_the_root(root: Path) -> None:
    (root / "catalog").touch()
    for _ in range(2):
        with pytest.raises(OSError, match="Not a directory"):
            open_catalog(root)
    (root / "catalog").unlink()
    open_catalog(root).close()


def test_a_catalog_belongs_to_the_process_that_opened_it(root: Path) -> None:
    catalog = open_catalog(root)
    catalog.write(enter("parent-1"))

    def child(report: Report) -> None:
        with pytest.raises(WrongProcess):
            catalog.write(enter("nobody"))
        with pytest.raises(WrongProcess), catalog.read():
            pass
        catalog.close()
        # LMDB's environment was inherited, and there must be no second one beside it.
        with pytest.raises(WrongProcess):
            open_catalog(root)
        report.acknowledge("refused")

    with warnings.catch_warnings():
        # Newer Pythons warn of forking with threads: that is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        victim = Victim(child)
    catalog.write(enter("parent-2"))
    assert not victim.end()
    assert victim.acknowledged == ["refused"]
    catalog.write(enter("parent-3"))
    with catalog.read() as snapshot:
        assert labels(snapshot) == {"parent-1", "parent-2", "parent-3"}
    catalog.close()
    audit(root, ["parent-1", "parent-2", "parent-3"])


_OPEN = """
import sys
from pathlib import Path
from cas.errors import UnsuitableRoot
from tests.crash.ledger import open_catalog
try:
    open_catalog(Path(sys.argv[1])).close()
except UnsuitableRoot as error:
    print(f"refused: {error}")
else:
    print("opened")
"""


def test_another_pid_namespace_is_refused_while_the_store_is_open(
    root: Path, program: Callable[[str], str]
) -> None:
    unshare = [program("unshare"), "--pid", "--fork"]
    probe = subprocess.run([*unshare, "true"], check=False, capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"cannot make a PID namespace: {probe.stderr.strip()}")
    command = [*unshare, sys.executable, "-c", _OPEN, str(root)]
    checkout = Path(__file__).parents[2]

    def there() -> str:
        return subprocess.check_output(command, text=True, cwd=checkout)

    catalog = open_catalog(root)
    assert "another PID namespace" in there()
    catalog.close()
    assert there() == "opened\n"
    open_catalog(root).close()


def test_workers_that_start_at_once_on_a_store_without_index_all_open(root: Path) -> None:
    """One makes the index, and the others must not wait until it has stopped serving."""
    open_catalog(root).close()
    for _ in range(5):
        shutil.rmtree(root / "catalog/index")

        def work(report: Report) -> None:
            catalog = open_catalog(root, LARGE)
            catalog.write(enter(str(os.getpid())))
            report.acknowledge(str(os.getpid()))
            report.wait_for_word()
            catalog.close()

        workers = [Victim(work) for _ in range(4)]
        for worker in workers:
            assert worker.hear() == str(worker.pid)
        for worker in workers:
            worker.go()
            assert not worker.end()
        audit(root, [str(worker.pid) for worker in workers])


def test_an_index_that_must_be_remade_needs_the_store_alone(root: Path) -> None:
    def serve(report: Report) -> None:
        catalog = open_catalog(root)
        report.acknowledge("ready")
        report.wait_for_word()
        catalog.close()

    server = Victim(serve)
    assert server.hear() == "ready"
    (root / "catalog/index/BOOT").unlink()
    with pytest.raises(StoreBusy, match="rebuild"):
        open_catalog(root, IMPATIENT)
    server.go()
    assert not server.end()
    open_catalog(root, IMPATIENT).close()


def test_reader_slots_of_killed_processes_are_cleared(root: Path) -> None:
    def read(report: Report) -> None:
        catalog = open_catalog(root)
        with catalog.read() as snapshot:
            report.acknowledge(str(snapshot.position.seq))
            report.wait_for_word()

    victims = [Victim(read) for _ in range(3)]
    for victim in victims:
        victim.hear()
    catalog = open_catalog(root)
    assert catalog.reader_check() == 0
    for victim in victims:
        victim.kill()
        assert victim.end()
    assert catalog.reader_check() == 3
    assert catalog.reader_check() == 0
    catalog.close()
