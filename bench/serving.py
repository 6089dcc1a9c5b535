"""A gateway in a process of its own, for the workloads over HTTP.

`python -m bench.serving` serves the ROOT of the environment's settings and prints its
address.

    --buffered   stock gunicorn's gthread worker, whose body object the same app then reads
                 as any WSGI app would: `wsgi.input` in reads of a MiB
    --drain      an app that reads the body as the gateway does and stores nothing, for what
                 receiving alone costs
    --bare       a Falcon app that answers "ok", under the very same gunicorn settings: what
                 any request costs before the gateway does something for it
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, final

import falcon
import msgspec

from bench.corpus import MIB
from cas.clock import SystemClock
from cas.config import Settings, StoreSettings
from cas.keys import load_keys
from cas.setting_sources import load_settings
from gateway.auth import ADMIN, Tokens
from gateway.body import body_of
from gateway.wsgi import Server

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

TENANT = "bench"
_BUFFERED = "--buffered"
_DRAIN = "--drain"
_BARE = "--bare"
_START_S = 30.0


@final
class Serving(msgspec.Struct, frozen=True):
    """A running gateway: where it listens, who may ask, and the process that answers."""

    root: Path
    host: str
    port: int
    token: str
    arbiter_pid: int

    @property
    def worker_pids(self) -> list[int]:
        """The processes that answer requests."""
        pid = self.arbiter_pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children]

    @property
    def worker_pid(self) -> int:
        """The one process that answers requests."""
        (child,) = self.worker_pids
        return child


@contextmanager
def serving(
    root: Path,
    *,
    workers: int = 1,
    buffered: bool = False,
    drain: bool = False,
    bare: bool = False,
) -> Iterator[Serving]:
    """Serve the store at `root` (made when it is absent) until the end of the block."""
    root.mkdir(parents=True, exist_ok=True)
    settings = Settings(store=StoreSettings(root=root))
    token = Tokens(load_keys(settings).jwt, SystemClock().now_us).issue(
        TENANT, "bench", (ADMIN,), 86_400
    )
    environ = {
        **{name: text for name, text in os.environ.items() if "BLOBCASK" not in name},
        "BLOBCASK_STORE__ROOT": str(root),
        "BLOBCASK_GATEWAY__BIND": "127.0.0.1:0",
        # Never reached, but counted against: what that costs is part of what is measured.
        "BLOBCASK_LIMITS__ADDRESS_REQUESTS": "1000000000/m",
        "BLOBCASK_LIMITS__TENANT_REQUESTS": "1000000000/m",
        "BLOBCASK_LIMITS__ADDRESS_CONNECTIONS": "1000000000",
        "BLOBCASK_GATEWAY__WORKERS": str(workers),
    }
    command = [sys.executable, "-m", "bench.serving"]
    flags = ((_BUFFERED, buffered), (_DRAIN, drain), (_BARE, bare))
    command += [flag for flag, wanted in flags if wanted]
    # Its log costs what it costs, but is not for whoever reads the table.
    with root.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(root.with_suffix(".log").read_text())
        host, _, port = address.removeprefix("http://").rpartition(":")
        _await_worker(host, int(port))
        yield Serving(root, host, int(port), token, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def _await_worker(host: str, port: int) -> None:
    """The listener is there before the worker: its first answer says that the store is open."""
    connection = http.client.HTTPConnection(host, port, timeout=_START_S)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    connection.close()


def drained(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """A WSGI app that reads the body, in the reads that storing makes, and drops it."""
    body, buffer, size_bytes = body_of(environ), memoryview(bytearray(MIB)), 0
    while count := body.readinto(buffer):
        size_bytes += count
    answer = msgspec.json.encode({"size_bytes": size_bytes})
    start_response("200 OK", [("Content-Length", str(len(answer)))])
    return [answer]


@final
class _Ok:
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.text = "ok"


def bare_app() -> falcon.App[falcon.Request, falcon.Response]:
    app = falcon.App()
    app.add_route("/", _Ok())
    app.add_route("/healthz", _Ok())
    return app


def main() -> None:
    settings = load_settings(None, os.environ)
    server = Server(settings, load_keys(settings), lambda address: print(address, flush=True))  # noqa: T201  # the answer
    if _BUFFERED in sys.argv:
        server.cfg.set("worker_class", "gthread")
    if _DRAIN in sys.argv:
        server.callable = drained
    if _BARE in sys.argv:
        server.callable = bare_app()
    server.run()


if __name__ == "__main__":
    main()
