"""A node as users run it, the list that its client keeps, and what is at its target.

The list (`Ledger`) is the judge: what the server acknowledged, in the order in which it did,
written down by the client and by nobody else.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, final
from urllib.parse import quote

from bench.corpus import content
from cas.records import Replica, StoredFile
from cas.replicas import backlog
from cas.store import Store
from replicator.canary import TENANT
from tests.conftest import CHECKOUT
from tests.gateway.served import ACCOMPANIED, ALONE, Served, serving
from tests.s3.ceph import Bucket

FAR = "far"  # the target's name
KIB = 1 << 10
MIB = 1 << 20
PATIENCE_S = 60.0
_POLL_S = 0.05

POLICIES = ("forever", "days:400", "hours:9000", "until:2040-01-01T00:00:00Z")


# --- the client's list


@final
@dataclass(frozen=True)
class Stored:
    """What the server said of one file; `number` is the seed of its bytes."""

    number: int
    size_bytes: int
    reference: str
    digest: str
    retention: str
    expires_at: str | None
    hold: bool

    @property
    def key(self) -> str:
        return f"objects/{self.digest[:2]}/{self.digest}"

    @property
    def told(self) -> tuple[str, str, str, bool]:
        """What a restore must bring back: reference, digest, retention, hold."""
        return self.reference, self.digest, self.retention, self.hold


@final
class Ledger:
    """What was acknowledged, oldest first. For any number of threads."""

    def __init__(self, first: int = 1) -> None:
        """Two lists with files of their own begin with different numbers."""
        self._numbers = count(first)
        self._stored: list[Stored] = []
        self._lock = threading.Lock()

    def add(self, stored: Stored) -> None:
        with self._lock:
            self._stored.append(stored)

    def number(self) -> int:
        with self._lock:
            return next(self._numbers)

    @property
    def stored(self) -> list[Stored]:
        with self._lock:
            return list(self._stored)

    @property
    def size_bytes(self) -> int:
        return sum(stored.size_bytes for stored in self.stored)


# --- the node


def settings_of(bucket: Bucket, prefix: str = "", **more: str) -> dict[str, str]:
    """SECTION__KEY=value, for a node that mirrors to `bucket` and hurries."""
    return {
        "REPLICATOR__TARGETS": FAR,
        "REPLICATOR__SHIP_EVERY": "1s",
        **{f"TARGET_FAR__{key.upper()}": value for key, value in bucket.options(prefix).items()},
        **more,
    }


@final
@dataclass
class Node:
    """A running server, its client's list, and the settings that it has."""

    served: Served
    settings: Mapping[str, str]
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def root(self) -> Path:
        return self.served.root

    def store(self, size_bytes: int = 64 * KIB, *, hold: bool = False) -> Stored:
        """Send one new file, and write down what was acknowledged."""
        number = self.ledger.number()
        data = content(size_bytes, number)
        policy = POLICIES[number % len(POLICIES)]
        url = f"/api/v1/storage?name=n{number}&filename=n{number}.bin&run=run-{number % 3}"
        answer = self.served.ask(
            "POST", f"{url}&retention_policy={quote(policy)}", data, token=self.served.admin
        )
        assert answer.status == 201, answer.body
        form = answer.form
        assert form["checksum_sha256"] == hashlib.sha256(data).hexdigest()
        reference = str(form["storage_ref"])
        if hold:
            held = self.served.ask("PUT", f"{path_of(reference)}/hold", token=self.served.admin)
            assert held.status in (200, 204), held.body
        stored = Stored(
            number,
            size_bytes,
            reference,
            str(form["checksum_sha256"]),
            policy,
            form.get("expires_at"),
            hold,
        )
        self.ledger.add(stored)
        return stored

    def store_many(self, how_many: int, size_bytes: int = 64 * KIB) -> list[Stored]:
        """Every fifth one is held."""
        return [self.store(size_bytes, hold=number % 5 == 0) for number in range(how_many)]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return blobcask(self.root, self.settings, *words)

    def status(self) -> tuple[int, dict[str, Any]]:
        """The exit code of `replicate status`, and what it tells."""
        run = self.run("replicate", "status", "--json")
        assert run.stdout, run.stderr
        form = json.loads(run.stdout)
        assert isinstance(form, dict)
        return run.returncode, form


@contextmanager
def serving_node(
    root: Path,
    settings: Mapping[str, str],
    *,
    accompanied: bool = True,
    ledger: Ledger | None = None,
    environ: Mapping[str, str] | None = None,
    token: str = "",
) -> Iterator[Node]:
    """`blobcask serve` on `root`. Not `accompanied`, its replicator is the test's matter.

    `token` is the admin's, where it is known from an earlier start.
    """
    with _environ(environ), serving(root, ACCOMPANIED if accompanied else ALONE, **settings) as up:
        up.admin = up.admin or token or up.token("admin")
        yield Node(up, settings, ledger or Ledger())


@contextmanager
def _environ(names: Mapping[str, str] | None) -> Iterator[None]:
    """Variables for processes that are started inside, such as a false clock."""
    before = dict(os.environ)
    os.environ.update(names or {})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def environ_of(root: Path, settings: Mapping[str, str]) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if "BLOBCASK" not in name},
        "PYTHONWARNINGS": "error",
        "PYTHONUNBUFFERED": "1",
        "BLOBCASK_STORE__ROOT": str(root),
        **{f"BLOBCASK_{name}": value for name, value in settings.items()},
    }


