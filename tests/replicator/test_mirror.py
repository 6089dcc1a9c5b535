"""The mirror: every row ends with a verified copy, whatever happens on the way."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cas.clock import DAY_US, SECOND_US
from cas.config import TargetSettings
from cas.digest import Digest
from cas.errors import CopyUnconfirmed
from cas.records import COPYING, DELETING, DONE, WANTED, Blob, Copy, Replica
from cas.references import parse_reference
from cas.replicas import (
    backlog,
    begin_removals,
    end_removals,
    register,
    removable,
    settle,
    want_again,
)
from cas.store import Store
from replicator.backfilling import Backfill
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.mirror import Mirror
from replicator.patience import Patience
from replicator.targets import (
    BytesDiffer,
    ObjectAbsent,
    ObjectRefused,
    TargetBusy,
    TargetRefused,
    TargetUnreachable,
    object_key,
)
from tests.clocks import HandClock
from tests.replicator.between import BY_MD5, MIB, Between, Instead, storm

IN_PARTS = os.urandom(MIB) + bytes(3 * MIB) + b"and the rest"
DOWN = TargetUnreachable("other", "nobody answers")


def no_jitter() -> float:
    return 0.0


class Node:
    """A store with the target "other" behind a meddler, and a mirror to it."""

    def __init__(self, root: Path, clock: HandClock) -> None:
        self.store = Store.open(root / "store", clock=clock)
        self.target = Between(FolderTarget("other", root / "target"))
        self.target.target.put("probe/one", io.BytesIO(b"1"), 1)  # as any probe does
        settings = TargetSettings("other", "folder", root / "target")
        self.link = Link(self.target, settings, BY_MD5)
        self.link.fenced = ""
        register(self.store.catalog, [("other", "a folder")])
        self.patience = Patience(4, jitter=no_jitter)
        self.now_s = 1000.0
        self.mirror = self.new_mirror()

    def new_mirror(self, **more: object) -> Mirror:
        options = {"concurrency": 4, "patience": self.patience, "now_s": lambda: self.now_s, **more}
        return Mirror(self.store, self.link, **options)  # type: ignore[arg-type]

    def put(self, content: bytes) -> Digest:
        return self.store.files("t1", "tests").put(content, name="a").checksum_sha256

    def row(self, digest: Digest) -> Replica:
        with self.store.catalog.read() as snapshot:
            row = snapshot.get(Replica, "other", digest)
        assert row is not None
        return row

    def blob(self, digest: Digest) -> Blob:
        with self.store.catalog.read() as snapshot:
            blob = snapshot.get(Blob, digest)
        assert blob is not None
        return blob

    def waiting(self) -> int:
        with self.store.catalog.read() as snapshot:
            return backlog(snapshot, "other", 0).rows

    def there(self, digest: Digest) -> bytes | None:
        try:
            with self.target.target.get(object_key(digest)) as incoming:
                content = b""
                while piece := incoming.read(MIB):
                    content += piece
                return content
        except ObjectAbsent:
            return None

    def delete_removed(self) -> None:
        """What `removing` does, at once: each row that may, with its DELETE."""
        with self.store.catalog.read() as snapshot:
            found = removable(snapshot, "other", 1 << 62, snapshot.position.seq)
        for row in begin_removals(self.store.catalog, found):
            self.target.target.delete(object_key(row.digest))
            end_removals(self.store.catalog, [row])

    async def drain(self) -> None:
        """Steps until nothing is under way and nothing is due."""
        async with asyncio.timeout(60):
            while await self.mirror.step(self.store.clock.now_us()):
                pass

    async def drain_all(self) -> None:
        """The same, with all the waiting in between, until nothing waits."""
        async with asyncio.timeout(200):
            while self.waiting():
                await self.drain()
                self.now_s += 1

    def tell(self, story: Callable[[], Awaitable[None]]) -> None:
        async def told() -> None:
            try:
                await story()
            finally:
                await self.mirror.close()

        asyncio.run(told())

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def node(root: Path, clock: HandClock) -> Iterator[Node]:
    made = Node(root, clock)
    yield made
    made.close()


def failing(verb: str, error: Exception, times: int = 1 << 30) -> Callable[[str, str], None]:
    left = [times]

    def meddle(now: str, _key: str) -> None:
        if now == verb and left[0] > 0:
            left[0] -= 1
            raise error

    return meddle


# --- the queue


def test_whatever_is_stored_is_copied_and_proved(node: Node) -> None:
    contents = [b"", b"one", b"two", *(bytes([n]) * 1000 for n in range(100)), IN_PARTS]
    digests = {node.put(content): content for content in contents}

    node.tell(node.drain_all)

    for digest, content in digests.items():
        assert node.there(digest) == content
        assert node.row(digest).held
    assert node.waiting() == 0
    rows_a_second, bytes_a_second = node.link.speed.a_second()
    assert rows_a_second > 0
    assert bytes_a_second > 0


def test_outcomes_are_written_down_together(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        node.put(b"%d" % number)
    before = node.store.catalog.position().seq
    all_sent = threading.Event()

    def meddle(verb: str, _key: str) -> None:
        if verb == "put" and node.target.count("put") >= 100:
            all_sent.set()

    def late(*words: Any) -> list[Replica | None]:
        assert all_sent.wait(60)  # as long as that takes, nothing is written
        return settle(*words)

    node.target.meddle = meddle
    monkeypatch.setattr("replicator.settling.settle", late)
    node.tell(node.drain)
    assert node.store.catalog.position().seq - before < 30


def test_a_commit_is_noticed_within_a_moment(node: Node) -> None:
    """The loop waits `interval_s` between two steps that have nothing to do."""

    async def story() -> None:
        await node.drain()
        idle = 0
        digest = await asyncio.to_thread(node.put, b"new")
        while not node.row(digest).held:
            if not await node.mirror.step(node.store.clock.now_us()):
                idle += 1
                await asyncio.sleep(node.mirror.interval_s)
        assert idle < 5
        assert node.mirror.interval_s <= 0.1

    node.tell(story)


def test_nothing_is_sent_before_the_target_is_probed_or_while_it_is_fenced(node: Node) -> None:
    digest = node.put(b"held back")

    async def story() -> None:
        node.link.fenced = "another node ships there"
        await node.drain()
        node.link.fenced, node.link.profile = "", None
        await node.drain()
        assert not node.target.calls
        node.link.profile = BY_MD5
        await node.drain()
        assert node.row(digest).held

    node.tell(story)


def test_small_blobs_do_not_wait_behind_large_ones(node: Node) -> None:
    large = [node.put(IN_PARTS + b"%d" % number) for number in range(6)]
    go_on = threading.Event()
    node.target.meddle = lambda verb, _key: go_on.wait(60) if verb == "part 1" else None
    small = [node.put(b"small %d" % number) for number in range(20)]

    async def story() -> None:
        async with asyncio.timeout(60):
            while not all(node.row(digest).held for digest in small):
                await node.mirror.step(node.store.clock.now_us())
        assert not any(node.row(digest).held for digest in large)
        go_on.set()
        await node.drain()
        assert all(node.row(digest).held for digest in large)

    node.tell(story)


def test_blobs_that_were_there_before_the_target_get_their_rows(node: Node) -> None:
    register(node.store.catalog, [])  # it has no rows yet
    digests = [node.put(b"%d" % number) for number in range(700)]
    register(node.store.catalog, [("other", "a folder")])
    assert node.waiting() == 0
    job = Backfill(node.store, "other")

    async def story() -> None:
        while await job.step(0):
            pass
        await node.drain()

    node.tell(story)
    assert all(node.row(digest).held for digest in digests)


# --- failures


@pytest.mark.parametrize(
    "error",
    [
        DOWN,
        TargetBusy("other", "slow down"),
        TargetRefused("other", "who are you"),
        BytesDiffer("other", "wrong bytes arrived"),
        ObjectRefused("other", "not this one"),
        ValueError("a fault of ours"),
        OSError(5, "bad disk"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_is_told_and_tried_again_later(node: Node, error: Exception) -> None:
    digest = node.put(b"at the second try")
    node.target.meddle = failing("put", error, times=1)

    async def story() -> None:
        await node.drain()
        row = node.row(digest)
        assert (row.state, row.attempts) == (WANTED, 1)
        assert row.last_error == node.link.last_error == str(error)
        await node.drain()
        assert node.target.count("put") == 1  # its pause is not over
        node.now_s += 7 * 3600
        await node.drain()
        assert node.row(digest).held
        assert not node.link.last_error

    node.tell(story)


def test_a_bad_blob_costs_the_others_nothing(node: Node) -> None:
    bad = node.put(b"bad")

    def meddle(verb: str, key: str) -> None:
        if verb == "put" and key == object_key(bad):
            raise BytesDiffer("other", "wrong bytes arrived")

    node.target.meddle = meddle
    good = [node.put(b"%d" % number) for number in range(50)]
    node.tell(node.drain)
    assert all(node.row(digest).held for digest in good)
    assert not node.row(bad).held
    assert not node.link.down


def test_a_target_that_is_down_is_asked_once_a_pause_and_all_goes_on_when_it_is_back(
    node: Node,
) -> None:
    digests = [node.put(b"%d" % number) for number in range(60)]
    node.target.meddle = failing("put", DOWN)

    async def story() -> None:
        await node.drain()
        assert "nobody answers" in node.link.down
        tried = node.target.count("put")
        assert tried < 20
        for _ in range(600):  # ten minutes
            await node.drain()
            node.now_s += 1
        assert node.target.count("put") - tried < 25
        node.target.meddle = lambda *_: None
        node.now_s += 90
        await node.drain()
        await node.drain_all()
        assert not node.link.down

    node.tell(story)
    assert all(node.row(digest).held for digest in digests)


def test_connections_cut_at_every_tenth_call_stop_nothing(node: Node) -> None:
    digests = [node.put(b"%d" % number) for number in range(100)]
    digests.append(node.put(IN_PARTS))

    def meddle(_verb: str, _key: str) -> None:
        if len(node.target.calls) % 10 == 0:
            raise DOWN

    node.target.meddle = meddle
    node.tell(node.drain_all)
    assert all(node.row(digest).held for digest in digests)
    assert node.target.count("put") < 130


def test_no_answer_but_a_proof_makes_a_row_done(node: Node) -> None:
    digest = node.put(b"into the void")

    def meddle(verb: str, _key: str) -> None:
        if verb == "put":
            raise Instead("an etag")

    node.target.meddle = meddle
    node.tell(node.drain)
    assert node.row(digest).state == WANTED
    assert "not there" in node.row(digest).last_error


def test_rotten_bytes_here_are_not_sent_but_reported(node: Node) -> None:
    digest = node.put(b"to be spoilt")
    path = node.store.blobs.path(digest)
    os.chmod(path, 0o600)
    path.write_bytes(b"to be SPOILT")

    async def story() -> None:
        await node.drain()
        assert not node.target.calls
        assert node.blob(digest).missing_at is not None
        assert not path.exists()
        assert node.row(digest).state == WANTED
        node.put(b"to be spoilt")  # healed by an upload
        node.now_s += 3600
        await node.drain()
        assert node.there(digest) == b"to be spoilt"
        assert node.row(digest).held

    node.tell(story)


@pytest.mark.parametrize("years", [10, -10, -56])
def test_a_wrong_clock_stops_nothing(node: Node, clock: HandClock, years: int) -> None:
    node.put(b"before")
    clock.trusted = False
    clock.advance(years * 365 * DAY_US)
    digest = node.put(b"meanwhile")
    node.target.meddle = failing("put", DOWN, times=3)
    node.tell(node.drain_all)
    assert node.row(digest).held


def test_a_pause_that_no_clock_will_reach_is_cut_short(node: Node, clock: HandClock) -> None:
    """It was written down while the clock was years ahead."""
    digest = node.put(b"again")
    before_us = clock.time_us
    node.store.accept_clock()
    node.now_s += 5 * 365 * 86400  # what the mirror took for the time
    node.mirror._ahead_us += 5 * 365 * DAY_US
    node.target.meddle = failing("put", DOWN, times=1)

    async def story() -> None:
        await node.drain()
        assert node.row(digest).next_attempt_at > before_us + DAY_US
        await node.mirror.close()
        node.now_s = 1000.0
        node.mirror = node.new_mirror()
        await node.drain()
        node.now_s += 9 * 3600 + 1
        await node.drain()
        assert node.row(digest).held

    node.tell(story)


# --- uploads in parts


def test_a_killed_upload_goes_on_where_it_was(node: Node) -> None:
    digest = node.put(IN_PARTS)
    node.target.meddle = failing("part 3", DOWN)

    async def story() -> None:
        await node.drain()
        assert node.row(digest).state == COPYING
        with node.store.catalog.read() as snapshot:
            assert snapshot.get(Copy, "other", digest) is not None
        await node.mirror.close()
        node.mirror = node.new_mirror()
        node.target.calls.clear()
        node.target.meddle = lambda *_: None
        node.now_s += 60
        await node.drain()
        assert node.row(digest).held
        assert [verb for verb, _ in node.target.calls if verb[:5] in ("begin", "part ")] == [
            "part 3"
        ]
        with node.store.catalog.read() as snapshot:
            assert snapshot.get(Copy, "other", digest) is None

    node.tell(story)


def test_an_upload_of_a_blob_that_rotted_meanwhile_is_aborted_and_begun_anew(node: Node) -> None:
    digest = node.put(IN_PARTS)
    path = node.store.blobs.path(digest)

    def rot(verb: str, _key: str) -> None:
        if verb == "begin":
            os.chmod(path, 0o600)
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"!")

    node.target.meddle = rot

    async def story() -> None:
        await node.drain()
        assert node.row(digest).state == WANTED
        assert not list(node.target.target.unfinished())
        node.target.meddle = lambda *_: None
        node.put(IN_PARTS)
        node.now_s += 3600
        await node.drain()
        assert node.there(digest) == IN_PARTS
        assert node.row(digest).held

    node.tell(story)


# --- storms


def test_what_was_sent_is_not_sent_again_because_the_proof_was_put_off(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.patient._LONGEST_S", 60.0)
    for error in (TargetUnreachable("other", "500"), TargetBusy("other", "503")):
        node.target.meddle = failing("stat", error, times=3)
        before = node.target.count("put")
        digest = node.put(str(error).encode())
        node.tell(node.drain)
        node.mirror = node.new_mirror()
        assert node.row(digest).held
        assert node.target.count("put") == before + 1


@pytest.mark.slow
def test_a_storm_that_puts_off_two_of_three_requests_for_ever_only_delays(node: Node) -> None:
    digests = [node.put(b"%d" % number) for number in range(10)]
    digests.append(node.put(IN_PARTS))
    node.target.meddle = storm()
    node.tell(node.drain_all)
    assert all(node.row(digest).held for digest in digests)
    assert node.there(digests[-1]) == IN_PARTS


def test_a_target_that_answers_some_requests_is_not_left_alone() -> None:
    patience = Patience(4, jitter=no_jitter)
    for answers in range(100):
        patience.failed(DOWN, began_s=1, now_s=1, answers=answers)
        assert not patience.down
    for _ in range(5):
        patience.failed(DOWN, began_s=1, now_s=1, answers=99)
    assert patience.down
    patience.failed(DOWN, began_s=1, now_s=1, answers=100)  # one of those that were under way
    assert not patience.down
    # Credentials that may store and not read do not get better by storing.
    for answers in range(100, 103):
        patience.failed(TargetRefused("other", "403"), began_s=1, now_s=1, answers=answers)
    assert patience.down


# --- what happens meanwhile


def test_a_blob_that_goes_while_it_is_copied_leaves_a_row_that_deletes_it(
    node: Node, clock: HandClock
) -> None:
    file = node.store.files("t1", "tests").put(b"short lived", name="a")
    digest = file.checksum_sha256

    def remove(verb: str, _key: str) -> None:
        if verb == "put":
            node.store.files("t1", "tests").delete(parse_reference(file.storage_ref))
            clock.advance(2 * DAY_US)
            with node.store.catalog.read() as snapshot:
                plan = node.store.collector.plan(snapshot, node.store.now_us(snapshot))
            assert node.store.collector.execute(plan).blobs == 1

    node.target.meddle = remove
    node.tell(node.drain)
    row = node.row(digest)
    assert row.removed_at is not None
    assert row.ending == "other"


def test_a_copy_that_was_verified_before_a_delete_is_not_done(node: Node, clock: HandClock) -> None:
    """Its blob went, the copy was deleted, and the blob came back: all between the target's
    word that the bytes are there and the writing down of it."""
    file = node.store.files("t1", "tests").put(b"in between", name="a")
    digest = file.checksum_sha256

    def forget(verb: str, key: str) -> None:
        if verb != "stat":
            return
        node.target.meddle = lambda *_: None
        answer = node.target.stat(key)
        node.store.files("t1", "tests").delete(parse_reference(file.storage_ref))
        clock.advance(2 * DAY_US)
        with node.store.catalog.read() as snapshot:
            plan = node.store.collector.plan(snapshot, node.store.now_us(snapshot))
        assert node.store.collector.execute(plan).blobs == 1
        node.delete_removed()
        assert node.there(digest) is None
        assert node.put(b"in between") == digest
        raise Instead(answer)

    async def story() -> None:
        await node.drain()
        want_again(node.store.catalog, "other", [digest])  # so that it was tried: a DELETE is due
        node.target.meddle = forget
        await node.drain()

    node.tell(story)
    assert node.target.count("put") == 3
    assert node.there(digest) == b"in between"
    assert node.row(digest).held


def test_copies_that_were_lost_are_made_again(node: Node) -> None:
    digest = node.put(b"lost and found")

    async def story() -> None:
        await node.drain()
        node.target.target.delete(object_key(digest))
        want_again(node.store.catalog, "other", [digest])
        assert node.row(digest).state == WANTED
        await node.drain()
        assert node.row(digest).state == DONE
        assert node.there(digest) == b"lost and found"

    node.tell(story)


# --- copies that are asked for


def test_an_asked_copy_goes_ahead_of_the_queue(node: Node) -> None:
    go_on = threading.Event()
    wanted: list[Digest] = []

    def meddle(verb: str, key: str) -> None:
        if verb == "put" and key != object_key(wanted[0]):
            go_on.wait(60)

    node.target.meddle = meddle
    others = [node.put(b"%d" % number) for number in range(300)]
    wanted.append(node.put(b"now"))

    async def story() -> None:
        await node.mirror.step(node.store.clock.now_us())
        async with asyncio.timeout(60):
            await node.mirror.copy_now(wanted[0])
        assert node.row(wanted[0]).held
        assert not any(node.row(digest).held for digest in others)
        go_on.set()
        await node.drain()
        assert all(node.row(digest).held for digest in others)

    node.tell(story)
    puts = [key for verb, key in node.target.calls if verb == "put"]
    assert puts.count(object_key(wanted[0])) == 1


def test_an_asked_copy_that_is_done_is_sent_again_only_anew(node: Node) -> None:
    digest = node.put(b"twice")

    async def story() -> None:
        await node.mirror.copy_now(digest)
        await node.mirror.copy_now(digest)
        assert node.target.count("put") == 1
        await node.mirror.copy_now(digest, True)
        assert node.target.count("put") == 2
        await asyncio.gather(*(node.mirror.copy_now(digest, True) for _ in range(3)))
        assert node.target.count("put") == 5  # nobody's time tells of the others
        assert node.row(digest).held

    node.tell(story)


def test_who_asks_for_a_copy_under_way_waits_for_that_one(node: Node) -> None:
    digest = node.put(b"once")
    arrived, go_on = threading.Event(), threading.Event()

    def meddle(verb: str, _key: str) -> None:
        if verb == "put":
            arrived.set()
            go_on.wait(60)

    node.target.meddle = meddle

    async def story() -> None:
        first = asyncio.create_task(node.mirror.copy_now(digest))
        await asyncio.to_thread(arrived.wait, 60)
        second = asyncio.create_task(node.mirror.copy_now(digest))
        await node.mirror.step(node.store.clock.now_us())
        go_on.set()
        await asyncio.gather(first, second)
        assert node.target.count("put") == 1

    node.tell(story)


def test_an_asked_copy_survives_a_cut_and_is_refused_while_the_target_is_down(node: Node) -> None:
    digest = node.put(b"in spite of it")
    other = node.put(b"not now")

    async def story() -> None:
        node.target.meddle = failing("put", DOWN, times=1)
        async with asyncio.timeout(60):
            await node.mirror.copy_now(digest)
        assert node.row(digest).held
        node.target.meddle = failing("put", DOWN)
        for number in range(20):
            node.put(b"%d" % number)
        await node.drain()
        assert node.link.down
        with pytest.raises(CopyUnconfirmed, match="nobody answers"):
            await node.mirror.copy_now(other)

    node.tell(story)


def test_an_asked_copy_is_refused_at_once_where_waiting_helps_nobody(node: Node) -> None:
    digest = node.put(b"too large, say")

    async def story() -> None:
        with pytest.raises(CopyUnconfirmed, match="no blob"):
            await node.mirror.copy_now(Digest(bytes(32)))
        node.target.meddle = failing("put", ObjectRefused("other", "too large"))
        with pytest.raises(CopyUnconfirmed, match="too large"):
            await node.mirror.copy_now(digest)
        node.link.fenced = "another node ships there"
        with pytest.raises(CopyUnconfirmed, match="another node"):
            await node.mirror.copy_now(digest)

    node.tell(story)


def test_an_asked_copy_waits_until_a_delete_has_ended(node: Node, clock: HandClock) -> None:
    files = node.store.files("t1", "tests")
    digest = node.put(b"back again")

    async def story() -> None:
        await node.drain()
        files.delete(parse_reference(files.put(b"back again", name="a").storage_ref))
        clock.advance(2 * DAY_US)
        with node.store.catalog.read() as snapshot:
            plan = node.store.collector.plan(snapshot, node.store.now_us(snapshot))
        node.store.collector.execute(plan)
        with node.store.catalog.read() as snapshot:
            rows = removable(snapshot, "other", clock.now_us() + SECOND_US, 1 << 40)
        begun = begin_removals(node.store.catalog, rows)
        assert [row.digest for row in begun] == [digest]
        node.put(b"back again")
        asked = asyncio.create_task(node.mirror.copy_now(digest))
        for _ in range(3):
            await node.mirror.step(clock.now_us())
        assert node.target.count("put") == 1
        node.target.target.delete(object_key(digest))
        end_removals(node.store.catalog, begun)
        await asked
        assert node.there(digest) == b"back again"
        assert node.row(digest).held

    node.tell(story)


# --- evicted bytes, and the end


def test_bytes_that_are_only_elsewhere_are_brought_here_first(node: Node) -> None:
    digest = node.put(b"evicted")
    content = node.store.blobs.path(digest).read_bytes()
    blob = node.blob(digest)
    node.store.catalog.write(
        lambda txn: txn.replace(_gone(txn.get(Blob, digest) or blob)), actor="tests"
    )
    node.store.blobs.remove(digest)
    brought: list[Digest] = []

    async def bring(wanted: Digest) -> bool:
        brought.append(wanted)
        with node.store.blobs.stage(content) as staged:
            node.store.blobs.place(staged)
        return True

    async def story() -> None:
        await node.drain()
        assert "other targets" in node.row(digest).last_error
        await node.mirror.close()
        node.mirror = node.new_mirror(bring=bring)
        node.now_s += 3600
        await node.drain()
        assert brought == [digest]
        assert node.row(digest).held

    node.tell(story)


def _gone(blob: Blob) -> Blob:
    return msgspec.structs.replace(blob, local=False, evicted_at=1)


def test_the_end_breaks_off_what_hangs_and_leaves_its_row_as_it_was(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.mirror._CLOSE_S", 0.1)
    monkeypatch.setattr("replicator.mirror._STOP_S", 0.1)
    digest = node.put(b"hanging")
    arrived, go_on = threading.Event(), threading.Event()

    def hang(verb: str, _key: str) -> None:
        if verb == "put":
            arrived.set()
            go_on.wait(200)  # longer than anybody waits

    node.target.meddle = hang

    async def story() -> None:
        await node.mirror.step(node.store.clock.now_us())
        await asyncio.to_thread(arrived.wait, 60)
        async with asyncio.timeout(60):
            await node.mirror.close()
        go_on.set()
        assert node.row(digest).state == WANTED
        assert not node.row(digest).attempts

    node.tell(story)


# --- what must not wait for others


async def until(node: Node, done: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not done():
            await node.mirror.step(node.store.clock.now_us())


def down(*_: str) -> None:
    raise DOWN


def held(node: Node, digests: list[Digest]) -> bool:
    return all(node.row(digest).held for digest in digests)


@pytest.mark.parametrize("hangs", [False, True], ids=["due", "hanging since the outage"])
def test_after_an_outage_small_blobs_do_not_wait_until_a_large_one_is_copied(
    node: Node, hangs: bool
) -> None:
    large = node.put(IN_PARTS)
    small = [node.put(b"small %d" % number) for number in range(6)]
    go_on = threading.Event()

    async def story() -> None:
        node.target.meddle = down
        await until(node, lambda: bool(node.link.down))
        if not hangs:
            node.now_s += 120
            tried = [large, *small]
            await until(node, lambda: all(node.row(digest).attempts for digest in tried))
        node.target.meddle = lambda _, key: go_on.wait(60) if key == object_key(large) else None
        node.now_s += 120
        await until(node, lambda: held(node, small))
        assert not node.row(large).held
        assert not node.link.down
        go_on.set()
        await node.drain()
        assert node.row(large).held

    node.tell(story)


def test_a_part_of_a_large_blob_that_arrives_ends_the_outage(node: Node) -> None:
    large = node.put(IN_PARTS)
    go_on = threading.Event()

    def meddle(verb: str, _key: str) -> None:
        if verb in ("part 2", "part 3"):
            go_on.wait(60)

    async def story() -> None:
        for _ in range(5):
            node.patience.failed(DOWN, node.now_s, node.now_s)
        assert node.patience.down
        node.now_s += 120
        node.target.meddle = meddle
        await until(node, lambda: node.target.count("part 2") > 0)
        small = node.put(b"small")
        await until(node, lambda: held(node, [small]))
        assert not node.row(large).held
        go_on.set()
        await node.drain()

    node.tell(story)


def test_an_outage_ends_though_nothing_waits_to_be_copied(node: Node, clock: HandClock) -> None:
    files = node.store.files("t1", "tests")
    stored = [files.put(b"%d" % number, name="a") for number in range(8)]
    node.target.meddle = down

    async def story() -> None:
        await until(node, lambda: bool(node.link.down))
        for file in stored:
            files.delete(parse_reference(file.storage_ref))
        clock.advance(2 * DAY_US)
        with node.store.catalog.read() as snapshot:
            plan = node.store.collector.plan(snapshot, node.store.now_us(snapshot))
        node.store.collector.execute(plan)
        assert node.waiting() == 0
        for _ in range(600):  # ten minutes
            await node.drain()
            node.now_s += 1
        assert node.link.down
        assert 0 < node.target.count("stat") < 25
        node.target.meddle = lambda *_: None
        node.now_s += 90
        await node.drain()
        assert not node.link.down
        await node.mirror.copy_now(node.put(b"asked for"))

    node.tell(story)


def test_small_blobs_do_not_wait_behind_any_number_of_evicted_ones(
    node: Node, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.waiting._LARGE_MAX", 8)
    monkeypatch.setattr("replicator.waiting._ENDS_MAX", 4)
    monkeypatch.setattr("replicator.waiting._PAGE", 8)
    evicted = [node.put(b"evicted %d" % number) for number in range(60)]
    for digest in evicted:
        gone = _gone(node.blob(digest))
        node.store.catalog.write(lambda txn, gone=gone: txn.replace(gone), actor="tests")  # type: ignore[misc]
    clock.advance(SECOND_US)
    first = [node.put(b"first %d" % number) for number in range(5)]

    async def story() -> None:
        there = asyncio.Event()

        async def bring(_digest: Digest) -> bool:
            return await there.wait()

        await node.mirror.close()
        node.mirror = node.new_mirror(bring=bring)
        await until(node, lambda: held(node, first))
        # As it is while the clock is not believed: due no later than all the others.
        second = [node.put(b"second %d" % number) for number in range(5)]
        await until(node, lambda: held(node, second))
        assert not any(node.row(digest).held for digest in evicted)
        there.set()
        await node.drain()
        assert held(node, evicted)

    node.tell(story)


def test_blobs_that_are_about_to_go_keep_nobody_from_the_queue(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection was killed between what it wrote down and the unlinking."""
    monkeypatch.setattr("replicator.waiting._PAGE", 8)
    monkeypatch.setattr("replicator.waiting._LOOK_ROWS", 16)
    files = node.store.files("t1", "tests")
    stored = [files.put(b"doomed %d" % number, name="a") for number in range(40)]
    for file in stored:
        files.delete(parse_reference(file.storage_ref))
        blob = msgspec.structs.replace(
            node.blob(file.checksum_sha256), state=DELETING, condemned_at=None, deleting_at=1
        )
        node.store.catalog.write(lambda txn, blob=blob: txn.replace(blob), actor="tests")  # type: ignore[misc]
    digests = [node.put(b"%d" % number) for number in range(5)]
    node.tell(node.drain)
    assert held(node, digests)


