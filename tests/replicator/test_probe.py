"""The probe: nothing is believed of a server that was not seen."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from click.testing import CliRunner
from msgspec import convert, json

from cas.cli import main
from cas.config import TargetSettings
from cas.records import Target as TargetRecord
from cas.replicas import register
from cas.store import Store
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.probe import Profile, probe, words
from replicator.reaching import Reach
from replicator.s3 import S3Target
from replicator.targets import BytesDiffer, TargetError, TargetUnreachable
from tests.replicator.answers import Asked, Says, answering
from tests.s3.ceph import Bucket
from tests.s3.fault_proxy import FaultProxy, Flip, Pretend, Refuse, always, only


def target_of(bucket: Bucket) -> S3Target:
    return S3Target(convert({"name": "there", **bucket.options("p")}, TargetSettings))


# --- real ones


def test_ceph_is_known_for_what_it_honours(bucket: Bucket) -> None:
    target = target_of(bucket)
    profile = probe(target, thorough=True)
    assert profile == Profile(
        verification="md5",  # it takes a wrong SHA-256 without a word
        conditional=True,
        multipart=True,
        parts_md5=True,
        part_bytes_min=5 << 20,
        parts_max=10_000,
        equal_parts=False,
        presigned=True,
        list_ordered=True,
        versioning=False,
        object_lock=False,
        probed_at_us=profile.probed_at_us,
    )
    assert bucket.keys() == []
    assert bucket.unfinished() == 0
    target.close()


def test_versioning_is_found(bucket: Bucket) -> None:
    client = bucket.client()
    client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    client.close()
    target = target_of(bucket)
    profile = probe(target)
    assert profile.versioning is True
    assert profile.conditional is False, "this Ceph compares with nothing where versions are kept"
    assert any("old versions" in line for line in words(profile))
    target.close()


def test_a_folder_is_known_for_what_it_honours(root: Path) -> None:
    profile = probe(FolderTarget("disk", root / "t"))
    assert (profile.verification, profile.conditional) == ("read_back", True)
    assert (profile.multipart, profile.list_ordered) == (False, True)


# --- liars


def test_a_server_that_takes_wrong_checksums_is_read_back(bucket: Bucket) -> None:
    with FaultProxy(bucket) as proxy:
        proxy.luck = only("PUT", Pretend("whole"))
        target = target_of(proxy.bucket)
        assert probe(target).verification == "read_back"
        target.close()


@pytest.mark.parametrize("stored", ["nothing", "half", "flipped"])
@pytest.mark.parametrize("lies_later", [False, True])
def test_a_server_that_does_not_keep_what_it_took_is_no_target(
    bucket: Bucket, stored: Any, lies_later: bool
) -> None:
    with FaultProxy(bucket) as proxy:
        proxy.luck = only("PUT HEAD", Pretend(stored, lies_later))
        target = target_of(proxy.bucket)
        with pytest.raises(TargetError):
            probe(target)
        target.close()


def test_a_way_that_changes_bytes_is_no_way(bucket: Bucket) -> None:
    with FaultProxy(bucket) as proxy:
        proxy.luck = only("GET", Flip("answer"), below="probe/")
        target = target_of(proxy.bucket)
        with pytest.raises(BytesDiffer):
            probe(target)
        proxy.luck = always(Refuse())
        with pytest.raises(TargetUnreachable):
            probe(target)
        target.close()


# --- what no server here does


class _Imagined:
    """An S3 server in a dictionary, with manners to choose: a double for servers not here."""

    def __init__(self, *, conditions: bool = True, keeps_sha256: bool = True) -> None:
        self.conditions = conditions
        self.keeps_sha256 = keeps_sha256
        self.parts_max = 1_000
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}

    def __call__(self, asked: Asked) -> Says:
        parts = urlsplit(asked.target)
        query = {name: values[0] for name, values in parse_qs(parts.query, True).items()}
        key = unquote(parts.path).removeprefix("/bucket").removeprefix("/")
        if "uploadId" in query or "uploads" in query:
            return self._in_parts(asked, key, query)
        if asked.method == "PUT":
            return self._put(asked, key)
        if asked.method == "DELETE":
            self.objects.pop(key, None)
            return Says(204)
        if not key:
            return self._about_bucket(query)
        return self._get(asked, key)

    def _put(self, asked: Asked, key: str) -> Says:
        told = asked.headers.get("x-amz-checksum-sha256", "")
        right = base64.b64encode(hashlib.sha256(asked.body).digest()).decode()
        if self.keeps_sha256 and told not in ("", right):
            return _error(400, "XAmzContentChecksumMismatch")
        md5 = hashlib.md5(asked.body, usedforsecurity=False)
        if asked.headers.get("content-md5", "") not in (
            "",
            base64.b64encode(md5.digest()).decode(),
        ):
            return _error(400, "BadDigest")
        found = self.objects.get(key)
        if self.conditions:
            match = asked.headers.get("if-match", "").strip('"')
            if match and (found is None or _etag(found[0]) != match):
                return _error(412, "PreconditionFailed")
            if found is not None and "if-none-match" in asked.headers:
                return _error(412, "PreconditionFailed")
        self.objects[key] = (asked.body, told)
        return Says(200, {"etag": f'"{md5.hexdigest()}"'})

    def _get(self, asked: Asked, key: str) -> Says:
        if key not in self.objects:
            return _error(404, "NoSuchKey")
        content, sha256 = self.objects[key]
        headers = {"etag": f'"{_etag(content)}"', "last-modified": "Sat, 21 Nov 2026 14:00:00 GMT"}
        if self.keeps_sha256:
            headers["x-amz-checksum-sha256"] = sha256
        if asked.method == "HEAD":
            return Says(200, headers | {"content-length": str(len(content))})
        if "range" in asked.headers:
            first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
            headers["content-range"] = f"bytes {first}-{last}/{len(content)}"
            return Says(206, headers, content[int(first) : int(last) + 1])
        return Says(200, headers, content)

    def _in_parts(self, asked: Asked, key: str, query: dict[str, str]) -> Says:
        if "uploads" in query:
            if asked.method == "GET":
                return Says(200, {}, b"<R></R>")
            self.uploads[name := f"u{len(self.uploads)}"] = {}
            return Says(200, {}, f"<R><UploadId>{name}</UploadId></R>".encode())
        parts = self.uploads.get(query["uploadId"])
        if parts is None:
            return _error(404, "NoSuchUpload")
        if asked.method == "PUT":
            if int(query["partNumber"]) > self.parts_max:
                return _error(400, "InvalidArgument")
            parts[int(query["partNumber"])] = asked.body
            return Says(200, {"etag": f'"{_etag(asked.body)}"'})
        del self.uploads[query["uploadId"]]
        if asked.method == "POST":
            sizes = {len(parts[number]) for number in sorted(parts)[:-1]}
            if len(sizes) > 1:
                return _error(400, "InvalidPart")
            self.objects[key] = (b"".join(parts[number] for number in sorted(parts)), "")
            return Says(200, {}, b"<R><ETag>&quot;opaque&quot;</ETag></R>")
        return Says(204)

    def _about_bucket(self, query: dict[str, str]) -> Says:
        if "list-type" not in query:
            return _error(403, "AccessDenied")
        keys = [key for key in self.objects if key.startswith(query["prefix"])]
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>1</Size><ETag>e</ETag>"
            "<LastModified>2026-11-21T14:00:00.000Z</LastModified></Contents>"
            for key in keys  # in no order
        )
        return Says(200, {}, f"<R>{entries}</R>".encode())


def _etag(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _error(status: int, code: str) -> Says:
    return Says(status, {}, f"<Error><Code>{code}</Code></Error>".encode())


def _profile_of(server: _Imagined) -> Profile:
    with answering(server) as address:
        given = {"kind": "s3", "endpoint": address, "bucket": "bucket"}
        keys = {"access_key": "id", "secret_key": "secret"}
        target = S3Target(convert({"name": "t", **given, **keys}, TargetSettings))
        profile = probe(target)
        target.close()
        assert server.objects == {}
        assert server.uploads == {}
        return profile


def test_a_server_that_checks_keeps_and_tells_sha256_is_believed_in_that() -> None:
    assert _profile_of(_Imagined()).verification == "sha256"
    assert _profile_of(_Imagined(keeps_sha256=False)).verification == "md5"


def test_conditions_that_are_ignored_are_not_believed_in() -> None:
    profile = _profile_of(_Imagined(conditions=False))
    assert not profile.conditional
    assert any("Conditional writes: not honoured" in line for line in words(profile))


def test_conditions_that_hold_one_by_one_but_not_at_once_are_not_believed_in() -> None:
    """The imagined server compares and then writes, with nothing in between to stop another."""
    server = _Imagined()
    server_put = server._put
    import threading

    meeting = threading.Barrier(8)

    def put(asked: Asked, key: str) -> Says:
        if not key.endswith("/race") or "if-match" not in asked.headers:
            return server_put(asked, key)
        before = server.objects[key]
        meeting.wait(30)
        match = asked.headers["if-match"].strip('"')
        if _etag(before[0]) != match:
            return _error(412, "PreconditionFailed")
        server.objects[key] = (asked.body, "")
        return Says(200, {"etag": f'"{_etag(asked.body)}"'})

    server._put = put  # type: ignore[method-assign]
    assert not _profile_of(server).conditional


def test_rules_about_parts_are_found() -> None:
    profile = _profile_of(_Imagined())
    assert profile.multipart
    assert not profile.parts_md5
    assert (profile.part_bytes_min, profile.parts_max, profile.equal_parts) == (1, 1_000, True)
    assert any("1,000 parts of one length" in line for line in words(profile))


def test_what_may_not_be_asked_is_unknown() -> None:
    profile = _profile_of(_Imagined())
    assert (profile.versioning, profile.object_lock) == (None, None)
    assert not profile.presigned or profile.list_ordered is False
    assert any("Listings: not in order" in line for line in words(profile))
    assert sum("may not ask" in line for line in words(profile)) == 2


# --- kept


def test_a_profile_is_kept_as_json() -> None:
    profile = Profile(verification="sha256", versioning=None, probed_at_us=1)
    assert Profile.from_json(profile.to_json()) == profile
    # One that an older version wrote, with fewer fields.
    assert Profile.from_json(b'{"verification":"md5"}').verification == "md5"


def test_the_command_explains_and_keeps_what_it_found(root: Path) -> None:
    settings = root / "config.ini"
    settings.write_text(
        f"[store]\nroot = {root / 'r'}\n[replicator]\ntargets = disk\n"
        f"[target:disk]\nkind = folder\npath = {root / 't'}\n"
    )
    run = CliRunner()
    file = root / "file"
    file.write_bytes(b"bytes")

    def call(*arguments: str) -> str:
        made = run.invoke(main, ["--config", str(settings), *arguments])
        assert made.exit_code == 0, made.output
        return made.stdout

    call("put", str(file))
    told = json.decode(call("--json", "replicate", "probe", "disk"))
    assert told["profile"]["verification"] == "read_back"
    assert told["kept"] is False  # nothing was mirrored yet, so there is no record
    with Store.open(root / "r") as store:
        from cas.replicas import register

        register(store.catalog, [("disk", "folder")])
    assert "Copies are proved by reading them back" in call("replicate", "probe", "disk")
    with Store.open(root / "r") as store, store.catalog.read() as snapshot:
        record = snapshot.get(TargetRecord, "disk")
    assert record is not None
    assert Profile.from_json(record.profile).conditional


def test_what_a_first_reach_found_out_is_told_in_words_in_one_line_and_warns_nobody(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "there"
    place.mkdir()
    settings = TargetSettings("there", "folder", place)
    with Store.open(root) as store, caplog.at_level(logging.INFO, "blobcask.replicator"):
        register(store.catalog, [("there", str(place))])
        link = Link(FolderTarget("there", place), settings, None)
        asyncio.run(Reach(store, link).step(0))
        assert link.profile is not None
        (told,) = caplog.records
        assert told.levelno == logging.INFO
        assert told.getMessage() == f"there was probed. {' '.join(words(link.profile))}"
        assert "\n" not in told.getMessage()
        asyncio.run(Reach(store, link).step(0))
        assert len(caplog.records) == 1  # known from the record