def blobcask(
    root: Path, settings: Mapping[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    """The command line, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cas", *words],
        env=environ_of(root, settings),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 2,
    )


@final
class Replicating:
    """`blobcask replicate run` in a process of its own, to be killed."""

    def __init__(self, root: Path, settings: Mapping[str, str], log: Path) -> None:
        self._root = root
        self._settings = settings
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cas", "replicate", "run"],
                env=environ_of(self._root, self._settings),
                cwd=CHECKOUT,
                stderr=log,
            )

    def kill(self) -> None:
        """As the kernel kills, at once."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """As an operator stops it; it must end by itself, and well."""
        assert self._end(signal.SIGTERM) == 0, self.log()

    def log(self) -> str:
        return self._log.read_text()

    def _end(self, number: int) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


@contextmanager
def replicating(root: Path, settings: Mapping[str, str], log: Path) -> Iterator[Replicating]:
    """One that runs from the beginning, and is killed at the end if it still does."""
    process = Replicating(root, settings, log)
    process.start()
    try:
        yield process
    finally:
        process.kill()


# --- what becomes true


def until(what: str, found: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Look until `found()` is true; other processes tell nobody when they are done."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        select.select((), (), (), _POLL_S)


@contextmanager
def looking(root: Path) -> Iterator[Store]:
    """The store, opened beside the processes that work on it."""
    with Store.open(root) as store:
        yield store


def waiting(store: Store) -> int:
    """How many copies are still wanted, a canary's included."""
    with store.catalog.read() as snapshot:
        return backlog(snapshot, FAR, snapshot.position.at_us).rows


def wanted_of(node: Node, store: Store) -> set[str]:
    """The digests of acknowledged files that are not at the target: a canary is not among them."""
    return {stored.digest for stored in node.ledger.stored} - done(store)


def done(store: Store) -> set[str]:
    """The digests whose copies are said to be verified at the target."""
    with store.catalog.read() as snapshot:
        rows = snapshot.range(Replica, "", (FAR,), limit=1_000_000)
    return {row.digest.hex() for row in rows if row.held}


def errors(store: Store) -> set[str]:
    """The last errors of rows that wait."""
    with store.catalog.read() as snapshot:
        rows = snapshot.range(Replica, "", (FAR,), limit=1_000_000)
    return {row.last_error for row in rows if row.last_error}


def until_mirrored(node: Node, seconds: float = PATIENCE_S) -> None:
    """Until the row of each acknowledged file is done."""
    with looking(node.root) as store:

        def all_done() -> bool:
            return not waiting(store) and not wanted_of(node, store)

        try:
            until("every file is mirrored", all_done, seconds)
        except AssertionError as failed:
            told = f"{failed}: {waiting(store)} rows wait; {sorted(errors(store))[:3]}"
            raise AssertionError(told) from None


def until_canary_is_home(node: Node) -> None:
    """Until the first canary came back and is forgotten; the next one starts in 15 minutes. It is
    a file like others: on its way when a disk is lost, it is restored, or what is missing."""
    with looking(node.root) as store:

        def home() -> bool:
            others = done(store) - {stored.digest for stored in node.ledger.stored}
            return bool(others) and not store.files(TENANT, "test").usage().files

        until("the canary is home", home)


def until_shipped(root: Path, bucket: Bucket, prefix: str = "", seconds: float = PATIENCE_S) -> int:
    """Until all frames that there are now are at the target; returns the last one's number."""
    with looking(root) as store, store.catalog.read() as snapshot:
        seq = snapshot.position.seq
    until("the journal is shipped", lambda: shipped_seq(bucket, prefix) >= seq, seconds)
    return seq


def shipped_seq(bucket: Bucket, prefix: str = "") -> int:
    """The frame that HEAD.json names; 0 without one."""
    head = head_of(bucket, prefix)
    return int(head["seq"]) if head else 0


def head_of(bucket: Bucket, prefix: str = "") -> dict[str, Any] | None:
    key = f"{prefix}/HEAD.json".lstrip("/")
    if key not in bucket.keys(key):
        return None
    form = json.loads(bucket.read(key))
    assert isinstance(form, dict)
    return form


# --- judging


def judge_bucket(bucket: Bucket, files: Iterable[Stored], prefix: str = "") -> None:
    """Each file's bytes are at the target, whole and right."""
    wrong = [
        stored
        for stored in files
        if hashlib.sha256(bucket.read(f"{prefix}/{stored.key}".lstrip("/"))).hexdigest()
        != stored.digest
    ]
    assert not wrong, wrong


def records_of(root: Path) -> dict[str, StoredFile]:
    """All file records of a store, by reference."""
    with looking(root) as store, store.catalog.read() as snapshot:
        files = snapshot.range(StoredFile, "", limit=1_000_000)
    return {file.storage_ref: file for file in files}


def told_of(file: StoredFile) -> tuple[str, str, str, bool]:
    """As `Stored.told`."""
    return file.storage_ref, file.checksum_sha256.hex(), file.retention_policy, file.hold


def judge_store(root: Path, files: Iterable[Stored]) -> None:
    """A store knows each file as the client does, and has its bytes."""
    known = records_of(root)
    for stored in files:
        assert stored.reference in known, f"lost: {stored}"
        assert told_of(known[stored.reference]) == stored.told
        path = root / stored.key
        assert hashlib.sha256(path.read_bytes()).hexdigest() == stored.digest


def judge_served(served: Served, files: Iterable[Stored]) -> None:
    """A server gives each file's bytes, whole and right."""
    for stored in files:
        answer = served.ask("GET", path_of(stored.reference), token=served.admin)
        assert answer.status == 200, (answer.status, answer.body[:500])
        assert hashlib.sha256(answer.body).hexdigest() == stored.digest


def judge_doctor(root: Path, settings: Mapping[str, str]) -> None:
    """`blobcask doctor` finds nothing."""
    run = blobcask(root, settings, "doctor")
    assert run.returncode == 0, run.stdout + run.stderr


def path_of(reference: str) -> str:
    return "/api/v1/storage/" + reference.partition("://")[2]
