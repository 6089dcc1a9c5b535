"""Request bodies: read once, in bounded memory, never for ever (invariant 11).

`RequestBody` takes the place of gunicorn's body object, so it is `wsgi.input` to the app
and the body that gunicorn's parser drains before the next request of the connection.

Why: gunicorn copies each byte of a body about five times between its buffers. Where the
length is known and the socket is plain, the bytes may go from the kernel straight into the
caller's buffer, after the few that came with the head. Chunked bodies keep gunicorn's
decoder: there the framing must be read anyway.

Waiting for the sender is done outside the working slot (`gateway.pool`): bytes that are
there are taken at once, and only a read that has to wait gives the slot away for so long.

What is stored goes to the disk as it comes, at the pace of its sender. What must be whole before
anything can be done with it (JSON, the call of a webhook) is held in memory: it has an end in
time, and what a process holds of such bodies has a limit (`gateway.room`).
"""

from __future__ import annotations

import io
import math
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final, Protocol, TypeVar, final

import gunicorn
from gunicorn import http
from gunicorn.http import errors as gunicorn_errors
from gunicorn.http.body import LengthReader
from gunicorn.http.unreader import SocketUnreader

from cas.errors import BlobcaskError, InvalidRequest, TooLarge
from gateway.room import Holder, Place, Room

GUNICORN_VERSION: Final = "27.0.1"  # the one whose insides are known here

# Without one byte for this long the sender is taken for gone. Also SO_RCVTIMEO of the
# socket: a blocking read with MSG_WAITALL is one system call per buffer, where a socket
# with a Python timeout needs poll and recv for each segment that arrives.
IDLE_S: Final = 30.0
# Who trickles is never idle, so there is a least rate too ([gateway] min_rate); judged only
# after this much waiting, so that small bodies know nothing but IDLE_S.
PATIENCE_S: Final = 60.0
BYTES_PER_S_MIN: Final = 512  # where no settings say otherwise
# A body that is held in memory must end, whatever its rate: after so much waiting, and the time
# that its length takes at the rate of a poor line (128 kbit/s).
HELD_S: Final = 30.0
HELD_BYTES_PER_S: Final = 16 << 10
# What an unread rest may cost to keep a connection alive; more is closed instead.
DRAIN_BYTES_MAX: Final = 64 * 1024
# One read of the plain path: large enough that the calls cost nothing.
_STEP_BYTES: Final = 256 * 1024
# What a small body's sender gets before it has sent anything. Who has sent so much gets as much
# again: memory is for bytes that came, whatever was announced. What is above the first takes room.
_FIRST_BYTES: Final = 64 * 1024
# Whose a body is before anybody has looked where it comes from.
_NOBODY: Final = Holder("")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

T = TypeVar("T")

# Enters a wait for a client, outside the working slot.
Waiting = Callable[[], AbstractContextManager[object]]


class BodyTruncated(BlobcaskError):
    """The sender ended or broke the body before its announced end."""

    def __init__(self, received_bytes: int, promised_bytes: int | None) -> None:
        of = "" if promised_bytes is None else f" of {promised_bytes}"
        super().__init__(f"the body ended after {received_bytes}{of} bytes")
        self.received_bytes = received_bytes
        self.promised_bytes = promised_bytes


class BodyTooSlow(BlobcaskError, TimeoutError):
    """The sender paused too long, or stayed under the minimum rate. A TimeoutError too,
    since gunicorn's draining of a body expects one and then closes the connection."""

    def __init__(self, received_bytes: int) -> None:
        super().__init__(f"too slow: {received_bytes} bytes received")
        self.received_bytes = received_bytes


