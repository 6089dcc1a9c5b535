"""An HTTP server that answers as a test says: for what the S3 server here does not do."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import msgspec


@final
class Asked(msgspec.Struct, frozen=True):
    """A request as it came."""

    method: str
    target: str  # path and query, as they were sent
    headers: dict[str, str]  # names in lower case
    body: bytes


@final
class Says(msgspec.Struct, frozen=True):
    """An answer; `date` is the server's clock, by its own."""

    status: int = 200
    headers: dict[str, str] = {}
    body: bytes = b""


Script = Callable[[Asked], Says]


@contextmanager
def answering(script: Script) -> Iterator[str]:
    """The address of a server on loopback that answers by `script`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            says = script(Asked(self.command, self.path, headers, self.rfile.read(size)))
            self.send_response_only(says.status)
            for name, value in {"content-length": str(len(says.body)), **says.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(says.body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815  http.server's

        def log_message(self, *_: Any) -> None:
            """A test's output is its own."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
