"""A resumable upload, killed or cut off from power at every durable step.

The parent keeps the offsets that were answered. Afterwards the server must know at least as
much, the sender goes on from what it is told, and the slot holds exactly its bytes.
"""

from __future__ import annotations

import errno
import io
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cas import partials, pieces
from cas.durable import DISK, Disk
from cas.errors import BlobcaskError, NotFound
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.uploads import UploadRequest
from tests.audit import assert_well, audit
from tests.clocks import KEEP_US
from tests.crash.powercut import Cut, RecordingDisk
from tests.crash.rounds import copy_root, every_step
from tests.crash.steps import FailingDisk, StepDisk
from tests.crash.stores import open_store
from tests.crash.test_store_kill import ArmedDisk
from tests.crash.victims import Report

DATA = random.Random(5).randbytes(9_000)
SENT = 2_500  # before the act
PIECE = 1_000
CUTS = 60  # of the hundreds there are
FILE = "partial"

Told = Callable[[str], None]
Act = Callable[[Store, Told], None]


def names(root: Path) -> tuple[str, str]:
    token, partial_id = (root / FILE / "its.names").read_text().split()
    return token, partial_id


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="blobcask-", dir=place if place.is_dir() else None
    ) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(memory: Path) -> Path:
    """A store with a resumable upload that has brought its first bytes."""
    root = memory / "template"
    with open_store(root) as store:
        (root / "catalog/ballast").unlink()
        (root / "catalog/ballast").mkdir()
        asked = UploadRequest("papers", max_files=2, expires_in_s=100 * 86_400)
        upload = store.uploads("acme", "ada").request(asked)
        link = store.upload_link(upload.upload_token)
        begun = link.begin_partial(1, "a.bin", None, len(DATA))
        link.append(begun.partial_id, 0, io.BytesIO(DATA[:SENT]))
        (root / FILE / "its.names").write_text(f"{upload.upload_token} {begun.partial_id}")
    return root


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SLICE_BYTES", 2 * PIECE)
    monkeypatch.setattr(pieces, "_READ_BYTES", PIECE)
    monkeypatch.setattr(partials, "_WORTH_RECORDING_BYTES", PIECE)


# --- what is interrupted


def append_some(store: Store, told: Told) -> None:
    """Two pieces: the first is recorded in slices, the second begins a little behind."""
    token, partial_id = names(store.root)
    link = store.upload_link(token)
    for end in (SENT + 5 * PIECE, SENT + 5 * PIECE + 7):
        begin = link.partial(partial_id).offset_bytes
        reached = link.append(partial_id, begin, io.BytesIO(DATA[begin:end]))
        told(f"{reached.offset_bytes}")


def append_all(store: Store, told: Told) -> None:
    token, partial_id = names(store.root)
    link = store.upload_link(token)
    reached = link.append(partial_id, SENT, io.BytesIO(DATA[SENT:]))
    told(f"{reached.offset_bytes}")


def begin_another(store: Store, told: Told) -> None:
    """A second one for the other slot, from its beginning."""
    token, _ = names(store.root)
    link = store.upload_link(token)
    begun = link.begin_partial(0, "b.bin", None, len(DATA))
    link.append(begun.partial_id, 0, io.BytesIO(DATA[:PIECE]))
    told(f"{begun.partial_id} {PIECE}")
    link.append(begun.partial_id, PIECE, io.BytesIO(DATA[PIECE:]))
    told(f"{begun.partial_id} {len(DATA)}")


def give_up(store: Store, told: Told) -> None:
    token, partial_id = names(store.root)
    store.upload_link(token).drop_partial(partial_id)
    told("gone")


ACTS: list[Act] = [append_some, append_all, begin_another, give_up]


# --- what must be true then


