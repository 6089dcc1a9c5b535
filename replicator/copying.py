"""Copying: one blob to one target, and the proof that it is there.

    up to 1 MiB        read whole, hashed, one PUT
    up to a part       hashed, then sent from the file in one PUT: no memory for any length
    more               a multipart upload, several parts at a time, each hashed just before

What is sent is hashed first, and bytes that are not those of the digest are never made an
object: BlobDamaged says so. A multipart upload is written down before its first part and now
and then after, so that a killed process goes on where it was: the target is asked which parts
it has, and the others are sent.

A copy counts only when the target was asked *after* it was sent, and told what only the right
bytes could make it tell (the profile says what that is), or gave all of them back. An answer
to the sending proves nothing: something in between may have given it. What was sent is not
sent again because a small request after it was put off: that is made again by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Final, TypeVar, final

import aiofiles
import msgspec

from cas.blobs import BlobFiles
from cas.digest import Digest, digest_of
from cas.errors import BlobcaskError, BlobDamaged
from cas.records import Copy
from replicator.bandwidth import Bandwidth, Sending
from replicator.patience import again_in_s
from replicator.patient import Patient
from replicator.probe import Profile
from replicator.reading import read_back
from replicator.targets import (
    Body,
    BytesDiffer,
    ObjectAbsent,
    Target,
    TargetBusy,
    TargetError,
    TargetUnreachable,
    object_key,
)

T = TypeVar("T")

SMALL_BYTES: Final = 1 << 20
PARTS_AT_ONCE: Final = 4  # of one blob
_HASH_BYTES: Final = 2 << 20  # read at once while hashing: all the memory a large blob takes
_KEEP_BYTES: Final = 64 << 20  # what a killed process may have to send again
_KEEP_S: Final = 5.0  # and for how long it was sending that

Keep = Callable[[Copy], Awaitable[bool]]


class UploadForgotten(BlobcaskError):
    """The multipart upload under way is not wanted any more, and was aborted."""


@final
class Wanted(msgspec.Struct, frozen=True):
    """One copy to be made, by what the probe of its target found out."""

    digest: Digest
    size_bytes: int
    profile: Profile

    @property
    def part_bytes(self) -> int:
        """The length of each part but the last."""
        return self.profile.part_bytes_of(self.size_bytes)

    @property
    def in_parts(self) -> bool:
        return self.profile.multipart and self.size_bytes > self.part_bytes


@final
class Copier:
    """Makes copies at one target. For the event loop; what blocks runs in `threads`."""

    def __init__(
        self,
        target: Target,
        blobs: BlobFiles,
        threads: Executor,
        bandwidth: Bandwidth,
        nameless: set[str] | None = None,
    ) -> None:
        """`nameless` gets the identifiers of multipart uploads that are never written down."""
        self._target = target
        self.nameless = set() if nameless is None else nameless
        self._blobs = blobs
        self._threads = threads
        self._bandwidth = bandwidth
        self._stop = threading.Event()
        self.patient = Patient(target, self._stop)  # for what is small
        self._sent = 0

    @property
    def answers(self) -> int:
        """How many requests have succeeded; it changes with each."""
        return self._sent + self.patient.answers

    def stop(self) -> None:
        """End all that is being sent, in the middle: it raises SendingStopped."""
        self._stop.set()

    async def copy(
        self, wanted: Wanted, unfinished: Copy | None = None, keep: Keep | None = None
    ) -> None:
        """Make the copy; on return it was sent, and verified at the target after that.

        `unfinished` is the multipart upload to go on with. `keep` writes one down, durably, and
        says whether it is still wanted; without it nothing is left to go on with.

        Raises TargetError; BlobMissing or BlobDamaged where good bytes are not here;
        UploadForgotten; SendingStopped.
        """
        if wanted.size_bytes <= SMALL_BYTES:
            await self._in_thread(self._copy_small, wanted)
            return
        fd = await self._in_thread(self._blobs.open, wanted.digest, wanted.size_bytes)
        try:
            source = _Source(wanted, fd, self._threads)
            if wanted.in_parts:
                upload = _Multipart(self, wanted, source, keep)
                await upload.run(unfinished)
            else:
                md5 = await source.hash_all(wanted.size_bytes)
                await self._in_thread(self._put_file, wanted, source, md5[0])
        finally:
            os.close(fd)

    def _copy_small(self, wanted: Wanted) -> None:
        fd = self._blobs.open(wanted.digest, wanted.size_bytes)
        try:
            content = os.pread(fd, wanted.size_bytes + 1, 0)
        finally:
            os.close(fd)
        if digest_of(content) != wanted.digest:
            raise _damaged(wanted.digest)
        md5 = _md5(content).digest() if wanted.profile.verification == "md5" else None
        self._put(wanted, io.BytesIO(content), md5)

    def _put_file(self, wanted: Wanted, source: _Source, md5: bytes | None) -> None:
        with source.part(0, wanted.size_bytes) as body:
            self._put(wanted, body, md5)

    def _put(self, wanted: Wanted, body: Body, md5: bytes | None) -> None:
        by = wanted.profile.verification
        self._target.put(
            object_key(wanted.digest),
            self.sending(body),
            wanted.size_bytes,
            md5=md5 if by == "md5" else None,
            sha256=wanted.digest if by == "sha256" else None,
        )
        self.heard()
        self.confirm(wanted, md5.hex() if md5 and by == "md5" else None)

    # --- for both ways of sending

    def sending(self, body: Body) -> Body:
        """`body`, at the pace that the bandwidth allows, and until it is all over."""
        if isinstance(body, io.BytesIO) and not self._bandwidth.piece_bytes:
            return body
        return Sending(body, self._bandwidth, self._stop)

    def heard(self) -> None:
        """Something was sent, and answered with success."""
        self._sent += 1

    def confirm(self, wanted: Wanted, etag: str | None) -> None:
        """Return when the whole copy is proved to be at the target; `etag` is what it is called
        there if it is right. Blocks. Raises BytesDiffer, and what asking raises at last."""
        self.patient.again(lambda: confirm(self._target, wanted, etag, self._stop))

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)


def confirm(target: Target, wanted: Wanted, etag: str | None, stop: threading.Event) -> None:
    """Return when the copy is proved to be at the target. See `Copier.confirm`."""
    try:
        stat = target.stat(object_key(wanted.digest))
    except ObjectAbsent as error:
        raise BytesDiffer(target.name, "what was stored is not there") from error
    if stat.size_bytes != wanted.size_bytes:
        raise BytesDiffer(
            target.name, f"{stat.size_bytes} bytes are there, not {wanted.size_bytes}"
        )
    if wanted.profile.verification == "sha256" and stat.sha256 == wanted.digest:
        return
    if etag is not None and stat.etag == etag:
        return
    # Also where the server tells what it did not tell when it was probed: bytes prove all.
    read_back(target, wanted.digest, wanted.size_bytes, stop)


# --- in parts


@final
class _Multipart:
    """A multipart upload of one blob, from its beginning or from where it was."""

    def __init__(self, copier: Copier, wanted: Wanted, source: _Source, keep: Keep | None) -> None:
        self._copier = copier
        self._target = copier._target
        self._patient = copier.patient
        self._in_thread = copier._in_thread
        self._wanted = wanted
        self._key = object_key(wanted.digest)
        self._source = source
        self._keep = keep
        self._upload: Copy
        self._there: dict[int, str] = {}  # number -> etag, of the parts that are at the target
        self._md5s: list[bytes | None] = []
        self._kept_parts = 0
        self._kept_s = 0.0

    async def run(self, unfinished: Copy | None) -> None:
        if unfinished is not None and await self._completed_before(unfinished):
            return
        if unfinished is None or not await self._go_on_with(unfinished):
            await self._begin()
        try:
            await self._finish()
        finally:
            self._copier.nameless.discard(self._upload.upload_id)

    async def _finish(self) -> None:
        """Send what is not there yet, and make the object of it."""
        try:
            await self._send_all()
            self._source.refuse_damage()
        except (BlobDamaged, UploadForgotten):
            await self._abort()
            raise
        except BaseException:
            if self._keep is None:
                await self._abort()
            raise
        etags = [self._there[number] for number in sorted(self._there)]
        await self._in_thread(self._complete, etags)
        await self._in_thread(self._copier.confirm, self._wanted, self._whole_etag())

    def _complete(self, etags: list[str]) -> None:
        gone = None
        tried = 0

        def complete() -> None:
            nonlocal tried, gone
            tried += 1
            try:
                self._target.complete(self._key, self._upload.upload_id, etags)
            except ObjectAbsent as error:
                gone = error

        self._patient.again(complete)
        if gone is not None and tried == 1:
            raise gone
        # Else an earlier request did it whose answer was lost, or the proof tells that not.

    # --- beginning

    async def _begin(self) -> None:
        upload_id = await self._in_thread(self._patient.begin, self._key)
        self._upload = self._copy_of(upload_id, self._wanted.part_bytes)
        self._there = {}
        if self._keep is None:
            self._copier.nameless.add(upload_id)
        # Before the first part: from here on somebody knows that it is to be ended.
        await self._write_down([])

    async def _go_on_with(self, unfinished: Copy) -> bool:
        """Find out which parts are there; False where the upload is gone."""
        try:
            parts = await self._in_thread(self._patient.parts, self._key, unfinished.upload_id)
        except ObjectAbsent:
            return False
        self._upload = unfinished
        known = dict(enumerate(unfinished.etags, 1))
        for part in parts:
            if part.size_bytes == self._part_size(part.number):
                self._there[part.number] = part.etag
        # An etag that was not written down tells something only if it is the MD5.
        if not self._wanted.profile.parts_md5:
            self._there = {
                number: etag for number, etag in self._there.items() if known.get(number) == etag
            }
        self._kept_parts = len(unfinished.etags)
        return True

    async def _completed_before(self, unfinished: Copy) -> bool:
        """Whether the upload was completed and its answer lost, or never written down."""
        try:
            await self._in_thread(self._patient.parts, self._key, unfinished.upload_id)
        except ObjectAbsent:
            pass
        else:
            return False
        try:
            stat = await self._in_thread(self._patient.stat, self._key)
            if stat.size_bytes != self._wanted.size_bytes:
                return False
            self._md5s = await self._source.hash_all(unfinished.part_bytes)
            await self._in_thread(self._copier.confirm, self._wanted, self._whole_etag())
        except (ObjectAbsent, BytesDiffer):
            return False
        finally:
            self._source.rewind()
            self._md5s = []
        return True

    # --- sending

    async def _send_all(self) -> None:
        """Hash one part after the other, and send those that are not there meanwhile."""
        self._kept_s = time.monotonic()
        flying: set[asyncio.Task[None]] = set()
        try:
            for number, size_bytes in self._parts():
                md5 = await self._source.hash_next(size_bytes)
                self._md5s.append(md5)
                if self._is_there(number, md5):
                    continue
                self._there.pop(number, None)
                await self._until(flying, PARTS_AT_ONCE - 1)
                flying.add(asyncio.create_task(self._send(number, size_bytes, md5)))
            await self._until(flying, 0)
        except BaseException:
            # What the others bring to the target need not be sent again.
            await asyncio.gather(*flying, return_exceptions=True)
            with suppress(UploadForgotten):
                await self._write_down(self._prefix())
            raise

    async def _until(self, flying: set[asyncio.Task[None]], most: int) -> None:
        """Wait until `most` parts are on their way; raises what became of the others."""
        while len(flying) > most:
            done, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            flying -= done
            errors = [error for task in done if (error := task.exception()) is not None]
            if errors:
                raise errors[0]
        await self._write_down_now_and_then()

    async def _send(self, number: int, size_bytes: int, md5: bytes | None) -> None:
        """One part. A cut connection or wrong bytes cost only it, not the whole blob."""
        for tried in count():
            try:
                etag = await self._in_thread(self._put_part, number, size_bytes, md5)
            except (TargetUnreachable, TargetBusy, BytesDiffer) as error:
                pause_s = again_in_s(error, tried)
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
            else:
                self._copier.heard()
                self._there[number] = etag
                return

    def _put_part(self, number: int, size_bytes: int, md5: bytes | None) -> str:
        first = (number - 1) * self._upload.part_bytes
        with self._source.part(first, size_bytes) as body:
            etag = self._target.put_part(
                self._key,
                self._upload.upload_id,
                number,
                self._copier.sending(body),
                size_bytes,
                md5,
            )
        if md5 is not None and self._wanted.profile.parts_md5 and etag != md5.hex():
            raise BytesDiffer(self._target.name, f"part {number} is another one there: {etag}")
        return etag

    def _is_there(self, number: int, md5: bytes | None) -> bool:
        etag = self._there.get(number)
        if etag is None:
            return False
        written_down = number <= len(self._upload.etags) and self._upload.etags[number - 1] == etag
        return written_down or (
            md5 is not None and self._wanted.profile.parts_md5 and etag == md5.hex()
        )

    # --- writing down

    async def _write_down_now_and_then(self) -> None:
        etags = self._prefix()
        new_bytes = (len(etags) - self._kept_parts) * self._upload.part_bytes
        if new_bytes >= _KEEP_BYTES or (
            new_bytes > 0 and time.monotonic() - self._kept_s >= _KEEP_S
        ):
            await self._write_down(etags)

    async def _write_down(self, etags: list[str]) -> None:
        if self._keep is None or (etags and len(etags) == self._kept_parts):
            return
        upload = msgspec.structs.replace(self._upload, etags=etags)
        if not await self._keep(upload):
            await self._abort()
            raise UploadForgotten(f"the upload of {self._wanted.digest.hex()} was given up")
        self._upload, self._kept_parts, self._kept_s = upload, len(etags), time.monotonic()

    async def _abort(self) -> None:
        """Best effort: what stays is found by `removing` and aborted then."""
        with suppress(TargetError):
            await self._in_thread(self._target.abort, self._key, self._upload.upload_id)

    # --- arithmetic

    def _parts(self) -> list[tuple[int, int]]:
        """(number, bytes) of each part."""
        count = -(-self._wanted.size_bytes // self._upload.part_bytes)
        return [(number, self._part_size(number)) for number in range(1, count + 1)]

    def _part_size(self, number: int) -> int:
        part_bytes = self._upload.part_bytes
        return max(0, min(part_bytes, self._wanted.size_bytes - (number - 1) * part_bytes))

    def _prefix(self) -> list[str]:
        """The etags from the first part on, up to the first that is not there."""
        etags: list[str] = []
        while (etag := self._there.get(len(etags) + 1)) is not None:
            etags.append(etag)
        return etags

    def _whole_etag(self) -> str | None:
        """What S3 calls an object of these parts: the MD5 of their MD5s, and their number."""
        md5s = [md5 for md5 in self._md5s if md5 is not None]
        if not self._wanted.profile.parts_md5 or not md5s or len(md5s) != len(self._md5s):
            return None
        return f"{_md5(b''.join(md5s)).hexdigest()}-{len(md5s)}"

    def _copy_of(self, upload_id: str, part_bytes: int) -> Copy:
        # Catalog time is not known here and told by the frame; this is for people.
        return Copy(self._target.name, self._wanted.digest, upload_id, part_bytes, [], 0)


@final
class _Source:
    """The bytes that are here: hashed once from the first to the last, in parts."""

    def __init__(self, wanted: Wanted, fd: int, threads: Executor) -> None:
        self._wanted = wanted
        self._fd = fd
        self._threads = threads
        profile = wanted.profile
        self.with_md5 = profile.verification == "md5" or (wanted.in_parts and profile.parts_md5)
        self._buffer = memoryview(bytearray(min(_HASH_BYTES, wanted.size_bytes)))
        self.rewind()

    def rewind(self) -> None:
        """Begin anew with the first byte."""
        self._sha256 = hashlib.sha256()
        self._hashed_bytes = 0
        os.lseek(self._fd, 0, os.SEEK_SET)

    async def hash_all(self, part_bytes: int) -> list[bytes | None]:
        """The MD5 of each part; raises BlobDamaged where the whole is not the digest's."""
        md5s: list[bytes | None] = []
        while (left := self._wanted.size_bytes - self._hashed_bytes) > 0:
            md5s.append(await self.hash_next(min(part_bytes, left)))
        self.refuse_damage()
        return md5s

    async def hash_next(self, size_bytes: int) -> bytes | None:
        """The MD5 of the next `size_bytes`, where the profile has a use for it."""
        md5 = _md5() if self.with_md5 else None
        left = size_bytes
        loop = asyncio.get_running_loop()
        async with aiofiles.open(
            self._fd, "rb", buffering=0, closefd=False, executor=self._threads
        ) as file:
            while left:
                count = await file.readinto(self._buffer[:left])
                if not count:
                    raise _damaged(self._wanted.digest)
                piece = self._buffer[:count]
                await loop.run_in_executor(self._threads, partial(self._hash, piece, md5))
                left -= count
        self._hashed_bytes += size_bytes
        return md5.digest() if md5 is not None else None

    def _hash(self, piece: memoryview, md5: hashlib._Hash | None) -> None:
        self._sha256.update(piece)
        if md5 is not None:
            md5.update(piece)

    def refuse_damage(self) -> None:
        """Raise BlobDamaged unless what was hashed are the bytes of the digest."""
        if self._sha256.digest() != self._wanted.digest:
            raise _damaged(self._wanted.digest)

    def part(self, first: int, size_bytes: int) -> _Part:
        return _Part(self._fd, first, size_bytes)


@final
class _Part:
    """Bytes of a file as a `Body`: reads at its own position, so many share a descriptor.

    They were hashed a moment ago, so they come from memory.
    """

    def __init__(self, fd: int, first: int, size_bytes: int) -> None:
        # Of its own: a request that hangs may outlive the copy, and the number be used again.
        self._fd = os.dup(fd)
        self._first = first
        self._size_bytes = size_bytes
        self._position = 0

    def read(self, size: int = -1, /) -> bytes:
        left = self._size_bytes - self._position
        size = left if size < 0 else min(size, left)
        piece = os.pread(self._fd, size, self._first + self._position)
        self._position += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0, /) -> int:
        base = (0, self._position, self._size_bytes)[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _md5(content: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(content, usedforsecurity=False)


def _damaged(digest: Digest) -> BlobDamaged:
    return BlobDamaged(digest.hex(), "the bytes here are not those of its digest")
