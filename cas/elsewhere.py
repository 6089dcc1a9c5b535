"""Elsewhere: bytes that are not here are asked of the background process, which fetches them.

    ROOT/replicator.sock    a stream socket, 0600; one question a connection, a line of JSON

    fetch     the bytes of a blob: the answer is a descriptor of the copy that grows here, and
              lines that tell how far it has grown, until its SHA-256 is verified
    copied    wait until the copy at the target "primary" is done (`storage_type = s3`)

Whoever reads gets bytes while they come, but never the last one of what it asked for before
the whole is verified: wrong or broken-off bytes end in an error, and never in a body that
looks whole. A reader takes the bytes from the file at its own pace, so a slow one holds up
nobody, and nothing is held in memory.

Where the disk itself is full, so that there is no copy, the bytes come over the socket
instead, and again the last one only when all were verified.

A background process that is just starting is waited for, `START_S` at most; where none has the
place and none is expected, nobody waits.

Every wait here has an end (invariant 11): `SILENT_S` without a word is an error.
"""

from __future__ import annotations

import array
import io
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final, Literal, final

import msgspec

from cas.background import runs
from cas.digest import Digest
from cas.errors import BlobElsewhere, CopyUnconfirmed

SOCKET: Final = "replicator.sock"
QUESTION_BYTES_MAX: Final = 1024

# What waits longer than this for a word is told that there is none.
SILENT_S: Final = 30.0
# How long one that has the place, and does not listen yet, may take to open the store.
START_S: Final = 5.0
# How long after the start of a server the one beside it may take to have the place.
EXPECTED_S: Final = 5.0
_START_LOOK_S: Final = 0.05
_CONNECT_S: Final = 5.0
# For the copy at the bucket: this long, and longer the more bytes there are.
_COPY_S: Final = 60.0
_COPY_BYTES_PER_S: Final = 4 << 20
_HEARD_BYTES: Final = 4096
_SKIP_BYTES: Final = 256 << 10

FETCH: Final = "fetch"
COPIED: Final = "copied"


@final
class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is asked; `digest` as hex."""

    verb: Literal["fetch", "copied"]
    digest: str
    anew: bool = False  # of `copied`: send the bytes again, even where the copy is done


FILE: Final = "file"  # a descriptor came with this word: the copy, which begins anew
GROWN: Final = "grown"  # `size_bytes` of it are there; 0 before it: the fetch waits its turn
STREAM: Final = "stream"  # all bytes follow on this connection
WHOLE: Final = "whole"  # the copy is complete, and verified
DONE: Final = "done"  # the answer to `copied`
FAILED: Final = "failed"  # `reason`


@final
class Word(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the answer."""

    kind: Literal["file", "grown", "stream", "whole", "done", "failed"]
    size_bytes: int = 0
    reason: str = ""


@contextmanager
def socket_path(root: Path) -> Iterator[str]:
    """The socket of `root` under a name that fits: addresses end at 108 bytes, paths do not."""
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET}"
    finally:
        os.close(folder)


