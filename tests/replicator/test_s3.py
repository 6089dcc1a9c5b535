"""The S3 target: bad luck on the way, other servers' ways, and the server's time."""

from __future__ import annotations

import hashlib
import io
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert
from msgspec.structs import replace

from bench.ceph import Ceph
from cas.clock import DAY_US, SECOND_US, SystemClock
from cas.config import GOOGLE_ENDPOINT, TargetSettings
from replicator.s3 import S3Target
from replicator.targets import (
    BytesDiffer,
    Changed,
    ObjectAbsent,
    ObjectRefused,
    TargetBusy,
    TargetError,
    TargetRefused,
    TargetUnreachable,
)
from tests.clocks import HandClock
from tests.replicator.answers import Asked, Says, answering
from tests.s3.ceph import Bucket, make_bucket
from tests.s3.fault_proxy import (
    Cut,
    FaultProxy,
    Flip,
    Lose,
    Refuse,
    Say,
    always,
    good,
    only,
)

CONTENT = b"what is mirrored" * 100_000
KEY = "objects/aa/aabb"


def md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def target_of(bucket: Bucket, **more: object) -> S3Target:
    return S3Target(settings_of(bucket, **more))


def settings_of(bucket: Bucket, **more: object) -> TargetSettings:
    return convert({"name": "there", **bucket.options("p"), **more}, TargetSettings)


def scripted(address: str, **more: object) -> S3Target:
    given = {"kind": "s3", "endpoint": address, "bucket": "bucket"}
    keys = {"access_key": "id", "secret_key": "secret"}
    return S3Target(convert({"name": "there", **given, **keys, **more}, TargetSettings))


def put(target: S3Target, key: str = KEY, content: bytes = CONTENT, **how: Any) -> str:
    return target.put(key, io.BytesIO(content), len(content), md5=md5(content), **how)


def read(target: S3Target, key: str = KEY, **span: int) -> bytes:
    with target.get(key, **span) as incoming:
        return b"".join(iter(lambda: incoming.read(1 << 16), b""))


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultProxy]:
    with FaultProxy(bucket) as made:
        yield made


@pytest.fixture
def target(proxy: FaultProxy) -> Iterator[S3Target]:
    made = target_of(proxy.bucket)
    yield made
    made.close()


# --- bad luck on the way


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Refuse(), TargetUnreachable),
        (Cut(0), TargetUnreachable),
        (Cut(70_000), TargetUnreachable),
        (Lose(), TargetUnreachable),
        (Flip(), BytesDiffer),
        (Say(503, "SlowDown"), TargetBusy),
        (Say(429, "TooManyRequests"), TargetBusy),
        (Say(503, ""), TargetUnreachable),
        (Say(500, "InternalError"), TargetUnreachable),
        (Say(502, ""), TargetUnreachable),
        (Say(403, "AccessDenied"), TargetRefused),
        (Say(404, "NoSuchBucket"), TargetRefused),
        (Say(400, "ExpiredToken"), TargetRefused),
        (Say(400, "EntityTooLarge"), ObjectRefused),
        (Say(400, "RequestTimeout"), TargetUnreachable),
        (Say(409, "OperationAborted"), TargetBusy),
        (Say(409, "ConditionalRequestConflict"), Changed),
        (Say(412, "PreconditionFailed"), Changed),
        (Say(501, "NotImplemented"), ObjectRefused),
        (Say(507, "XMinioStorageFull"), TargetRefused),
    ],
)
def test_what_befalls_a_put_is_told_by_its_class(
    proxy: FaultProxy, target: S3Target, fault: Any, expected: type[TargetError]
) -> None:
    put(target, "before")  # a connection is there to be cut
    proxy.luck = always(fault)
    with pytest.raises(expected):
        put(target)
    assert proxy.count("PUT", KEY) <= 1, "nothing is sent twice"
    proxy.luck = good
    assert put(target) == md5(CONTENT).hex()
    assert read(target) == CONTENT


def test_an_object_that_is_cut_on_its_way_here_is_not_taken_for_whole(
    proxy: FaultProxy, target: S3Target
) -> None:
    put(target)
    proxy.luck = always(Cut(70_000, "answer"))
    got: list[bytes] = []
    with target.get(KEY) as incoming, pytest.raises(TargetUnreachable):
        got.extend(iter(lambda: incoming.read(1 << 14), b""))
    assert CONTENT.startswith(b"".join(got))


