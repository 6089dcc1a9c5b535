"""What a restored catalog says of the bytes, which are at targets only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cas.cli import main
from cas.config import Settings, TargetSettings
from cas.digest import Digest
from cas.records import COPYING, DELETING, Blob, Copy, Replica
from cas.records import Target as TargetRecord
from cas.replicas import (
    Copying,
    Done,
    backfill,
    backlog,
    begin_removals,
    due,
    register,
    removable,
    settle,
)
from cas.store import Store
from replicator.fence import read_head
from replicator.folder import FolderTarget
from replicator.links import opened_links
from replicator.restoring import Options, fetch_all
from replicator.targets import object_key
from tests.clocks import HandClock
from tests.replicator.shippers import (
    NAME,
    Interposed,
    Shipping,
    folder_target,
    names,
    reference,
    restored,
    shipping,
    wrong,
)

MINUTE_US = 60_000_000
DAY_US = 24 * 60 * MINUTE_US


def copy_to(node: Shipping, other: FolderTarget) -> None:
    """Do what the mirror does, for another target."""
    with node.catalog.read() as snapshot:
        rows = due(snapshot, other.name, node.store.now_us(snapshot), 10_000)
    for row in rows:
        with node.store.blobs.path(row.digest).open("rb") as file:
            other.put(object_key(row.digest), file, row.size_bytes)
    settle(node.catalog, [Done(row) for row in rows])


def two_targets(node: Shipping, place: Path) -> FolderTarget:
    other = FolderTarget("second", place)
    register(node.catalog, [(NAME, node.target.place), ("second", other.place)])
    return other


def row_of(store: Store, target: str, digest: Digest) -> Replica | None:
    with store.catalog.read() as snapshot:
        return snapshot.get(Replica, target, digest)


def blob_of(store: Store, digest: Digest) -> Blob:
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, digest)
    assert blob is not None
    return blob


def release(node: Shipping, file: Any) -> None:
    """Delete the file, and its bytes with it."""
    node.store.files("t1", "test").delete(reference(file))
    node.clock.advance(2 * DAY_US)
    with node.catalog.read() as snapshot:
        plan = node.store.collector.plan(snapshot, node.store.now_us(snapshot))
    node.store.collector.execute(plan)


def targets_of(store: Store) -> list[tuple[str, str]]:
    with store.catalog.read() as snapshot:
        return [(one.name, one.place) for one in snapshot.range(TargetRecord, "", limit=10)]


# --- a state of the past


def test_for_a_past_state_no_row_of_any_target_is_believed(
    root: Path, place: Path, new: Path, clock: HandClock, tmp_path: Path
) -> None:
    with shipping(root, place, clock) as node:
        other = two_targets(node, tmp_path / "second")
        file = node.put(b"needed then")
        copy_to(node, other)
        node.ship_all()
        at_us = clock.now_us() + 1
        clock.advance(MINUTE_US)
        release(node, file)
        node.ship_all()
    digest = Digest(file.checksum_sha256)
    for target in (folder_target(place), other):
        target.delete(object_key(digest))
    made = restored(new, place, clock, Options(at_us=at_us))
    assert made.counted.missing == [digest.hex()]
    with Store.open(new, clock=clock) as store:
        assert blob_of(store, digest).missing_at is not None
        for name in (NAME, "second"):
            row = row_of(store, name, digest)
            assert row is not None
            assert not row.held
        assert len(wrong(store)) == 1  # and it says that the bytes are missing


def test_a_past_state_from_before_the_target_was_there_has_its_rows(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with Store.open(root, clock=clock) as store:
        file = store.files("t1", "test").put(b"early", name="e")
        clock.advance(MINUTE_US)
        at_us = clock.now_us()
        clock.advance(MINUTE_US)
    with shipping(root, place, clock) as node:
        while backfill(node.catalog, NAME):
            pass
        node.ship_all()
    restored(new, place, clock, Options(at_us=at_us))
    with Store.open(new, clock=clock) as store:
        assert targets_of(store) == [(NAME, folder_target(place).place)]
        row = row_of(store, NAME, Digest(file.checksum_sha256))
        assert row is not None
        assert row.held
        assert wrong(store) == []
        assert fetch_all(store, folder_target(place), lambda _: None).blobs == 1


def test_what_is_deleted_while_a_past_state_is_restored_is_not_believed_to_be_there(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        file = node.put(b"going")
        stays = node.put(b"staying")
        node.ship_all()
        at_us = clock.now_us() + 1
        clock.advance(MINUTE_US)
        node.put(b"later")
        node.ship_all()
    digest = Digest(file.checksum_sha256)

    def delete(key: str) -> None:
        if key == "HEAD.json":  # all was looked at before
            folder_target(place).delete(object_key(digest))

    target: Any = Interposed(folder_target(place), delete)
    made = restored(new, place, clock, Options(at_us=at_us), target=target)
    assert made.counted.missing == [digest.hex()]
    with shipping(new, place, clock) as node:
        assert blob_of(node.store, digest).missing_at is not None
        assert blob_of(node.store, Digest(stays.checksum_sha256)).missing_at is None
        assert node.ship().fenced == ""


# --- copies that were to be deleted


def test_a_copy_that_was_to_be_deleted_is_copied_anew_when_its_blob_comes_back(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        file = node.put(b"coming back")
        node.ship_all()
        release(node, file)
        node.ship_all()
    digest = Digest(file.checksum_sha256)
    restored(new, place, clock)
    # The node before sent the DELETE, and nobody was told of it.
    folder_target(place).delete(object_key(digest))
    with shipping(new, place, clock) as node:
        assert wrong(node.store) == []
        node.put(b"coming back")
        row = row_of(node.store, NAME, digest)
        assert row is not None
        assert not row.held
        node.copy_blobs()
        assert (place / object_key(digest)).exists()
        assert wrong(node.store) == []


def test_bytes_that_came_back_while_their_delete_was_due_are_not_deleted_after_a_restore(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        file = node.put(b"coming back")
        node.ship_all()
        release(node, file)
        node.ship_all()
        with node.catalog.read() as snapshot:
            rows = removable(snapshot, NAME, clock.now_us() + DAY_US, 1 << 40)
        assert [row.state for row in begin_removals(node.catalog, rows)] == [DELETING]
        node.put(b"coming back")
        node.ship()
    restored(new, place, clock)
    with Store.open(new, clock=clock) as store:
        row = row_of(store, NAME, Digest(file.checksum_sha256))
        assert row is not None
        assert row.held
        assert wrong(store) == []
        with store.catalog.read() as snapshot:
            assert removable(snapshot, NAME, clock.now_us() + DAY_US, 1 << 40) == []


# --- uploads


def test_a_copy_that_was_under_way_and_has_arrived_leaves_no_upload_behind(
    root: Path, place: Path, new: Path, clock: HandClock
) -> None:
    with shipping(root, place, clock) as node:
        arrived = Digest(node.put(b"arrived").checksum_sha256)
        not_yet = Digest(node.put(b"not yet").checksum_sha256)
        with node.catalog.read() as snapshot:
            rows = due(snapshot, NAME, node.store.now_us(snapshot), 10)
        copies = [Copy(NAME, row.digest, "upload", 5 << 20, [], clock.now_us()) for row in rows]
        settle(node.catalog, [Copying(*one) for one in zip(rows, copies, strict=True)])
        path = place / object_key(arrived)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"arrived")
        node.ship()
    restored(new, place, clock)
    with Store.open(new, clock=clock) as store:
        with store.catalog.read() as snapshot:
            assert snapshot.range(Copy, "", limit=10) == []
            assert backlog(snapshot, NAME, clock.now_us()).rows == 1
        row = row_of(store, NAME, not_yet)
        assert row is not None
        assert row.state == COPYING
        assert len(wrong(store)) == 1  # the bytes that had not arrived


# --- another address, another name


def settings_of(name: str, place: Path) -> Settings:
    return Settings(targets=(TargetSettings(name, "folder", place),))


@pytest.mark.parametrize("name", [NAME, "elsewhere"])
def test_a_node_restored_from_another_address_starts(
    root: Path, place: Path, new: Path, clock: HandClock, name: str
) -> None:
    with shipping(root, place, clock) as node:
        file = node.put(b"one")
        node.put(b"two")
        node.copy_blobs()
        late = node.put(b"never arrived")
        gone = node.put(b"to be deleted")
        node.copy_blobs()
        release(node, gone)
        (place / object_key(late.checksum_sha256)).unlink()
        node.ship()
        promised = names(node.store)
    elsewhere = place.rename(place.parent / "mounted-elsewhere")
    settings = settings_of(name, elsewhere)
    target = FolderTarget(name, elsewhere)
    restored(new, elsewhere, clock, target=target, settings=settings)
    head = read_head(target).head
    assert head is not None
    assert head.target == name
    with Store.open(new, settings, clock=clock) as store:
        assert targets_of(store) == [(name, target.place)]
        assert wrong(store) == []
        with opened_links(store) as links:
            assert [link.name for link in links] == [name]
        row = row_of(store, name, Digest(file.checksum_sha256))
        assert row is not None
        assert row.held
        with store.catalog.read() as snapshot:
            assert snapshot.range(Replica, "", ("away",), limit=10) == [] or name == NAME
        fetched = fetch_all(store, target, lambda _: None)
        assert list(fetched.failed) == [late.checksum_sha256.hex()]
        assert names(store) == promised


def test_a_name_that_the_records_give_to_another_target_is_left_to_that_one(
    root: Path, place: Path, new: Path, clock: HandClock, tmp_path: Path
) -> None:
    with shipping(root, place, clock) as node:
        other = two_targets(node, tmp_path / "second")
        node.put(b"one")
        copy_to(node, other)
        node.ship_all()
    target = FolderTarget("second", place)
    restored(new, place, clock, target=target, settings=settings_of("second", place))
    with Store.open(new, clock=clock) as store:
        assert targets_of(store) == [(NAME, target.place), ("second", other.place)]
        assert wrong(store) == []


# --- the bytes


def test_what_one_target_does_not_give_is_fetched_from_another(
    root: Path, place: Path, new: Path, clock: HandClock, tmp_path: Path
) -> None:
    with shipping(root, place, clock) as node:
        other = two_targets(node, tmp_path / "second")
        file = node.put(b"rotten at one")
        node.put(b"whole at both")
        copy_to(node, other)
        node.ship_all()
        promised = names(node.store)
    restored(new, place, clock, Options(eager=True))
    (place / object_key(file.checksum_sha256)).write_bytes(b"Rotten at one")
    with Store.open(new, clock=clock) as store:
        fetched = fetch_all(store, folder_target(place), lambda _: None, [other])
        assert (fetched.blobs, fetched.failed) == (2, {})
        assert names(store) == promised
        assert wrong(store) == []


def test_a_folder_that_the_settings_name_is_that_target(
    root: Path, place: Path, new: Path, clock: HandClock, tmp_path: Path
) -> None:
    with shipping(root, place, clock) as node:
        node.put(b"one")
        node.ship_all()
    ini = tmp_path / "config.ini"
    ini.write_text(f"[replicator]\ntargets = mine\n[target:mine]\nkind = folder\npath = {place}\n")
    command = ["--config", str(ini), "restore", "--root", str(new), "--from", str(place)]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    with Store.open(new, clock=clock) as store:
        assert targets_of(store) == [("mine", folder_target(place).place)]
        assert wrong(store) == []
