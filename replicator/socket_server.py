"""The socket where this ROOT's other processes ask for bytes that are at targets only.

`cas.elsewhere` holds the questions, the words of the answers and the client. One question a
connection; the connection ends with the answer. Nobody but ROOT's own user may connect, and
only a digest can be asked for, which a record must name: there are no paths in it.

A connection that says nothing, or takes nothing, has an end (invariant 11).
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import stat as modes
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, final

import msgspec

from cas.digest import Digest, parse_digest
from cas.durable import opened
from cas.elsewhere import (
    COPIED,
    DONE,
    FAILED,
    FILE,
    GROWN,
    QUESTION_BYTES_MAX,
    SOCKET,
    STREAM,
    WHOLE,
    Question,
    Word,
    socket_path,
)
from cas.errors import BlobcaskError, BlobUnavailable, CopyUnconfirmed
from replicator.fetching import Fetch, Fetches

CopyNow = Callable[[Digest, bool], Awaitable[object]]

CONNECTIONS_MAX: Final = 2000
_BACKLOG: Final = 1024
_QUESTION_S: Final = 5.0
_SEND_S: Final = 300.0  # for a reader to take a word; it takes none while its client is slow
# Who waits its turn hears so often that it is not forgotten: less than `cas.elsewhere.SILENT_S`.
_QUEUED_S: Final = 10.0
_COPY_S: Final = 6 * 3600.0  # its asker has a shorter patience
_SHARED_S: Final = 3600.0  # later on it reads from its copy alone
_LOOK_S: Final = 5.0
_DESCRIPTORS_MAX: Final = 8192
_PEER: Final = "iII"  # struct ucred: pid, uid, gid

_log = logging.getLogger("blobcask.replicator")


@final
class Answering:
    """Listens and answers; a `replicator.loop.Job` whose step sees to it that it is there."""

    name: Final = "answer"
    interval_s: Final = _LOOK_S

    def __init__(self, root: Path, fetches: Fetches, copy_now: CopyNow | None = None) -> None:
        """`copy_now(digest, anew)` returns when the copy at the target "primary" is verified;
        None where there is no such target."""
        self._root = root
        self._fetches = fetches
        self._copy_now = copy_now
        self._listener: socket.socket | None = None
        self._inode = 0
        self._accepting: asyncio.Task[None] | None = None
        self._talks: dict[asyncio.Task[None], _Connection] = {}

    async def step(self, _now_us: int) -> bool:
        """Listen, unless the socket is there and ours."""
        if self._listener is None or self._accepting is None or self._accepting.done():
            await self._quiet()
            self._listen()
        elif self._found() != self._inode:
            _log.warning("%s was removed; it is made again", SOCKET)
            await self._quiet()
            self._listen()
        return False

    async def close(self) -> None:
        """Listen no more, and break off what goes on."""
        if self._listener is not None and self._found() == self._inode:
            with suppress(FileNotFoundError), socket_path(self._root) as path:
                os.unlink(path)
        await self._quiet()
        for connection in self._talks.values():
            connection.end()  # also for the thread that may be sending
        await self._fetches.close()
        for talk in self._talks:
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    # --- listening

    def _listen(self) -> None:
        _raise_descriptors()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            with socket_path(self._root) as path:
                # Left behind by one that was killed: this process has the place now.
                with suppress(FileNotFoundError):
                    os.unlink(path)
                listener.bind(path)
                # Before it listens, so that nobody was let in who is not to be.
                os.chmod(path, 0o600)
                listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._listener, self._inode = listener, self._found()
        self._accepting = asyncio.create_task(self._accept(listener))

    def _found(self) -> int:
        """The inode of the socket that is there, 0 where there is none."""
        try:
            with opened(self._root, os.O_PATH | os.O_DIRECTORY) as folder:
                found = os.stat(SOCKET, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return 0
        return found.st_ino if modes.S_ISSOCK(found.st_mode) else 0

    async def _quiet(self) -> None:
        accepting, self._accepting = self._accepting, None
        if accepting is not None:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors: they come back
                _log.warning("a question was not taken: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._talks) >= CONNECTIONS_MAX or not _is_own(sock):
                sock.close()
                continue
            sock.setblocking(False)
            connection = _Connection(sock)
            talk = loop.create_task(self._talk(connection))
            self._talks[talk] = connection
            talk.add_done_callback(self._talks.pop)

    # --- answering

    async def _talk(self, connection: _Connection) -> None:
        try:
            question = await connection.question()
            digest = parse_digest(question.digest)
            if question.verb == COPIED:
                await self._copied(connection, digest, question.anew)
            else:
                await self._fetch(connection, digest)
        except (BlobcaskError, msgspec.MsgspecError) as error:
            with suppress(OSError, TimeoutError):
                await connection.say(Word(FAILED, reason=_reason(error)))
        except (OSError, TimeoutError) as error:
            _log.debug("an answer ended early: %s", error)
        except Exception:  # noqa: BLE001  one question's trouble is not the others'
            _log.exception("a question failed")
            with suppress(OSError, TimeoutError):
                await connection.say(Word(FAILED, reason="this is a fault of the replicator"))
        finally:
            connection.close()

    async def _copied(self, connection: _Connection, digest: Digest, anew: bool) -> None:
        if self._copy_now is None:
            await connection.say(Word(FAILED, reason="there is no target primary"))
            return
        async with asyncio.timeout(_COPY_S):
            await self._copy_now(digest, anew)
        await connection.say(Word(DONE))

    async def _fetch(self, connection: _Connection, digest: Digest) -> None:
        asked = self._fetches.asked(digest)
        if isinstance(asked, int):
            await connection.hand_over(asked)
            await connection.say(Word(WHOLE))
            return
        asked.enter()
        gone = asyncio.create_task(connection.gone())
        told = asyncio.create_task(self._follow(connection, asked))
        try:
            await asyncio.wait((told, gone), return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                await told
                if asked.end == WHOLE and not asked.kept:
                    # While it reads, its copy serves all who come.
                    await asyncio.wait((gone,), timeout=_SHARED_S)
        finally:
            told.cancel()
            gone.cancel()
            await asyncio.gather(told, gone, return_exceptions=True)
            asked.leave()

    async def _follow(self, connection: _Connection, fetch: Fetch) -> None:
        """Tell one reader how a fetch goes on, as far as it wants to know."""
        copy = grown_bytes = 0
        while True:
            news = fetch.news
            if fetch.end in (FAILED, STREAM):
                break
            if fetch.copy != copy:
                copy, grown_bytes = fetch.copy, 0
                await connection.hand_over(fetch.descriptor())
            elif fetch.end == WHOLE:
                break
            elif fetch.grown_bytes != grown_bytes:
                grown_bytes = fetch.grown_bytes
                await connection.say(Word(GROWN, grown_bytes))
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_QUEUED_S if fetch.queued else None):
                        await news.wait()
                        continue
                await connection.say(Word(GROWN))
        await connection.say(Word(fetch.end, reason=fetch.reason))  # type: ignore[arg-type]
        if fetch.end == STREAM:
            await self._fetches.stream(fetch, connection.raw())


@final
class _Connection:
    """One asker."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._raw = False
        self._loop = asyncio.get_running_loop()

    async def question(self) -> Question:
        """Raises MsgspecError for what is none, OSError, TimeoutError."""
        heard = b""
        async with asyncio.timeout(_QUESTION_S):
            while not heard.endswith(b"\n"):
                data = await self._loop.sock_recv(self._sock, QUESTION_BYTES_MAX)
                heard += data
                if not data or len(heard) > QUESTION_BYTES_MAX:
                    raise ConnectionResetError("not a question")
        return msgspec.json.decode(heard, type=Question)

    async def gone(self) -> None:
        """Return when the asker has closed its side; what it says meanwhile is ignored.
        Raises OSError."""
        while await self._loop.sock_recv(self._sock, QUESTION_BYTES_MAX):
            pass

    def raw(self) -> socket.socket:
        """The socket, for bytes. No word is said any more: it would be taken for bytes, and
        the last of them says that all were right."""
        self._raw = True
        return self._sock

    async def say(self, word: Word) -> None:
        if self._raw:
            raise ConnectionAbortedError(word.reason)
        async with asyncio.timeout(_SEND_S):
            await self._loop.sock_sendall(self._sock, msgspec.json.encode(word) + b"\n")

    async def hand_over(self, fd: int) -> None:
        """Say FILE, with a descriptor, which is closed here."""
        line = msgspec.json.encode(Word(FILE)) + b"\n"
        try:
            async with asyncio.timeout(_SEND_S):
                while True:
                    try:
                        sent = socket.send_fds(self._sock, [line], [fd])
                        break
                    except BlockingIOError:
                        await self._writable()
                await self._loop.sock_sendall(self._sock, line[sent:])
        finally:
            os.close(fd)

    def end(self) -> None:
        """Break off, whoever uses the socket."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    async def _writable(self) -> None:
        ready = asyncio.Event()
        self._loop.add_writer(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            self._loop.remove_writer(self._sock)


def _reason(error: Exception) -> str:
    """Why, without what the asker knows."""
    if isinstance(error, BlobUnavailable | CopyUnconfirmed):
        return error.reason
    return str(error)


def _is_own(sock: socket.socket) -> bool:
    """Whether the other side is of this process' user, or root."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_PEER))
    _, uid, _ = struct.unpack(_PEER, found)
    return uid in (0, os.geteuid())


def _raise_descriptors() -> None:
    """Each reader takes one, and 1,024 are a usual limit."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_MAX if most == resource.RLIM_INFINITY else min(most, _DESCRIPTORS_MAX)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
