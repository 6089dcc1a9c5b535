"""gunicorn, configured once and in code: what `blobcask serve` runs.

The store is opened in each worker after the fork (LMDB and the committer thread do not
survive one), and the arbiter never touches it.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, final

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from cas.config import Settings
from cas.keys import Keys
from cas.store import Store
from gateway.app import create_app
from gateway.board import Board, Meter, Share, Waiters
from gateway.companion import Companion
from gateway.counter_folder import CounterFolder
from gateway.counters import Counters
from gateway.logs import GunicornLog, RequestLog, install
from gateway.observer import Observer
from gateway.peers import Peers
from gateway.pool import outside_slot
from gateway.worker import HEAD_BYTES_MAX
from workflows.views import Workflows

KEEPALIVE_S: Final = 15
# A worker's main loop tells the arbiter once a second that it lives, whatever its threads
# do, so this never ends a long upload; it ends a worker whose loop is stuck.
LOOP_TIMEOUT_S: Final = 60
STOP_TIMEOUT_S: Final = 30  # what is still in flight then is cut; nothing of it is kept
DESCRIPTORS_MAX: Final = 65_536
CONNECTIONS_MAX: Final = 1000  # per worker; one that waits for its client holds no slot
# Of a worker, besides connections and the files that they send or store: the catalog, logs.
DESCRIPTORS_RESERVED: Final = 64
WAITERS_SHARE: Final = 4  # of the descriptors, what may wait for events is one in so many
REQUEST_LINE_BYTES_MAX: Final = 8190  # a filename of 255 characters is up to 3,060 encoded
HEADERS_MAX: Final = 64
# What the arbiter stops a worker with, each once. Blocked from before a fork until the worker
# has its own handlers, because one that came in between would be lost.
_STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
# Workers that were replaced and still end what goes on: more generations are not kept.
_REPLACED_MAX: Final = 2


@final
class _Arbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's, whose signals also reach a worker that is being forked, whose replaced
    workers may take their time, and which looks after companions, too."""

    def __init__(self, app: Any, companions: Sequence[Companion]) -> None:
        self._companions = companions
        self._replaced: list[int] = []  # PIDs, the oldest first; no work is given to them
        super().__init__(app)

    def manage_workers(self) -> None:
        """Keep as many workers as are wanted, those not counted that were replaced."""
        self._forget_ended()
        serving = self._serving()
        for _ in range(self.num_workers - len(serving)):
            self.spawn_worker()
        for pid in serving[: max(0, len(serving) - self.num_workers)]:
            self._replace(pid, signal.SIGHUP)
        for companion in self._companions:
            companion.tend()

    def reload(self) -> None:
        """New workers take over; the old ones end what goes on, within an hour."""
        self._replace_all(self._serving(), signal.SIGHUP)

    def handle_usr2(self) -> None:
        """A worker's wish to have the catalog let go of by all: see `Server._reopen`. The
        old workers end soon, because their successors wait for it."""
        self._replace_all([*self._replaced, *self._serving()], signal.SIGTERM)

    def _replace_all(self, old: list[int], how: signal.Signals) -> None:
        for companion in self._companions:
            companion.restart()  # first: it must not hold what the new workers wait for
        self._forget_ended()
        self._stats["reloads"] += 1
        for _ in range(self.num_workers):
            self.spawn_worker()
        for pid in old:
            self._replace(pid, how)
        for pid in self._replaced[: -_REPLACED_MAX * self.num_workers]:
            self.kill_worker(pid, signal.SIGTERM)

    def _replace(self, pid: int, how: signal.Signals) -> None:
        if pid not in self._replaced:
            self._replaced.append(pid)
        self.kill_worker(pid, how)

    def _forget_ended(self) -> None:
        self._replaced = [pid for pid in self._replaced if pid in self.WORKERS]

    def _serving(self) -> list[int]:
        """The PIDs of the workers that were not replaced, the oldest first."""
        found = [pid for pid in self.WORKERS if pid not in self._replaced]
        return sorted(found, key=lambda pid: int(self.WORKERS[pid].age))

    def stop(self, graceful: bool = True) -> None:
        for companion in self._companions:
            companion.ask_to_end()
        super().stop(graceful)
        for companion in self._companions:
            companion.end()

    def spawn_worker(self) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            pid: int = super().spawn_worker()  # the worker itself never returns from it
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        return pid