def test_a_cut_listing_is_not_taken_for_whole(proxy: FaultProxy, target: S3Target) -> None:
    for number in range(20):
        put(target, f"objects/{number}", b"1")
    proxy.luck = always(Cut(200, "answer"))
    with pytest.raises(TargetUnreachable):
        list(target.list("objects/"))


def test_connections_are_kept_and_idle_ones_that_were_closed_are_not_used(
    proxy: FaultProxy, target: S3Target
) -> None:
    for _ in range(5):
        put(target, content=b"small")
        assert read(target) == b"small"
    assert len(proxy._open) <= 2  # one of the client, one of the express way
    proxy.cut_all()
    put(target, content=b"small")


def test_nobody_at_the_address_is_unreachable() -> None:
    target = scripted("http://127.0.0.1:1")
    with pytest.raises(TargetUnreachable, match="Could not connect"):
        target.stat(KEY)


def test_the_reader_s_own_trouble_stays_its_own(bucket: Bucket) -> None:
    target = target_of(bucket)
    put(target)
    with pytest.raises(FileNotFoundError), target.get(KEY):
        Path("/nowhere/at/all").read_bytes()
    target.close()


# --- who asks


def test_revoked_credentials_are_refused_and_work_again(own_ceph: Ceph) -> None:
    target = target_of(make_bucket(own_ceph))
    put(target)
    own_ceph.revoke(own_ceph.login)
    for ask in (lambda: put(target), lambda: target.stat(KEY), lambda: list(target.list(""))):
        with pytest.raises(TargetRefused):
            ask()
    own_ceph.allow(own_ceph.login)
    assert read(target) == CONTENT
    target.close()


def test_a_wrong_secret_is_refused_and_told_nowhere(bucket: Bucket) -> None:
    target = target_of(bucket, secret_key="no-such-secret")
    with pytest.raises(TargetRefused) as refused:
        put(target)
    assert "no-such-secret" not in str(refused.value) + target.place
    target.close()


def test_a_bucket_that_is_gone_is_no_object_that_is_gone(bucket: Bucket) -> None:
    target = target_of(replace(bucket, name="never-made"))
    for ask in (
        lambda: put(target),
        lambda: target.stat(KEY),
        lambda: read(target),
        lambda: target.delete(KEY),
        lambda: list(target.list("")),
    ):
        with pytest.raises(TargetRefused):
            ask()
    target.close()


