"""Workloads of events: how soon who waits in one process is woken by the commit of another.

Both processes read the same monotonic clock. What is timed begins when the commit is answered
to whom emitted, and ends when the payload is in the hands of whom waited: ring and claim, and
the claim is a durable write itself. The limit is a pipe between the same two processes.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, final

from bench.report import Quantity, Row, Target
from bench.scale import Bench
from bench.storing import ACTOR, TENANT
from cas.store import Store
from workflows.events import Events
from workflows.watcher import Unwatch, Watcher

_EVENT: Final = "bench.event"
_RUN: Final = "run-bench"
_BOUND_MS: Final = 100.0
_IDLE_S: Final = 2.0


def waking(bench: Bench) -> list[Row]:
    """An event's way to its wait across two processes, among few waits and among many."""
    rows: list[Row] = []
    for waits in bench.scale.waits:
        folder = bench.folder / f"waits-{waits}"
        with Store.open(folder) as store, _waiter(folder, waits) as waiter:
            idle = waiter.idle_share()
            piped = [waiter.piped_ms() for _ in range(bench.scale.wakes)]
            woken = _woken(store, waiter, bench.scale.wakes, waits)
        rows += [
            _row(f"median, {waits:,} waiting", woken, 0.5, piped),
            _row(f"99th percentile, {waits:,} waiting", woken, 0.99, piped),
            Row(
                "waking",
                f"processor time while nothing happens, {waits:,} waiting",
                Quantity(idle * 100, "%"),
                idle * 100,
                target=Target(5, at_most=True, unit="%"),
            ),
        ]
    return rows


def _row(what: str, woken: list[float], part: float, piped: list[float]) -> Row:
    ours_ms, limit_ms = _quantile(woken, part), _quantile(piped, part)
    return Row(
        "waking",
        f"from a commit to the claimed event in another process, {what}",
        Quantity(ours_ms, "ms", [round(ms, 3) for ms in woken]),
        ours_ms,
        Quantity(limit_ms, "ms"),
        "a line through a pipe",
        Target(_BOUND_MS, at_most=True, unit="ms"),
    )


def _quantile(samples: list[float], part: float) -> float:
    ordered = sorted(samples)
    return ordered[min(round(part * len(ordered)), len(ordered) - 1)]


def _woken(store: Store, waiter: _Waiter, wakes: int, waits: int) -> list[float]:
    watcher = Watcher(store.catalog)
    events = Events(store.catalog, watcher, store.settings.events, tenant_id=TENANT, actor=ACTOR)
    samples: list[float] = []
    for number in range(wakes):
        # Not in step with the looks of the other process.
        time.sleep(0.003 * (number % 7))
        # A new wait comes for each that is claimed.
        events.emit(_EVENT, number, f"{number % waits}")
        committed_ns = time.monotonic_ns()
        samples.append(max(waiter.told_ns() - committed_ns, 0) / 1e6)
    watcher.close()
    return samples


@final
class _Waiter:
    """The process that waits."""

    def __init__(self, process: subprocess.Popen[str], told: IO[str], asked: IO[str]) -> None:
        self._process = process
        self._told = told
        self._asked = asked

    def told_ns(self) -> int:
        """When it had what it waited for."""
        return int(self._told.readline())

    def piped_ms(self) -> float:
        """A line there, by the clocks of both."""
        began_ns = time.monotonic_ns()
        self._asked.write("?\n")
        self._asked.flush()
        return (self.told_ns() - began_ns) / 1e6

    def idle_share(self) -> float:
        """Which share of one processor it uses while nothing happens."""
        before_s = self._processor_s()
        time.sleep(_IDLE_S)
        return (self._processor_s() - before_s) / _IDLE_S

    def _processor_s(self) -> float:
        self._asked.write("cpu\n")
        self._asked.flush()
        return self.told_ns() / 1e9


@contextmanager
def _waiter(folder: Path, waits: int) -> Iterator[_Waiter]:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.waking", str(folder), str(waits)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise AssertionError("there are pipes")
        waiter = _Waiter(process, process.stdout, process.stdin)
        try:
            waiter.told_ns()  # it is ready
            yield waiter
        finally:
            process.kill()


def _wait_as_told(folder: Path, waits: int) -> None:
    """The other process: keeps `waits` waits, claims what comes, and waits for it anew."""

    def tell(at_ns: int) -> None:
        sys.stdout.write(f"{at_ns}\n")
        sys.stdout.flush()

    with Store.open(folder) as store:
        watcher = Watcher(store.catalog)
        events = Events(
            store.catalog, watcher, store.settings.events, tenant_id=TENANT, actor=ACTOR
        )
        rung: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()

        def begin(key: int, turn: int) -> None:
            wait = events.subscribe(_RUN, f"{key}#{turn}", _EVENT, f"{key}")
            name = current[key] = wait.subscription_id
            unwatch[key] = watcher.watch(name, lambda: rung.put((name, key)))

        current: dict[int, str] = {}
        unwatch: dict[int, Unwatch] = {}
        turns = dict.fromkeys(range(waits), 0)
        for key in range(waits):
            begin(key, 0)
        tell(0)

        def claim_all() -> None:
            while True:
                name, key = rung.get()
                # A bell may ring twice.
                if name != current[key] or events.claim(name) is None:
                    continue
                at_ns = time.monotonic_ns()
                unwatch[key]()
                turns[key] += 1
                begin(key, turns[key])
                tell(at_ns)

        threading.Thread(target=claim_all, daemon=True).start()
        for line in sys.stdin:
            tell(time.process_time_ns() if line == "cpu\n" else time.monotonic_ns())


if __name__ == "__main__":
    _wait_as_told(Path(sys.argv[1]), int(sys.argv[2]))