@final
class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """Serves one ROOT until it is told to stop; `ready` is called with the bound address, and
    only then the companions start."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        ready: Callable[[str], None] = lambda _address: None,
        companions: Sequence[Companion] = (),
    ) -> None:
        self._companions = companions
        self._settings = settings
        self._keys = keys
        self._ready = ready
        self._store: Store | None = None
        self._workflows: Workflows | None = None
        self._reopening = False
        self._counted = CounterFolder(settings.store.root)
        self._lines = install(settings.log)
        # Room for those that still end requests while their successors run already.
        self._board = Board(4 * settings.gateway.workers + 4)
        self._slots: dict[int, int] = {}  # of the workers, by their age
        self._slot = 0  # of this worker
        self._observer: Observer | None = None
        super().__init__()

    @property
    def bytes_per_s_min(self) -> int:
        """The least rate of bodies and their readers; 0 is none."""
        return self._settings.gateway.min_rate

    @property
    def peers(self) -> Peers:
        """What counts the connections of one worker."""
        most = self._settings.limits.address_connections
        return Peers(most, self._settings.gateway.trusted_proxies)

    @property
    def share(self) -> Share:
        """Where this worker and the others tell how many connections they have."""
        return Share(self._board, self._slot)

    def refused(self, address: str, code: str, status: int) -> None:
        """A worker was sent what is no request."""
        if self._observer is not None:
            self._observer.refused(address, code, status)

    def run(self) -> None:
        """Serve until a signal ends it; never returns."""
        _Arbiter(self, self._companions).run()

    def load_config(self) -> None:
        descriptors = _raise_descriptors() - DESCRIPTORS_RESERVED
        gateway = self._settings.gateway
        # One that waits for an event needs a descriptor and nothing else.
        self._waiters_here = min(self._settings.events.waiters_max, descriptors // WAITERS_SHARE)
        memory = Path("/dev/shm")  # noqa: S108  gunicorn makes its own names there
        options: dict[str, Any] = {
            "bind": gateway.bind,
            "workers": gateway.workers,
            "threads": gateway.threads,
            "worker_class": "gateway.worker.Worker",
            "worker_connections": min(
                CONNECTIONS_MAX,
                # Each may send a file, store one, or be woken while it is held in memory.
                max(gateway.threads + 1, (descriptors - self._waiters_here) // 2),
            ),
            "timeout": LOOP_TIMEOUT_S,
            "graceful_timeout": STOP_TIMEOUT_S,
            "keepalive": KEEPALIVE_S,
            "limit_request_line": REQUEST_LINE_BYTES_MAX,
            "limit_request_field_size": HEAD_BYTES_MAX // 4,
            "limit_request_fields": HEADERS_MAX,
            "forwarded_allow_ips": ",".join(map(str, gateway.trusted_proxies)),
            "http_protocols": "h1",
            "http2_cleartext": "off",
            "control_socket_disable": True,
            # The heartbeat is a file's timestamp; on a disk, a stalled disk would look like
            # a stuck worker and have it killed.
            "worker_tmp_dir": str(memory) if memory.is_dir() else None,
            "logger_class": GunicornLog,
            "loglevel": "warning",
            "proc_name": "blobcask",
            "when_ready": self._when_ready,
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "pre_request": self._pre_request,
            "post_request": self._post_request,
            "worker_exit": self._worker_exit,
            "child_exit": self._child_exit,
            "on_exit": self._on_exit,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def wsgi(self) -> Any:
        """The app; called by gunicorn in each worker, when it has its signal handlers."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        return super().wsgi()

    def load(self) -> Any:
        """Called by gunicorn in each worker, after the fork."""
        root = self._settings.store.root
        self._store = Store.open(root, self._settings, waiting=outside_slot)
        meter = Meter(self._board, self._slot, self._store, self._lines)
        log = RequestLog(self._settings.log, self._keys.signing[-1])
        self._observer = Observer(meter, log)
        self._workflows = Workflows(self._store, self._keys)
        return create_app(
            self._store,
            self._settings,
            self._keys,
            self._reopen,
            meter,
            Counters.open(self._counted.path),
            self._workflows,
            Waiters(
                self._board,
                self._slot,
                self._settings.events.waiters_max,
                self._waiters_here,
            ),
        )

    def _reopen(self) -> None:
        """Have all workers replaced, so that the catalog is let go of and opened anew.

        Only that heals a failed sync or a damaged index. SIGUSR2 makes the arbiter start new
        workers, which wait for LOCK, and end the old ones, those as well that were replaced
        before, when their requests are answered or STOP_TIMEOUT_S is over.
        Once a worker: a disk that goes on failing must not make the arbiter spin.
        """
        if not self._reopening:
            self._reopening = True
            os.kill(os.getppid(), signal.SIGUSR2)

    def _when_ready(self, arbiter: Any) -> None:
        self._ready(str(arbiter.LISTENERS[0]))

    def _pre_fork(self, _arbiter: Any, worker: Any) -> None:
        self._slots[worker.age] = self._board.take()

    def _post_fork(self, _arbiter: Any, worker: Any) -> None:
        self._slot = self._slots[worker.age]
        self._lines.start()

    def _pre_request(self, _worker: Any, request: Any) -> None:
        if self._observer is not None:
            self._observer.before(request)

    def _post_request(self, _worker: Any, request: Any, environ: dict[str, Any], resp: Any) -> None:
        if self._observer is not None:
            self._observer.after(request, environ, resp)

    def _worker_exit(self, _arbiter: Any, _worker: Any) -> None:
        if self._workflows is not None:
            self._workflows.close()
        if self._store is not None:
            self._store.close()
        self._lines.stop()

    def _child_exit(self, _arbiter: Any, worker: Any) -> None:
        self._board.give_back(self._slots.pop(worker.age))

    def _on_exit(self, _arbiter: Any) -> None:
        self._counted.close()


def _raise_descriptors() -> int:
    """Allow as many descriptors as the system lets us have; 1,024 is a usual default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if most == resource.RLIM_INFINITY else min(most, DESCRIPTORS_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return wanted
