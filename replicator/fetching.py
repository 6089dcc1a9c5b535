"""Fetching: bytes that are at targets only come back, once for any number of readers.

A fetch is begun by the first who asks and joined by all others. A thread reads the object and
writes a copy of it in `objects/`, hashing as it goes, as any upload does. Readers get a
descriptor of that copy and are told how far it has grown (`replicator.socket_server`), so a
slow one costs nothing. When the SHA-256 is verified, and only then, they are told so, and the
copy becomes the blob's local bytes. The fetch goes on when its readers have left: whoever gave
up waiting will come again.

Where the cache has no room for the copy (`[cache] max_size`), it is made all the same, and serves
all who come while anybody reads from it; then it goes, finished or not. So the disk holds, beyond
`max_size`, what is being read at the moment, and never goes below `[store] min_free` for that.
Only where the disk itself is that full is there no copy to share.

    a target breaks off      the next one goes on where it stopped, or the same one again
    the digest is wrong      the copy is thrown away and begun anew, with another target first;
                             one that was wrong twice, or while another was right, has its row
                             wanted again
    no target has it         the blob is listed as missing, and healing goes on trying
    no room on the disk      every reader gets a stream of its own, which keeps nothing
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Final, final

from cas.digest import Digest
from cas.elsewhere import FAILED, STREAM, WHOLE
from cas.errors import BlobcaskError, BlobElsewhere, Mismatch, StoreFull
from cas.records import DELETING, Blob, Replica
from cas.replicas import want_again
from cas.store import Store
from replicator.link import Link
from replicator.targets import (
    BytesDiffer,
    Incoming,
    ObjectAbsent,
    TargetError,
    TargetUnreachable,
    object_key,
)

FETCHES_MAX: Final = 16  # at a time; more wait their turn
STREAMS_MAX: Final = 16  # likewise, of those that keep nothing
BRINGS_MAX: Final = 4  # likewise, of those that nobody waits for; they take no reader's place
_ACTOR: Final = "fetch"
_READ_BYTES: Final = 256 << 10
_TELL_S: Final = 0.02  # how often readers are told of growth
_STRIKES_MAX: Final = 2  # so often one target may bring wrong bytes
_TRIES: Final = 2  # a target, without wrong bytes, each time it stops bringing any
# A target that is slower than this, after a while, counts as one that does not answer.
_PATIENCE_S: Final = 60.0
_BYTES_PER_S_MIN: Final = 16 << 10
_SEND_S: Final = 60.0  # for a reader of a stream to take anything

_log = logging.getLogger("blobcask.replicator")


class FetchStopped(BlobcaskError):
    """The process ends, or nobody reads any more what is not kept."""


class NotKnown(BlobcaskError):
    """No record has this digest, or its bytes are being removed."""


@final
class Fetch:
    """One blob on its way here. Belongs to the event loop; the thread only adds growth.

    `copy` counts the copies that were begun and `fd` is the latest one (-1: none yet), of
    which `grown_bytes` are there. `end` is "" while it goes on, then WHOLE, STREAM or FAILED.
    Where it is not `kept`, the copy is for its readers only, and `left` is set when they have
    gone. `forget` is called, perhaps more than once, when it serves no newcomer any more.
    """

    def __init__(self, digest: Digest, size_bytes: int, forget: Callable[[Fetch], None]) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self.copy = 0
        self.fd = -1
        self.grown_bytes = 0
        self.end = ""
        self.reason = ""
        self.kept = True
        self.queued = True  # until a thread is free and there is room
        self.left = threading.Event()
        self._forget = forget
        self._over = False
        # The thread's own count: (copy, its bytes). It may be ahead of the loop by a copy, so
        # readers are told of growth only when they were given the copy that grew.
        self._written = (0, 0)
        self._loop = asyncio.get_running_loop()
        self._noted = False
        self._news = asyncio.Event()
        self._readers = 0

    # --- for readers

    @property
    def news(self) -> asyncio.Event:
        """Set when anything of the above has changed; a fresh one then stands here."""
        return self._news

    def enter(self) -> None:
        self._readers += 1

    def leave(self) -> None:
        self._readers -= 1
        self._settle()

    def descriptor(self) -> int:
        """The copy opened anew, with a position of its own; the caller's to close."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    # --- for the thread that fetches: `cas.staged.Watcher`

    def begun(self, fd: int) -> None:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._written = (self._written[0] + 1, 0)
        self._loop.call_soon_threadsafe(self._begin, own)

    def grown(self, size_bytes: int) -> None:
        self._written = (self._written[0], size_bytes)
        if not self._noted:
            self._noted = True
            self._loop.call_soon_threadsafe(self._tell_growth)

    def ends(self, end: str, reason: str = "") -> None:
        """Tell all readers what became of it; the first word counts."""
        self._loop.call_soon_threadsafe(self._finish, end, reason)

    def pass_on(self) -> None:
        """Nothing of it will be kept."""
        self._loop.call_soon_threadsafe(self._pass_on)

    # --- inside

    def over(self, _task: object) -> None:
        """The thread has done its work."""
        self._over = True
        self._settle()

    def _begin(self, fd: int) -> None:
        self._close()
        self.fd, self.copy, self.grown_bytes = fd, self.copy + 1, 0
        self._tell()

    def _pass_on(self) -> None:
        self.kept = False
        self._settle()

    def _finish(self, end: str, reason: str) -> None:
        if not self.end:
            self.end, self.reason = end, reason
            self._tell()

    def _tell_growth(self) -> None:
        copy, size_bytes = self._written
        if copy == self.copy:
            self.grown_bytes = size_bytes
            self._tell()
        self._loop.call_later(_TELL_S, self._tell_rest)

    def _tell_rest(self) -> None:
        self._noted = False
        if self._written != (self.copy, self.grown_bytes):
            self._noted = True
            self._tell_growth()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _settle(self) -> None:
        """Let go of what nobody needs."""
        if not self.kept and not self._readers:
            self.left.set()
        shared = self.end == WHOLE and not self.kept  # also with who comes after its end
        if self.left.is_set() or (self._over and not shared):
            self._forget(self)
        if self._over and not self._readers:
            self._close()

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@final
class Fetches:
    """All fetches of one store, which `asked` begins or joins. For one event loop."""

    def __init__(
        self,
        store: Store,
        links: Sequence[Link],
        room: Callable[[int], bool] = lambda _size_bytes: True,
    ) -> None:
        """`room` is called in a thread and says whether so many bytes may be kept, for which
        it may make room."""
        self._store = store
        self._links = links
        self._room = room
        self._stop = threading.Event()
        # What serves newcomers, and, for the end, all that threads are at work for.
        self._running: dict[Digest, tuple[Fetch, asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Future[None]] = set()
        self._keeping = ThreadPoolExecutor(FETCHES_MAX, thread_name_prefix="fetch")
        self._bringing = ThreadPoolExecutor(BRINGS_MAX, thread_name_prefix="bring")
        self._streaming = ThreadPoolExecutor(STREAMS_MAX, thread_name_prefix="stream")
        self.fetched_bytes = 0

    def asked(self, digest: Digest, *, waited_for: bool = True) -> Fetch | int:
        """The fetch that brings this blob; or a descriptor of it, where it is here already.

        Raises NotKnown: only what a record names is asked of targets.
        """
        running = self._running.get(digest)
        if running is not None:
            return running[0]
        with self._store.catalog.read() as snapshot:
            blob = snapshot.get(Blob, digest)
        if blob is None or blob.state == DELETING:
            raise NotKnown(f"no record of a blob {digest.hex()}")
        if self._store.adoption.is_here(blob):
            # An eviction may come between the two looks: then it is fetched after all.
            with suppress(BlobcaskError):
                return self._store.blobs.open(digest, blob.size_bytes)
        return self._begin(blob, self._keeping if waited_for else self._bringing)

    async def bring(self, digest: Digest) -> bool:
        """Fetch a blob for nobody in particular; True when good bytes are here."""
        asked = self.asked(digest, waited_for=False)
        if isinstance(asked, int):
            os.close(asked)
            return True
        _, task = self._running[digest]
        await asyncio.shield(task)
        return asked.end == WHOLE and asked.kept

    async def stream(self, fetch: Fetch, sock: socket.socket) -> None:
        """Send all bytes to one reader and keep nothing; the last one only when all were
        right. Raises TargetError, OSError."""
        await asyncio.get_running_loop().run_in_executor(self._streaming, self._stream, fetch, sock)

    async def close(self) -> None:
        """Break off what goes on: its readers get an error."""
        self._stop.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._streaming.shutdown)
        await asyncio.to_thread(self._keeping.shutdown)
        await asyncio.to_thread(self._bringing.shutdown)

    # --- inside

    def _begin(self, blob: Blob, threads: ThreadPoolExecutor) -> Fetch:
        fetch = Fetch(blob.digest, blob.size_bytes, self._forget)
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(threads, self._bring, fetch)
        self._running[blob.digest] = (fetch, task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(fetch.over)
        return fetch

    def _forget(self, fetch: Fetch) -> None:
        """Who comes from now on is not served by this one."""
        found = self._running.get(fetch.digest)
        if found is not None and found[0] is fetch:
            del self._running[fetch.digest]

    def _bring(self, fetch: Fetch) -> None:
        """In a thread: one fetch to its end, whatever that is."""
        try:
            keep = self._room(fetch.size_bytes)
            if not keep:
                fetch.pass_on()
            fetch.queued = False
            self._copy(fetch, keep=keep)
        except StoreFull:
            fetch.ends(STREAM)
        except FetchStopped as error:
            fetch.ends(FAILED, str(error))
        except (BlobcaskError, OSError) as error:
            _log.warning("blob %s could not be fetched: %s", fetch.digest.hex(), error)
            fetch.ends(FAILED, error.reason if isinstance(error, BlobElsewhere) else str(error))
        except BaseException as error:
            fetch.ends(FAILED, type(error).__name__)
            raise

    def _copy(self, fetch: Fetch, *, keep: bool) -> None:
        tried = _Tried(self._candidates(fetch.digest))
        error: BlobcaskError = BlobElsewhere(fetch.digest.hex(), "no target has a copy of it")
        while chosen := tried.next():
            source = _Source(fetch, chosen, self._stop)
            try:
                staged = self._store.blobs.stage(
                    source,
                    promised_size=fetch.size_bytes,
                    promised_digest=fetch.digest,
                    sync=False,
                    watcher=fetch,
                )
            except (Mismatch, TargetError) as failed:
                error = failed
                tried.failed(source, mismatch=isinstance(failed, Mismatch))
            else:
                with staged:
                    fetch.ends(WHOLE)
                    self.fetched_bytes += fetch.size_bytes
                    if keep:
                        self._store.adoption.bring_back(staged, actor=_ACTOR)
                tried.worked(source)
                self._blame(fetch.digest, tried.wrong(1))
                return
            finally:
                source.close()
        self._blame(fetch.digest, tried.wrong(_STRIKES_MAX))
        raise error

    def _candidates(self, digest: Digest) -> list[Link]:
        """The targets that may have it: first where its copy is done and that answer."""
        with self._store.catalog.read() as snapshot:
            rows = snapshot.range(Replica, "blob", (digest,), limit=1000)
        held = {row.target: row.held for row in rows}
        known = [link for link in self._links if link.name in held]
        return sorted(known, key=lambda link: (not held[link.name], bool(link.down)))

    def _blame(self, digest: Digest, names: list[str]) -> None:
        """Have the copies made again that were absent or wrong."""
        for name in names:
            _log.warning("target %s lacks good bytes of blob %s", name, digest.hex())
            want_again(self._store.catalog, name, [digest])

    def _stream(self, fetch: Fetch, sock: socket.socket) -> None:
        """In a thread: all bytes from the targets to one reader."""
        source = _Source(fetch, self._candidates(fetch.digest), self._stop)
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(_READ_BYTES))
        with sock.dup() as own:
            own.settimeout(_SEND_S)
            try:
                last = b""
                while count := source.readinto(buffer):
                    sha256.update(buffer[:count])
                    own.sendall(last)
                    own.sendall(buffer[: count - 1])
                    last = bytes(buffer[count - 1 : count])
                if sha256.digest() != fetch.digest:
                    raise BytesDiffer(" and ".join(source.brought), "other bytes than the blob's")
                self.fetched_bytes += fetch.size_bytes
                own.sendall(last)
            finally:
                source.close()


