"""Workloads of the mirror: copying to a real S3 server, against rclone, and a large backlog.

Both sides send the same files, from the page cache, to one Ceph on this machine, each into a
bucket of its own run. rclone is timed from its start to its end, and in processor time too.
Ours is a service that runs already: it is halted while files are stored, and timed from when
it goes on until no row is wanted any more, that is until each copy was verified and written
down as done.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, final

import msgspec

from bench.ceph import REGION, Ceph, running
from bench.corpus import MIB, Stream, content
from bench.measure import Memory, Run, Samples, Side, alternate
from bench.report import Quantity, Row, Target
from bench.scale import Bench
from bench.storing import ACTOR, TENANT, rate, shown
from cas.catalog import Transaction
from cas.clock import SECOND_US
from cas.files import PutItem
from cas.records import WANTED, Replica
from cas.replicas import backlog, register, targets
from cas.store import Store

_NAME: Final = "bench"
_TRANSFERS: Final = 16
_POLL_S: Final = 0.02
_READY_S: Final = 60.0
_DRAIN_S: Final = 1_800.0
_HALT_S: Final = 1.0
_ROWS_A_WRITE: Final = 5_000
_READS: Final = 2_000
_IN_MEMORY_BYTES: Final = 4 * MIB  # files up to here are stored as one batch


@final
class Cost(msgspec.Struct):
    """What the runs of one side cost, beside their time."""

    cpu_s: list[float] = []
    peak_bytes: list[int] = []


def mirror(bench: Bench) -> list[Row]:
    """New blobs to an empty bucket, against `rclone copy` of the very same files."""
    program = shutil.which("rclone")
    if program is None:
        raise FileNotFoundError("rclone is not installed (Debian: rclone)")
    with running(bench.folder) as ceph:
        return [
            row
            for size_bytes, count in bench.scale.mirrored
            for row in _compare(bench, ceph, program, size_bytes, count)
        ]


def _compare(bench: Bench, ceph: Ceph, rclone: str, size_bytes: int, count: int) -> list[Row]:
    source = bench.folder / f"source-{size_bytes}"
    with Store.open(source) as store:
        _fill(store, size_bytes, count)
    own, peer = Cost(), Cost()

    def ours(run: Run) -> None:
        with _bucket(ceph) as bucket, _mirroring(run.folder / "root", ceph, bucket) as service:
            service.halt_and_store(lambda store: _fill(store, size_bytes, count))
            before_s = _cpu_s(service.pid)
            with run.timed():
                service.resume()
                service.drain()
            own.cpu_s.append(_cpu_s(service.pid) - before_s)
            own.peak_bytes.append(Memory.of(service.pid).peak_bytes)

    def theirs(run: Run) -> None:
        with _bucket(ceph) as bucket:
            before_s = _cpu_of_children_s()
            with run.timed():
                subprocess.run(
                    [
                        rclone,
                        "copy",
                        f"--transfers={_TRANSFERS}",
                        source / "objects",
                        f"c:{bucket}",
                    ],
                    env=_rclone_environ(ceph, run.folder),
                    check=True,
                )
            peer.cpu_s.append(_cpu_of_children_s() - before_s)

    sides = [Side("mirror", ours), Side("rclone", theirs)]
    measured, limit = alternate(bench.folder, bench.scale.rounds, sides)
    return [
        _speed(measured, limit, size_bytes, count),
        _processor(own, peer, size_bytes, count),
        _memory(own, size_bytes, count),
    ]


def _speed(ours: Samples, limit: Samples, size_bytes: int, count: int) -> Row:
    large = size_bytes > _IN_MEMORY_BYTES
    amount, unit = (size_bytes * count / 1e6, "MB/s") if large else (count, "/s")
    return Row(
        "mirror",
        f"mirror {count:,} blobs of {shown(size_bytes)}, verified",
        rate(ours, amount, unit),
        limit.median_s / ours.median_s,
        rate(limit, amount, unit),
        f"rclone copy --transfers {_TRANSFERS}",
        Target(0.95),
    )


def _processor(own: Cost, peer: Cost, size_bytes: int, count: int) -> Row:
    per_put = [seconds / count * 1e3 for seconds in own.cpu_s]
    small = size_bytes <= _IN_MEMORY_BYTES
    theirs_ms = statistics.median(peer.cpu_s) / count * 1e3
    return Row(
        "mirror",
        f"processor time for each blob of {shown(size_bytes)}",
        Quantity(statistics.median(per_put), "ms", [round(ms, 3) for ms in per_put]),
        statistics.median(per_put),
        target=Target(1.5, at_most=True, unit="ms") if small else None,
        note=f"rclone {theirs_ms:,.2f} ms",
    )


def _memory(own: Cost, size_bytes: int, count: int) -> Row:
    mib = [peak / 2**20 for peak in own.peak_bytes]
    return Row(
        "mirror",
        f"most memory that the process ever had, {count:,} blobs of {shown(size_bytes)}",
        Quantity(max(mib), "MiB", [round(size, 1) for size in mib]),
        max(mib),
        target=Target(150, at_most=True, unit="MiB"),
    )


# --- a backlog


def read_backlog(bench: Bench) -> list[Row]:
    """Rows, bytes and oldest age of what waits, where very much waits."""
    rows = bench.scale.backlog_rows
    with Store.open(bench.folder / "backlog") as store:
        register(store.catalog, [(_NAME, "a place")])
        for start in range(0, rows, _ROWS_A_WRITE):
            store.catalog.write(
                lambda txn, start=start: _want(txn, range(start, min(start + _ROWS_A_WRITE, rows))),  # type: ignore[misc]
                actor=ACTOR,
            )
        seconds = []
        for _ in range(_READS):
            began = time.perf_counter()
            with store.catalog.read() as snapshot:
                found = backlog(snapshot, _NAME, snapshot.position.at_us + SECOND_US)
            seconds.append(time.perf_counter() - began)
    if found.rows != rows or not found.oldest_us:
        raise RuntimeError(f"{found} where {rows:,} rows wait")
    median_ms = statistics.median(seconds) * 1e3
    return [
        Row(
            "backlog",
            f"rows, bytes and oldest age of a backlog of {rows:,}",
            Quantity(median_ms, "ms", [round(s * 1e3, 4) for s in seconds[:20]]),
            median_ms,
            target=Target(1, at_most=True, unit="ms"),
            note=f"the slowest of {_READS:,}: {max(seconds) * 1e3:.2f} ms",
        )
    ]


def _want(txn: Transaction, numbers: range) -> None:
    for number in numbers:
        digest = hashlib.sha256(b"%d" % number).digest()
        txn.insert(
            Replica(_NAME, digest, 65_536, WANTED, txn.now_us, _NAME, txn.now_us)  # type: ignore[arg-type]
        )


# --- our side


@final
class _Service:
    """`blobcask replicate run` on a ROOT of its own."""

    def __init__(self, process: subprocess.Popen[bytes], store: Store) -> None:
        self._process = process
        self._store = store
        self.pid = process.pid

    def halt_and_store(self, fill: Callable[[Store], None]) -> None:
        """Stop it at a moment when it holds nobody up, and store meanwhile."""
        while not self._halted():
            pass
        fill(self._store)

    def _halted(self) -> bool:
        os.kill(self.pid, signal.SIGSTOP)
        # It may have been stopped in the middle of a write, and then nobody else can write.
        probe = threading.Thread(target=self._store.catalog.write, args=(_nothing,))
        probe.start()
        probe.join(_HALT_S)
        if not probe.is_alive():
            return True
        self.resume()
        probe.join()
        return False

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def drain(self, seconds: float = _DRAIN_S) -> None:
        """Wait until nothing is wanted."""
        deadline = time.monotonic() + seconds
        while True:
            with self._store.catalog.read() as snapshot:
                left = backlog(snapshot, _NAME, snapshot.position.at_us)
            if not left.rows:
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the mirror stands still: {left}")
            time.sleep(_POLL_S)


@contextmanager
def _mirroring(root: Path, ceph: Ceph, bucket: str) -> Iterator[_Service]:
    """Run it until the first blob went the whole way: probed, claimed, warm."""
    settings = {
        "STORE__ROOT": str(root),
        "REPLICATOR__TARGETS": _NAME,
        "REPLICATOR__CONCURRENCY": str(_TRANSFERS),
        "TARGET_BENCH__KIND": "s3",
        "TARGET_BENCH__ENDPOINT": ceph.address,
        "TARGET_BENCH__BUCKET": bucket,
        "TARGET_BENCH__REGION": REGION,
        "TARGET_BENCH__ADDRESSING": "path",
        "TARGET_BENCH__ACCESS_KEY": ceph.login.access_key,
        "TARGET_BENCH__SECRET_KEY": ceph.login.secret_key,
    }
    environ = {
        **{name: value for name, value in os.environ.items() if "BLOBCASK" not in name},
        **{f"BLOBCASK_{name}": value for name, value in settings.items()},
    }
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(root))
        log = stack.enter_context((root.parent / "log").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "cas", "replicate", "run"], env=environ, stderr=log
        )
        stack.callback(_end, process)
        service = _Service(process, store)
        _await_target(service, store)
        store.files(TENANT, ACTOR).put(b"the first one", name="first.bin")
        service.drain(_READY_S)
        yield service


def _await_target(service: _Service, store: Store) -> None:
    """Until it has said which targets there are, without which nothing is ever wanted."""
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        with store.catalog.read() as snapshot:
            if targets(snapshot):
                return
        time.sleep(_POLL_S)
    raise RuntimeError(f"process {service.pid} registers no target")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.wait()


def _nothing(_txn: Transaction) -> None:
    """A write that writes nothing: it only takes the writer lock."""


def _fill(store: Store, size_bytes: int, count: int) -> None:
    files = store.files(TENANT, ACTOR)
    kind = "application/octet-stream"
    if size_bytes <= _IN_MEMORY_BYTES:
        files.put_many(
            [
                PutItem(content(size_bytes, number), f"{number}.bin", content_type=kind)
                for number in range(count)
            ]
        )
        return
    for number in range(count):
        files.put(Stream(size_bytes, number), name=f"{number}.bin", content_type=kind)


# --- both sides


@contextmanager
def _bucket(ceph: Ceph) -> Iterator[str]:
    """An empty bucket; what it held is given back, for the server keeps all in memory."""
    name = f"bench-{uuid.uuid4().hex[:12]}"
    ceph.make_bucket(name)
    yield name
    ceph.remove_bucket(name)


def _rclone_environ(ceph: Ceph, folder: Path) -> dict[str, str]:
    remote = {
        "TYPE": "s3",
        "PROVIDER": "Ceph",
        "ENDPOINT": ceph.address,
        "REGION": REGION,
        "ACCESS_KEY_ID": ceph.login.access_key,
        "SECRET_ACCESS_KEY": ceph.login.secret_key,
    }
    configuration = folder / "rclone.conf"
    configuration.touch()
    return {
        # What is meant for Amazon's own tools may stop rclone before it begins.
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "RCLONE_CONFIG": str(configuration),
        **{f"RCLONE_CONFIG_C_{name}": value for name, value in remote.items()},
    }


def _cpu_s(pid: int) -> float:
    """Processor seconds that a process took so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cpu_of_children_s() -> float:
    """Of all that this process has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
