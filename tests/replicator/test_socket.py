"""The socket: who may ask, for what, and that no wait is for ever."""

from __future__ import annotations

import io
import os
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from cas.adoption import Adoption
from cas.alone import Alone
from cas.background import PLACE
from cas.blobs import Measured
from cas.digest import Digest
from cas.elsewhere import SOCKET, Elsewhere, Fetched, Word, socket_path
from cas.errors import BlobElsewhere, BlobMissing, CopyUnconfirmed
from cas.files import PutItem
from cas.records import PENDING, StoredFile
from cas.store import Store
from cas.uploads import UploadRequest
from replicator.targets import TargetUnreachable
from tests.clocks import HandClock
from tests.replicator.crates import Node, background

CONTENT = b"asked for"


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, clock=clock) as opened:
        yield opened


@pytest.fixture
def node(store: Store) -> Node:
    return Node(store)


def read(node: Node, file: StoredFile) -> bytes:
    with node.store.opener.stream(file.checksum_sha256, file.size_bytes) as stream:
        return stream.read(file.size_bytes) or b""


def read_all(stream: Fetched) -> bytes:
    return b"".join(iter(lambda: stream.read(4096) or b"", b""))


def answer_to(root: Path, question: bytes) -> bytes:
    """All that the socket says to these bytes, to its end."""
    with socket.socket(socket.AF_UNIX) as sock, socket_path(root) as path:
        sock.settimeout(60)
        sock.connect(path)
        sock.sendall(question)
        said = b""
        while data := sock.recv(4096):
            said += data
    return said


def test_only_its_own_user_may_connect(node: Node) -> None:
    with background(node):
        found = (node.store.root / SOCKET).lstat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
    assert not (node.store.root / SOCKET).exists()


@pytest.mark.parametrize(
    "asked",
    [
        b"\n",
        b"nonsense\n",
        b'{"verb":"fetch"}\n',
        b'{"verb":"fetch","digest":"../../etc/passwd"}\n',
        b'{"verb":"fetch","digest":"' + b"A" * 64 + b'"}\n',
        b'{"verb":"fetch","digest":"' + b"0" * 64 + b'"}\n',
        b'{"verb":"open","digest":"' + b"0" * 64 + b'"}\n',
        b'{"verb":"copied","digest":"' + b"0" * 64 + b'"}\n',
    ],
)
def test_what_is_no_question_for_a_known_blob_is_refused(node: Node, asked: bytes) -> None:
    file = node.evicted(CONTENT)
    with background(node):
        assert b'"kind":"failed"' in answer_to(node.store.root, asked)
        assert node.crates["a"].asked == []
        assert read(node, file) == CONTENT


def test_a_question_without_an_end_is_cut_off(node: Node) -> None:
    with background(node):
        assert answer_to(node.store.root, b"x" * 1024 + b"y") == b""


def test_one_that_was_left_behind_is_replaced_and_one_that_was_removed_is_made_again(
    node: Node,
) -> None:
    file, other = node.evicted(CONTENT), node.evicted(CONTENT * 2)
    path = node.store.root / SOCKET
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(BlobElsewhere, match="no replicator"):
        read(node, file)
    with background(node) as back:
        assert read(node, file) == CONTENT
        path.unlink()
        with pytest.raises(BlobElsewhere, match="no replicator"):
            read(node, other)
        back.do(back.answering.step(0))
        assert read(node, other) == CONTENT * 2


def test_a_store_deep_in_the_tree_has_a_socket_too(root: Path, clock: HandClock) -> None:
    deep = root / ("d" * 100) / ("e" * 100)
    deep.parent.mkdir()
    with Store.open(deep, clock=clock) as store:
        node = Node(store)
        file = node.evicted(CONTENT)
        with background(node):
            assert read(node, file) == CONTENT


def test_without_a_replicator_the_error_says_so_and_without_rows_the_blob_is_missing(
    node: Node, store: Store
) -> None:
    file = node.evicted(CONTENT)
    with pytest.raises(BlobElsewhere, match="no replicator runs"):
        read(node, file)
    with pytest.raises(BlobMissing):
        store.opener.open(Digest(bytes(32)), 1)


