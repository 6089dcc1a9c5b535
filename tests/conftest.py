"""Fixtures that every test may use: a ROOT on a real disk, a clock, programs of the system."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.clocks import HandClock

# One S3 server for all folders of tests: `ceph` and `bucket` are fixtures of the whole suite.
pytest_plugins = ["tests.s3.ceph"]

CHECKOUT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
# Filesystems that keep files in memory: syncing there proves and costs nothing.
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})

# No deadlines: a disk may take its time. In CI the examples are the same at every run, so
# that a red run is the change's; elsewhere they differ, so that new ones are found.
_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile("dev", deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("soak", settings.get_profile("dev"), max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if IN_CI else "dev"))


def _filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds `path`, as the kernel's mount table names it."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, filesystem, *_ = line.split()
        # Later lines hide earlier ones, so an equal length wins too.
        if path.is_relative_to(folder) and len(folder) >= len(best):
            best, kind = folder, filesystem
    return kind


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports go to another process as UTF-8; hostile texts that were logged are no UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "replace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def disk_folder() -> Path:
    """A folder on a real disk: the system's temporary one, else one in the checkout."""
    temporary = Path(tempfile.gettempdir()).resolve()
    if _filesystem_of(temporary) not in _IN_MEMORY:
        return temporary
    folder = CHECKOUT / ".roots"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def root(disk_folder: Path) -> Iterator[Path]:
    """An empty folder on a real disk for a store; gone after the test, or when it fails too."""
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder:
        yield Path(folder)


@pytest.fixture
def memory() -> Iterator[Path]:
    """An empty folder in memory, for stories that are not about what a disk keeps."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="blobcask-", dir=place if place.is_dir() else None
    ) as folder:
        yield Path(folder)


@pytest.fixture
def clock() -> HandClock:
    """A clock that the test moves."""
    return HandClock()


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """`program("nginx")` is its path; without it the test is skipped, and fails in CI."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])

    def find(name: str) -> str:
        found = shutil.which(name, path=path)
        if found is None:
            reason = f"{name} is not installed; requirements/system.txt names its package"
            if IN_CI:
                pytest.fail(reason)
            pytest.skip(reason)
        return found

    return find
