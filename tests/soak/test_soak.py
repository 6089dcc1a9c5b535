"""Eight writers, two collectors and a scrub at one store, any of them killed: 0 lost."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import final

import pytest

from cas.digest import Digest
from cas.errors import NotFound
from cas.store import Store
from tests.audit import assert_readable, assert_well, audit
from tests.conftest import CHECKOUT
from tests.soak.actors import SETTINGS

WRITERS = 8
COLLECTORS = 2


@final
class Promises:
    """What the store acknowledged, as the parent heard it. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.kept: dict[str, Digest] = {}
        self.deleted: set[str] = set()
        self._doubtful: set[str] = set()
        self.events = {"writer": 0, "collector": 0, "scrub": 0}

    def hear(self, role: str, line: str) -> None:
        kind, _, rest = line.rstrip("\n").partition(" ")
        with self._lock:
            if kind == "+":
                file_id, _, digest = rest.partition(" ")
                # Whoever is asked to delete a file never stores under its identifier again.
                assert file_id not in self.deleted | self._doubtful, "a deleted file came back"
                self.kept[file_id] = Digest(bytes.fromhex(digest))
            elif kind == "-":
                del self.kept[rest]
                self._doubtful.add(rest)
            elif kind == "x":
                self._doubtful.remove(rest)
                self.deleted.add(rest)
            else:
                self.events[role] += int(rest)


@final
class Actor:
    """One process of the soak, and the thread that listens to it."""

    def __init__(self, root: Path, role: str, number: int, promises: Promises) -> None:
        self._role = role
        self._promises = promises
        self._failures: list[str] = []
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.soak.actors",
                role,
                root,
                f"{role}-{number}",
                f"{number}",
            ],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith("\n"):
                continue  # the kill came in the middle of it
            try:
                self._promises.hear(self._role, line)
            except (AssertionError, KeyError, ValueError) as error:
                self._failures.append(f"{line!r}: {error!r}")

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def stop(self) -> None:
        """Ask it to end, and raise what went wrong in it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        error = self._end()
        assert self._process.returncode == 0, error
        assert not self._failures, self._failures

    def _end(self) -> str:
        self._listener.join()
        self._process.wait()
        assert self._process.stderr is not None
        error = self._process.stderr.read()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        return error


def soak(
    root: Path, *, events: dict[str, int], seconds: float, seed: int, at_least_s: float = 0
) -> Promises:
    """Run until so many events of each role, or seconds, are over; returns what was promised."""
    Store.open(root, SETTINGS).close()
    promises = Promises()
    chance = random.Random(seed)
    roles = ["writer"] * WRITERS + ["collector"] * COLLECTORS + ["scrub"]
    numbers = itertools.count(seed * 1000)  # every process gets a seed of its own
    actors = [Actor(root, role, next(numbers), promises) for role in roles]
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < seconds:
        if passed >= at_least_s and all(promises.events[one] >= events[one] for one in events):
            break
        time.sleep(0.5)  # a pace for the kills, not a wait for anything
        for actor in actors:
            if not actor.running():
                actor.stop()  # raises with what it said last
        if chance.random() < 0.4:
            killed = chance.randrange(len(actors))
            actors[killed].kill()
            actors[killed] = Actor(root, roles[killed], next(numbers), promises)
    for actor in actors:
        actor.stop()
    return promises


def judge(root: Path, promises: Promises) -> None:
    with Store.open(root, SETTINGS) as store:
        audit(store)
        assert_readable(store, promises.kept)
        assert_well(store)
        for file_id in promises.deleted:
            with pytest.raises(NotFound):
                store.file_by_id(file_id)


def test_a_short_soak_loses_nothing(root: Path) -> None:
    enough = {"writer": 500, "collector": 50, "scrub": 50}
    promises = soak(root, events=enough, seconds=200, seed=1, at_least_s=15)
    assert all(promises.events[role] >= enough[role] for role in enough), promises.events
    judge(root, promises)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_long_soak_loses_nothing(root: Path) -> None:
    promises = soak(root, events={"writer": 100_000}, seconds=6600, seed=2)
    assert promises.events["writer"] >= 100_000
    judge(root, promises)
    # For whoever runs it with -s: how much was promised, and kept.
    sys.stdout.write(f"\n{promises.events}, {len(promises.kept)} kept, 0 lost\n")