def test_a_target_that_makes_wrong_bytes_of_all_is_left_alone(node: Node) -> None:
    digests = [node.put(b"%d" % number) for number in range(60)]

    def lie(verb: str, _key: str) -> None:
        if verb == "put":
            raise Instead("an etag")

    node.target.meddle = lie

    async def story() -> None:
        await node.drain()
        assert "not there" in node.link.down
        assert node.target.count("put") < 20
        node.target.meddle = lambda *_: None
        node.now_s += 90
        await node.drain()
        assert not node.link.down
        await node.drain_all()
        assert held(node, digests)

    node.tell(story)


def test_one_blob_that_is_wrong_there_for_ever_does_not_put_the_target_down(node: Node) -> None:
    bad = node.put(b"bad")
    node.target.meddle = failing("put", BytesDiffer("other", "wrong bytes arrived"))

    async def story() -> None:
        for _ in range(20):
            await node.drain()
            node.now_s += 900
        assert node.row(bad).attempts == 20
        assert not node.link.down

    node.tell(story)


def test_who_asks_when_the_process_ends_is_refused(node: Node) -> None:
    digest = node.put(b"too late")

    async def story() -> None:
        await node.mirror.close()
        with pytest.raises(CopyUnconfirmed, match="stopped"):
            await node.mirror.copy_now(digest)

    node.tell(story)