def test_credentials_are_found_as_the_tools_of_aws_find_them(
    bucket: Bucket, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = root / "credentials"
    login = bucket.login
    file.write_text(
        "[else]\naws_access_key_id = x\naws_secret_access_key = y\n"
        f"[mine]\naws_access_key_id = {login.access_key}\n"
        f"aws_secret_access_key = {login.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(root / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    found = target_of(bucket, access_key="", secret_key="", profile="mine")
    put(found, content=b"small")
    found.close()
    for profile, why in (("", "no credentials"), ("misspelt", "misspelt")):
        target = target_of(bucket, access_key="", secret_key="", profile=profile)
        with pytest.raises(TargetRefused, match=why):
            put(target)


# --- the server's time


@pytest.mark.parametrize("years", [10, -10, -56])
def test_requests_carry_the_server_s_time_however_wrong_the_clock_is(
    proxy: FaultProxy, years: int
) -> None:
    clock = HandClock(SystemClock().now_us() + years * 365 * DAY_US)
    target = S3Target(settings_of(proxy.bucket), clock=clock)
    put(target)
    assert proxy.count("PUT", KEY) == 2, "refused once, which told the time"
    assert read(target) == CONTENT
    assert list(target.list("objects/"))
    assert proxy.count() == 4
    # The clock is set right: that is noticed in the same way.
    clock.time_us = SystemClock().now_us()
    assert target.stat(KEY).size_bytes == len(CONTENT)
    offset_us = target.traits("probe/x").clock_offset_us
    assert abs(offset_us) < 5 * SECOND_US
    target.close()


def test_a_refusal_that_is_not_the_clock_s_is_not_asked_again(
    proxy: FaultProxy, target: S3Target
) -> None:
    proxy.luck = only("PUT", Say(403, "AccessDenied"))
    with pytest.raises(TargetRefused):
        put(target)
    assert proxy.count("PUT") == 1


# --- where


def test_a_bucket_is_named_in_the_path_or_in_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *rest: resolve("127.0.0.1", *rest))

    def asked_of(**more: object) -> Asked:
        seen: list[Asked] = []

        def script(asked: Asked) -> Says:
            seen.append(asked)
            return Says(204)

        with answering(script) as address:
            target = scripted(address.replace("127.0.0.1", "s3.example.org"), **more)
            target.delete("k y")
            target.close()
        return seen[0]

    path = asked_of(prefix="a/b")
    assert path.target == "/bucket/a/b/k%20y"
    assert path.headers["host"].startswith("s3.example.org:")
    virtual = asked_of(addressing="virtual")
    assert virtual.target == "/k%20y"
    assert virtual.headers["host"].startswith("bucket.s3.example.org:")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({"region": "eu-west-1"}, "bucket.s3.eu-west-1.amazonaws.com"),
        ({"region": "cn-north-1"}, "bucket.s3.cn-north-1.amazonaws.com.cn"),
        ({"bucket": "with.dots"}, "s3.us-east-1.amazonaws.com/with.dots"),
        ({"addressing": "path"}, "s3.us-east-1.amazonaws.com/bucket"),
        ({"endpoint": GOOGLE_ENDPOINT}, "storage.googleapis.com/bucket"),
        ({"endpoint": "https://s3.example.org/base"}, "s3.example.org/base/bucket"),
    ],
)
def test_auto_is_the_path_unless_the_server_is_amazon_s(
    given: dict[str, str], address: str
) -> None:
    settings = convert(
        {"name": "t", "kind": "s3", "bucket": "bucket", "access_key": "a", "secret_key": "b"}
        | given,
        TargetSettings,
    )
    target = S3Target(settings)
    # Both ways to the server: below boto3's client, and through it.
    assert target._express.presigned(KEY, 1).startswith(f"https://{address}/{KEY}?")
    where = {"Bucket": settings.bucket, "Key": KEY}
    assert target._client.generate_presigned_url("get_object", where) == f"https://{address}/{KEY}"
    assert f"s3://{settings.bucket} at https://" in target.place


def test_what_makes_an_object_says_how_it_is_to_be_kept() -> None:
    seen: list[Asked] = []

    def script(asked: Asked) -> Says:
        seen.append(asked)
        body = b"<R><UploadId>u</UploadId></R>" if asked.method == "POST" else b""
        return Says(200, {"etag": '"e"'}, body)

    with answering(script) as address:
        target = scripted(address, sse="aws:kms", sse_kms_key="key", storage_class="STANDARD_IA")
        put(target)
        target.begin(KEY)
        put(target, "HEAD.json")
        target.close()
    assert [asked.headers["x-amz-server-side-encryption"] for asked in seen] == ["aws:kms"] * 3
    key = "x-amz-server-side-encryption-aws-kms-key-id"
    assert [asked.headers[key] for asked in seen] == ["key"] * 3
    classes = [asked.headers.get("x-amz-storage-class") for asked in seen]
    assert classes == ["STANDARD_IA", "STANDARD_IA", None]


def test_google_is_sent_no_checksum_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Asked] = []

    def script(asked: Asked) -> Says:
        seen.append(asked)
        modified = {"last-modified": formatdate(0, usegmt=True)}
        return Says(200, {"etag": '"e"', **modified})

    with answering(script) as address:
        monkeypatch.setattr("replicator.s3.GOOGLE_ENDPOINT", address)
        target = scripted(address)
        put(target, sha256=hashlib.sha256(CONTENT).digest())
        target.stat(KEY)
        target.close()
    assert not [name for asked in seen for name in asked.headers if "checksum" in name]


# --- what other servers say


