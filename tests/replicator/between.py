"""A target with something in between: what breaks, lies and holds up on the way to a folder.

The folder is the product's own. Whatever is to go wrong is said in `meddle`, which is called
with the verb and the key before each call is passed on, in the thread that makes it: it may
raise, wait, or answer itself by raising `Instead`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Any, final

import msgspec

from replicator.probe import Profile
from replicator.targets import (
    Body,
    Incoming,
    ObjectStat,
    Part,
    Target,
    TargetBusy,
    TargetUnreachable,
    Traits,
    Unfinished,
)

MIB = 1 << 20
# Of a server whose etags are MD5s. Its parts are small, so that a test need not be large.
BY_MD5 = Profile(
    verification="md5", multipart=True, parts_md5=True, part_bytes=MIB, part_bytes_min=MIB
)
BY_READING = Profile(multipart=True, part_bytes=MIB, part_bytes_min=MIB)
BY_SHA256 = Profile(verification="sha256", multipart=True, part_bytes=MIB, part_bytes_min=MIB)
PROFILES = {"md5": BY_MD5, "read_back": BY_READING, "sha256": BY_SHA256}


class Instead(Exception):
    """The call is not passed on: `answer` is what it returns."""

    def __init__(self, answer: object) -> None:
        super().__init__(answer)
        self.answer = answer


def storm() -> Callable[[str, str], None]:
    """Two of three requests are put off, for ever: what a server under load does."""
    numbers = count()

    def meddle(_verb: str, _key: str) -> None:
        number = next(numbers) % 6
        if number in (1, 5):
            raise TargetBusy("far", "503 SlowDown")
        if number in (2, 4):
            raise TargetUnreachable("far", "500 InternalError")

    return meddle


@final
class Between:
    """A `Target` on the way to another one. `calls` are all calls made: (verb, key).

    It tells MD5s as etags and SHA-256s in stats, as some servers do.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.calls: list[tuple[str, str]] = []
        self.meddle: Callable[[str, str], object] = lambda _verb, _key: None
        self.opaque = False  # stats tell neither MD5 nor SHA-256 any more
        self._part_bytes: dict[str, list[int]] = {}  # of objects made of parts

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def place(self) -> str:
        return self.target.place

    def count(self, verb: str) -> int:
        return sum(made == verb for made, _ in self.calls)

    def put(self, key: str, body: Body, size_bytes: int, **more: Any) -> str:
        self._part_bytes.pop(key, None)
        return str(self._call("put", key, self.target.put, body, size_bytes, **more))

    def get(self, key: str, **more: Any) -> AbstractContextManager[Incoming]:
        found: AbstractContextManager[Incoming] = self._call("get", key, self.target.get, **more)
        return found

    def stat(self, key: str) -> ObjectStat:
        found: ObjectStat = self._call("stat", key, self.target.stat)
        if self.opaque:
            return found
        with self.target.get(key) as incoming:
            content = incoming.read(1 << 30)
            while piece := incoming.read(1 << 30):
                content += piece
        etag = hashlib.md5(content).hexdigest()
        if key in self._part_bytes:
            etag = self._composite(content, self._part_bytes[key])
        return msgspec.structs.replace(found, etag=etag, sha256=hashlib.sha256(content).digest())

    def delete(self, key: str) -> None:
        self._call("delete", key, self.target.delete)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectStat]:
        found: Iterator[ObjectStat] = self._call("list", prefix, self.target.list, after=after)
        return found

    def begin(self, key: str) -> str:
        return str(self._call("begin", key, self.target.begin))

    def put_part(self, key: str, upload_id: str, number: int, *more: Any) -> str:
        return str(
            self._call(f"part {number}", key, self.target.put_part, upload_id, number, *more)
        )

    def parts(self, key: str, upload_id: str) -> Sequence[Part]:
        found: Sequence[Part] = self._call("parts", key, self.target.parts, upload_id)
        return found

    def complete(self, key: str, upload_id: str, etags: Sequence[str]) -> str:
        sizes = [part.size_bytes for part in self.target.parts(key, upload_id)]
        made = str(self._call("complete", key, self.target.complete, upload_id, etags))
        self._part_bytes[key] = sizes
        return made

    def abort(self, key: str, upload_id: str) -> None:
        self._call("abort", key, self.target.abort, upload_id)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        found: Iterator[Unfinished] = self._call("unfinished", prefix, self.target.unfinished)
        return found

    def traits(self, key: str) -> Traits:
        return self.target.traits(key)

    def close(self) -> None:
        self.target.close()

    def _call(self, verb: str, key: str, call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        self.calls.append((verb, key))
        try:
            self.meddle(verb, key)
        except Instead as instead:
            return instead.answer
        return call(key, *args, **more)

    @staticmethod
    def _composite(content: bytes, sizes: Sequence[int]) -> str:
        md5s, first = b"", 0
        for size in sizes:
            md5s += hashlib.md5(content[first : first + size]).digest()
            first += size
        return f"{hashlib.md5(md5s).hexdigest()}-{len(sizes)}"
