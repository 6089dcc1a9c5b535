"""gunicorn, configured once and in code: what `blobcask serve` runs.

The store is opened in each worker after the fork (LMDB and the committer thread do not
survive one), and the arbiter never touches it.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, final

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from cas.config import Settings
from cas.keys import Keys
from cas.store import Store
from gateway.app import create_app
from gateway.companion import Companion
from gateway.counter_folder import CounterFolder
from gateway.counters import Counters
from gateway.logs import GunicornLog, RequestLog, install
from gateway.metrics import Board, Meter, Observer
from gateway.worker import HEAD_BYTES_MAX

KEEPALIVE_S: Final = 15
# A worker's main loop tells the arbiter once a second that it lives, whatever its threads
# do, so this never ends a long upload; it ends a worker whose loop is stuck.
LOOP_TIMEOUT_S: Final = 60
STOP_TIMEOUT_S: Final = 30  # what is still in flight then is cut; nothing of it is kept
DESCRIPTORS_MAX: Final = 65_536
CONNECTIONS_MAX: Final = 1000  # per worker; one that waits for its client holds no slot
REQUEST_LINE_BYTES_MAX: Final = 8190  # a filename of 255 characters is up to 3,060 encoded
HEADERS_MAX: Final = 64
# What the arbiter stops a worker with, each once. Blocked from before a fork until the worker
# has its own handlers, because one that came in between would be lost.
_STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


@final
class _Arbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's, whose signals also reach a worker that is being forked, and which looks
    after a companion, too."""

    def __init__(self, app: Any, companion: Companion | None) -> None:
        self._companion = companion
        super().__init__(app)

    def manage_workers(self) -> None:
        super().manage_workers()
        if self._companion:
            self._companion.tend()

    def reload(self) -> None:
        if self._companion:  # first, so that it does not hold what the new workers wait for
            self._companion.restart()
        super().reload()

    def stop(self, graceful: bool = True) -> None:
        if self._companion:
            self._companion.ask_to_end()
        super().stop(graceful)
        if self._companion:
            self._companion.end()

    def spawn_worker(self) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            pid: int = super().spawn_worker()  # the worker itself never returns from it
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        return pid


@final
class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """Serves one ROOT until it is told to stop; `ready` is called with the bound address."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        ready: Callable[[str], None] = lambda _address: None,
        companion: Companion | None = None,
    ) -> None:
        self._companion = companion
        self._settings = settings
        self._keys = keys
        self._ready = ready
        self._store: Store | None = None
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

    def run(self) -> None:
        """Serve until a signal ends it; never returns."""
        _Arbiter(self, self._companion).run()

    def load_config(self) -> None:
        # Each connection and each file being sent is a descriptor; 1,024 is a usual default.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, DESCRIPTORS_MAX), most))
        gateway = self._settings.gateway
        memory = Path("/dev/shm")  # noqa: S108  gunicorn makes its own names there
        options: dict[str, Any] = {
            "bind": gateway.bind,
            "workers": gateway.workers,
            "threads": gateway.threads,
            "worker_class": "gateway.worker.Worker",
            "worker_connections": CONNECTIONS_MAX,
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
        self._store = Store.open(self._settings.store.root, self._settings)
        meter = Meter(self._board, self._slot, self._store, self._lines)
        log = RequestLog(self._settings.log, self._keys.signing[-1])
        self._observer = Observer(meter, log)
        counters = Counters.open(self._counted.path)
        return create_app(self._store, self._settings, self._keys, self._reopen, meter, counters)

    def _reopen(self) -> None:
        """Have all workers replaced, so that the catalog is let go of and opened anew.

        Only that heals a failed sync or a damaged index. SIGHUP makes the arbiter start new
        workers, which wait for LOCK, and end the old ones when their requests are answered.
        Once a worker: a disk that goes on failing must not make the arbiter spin.
        """
        if not self._reopening:
            self._reopening = True
            os.kill(os.getppid(), signal.SIGHUP)

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
        if self._store is not None:
            self._store.close()
        self._lines.stop()

    def _child_exit(self, _arbiter: Any, worker: Any) -> None:
        self._board.give_back(self._slots.pop(worker.age))

    def _on_exit(self, _arbiter: Any) -> None:
        self._counted.close()