def test_a_checksum_that_is_kept_is_told_and_one_of_parts_is_none() -> None:
    told = {"text": "n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg="}

    def script(asked: Asked) -> Says:
        assert asked.headers["x-amz-checksum-mode"] == "ENABLED"
        modified = formatdate(86_400, usegmt=True)
        headers = {"etag": '"e"', "last-modified": modified, "content-length": "4"}
        return Says(200, headers | {"x-amz-checksum-sha256": told["text"]})

    with answering(script) as address:
        target = scripted(address)
        stat = target.stat(KEY)
        assert stat.sha256 == hashlib.sha256(b"test").digest()
        assert (stat.size_bytes, stat.modified_us) == (4, DAY_US)
        told["text"] += "-3"
        assert target.stat(KEY).sha256 is None
        told["text"] = ""
        assert target.stat(KEY).sha256 is None
        target.close()


def _says_ok(_: Asked) -> Says:
    return Says(200, {"content-type": "text/html"}, b"<html><p>Please log in.</p></html>")


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (put, BytesDiffer),
        (lambda target: target.stat(KEY), TargetUnreachable),
        (read, TargetUnreachable),
        (lambda target: target.begin(KEY), TargetUnreachable),
        (lambda target: target.complete(KEY, "u", ["e"]), TargetUnreachable),
    ],
)
def test_a_portal_that_says_yes_to_all_is_no_target(
    ask: Callable[[S3Target], object], expected: type[TargetError]
) -> None:
    with answering(_says_ok) as address:
        target = scripted(address)
        with pytest.raises(expected):
            ask(target)
        target.close()


def test_a_completion_that_fails_after_it_was_begun_is_an_error() -> None:
    body = b"  <Error><Code>InternalError</Code><Message>try again</Message></Error>".strip()
    with answering(lambda _: Says(200, {}, body)) as address:
        target = scripted(address)
        with pytest.raises(TargetError, match="try again"):
            target.complete(KEY, "u", ["e"])
        target.close()


def test_a_bucket_elsewhere_is_told_with_its_region() -> None:
    says = Says(301, {"x-amz-bucket-region": "eu-north-1"})
    with answering(lambda _: says) as address:
        target = scripted(address)
        with pytest.raises(TargetRefused, match="eu-north-1"):
            put(target)
        target.close()


def test_a_server_that_gives_no_ranges_does_not_mislead() -> None:
    headers = {"etag": '"e"', "last-modified": formatdate(0, usegmt=True)}
    with answering(lambda _: Says(200, headers, b"from the start")) as address:
        target = scripted(address)
        with pytest.raises(TargetUnreachable, match="ranges"):
            read(target, first_byte=5)
        assert read(target) == b"from the start"
        target.close()


def test_a_listing_that_does_not_go_on_is_an_error() -> None:
    page = b"<R><IsTruncated>true</IsTruncated></R>"
    with answering(lambda _: Says(200, {}, page)) as address:
        target = scripted(address)
        with pytest.raises(TargetUnreachable, match="does not go on"):
            list(target.list(""))
        target.close()


def test_an_absent_object_is_told_from_an_absent_bucket_where_head_has_no_words() -> None:
    bucket_is_there = {"yes": True}

    def script(asked: Asked) -> Says:
        if asked.target == "/bucket":
            return Says(200 if bucket_is_there["yes"] else 404)
        return Says(404)

    with answering(script) as address:
        target = scripted(address)
        with pytest.raises(ObjectAbsent):
            target.stat(KEY)
        bucket_is_there["yes"] = False
        with pytest.raises(TargetRefused):
            target.stat(KEY)
        target.close()


# --- over TLS


@pytest.fixture
def secure(root: Path, program: Callable[[str], str]) -> Iterator[tuple[str, Path]]:
    """The address of a server with a certificate of its own, and the authority's file."""
    key, certificate = root / "key.pem", root / "certificate.pem"
    line = [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    line += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    line += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key)]
    subprocess.run([*line, "-out", str(certificate)], check=True, capture_output=True)

    class Handler(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """A test's output is its own."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://localhost:{server.server_address[1]}", certificate
        server.shutdown()
        thread.join()


def test_a_server_is_trusted_by_the_authority_that_the_settings_name(
    secure: tuple[str, Path],
) -> None:
    address, authority = secure
    stranger = scripted(address)
    with pytest.raises(TargetRefused, match="is not trusted"):
        stranger.delete(KEY)
    known = scripted(address, ca_file=authority)
    known.delete(KEY)
    known.close()
