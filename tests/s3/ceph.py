"""The S3 server of the suite: one Ceph, started by the first test that asks for it.

    def test_something(bucket: Bucket) -> None:

A `bucket` is empty and the test's own. Tests that revoke the login, or stop the server, ask
for `own_ceph`, which nobody else uses, and make a Bucket there by `make_bucket`. All are fixtures
of the whole suite; where Ceph is not installed their tests are skipped, and fail in CI.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, final

import msgspec
import pytest

from bench.ceph import PROGRAMS, REGION, Ceph, Login, find_program, running
from tests.conftest import IN_CI

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client


@final
class Bucket(msgspec.Struct, frozen=True):
    """An S3 bucket of a test's own, and all that is needed to speak to it."""

    endpoint: str
    name: str
    login: Login

    def client(self) -> S3Client:
        """A plain boto3 client, which is not what the product uses; close it."""
        import boto3  # late: this module is read by every run of tests
        from botocore.config import Config

        client: S3Client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.login.access_key,
            aws_secret_access_key=self.login.secret_key,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        return client

    def behind(self, endpoint: str) -> Bucket:
        """The same one, reached by another address, such as that of a proxy."""
        return msgspec.structs.replace(self, endpoint=endpoint)

    def options(self, prefix: str = "") -> dict[str, str]:
        """The keys of a section [target:NAME] for it."""
        return {
            "kind": "s3",
            "endpoint": self.endpoint,
            "bucket": self.name,
            "prefix": prefix,
            "region": REGION,
            "access_key": self.login.access_key,
            "secret_key": self.login.secret_key,
            "addressing": "path",
        }

    def keys(self, prefix: str = "") -> list[str]:
        """All keys below `prefix`, in order."""
        return [key for key, _ in self._listed(prefix)]

    def size_bytes(self, prefix: str = "") -> int:
        """What all objects below `prefix` hold together."""
        return sum(size for _, size in self._listed(prefix))

    def read(self, key: str) -> bytes:
        client = self.client()
        try:
            return client.get_object(Bucket=self.name, Key=key)["Body"].read()
        finally:
            client.close()

    def write(self, key: str, data: bytes) -> None:
        client = self.client()
        try:
            client.put_object(Bucket=self.name, Key=key, Body=data)
        finally:
            client.close()

    def remove(self, key: str) -> None:
        client = self.client()
        try:
            client.delete_object(Bucket=self.name, Key=key)
        finally:
            client.close()

    def unfinished(self) -> int:
        """How many multipart uploads nobody has completed or aborted."""
        client = self.client()
        try:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name)
            return sum(len(page.get("Uploads", [])) for page in pages)
        finally:
            client.close()

    def _listed(self, prefix: str) -> list[tuple[str, int]]:
        client = self.client()
        try:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix
            )
            return [
                (entry["Key"], entry["Size"])
                for page in pages
                for entry in page.get("Contents", [])
            ]
        finally:
            client.close()


def make_bucket(ceph: Ceph, login: Login | None = None) -> Bucket:
    """A new, empty one."""
    bucket = Bucket(ceph.address, f"test-{uuid.uuid4().hex[:16]}", login or ceph.login)
    ceph.make_bucket(bucket.name, bucket.login)
    return bucket


@pytest.fixture(scope="session")
def ceph(disk_folder: Path) -> Iterator[Ceph]:
    """The suite's server. Nobody stops it or revokes its login."""
    _need_programs()
    with running(disk_folder) as started:
        yield started


@pytest.fixture
def own_ceph(disk_folder: Path) -> Iterator[Ceph]:
    """A server of this test alone, to be stopped and spoilt; 2 s."""
    _need_programs()
    with running(disk_folder) as started:
        yield started


@pytest.fixture
def bucket(ceph: Ceph) -> Bucket:
    """An empty bucket of the suite's server; what is in it dies with the server."""
    return make_bucket(ceph)


@pytest.fixture
def new_bucket(ceph: Ceph) -> Callable[[], Bucket]:
    """Makes an empty bucket at each call, for tests that need several."""
    return lambda: make_bucket(ceph)


def _need_programs() -> None:
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if missing:
        reason = f"{', '.join(missing)} not installed; requirements/system.txt names the packages"
        if IN_CI:
            pytest.fail(reason)
        pytest.skip(reason)
