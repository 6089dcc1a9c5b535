"""The mirror has bad luck with its target: what was acknowledged gets there all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.ceph import Ceph
from tests.end_to_end.nodes import (
    KIB,
    MIB,
    Node,
    done,
    errors,
    judge_bucket,
    judge_doctor,
    looking,
    serving_node,
    settings_of,
    until,
    until_mirrored,
    until_shipped,
    waiting,
    wanted_of,
)
from tests.s3.ceph import Bucket, make_bucket
from tests.s3.fault_proxy import (
    Asked,
    Cut,
    Fault,
    FaultProxy,
    Flip,
    Lose,
    Pretend,
    Refuse,
    Say,
    always,
    good,
    only,
)

pytestmark = pytest.mark.slow

FILES = 12
BAD_REQUESTS = 60  # while bits are flipped
STORM_S = 240.0  # an unlucky file is tried a dozen times
TRIES = 6  # so many PUTs that come to nothing are proof enough


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultProxy]:
    with FaultProxy(bucket) as proxy:
        yield proxy


@pytest.fixture
def node(root: Path, proxy: FaultProxy) -> Iterator[Node]:
    """A node that mirrors through the proxy, with one file that is there already."""
    with serving_node(root / "node", settings_of(proxy.bucket)) as node:
        node.store()
        until_mirrored(node)
        yield node


def test_the_target_is_down_from_the_beginning_and_then_there(
    root: Path, proxy: FaultProxy, bucket: Bucket
) -> None:
    proxy.luck = always(Refuse())
    with serving_node(root / "node", settings_of(proxy.bucket)) as node:
        node.store_many(FILES)
        with looking(node.root) as store:
            until("every file is wanted there", lambda: waiting(store) >= FILES)
            assert len(wanted_of(node, store)) == FILES
        _, told = node.status()
        assert "far" in str(told)
        ready = node.served.ask("GET", "/readyz")
        assert ready.status == 200, ready.body  # nothing has stood still for long
        assert bucket.keys() == []
        proxy.luck = good
        until_mirrored(node)
        until_shipped(node.root, bucket)
        judge_bucket(bucket, node.ledger.stored)
        judge_doctor(node.root, node.settings)


def test_the_target_goes_down_while_files_are_sent_and_slows_no_upload(
    node: Node, proxy: FaultProxy, bucket: Bucket
) -> None:
    proxy.luck = always(Refuse())
    proxy.cut_all()
    node.store_many(FILES)
    with looking(node.root) as store:
        assert len(wanted_of(node, store)) == FILES
        until("it is told why", lambda: errors(store))
    proxy.luck = good
    until_mirrored(node)
    judge_bucket(bucket, node.ledger.stored)


def _storm(asked: Asked) -> Fault | None:
    """Two of three requests are put off, in the ways that servers have."""
    return (
        None,
        Say(503, "SlowDown", {"Retry-After": "1"}),
        Say(500, "InternalError"),
        None,
        Say(503, "ServiceUnavailable"),
        Say(429, "TooManyRequests"),
    )[asked.number % 6]


def _cut(asked: Asked) -> Fault | None:
    """Every tenth connection is cut, each time somewhere else."""
    if asked.number % 10:
        return None
    ways: tuple[Fault, ...] = (Refuse(), Cut(1_000), Lose(), Cut(100, "answer"))
    return ways[asked.number // 10 % len(ways)]


def _rot(asked: Asked) -> Fault | None:
    """Every third body is not what was sent, on the way there or back."""
    if asked.number % 3:
        return None
    return Flip("answer") if asked.method == "GET" else Flip("request")


def test_with_every_tenth_connection_cut_all_gets_there(
    node: Node, proxy: FaultProxy, bucket: Bucket
) -> None:
    proxy.luck = _cut
    node.store_many(FILES)
    node.store(20 * MIB)  # in parts
    until_mirrored(node)
    until_shipped(node.root, bucket)
    judge_bucket(bucket, node.ledger.stored)


@pytest.mark.soak  # over a minute; the same before a folder: tests/replicator/test_mirror.py
def test_a_storm_that_puts_off_two_of_three_requests_for_ever_only_delays(
    node: Node, proxy: FaultProxy, bucket: Bucket
) -> None:
    proxy.luck = _storm
    node.store_many(FILES)
    node.store(20 * MIB)  # in parts
    until_mirrored(node, STORM_S)
    proxy.luck = good
    until_shipped(node.root, bucket)
    judge_bucket(bucket, node.ledger.stored)
    judge_doctor(node.root, node.settings)


def test_flipped_bits_delay_and_spoil_nothing(
    node: Node, proxy: FaultProxy, bucket: Bucket
) -> None:
    proxy.luck = _rot
    node.store_many(FILES)
    node.store(20 * MIB)  # in parts
    proxy.wait_for(lambda seen: len(seen.seen) >= BAD_REQUESTS)
    proxy.luck = good
    until_mirrored(node)
    judge_bucket(bucket, node.ledger.stored)
    until_shipped(node.root, bucket)
    judge_doctor(node.root, node.settings)


@pytest.mark.parametrize(
    "fault",
    [Flip(), Pretend("nothing"), Pretend("half"), Pretend("flipped")],
    ids=["corrupting", "storing nothing", "storing half", "storing other bytes"],
)
def test_what_did_not_arrive_whole_is_never_called_done(
    node: Node, proxy: FaultProxy, bucket: Bucket, fault: Fault
) -> None:
    before = proxy.count("PUT", below="objects/")
    proxy.luck = only("PUT", fault, below="objects/")
    stored = [node.store(), node.store(20 * MIB), node.store(10 * KIB)]
    digests = {one.digest for one in stored}
    proxy.wait_for(lambda seen: seen.count("PUT", below="objects/") >= before + TRIES)
    with looking(node.root) as store:
        assert not digests & done(store)
        until("it is told why", lambda: errors(store))
        proxy.luck = good
        until("all are done", lambda: digests <= done(store))
    judge_bucket(bucket, node.ledger.stored)


@pytest.mark.parametrize(
    "stored",
    [
        "nothing",
        pytest.param("half", marks=pytest.mark.soak),
        pytest.param("flipped", marks=pytest.mark.soak),
    ],
)
def test_a_server_that_lies_about_checksums_is_read_back(
    root: Path, proxy: FaultProxy, bucket: Bucket, stored: str
) -> None:
    # It takes any checksum, and tells afterwards whatever was claimed: the probe finds out.
    proxy.luck = only("PUT HEAD", Pretend("whole", lies_later=True))
    with serving_node(root / "node", settings_of(proxy.bucket)) as node:
        node.store()
        until_mirrored(node)
        lie = Pretend(stored, lies_later=True)  # type: ignore[arg-type]
        proxy.luck = only("PUT HEAD", lie, below="objects/")
        before = proxy.count("PUT", below="objects/")
        digests = {node.store().digest, node.store(20 * MIB).digest}
        proxy.wait_for(lambda seen: seen.count("PUT", below="objects/") >= before + TRIES)
        with looking(node.root) as store:
            assert not digests & done(store)
            proxy.luck = good
            until("all are done", lambda: digests <= done(store))
        judge_bucket(bucket, node.ledger.stored)


@pytest.mark.timeout(1800)  # it waits the longer, the longer the bucket was away
def test_a_bucket_that_was_deleted_is_filled_again_when_it_is_back(
    root: Path, ceph: Ceph, bucket: Bucket
) -> None:
    with serving_node(root / "node", settings_of(bucket)) as node:
        node.store_many(FILES)
        until_mirrored(node)
        until_shipped(node.root, bucket)
        ceph.remove_bucket(bucket.name)
        late = node.store()
        with looking(node.root) as store:
            until("it is told why", lambda: "NoSuchBucket" in str(errors(store)))
            assert late.digest not in done(store)
        until("status tells it", lambda: "NoSuchBucket" in str(node.status()[1]))
        ceph.make_bucket(bucket.name)
        # Nobody tells the node that the bucket is an empty one now: it misses its HEAD there.
        all_keys = {stored.key for stored in node.ledger.stored}
        until("all is there again", lambda: all_keys <= set(bucket.keys("objects/")), STORM_S)
        until_mirrored(node, STORM_S)
        judge_bucket(bucket, node.ledger.stored)
        until_shipped(node.root, bucket)
        again = node.run("replicate", "verify", "far")
        assert again.returncode == 0, again.stdout + again.stderr


def test_revoked_credentials_are_told_and_nothing_is_lost_when_they_are_back(
    root: Path, ceph: Ceph
) -> None:
    login = ceph.make_login(f"revoked-{root.name}")
    bucket = make_bucket(ceph, login)
    with serving_node(root / "node", settings_of(bucket)) as node:
        node.store()
        until_mirrored(node)
        ceph.revoke(login)
        node.store_many(FILES)
        with looking(node.root) as store:
            until("it is told why", lambda: "UserSuspended" in str(errors(store)))
            assert len(wanted_of(node, store)) == FILES
        assert login.secret_key not in str(node.status()[1])
        ceph.allow(login)
        until_mirrored(node)
        judge_bucket(bucket, node.ledger.stored)


@pytest.mark.soak
def test_the_server_is_restarted_while_files_are_sent(root: Path, own_ceph: Ceph) -> None:
    bucket = make_bucket(own_ceph)
    with serving_node(root / "node", settings_of(bucket)) as node:
        sender = threading.Thread(target=node.store_many, args=(FILES * 2,))
        sender.start()
        try:
            own_ceph.stop_gateway()
        finally:
            sender.join()
        own_ceph.start_gateway()
        assert len(node.ledger.stored) == FILES * 2
        until_mirrored(node)
        judge_bucket(bucket, node.ledger.stored)
