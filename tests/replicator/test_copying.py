"""One copy: sent whole or in parts, proved, taken up again, and never made of wrong bytes."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cas.blobs import BlobFiles
from cas.digest import Digest, digest_of
from cas.errors import BlobDamaged, BlobMissing
from cas.records import Copy
from replicator.bandwidth import Bandwidth, Sending, SendingStopped
from replicator.copying import SMALL_BYTES, Copier, UploadForgotten, Wanted
from replicator.folder import FolderTarget
from replicator.probe import Profile
from replicator.targets import BytesDiffer, ObjectAbsent, TargetUnreachable, object_key
from tests.replicator.between import BY_MD5, BY_READING, BY_SHA256, MIB, PROFILES, Between, Instead

SMALL = b"small bytes"
MIDDLE = os.urandom(SMALL_BYTES) + b"and more"  # more than is held in memory
IN_PARTS = os.urandom(5 * MIB // 2 + 17) + bytes(2 * MIB)
ONE_PUT = Profile(verification="md5")  # a server without multipart uploads
LENGTHS = {"empty": b"", "small": SMALL, "middle": MIDDLE, "in parts": IN_PARTS}


class Place:
    """Local blobs, a target behind a meddler, and the copier between them."""

    def __init__(self, root: Path, bandwidth: Bandwidth | None = None) -> None:
        self.blobs = BlobFiles(root / "store")
        self.blobs.create()
        self.target = Between(FolderTarget("other", root / "target"))
        self._threads = ThreadPoolExecutor(8)
        self.copier = Copier(self.target, self.blobs, self._threads, bandwidth or Bandwidth(0))
        self.kept: list[Copy] = []

    def put(self, content: bytes) -> Digest:
        with self.blobs.stage(content) as staged:
            self.blobs.place(staged)
            return staged.digest

    def copy(self, digest: Digest, size_bytes: int, profile: Profile, **more: object) -> None:
        wanted = Wanted(digest, size_bytes, profile)
        asyncio.run(self.copier.copy(wanted, **more))  # type: ignore[arg-type]

    async def keep(self, copy: Copy) -> bool:
        self.kept.append(copy)
        return True

    def there(self, digest: Digest) -> bytes | None:
        try:
            with self.target.target.get(object_key(digest)) as incoming:
                content = b""
                while piece := incoming.read(MIB):
                    content += piece
                return content
        except ObjectAbsent:
            return None

    def unfinished(self) -> int:
        return len(list(self.target.target.unfinished()))

    def spoil(self, digest: Digest) -> None:
        """Flip a bit of the local bytes."""
        path = self.blobs.path(digest)
        os.chmod(path, 0o600)
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            (byte,) = file.read(1)
            file.seek(-1, io.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    def close(self) -> None:
        self._threads.shutdown()
        self.blobs.close()


@pytest.fixture
def place(root: Path) -> Iterator[Place]:
    made = Place(root)
    yield made
    made.close()


@pytest.mark.parametrize("profile", [*PROFILES.values(), ONE_PUT], ids=[*PROFILES, "one put"])
@pytest.mark.parametrize("content", LENGTHS.values(), ids=LENGTHS)
def test_bytes_of_any_length_arrive(place: Place, profile: Profile, content: bytes) -> None:
    digest = place.put(content)

    place.copy(digest, len(content), profile)

    assert place.there(digest) == content
    assert place.unfinished() == 0


def test_what_the_server_tells_is_enough_where_it_tells_what_only_the_bytes_can(
    place: Place,
) -> None:
    for content in (SMALL, MIDDLE, IN_PARTS):
        place.copy(place.put(content), len(content), BY_MD5)
    place.copy(place.put(SMALL), len(SMALL), BY_SHA256)
    assert place.target.count("get") == 0
    place.copy(place.put(SMALL), len(SMALL), BY_READING)
    assert place.target.count("get") == 1


# --- lies


def store_nothing(place: Place) -> Callable[[str, str], None]:
    def meddle(verb: str, _key: str) -> None:
        if verb == "put" or verb.startswith("part") or verb == "complete":
            raise Instead("0" * 32)

    return meddle


def store_half(place: Place) -> Callable[[str, str], None]:
    def meddle(verb: str, key: str) -> None:
        if verb == "stat":
            cut(place, key)

    return meddle


def cut(place: Place, key: str) -> None:
    content = place.there(Digest(bytes.fromhex(key.rpartition("/")[2]))) or b""
    half = content[: len(content) // 2]
    place.target.target.put(key, io.BytesIO(half), len(half))


def store_other_bytes(place: Place) -> Callable[[str, str], None]:
    def meddle(verb: str, key: str) -> None:
        if verb == "stat":
            content = place.there(Digest(bytes.fromhex(key.rpartition("/")[2]))) or b""
            other = content[:-1] + bytes([content[-1] ^ 1])
            place.target.target.put(key, io.BytesIO(other), len(other))

    return meddle


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("content", [SMALL, MIDDLE, IN_PARTS], ids=["small", "middle", "in parts"])
@pytest.mark.parametrize("lie", [store_nothing, store_half, store_other_bytes])
def test_an_answer_that_lies_is_never_believed(
    place: Place,
    profile: Profile,
    content: bytes,
    lie: Callable[[Place], Callable[[str, str], None]],
) -> None:
    digest = place.put(content)
    place.target.meddle = lie(place)
    with pytest.raises(BytesDiffer):
        place.copy(digest, len(content), profile)


def test_a_server_that_stops_telling_what_the_probe_saw_has_its_copies_read_back(
    place: Place,
) -> None:
    for content in (SMALL, IN_PARTS):
        place.target.opaque = True
        place.target.calls.clear()
        place.copy(place.put(content), len(content), BY_MD5)
        assert place.target.count("get") == 1


# --- bad bytes here


@pytest.mark.parametrize("content", [SMALL, MIDDLE, IN_PARTS], ids=["small", "middle", "in parts"])
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_rotten_bytes_become_no_object(place: Place, profile: Profile, content: bytes) -> None:
    digest = place.put(content)
    place.spoil(digest)

    with pytest.raises(BlobDamaged):
        place.copy(digest, len(content), profile, keep=place.keep)

    assert place.there(digest) is None
    assert place.unfinished() == 0


def test_a_file_of_another_length_or_none_becomes_no_object(place: Place) -> None:
    digest = place.put(IN_PARTS)
    with pytest.raises(BlobDamaged):
        place.copy(digest, len(IN_PARTS) + 1, BY_MD5)
    with pytest.raises(BlobMissing):
        place.copy(digest_of(b"never stored"), 12, BY_MD5)
    assert place.there(digest) is None


def test_a_blob_that_is_replaced_or_removed_meanwhile_is_copied_as_it_was_opened(
    place: Place,
) -> None:
    digest = place.put(IN_PARTS)

    def remove(verb: str, _key: str) -> None:
        if verb == "part 1":
            place.blobs.remove(digest)

    place.target.meddle = remove
    place.copy(digest, len(IN_PARTS), BY_MD5)
    assert place.there(digest) == IN_PARTS


# --- broken off, and taken up again


def break_at(verb: str, error: Exception) -> Callable[[str, str], None]:
    def meddle(now: str, _key: str) -> None:
        if now == verb:
            raise error

    return meddle


CUT = TargetUnreachable("other", "cut")


@pytest.mark.parametrize("profile", [BY_MD5, BY_READING], ids=["md5", "opaque"])
def test_an_upload_that_broke_off_sends_only_the_parts_that_are_not_there(
    place: Place, profile: Profile
) -> None:
    digest = place.put(IN_PARTS)
    place.target.meddle = break_at("part 4", CUT)
    with pytest.raises(TargetUnreachable):
        place.copy(digest, len(IN_PARTS), profile, keep=place.keep)
    place.target.calls.clear()
    place.target.meddle = lambda *_: None

    place.copy(digest, len(IN_PARTS), profile, unfinished=place.kept[-1], keep=place.keep)

    sent = {verb for verb, _ in place.target.calls if verb.startswith("part ")}
    # Without MD5s only the first three, written down without a gap, are known to be right.
    assert sent == ({"part 4"} if profile is BY_MD5 else {"part 4", "part 5"})
    assert place.target.count("begin") == 0
    assert place.there(digest) == IN_PARTS


def test_an_upload_is_written_down_before_its_first_part(place: Place) -> None:
    digest = place.put(IN_PARTS)
    place.copy(digest, len(IN_PARTS), BY_MD5, keep=place.keep)
    assert place.kept[0].etags == []
    assert place.kept[0].upload_id
    verbs = [verb for verb, _ in place.target.calls]
    assert verbs[0] == "begin"


def test_one_cut_connection_costs_one_part(place: Place) -> None:
    digest = place.put(IN_PARTS)
    cuts = iter([True])

    def meddle(verb: str, _key: str) -> None:
        if verb == "part 2" and next(cuts, False):
            raise CUT

    place.target.meddle = meddle
    place.copy(digest, len(IN_PARTS), BY_MD5)
    assert place.target.count("part 2") == 2
    assert place.target.count("part 1") == 1


@pytest.mark.parametrize("profile", [BY_MD5, BY_READING], ids=["md5", "opaque"])
def test_a_lost_answer_to_the_completion_costs_no_byte(place: Place, profile: Profile) -> None:
    digest = place.put(IN_PARTS)

    def lost(verb: str, _key: str) -> None:
        if verb == "stat":
            raise CUT

    place.target.meddle = lost
    with pytest.raises(TargetUnreachable):
        place.copy(digest, len(IN_PARTS), profile, keep=place.keep)
    place.target.calls.clear()
    place.target.meddle = lambda *_: None
    place.copy(digest, len(IN_PARTS), profile, unfinished=place.kept[-1], keep=place.keep)
    assert not [verb for verb, _ in place.target.calls if verb.startswith(("part ", "begin"))]


def test_an_object_that_is_not_what_the_lost_upload_made_is_sent_anew(place: Place) -> None:
    digest = place.put(IN_PARTS)
    other = bytes(len(IN_PARTS))
    place.target.target.put(object_key(digest), io.BytesIO(other), len(other))
    gone = Copy("other", digest, "0" * 32, MIB, [], 0)

    place.copy(digest, len(IN_PARTS), BY_MD5, unfinished=gone, keep=place.keep)

    assert place.there(digest) == IN_PARTS


def test_an_upload_that_nobody_wants_any_more_is_aborted(place: Place) -> None:
    digest = place.put(IN_PARTS)

    async def refuse(copy: Copy) -> bool:
        return False

    with pytest.raises(UploadForgotten):
        place.copy(digest, len(IN_PARTS), BY_MD5, keep=refuse)
    assert place.unfinished() == 0
    assert place.there(digest) is None


def test_without_a_record_a_failed_upload_leaves_nothing(place: Place) -> None:
    digest = place.put(IN_PARTS)
    place.target.meddle = break_at("part 3", CUT)
    with pytest.raises(TargetUnreachable):
        place.copy(digest, len(IN_PARTS), BY_MD5)
    assert place.unfinished() == 0


def test_stopping_ends_what_is_being_sent_in_the_middle(place: Place) -> None:
    digest = place.put(IN_PARTS)
    place.target.meddle = lambda verb, _key: place.copier.stop() if verb == "part 2" else None
    with pytest.raises(SendingStopped):
        place.copy(digest, len(IN_PARTS), BY_MD5, keep=place.keep)
    assert place.there(digest) is None
    assert place.unfinished() == 1  # to be gone on with


# --- sizes and pace


def test_parts_are_so_large_that_there_are_not_too_many() -> None:
    few = Profile(multipart=True, parts_max=1000)
    wanted = Wanted(digest_of(b""), 100 << 30, few)
    assert -(-wanted.size_bytes // wanted.part_bytes) <= 1000
    assert wanted.part_bytes % MIB == 0
    assert Wanted(digest_of(b""), 1 << 30, few).part_bytes == few.part_bytes
    assert not Wanted(digest_of(b""), few.part_bytes, few).in_parts


def test_the_bandwidth_is_shared_by_all_and_time_is_not_saved_up() -> None:
    now_s = 100.0
    bandwidth = Bandwidth(1000, now_s=lambda: now_s)
    assert bandwidth.owed_s(500) == pytest.approx(0.5)
    assert bandwidth.owed_s(500) == pytest.approx(1.0)
    now_s = 200.0
    assert bandwidth.owed_s(1000) == pytest.approx(1.0)
    assert Bandwidth(0).owed_s(1 << 40) == 0


def test_a_body_keeps_to_the_bandwidth_in_small_pieces() -> None:
    bandwidth = Bandwidth(4 << 30)
    body = Sending(io.BytesIO(IN_PARTS), bandwidth, threading.Event())
    assert len(body.read(MIB)) == bandwidth.piece_bytes
    body.seek(0)
    content = b""
    while piece := body.read(MIB):
        content += piece
    assert content == IN_PARTS


def test_waiting_for_the_bandwidth_ends_when_it_is_over(root: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(SendingStopped):
        Bandwidth(1).spend(1 << 40, stop)
