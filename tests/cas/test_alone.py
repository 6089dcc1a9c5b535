"""The right to be the one process of its kind on a ROOT, and how long it is kept."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cas.alone import Alone, is_held
from cas.durable import opened

TAKE_THE_PLACE = """
from cas.alone import Alone
place = Alone(Path(sys.argv[1]))
assert place.take()
"""
LOCK_THE_FILE = """
from cas.durable import locked
file = locked(sys.argv[1], os.O_RDWR)
file.__enter__()
"""
# The child lives until its input ends.
FORK = """
if os.fork() == 0:
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""


# While another thread opens the file: it is let go on when the fork has begun.
OPEN_WHILE_FORKING = """
import threading
from cas.durable import locked
is_open, forking, over = threading.Event(), threading.Event(), threading.Event()
kernel = os.open
def slow(path, flags):
    fd = kernel(path, flags)
    is_open.set()
    forking.wait()
    return fd
os.open = slow
os.register_at_fork(before=forking.set)
def hold():
    with locked(sys.argv[1]):
        over.wait()
threading.Thread(target=hold, daemon=True).start()
is_open.wait()
"""
# The child's own file has the number that its parent's had.
OPEN_IN_A_CHILD = """
from cas.durable import locked
outer, inner = locked(os.path.dirname(sys.argv[1])), locked(sys.argv[1])
number = os.open(os.devnull, os.O_RDONLY)
os.close(number)
outer.__enter__()
if os.fork() == 0:
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert os.path.samestat(os.fstat(number), os.stat(sys.argv[1]))
    print(os.getpid(), flush=True)
    sys.stdin.read()
    inner.__exit__(None, None, None)
    os._exit(0)
os.wait()  # what goes wrong in the child ends both
"""


@contextmanager
def forked(program: str, path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that runs `program` and forks, and its child."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, signal, sys\nfrom pathlib import Path\n{program}{FORK}",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        yield parent, int(parent.stdout.readline())
    finally:
        parent.kill()
        parent.stdin.close()
        parent.stdout.read()  # until the child has ended
        parent.stdout.close()
        parent.wait()


def test_a_child_that_lives_on_does_not_keep_the_place_of_a_killed_parent(root: Path) -> None:
    place = Alone(root / "PLACE")
    with closing(place), forked(TAKE_THE_PLACE, root / "PLACE") as (parent, child):
        assert is_held(root / "PLACE"), "a child takes nothing from its parent"
        assert not place.take()
        assert place.holder() == str(parent.pid)

        parent.kill()
        parent.wait()
        os.kill(child, 0)  # is there still
        assert place.take()
        assert place.holder() == str(os.getpid())


def test_nor_what_a_killed_parent_had_locked(root: Path) -> None:
    """Such as the folder of checkpoints while one is written, or COLLECT."""
    (root / "FILE").touch()
    with forked(LOCK_THE_FILE, root / "FILE") as (parent, child), opened(root / "FILE") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        parent.kill()
        parent.wait()
        os.kill(child, 0)  # is there still
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def has_open(process: int, path: Path) -> bool:
    numbers = Path(f"/proc/{process}/fd")
    return any(os.path.realpath(number) == str(path) for number in numbers.iterdir())


def test_nor_what_another_thread_was_about_to_open(root: Path) -> None:
    (root / "FILE").touch()
    with forked(OPEN_WHILE_FORKING, root / "FILE") as (parent, child):
        assert has_open(parent.pid, root / "FILE")
        assert not has_open(child, root / "FILE")


def test_a_child_that_leaves_what_its_parent_opened_keeps_what_it_opened_itself(
    root: Path,
) -> None:
    (root / "FILE").touch()
    with forked(OPEN_IN_A_CHILD, root / "FILE") as (_, child):
        assert has_open(child, root / "FILE")


def test_a_place_that_is_let_go_of_twice_closes_nothing_else(root: Path) -> None:
    place = Alone(root / "PLACE")
    assert place.take()
    place.close()
    other = os.open(root / "PLACE", os.O_RDONLY)  # has the number that is free now
    place.close()
    os.close(other)
    assert not is_held(root / "PLACE")
