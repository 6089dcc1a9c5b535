"""The probe: finds out what a target honours, and says it as a profile that the mirror follows.

Servers that speak S3 differ, and what one does not honour it often accepts without a word. So
nothing is believed that was not seen: each question is a small object, asked about under
`probe/` and removed at the end.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Final, Literal, final

import msgspec

from cas.clock import SECOND_US, SystemClock
from replicator.targets import (
    BytesDiffer,
    Changed,
    ObjectAbsent,
    ObjectRefused,
    ObjectStat,
    Target,
    TargetBusy,
    TargetError,
    TargetUnreachable,
    Traits,
)

PROBE: Final = "probe/"
_CONTENT: Final = b"what a probe stores, to see what becomes of it"
_OTHER: Final = b"other bytes of another length"
_MIB: Final = 1 << 20
_PART_BYTES_MIN: Final = 5 << 20  # what S3 itself asks for
_PART_NUMBERS: Final = (10_000, 1_000)
_RUNNERS: Final = 8
_RACES: Final = 3
_RACE_S: Final = 30.0

Verification = Literal["sha256", "md5", "read_back"]


@final
class Profile(msgspec.Struct, frozen=True):
    """What a target honours. Kept as JSON in its record; the defaults promise nothing."""

    # How a copy is proved after its PUT, beside the size: `ObjectStat.sha256`, or the etag as
    # the MD5 of the bytes, or by reading all of it again.
    verification: Verification = "read_back"
    # If-Match and If-None-Match on a PUT are both honoured, also while others write.
    conditional: bool = False
    multipart: bool = False
    # The etag of a multipart object is the MD5 of its parts' MD5s, "-" and their number. Where
    # it is not, such an object is proved by reading it back, whatever `verification` says.
    parts_md5: bool = False
    part_bytes: int = 16 << 20  # to be used, unless an object needs larger ones
    part_bytes_min: int = 5 << 20  # of all but the last
    parts_max: int = 10_000
    equal_parts: bool = True  # all but the last must have one size
    presigned: bool = False
    list_ordered: bool = False
    versioning: bool | None = None  # a deleted object's bytes stay, and cost; None: unknown
    object_lock: bool | None = None  # what is there may refuse to be deleted
    clock_offset_us: int = 0  # what the server's clock is ahead of this machine's
    probed_at_us: int = 0  # µs since 1970 UTC

    def part_bytes_of(self, size_bytes: int) -> int:
        """The length of each part but the last of an object: so large that they are few enough."""
        fewest = -(-size_bytes // self.parts_max)
        least = max(self.part_bytes, self.part_bytes_min, fewest)
        return -(-least // _MIB) * _MIB

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Profile:
        """Raises msgspec.MsgspecError."""
        return msgspec.json.decode(data, type=cls)


def probe(target: Target, *, thorough: bool = False) -> Profile:
    """Find out what the target honours; some 20 small requests.

    `thorough` also asks what takes some 12 MiB: whether parts may have different lengths.
    Raises TargetError where it cannot be reached, or does not even do what all must do.
    """
    return _Probe(target, thorough).profile()


@final
class _Probe:
    """One probe; each question has keys of its own."""

    def __init__(self, target: Target, thorough: bool) -> None:
        self._target = target
        self._thorough = thorough
        self._prefix = f"{PROBE}{secrets.token_hex(8)}/"

    def profile(self) -> Profile:
        stored = self._store()
        traits = self._target.traits(self._prefix + "traits")
        profile = Profile(
            verification=self._verification(stored, traits),
            conditional=self._is_conditional(),
            presigned=traits.presigned,
            list_ordered=self._lists_in_order(),
            versioning=traits.versioning,
            object_lock=traits.object_lock,
            clock_offset_us=traits.clock_offset_us,
            probed_at_us=SystemClock().now_us(),
        )
        return self._with_parts(profile) if traits.in_parts else profile

    # --- what all must do

    def _store(self) -> ObjectStat:
        """Store bytes, read them back whole and in part, and see them gone."""
        with self._object("basics") as key:
            self._put(key, _CONTENT, md5=_md5(_CONTENT), sha256=_sha256(_CONTENT))
            stat = self._target.stat(key)
            if stat.size_bytes != len(_CONTENT) or self._read(key) != _CONTENT:
                raise BytesDiffer(self._target.name, "what was stored comes back as other bytes")
            if self._read(key, first_byte=5, last_byte=9) != _CONTENT[5:10]:
                raise BytesDiffer(self._target.name, "a range of an object comes as other bytes")
        with suppress(ObjectAbsent):
            self._target.stat(key)
            raise BytesDiffer(self._target.name, "what was deleted is still there")
        return stat

    # --- by what bytes are proved

    def _verification(self, stored: ObjectStat, traits: Traits) -> Verification:
        if traits.sha256_checked and stored.sha256 == _sha256(_CONTENT):
            return "sha256"
        return "md5" if self._has_md5() else "read_back"

    def _has_md5(self) -> bool:
        """Whether the etag is the MD5 of what is stored, and no echo of what was said."""
        with self._object("md5") as key:
            if self._put(key, _CONTENT) != _md5(_CONTENT).hex():
                return False
            if self._target.stat(key).etag != _md5(_CONTENT).hex():
                return False
            try:
                self._put(key, _CONTENT, md5=_md5(_OTHER))
            except BytesDiffer:
                return self._target.stat(key).etag == _md5(_CONTENT).hex()
            return False

    # --- conditions

    def _is_conditional(self) -> bool:
        try:
            return self._compares() and self._one_wins()
        except (ObjectRefused, BytesDiffer):  # the header itself is refused, or breaks things
            return False
        except Changed:  # of what was right: Ceph compares with nothing where versions are kept
            return False

    def _compares(self) -> bool:
        with self._object("conditions") as key:
            first = self._put(key, _CONTENT, if_absent=True)
            # The right one first: it shows how this server wants to be told an etag.
            second = self._put(key, _OTHER, if_match=first)
            return (
                second != first
                and self._is_refused(key, if_absent=True)
                and self._is_refused(key, if_match=first)
                and self._is_refused(f"{key}-none", if_match=first)
                and self._read(key) == _OTHER
            )

    def _one_wins(self) -> bool:
        """Of many who change one object at the same moment; nobody may win in vain."""
        won = 0
        with self._object("race") as key:
            etag = self._put(key, b"nobody", if_absent=True)
            for _ in range(_RACES):
                winners = self._race(key, etag)
                etag = self._target.stat(key).etag
                if len(winners) > 1 or winners not in ([], [etag]):
                    return False
                won += len(winners)
        return won > 0

    def _race(self, key: str, etag: str) -> list[str]:
        """The etags of those who were told that they won."""
        start = threading.Barrier(_RUNNERS)

        def run(_: int) -> str | None:
            start.wait(_RACE_S)
            # Ceph answers 500 to some of those who lose at the very last step.
            with suppress(Changed, TargetBusy, TargetUnreachable):
                return self._put(key, secrets.token_bytes(16), if_match=etag)
            return None

        with ThreadPoolExecutor(_RUNNERS) as threads:
            return [won for won in threads.map(run, range(_RUNNERS)) if won is not None]

    def _is_refused(
        self, key: str, *, if_match: str | None = None, if_absent: bool = False
    ) -> bool:
        try:
            self._put(key, b"must not be stored", if_match=if_match, if_absent=if_absent)
        except (Changed, ObjectAbsent):
            return True
        self._target.delete(key)
        return False

    # --- in parts

    def _with_parts(self, profile: Profile) -> Profile:
        with self._object("parts") as key:
            try:
                etag = self._put_parts(key, [_CONTENT])
            except ObjectRefused:
                return profile
            if self._read(key) != _CONTENT:
                return profile
            parts_md5 = f"{_md5(_md5(_CONTENT)).hex()}-1"
            least = self._part_bytes_min(key)
            return msgspec.structs.replace(
                profile,
                multipart=True,
                parts_md5=etag == parts_md5 and self._target.stat(key).etag == parts_md5,
                part_bytes_min=least,
                parts_max=self._parts_max(key),
                equal_parts=self._has_equal_parts(key, least),
            )

    def _part_bytes_min(self, key: str) -> int:
        return 1 if self._takes(key, [_CONTENT, _OTHER]) else _PART_BYTES_MIN

    def _has_equal_parts(self, key: str, least: int) -> bool:
        """Whether parts must have one length, as far as that is asked: it never harms."""
        if least > 1 and not self._thorough:
            return True
        sizes = (least, least + (least > 1) * (1 << 20) + 1, 1)
        return not self._takes(key, [bytes(size) for size in sizes])

    def _takes(self, key: str, parts: Sequence[bytes]) -> bool:
        try:
            self._put_parts(key, parts)
        except (ObjectRefused, BytesDiffer):
            return False
        return self._target.stat(key).size_bytes == sum(map(len, parts))

    def _parts_max(self, key: str) -> int:
        """The highest number of a part that is taken; the rest of S3 allows 10,000."""
        upload_id = self._target.begin(key)
        try:
            for number in _PART_NUMBERS:
                with suppress(ObjectRefused, BytesDiffer):
                    self._target.put_part(key, upload_id, number, io.BytesIO(b"1"), 1, _md5(b"1"))
                    return number
        finally:
            self._target.abort(key, upload_id)
        return _PART_NUMBERS[-1]

    def _put_parts(self, key: str, parts: Sequence[bytes]) -> str:
        upload_id = self._target.begin(key)
        try:
            etags = [
                self._target.put_part(
                    key, upload_id, number, io.BytesIO(part), len(part), _md5(part)
                )
                for number, part in enumerate(parts, start=1)
            ]
            return self._target.complete(key, upload_id, etags)
        except TargetError:
            with suppress(TargetError):
                self._target.abort(key, upload_id)
            raise

    # --- listing

    def _lists_in_order(self) -> bool:
        """In order of bytes, beginning after any key, without what has another prefix."""
        names = ["list/b", "list/B", "list/a/c", "list/a-c", "listed"]
        keys = [f"{self._prefix}{name}" for name in names]
        below = f"{self._prefix}list/"
        try:
            for key in keys:
                self._put(key, _CONTENT)
            listed = [stat.key for stat in self._target.list(below)]
            expected = sorted(keys[:-1])
            later = [stat.key for stat in self._target.list(below, after=expected[1])]
            return listed == expected and later == expected[2:]
        finally:
            for key in keys:
                self._target.delete(key)

    # --- objects

    @contextmanager
    def _object(self, name: str) -> Iterator[str]:
        """A key of its own, whose object is gone at the end."""
        key = self._prefix + name
        try:
            yield key
        finally:
            self._target.delete(key)

    def _put(
        self,
        key: str,
        content: bytes,
        *,
        md5: bytes | None = None,
        sha256: bytes | None = None,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> str:
        return self._target.put(
            key,
            io.BytesIO(content),
            len(content),
            md5=md5,
            sha256=sha256,
            if_match=if_match,
            if_absent=if_absent,
        )

    def _read(self, key: str, *, first_byte: int = 0, last_byte: int | None = None) -> bytes:
        with self._target.get(key, first_byte=first_byte, last_byte=last_byte) as incoming:
            pieces = []
            while piece := incoming.read(1 << 20):
                pieces.append(piece)
            return b"".join(pieces)


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


# --- in words


def words(profile: Profile) -> list[str]:
    """What a profile means, a sentence each, for people."""
    return [
        _PROOFS[profile.verification],
        (
            "Conditional writes: honoured, so two nodes cannot both ship here by mistake."
            if profile.conditional
            else "Conditional writes: not honoured. HEAD.json is read before and after each change"
            " instead, which leaves two nodes that ship here by mistake the time of one request."
        ),
        _parts_in_words(profile),
        f"Signed addresses: {'work' if profile.presigned else 'do not work'}.",
        (
            "Listings: in order of keys."
            if profile.list_ordered
            else "Listings: not in order of keys; verifying and restoring sort them first."
        ),
        _versions_in_words(profile.versioning),
        _lock_in_words(profile.object_lock),
        _clock_in_words(profile.clock_offset_us),
    ]


_PROOFS: Final = {
    "sha256": "Copies are proved by their SHA-256, which the server checks, keeps and tells.",
    "md5": "Copies are proved by their MD5, which the server checks and tells as the ETag; it does"
    " not check SHA-256, or does not tell it.",
    "read_back": "Copies are proved by reading them back, since the server tells nothing of their"
    " bytes that could be believed. Each copy is fetched once, which may cost money.",
}


def _parts_in_words(profile: Profile) -> str:
    if not profile.multipart:
        return "Large blobs: sent whole; a copy that breaks off begins anew."
    lengths = "of one length" if profile.equal_parts else "of any length"
    proof = "by their ETags" if profile.parts_md5 else "by reading the object back"
    return (
        f"Large blobs: sent in up to {profile.parts_max:,} parts {lengths}, each at least"
        f" {profile.part_bytes_min:,} bytes but for the last, and proved {proof}; a copy that"
        " breaks off goes on where it was."
    )


def _versions_in_words(versioning: bool | None) -> str:
    if versioning is None:
        return "Versioning: the credentials may not ask."
    if versioning:
        return (
            "Versioning: on. Deleted blobs stay as old versions and cost, until a lifecycle rule"
            " of the bucket ends them."
        )
    return "Versioning: off. Deleted blobs are gone."


def _lock_in_words(object_lock: bool | None) -> str:
    if object_lock is None:
        return "Object lock: the credentials may not ask."
    if object_lock:
        return "Object lock: on. Deletions are refused or hidden until its time is over."
    return "Object lock: off."


def _clock_in_words(offset_us: int) -> str:
    seconds = round(offset_us / SECOND_US)
    if not seconds:
        return "Clock: the server's and this machine's agree."
    which = "ahead of" if seconds > 0 else "behind"
    return f"Clock: the server's is {abs(seconds):,} s {which} this machine's; its own is used."