@final
class Pace:
    """The patience with one client, who sends or takes bytes. Only time spent waiting for
    it counts: a slow disk on our side is not its fault."""

    __slots__ = ("_bytes_per_s_min", "_waited_s", "_waited_s_max", "moved_bytes")

    def __init__(self, bytes_per_s_min: int = BYTES_PER_S_MIN) -> None:
        """`bytes_per_s_min` 0 is no least rate."""
        self._bytes_per_s_min = bytes_per_s_min
        self._waited_s = 0.0
        self._waited_s_max = math.inf
        self.moved_bytes = 0

    def must_end(self, length_bytes: int) -> None:
        """So many bytes are all that comes, and they are held in memory meanwhile."""
        self._waited_s_max = HELD_S + length_bytes / HELD_BYTES_PER_S

    def moved(self, count: int, waited_s: float) -> None:
        """Account for bytes and the wait for them; raises BodyTooSlow when the patience is
        spent."""
        self._waited_s += waited_s
        self.moved_bytes += count
        too_few = self.moved_bytes < (self._waited_s - PATIENCE_S) * self._bytes_per_s_min
        if too_few or self._waited_s > self._waited_s_max:
            raise BodyTooSlow(self.moved_bytes)


@final
class PacedUnreader(SocketUnreader):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's reader of a connection, with the pace kept under the chunk decoder too:
    above it, one call may wait for as many trickled bytes as it was asked for."""

    def __init__(
        self,
        sock: socket.socket,
        waiting: Waiting = nullcontext,
        bytes_per_s_min: int = BYTES_PER_S_MIN,
    ) -> None:
        super().__init__(sock)
        self._waiting = waiting
        self._bytes_per_s_min = bytes_per_s_min
        self.pace = Pace(bytes_per_s_min)
        self._wakeup: int | None = None  # an eventfd

    def begin_body(self) -> None:
        """Each body has a patience of its own."""
        self.pace = Pace(self._bytes_per_s_min)

    def open_wakeup(self) -> None:
        """From now on, until `close_wakeup`, `wake` ends the wait for more; raises OSError."""
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        """Have a read that waits, or would have to, raise BodyTooSlow. The socket is left as it
        is: what is under way can be thrown away later, where a reset would destroy the answer.

        In any thread, between these two."""
        assert self._wakeup is not None
        os.eventfd_write(self._wakeup, 1)

    def close_wakeup(self) -> None:
        assert self._wakeup is not None
        wakeup, self._wakeup = self._wakeup, None
        os.close(wakeup)

    def chunk(self, size_hint: int | None = None) -> bytes:
        size = min(max(size_hint or 0, self.mxchunk), self.max_body_chunk)

        def receive(flags: int) -> bytes:
            data: bytes = self.sock.recv(size, flags)
            return data

        return self._receive(receive, 0, len)

    def receive_into(self, view: memoryview) -> int:
        """Take what is there, or else wait for `view` to be full; may return less.

        Returns 0 at the end; raises BodyTooSlow, OSError.
        """

        def receive(flags: int) -> int:
            count: int = self.sock.recv_into(view, 0, flags)
            return count

        return self._receive(receive, socket.MSG_WAITALL, int)

    def _receive(self, receive: Callable[[int], T], wait: int, size: Callable[[T], int]) -> T:
        if self.sock.gettimeout() is None:  # else Python itself waits before it looks
            with suppress(BlockingIOError):
                received = receive(socket.MSG_DONTWAIT)
                self.pace.moved(size(received), 0.0)
                return received
        with self._waiting():
            began = time.monotonic()
            try:
                if self._wakeup is not None:
                    self._await(self._wakeup)
                    wait = 0  # for all that was asked for it would not be woken
                received = receive(wait)
            except (BlockingIOError, TimeoutError):
                raise BodyTooSlow(self.pace.moved_bytes) from None
            waited_s = time.monotonic() - began
        self.pace.moved(size(received), waited_s)
        return received

    def _await(self, wakeup: int) -> None:
        """Until anything has come; raises TimeoutError where it is woken, or after IDLE_S."""
        poller = select.poll()
        for end in (wakeup, self.sock.fileno()):
            poller.register(end, select.POLLIN)
        if self.sock.fileno() not in dict(poller.poll(IDLE_S * 1000)):
            raise TimeoutError


@final
class RequestBody(io.RawIOBase):
    """The body of one HTTP/1.x request on its connection.

    `readinto(buffer)` returns the bytes read, 0 at the end; raises BodyTruncated and
    BodyTooSlow, after which the connection is closed and never used for another request.
    """

    def __init__(
        self,
        request: Any,
        unreader: PacedUnreader,
        *,
        direct: bool,
        room: Room | None = None,
        whose: Holder = _NOBODY,
    ) -> None:
        """What is held of it takes `room`, one of its own without any."""
        self._request = request
        self._unreader = unreader
        self._room = Room() if room is None else room
        # For whom it would take room. Whoever finds out who asks says so.
        self.whose = whose
        self._place: Place | None = None  # in the room
        self._plain = request.body
        reader = self._plain.reader
        self.length_bytes: int | None = reader.length if isinstance(reader, LengthReader) else None
        # A subclass (TLS) decodes what the kernel holds: only the class itself is plain.
        self._direct = (
            direct and self.length_bytes is not None and type(unreader.sock) is socket.socket
        )
        self.received_bytes = 0  # how much of the body has been read
        self.ended = self.length_bytes == 0  # the next byte belongs to the next request
        self.failed = False  # gunicorn closes a connection whose body failed
        # Told of each read, by which it may end the body: see `gateway.limits`.
        self.on_received: Callable[[int], None] = lambda _count: None
        unreader.begin_body()
        # gunicorn would invite the body before the app has looked at the head; refused
        # uploads should not be sent at all.
        self._invite = bool(request._expected_100_continue)
        request._expected_100_continue = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        if self.ended or not len(view):
            return 0
        try:
            if self._invite:
                self._send_invitation()
            count = self._receive(view) if self._direct else self._copy(view)
        except BaseException:
            self._fail()
            self._end_of_patience()
            raise
        self.received_bytes += count
        if count == 0 or self.received_bytes == self.length_bytes:
            self.ended = True
            if self._place is not None:
                self._room.keep(self._place)
        self.on_received(count)
        return count

    def hold(self, size_bytes: int, of_bytes: int) -> None:
        """So many bytes of it, `of_bytes` at most in the end, are about to be held in memory,
        until `let_go`; raises NoRoom, BodyTooSlow where it has given way to others, and
        OSError where there is no descriptor."""
        self._unreader.pace.must_end(of_bytes)
        wanted_bytes = size_bytes - _FIRST_BYTES
        if wanted_bytes <= 0:
            return
        if self._place is None:
            self._unreader.open_wakeup()
            self._place = Place(self.whose, self._unreader.wake)
        self._end_of_patience()
        self._room.take(self._place, wanted_bytes - self._place.size_bytes)

    def let_go(self) -> None:
        """Nothing of it is held any more."""
        if self._place is not None:
            self._room.give_back(self._place)
            self._place = None
            self._unreader.close_wakeup()  # which nobody writes to any more

    def settle(self) -> None:
        """Decide, before the answer goes out, whether the connection can live on: a rest
        that is too long to drain, or was never invited, would be read as a request."""
        if self.ended:
            return
        rest = None if self.length_bytes is None else self.length_bytes - self.received_bytes
        if self._invite or rest is None or rest > DRAIN_BYTES_MAX:
            self._fail()

    def _send_invitation(self) -> None:
        """At once or not at all: who has not read the answers before it, with which our
        side's buffer is full, must not have a slot wait for that (invariant 11)."""
        self._invite = False
        try:
            sent = self._unreader.sock.send(_CONTINUE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            raise BodyTruncated(0, self.length_bytes) from None
        if sent < len(_CONTINUE):
            raise BodyTooSlow(0)

    def _end_of_patience(self) -> None:
        """Raise BodyTooSlow where it gives way to others."""
        if self._place is not None and self._place.left is not None:
            self._fail()
            raise BodyTooSlow(self.received_bytes) from None

    def _fail(self) -> None:
        self.failed = True
        self._request.force_close()

    def _receive(self, view: memoryview) -> int:
        assert self.length_bytes is not None
        rest = self.length_bytes - self.received_bytes
        view = view[:rest]
        if buffered := self._unreader.take_buffered():
            count = min(len(view), len(buffered))
            view[:count] = buffered[:count]
            self._unreader.unread(buffered[count:])  # more of this body, or the next request
            return count
        try:
            count = self._unreader.receive_into(view)
        except ConnectionError:
            count = 0
        if count == 0:
            raise BodyTruncated(self.received_bytes, self.length_bytes)
        return count

    def _copy(self, view: memoryview) -> int:
        try:
            data: bytes = self._plain.read(min(len(view), _STEP_BYTES))
        except (gunicorn_errors.ParseException, gunicorn_errors.NoMoreData, ConnectionError):
            raise BodyTruncated(self.received_bytes, self.length_bytes) from None
        if not data and self.length_bytes is not None:
            raise BodyTruncated(self.received_bytes, self.length_bytes)
        view[: len(data)] = data
        return len(data)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@final
class _WsgiBody:
    """`wsgi.input` of any other server, bounded by Content-Length as PEP 3333 asks."""

    def __init__(self, source: _Readable, length_bytes: int | None) -> None:
        self._source = source
        self._rest = length_bytes or 0
        self.length_bytes = length_bytes

    def readinto(self, buffer: memoryview, /) -> int:
        data = self._source.read(min(len(buffer), self._rest))
        if not data and self._rest and len(buffer):
            raise BodyTruncated((self.length_bytes or 0) - self._rest, self.length_bytes)
        self._rest -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def hold(self, size_bytes: int, of_bytes: int) -> None:
        """What is held, and for how long, is that server's matter."""


def body_of(environ: Mapping[str, Any]) -> RequestBody | _WsgiBody:
    """The body of a request, ready to be a source of the store; nothing is read yet."""
    source = environ["wsgi.input"]
    if isinstance(source, RequestBody):
        return source
    length = environ.get("CONTENT_LENGTH") or ""
    return _WsgiBody(source, int(length) if length.isdecimal() else None)


def read_small(environ: Mapping[str, Any], limit_bytes: int) -> bytes:
    """The whole body of a request that must be small; raises TooLarge, BodyTruncated,
    BodyTooSlow and NoRoom.

    The memory of who has not sent all of it yet is about what came, and 64 KiB. One that gives
    way to others meanwhile (`gateway.room`) is too slow.
    """
    body = body_of(environ)
    length_bytes = body.length_bytes
    if length_bytes is not None and length_bytes > limit_bytes:
        raise TooLarge(limit_bytes)
    # One byte more than is allowed tells that it is too much, where nothing else does.
    end = limit_bytes + 1 if length_bytes is None else length_bytes
    held, size = bytearray(), 0
    while size < end:
        if size == len(held):
            more = min(_FIRST_BYTES, end - size)
            body.hold(size + more, end)
            held += bytes(more)
        with memoryview(held) as view, view[size:] as room:
            count = body.readinto(room)
        if count == 0:
            break
        size += count
    if size > limit_bytes:
        raise TooLarge(limit_bytes)
    return bytes(memoryview(held)[:size])


def refuse_encodings(environ: Mapping[str, Any]) -> None:
    """Only the bytes themselves are stored: raises InvalidRequest for a coded or partial body."""
    if environ.get("HTTP_CONTENT_ENCODING", "identity") != "identity":
        raise InvalidRequest("Content-Encoding", "send the bytes as they are")
    if "HTTP_CONTENT_RANGE" in environ:  # RFC 9110, 14.5: never store a part as the whole
        raise InvalidRequest("Content-Range", "a part of a file cannot be stored")


def prove_body_path(cfg: Any) -> str | None:
    """Read one body straight from a socket through a real parser, with the start of it in
    the parser's buffer and another request behind it. None when all is as expected, else
    the reason why bodies must take the plain path."""
    if gunicorn.__version__ != GUNICORN_VERSION:
        return f"gunicorn {gunicorn.__version__} is not the known {GUNICORN_VERSION}"
    body = bytes(range(256)) * 64
    head = b"PUT /a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(1.0)
        theirs.sendall(head + body + b"GET /b HTTP/1.1\r\nHost: a\r\n\r\n")
        try:
            parser = http.get_parser(cfg, ours, ("127.0.0.1", 0))
            parser.unreader = PacedUnreader(ours)
            request = next(parser)
            request.body = RequestBody(request, parser.unreader, direct=True)
            received = request.body.read(len(body)) + request.body.readall()
            following = next(parser)
        except Exception as error:  # noqa: BLE001  whatever it is, the plain path works
            return f"self-test: {error!r}"
    if received != body:
        return "self-test: other bytes than were sent"
    if following.path != "/b":
        return "self-test: the next request was lost"
    return None
