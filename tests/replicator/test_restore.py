"""Restoring: from an empty folder and a target alone to a node with everything back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cas.catalog.recovery import Folders
from cas.cli import main
from cas.durable import DISK, Disk
from cas.errors import Conflict, NotFound
from cas.records import Blob, Mark
from cas.references import parse_reference
from cas.replicas import register
from cas.restored import RESTORED_TIME, accept
from cas.store import Store
from cas.totals import blobs_elsewhere, blobs_here
from cas.uploads import UploadRequest
from replicator import shipping as shipping_module
from replicator.fence import Fenced, claim, node_of, read_head
from replicator.gathering import HistoryBroken
from replicator.restoring import Options, RestoreRefused, fetch_all
from replicator.sweeping import refuse_wrong_clock
from replicator.targets import object_key
from tests.clocks import HandClock
from tests.replicator.shippers import (
    NAME,
    Interposed,
    contents,
    filled,
    folder_target,
    names,
    reference,
    restored,
    shipping,
    wrong,
)

EAGER = Options(eager=True)


def test_all_that_was_promised_is_back(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        promised = filled(node)
        upload = node.store.uploads("t1", "test").request(_request())
        node.ship_all()
    made = restored(new, place, clock, EAGER)
    assert (made.lost, made.counted.missing_blobs) == ("", 0)
    with Store.open(new, clock=clock) as store:
        fetched = fetch_all(store, folder_target(place), lambda _: None)
        assert fetched.failed == {}
        assert names(store) == promised
        assert store.upload_link(upload.upload_token).upload.upload_id == upload.upload_id
        for text in promised:
            _, reader = store.files("t1", "test").reader(parse_reference(text))
            with reader:
                assert reader.read()
        assert wrong(store) == []
        with store.catalog.read() as snapshot:
            assert blobs_elsewhere(snapshot).count == 0


def test_a_lazy_restore_serves_the_catalog_at_once(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        promised = filled(node)
        node.ship_all()
    restored(new, place, clock)
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised
        assert not store.blobs.has_blobs()
        assert wrong(store) == []
        with store.catalog.read() as snapshot:
            assert blobs_here(snapshot).count == 0
            assert blobs_elsewhere(snapshot).count == len(snapshot.range(Blob, "evicted"))


def test_what_had_not_reached_the_target_is_listed_as_missing(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"there")
        node.copy_blobs()
        lost = node.put(b"never copied")
        arrived = node.put(b"copied, but nobody wrote it down")
        spoilt = node.put(b"copied badly, and nobody wrote it down")
        for file, content in (
            (arrived, b"copied, but nobody wrote it down"),
            (spoilt, b"COPIED badly, and nobody wrote it down"),
        ):
            path = place / object_key(file.checksum_sha256)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        node.ship()
        promised = names(node.store)
    made = restored(new, place, clock)
    missing = {lost.checksum_sha256.hex(), spoilt.checksum_sha256.hex()}
    assert set(made.counted.missing) == missing
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised
        assert len(wrong(store)) == 2  # and each says that its bytes are missing
        with store.catalog.read() as snapshot:
            blob = snapshot.get(Blob, arrived.checksum_sha256)
            assert blob is not None
            assert blob.evicted_at is not None
        store.files("t1", "test").put(b"never copied", name="a.txt")
        assert len(wrong(store)) == 1


def test_a_new_epoch_begins_and_its_node_ships(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    restored(new, place, clock)
    head = read_head(folder_target(place)).head
    assert head is not None
    assert (head.epoch, head.node) == (2, node_of(new, DISK))
    with shipping(new, place, clock) as node:
        node.put(b"two")
        assert node.ship_all().fenced == ""
        promised = names(node.store)
    restored(new.parent / "third", place, clock)
    with Store.open(new.parent / "third", clock=clock) as store:
        assert names(store) == promised
        assert wrong(store) == []


def test_an_old_node_revived_after_a_restore_changes_nothing(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as old:
        old.put(b"one")
        old.ship_all()
        old.put(b"not shipped")
        restored(new, place, clock)
        before = contents(place)
        assert "another node" in old.ship().fenced
        with pytest.raises(Fenced):
            claim(old.catalog, old.store.store_id(), "old", old.target, conditional=True)
        assert contents(place) == before


def test_of_two_restores_at_one_moment_one_becomes_a_store(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    other = new.parent / "other"

    def be_second(key: str) -> None:
        if key == "HEAD.json" and not other.exists():
            clock.advance(1)
            restored(other, place, clock)

    target: Any = Interposed(folder_target(place), be_second)
    with pytest.raises(Conflict):
        restored(new, place, clock, target=target)
    assert not (new / "VERSION").exists()
    with shipping(other, place, clock) as node:
        assert node.ship().fenced == ""
    restored(new, place, clock)  # it may be repeated
    with Store.open(new, clock=clock) as store:
        assert wrong(store) == []


def test_without_a_claim_the_other_node_goes_on(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        before = contents(place)
        restored(new, place, clock, Options(claims=False))
        assert contents(place) == before
        node.put(b"two")
        assert node.ship().fenced == ""
        with shipping(new, place, clock) as copy:
            assert "another node" in copy.ship().fenced


def test_a_checkpoint_and_the_journal_after_it_are_enough(
    root: Path, place: Path, new: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping_module, "_COMPACT_WEIGHT", 4 * shipping_module._OBJECT_WEIGHT)
    with shipping(root, place, clock) as node:
        for number in range(10):
            node.put(b"%d" % number)
            node.ship_all()
        promised = names(node.store)
    newest = max((place / "checkpoints").rglob("*.zst"))
    for path in (place / "journal").rglob("*.log"):
        if int(path.stem.split("-")[2]) <= int(newest.name.split("-")[1].split(".")[0]):
            path.unlink()
    restored(new, place, clock)
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised


# --- a state of the past


def test_the_state_at_a_time_comes_back_and_waits_for_acceptance(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        kept = node.put(b"kept")
        deleted = node.put(b"deleted later")
        node.ship_all()
        promised = names(node.store)
        at_us = clock.now_us()
        clock.advance(60_000_000)
        node.store.files("t1", "test").delete(reference(deleted))
        node.put(b"stored later")
        node.ship_all()
    restored(new, place, clock, Options(at_us=at_us, eager=True))
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised
        assert kept.storage_ref in promised
        with pytest.raises(Conflict, match="restore --accept"):
            refuse_wrong_clock(store)
        assert fetch_all(store, folder_target(place), lambda _: None).failed == {}
        assert wrong(store) == []
        accept(store.catalog, actor="test")
        refuse_wrong_clock(store)
        with store.catalog.read() as snapshot:
            assert snapshot.get(Mark, RESTORED_TIME) is None


def test_bytes_that_were_deleted_at_the_target_since_are_missing_in_the_past(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        deleted = node.put(b"deleted later")
        node.put(b"kept")
        node.ship_all()
        at_us = clock.now_us()
        clock.advance(60_000_000)
        node.put(b"later")
        node.ship_all()
        (place / object_key(deleted.checksum_sha256)).unlink()
    made = restored(new, place, clock, Options(at_us=at_us))
    assert made.counted.missing == [deleted.checksum_sha256.hex()]


def test_the_past_of_an_older_epoch_can_be_reached(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        promised = names(node.store)
        at_us = clock.now_us()
        clock.advance(60_000_000)
        node.put(b"two")
        node.ship_all()
        clock.advance(60_000_000)
    restored(new, place, clock)
    with shipping(new, place, clock) as node:
        node.put(b"three")
        node.ship_all()
    past = new.parent / "past"
    restored(past, place, clock, Options(at_us=at_us))
    with Store.open(past, clock=clock) as store:
        assert names(store) == promised


def test_a_time_before_all_history_is_refused(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    with pytest.raises(NotFound, match="reaches back"):
        restored(new, place, clock, Options(at_us=1))


# --- what is damaged or missing there


def test_a_damaged_stretch_is_named_and_what_holds_comes_back_when_asked_for(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        promised = names(node.store)
        node.put(b"two")
        node.ship_all()
        node.put(b"three")
        node.ship_all()
    damaged = sorted((place / "journal").rglob("*.log"))[1]
    data = bytearray(damaged.read_bytes())
    data[40] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(HistoryBroken, match=r"damaged at byte 0 .*lost are the last \d+ frames"):
        restored(new, place, clock)
    assert not (new / "VERSION").exists()
    made = restored(new, place, clock, Options(accept_loss=True))
    assert "damaged" in made.lost
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised
        assert wrong(store) == []
    with shipping(new, place, clock) as node:
        node.put(b"on")
        assert node.ship_all().fenced == ""


def test_a_damaged_checkpoint_costs_time_only(
    root: Path, place: Path, new: Path, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping_module, "_COMPACT_WEIGHT", 4 * shipping_module._OBJECT_WEIGHT)
    with shipping(root, place, clock) as node:
        for number in range(10):
            node.put(b"%d" % number)
            node.ship_all()
        promised = names(node.store)
    for path in (place / "checkpoints").rglob("*.zst"):
        path.write_bytes(path.read_bytes()[:-20])
    restored(new, place, clock)
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised


def test_a_missing_stretch_is_told(root: Path, place: Path, new: Path, clock: HandClock) -> None:
    with shipping(root, place, clock) as node:
        for number in range(3):
            node.put(b"%d" % number)
            node.ship_all()
    sorted((place / "journal").rglob("*.log"))[1].unlink()
    with pytest.raises(HistoryBroken, match="an object is missing"):
        restored(new, place, clock)


def test_nothing_of_the_journal_is_no_store_even_when_loss_is_accepted(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    for path in (place / "journal").rglob("*.log"):
        path.unlink()
    with pytest.raises(HistoryBroken):
        restored(new, place, clock, Options(accept_loss=True))


def test_a_lost_head_costs_no_file_when_loss_is_accepted(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        for number in range(3):
            node.put(b"%d" % number)
            node.ship_all()
        promised = names(node.store)
    (place / "HEAD.json").unlink()
    with pytest.raises(NotFound):
        restored(new, place, clock)
    restored(new, place, clock, Options(accept_loss=True))
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised
        assert wrong(store) == []
    assert read_head(folder_target(place)).head is not None


def test_stretches_that_other_nodes_left_are_passed_over(
    root: Path, place: Path, new: Path, clock: HandClock, tmp_path: Path
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
        node.put(b"two")
        node.put(b"three")
        node.ship_all()
        promised = names(node.store)
        first, second = sorted((place / "journal").rglob("*.log"))
        # A twin's: well-formed frames that begin like ours and end elsewhere.
        data = first.read_bytes()
        (second.parent / f"{second.stem[:-20]}{99:020}.log").write_bytes(data)
        (second.parent / f"1-{1:020}-{3:020}.log").write_bytes(second.read_bytes())
    restored(new, place, clock)
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised


def test_nothing_shipped_is_told(place: Path, new: Path, clock: HandClock) -> None:
    with pytest.raises(NotFound, match="nothing was shipped"):
        restored(new, place, clock)


# --- where it goes


def test_a_folder_that_is_not_empty_is_refused(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    new.mkdir()
    (new / "thesis.txt").write_text("mine")
    with pytest.raises(RestoreRefused, match=r"thesis\.txt"):
        restored(new, place, clock)
    with pytest.raises(RestoreRefused, match="a store is there"):
        restored(root, place, clock)
    assert (new / "thesis.txt").read_text() == "mine"


def test_keys_may_be_there_already(root: Path, place: Path, new: Path, clock: HandClock) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    (new / "keys").mkdir(parents=True)
    (new / "keys" / "signing").write_bytes(b"secret")
    restored(new, place, clock)
    assert (new / "keys" / "signing").read_bytes() == b"secret"


class _Killed(BaseException):
    pass


class _DyingDisk(Disk):
    """Kills at the given durable step."""

    def __init__(self, last: int) -> None:
        self.left = last

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Killed

    def sync_data(self, fd: int) -> None:
        self._step()
        super().sync_data(fd)

    def sync_folder(self, path: Path | str) -> None:
        self._step()
        super().sync_folder(path)

    def rename(self, source: Path | str, target: Path | str) -> None:
        self._step()
        super().rename(source, target)

    def unlink(self, path: Path | str) -> bool:
        self._step()
        return super().unlink(path)


def test_a_restore_that_is_killed_anywhere_is_repeated(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        promised = filled(node)
        node.ship_all()
    killed = 0
    while True:
        target = new / str(killed)
        try:
            restored(target, place, clock, disk=_DyingDisk(killed))
        except _Killed:
            killed += 1
        else:
            break
        if not (target / "VERSION").exists():
            restored(target, place, clock)
        with Store.open(target, clock=clock) as store:
            assert names(store) == promised
            assert wrong(store) == []
    assert killed > 15


def test_an_eager_restore_goes_on_where_it_was_killed(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        for number in range(20):
            node.put(b"%d" % number)
        node.ship_all()
    restored(new, place, clock, EAGER)
    left = [5]

    def kill(_: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise _Killed

    with Store.open(new, clock=clock) as store, pytest.raises(_Killed):
        fetch_all(store, folder_target(place), kill)
    runner = CliRunner()
    command = ["restore", "--root", str(new), "--from", str(place), "--json"]
    done = runner.invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "going on with the bytes" in done.stderr
    with Store.open(new, clock=clock) as store:
        assert wrong(store) == []
        with store.catalog.read() as snapshot:
            assert blobs_here(snapshot).count == 20
    assert runner.invoke(main, command).exit_code != 0  # it is a store now


# --- on the command line


def test_the_command_brings_all_back_and_tells_so(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        promised = filled(node)
        node.ship_all()
    command = ["restore", "--root", str(new), "--from", str(place), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["files"], told["missing_blobs"], told["epoch"]) == (len(promised), 0, 2)
    assert "Keys are not mirrored" in done.stderr
    with Store.open(new, clock=clock) as store:
        assert names(store) == promised
        assert wrong(store) == []


def test_the_target_is_known_by_its_name_after_a_restore(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    restored(new, place, clock)
    with Store.open(new, clock=clock) as store:
        register(store.catalog, [(NAME, folder_target(place).place)])  # asks for no backfill
        assert Folders(new).index.exists()
        assert wrong(store) == []


def _request() -> UploadRequest:
    return UploadRequest(name="invoice")
