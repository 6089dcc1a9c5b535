"""Targets that a test fills, spoils and holds up, and a node that has evicted to them.

The folder and S3 targets are real and have suites of their own. What these are for no real
one does at a given byte: to stop, to break off, to bring something else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

from cas.config import TargetSettings
from cas.digest import Digest
from cas.records import Blob, Replica, StoredFile
from cas.replicas import Done, evict, register, settle
from cas.store import Store
from replicator.evicting import Evict
from replicator.fetching import Fetches
from replicator.link import Link
from replicator.socket_server import Answering, CopyNow
from replicator.targets import ObjectAbsent, ObjectStat, object_key

SHIPPED = 1 << 40  # more frames than any test writes


@final
class _Incoming:
    def __init__(self, crate: Crate, key: str, position: int) -> None:
        self._crate = crate
        self._key = key
        self._position = position
        self.stat = ObjectStat(key, len(crate.objects[key]), "etag", 0)

    def read(self, size: int) -> bytes:
        self._crate.before(self._position)
        data = self._crate.objects[self._key][self._position : self._position + size]
        self._position += len(data)
        return data


@final
@dataclass
class Crate:
    """A target that can only be read from. `before(position)` is called at each reading, in
    the thread that reads: it may wait, or raise."""

    name: str
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)  # the first byte of each question
    before: Callable[[int], object] = lambda _position: None

    @contextmanager
    def get(self, key: str, *, first_byte: int = 0, last_byte: int | None = None) -> Iterator[Any]:
        assert last_byte is None
        self.asked.append(first_byte)
        if key not in self.objects:
            raise ObjectAbsent(self.name, "no such object")
        yield _Incoming(self, key, first_byte)

    def hold(self, digest: Digest, content: bytes) -> None:
        self.objects[object_key(digest)] = content


def link_to(crate: Crate) -> Link:
    """A link that is probed and not fenced, with everything shipped."""
    settings = TargetSettings(crate.name, "folder", Path("/nowhere"))
    link = Link(cast("Any", crate), settings, cast("Any", object()))
    link.fenced = ""
    link.shipped_seq = SHIPPED
    return link


@final
class Node:
    """A store whose blobs are at crates, one for each name."""

    def __init__(self, store: Store, names: Sequence[str] = ("a",), tenant_id: str = "t1") -> None:
        self.store = store
        self._tenant_id = tenant_id
        self.crates = {name: Crate(name) for name in names}
        self.links = [link_to(crate) for crate in self.crates.values()]
        register(store.catalog, [(name, f"crate {name}") for name in names])

    def put(self, content: bytes, name: str = "a") -> StoredFile:
        return self.store.files(self._tenant_id, "tests").put(content, name=name)

    def mirrored(self, content: bytes) -> StoredFile:
        """A file that is here and, verified, at all crates."""
        file = self.put(content)
        for name, crate in self.crates.items():
            crate.hold(file.checksum_sha256, content)
            settle(self.store.catalog, [Done(self.row(file, name))])
        return file

    def evicted(self, content: bytes) -> StoredFile:
        """A file that is at all crates, and not here."""
        file = self.mirrored(content)
        shipped = dict.fromkeys(self.crates, SHIPPED)
        gone = evict(self.store.catalog, self.store.blobs, [file.checksum_sha256], shipped)
        assert len(gone) == 1
        return file

    def row(self, file: StoredFile, name: str) -> Replica:
        with self.store.catalog.read() as snapshot:
            row = snapshot.get(Replica, name, file.checksum_sha256)
        assert row is not None
        return row

    def blob(self, file: StoredFile) -> Blob:
        with self.store.catalog.read() as snapshot:
            blob = snapshot.get(Blob, file.checksum_sha256)
        assert blob is not None
        return blob


@final
@dataclass
class Background:
    """Runs the socket and its fetches, in a thread of its own."""

    answering: Answering
    fetches: Fetches
    loop: asyncio.AbstractEventLoop

    def do(self, story: Any) -> Any:
        """The result of a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(story, self.loop).result(60)


@contextmanager
def background(
    node: Node,
    copy_now: CopyNow | None = None,
    *,
    max_bytes: int = 0,
    room: Callable[[int], bool] | None = None,
) -> Iterator[Background]:
    ready = threading.Event()
    made: list[Background] = []

    async def story() -> None:
        evicting = Evict(node.store, node.links, max_bytes)
        fetches = Fetches(node.store, node.links, room or evicting.room)
        answering = Answering(node.store.root, fetches, copy_now)
        stop = asyncio.Event()
        made.append(Background(answering, fetches, asyncio.get_running_loop()))
        stops.append(stop)
        await answering.step(0)
        ready.set()
        await stop.wait()
        await answering.close()

    stops: list[asyncio.Event] = []
    thread = threading.Thread(target=lambda: asyncio.run(story()))
    thread.start()
    try:
        assert ready.wait(60)
        yield made[0]
    finally:
        made[0].loop.call_soon_threadsafe(stops[0].set)
        thread.join(60)
        assert not thread.is_alive()
