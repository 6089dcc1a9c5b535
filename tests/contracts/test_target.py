"""What every target promises, said against the seam alone. S3 is a real server."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec import convert

from cas.config import TargetSettings
from cas.digest import digest_of
from replicator.folder import FolderTarget
from replicator.probe import probe
from replicator.s3 import S3Target
from replicator.targets import (
    BytesDiffer,
    Changed,
    ObjectAbsent,
    ObjectRefused,
    Part,
    Target,
    TargetUnreachable,
    object_key,
)
from tests.s3.ceph import Bucket

CONTENT = b"the bytes of an object"
OTHER = b"other bytes"
PART_BYTES = 5 << 20  # the least that S3 takes of all but the last


def _folder(request: pytest.FixtureRequest) -> Target:
    root: Path = request.getfixturevalue("root")
    return FolderTarget("here", root / "target")


def _s3(request: pytest.FixtureRequest) -> Target:
    bucket: Bucket = request.getfixturevalue("bucket")
    options = bucket.options("some where/a+b")
    return S3Target(convert({"name": "there", **options}, TargetSettings))


TARGETS: dict[str, Callable[[pytest.FixtureRequest], Target]] = {"folder": _folder, "s3": _s3}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    made = TARGETS[request.param](request)
    yield made
    made.close()


def put(target: Target, key: str, content: bytes = CONTENT, **how: object) -> str:
    return target.put(key, io.BytesIO(content), len(content), **how)  # type: ignore[arg-type]


def read(target: Target, key: str, **span: int) -> bytes:
    with target.get(key, **span) as incoming:
        return b"".join(iter(lambda: incoming.read(7), b""))


def md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def put_part(target: Target, key: str, upload: str, number: int, content: bytes) -> str:
    return target.put_part(key, upload, number, io.BytesIO(content), len(content), md5(content))


# --- objects


@pytest.mark.parametrize("content", [b"", b"1", CONTENT, random.Random(1).randbytes(300_000)])
def test_what_was_put_is_read_back(target: Target, content: bytes) -> None:
    key = object_key(digest_of(content))
    etag = put(target, key, content)
    assert read(target, key) == content
    stat = target.stat(key)
    assert (stat.key, stat.size_bytes, stat.etag) == (key, len(content), etag)
    with target.get(key) as incoming:
        assert incoming.stat == stat


def test_an_object_takes_the_place_of_the_one_before(target: Target) -> None:
    first = put(target, "k")
    second = put(target, "k", OTHER)
    assert first != second
    assert read(target, "k") == OTHER


def test_a_body_is_read_from_where_it_stands(target: Target) -> None:
    body = io.BytesIO(b"before" + CONTENT + b"after")
    body.seek(6)
    target.put("k", body, len(CONTENT))
    assert read(target, "k") == CONTENT


def test_keys_may_hold_what_paths_may(target: Target) -> None:
    keys = ["a b/c+d", "ä/é", "x/~y_.-", "per%20cent", "equal=and&sign", "question?"]
    for key in keys:
        put(target, key, key.encode())
    assert [read(target, key).decode() for key in keys] == keys
    assert sorted(stat.key for stat in target.list("")) == sorted(keys)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 0, CONTENT[:1]), (3, None, CONTENT[3:]), (2, 4, CONTENT[2:5]), (5, 999, CONTENT[5:])],
)
def test_a_range_is_read(target: Target, first: int, last: int | None, expected: bytes) -> None:
    put(target, "k")
    with target.get("k", first_byte=first, last_byte=last) as incoming:
        assert incoming.stat.size_bytes == len(CONTENT)
        assert b"".join(iter(lambda: incoming.read(3), b"")) == expected


def test_a_range_behind_the_end_is_told(target: Target) -> None:
    put(target, "k")
    with pytest.raises(BytesDiffer), target.get("k", first_byte=len(CONTENT)):
        pass


def test_a_reader_may_stop_early(target: Target) -> None:
    content = bytes(3 << 20)
    put(target, "k", content)
    with target.get("k") as incoming:
        assert incoming.read(10) == content[:10]
    assert target.stat("k").size_bytes == len(content)


def test_a_reader_keeps_the_object_it_began(target: Target) -> None:
    content = random.Random(2).randbytes(1 << 20)
    put(target, "k", content)
    with target.get("k") as incoming:
        begun = incoming.read(100)
        put(target, "k", OTHER)
        rest = b"".join(iter(lambda: incoming.read(1 << 16), b""))
    assert begun + rest == content


def test_what_is_not_there_is_absent(target: Target) -> None:
    put(target, "k")
    for ask in (lambda: target.stat("nothing"), lambda: read(target, "nothing")):
        with pytest.raises(ObjectAbsent):
            ask()


def test_a_deleted_object_is_gone_and_may_be_deleted_again(target: Target) -> None:
    put(target, "a/k")
    target.delete("a/k")
    target.delete("a/k")
    target.delete("never/there")
    with pytest.raises(ObjectAbsent):
        target.stat("a/k")
    assert list(target.list("")) == []


def test_bytes_that_are_not_what_was_said_are_not_stored(target: Target) -> None:
    with pytest.raises(BytesDiffer):
        put(target, "k", md5=md5(OTHER))
    with pytest.raises(BytesDiffer):
        put(target, "k", sha256=digest_of(OTHER))
    with pytest.raises(ObjectAbsent):
        target.stat("k")


def test_bytes_that_are_what_was_said_are_stored(target: Target) -> None:
    put(target, "k", md5=md5(CONTENT), sha256=digest_of(CONTENT))
    assert read(target, "k") == CONTENT


def test_a_source_that_ends_early_stores_nothing(target: Target) -> None:
    with pytest.raises(BytesDiffer):
        target.put("k", io.BytesIO(CONTENT), len(CONTENT) + 1, md5=md5(CONTENT))
    with pytest.raises(ObjectAbsent):
        target.stat("k")


# --- conditions


def test_if_absent_lets_only_the_first_one_in(target: Target) -> None:
    put(target, "k", if_absent=True)
    with pytest.raises(Changed):
        put(target, "k", OTHER, if_absent=True)
    assert read(target, "k") == CONTENT


def test_if_match_compares_and_swaps(target: Target) -> None:
    first = put(target, "k")
    second = put(target, "k", OTHER, if_match=first)
    with pytest.raises(Changed):
        put(target, "k", if_match=first)
    with pytest.raises(Changed):
        put(target, "nothing", if_match=first)
    assert read(target, "k") == OTHER
    assert target.stat("k").etag == second


def test_the_same_bytes_again_are_an_object_that_if_match_knows(target: Target) -> None:
    first = put(target, "k")
    second = put(target, "k", if_match=first)
    assert put(target, "k", OTHER, if_match=second)


def test_of_many_who_swap_at_once_one_wins(target: Target) -> None:
    etag = put(target, "k", b"0", if_absent=True)
    together = threading.Barrier(8)

    def swap(number: int) -> str | None:
        together.wait(30)
        try:
            return put(target, "k", b"by %d" % number, if_match=etag)
        except (Changed, TargetUnreachable):  # Ceph says 500 to some who lose
            return None

    with ThreadPoolExecutor(8) as threads:
        won = [found for found in threads.map(swap, range(8)) if found]
    assert len(won) == 1
    assert target.stat("k").etag == won[0]


# --- listing


def test_a_listing_is_in_order_of_keys_and_begins_after_any(target: Target) -> None:
    keys = sorted(["a-b", "a/b", "a/b-c/d", "a/b.c", "a/c/d", "b", "B/x", "a0", "ab/c"])
    for key in keys:
        put(target, key, key.encode())
    assert [stat.key for stat in target.list("")] == keys
    assert [stat.key for stat in target.list("a/")] == [key for key in keys if key[:2] == "a/"]
    assert [stat.key for stat in target.list("a")] == [key for key in keys if key[0] == "a"]
    for after in (*keys, "a/b-c/", "a/b/", "a/zz", "A", "zz"):
        expected = [key for key in keys if key > after]
        assert [stat.key for stat in target.list("", after=after)] == expected
    assert list(target.list("nothing/")) == []


def test_a_listing_tells_what_stat_tells(target: Target) -> None:
    put(target, "a/k")
    (listed,) = target.list("a/")
    stat = target.stat("a/k")
    assert (listed.key, listed.size_bytes, listed.etag) == (stat.key, stat.size_bytes, stat.etag)
    assert abs(listed.modified_us - stat.modified_us) <= 1_000_000


@pytest.mark.slow
def test_a_listing_is_longer_than_a_page(target: Target) -> None:
    keys = [f"many/{number:05}" for number in range(1_050)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: put(target, key, b""), keys))
    assert [stat.key for stat in target.list("many/")] == keys


# --- in parts


def test_parts_become_an_object(target: Target) -> None:
    parts = [random.Random(3).randbytes(PART_BYTES), random.Random(4).randbytes(1_000)]
    upload = target.begin("a/k")
    # In any order, and one of them twice.
    second = put_part(target, "a/k", upload, 2, parts[1])
    put_part(target, "a/k", upload, 1, OTHER)
    first = put_part(target, "a/k", upload, 1, parts[0])
    assert list(target.parts("a/k", upload)) == [
        Part(1, PART_BYTES, first),
        Part(2, 1_000, second),
    ]
    with pytest.raises(ObjectAbsent):
        target.stat("a/k")
    etag = target.complete("a/k", upload, [first, second])
    assert hashlib.sha256(read(target, "a/k")).digest() == digest_of(b"".join(parts))
    assert target.stat("a/k").etag == etag
    assert list(target.unfinished()) == []
    _is_forgotten(target, "a/k", upload)


def test_an_aborted_upload_is_forgotten(target: Target) -> None:
    upload = target.begin("k")
    put_part(target, "k", upload, 1, CONTENT)
    target.abort("k", upload)
    target.abort("k", upload)
    _is_forgotten(target, "k", upload)
    assert list(target.unfinished()) == []
    with pytest.raises(ObjectAbsent):
        target.stat("k")


def _is_forgotten(target: Target, key: str, upload: str) -> None:
    with pytest.raises(ObjectAbsent):
        target.parts(key, upload)
    with pytest.raises(ObjectAbsent):
        put_part(target, key, upload, 1, CONTENT)
    with pytest.raises(ObjectAbsent):
        target.complete(key, upload, [md5(CONTENT).hex()])


def test_an_unfinished_upload_is_found(target: Target) -> None:
    uploads = {key: target.begin(key) for key in ("a/1", "a/2", "b/1")}
    found = list(target.unfinished("a/"))
    assert {each.key: each.upload_id for each in found} == {
        key: uploads[key] for key in ("a/1", "a/2")
    }
    put(target, "a/now")
    now_us = target.stat("a/now").modified_us
    assert all(abs(each.begun_us - now_us) < 60_000_000 for each in found)
    for key, upload in uploads.items():
        target.abort(key, upload)


def test_a_part_is_checked_by_its_md5(target: Target) -> None:
    upload = target.begin("k")
    with pytest.raises(BytesDiffer):
        target.put_part("k", upload, 1, io.BytesIO(CONTENT), len(CONTENT), md5(OTHER))
    assert list(target.parts("k", upload)) == []
    target.abort("k", upload)


def test_parts_that_are_not_there_do_not_become_an_object(target: Target) -> None:
    upload = target.begin("k")
    put_part(target, "k", upload, 1, CONTENT)
    with pytest.raises((BytesDiffer, ObjectRefused)):
        target.complete("k", upload, [md5(OTHER).hex()])
    target.abort("k", upload)
    with pytest.raises(ObjectAbsent):
        target.stat("k")


# --- many at once


def test_many_use_a_target_at_once(target: Target) -> None:
    def there_and_back(number: int) -> bool:
        content = random.Random(number).randbytes(10_000)
        key = object_key(digest_of(content))
        put(target, key, content, md5=md5(content))
        return read(target, key) == content and target.stat(key).size_bytes == len(content)

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(there_and_back, range(100)))


def test_a_target_names_its_place(target: Target) -> None:
    assert target.name in ("here", "there")
    assert target.place.startswith(("folder /", "s3://"))
    assert "some where/a+b" in target.place or "/target" in target.place


def test_a_probe_leaves_nothing_behind(target: Target) -> None:
    profile = probe(target)
    assert profile.conditional
    assert profile.list_ordered
    assert profile.clock_offset_us == 0
    assert list(target.list("")) == []
    assert list(target.unfinished()) == []
