"""What a person has at hand in these tests: files, a slow line, eyes for what the server has."""

from __future__ import annotations

import hashlib
import select
import socket
import threading
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, final

from playwright.sync_api import Page

from tests.gateway.served import Served, held_port

ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
}
PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"
LARGE_BYTES = 9_000_000  # more than the page sends in one request that cannot be resumed


class OpenPage(Protocol):
    def __call__(
        self,
        url: str,
        *,
        beside: Page | None = None,
        without: str = "",
        prefix: str = "",
        **options: Any,
    ) -> Page: ...


def write(folder: Path, name: str, data: bytes) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return str(path)


@final
class Line:
    """What a page sends is as slow as its line; what it receives is not.

    A change of speed lets out at once all that a request on its way still has to send.
    """

    def __init__(self, page: Page) -> None:
        self._session = page.context.new_cdp_session(page)
        self._session.send("Network.enable")

    def slow(self, bytes_per_s: int) -> None:
        rates = {"downloadThroughput": -1, "uploadThroughput": bytes_per_s}
        conditions = {"offline": False, "latency": 0, **rates}
        self._session.send("Network.emulateNetworkConditions", conditions)

    def free(self) -> None:
        self.slow(-1)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def info(served: Served, asked: dict[str, Any]) -> dict[str, Any]:
    return served.ask("GET", f"/api/v1/uploads/{asked['upload_token']}/info").form


def stored(served: Served, asked: dict[str, Any]) -> dict[str, str]:
    """The digests of the filled slots by filename."""
    return {file["filename"]: file["checksum_sha256"] for file in info(served, asked)["files"]}


@final
class Wire:
    """A way to the server that can be cut, can lose an answer, and all after so many bytes."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._lose = b""
        self._carried_bytes: int | None = None
        self.lost = threading.Event()  # something that was sent to the server
        held = ExitStack()
        self._near = ("127.0.0.1", held.enter_context(held_port()))
        weakref.finalize(self, held.close)
        self._open: set[socket.socket] = set()
        self.mend()
        self.address = f"http://127.0.0.1:{self._near[1]}"

    def lose_answer_to(self, method: str) -> None:
        """The next request of this method arrives, and its connection ends."""
        self._lose = method.encode() + b" "

    def carry_no_more_than(self, size_bytes: int) -> None:
        """So much of what a connection sends arrives; what comes after is lost unseen."""
        self._carried_bytes = size_bytes

    def cut(self) -> None:
        for sock in (self._listener, *self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def mend(self) -> None:
        self._listener = socket.create_server(self._near)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, socket.create_connection(self._server) as far:
            self._open |= {near, far}
            with suppress(OSError):
                self._exchange(near, far)
            self._open -= {near, far}

    def _exchange(self, near: socket.socket, far: socket.socket) -> None:
        doomed = False
        came_bytes = 0
        while True:
            for source in select.select([near, far], [], [])[0]:
                data = source.recv(65536)
                if source is near and self._lose and data.startswith(self._lose):
                    doomed, self._lose = True, b""
                if not data or (doomed and source is far):
                    return
                if source is near and self._carried_bytes is not None:
                    came_bytes += len(data)
                    if came_bytes > self._carried_bytes:
                        self.lost.set()
                        continue
                (far if source is near else near).sendall(data)
