"""Bodies from the socket: every byte once, nothing of the next request, no endless wait.

Invariant 11: no request holds a worker for ever.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from gunicorn import http
from gunicorn.config import Config
from hypothesis import given
from hypothesis import strategies as st

from cas.errors import TooLarge
from gateway.body import (
    BYTES_PER_S_MIN,
    DRAIN_BYTES_MAX,
    HELD_BYTES_PER_S,
    HELD_S,
    PATIENCE_S,
    BodyTooSlow,
    BodyTruncated,
    Pace,
    PacedUnreader,
    RequestBody,
    prove_body_path,
    read_small,
)
from gateway.room import Holder, NoRoom, Place, Room

ANN = Holder("ann", is_believed=True)
FOLLOWING = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"


class Wire:
    """A connection with a real gunicorn parser on our end of it."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(60.0)
        self.parser = http.get_parser(Config(), self.ours, ("127.0.0.1", 0))
        self.parser.unreader = PacedUnreader(self.ours)

    def body(self, *, direct: bool, room: Room | None = None, whose: Holder = ANN) -> RequestBody:
        """The body of the next request that was sent."""
        request = next(self.parser)
        request.body = RequestBody(
            request, self.parser.unreader, direct=direct, room=room, whose=whose
        )
        body: RequestBody = request.body
        return body

    def send(self, data: bytes) -> None:
        """All of it, or until our end is closed."""
        with suppress(OSError):
            self.theirs.sendall(data)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def put(body: bytes, *more: str, length: int | None = None) -> bytes:
    lines = ["PUT /a HTTP/1.1", "Host: a", *more]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    head = b"PUT /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%X\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def read_all(body: Any, buffer_bytes: int) -> bytes:
    """As the store reads: again and again into the same buffer."""
    buffer, read = memoryview(bytearray(buffer_bytes)), bytearray()
    while count := body.readinto(buffer):
        read += buffer[:count]
    return bytes(read)


def test_the_known_gunicorn_passes_the_self_test() -> None:
    assert prove_body_path(Config()) is None


@given(
    st.binary(max_size=40_000),
    st.integers(1, 9_000),
    st.booleans(),
    st.lists(st.integers(1, 20_000), max_size=4),
)
def test_a_body_is_read_whole_and_the_next_request_is_left(
    data: bytes, buffer_bytes: int, direct: bool, cuts: list[int]
) -> None:
    wire = Wire()
    try:
        # Sent in pieces of any size: some of it comes with the head, some later.
        sent = put(data) + FOLLOWING
        for cut in cuts:
            wire.theirs.sendall(sent[:cut])
            sent = sent[cut:]
        wire.theirs.sendall(sent)
        body = wire.body(direct=direct)
        assert body.length_bytes == len(data)
        assert read_all(body, buffer_bytes) == data
        assert body.readinto(bytearray(1)) == 0
        assert next(wire.parser).path == "/next"
    finally:
        wire.close()


def test_a_chunked_body_has_no_length_and_is_read_whole(wire: Wire) -> None:
    wire.theirs.sendall(chunked(b"one", b"t" * 9_000, b"3") + FOLLOWING)
    body = wire.body(direct=True)
    assert body.length_bytes is None
    assert read_all(body, 4_096) == b"one" + b"t" * 9_000 + b"3"
    assert next(wire.parser).path == "/next"


@pytest.mark.parametrize("direct", [True, False])
def test_a_sender_that_leaves_early_is_noticed(wire: Wire, direct: bool) -> None:
    wire.theirs.sendall(put(b"half", length=8))
    wire.theirs.shutdown(socket.SHUT_WR)
    body = wire.body(direct=direct)
    with pytest.raises(BodyTruncated):
        read_all(body, 1_024)
    assert body.failed


@pytest.mark.parametrize(
    "broken", [b"5\r\nab", b"zz\r\n", b"2\r\nabXX0\r\n\r\n", b"2\r\nab\r\n0\r\n"]
)
def test_broken_chunks_are_an_incomplete_body(wire: Wire, broken: bytes) -> None:
    head = b"PUT /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire.theirs.sendall(head + broken)
    wire.theirs.shutdown(socket.SHUT_WR)
    body = wire.body(direct=True)
    with pytest.raises(BodyTruncated):
        read_all(body, 1_024)
    assert body.failed


@pytest.mark.parametrize("direct", [True, False])
def test_a_silent_sender_is_given_up(wire: Wire, direct: bool) -> None:
    wire.theirs.sendall(put(b"half", length=8))
    body = wire.body(direct=direct)
    # What the worker does with IDLE_S: a blocking socket whose reads end by themselves.
    wire.ours.setblocking(True)
    wire.ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 20_000))
    with pytest.raises(BodyTooSlow):
        read_all(body, 1_024)
    assert body.failed