@final
class Elsewhere:
    """Asks the background process of one ROOT. Safe for threads.

    `waiting` surrounds each wait for it: a gateway's thread lets others work meanwhile.
    """

    def __init__(
        self,
        root: Path,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        silent_s: float = SILENT_S,
        start_s: float = START_S,
    ) -> None:
        self._root = root
        self._silent_s = silent_s
        self._start_s = start_s
        self._expected_until_s = 0.0
        self._waiting = waiting

    def expect(self, seconds: float = EXPECTED_S) -> None:
        """Said at the start of a server: a background process is likely to start beside it."""
        self._expected_until_s = time.monotonic() + seconds

    def open(self, digest: Digest, size_bytes: int) -> Fetched:
        """The bytes of a blob, as they come; the caller's to close.

        Raises BlobElsewhere where nobody can fetch them now.
        """
        try:
            talk = self._ask(Question(FETCH, digest.hex()), self._silent_s)
        except OSError as error:
            raise BlobElsewhere(digest.hex(), _why(error)) from error
        return Fetched(digest, size_bytes, talk)

    def confirm(self, digest: Digest, size_bytes: int, *, anew: bool) -> None:
        """Return when the copy at the target "primary" is verified, which is made at once.

        `anew` sends the bytes although a copy is done, so that time tells a tenant who
        brings them nothing of others who had them (invariant 9). Raises CopyUnconfirmed.
        """
        name = digest.hex()
        try:
            talk = self._ask(Question(COPIED, name, anew), _COPY_S + size_bytes / _COPY_BYTES_PER_S)
            with talk:
                word, _ = talk.hear()
        except (OSError, ValueError) as error:
            raise CopyUnconfirmed(name, _why(error, "make it")) from error
        if word.kind != DONE:
            raise CopyUnconfirmed(name, word.reason or "it was not copied")

    def _ask(self, question: Question, patience_s: float) -> _Talk:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Blocking, with the kernel's time limits: only so does `connect` wait its turn.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_CONNECT_S))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(patience_s))
            with socket_path(self._root) as path, self._waiting():
                self._connect(sock, path)
                sock.sendall(msgspec.json.encode(question) + b"\n")
        except BaseException:
            sock.close()
            raise
        return _Talk(sock, self._waiting)

    def _connect(self, sock: socket.socket, path: str) -> None:
        deadline_s = time.monotonic() + self._start_s
        while True:
            try:
                return sock.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                now_s = time.monotonic()
                starting = now_s < self._expected_until_s or runs(self._root)
                if now_s >= deadline_s or not starting:
                    raise
            time.sleep(_START_LOOK_S)