@final
class _Tried:
    """Which targets may still be asked in one fetch, and what they did so far."""

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._strikes: Counter[str] = Counter()
        self._right: set[str] = set()
        self._silent: set[str] = set()

    def next(self) -> list[Link]:
        """The targets to read from, in this order; none is left: []. After wrong bytes one
        alone, so that it is known whose they are."""
        left = [
            link
            for link in self._links
            if self._strikes[link.name] < _STRIKES_MAX and link.name not in self._silent
        ]
        left.sort(key=lambda link: self._strikes[link.name])
        return left[:1] if any(self._strikes.values()) else left

    def failed(self, source: _Source, *, mismatch: bool) -> None:
        self._note(source)
        if mismatch:
            self._strikes.update(source.brought)
        else:
            self._silent |= {link.name for link in source.links}

    def worked(self, source: _Source) -> None:
        self._note(source)
        self._right = set(source.brought)

    def wrong(self, strikes: int) -> list[str]:
        """The targets that were wrong so often, or have no such object."""
        return [
            name
            for name, count in self._strikes.items()
            if count >= strikes and name not in self._right
        ]

    def _note(self, source: _Source) -> None:
        for name in source.lacking:
            self._strikes[name] = _STRIKES_MAX


@final
class _Source:
    """The bytes of a blob from the first to the last, from targets that may break off.

    `brought` are the names of those that brought any, `lacking` of those that have no such
    object, or one of another length. Raises the last TargetError when none goes on.
    """

    def __init__(self, fetch: Fetch, links: list[Link], stop: threading.Event) -> None:
        self.links = links
        self.brought: set[str] = set()
        self.lacking: set[str] = set()
        self._key = object_key(fetch.digest)
        self._size_bytes = fetch.size_bytes
        self._stop = stop
        self._left = fetch.left
        self._position = 0
        self._tries = _TRIES * links
        self._name = ""  # of the target that is read from
        self._incoming: Incoming | None = None
        self._open = ExitStack()
        self._began_s = time.monotonic()
        self._began_at = 0

    def readinto(self, buffer: memoryview, /) -> int:
        while self._position < self._size_bytes:
            if self._stop.is_set():
                raise FetchStopped("the replicator stops")
            if self._left.is_set():
                raise FetchStopped("nobody reads it any more")
            try:
                data = self._read(min(len(buffer), self._size_bytes - self._position))
            except TargetError as error:
                self._give_up(error)
                continue
            except OSError as error:
                self._give_up(TargetUnreachable(self._name, str(error)))
                continue
            buffer[: len(data)] = data
            self._position += len(data)
            return len(data)
        return 0

    def close(self) -> None:
        self._incoming = None
        with suppress(TargetError, OSError):
            self._open.close()

    def _read(self, size: int) -> bytes:
        incoming = self._incoming or self._connect()
        data = incoming.read(size)
        if not data:
            raise TargetUnreachable(self._name, f"it ended after {self._position} bytes")
        took_s = time.monotonic() - self._began_s
        brought = self._position + len(data) - self._began_at
        if took_s > _PATIENCE_S + brought / _BYTES_PER_S_MIN:
            raise TargetUnreachable(self._name, f"only {brought} bytes in {took_s:.0f} s")
        self.brought.add(self._name)
        if brought >= _READ_BYTES:  # it works: from here on it may break off as often again
            at = 1 + [link.name for link in self.links].index(self._name)
            self._tries = _TRIES * [*self.links[at:], *self.links[:at]]
        return data

    def _connect(self) -> Incoming:
        target = self._tries.pop(0).target
        self._name = target.name
        self._began_s, self._began_at = time.monotonic(), self._position
        incoming = self._open.enter_context(target.get(self._key, first_byte=self._position))
        if incoming.stat.size_bytes != self._size_bytes:
            found = incoming.stat.size_bytes
            raise BytesDiffer(target.name, f"{found} bytes of {self._size_bytes}")
        self._incoming = incoming
        return incoming

    def _give_up(self, error: TargetError) -> None:
        """This target does not go on; raises `error` when none is left to."""
        self.close()
        if isinstance(error, ObjectAbsent | BytesDiffer):
            self.lacking.add(self._name)
        self._tries = [link for link in self._tries if link.name not in self.lacking]
        if not self._tries:
            raise error