def test_a_trickling_sender_is_given_up_after_some_patience() -> None:
    pace = Pace()
    for _ in range(int(PATIENCE_S)):
        pace.moved(1, 1.0)
    with pytest.raises(BodyTooSlow):
        pace.moved(1, 2.0)


def test_a_slow_link_is_not_too_slow() -> None:
    pace = Pace()
    for _ in range(10_000):
        pace.moved(BYTES_PER_S_MIN, 1.0)


def test_the_body_is_invited_when_it_is_wanted_and_not_before(wire: Wire) -> None:
    wire.theirs.sendall(put(b"", "Expect: 100-continue", length=2))
    body = wire.body(direct=True)
    wire.theirs.settimeout(0.01)
    with pytest.raises(TimeoutError):
        wire.theirs.recv(100)
    wire.theirs.sendall(b"ab")
    assert read_all(body, 10) == b"ab"
    assert wire.theirs.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_an_invitation_that_finds_no_room_ends_the_body_and_waits_for_nobody(
    wire: Wire,
) -> None:
    """Whoever asks again and again and reads no answer fills our buffer (invariant 11)."""
    wire.theirs.sendall(put(b"", "Expect: 100-continue", length=2) + b"ab")
    body = wire.body(direct=True)
    wire.ours.setblocking(True)
    wire.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 60, 0))
    with suppress(BlockingIOError):
        while True:
            wire.ours.send(bytes(1 << 16), socket.MSG_DONTWAIT)
    began = time.monotonic()
    with pytest.raises(BodyTooSlow):
        body.readinto(bytearray(10))
    assert time.monotonic() - began < 30
    assert body.failed
    assert wire.parser.mesg.should_close()


def test_a_sender_that_left_before_the_invitation_has_sent_no_body(wire: Wire) -> None:
    wire.theirs.sendall(put(b"", "Expect: 100-continue", length=2))
    body = wire.body(direct=True)
    wire.ours.setblocking(True)
    wire.theirs.close()
    with pytest.raises(BodyTruncated):
        body.readinto(bytearray(10))
    assert body.failed


def test_an_uninvited_body_ends_the_connection(wire: Wire) -> None:
    wire.theirs.sendall(put(b"", "Expect: 100-continue", length=2))
    body = wire.body(direct=True)
    body.settle()
    assert wire.parser.mesg.should_close()


@pytest.mark.parametrize(
    ("unread_bytes", "closes"), [(0, False), (DRAIN_BYTES_MAX, False), (DRAIN_BYTES_MAX + 1, True)]
)
def test_a_long_unread_rest_ends_the_connection(
    wire: Wire, unread_bytes: int, closes: bool
) -> None:
    wire.theirs.sendall(put(b"", length=unread_bytes))
    wire.body(direct=True).settle()
    assert wire.parser.mesg.should_close() is closes


# --- small bodies, which are held in memory

LIMIT_BYTES = 16 << 20


def wanted(body: RequestBody, limit_bytes: int = LIMIT_BYTES) -> bytes:
    return read_small({"wsgi.input": body}, limit_bytes)


@given(
    data=st.binary(max_size=300).map(lambda some: some * 1_000),
    limit_bytes=st.integers(0, 300_000),
    is_chunked=st.booleans(),
    direct=st.booleans(),
)
def test_a_small_body_is_read_whole_or_refused_as_too_large(
    data: bytes, limit_bytes: int, is_chunked: bool, direct: bool
) -> None:
    wire = Wire()
    sent = (chunked(data) if is_chunked and data else put(data)) + FOLLOWING
    sender = threading.Thread(target=wire.send, args=(sent,))
    sender.start()
    try:
        body = wire.body(direct=direct)
        if len(data) > limit_bytes:
            with pytest.raises(TooLarge):
                wanted(body, limit_bytes)
        else:
            assert wanted(body, limit_bytes) == data
            assert body.ended
            assert next(wire.parser).path == "/next"
    finally:
        wire.close()
        sender.join()


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 131_072, 131_073, 200_000])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_small_body_as_long_as_allowed_is_taken_and_one_byte_more_is_not(
    size: int, is_chunked: bool
) -> None:
    for limit_bytes in (size, size - 1):
        wire = Wire()
        data = b"x" * size
        sent = (chunked(data) if is_chunked and data else put(data)) + FOLLOWING
        sender = threading.Thread(target=wire.send, args=(sent,))
        sender.start()
        try:
            body = wire.body(direct=True)
            if limit_bytes == size:
                assert wanted(body, limit_bytes) == data
                assert next(wire.parser).path == "/next"
            else:
                with pytest.raises(TooLarge):
                    wanted(body, limit_bytes)
        finally:
            wire.close()
            sender.join()


