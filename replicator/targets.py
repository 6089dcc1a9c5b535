"""Targets: the seam to the places that blobs are mirrored to.

Everything above speaks to this protocol only; `tests/contracts/test_target.py` is what a
form must pass. There are two: `folder`, another disk, and `s3`, anything that speaks S3.

Calls block and run in threads; a target is used by many at once. Each call either does the
whole of what it says or raises a TargetError: nothing is retried inside, so that what is
above can count, wait and choose. Where a call raised, it may have happened all the same.

    PREFIX/HEAD.json                                              who ships here, and how far
    PREFIX/objects/ab/<digest>                                    blobs
    PREFIX/journal/<store_id>/<epoch>-<first_seq>-<last_seq>.log  frames as they are on disk
    PREFIX/checkpoints/<store_id>/<epoch>-<seq>.log.zst           the whole state
    PREFIX/probe/<random>                                         while a probe runs

A key here is what follows PREFIX.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, Protocol, final

import msgspec

from cas.digest import Digest
from cas.errors import BlobcaskError

HEAD: Final = "HEAD.json"
OBJECTS: Final = "objects/"


def object_key(digest: Digest) -> str:
    """The key of a blob."""
    name = digest.hex()
    return f"{OBJECTS}{name[:2]}/{name}"


# --- errors: by what the mirror does about them


class TargetError(BlobcaskError):
    """A call to a target failed; `reason` is for the operator and holds no secret."""

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"target {target}: {reason}")
        self.target = target
        self.reason = reason


@final
class TargetUnreachable(TargetError):
    """No answer, a cut connection, or a server's own trouble (5xx): everything waits, briefly."""


@final
class TargetBusy(TargetError):
    """The server asks for patience (503 SlowDown, 429): fewer at a time, later."""


@final
class TargetRefused(TargetError):
    """Credentials, permission, a bucket that is gone: nothing will work until somebody acts."""


@final
class ObjectRefused(TargetError):
    """The server does not take this object (too large, a name it does not like)."""


@final
class BytesDiffer(TargetError):
    """What arrived is not what was sent, or what is there is not what should be."""


@final
class ObjectAbsent(TargetError):
    """No object has this key; or no multipart upload this identifier."""


@final
class Changed(TargetError):
    """A condition was not met: the object is another one now, or there is one already."""


# --- values


@final
class ObjectStat(msgspec.Struct, frozen=True):
    """An object as the target tells of it."""

    key: str
    size_bytes: int
    etag: str  # without quotes; for conditions, and the MD5 where the profile says so
    modified_us: int
    sha256: bytes | None = None  # 32 raw bytes, where the server keeps it


@final
class Part(msgspec.Struct, frozen=True):
    """One part of a multipart upload, as the server has it; numbers begin with 1."""

    number: int
    size_bytes: int
    etag: str


@final
class Unfinished(msgspec.Struct, frozen=True):
    """A multipart upload that nobody has completed or aborted."""

    key: str
    upload_id: str
    begun_us: int


@final
class Traits(msgspec.Struct, frozen=True):
    """What a target tells of itself, beside what its calls show. For the probe."""

    in_parts: bool  # large objects are better sent in parts than whole
    sha256_checked: bool  # bytes that are not those of their SHA-256 were refused
    presigned: bool  # an object was read by its signed address alone
    versioning: bool | None  # None: it would not say
    object_lock: bool | None
    clock_offset_us: int  # what the server's clock is ahead of this machine's


class Body(Protocol):
    """Bytes of a known length that can be read again from the start: a file or `BytesIO`."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


class Incoming(Protocol):
    """An object being read."""

    @property
    def stat(self) -> ObjectStat:
        """Of the whole object, whatever range of it comes."""
        ...

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end; raises TargetUnreachable where it was cut short."""
        ...


class Target(Protocol):
    """One place. Safe for threads."""

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str:
        """What it is, for people; no secrets."""
        ...

    def put(
        self,
        key: str,
        body: Body,
        size_bytes: int,
        *,
        md5: bytes | None = None,
        sha256: bytes | None = None,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> str:
        """Store an object, over what is there; returns its etag.

        `md5` and `sha256` (raw) are sent along for the server to check. `if_match` (an etag)
        and `if_absent` raise Changed where the object is another one, or there; they are to
        be trusted only where the probe found them honoured.
        """
        ...

    def get(
        self, key: str, *, first_byte: int = 0, last_byte: int | None = None
    ) -> AbstractContextManager[Incoming]:
        """Open an object, or bytes `first_byte`-`last_byte` (both included) of it; ObjectAbsent."""
        ...

    def stat(self, key: str) -> ObjectStat:
        """Raises ObjectAbsent."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; none there is no error. On return the server has answered."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectStat]:
        """The objects whose keys begin with `prefix` and come after `after`, in order of keys."""
        ...

    def begin(self, key: str) -> str:
        """Begin a multipart upload; returns its identifier."""
        ...

    def put_part(
        self, key: str, upload_id: str, number: int, body: Body, size_bytes: int, md5: bytes | None
    ) -> str:
        """Store part `number` (from 1); returns its etag. ObjectAbsent: no such upload."""
        ...

    def parts(self, key: str, upload_id: str) -> Sequence[Part]:
        """The parts that are there, in order; ObjectAbsent: no such upload."""
        ...

    def complete(self, key: str, upload_id: str, etags: Sequence[str]) -> str:
        """Make the object of its parts; returns its etag. ObjectAbsent: no such upload."""
        ...

    def abort(self, key: str, upload_id: str) -> None:
        """Forget a multipart upload; none there is no error."""
        ...

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """The multipart uploads under way below `prefix`."""
        ...

    def traits(self, key: str) -> Traits:
        """Ask what only this kind of target can be asked; writes and removes `key`."""
        ...

    def close(self) -> None: ...