def judge(root: Path, acknowledged: list[str], *, disk: Disk = DISK) -> None:
    token, partial_id = names(root)
    with open_store(root, disk, days=0) as store:
        link = store.upload_link(token)
        answered: dict[str, int] = {partial_id: SENT}
        for line in acknowledged:
            if line != "gone":
                *other, offset = line.split(" ")
                answered[other[0] if other else partial_id] = int(offset)
        for known, told in answered.items():
            if "gone" in acknowledged:
                with pytest.raises(NotFound):
                    link.partial(known)
            else:
                go_on(store, token, known, told)
        with store.catalog.read() as snapshot:
            plan = plan_sweep(
                snapshot, store.now_us(snapshot), partial_files=store.partial_files, keep_us=KEEP_US
            )
        execute_sweep(store.catalog, plan, partial_files=store.partial_files)
        left = {path.name for path in (root / FILE).iterdir()} - {"its.names"}
        assert left <= {progress.partial_id for progress in link.partials()}
        audit(store, torn_orphans=disk is not DISK)
        if disk is DISK:
            assert_well(store)


def go_on(store: Store, token: str, partial_id: str, answered: int) -> None:
    """What a sender does after a broken connection: ask, and send the rest."""
    link = store.upload_link(token)
    try:
        found = link.partial(partial_id)
    except NotFound:
        assert answered == SENT, "what was answered is gone"  # given up, but not told so
        return
    assert found.offset_bytes >= answered
    rest = io.BytesIO(DATA[found.offset_bytes :])
    assert link.append(partial_id, found.offset_bytes, rest).finished
    slot = next(slot for slot in link.slots() if slot.partial_id == partial_id)
    assert slot.checksum_sha256 is not None
    with open(store.opener.here(slot.checksum_sha256), "rb") as stream:
        assert stream.read() == DATA


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_a_kill_at_every_step_loses_no_answered_byte(
    template: Path, memory: Path, act: Act
) -> None:
    def scenario(where: Path, disk: Disk, report: Report) -> None:
        armed = ArmedDisk(disk)
        with open_store(where, armed) as store:
            armed.armed = True
            act(store, report.acknowledge)
            armed.armed = False

    kills = 0
    for kill in every_step(scenario, template, memory / act.__name__):
        judge(kill.root, kill.acknowledged)
        kills += 1
    assert kills >= 4


def at_step(number: int, begun: list[int]) -> Callable[[str, int], bool]:
    """Yes at the step with this number after the one in `begun`, if there is one."""
    return lambda _, step: bool(begun) and step == begun[0] + number


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_an_error_of_the_disk_at_every_step_loses_no_answered_byte(
    template: Path, memory: Path, act: Act, code: int
) -> None:
    for number in range(1, 1000):
        root = memory / f"failed-{act.__name__}-{code}-{number}"
        copy_root(template, root)
        begun: list[int] = []
        disk = FailingDisk(code, at_step(number, begun))
        acknowledged: list[str] = []
        with open_store(root, disk) as store:
            begun.append(len(disk.steps))
            with suppress(OSError, BlobcaskError):
                act(store, acknowledged.append)
            begun.clear()
        judge(root, acknowledged)
        shutil.rmtree(root)
        if not disk.failed:
            return


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_a_power_cut_loses_no_answered_byte(template: Path, memory: Path, act: Act) -> None:
    root = memory / f"cut-{act.__name__}"
    copy_root(template, root)
    disk = RecordingDisk(root)
    with open_store(root, disk) as store:
        begin = len(disk.events)
        act(store, disk.note)
    cuts = [cut for cut in disk.cuts(seed=1, some=4) if cut.moment >= begin]
    for cut in random.Random(1).sample(cuts, min(CUTS, len(cuts))):
        look(cut, memory / "after")


def look(cut: Cut, place: Path) -> None:
    cut.build(place)
    try:
        judge(place, cut.acknowledged, disk=StepDisk("next boot"))
    except BaseException as error:
        error.add_note(str(cut))
        raise
    shutil.rmtree(place)
