"""A small node in front of a bucket: what it acknowledges is there, and it forgets at leisure."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from bench.ceph import REGION
from bench.corpus import content
from cas.clock import DAY_US
from tests.end_to_end.nodes import (
    KIB,
    MIB,
    Node,
    judge_bucket,
    judge_doctor,
    judge_served,
    path_of,
    serving_node,
    settings_of,
    until,
    until_mirrored,
    until_shipped,
)
from tests.s3.ceph import Bucket
from tests.s3.fault_proxy import FaultProxy, Say, good, only

pytestmark = pytest.mark.slow

READERS = 40


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultProxy]:
    with FaultProxy(bucket) as proxy:
        yield proxy


def test_with_storage_in_a_bucket_nothing_is_acknowledged_before_it_is_there(
    root: Path, proxy: FaultProxy, bucket: Bucket
) -> None:
    environ = {
        "STORAGE_TYPE": "s3",
        "S3_ENDPOINT_URL": proxy.address,
        "S3_ACCESS_KEY_ID": bucket.login.access_key,
        "S3_SECRET_ACCESS_KEY": bucket.login.secret_key,
        "S3_BUCKET_NAME": bucket.name,
        "S3_REGION": REGION,
        "S3_USE_SSL": "false",
    }
    with serving_node(root / "node", {}, environ=environ) as node:
        data, url = content(64 * KIB, 77), "/api/v1/storage?name=a&filename=a.bin"

        def stored() -> bool:
            return node.served.ask("POST", url, data, token=node.served.admin).status == 201

        until("the bucket was looked at", stored)
        for _ in range(5):
            judge_bucket(bucket, [node.store()])
        judge_bucket(bucket, [node.store(20 * MIB)])
        proxy.luck = only("PUT", Say(503, "SlowDown"), below="objects/")
        late = content(64 * KIB, 78)
        refused = node.served.ask("POST", url, late, token=node.served.admin)
        assert refused.status == 503, refused.body
        proxy.luck = good
        until(
            "the same request is good again",
            lambda: node.served.ask("POST", url, late, token=node.served.admin).status == 201,
        )
        digest = hashlib.sha256(late).hexdigest()
        assert bucket.read(f"objects/{digest[:2]}/{digest}") == late


def grow_idle(node: Node) -> None:
    """As if nobody had read anything for a day: what was used just now is never evicted."""
    for path in (node.root / "objects").rglob("*"):
        if path.is_file():
            with suppress(FileNotFoundError):  # evicted just now
                found = path.stat()
                os.utime(path, ns=(found.st_atime_ns - DAY_US * 1000, found.st_mtime_ns))


def local_bytes(node: Node) -> int:
    size_bytes = 0
    for path in (node.root / "objects").rglob("*"):
        if path.is_file():
            with suppress(FileNotFoundError):  # evicted just now
                size_bytes += path.stat().st_size
    return size_bytes


def test_a_small_disk_in_front_of_a_big_bucket(
    root: Path, proxy: FaultProxy, bucket: Bucket
) -> None:
    room = 4 * MIB
    settings = settings_of(proxy.bucket, CACHE__MAX_SIZE="4MiB")
    with serving_node(root / "node", settings) as node:
        stored = [node.store(MIB) for _ in range(12)]
        until_mirrored(node)
        until_shipped(node.root, bucket)
        grow_idle(node)
        until("the cache keeps its size", lambda: local_bytes(node) <= room)
        judge_bucket(bucket, stored)
        judge_served(node.served, stored)
        grow_idle(node)
        until("it keeps it after reading, too", lambda: local_bytes(node) <= room)
        judge_doctor(node.root, settings)


def test_many_readers_of_a_blob_that_is_elsewhere_cause_one_fetch(
    root: Path, proxy: FaultProxy, bucket: Bucket
) -> None:
    settings = settings_of(proxy.bucket, CACHE__MAX_SIZE="12MiB")
    with serving_node(root / "node", settings) as node:
        wanted = node.store(8 * MIB)
        grow_idle(node)
        node.store(8 * MIB)
        until_mirrored(node)
        until_shipped(node.root, bucket)
        until("it was evicted", lambda: not (node.root / wanted.key).exists())
        grow_idle(node)  # the other one is what makes room
        before = proxy.count("GET", below=wanted.key)

        def read(_: int) -> str:
            answer = node.served.ask("GET", path_of(wanted.reference), token=node.served.admin)
            assert answer.status == 200, answer.body[:500]
            return hashlib.sha256(answer.body).hexdigest()

        with ThreadPoolExecutor(READERS) as readers:
            assert set(readers.map(read, range(READERS))) == {wanted.digest}
        assert proxy.count("GET", below=wanted.key) == before + 1
