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

from cas.config import Settings
from cas.keys import Keys
from cas.store import Store
from gateway.app import create_app
from gateway.worker import HEAD_BYTES_MAX

KEEPALIVE_S: Final = 15
# A worker's main loop tells the arbiter once a second that it lives, whatever its threads
# do, so this never ends a long upload; it ends a worker whose loop is stuck.
LOOP_TIMEOUT_S: Final = 60
STOP_TIMEOUT_S: Final = 30  # what is still in flight then is cut; nothing of it is kept
DESCRIPTORS_MAX: Final = 65_536
CONNECTIONS_MAX: Final = 1000  # per worker; a waiting connection costs no thread
REQUEST_LINE_BYTES_MAX: Final = 8190  # a filename of 255 characters is up to 3,060 encoded
HEADERS_MAX: Final = 64


@final
class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """Serves one ROOT until it is told to stop; `ready` is called with the bound address."""

    def __init__(
        self, settings: Settings, keys: Keys, ready: Callable[[str], None] = lambda _address: None
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._ready = ready
        self._store: Store | None = None
        self._reopening = False
        super().__init__()

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
            "loglevel": "warning",
            "proc_name": "blobcask",
            "when_ready": self._when_ready,
            "worker_exit": self._worker_exit,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Called by gunicorn in each worker, after the fork."""
        self._store = Store.open(self._settings.store.root, self._settings)
        return create_app(self._store, self._settings, self._keys, self._reopen)

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

    def _worker_exit(self, _arbiter: Any, _worker: Any) -> None:
        if self._store is not None:
            self._store.close()
