"""What is taken away at a target: in its time, in the order that loses nothing."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from cas.clock import DAY_US, HOUR_US
from cas.config import TargetSettings
from cas.digest import Digest
from cas.errors import Conflict
from cas.records import DELETING, DONE, Copy, Replica
from cas.references import parse_reference
from cas.replicas import begin_removals, register, removable
from cas.store import Store
from replicator import removing as module
from replicator.fence import Fenced, read_head, swap_head
from replicator.folder import FolderTarget
from replicator.link import Link
from replicator.mirror import Mirror
from replicator.removing import LATE_S, Abandoned, Removal
from replicator.shipping import Shipper
from replicator.targets import (
    HEAD,
    ObjectAbsent,
    ObjectRefused,
    TargetRefused,
    TargetUnreachable,
    object_key,
)
from tests.clocks import HandClock
from tests.replicator.between import BY_MD5, Between

DELAY_US = 7 * DAY_US
CONTENT = b"soon gone"


class Node:
    """A store with one copied blob, and the jobs that take it away."""

    def __init__(self, root: Path, clock: HandClock) -> None:
        self.clock = clock
        self.store = Store.open(root / "store", clock=clock)
        self.target = Between(FolderTarget("other", root / "target"))
        self.target.target.put("probe/one", io.BytesIO(b"1"), 1)  # as any probe does
        self.link = Link(self.target, TargetSettings("other", "folder", root / "target"), BY_MD5)
        self.link.fenced = ""
        # Past what is between, whose calls the tests count.
        self.shipping = Link(self.target.target, self.link.settings, BY_MD5)
        register(self.store.catalog, [("other", "a folder")])
        self.now_s = 1000.0
        self.digest = self.put()
        self.mirror()
        self.ship()
        self.removal = self.new_removal()

    def new_removal(self) -> Removal:
        return Removal(self.store, self.link, DELAY_US, now_s=lambda: self.now_s)

    def put(self, content: bytes = CONTENT) -> Digest:
        return self.store.files("t1", "tests").put(content, name="a").checksum_sha256

    def ship(self) -> None:
        shipper = Shipper(self.store, self.shipping, BY_MD5)
        while (shipped := shipper.step()).more:
            pass
        assert shipped.position is not None
        self.link.shipped_seq = shipped.position.seq

    def mirror(self) -> None:
        async def story() -> None:
            mirror = Mirror(self.store, self.link, now_s=lambda: self.now_s)
            while await mirror.step(self.clock.now_us()):
                pass
            await mirror.close()

        asyncio.run(story())

    def remove(self, *contents: bytes) -> None:
        """Delete files, collect their bytes, and ship that."""
        files = self.store.files("t1", "tests")
        for content in contents or (CONTENT,):
            files.delete(parse_reference(files.put(content, name="a").storage_ref))
        self.clock.advance(2 * DAY_US)
        with self.store.catalog.read() as snapshot:
            plan = self.store.collector.plan(snapshot, self.store.now_us(snapshot))
        assert self.store.collector.execute(plan).blobs == len(contents or (CONTENT,))
        self.ship()

    def claimed_by_another(self) -> None:
        """Another node has made itself the one that ships here."""
        seen = read_head(self.target.target)
        assert seen.head is not None
        swap_head(self.target.target, seen, replace(seen.head, node="another"), conditional=False)

    def step(self) -> bool:
        return asyncio.run(self.removal.step(self.clock.now_us()))

    def step_all(self) -> None:
        while self.step():
            pass

    def row(self) -> Replica | None:
        with self.store.catalog.read() as snapshot:
            return snapshot.get(Replica, "other", self.digest)

    def there(self, digest: Digest | None = None) -> bool:
        try:
            self.target.target.stat(object_key(digest or self.digest))
        except ObjectAbsent:
            return False
        return True

    def close(self) -> None:
        asyncio.run(self.removal.close())
        self.store.close()


@pytest.fixture
def node(root: Path, clock: HandClock) -> Iterator[Node]:
    made = Node(root, clock)
    yield made
    made.close()


def test_a_copy_goes_after_the_delay_and_not_before(node: Node) -> None:
    node.remove()
    node.clock.advance(DELAY_US - 1)
    node.step()
    assert node.there()
    node.clock.advance(2)
    node.step()
    assert not node.there()
    assert node.row() is None


def test_nothing_goes_before_the_journal_there_tells_why(node: Node) -> None:
    node.remove()
    node.clock.advance(DELAY_US + 1)
    node.link.shipped_seq = 0
    node.step()
    assert node.there()


def test_nothing_goes_while_the_target_is_not_ours(node: Node) -> None:
    node.remove()
    node.clock.advance(DELAY_US + 1)
    node.link.fenced = "so it is"
    node.step()
    assert node.target.count("delete") == 0


def test_nothing_is_begun_while_the_target_does_not_answer(node: Node) -> None:
    node.remove()
    node.clock.advance(DELAY_US + 1)

    def unanswered(_verb: str, _key: str) -> None:
        raise TargetUnreachable("other", "no answer")

    node.target.meddle = unanswered
    with pytest.raises(TargetUnreachable):
        node.step()
    row = node.row()
    assert row is not None
    assert row.state == DONE


def test_nothing_goes_once_another_node_has_claimed_the_target(node: Node) -> None:
    """However long ago shipping has looked: what is removed here may be needed there."""
    node.remove()
    node.clock.advance(DELAY_US + 1)
    node.claimed_by_another()
    with pytest.raises(Fenced, match="another node"):
        node.step()
    assert node.there()
    row = node.row()
    assert row is not None
    assert row.state == DONE


def test_nothing_goes_when_the_claim_comes_after_the_rows_were_written(node: Node) -> None:
    node.remove()
    node.clock.advance(DELAY_US + 1)

    def meddle(verb: str, key: str) -> None:
        row = node.row()
        if (verb, key) == ("get", HEAD) and row is not None and row.state == DELETING:
            node.target.meddle = lambda *_: None
            node.claimed_by_another()

    node.target.meddle = meddle
    with pytest.raises(Fenced, match="another node"):
        node.step()
    assert node.target.count("delete") == 0


def test_a_full_target_is_given_room(node: Node) -> None:
    """It refuses every copy, so the mirror leaves it alone; only deletions help."""
    node.remove()
    node.clock.advance(DELAY_US + 1)

    def full(verb: str, _key: str) -> None:
        if verb in ("put", "begin"):
            raise TargetRefused("other", "No space left on device")

    node.target.meddle = full
    node.link.down = "No space left on device"
    node.step()
    assert not node.there()


def test_copies_that_may_not_be_deleted_keep_no_others_waiting(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 4)
    locked = [b"locked %d" % number for number in range(6)]
    digests = [node.put(content) for content in locked]
    free = node.put(b"free")
    node.mirror()
    node.remove(*locked)
    node.clock.advance(2 * DAY_US)
    node.remove(b"free")
    node.clock.advance(DELAY_US + 1)
    keys = {object_key(digest) for digest in digests}

    def refuse(verb: str, key: str) -> None:
        if verb == "delete" and key in keys:
            raise ObjectRefused("other", "object lock")

    node.target.meddle = refuse
    with pytest.raises(ObjectRefused):
        node.step_all()
    assert not node.there(free)
    sent = node.target.count("delete")
    node.step()  # they are not sent again at once
    assert node.target.count("delete") == sent
    node.target.meddle = lambda *_: None
    node.clock.advance(HOUR_US)
    node.step_all()
    assert not any(node.there(digest) for digest in digests)


def test_no_more_is_sent_to_a_target_that_stops_answering(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DELETES_AT_ONCE", 0)  # one thread
    contents = [b"%d" % number for number in range(5)]
    for content in contents:
        node.put(content)
    node.mirror()
    node.remove(*contents)
    node.clock.advance(DELAY_US + 1)

    def unanswered(verb: str, _key: str) -> None:
        if verb == "delete":
            raise TargetUnreachable("other", "no answer")

    node.target.meddle = unanswered
    node.removal = node.new_removal()
    with pytest.raises(TargetUnreachable):
        node.step()
    assert node.target.count("delete") == 1


def test_processes_that_live_shortly_end_a_delete_without_an_answer(node: Node) -> None:
    """As `replicate once` by a timer: nobody of them waits for two minutes."""
    node.remove()
    node.clock.advance(DELAY_US + 1)

    def unanswered(verb: str, _key: str) -> None:
        if verb == "delete":
            raise TargetUnreachable("other", "no answer")

    node.target.meddle = unanswered
    with pytest.raises(TargetUnreachable):
        node.step()
    node.target.meddle = lambda *_: None
    node.put()  # the blob is back
    node.removal = node.new_removal()
    node.step()
    assert node.target.count("delete") == 1
    node.clock.advance(HOUR_US)
    node.removal = node.new_removal()
    node.step()
    node.mirror()
    row = node.row()
    assert row is not None
    assert row.held
    assert node.there()


def test_nothing_goes_by_a_clock_that_is_not_believed(node: Node) -> None:
    node.remove()
    node.clock.trusted = False
    node.clock.advance(3650 * DAY_US)
    with node.store.catalog.read() as snapshot:
        now_us = node.store.now_us(snapshot)
    asyncio.run(node.removal.step(now_us))
    # Even for somebody who takes that time for catalog time.
    with pytest.raises(Conflict, match="not synchronised"):
        node.step()
    assert node.target.count("delete") == 0


def test_deleting_is_written_down_before_the_delete_is_sent(node: Node) -> None:
    node.remove()
    node.clock.advance(DELAY_US + 1)
    states: list[str] = []

    def meddle(verb: str, _key: str) -> None:
        row = node.row()
        if verb == "delete" and row is not None:
            states.append(row.state)

    node.target.meddle = meddle
    node.step()
    assert states == [DELETING]


def test_a_delete_without_an_answer_is_repeated_late_and_only_then_has_ended(node: Node) -> None:
    """It may still arrive, and would take away what was copied anew."""
    node.remove()
    node.clock.advance(DELAY_US + 1)

    def unanswered(verb: str, _key: str) -> None:
        if verb == "delete":
            raise TargetUnreachable("other", "no answer")

    node.target.meddle = unanswered
    with pytest.raises(TargetUnreachable):
        node.step()
    node.target.meddle = lambda *_: None
    node.put()  # the blob is back
    node.step()
    node.mirror()
    assert node.target.count("put") == 1
    assert node.target.count("delete") == 1
    node.now_s += LATE_S
    node.step()
    assert node.target.count("delete") == 2
    node.mirror()
    row = node.row()
    assert row is not None
    assert row.held
    assert node.there()


def test_what_another_process_was_deleting_is_ended_late_too(node: Node) -> None:
    node.remove()
    node.clock.advance(DELAY_US + 1)
    with node.store.catalog.read() as snapshot:
        begin_removals(
            node.store.catalog, removable(snapshot, "other", node.clock.now_us(), 1 << 40)
        )
    node.step()
    assert node.target.count("delete") == 0
    node.now_s += LATE_S
    node.step()
    assert node.row() is None


def test_an_upload_beside_the_queue_is_let_be_however_long_it_takes(node: Node) -> None:
    """It is in no record, since it does not outlive its process."""
    job = Abandoned(node.store, node.link)
    mirror = Mirror(node.store, node.link)
    content = bytes(5 << 20)
    digest = node.put(content)
    looked: list[int] = []

    def look(verb: str, _key: str) -> None:
        if verb == "part 5":
            for _ in range(3):
                job._abort_nameless()
            looked.append(len(list(node.target.target.unfinished())))

    async def story() -> None:
        await mirror.copy_now(digest)
        node.target.meddle = look
        await mirror.copy_now(digest, anew=True)
        await mirror.close()
        await job.close()

    asyncio.run(story())
    assert looked == [1]
    assert node.link.nameless == set()


def test_uploads_of_any_kind_are_aborted_when_they_are_a_day_old(node: Node) -> None:
    """Also by processes that take one look each."""
    target = node.target.target
    checkpoint = target.begin("checkpoints/store/1-2.log.zst")
    _look(node)
    _look(node)
    assert [found.upload_id for found in target.unfinished()] == [checkpoint]
    path = node.link.settings.path
    assert path is not None
    for uploaded in (path / ".parts").rglob("*"):
        os.utime(uploaded, (time.time() - 90_000,) * 2)
    _look(node)
    assert list(target.unfinished()) == []


def test_the_uploads_of_another_node_are_let_be(node: Node) -> None:
    node.target.target.begin(object_key(Digest(bytes(32))))
    _look(node)
    node.claimed_by_another()
    with pytest.raises(Fenced, match="another node"):
        _look(node)
    assert len(list(node.target.target.unfinished())) == 1


def _look(node: Node) -> None:
    job = Abandoned(node.store, node.link)

    async def story() -> None:
        await job.step(0)
        await job.close()

    asyncio.run(story())


def test_uploads_that_no_record_names_are_aborted_at_the_second_look(node: Node) -> None:
    job = Abandoned(node.store, node.link)
    key = object_key(Digest(bytes(32)))
    nameless = node.target.target.begin(key)
    known = node.target.target.begin(object_key(node.digest))
    node.store.catalog.write(
        lambda txn: txn.insert(Copy("other", node.digest, known, 1 << 20, [], 0)), actor="tests"
    )

    async def story() -> None:
        await job.step(0)
        assert {found.upload_id for found in node.target.target.unfinished()} == {nameless, known}
        later = node.target.target.begin(key)
        await job.step(0)
        assert {found.upload_id for found in node.target.target.unfinished()} == {later, known}
        await job.close()

    asyncio.run(story())
