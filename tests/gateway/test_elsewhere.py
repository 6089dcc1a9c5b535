"""Downloads of bytes that are at targets only, from a real server that has to ask for them."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from cas.background import background_of
from cas.records import StoredFile
from cas.store import Store
from replicator.targets import TargetUnreachable
from tests.gateway.served import (
    ACCOMPANIED,
    ANSWER_S,
    PATIENCE_S,
    Answer,
    Served,
    serving,
    until,
)
from tests.replicator.crates import Node, background

MIB = 1 << 20
TENANT = "default"


@dataclass
class Edge:
    """A server, and its store opened once more by what fetches for it."""

    served: Served
    node: Node

    def evicted(self, content: bytes) -> StoredFile:
        return self.node.evicted(content)

    def ask(self, file: StoredFile, method: str = "GET", **headers: str) -> Answer:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.served.ask(method, url_of(file), token=self.served.admin, headers=sent)

    def part_of(self, file: StoredFile, begun: threading.Event) -> tuple[int, bytes]:
        """The status, and what came before the connection broke off. `begun` is set as soon as
        the answer has begun, from where on it can only be broken off."""
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=ANSWER_S)
        try:
            token = {"Authorization": f"Bearer {self.served.admin}"}
            connection.request("GET", url_of(file), headers=token)
            response = connection.getresponse()
            begun.set()
            with pytest.raises(http.client.IncompleteRead) as broken:
                response.read()
            return response.status, broken.value.partial
        finally:
            connection.close()


def url_of(file: StoredFile) -> str:
    return f"/api/v1/storage/{quote(file.storage_ref, safe='')}"


def large(seed: int) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(3 * MIB)


def edge_at(folder: Path, **settings: str) -> Iterator[Edge]:
    with serving(folder, **settings) as served, Store.open(folder) as store:
        yield Edge(served, Node(store, tenant_id=TENANT))


@pytest.fixture(scope="module")
def edge(disk_folder: Path) -> Iterator[Edge]:
    with tempfile.TemporaryDirectory(prefix="blobcask-", dir=disk_folder) as folder:
        yield from edge_at(Path(folder))


@pytest.mark.parametrize("content", [b"", b"short", b"s" * 100_000, large(1)])
def test_the_whole_comes_as_if_it_were_here(edge: Edge, content: bytes) -> None:
    file = edge.evicted(content)
    with background(edge.node):
        got = edge.ask(file)
    assert (got.status, got.body) == (200, content)
    assert got.headers["etag"] == f'"{file.checksum_sha256.hex()}"'
    assert got.headers["content-length"] == str(len(content))
    assert edge.ask(file).body == content


def test_a_signed_url_gives_it_too(edge: Edge) -> None:
    file = edge.evicted(large(2))
    signed = edge.served.ask("GET", f"{url_of(file)}/url?expires_in=60", token=edge.served.admin)
    with background(edge.node):
        assert edge.served.ask("GET", signed.form["url"]).body == large(2)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-0", 0, 0), ("1000000-1999999", 1_000_000, 1_999_999), ("-10", 3 * MIB - 10, 3 * MIB - 1)],
)
def test_a_range_comes_and_nothing_else(edge: Edge, asked: str, first: int, last: int) -> None:
    content = large(3 + first % 100)
    file = edge.evicted(content)
    with background(edge.node):
        got = edge.ask(file, Range=f"bytes={asked}")
    assert (got.status, got.body) == (206, content[first : last + 1])
    assert got.headers["content-range"] == f"bytes {first}-{last}/{len(content)}"


def test_the_beginning_comes_while_the_rest_is_fetched(edge: Edge) -> None:
    content = large(10)
    file = edge.evicted(content)
    go_on = threading.Event()
    edge.node.crates["a"].before = lambda position: position < 2 * MIB or go_on.wait(PATIENCE_S)
    connection = http.client.HTTPConnection("127.0.0.1", edge.served.port, timeout=ANSWER_S)
    token = {"Authorization": f"Bearer {edge.served.admin}"}
    try:
        with background(edge.node):
            connection.request("GET", url_of(file), headers=token)
            response = connection.getresponse()
            begun = response.read(MIB)
            go_on.set()
            assert begun + response.read() == content
    finally:
        go_on.set()
        connection.close()


def test_what_needs_no_bytes_fetches_none(edge: Edge) -> None:
    content = large(11)
    file = edge.evicted(content)
    asked = len(edge.node.crates["a"].asked)
    head = edge.ask(file, "HEAD")
    assert (head.status, head.headers["content-length"]) == (200, str(len(content)))
    assert edge.ask(file, If_None_Match=head.headers["etag"]).status == 304
    assert edge.ask(file, If_Match='"other"').code == "precondition_failed"
    assert edge.ask(file, Range=f"bytes={len(content)}-").code == "range_not_satisfiable"
    assert len(edge.node.crates["a"].asked) == asked


def test_without_a_replicator_the_answer_says_so(edge: Edge) -> None:
    for content in (b"alone", large(12)):
        file = edge.evicted(content)
        got = edge.ask(file)
        assert (got.status, got.code) == (503, "blob_elsewhere")
        assert int(got.headers["retry-after"]) > 0
        assert "crate" not in got.body.decode()
        told_of_the_file = {"etag", "repr-digest", "content-disposition", "content-range"}
        assert not told_of_the_file & {
            name.lower() for name in edge.ask(file, Range="bytes=1-2").headers
        }
        with background(edge.node):
            assert edge.ask(file).body == content


def test_a_fetch_that_dies_breaks_the_answer_off(edge: Edge) -> None:
    content = large(13)
    file = edge.evicted(content)
    crate = edge.node.crates["a"]
    before = crate.before
    begun = threading.Event()

    def die(position: int) -> None:
        if position >= 2 * MIB and begun.wait(PATIENCE_S):
            raise TargetUnreachable("a", "cut")

    with background(edge.node):
        crate.before = die
        status, got = edge.part_of(file, begun)
        assert status == 200
        assert len(got) < len(content)
        assert content.startswith(got)
        crate.before = before
        assert edge.ask(file).body == content


def test_wrong_bytes_never_look_whole(edge: Edge) -> None:
    content = large(14)
    file = edge.evicted(content)
    crate = edge.node.crates["a"]
    crate.hold(file.checksum_sha256, content[:-1] + b"?")
    begun = threading.Event()
    crate.before = lambda position: position < 2 * MIB or begun.wait(PATIENCE_S)
    with background(edge.node):
        status, got = edge.part_of(file, begun)
    crate.before = lambda _position: None
    assert status == 200
    assert len(got) < len(content)


def test_a_crowd_for_one_blob_causes_one_fetch(edge: Edge) -> None:
    content = large(15)
    file = edge.evicted(content)
    asked = len(edge.node.crates["a"].asked)
    with background(edge.node), ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _number: edge.ask(file), range(50)))
    assert {answer.status for answer in answers} == {200}
    assert all(answer.body == content for answer in answers)
    assert len(edge.node.crates["a"].asked) == asked + 1


def test_those_who_wait_for_a_target_hold_no_working_slot(edge: Edge) -> None:
    file = edge.evicted(large(16))
    here = edge.node.put(b"here")
    go_on = threading.Event()
    edge.node.crates["a"].before = lambda _position: go_on.wait(PATIENCE_S)
    with background(edge.node) as back, ThreadPoolExecutor(64) as pool:
        waiting = [pool.submit(edge.ask, file) for _ in range(64)]
        while len(back.answering._talks) < 64:
            assert not any(one.done() for one in waiting)
        assert edge.ask(here).body == b"here"
        go_on.set()
        assert {one.result(PATIENCE_S).status for one in waiting} == {200}
    edge.node.crates["a"].before = lambda _position: None


def test_a_proxy_is_given_only_what_it_can_open(root: Path) -> None:
    for edge in edge_at(root, GATEWAY__ACCEL_REDIRECT="/objects/"):
        name = edge.evicted(b"elsewhere").checksum_sha256.hex()
        file = edge.node.put(b"here")
        assert edge.ask(file).headers["x-accel-redirect"].endswith(file.checksum_sha256.hex())
        file = edge.node.put(b"elsewhere", "again")
        assert edge.ask(file).headers["x-accel-redirect"].endswith(name)
        file = edge.evicted(b"not here")
        with background(edge.node):
            head = edge.ask(file, "HEAD")
            assert "x-accel-redirect" not in head.headers
            assert head.headers["content-length"] == "8"
            got = edge.ask(file)
            assert "x-accel-redirect" not in got.headers
            assert got.body == b"not here"


@pytest.mark.slow
def test_a_node_with_a_small_disk_serves_all_that_it_ever_stored(
    root: Path, tmp_path: Path
) -> None:
    """The whole way, with nothing in the place of anything: mirror, shipping, eviction,
    reading through, and a background process that is killed meanwhile."""
    settings = {
        "REPLICATOR__TARGETS": "disk",
        "REPLICATOR__SHIP_EVERY": "1s",
        "TARGET_DISK__KIND": "folder",
        "TARGET_DISK__PATH": str(tmp_path / "disk"),
        "CACHE__MAX_SIZE": "1MiB",
    }
    contents = [hashlib.shake_128(bytes([number])).digest(256 << 10) for number in range(12)]
    with serving(root, ACCOMPANIED, **settings) as served:
        urls = []
        for number, content in enumerate(contents):
            url = f"/api/v1/storage?name={number}"
            answer = served.ask("POST", url, content, token=served.admin)
            assert answer.status == 201
            reference = answer.form["storage_ref"]
            urls.append(f"/api/v1/storage/{quote(reference, safe='')}")

        def read(url: str) -> Answer:
            return served.ask("GET", url, token=served.admin)

        until(lambda: let_time_pass(root) <= 4)
        assert [read(url).body for url in urls] == contents
        until(lambda: let_time_pass(root) <= 4)
        os.kill(background_of(root, 0).beat.pid, signal.SIGKILL)  # type: ignore[union-attr]
        gone = next(url for url in urls if not is_here(root, url))
        until(lambda: read(gone).status == 200)
        assert [read(url).body for url in urls] == contents


def let_time_pass(root: Path) -> int:
    """Make all blobs look unused for an hour; how many are here."""
    objects = [path for path in (root / "objects").rglob("*") if path.is_file()]
    for path in objects:
        with suppress(FileNotFoundError):
            found = path.stat()
            os.utime(path, ns=(found.st_mtime_ns - 3600 * 10**9, found.st_mtime_ns))
    return len(objects)


def is_here(root: Path, url: str) -> bool:
    name = url.rpartition("%2F")[2].partition(".")[0]
    return (root / "objects" / name[:2] / name).exists()