@pytest.mark.parametrize(
    "sent",
    [
        put(b"{", length=2),
        put(b"{", length=LIMIT_BYTES),
        b"PUT /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    ],
)
@pytest.mark.parametrize("direct", [True, False])
def test_memory_is_for_bytes_that_came_and_not_for_those_announced(
    wire: Wire, sent: bytes, direct: bool
) -> None:
    """Before anything is known of who sends: hundreds of connections cost next to nothing."""
    wire.theirs.sendall(sent)
    wire.theirs.shutdown(socket.SHUT_WR)
    body = wire.body(direct=direct)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTruncated):
            wanted(body)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 2 << 20  # gunicorn asks the kernel for up to 1 MiB, which is never touched


MANY_BYTES = 300_000  # of a body; all but the first 64 KiB take room
ROOM_BYTES = MANY_BYTES - (64 << 10)


def sent_by(wire: Wire, data: bytes) -> threading.Thread:
    sender = threading.Thread(target=wire.send, args=(data,))
    sender.start()
    return sender


class Wakeups:
    """By which those can be woken that wait for what is held."""

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.closed: list[int] = []


@pytest.fixture
def wakeups(monkeypatch: pytest.MonkeyPatch) -> Wakeups:
    seen, eventfd, close = Wakeups(), os.eventfd, os.close

    def opens(value: int, flags: int) -> int:
        seen.opened.append(eventfd(value, flags))
        return seen.opened[-1]

    def closes(fd: int) -> None:
        close(fd)
        seen.closed.append(fd)

    monkeypatch.setattr("gateway.body.os.eventfd", opens)
    monkeypatch.setattr("gateway.body.os.close", closes)
    return seen


@pytest.mark.parametrize("is_chunked", [True, False])
def test_what_is_held_of_a_body_takes_room_until_it_is_let_go(
    wire: Wire, wakeups: Wakeups, is_chunked: bool
) -> None:
    room = Room(4 * MANY_BYTES)
    data = b"x" * MANY_BYTES
    sender = sent_by(wire, chunked(data) if is_chunked else put(data))
    body = wire.body(direct=True, room=room, whose=ANN)
    assert wanted(body, 2 * MANY_BYTES) == data
    sender.join()
    # Of a length that nobody announced there may be a little more.
    assert ROOM_BYTES <= room.held_bytes <= ROOM_BYTES + is_chunked * (64 << 10)
    body.whose = Holder("somebody")  # known only now, as of the call of a webhook
    body.let_go()
    assert room.held_bytes == 0
    assert len(wakeups.opened) == 1
    assert wakeups.opened[0] in wakeups.closed
    room.take(Place(ANN, lambda: None), 2 * MANY_BYTES)
    body.let_go()
    assert room.held_bytes == 2 * MANY_BYTES


def test_a_body_that_nobody_has_room_for_is_refused_and_small_ones_are_read_on(
    wire: Wire, wakeups: Wakeups
) -> None:
    room = Room(4 * MANY_BYTES)
    room.take(Place(ANN, lambda: None), 2 * MANY_BYTES)
    sender = sent_by(wire, put(b"x" * MANY_BYTES))
    body = wire.body(direct=True, room=room, whose=ANN)
    with pytest.raises(NoRoom):
        wanted(body)
    body.let_go()
    assert room.held_bytes == 2 * MANY_BYTES
    assert len(wakeups.opened) == 1
    assert wakeups.opened[0] in wakeups.closed
    body.settle()
    assert wire.parser.mesg.should_close()  # its rest is not worth reading
    wire.ours.close()
    sender.join()

    other = Wire()
    try:
        other.theirs.sendall(put(b"{}"))
        assert wanted(other.body(direct=True, room=room, whose=ANN)) == b"{}"
    finally:
        other.close()
    assert len(wakeups.opened) == 1  # what takes no room needs none