@final
class _Talk:
    """One connection: words, each with the descriptor that came along, then perhaps bytes."""

    def __init__(
        self, sock: socket.socket, waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._sock = sock
        self._waiting = waiting
        self._heard = b""
        self._fds: list[int] = []

    def ready(self) -> bool:
        """Whether a word, or some of one, or the end is there to be heard without a wait."""
        if b"\n" in self._heard:
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def hear(self) -> tuple[Word, int | None]:
        """The next word; raises OSError where none comes, ValueError for nonsense."""
        while b"\n" not in self._heard:
            if len(self._heard) > _HEARD_BYTES:
                raise ValueError("a word without an end")
            self._receive()
        line, _, self._heard = self._heard.partition(b"\n")
        word = msgspec.json.decode(line, type=Word)
        return word, self._fds.pop(0) if word.kind == FILE and self._fds else None

    def bytes_into(self, buffer: memoryview) -> int:
        """What comes as bytes; 0 at the end."""
        if self._heard:
            count = min(len(buffer), len(self._heard))
            buffer[:count] = self._heard[:count]
            self._heard = self._heard[count:]
            return count
        with self._waiting():
            return self._sock.recv_into(buffer)

    def close(self) -> None:
        self._sock.close()
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> _Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> None:
        room = socket.CMSG_SPACE(array.array("i").itemsize)
        with self._waiting():
            data, along, _, _ = self._sock.recvmsg(_HEARD_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in along:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds += fds
        if not data:
            raise ConnectionResetError("the replicator broke off")
        self._heard += data


@final
class Fetched(io.RawIOBase):
    """Bytes that come from a target while they are read; for one thread.

    A stream of the whole blob, or of what `only` chose. Reading raises BlobElsewhere, and
    does so before the last byte where the whole could not be verified.
    """

    def __init__(self, digest: Digest, size_bytes: int, talk: _Talk) -> None:
        super().__init__()
        self.size_bytes = size_bytes
        self._digest = digest
        self._talk = talk
        self._position = 0
        self._stop = size_bytes
        self._given = False  # bytes of the copy: another one cannot take its place any more
        self._fd = -1
        self._grown_bytes = 0
        self._whole = False
        self._streamed: int | None = None  # bytes taken from the connection
        self._broken: BlobElsewhere | None = None  # no more will come

    def only(self, start: int, stop: int) -> None:
        """Read the bytes from `start` to before `stop`; called before the first reading."""
        self._position, self._stop = start, stop

    def whole(self) -> int | None:
        """Wait until all is verified: a descriptor of its own, the caller's to close.

        None where the bytes come over the socket and must be read from here.
        """
        while not self._whole and self._streamed is None:
            self._listen()
        if self._streamed is not None:
            return None
        fd, self._fd = self._fd, -1
        return fd

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """The next bytes, one at least; waits for them. 0 at the end."""
        view = memoryview(buffer).cast("B")[: max(0, self._stop - self._position)]
        if not view:
            return 0
        self._catch_up()
        while self._streamed is None and self._safe_bytes() <= self._position:
            if self._broken is not None:
                raise self._broken
            self._listen()
        if self._streamed is not None:
            count = self._read_streamed(view)
        else:
            view = view[: self._safe_bytes() - self._position]
            count = os.preadv(self._fd, [view], self._position)
            if count == 0:
                raise self._failed("its copy is shorter than it should be")
        self._given = True
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._talk.close()
            if self._fd >= 0:
                os.close(self._fd)
        super().close()

    def _safe_bytes(self) -> int:
        """How many bytes, from the first on, may be given."""
        return self._stop if self._whole else min(self._grown_bytes, self._stop - 1)

    def _catch_up(self) -> None:
        """Hear what was said already, also where it is not needed yet: or the words of a fast
        fetch fill the connection of a slow reader, who is broken off although all is there."""
        try:
            while self._said_something():
                self._listen()
        except BlobElsewhere as error:
            self._broken = error  # told when what came before it is read

    def _said_something(self) -> bool:
        listens = self._streamed is None and not self._whole and self._broken is None
        return listens and self._talk.ready()

    def _listen(self) -> None:
        try:
            word, fd = self._talk.hear()
        except (OSError, ValueError) as error:
            raise self._failed(_why(error)) from error
        if word.kind == FILE and fd is not None:
            self._begin(fd)
        elif word.kind == GROWN and (self._fd >= 0 or not word.size_bytes):
            self._grown_bytes = word.size_bytes
        elif word.kind == WHOLE and self._fd >= 0:
            self._whole = True
        elif word.kind == STREAM:
            self._begin(-1)
            self._streamed = 0
        else:
            raise self._failed(word.reason or "the replicator's answer makes no sense")

    def _begin(self, fd: int) -> None:
        """Another copy takes the place of the one before, unless that was read from."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._grown_bytes, self._whole = fd, 0, False
        if self._given:
            raise self._failed("it had to be fetched anew while it was being read")

    def _read_streamed(self, view: memoryview) -> int:
        """The next bytes from the connection, where the last one of all proves the whole."""
        assert self._streamed is not None
        self._skip_to(self._position)
        if self._position + 1 < self._stop:
            return self._take(view[: self._stop - 1 - self._position])
        self._take(view[:1])
        self._skip_to(self.size_bytes)
        return 1

    def _skip_to(self, position: int) -> None:
        assert self._streamed is not None
        if self._streamed < position:
            scratch = memoryview(bytearray(_SKIP_BYTES))
            while self._streamed < position:
                self._take(scratch[: position - self._streamed])

    def _take(self, view: memoryview) -> int:
        assert self._streamed is not None
        try:
            count = self._talk.bytes_into(view)
        except OSError as error:
            raise self._failed(_why(error)) from error
        if count == 0:
            raise self._failed("it broke off")
        self._streamed += count
        return count

    def _failed(self, reason: str) -> BlobElsewhere:
        return BlobElsewhere(self._digest.hex(), reason)


def _why(error: Exception, what: str = "fetch it") -> str:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return f"no replicator runs that could {what}"
    if isinstance(error, BlockingIOError):
        return "the replicator is silent"
    if isinstance(error, ConnectionError):
        return "the replicator broke off"
    return str(error)


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("ll", whole, int((seconds - whole) * 1_000_000))