@pytest.mark.parametrize("sign", ["it has the place", "a server just began"])
def test_a_replicator_that_starts_is_waited_for(
    node: Node, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    file = node.evicted(CONTENT)
    place = Alone(node.store.root / PLACE)
    elsewhere = Elsewhere(node.store.root, start_s=60)
    if sign == "it has the place":
        assert place.take()
    else:
        elsewhere.expect(60)
    refused = threading.Event()
    connect = socket.socket.connect

    class Socket(socket.socket):
        def connect(self, address: object) -> None:
            try:
                connect(self, address)  # type: ignore[arg-type]
            except FileNotFoundError:
                refused.set()
                raise

    monkeypatch.setattr("cas.elsewhere.socket.socket", Socket)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(elsewhere.open, file.checksum_sha256, file.size_bytes)
        assert refused.wait(60)
        with background(node), opening.result(60) as stream:
            assert read_all(stream) == CONTENT
    place.close()


def test_one_that_starts_for_too_long_is_waited_for_no_longer(node: Node) -> None:
    file = node.evicted(CONTENT)
    place = Alone(node.store.root / PLACE)
    assert place.take()
    impatient = Elsewhere(node.store.root, start_s=0.1)
    with pytest.raises(BlobElsewhere, match="no replicator runs"):
        impatient.open(file.checksum_sha256, file.size_bytes)
    place.close()
    patient = Elsewhere(node.store.root, start_s=3600)  # but nothing says that one starts
    with pytest.raises(BlobElsewhere, match="no replicator runs"):
        patient.open(file.checksum_sha256, file.size_bytes)


def test_a_replicator_that_hangs_holds_nobody(node: Node) -> None:
    file = node.evicted(CONTENT)
    impatient = Elsewhere(node.store.root, silent_s=0.2)
    with socket.socket(socket.AF_UNIX) as hung, socket_path(node.store.root) as path:
        hung.bind(path)
        hung.listen()
        with (
            impatient.open(file.checksum_sha256, file.size_bytes) as stream,
            pytest.raises(BlobElsewhere, match="silent"),
        ):
            stream.read(1)


def test_a_replicator_that_is_killed_leaves_no_reader_with_a_body_that_looks_whole(
    node: Node,
) -> None:
    file = node.mirrored(CONTENT)
    with socket.socket(socket.AF_UNIX) as server, socket_path(node.store.root) as path:
        server.bind(path)
        server.listen()
        with node.store.elsewhere.open(file.checksum_sha256, file.size_bytes) as stream:
            talk, _ = server.accept()
            copy = os.open(node.store.blobs.path(file.checksum_sha256), os.O_RDONLY)
            words = [Word("file"), Word("grown", file.size_bytes)]
            lines = b"".join(msgspec.json.encode(word) + b"\n" for word in words)
            socket.send_fds(talk, [lines], [copy])
            os.close(copy)
            talk.close()
            assert stream.read(1000) == CONTENT[:-1]
            with pytest.raises(BlobElsewhere, match="broke off"):
                stream.read(1000)


def test_who_waits_its_turn_hears_of_it_and_is_not_broken_off(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.socket_server._QUEUED_S", 0.05)
    monkeypatch.setattr("replicator.fetching.FETCHES_MAX", 1)
    first, second = node.evicted(b"first"), node.evicted(b"second")
    begun, go_on = threading.Event(), threading.Event()

    def before(_position: int) -> None:
        begun.set()
        go_on.wait(60)

    node.crates["a"].before = before
    ask = node.store.elsewhere.open
    with background(node), ExitStack() as streams:
        ahead = streams.enter_context(ask(first.checksum_sha256, first.size_bytes))
        assert begun.wait(60)
        queued = streams.enter_context(ask(second.checksum_sha256, second.size_bytes))
        words = [queued._talk.hear()[0] for _ in range(3)]
        go_on.set()
        assert words == [Word("grown")] * 3
        assert (read_all(ahead), read_all(queued)) == (b"first", b"second")


def test_a_slow_reader_of_a_fast_fetch_hears_all_that_is_said(node: Node) -> None:
    """Each word that it leaves unheard stays in the connection, which is soon full: then the
    replicator breaks off."""
    content = bytes(200_000)
    file = node.mirrored(content)
    with socket.socket(socket.AF_UNIX) as server, socket_path(node.store.root) as path:
        server.bind(path)
        server.listen()
        with node.store.elsewhere.open(file.checksum_sha256, file.size_bytes) as stream:
            talk, _ = server.accept()
            copy = os.open(node.store.blobs.path(file.checksum_sha256), os.O_RDONLY)
            socket.send_fds(talk, [msgspec.json.encode(Word("file")) + b"\n"], [copy])
            os.close(copy)
            talk.setblocking(False)
            for grown in range(100, 200_000, 100):  # a connection holds less than 1,000 words
                talk.sendall(msgspec.json.encode(Word("grown", grown)) + b"\n")
                assert len(stream.read(10)) == 10
            talk.sendall(msgspec.json.encode(Word("whole")) + b"\n")
            assert read_all(stream) == content[19_990:]
            talk.close()


def test_a_target_that_hangs_holds_no_reader(node: Node) -> None:
    file = node.evicted(CONTENT)
    go_on = threading.Event()
    node.crates["a"].before = lambda _position: go_on.wait(60)
    impatient = Elsewhere(node.store.root, silent_s=0.2)
    with background(node):
        with (
            impatient.open(file.checksum_sha256, file.size_bytes) as stream,
            pytest.raises(BlobElsewhere, match="silent"),
        ):
            stream.read(1)
        go_on.set()


def test_a_wait_is_waited_where_the_asker_likes(node: Node) -> None:
    waits: list[str] = []

    class Waiting:
        def __enter__(self) -> None:
            waits.append("in")

        def __exit__(self, *_: object) -> None:
            waits.append("out")

    file = node.evicted(CONTENT)
    elsewhere = Elsewhere(node.store.root, Waiting)
    with background(node), elsewhere.open(file.checksum_sha256, file.size_bytes) as stream:
        assert read_all(stream) == CONTENT
    assert waits
    assert waits == ["in", "out"] * (len(waits) // 2)


# --- storage_type = s3


class Copies:
    """What a mirror is asked for; `fails` is what it says."""

    def __init__(self) -> None:
        self.asked: list[tuple[Digest, bool]] = []
        self.fails: Exception | None = None

    async def now(self, digest: Digest, anew: bool) -> None:
        self.asked.append((digest, anew))
        if self.fails is not None:
            raise self.fails


def confirming(store: Store) -> None:
    """Have the store wait for copies, as `storage_type = s3` does."""

    def confirm(measured: Measured, anew: bool) -> None:
        store.elsewhere.confirm(measured.digest, measured.size_bytes, anew=anew)

    store.adoption = Adoption(
        store.catalog,
        store.blobs,
        store.collector,
        trust_verified_for_us=store.settings.store.trust_verified_for,
        now_us=store.now_us,
        confirm=confirm,
    )


def test_a_writer_waits_for_the_copy_which_is_made_anew_for_who_did_not_have_the_bytes(
    node: Node, store: Store
) -> None:
    confirming(store)
    copies = Copies()
    with background(node, copies.now):
        file = store.files("t1", "tests").put(CONTENT, name="first")
        store.files("t1", "tests").put(CONTENT, name="first")
        store.files("t2", "tests").put(CONTENT, name="of another tenant")
    digest = file.checksum_sha256
    assert copies.asked == [(digest, True), (digest, False), (digest, True)]


def test_a_batch_waits_for_all_its_copies(node: Node, store: Store) -> None:
    confirming(store)
    copies = Copies()
    items = [PutItem(b"%d" % number, f"{number}") for number in range(40)]
    with background(node, copies.now):
        files = store.files("t1", "tests").put_many(items)
    assert {digest for digest, _ in copies.asked} == {file.checksum_sha256 for file in files}


def test_a_batch_has_sent_anew_what_its_tenant_did_not_have(node: Node, store: Store) -> None:
    """Else the time of a batch tells what other tenants have (invariant 9)."""
    own, others = node.put(b"own").checksum_sha256, b"of another tenant"
    store.files("t2", "tests").put(others, name="theirs")
    confirming(store)
    copies = Copies()
    items = [PutItem(b"own", "a"), PutItem(others, "b"), PutItem(b"nobody's", "c")]
    with background(node, copies.now):
        files = store.files("t1", "tests").put_many(items)
    assert dict(copies.asked) == {
        own: False,
        files[1].checksum_sha256: True,
        files[2].checksum_sha256: True,
    }


def test_an_upload_is_completed_only_when_the_copies_of_its_slots_are_there(
    node: Node, store: Store
) -> None:
    confirming(store)
    token = store.uploads("t1", "tests").request(UploadRequest("it", max_files=2)).upload_token
    link = store.upload_link(token)
    with pytest.raises(CopyUnconfirmed):
        link.put(0, io.BytesIO(b"hello"), filename="a")
    partial = link.begin_partial(1, "b", None, 5)
    with pytest.raises(CopyUnconfirmed):
        link.append(partial.partial_id, 0, io.BytesIO(b"world"))
    slots = link.slots()
    assert len(slots) == 2
    with pytest.raises(CopyUnconfirmed):
        link.complete()
    assert store.upload_link(token).upload.status == PENDING
    copies = Copies()
    with background(node, copies.now):
        assert len(link.complete().files) == 2
    assert {digest for digest, _ in copies.asked} == {slot.checksum_sha256 for slot in slots}


def test_a_copy_that_does_not_come_is_an_error_and_to_ask_again_is_harmless(
    node: Node, store: Store
) -> None:
    confirming(store)
    files = store.files("t1", "tests")
    with pytest.raises(CopyUnconfirmed, match="no replicator runs that could make it"):
        files.put(CONTENT, name="a")
    copies = Copies()
    copies.fails = TargetUnreachable("primary", "it rains")
    with background(node, copies.now):
        with pytest.raises(CopyUnconfirmed, match="it rains"):
            files.put(CONTENT, name="a")
        copies.fails = None
        files.put(CONTENT, name="a")
    assert len(files.list().items) == 1


def test_where_there_is_no_bucket_nothing_is_confirmed(node: Node, store: Store) -> None:
    with background(node), pytest.raises(CopyUnconfirmed, match="no target"):
        store.elsewhere.confirm(Digest(bytes(32)), 0, anew=False)
