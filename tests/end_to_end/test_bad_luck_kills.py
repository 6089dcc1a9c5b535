"""The replicator is killed again and again while uploads go on: all gets there, once."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.end_to_end.nodes import (
    KIB,
    MIB,
    Node,
    Replicating,
    judge_bucket,
    judge_doctor,
    replicating,
    serving_node,
    settings_of,
    until_mirrored,
    until_shipped,
)
from tests.s3.ceph import Bucket
from tests.s3.fault_proxy import Asked, Fault, FaultProxy, Slow

SMALL_BYTES = 64 * KIB
LARGE_BYTES = 96 * MIB
AT_ONCE = 4
# Small blobs that one kill may cost: those on their way, and those that arrived a moment ago
# and were not written down yet.
SMALL_LOST = 4 * AT_ONCE
LINK_BYTES_PER_S = 24 * MIB


@contextmanager
def uploading(node: Node) -> Iterator[threading.Event]:
    """Small files are sent all the time until the end of the block."""
    over = threading.Event()
    failed: list[BaseException] = []

    def send() -> None:
        try:
            while not over.is_set():
                node.store(SMALL_BYTES)
        except BaseException as error:
            failed.append(error)
            raise

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield over
    finally:
        over.set()
        sender.join()
    assert not failed


def _objects_are_slow(asked: Asked) -> Fault | None:
    large = asked.size_bytes > MIB
    return Slow(LINK_BYTES_PER_S // AT_ONCE) if large and "objects/" in asked.key else None


def _kill_loop(root: Path, bucket: Bucket, kills: int, large: int, seed: int) -> None:
    rng = random.Random(seed)
    with (
        FaultProxy(bucket) as proxy,
        serving_node(
            root / "node",
            settings_of(proxy.bucket, REPLICATOR__CONCURRENCY=str(AT_ONCE)),
            accompanied=False,
        ) as node,
        replicating(node.root, node.settings, root / "log") as replicator,
    ):
        node.store()
        until_mirrored(node)
        proxy.luck = _objects_are_slow
        for _ in range(large):
            node.store(LARGE_BYTES)
        with uploading(node) as over:
            for _ in range(kills):
                _let_it_work(proxy, rng)
                replicator.kill()
                replicator.start()
            over.set()
        until_mirrored(node, 300)
        until_shipped(node.root, bucket)
        _end_well(replicator, node)
        judge_bucket(bucket, node.ledger.stored)
        _judge_cost(proxy, node, kills)
        # Begun and not written down when it was killed: `abort far` ends them in an hour or two.
        assert bucket.unfinished() <= kills
    judge_doctor(node.root, node.settings)


def _let_it_work(proxy: FaultProxy, rng: random.Random) -> None:
    """Until some more requests were made for blobs: none at times, and then it is just starting."""
    more = proxy.count("PUT", below="objects/") + rng.choice((0, 1, 2, 5, 10, 20))
    proxy.wait_for(lambda seen: seen.count("PUT", below="objects/") >= more)


def _end_well(replicator: Replicating, node: Node) -> None:
    replicator.stop()
    assert node.ledger.stored


def _judge_cost(proxy: FaultProxy, node: Node, kills: int) -> None:
    """Nothing is sent twice but what a kill interrupted."""
    parts: Counter[tuple[str, str]] = Counter()  # that arrived whole
    small: Counter[str] = Counter()
    for asked, status in proxy.seen:
        if asked.method != "PUT" or "objects/" not in asked.key or status != HTTPStatus.OK:
            continue
        if "uploadId" in asked.query:
            parts[asked.query["uploadId"][0], asked.query["partNumber"][0]] += 1
        else:
            small[asked.key] += 1
    assert parts
    assert max(parts.values()) == 1, "a part that was there was sent once more"
    again = sum(small.values()) - len(small)
    assert again <= kills * SMALL_LOST
    twice = proxy.bytes_put - node.ledger.size_bytes
    print(  # noqa: T201
        f"{kills} kills, {len(node.ledger.stored)} files, {node.ledger.size_bytes:,} bytes: "
        f"{again} small ones sent twice; {twice:,} bytes more than needed, metadata included"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_lose_nothing_and_send_little_twice(root: Path, bucket: Bucket) -> None:
    _kill_loop(root, bucket, 10, 1, seed=20_261_121)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_kills_lose_nothing_and_send_little_twice(root: Path, bucket: Bucket) -> None:
    _kill_loop(root, bucket, 100, 3, seed=random.randrange(1 << 32))
