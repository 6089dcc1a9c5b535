"""The doctor: finds what is wrong, names the invariant, and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cas.catalog import Transaction
from cas.clock import HOUR_US
from cas.config import Duration, MailSettings, Settings, Size, StoreSettings, Word
from cas.doctor import Finding, examine, examine_store
from cas.files import Files
from cas.records import Blob, StoredFile
from cas.references import parse_reference
from cas.store import Store
from cas.uploads import UploadRequest
from tests.cas.test_scrub import an_orphan, overwrite, scrubbed, spoil
from tests.clocks import HandClock
from tests.conftest import CHECKOUT

GRACE_US = HOUR_US
SETTINGS = Settings(store=StoreSettings(min_free=Size(0), grace=Duration(GRACE_US)))


@pytest.fixture
def clock() -> HandClock:
    """The time of day: the ages of files, which nobody can set, are told by it."""
    return HandClock(time.time_ns() // 1000)


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, SETTINGS, clock=clock) as opened:
        yield opened


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("t1", "test")


def found(store: Store, *, read_data: bool = False) -> list[Finding]:
    return list(examine_store(store, read_data=read_data))


def the_only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


# --- well


def test_a_store_in_use_is_well(store: Store, files: Files, clock: HandClock) -> None:
    kept = files.put(b"kept", name="x")
    gone = files.put(b"gone", name="x")
    files.hold(parse_reference(kept.storage_ref), on=True)
    files.delete(parse_reference(gone.storage_ref))
    link = store.upload_link(store.uploads("t1", "test").request(UploadRequest("u")).upload_token)
    link.put(0, b"some text", filename="a.txt")
    link.complete()
    store.catalog.checkpoint()
    assert found(store, read_data=True) == []


def test_looking_changes_nothing(store: Store, files: Files, root: Path) -> None:
    spoil(store, files.put(b"right", name="x"), b"wrong")
    an_orphan(store, b"nobody's")

    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in root.rglob("*.log") if path.is_file()} | {
            path: path.read_bytes() for path in (root / "objects").rglob("*") if path.is_file()
        }

    before = everything()
    assert found(store, read_data=True)
    assert everything() == before


def test_it_looks_while_others_write(store: Store, files: Files, root: Path) -> None:
    files.put(b"x", name="x")
    with subprocess.Popen(
        [sys.executable, "-m", "cas", "doctor", "--read-data", "--json", "--root", root],
        stdout=subprocess.PIPE,
        cwd=CHECKOUT,
        env={"BLOBCASK_STORE__MIN_FREE": "0B"},
    ) as process:
        number = 0
        while process.poll() is None:
            file = files.put(number.to_bytes(4), name="x")
            files.delete(parse_reference(file.storage_ref))
            number += 1
        assert process.stdout is not None
        assert json.loads(process.stdout.read()) == {"findings": []}
    assert process.returncode == 0


# --- bytes


def test_a_file_that_is_gone_breaks_invariant_1(store: Store, files: Files) -> None:
    file = files.put(b"x", name="x")
    store.blobs.path(file.checksum_sha256).unlink()
    finding = the_only(found(store))
    assert (finding.severity, finding.invariant) == ("damage", 1)
    assert file.checksum_sha256.hex() in finding.what
    assert "scrub" in finding.mend
    scrubbed(store)
    assert "missing" in the_only(found(store)).what
    files.put(b"x", name="x")
    assert found(store) == []


def test_a_file_of_another_length_breaks_invariant_7(store: Store, files: Files) -> None:
    spoil(store, files.put(b"right", name="x"), b"short")
    assert found(store) == []  # the length is right: only reading tells
    finding = the_only(found(store, read_data=True))
    assert (finding.severity, finding.invariant) == ("damage", 7)
    spoil(store, files.put(b"longer", name="x"), b"short")
    assert "bytes of" in the_only(found(store)).what


def test_another_file_with_the_same_length_is_worth_a_note(store: Store, files: Files) -> None:
    path = store.blobs.path(files.put(b"x", name="x").checksum_sha256)
    other = path.with_name("copy")
    other.write_bytes(b"x")
    other.rename(path)
    finding = the_only(found(store))
    assert (finding.severity, finding.wrong) == ("note", False)
    scrubbed(store)
    assert found(store) == []


# --- records


def changed_past_the_catalog(store: Store, file: StoredFile, **fields: object) -> None:
    def change(txn: Transaction) -> None:
        blob = txn.get(Blob, file.checksum_sha256)
        assert blob is not None
        overwrite(txn, blob, msgspec.structs.replace(blob, **fields))

    store.catalog.write(change)


def test_a_wrong_count_breaks_invariant_3(store: Store, files: Files) -> None:
    changed_past_the_catalog(store, files.put(b"x", name="x"), refcount=2)
    finding = the_only(found(store))
    assert (finding.severity, finding.invariant) == ("damage", 3)


def test_a_named_blob_that_is_being_deleted_breaks_invariant_3(store: Store, files: Files) -> None:
    file = files.put(b"x", name="x")
    changed_past_the_catalog(store, file, state="deleting", deleting_at=1)
    finding = the_only(found(store))
    assert (finding.severity, finding.invariant) == ("damage", 3)


def test_a_state_that_does_not_fit_the_count_is_told(store: Store, files: Files) -> None:
    changed_past_the_catalog(store, files.put(b"x", name="x"), state="condemned", condemned_at=1)
    assert the_only(found(store)).invariant == 2


def test_a_removal_that_never_ended_is_worth_a_note(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = files.put(b"x", name="x")
    files.delete(parse_reference(file.storage_ref))
    changed_past_the_catalog(
        store, file, state="deleting", condemned_at=None, deleting_at=clock.now_us()
    )
    assert found(store) == []
    clock.advance(2 * GRACE_US)
    finding = the_only(found(store))
    assert (finding.wrong, finding.invariant) == (False, 2)


# --- the index


def test_an_index_entry_that_is_gone_breaks_invariant_5(store: Store, files: Files) -> None:
    files.put(b"x", name="x")
    txn = store.catalog._index.begin()
    with store.catalog.inspect() as snapshot:
        key, _ = next(iter(snapshot.entries()))
    txn.delete(key)
    txn.commit()
    finding = the_only(found(store))
    assert (finding.severity, finding.invariant) == ("damage", 5)
    assert "rebuild" in finding.mend


def test_a_record_that_was_changed_breaks_invariant_5(store: Store, files: Files) -> None:
    files.put(b"x", name="x")
    txn = store.catalog._index.begin()
    with txn.cursor() as cursor:
        assert cursor.set_range(b"\x02\x00")
        txn.put(cursor.key(), cursor.value()[:-1] + b"\x00")
    txn.commit()
    assert [finding.invariant for finding in found(store)] == [5]
    assert store.root.joinpath("catalog/index/BOOT").exists()


def test_a_flipped_bit_in_the_journal_breaks_invariant_5(store: Store, files: Files) -> None:
    for number in range(4):
        files.put(bytes([number]), name="x")
    [segment] = (store.root / "catalog/journal").iterdir()
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    findings = found(store)
    assert {finding.invariant for finding in findings} == {5}
    assert str(segment) in findings[0].what


def test_a_bad_checkpoint_is_told(store: Store, files: Files) -> None:
    files.put(b"x", name="x")
    store.catalog.checkpoint()
    [checkpoint] = (store.root / "catalog/checkpoints").iterdir()
    data = bytearray(checkpoint.read_bytes())
    data[-1] ^= 1
    checkpoint.write_bytes(data)
    assert "checkpoint" in the_only(found(store)).what


# --- around


def test_leftovers_are_worth_a_note(store: Store, root: Path, clock: HandClock) -> None:
    an_orphan(store, b"nobody's")
    assert found(store) == []  # somebody may be adopting it just now
    clock.advance(2 * GRACE_US)
    (root / "objects/00/README").write_bytes(b"x")
    assert [finding.severity for finding in found(store)] == ["note", "note"]


def test_a_clock_behind_breaks_invariant_10(store: Store, files: Files, clock: HandClock) -> None:
    files.put(b"x", name="x")
    clock.advance(-HOUR_US)
    assert the_only(found(store)).invariant == 10


def test_keys_that_others_may_read_are_told(store: Store, root: Path) -> None:
    (root / "keys").mkdir(mode=0o700)
    (root / "keys/signing").write_bytes(b"x")
    (root / "keys/signing").chmod(0o640)
    finding = the_only(found(store))
    assert finding.mend == f"chmod 600 {root / 'keys/signing'}"


def test_mails_whose_links_lead_nowhere_and_authorities_that_are_not_there_are_told(
    root: Path,
) -> None:
    missing = root.parent / "no such authorities.pem"
    mail = MailSettings(Word("mail.example.org"), sender=Word("a@example.org"), ca_file=missing)
    with Store.open(root, msgspec.structs.replace(SETTINGS, mail=mail)) as store:
        links, authorities = found(store)
    assert (links.severity, "public_url" in links.what) == ("note", True)
    assert (authorities.severity, str(missing) in authorities.what) == ("trouble", True)


def test_a_disk_that_is_nearly_full_is_told(root: Path) -> None:
    settings = Settings(store=StoreSettings(min_free=Size(1 << 60)))
    with Store.open(root, settings) as store:
        assert "bytes free" in the_only(found(store)).what


def test_a_store_that_cannot_be_opened_is_examined_all_the_same(root: Path) -> None:
    with Store.open(root, SETTINGS) as store:
        store.files("t1", "test").put(b"x", name="x")
    (root / "VERSION").write_text("99\n")
    findings = list(examine(root, SETTINGS))
    assert [finding.severity for finding in findings] == ["trouble", "damage"]
    assert "99" in findings[0].what