def test_room_is_for_bytes_that_came(wire: Wire) -> None:
    """Whoever announces much, and sends half of it, takes no room for the other half."""
    room = Room(4 * MANY_BYTES)
    wire.theirs.sendall(put(b"x" * (128 << 10), length=LIMIT_BYTES))
    wire.theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(BodyTruncated):
        wanted(wire.body(direct=True, room=room))
    assert room.held_bytes == 128 << 10


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_body_that_gives_way_while_its_sender_pauses_ends_at_once(is_chunked: bool) -> None:
    """With an answer that its sender can read."""
    room, data = Room(400_000), b"x" * 100_000
    wire, other = Wire(), Wire()
    waits, answered = threading.Event(), threading.Event()

    @contextmanager
    def waiting() -> Iterator[None]:
        if room.held_bytes:
            waits.set()
        yield

    def first() -> None:
        try:
            with pytest.raises(BodyTooSlow) as slow:
                wanted(body)
            assert 0 < slow.value.received_bytes <= len(data)
            assert body.failed
            wire.ours.sendall(b"408")
            answered.set()
        finally:
            body.let_go()

    try:
        wire.ours.setblocking(True)
        wire.parser.unreader = PacedUnreader(wire.ours, waiting)
        begun = (
            chunked(data).removesuffix(b"0\r\n\r\n") if is_chunked else put(data, length=200_000)
        )
        sender = sent_by(wire, begun)
        body = wire.body(direct=True, room=room, whose=Holder("192.0.2.7"))
        reader = threading.Thread(target=first)
        reader.start()
        sender.join()
        assert waits.wait(60)
        following = sent_by(other, put(b"x" * 150_000))
        assert wanted(other.body(direct=True, room=room, whose=Holder("192.0.2.7")))
        following.join()
        assert answered.wait(60)
        reader.join()
        assert wire.theirs.recv(3) == b"408"
        # Who goes on sending meets no reset, which would destroy the answer.
        wire.theirs.sendall(b"more")
        assert wire.ours.recv(4) == b"more"
        assert room.held_bytes == 150_000 - (64 << 10)
    finally:
        wire.close()
        other.close()


class Counting(socket.socket):
    """Our end of a connection, which tells how much was read there."""

    def __init__(self, sock: socket.socket, on_received: Callable[[int], None]) -> None:
        super().__init__(fileno=sock.detach())
        self.setblocking(True)
        self.received_bytes = 0
        self.on_received = on_received

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        data = super().recv(min(size, 1_000), flags)
        self.received_bytes += len(data)
        self.on_received(self.received_bytes)
        return data


def test_a_body_that_came_whole_is_answered_though_it_was_to_give_way(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, stranger = Room(4 * MANY_BYTES), Holder("192.0.2.7")
    data = put(b"x" * MANY_BYTES)

    def refused() -> None:
        with pytest.raises(NoRoom):
            room.take(Place(stranger, lambda: None), MANY_BYTES)

    other = threading.Thread(target=refused)
    told, wake = threading.Event(), PacedUnreader.wake

    def told_to(unreader: PacedUnreader) -> None:
        wake(unreader)
        told.set()

    monkeypatch.setattr(PacedUnreader, "wake", told_to)

    def ask_for_room(received_bytes: int) -> None:
        if received_bytes == len(data):  # nobody else has looked at the last of them yet
            other.start()
            assert told.wait(60)

    wire.ours = Counting(wire.ours, ask_for_room)
    wire.parser.unreader = PacedUnreader(wire.ours)
    sender = sent_by(wire, data)
    body = wire.body(direct=True, room=room, whose=stranger)
    assert wanted(body) == b"x" * MANY_BYTES
    sender.join()
    other.join()
    assert room.held_bytes == ROOM_BYTES
    body.let_go()
    # Its connection lives on.
    wire.theirs.sendall(FOLLOWING)
    assert next(wire.parser).path == "/next"


def test_a_body_that_is_stored_takes_no_room(wire: Wire, wakeups: Wakeups) -> None:
    sender = sent_by(wire, put(b"x" * MANY_BYTES))
    body = wire.body(direct=True, room=Room(0))
    assert read_all(body, 1 << 20) == b"x" * MANY_BYTES
    sender.join()
    assert not wakeups.opened


def test_a_body_that_is_held_must_end_whatever_its_rate() -> None:
    pace = Pace()
    pace.must_end(10 * HELD_BYTES_PER_S)
    for _ in range(int(HELD_S) + 10):
        pace.moved(BYTES_PER_S_MIN, 1.0)
    with pytest.raises(BodyTooSlow):
        pace.moved(BYTES_PER_S_MIN, 1.0)


@pytest.mark.parametrize(
    ("beginning", "rest"),
    [
        (put(b"half", length=8), b"rest"),
        (chunked(b"half").removesuffix(b"0\r\n\r\n"), b"4\r\nrest\r\n0\r\n\r\n"),
    ],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("is_held", [True, False])
def test_only_of_a_body_that_is_held_the_time_has_an_end(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, beginning: bytes, rest: bytes, is_held: bool
) -> None:
    """Who sends what is stored may pause for as long as anything comes."""
    monkeypatch.setattr("gateway.body.HELD_S", 0.0)
    monkeypatch.setattr("gateway.body.HELD_BYTES_PER_S", float("inf"))

    @contextmanager
    def waiting() -> Iterator[None]:
        wire.theirs.sendall(rest)
        yield

    wire.ours.setblocking(True)
    wire.parser.unreader = PacedUnreader(wire.ours, waiting)
    wire.theirs.sendall(beginning)
    body = wire.body(direct=True)
    if is_held:
        with pytest.raises(BodyTooSlow):
            wanted(body)
        assert body.failed
    else:
        assert read_all(body, 4_096) == b"halfrest"
