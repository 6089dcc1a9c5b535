"""The S3 server that the tests of the mirror run against, and the bad luck it can have."""

from __future__ import annotations

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from bench.ceph import Ceph
from tests.s3.ceph import Bucket, make_bucket


def test_it_gives_back_what_was_stored(bucket: Bucket) -> None:
    bucket.write("a/b", b"x" * 100_000)
    assert bucket.read("a/b") == b"x" * 100_000
    assert (bucket.keys(), bucket.size_bytes(), bucket.unfinished()) == (["a/b"], 100_000, 0)


def test_a_bucket_is_empty_at_first(bucket: Bucket) -> None:
    assert bucket.keys() == []


def test_what_is_stored_outlives_the_gateway(own_ceph: Ceph) -> None:
    bucket = make_bucket(own_ceph)
    bucket.write("a", b"stays")
    own_ceph.stop_gateway()
    with pytest.raises(BotoCoreError):
        bucket.read("a")
    own_ceph.start_gateway()
    assert bucket.read("a") == b"stays"


def test_a_revoked_login_is_refused_until_it_is_allowed_again(own_ceph: Ceph) -> None:
    bucket = make_bucket(own_ceph)
    bucket.write("a", b"stays")
    own_ceph.revoke(bucket.login)
    with pytest.raises(ClientError, match="UserSuspended"):
        bucket.read("a")
    own_ceph.allow(bucket.login)
    assert bucket.read("a") == b"stays"


def test_a_removed_bucket_is_gone_with_all_in_it(own_ceph: Ceph) -> None:
    bucket = make_bucket(own_ceph)
    bucket.write("a", b"goes")
    own_ceph.remove_bucket(bucket.name)
    with pytest.raises(ClientError, match="NoSuchBucket"):
        bucket.read("a")
