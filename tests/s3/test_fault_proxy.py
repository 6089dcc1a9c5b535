"""The proxy that brings bad luck does what it says, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.s3.ceph import Bucket
from tests.s3.fault_proxy import (
    Cut,
    Fault,
    FaultProxy,
    Flip,
    Hold,
    Lose,
    Pretend,
    Refuse,
    Say,
    always,
    every,
    first,
    good,
    only,
)

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

DATA = bytes(range(256)) * 1_000


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultProxy]:
    with FaultProxy(bucket) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[S3Client]:
    with closing(proxy.bucket.client()) as client:
        yield client


def test_without_faults_all_passes(proxy: FaultProxy, bucket: Bucket) -> None:
    proxy.bucket.write("a b/ü", DATA)
    assert proxy.bucket.read("a b/ü") == bucket.read("a b/ü") == DATA
    assert proxy.bucket.keys("a b/") == ["a b/ü"]
    assert (proxy.bytes_put, proxy.count("PUT"), proxy.count("PUT", below="x")) == (
        len(DATA),
        1,
        0,
    )


@pytest.mark.parametrize("fault", [Refuse(), Cut(1_000), Lose()], ids=str)
def test_a_cut_connection_is_an_error(proxy: FaultProxy, fault: Fault, bucket: Bucket) -> None:
    proxy.luck = first(1, fault)
    with pytest.raises(BotoCoreError):
        proxy.bucket.write("a", DATA)
    assert bucket.keys() == (["a"] if isinstance(fault, Lose) else [])
    proxy.bucket.write("a", DATA)
    assert bucket.read("a") == DATA


def test_an_answer_that_is_cut_short_is_noticed(proxy: FaultProxy, bucket: Bucket) -> None:
    bucket.write("a", DATA)
    proxy.luck = only("GET", Cut(1_000, "answer"))
    with pytest.raises((BotoCoreError, OSError)):
        proxy.bucket.read("a")


def test_every_third_request_fails(proxy: FaultProxy, client: S3Client) -> None:
    proxy.luck = every(3, Say(503, "SlowDown"))
    failed = []
    for number in range(9):
        try:
            client.put_object(Bucket=proxy.bucket.name, Key=str(number), Body=b"x")
        except ClientError as error:
            failed.append((number, error.response["Error"].get("Code")))
    assert failed == [(2, "SlowDown"), (5, "SlowDown"), (8, "SlowDown")]


def test_a_flipped_bit_is_caught_by_the_server(proxy: FaultProxy, client: S3Client) -> None:
    proxy.luck = only("PUT", Flip())
    md5 = base64.b64encode(hashlib.md5(DATA).digest()).decode()
    with pytest.raises(ClientError, match=r"BadDigest|XAmzContentSHA256Mismatch"):
        client.put_object(Bucket=proxy.bucket.name, Key="a", Body=DATA, ContentMD5=md5)


def test_a_flipped_bit_on_the_way_back_is_not(proxy: FaultProxy, bucket: Bucket) -> None:
    bucket.write("a", DATA)
    proxy.luck = only("GET", Flip("answer"))
    came = proxy.bucket.read("a")
    assert len(came) == len(DATA)
    assert sum(a != b for a, b in zip(came, DATA, strict=True)) == 1


@pytest.mark.parametrize(
    ("stored", "truth"), [("nothing", None), ("half", DATA[: len(DATA) // 2]), ("whole", DATA)]
)
def test_what_is_pretended_is_answered_like_success(
    proxy: FaultProxy, client: S3Client, bucket: Bucket, stored: str, truth: bytes | None
) -> None:
    proxy.luck = always(Pretend(stored))  # type: ignore[arg-type]
    answer = client.put_object(Bucket=bucket.name, Key="a", Body=DATA)
    assert answer["ETag"] == f'"{hashlib.md5(DATA).hexdigest()}"'
    assert bucket.keys() == ([] if truth is None else ["a"])
    if truth is not None:
        assert bucket.read("a") == truth


def test_a_thorough_liar_repeats_the_wrong_checksum(
    proxy: FaultProxy, client: S3Client, bucket: Bucket
) -> None:
    proxy.luck = always(Pretend("flipped", lies_later=True))
    wrong = base64.b64encode(bytes(32)).decode()
    client.put_object(Bucket=bucket.name, Key="a", Body=DATA, ChecksumSHA256=wrong)
    told = client.head_object(Bucket=bucket.name, Key="a", ChecksumMode="ENABLED")
    assert (told["ChecksumSHA256"], told["ContentLength"]) == (wrong, len(DATA))
    assert bucket.read("a") != DATA


def test_a_held_request_goes_on_when_it_is_let(proxy: FaultProxy, bucket: Bucket) -> None:
    hold = Hold(threading.Event())
    proxy.luck = always(hold)
    writer = threading.Thread(target=proxy.bucket.write, args=("a", DATA))
    writer.start()
    assert hold.held.wait(60)
    assert bucket.keys() == []
    hold.release.set()
    writer.join()
    proxy.luck = good
    assert bucket.read("a") == DATA


def test_parts_of_a_multipart_upload_can_be_pretended(
    proxy: FaultProxy, client: S3Client, bucket: Bucket
) -> None:
    begun = client.create_multipart_upload(Bucket=bucket.name, Key="a")["UploadId"]
    proxy.luck = only("PUT", Pretend("nothing"))
    part = client.upload_part(Bucket=bucket.name, Key="a", UploadId=begun, PartNumber=1, Body=DATA)
    with pytest.raises(ClientError, match="InvalidPart"):
        client.complete_multipart_upload(
            Bucket=bucket.name,
            Key="a",
            UploadId=begun,
            MultipartUpload={"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]},
        )
    assert bucket.unfinished() == 1
