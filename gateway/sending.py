"""Answers to clients: in as few packets as they need, and never for ever (invariant 11).

What the kernel's buffer takes at once is sent by the thread in its working slot; only where
the client must read first is the slot given away (`gateway.pool`). How fast a client reads
is seen in what it has acknowledged, not in what our kernel has taken: the buffer of a fast
connection gone slow may hold megabytes, and nothing more fits for minutes.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from typing import Any, Final, final

from gunicorn import util
from gunicorn.http.wsgi import Response

from gateway.body import Pace, Waiting

# A reader that takes nothing for so long is gone.
SEND_IDLE_S: Final = 30.0
# How often a waiting thread looks at what the client has acknowledged.
_LOOK_S: Final = 10.0
# Up to here a body is read and sent with its head: one system call, one packet or a few.
TOGETHER_BYTES_MAX: Final = 64 * 1024
_SENDFILE_BYTES_MAX: Final = 1 << 30


class ReaderTooSlow(TimeoutError):
    """The client takes the answer too slowly, or not at all."""


@final
class Outlet:
    """Sends one answer. `send` and `send_file` return when the kernel has all of it;
    they raise ReaderTooSlow, and OSError where the client is gone."""

    def __init__(self, sock: socket.socket, waiting: Waiting, pace: Callable[[], Pace]) -> None:
        self._sock = sock
        self._waiting = waiting
        self._new_pace = pace
        self._pace: Pace | None = None  # once it had to wait
        self._unread_bytes = 0

    def send(self, data: bytes, *, more: bool = False) -> None:
        """Send it all; `more` comes at once, so that it may share the last packet."""
        flags = socket.MSG_DONTWAIT | (socket.MSG_MORE if more else 0)
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view, flags) :]
            except BlockingIOError:
                self._wait()

    def send_file(self, fd: int, offset: int, count: int) -> None:
        """Send `count` bytes of a file by sendfile(2); raises EOFError when it is shorter."""
        self._sock.setblocking(False)
        end = offset + count
        while offset < end:
            try:
                sent = os.sendfile(
                    self._sock.fileno(), fd, offset, min(end - offset, _SENDFILE_BYTES_MAX)
                )
            except BlockingIOError:
                self._wait()
                continue
            if sent == 0:
                raise EOFError(f"a file ended {end - offset} bytes early")
            offset += sent

    def _wait(self) -> None:
        """Until the kernel takes more; raises ReaderTooSlow."""
        if self._pace is None:
            self._pace = self._new_pace()
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        with self._waiting():
            idle_s = 0.0
            self._unread_bytes = self._unread()
            began = time.monotonic()
            while not poller.poll(_LOOK_S * 1000):
                now = time.monotonic()
                idle_s = 0.0 if self._look(now - began) else idle_s + now - began
                if idle_s >= SEND_IDLE_S:
                    raise ReaderTooSlow
                began = now
        self._look(time.monotonic() - began)

    def _look(self, waited_s: float) -> int:
        """Account for what was read since the last look, and return it."""
        assert self._pace is not None
        unread_bytes = self._unread()
        read_bytes, self._unread_bytes = self._unread_bytes - unread_bytes, unread_bytes
        try:
            self._pace.moved(read_bytes, waited_s)
        except TimeoutError:
            raise ReaderTooSlow from None
        return read_bytes

    def _unread(self) -> int:
        """Bytes that the client has not acknowledged (SIOCOUTQ, which is TIOCOUTQ)."""
        held: bytes = ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
        (count,) = struct.unpack("i", held)
        return int(count)


@final
class Answer(Response):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's answer, with its head sent together with what follows it."""

    def __init__(self, req: Any, sock: socket.socket, cfg: Any, outlet: Outlet) -> None:
        super().__init__(req, sock, cfg)
        self.headers_sent = False  # or made, which is all that others need to know
        self._outlet = outlet
        self._head = b""  # made, but not sent yet

    def send_headers(self) -> None:
        if self.headers_sent:
            return
        lines = self.default_headers()
        lines.extend(f"{name}: {value}\r\n" for name, value in self.headers)
        self._head = "".join([*lines, "\r\n"]).encode("latin-1")
        self.headers_sent = True

    def sendfile(self, respiter: Any) -> bool:
        """The bytes of a file from where it stands, as many as the answer announces."""
        if self.response_length is None or not util.has_fileno(respiter.filelike):
            return False
        self.send_headers()
        if self._omits_body:
            return True
        fd, count = respiter.filelike.fileno(), self.response_length
        self._send_file(fd, os.lseek(fd, 0, os.SEEK_CUR), count)
        self.sent += count
        return True

    def close(self) -> None:
        self.send_headers()
        self._emit(b"0\r\n\r\n" if self.chunked else b"")

    def _send_file(self, fd: int, offset: int, count: int) -> None:
        if count > TOGETHER_BYTES_MAX:
            head, self._head = self._head, b""
            self._outlet.send(head, more=True)
            self._outlet.send_file(fd, offset, count)
            return
        data = os.pread(fd, count, offset)
        if len(data) < count:
            raise EOFError(f"a file ended {count - len(data)} bytes early")
        self._emit(data)

    def _emit_body(self, data: bytes) -> None:
        self._emit(b"%X\r\n%s\r\n" % (len(data), data) if self.chunked else data)

    def _emit(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if len(data) <= TOGETHER_BYTES_MAX:
            self._outlet.send(head + data)
        else:
            self._outlet.send(head, more=True)
            self._outlet.send(data)
