"""The sweep ends what is over by catalog time, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from click.testing import CliRunner

from cas.catalog import Transaction
from cas.cli import main
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import Duration, Settings, Size, StoreSettings
from cas.digest import digest_of
from cas.errors import NotFound
from cas.events import IN_VAIN_US, claim, publish, subscribe
from cas.files import Files
from cas.forgetting import Forgotten
from cas.records import (
    Approval,
    Blob,
    Event,
    Once,
    Record,
    Run,
    RunText,
    Step,
    StepValue,
    StoredFile,
    Subscription,
    Webhook,
)
from cas.references import parse_reference
from cas.retention import FOREVER, parse_retention
from cas.store import Store
from cas.sweep import SweepPlan, Swept, execute_sweep, plan_sweep
from cas.uploads import UploadRequest
from tests.audit import audit
from tests.cas.interposed import collect
from tests.clocks import KEEP_US, HandClock

R = TypeVar("R", bound=Record)

SETTINGS = Settings(store=StoreSettings(grace=Duration(DAY_US), min_free=Size(0)))


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(memory / "store", SETTINGS, clock=clock) as store:
        yield store


@pytest.fixture
def files(store: Store) -> Files:
    return store.files("acme", "ada")


def put(files: Files, data: bytes, retention: str) -> StoredFile:
    return files.put(data, name="it", retention=parse_retention(retention))


def plan(store: Store, limit: int = 10_000) -> SweepPlan:
    with store.catalog.read() as snapshot:
        return plan_sweep(snapshot, store.now_us(snapshot), limit, keep_us=KEEP_US)


def sweep(store: Store) -> Swept:
    return execute_sweep(store.catalog, plan(store))


def test_a_file_is_swept_when_its_time_is_over(
    store: Store, files: Files, clock: HandClock
) -> None:
    put(files, b"one", "hours:1")
    put(files, b"two", "hours:2")
    files.put(b"three", name="it", retention=FOREVER)
    assert sweep(store) == Swept(0, 0)
    clock.advance(HOUR_US - 1)
    assert sweep(store) == Swept(0, 0)
    clock.advance(1)
    assert sweep(store) == Swept(1, 0)
    clock.advance(1000 * DAY_US)
    clock.trusted = True
    assert sweep(store) == Swept(1, 0)
    assert [file.checksum_sha256 for file in files.list().items] == [digest_of(b"three")]
    clock.advance(DAY_US + 1)
    assert collect(store) == 2
    audit(store)


def test_a_plan_touches_nothing_and_can_be_shown(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = put(files, b"one", "hours:1")
    clock.advance(HOUR_US)
    seq = store.catalog.position().seq
    made = plan(store)
    assert made.references == [file.storage_ref]
    assert file.storage_ref.encode() in msgspec.json.encode(made)
    assert store.catalog.position().seq == seq


def test_what_was_prolonged_held_or_deleted_since_the_plan_is_left(
    store: Store, files: Files, clock: HandClock
) -> None:
    data = [b"prolonged", b"held", b"deleted", b"over"]
    stored = {one: put(files, one, "hours:1") for one in data}
    uploads = store.uploads("acme", "ada")
    cancelled = uploads.request(UploadRequest("a", expires_in_s=3600))
    clock.advance(HOUR_US - 1)
    before = plan(store)
    clock.advance(1)
    made = plan(store)
    assert before.file_ids == []
    assert len(made.file_ids) == 4
    assert made.upload_ids == [cancelled.upload_id]
    put(files, b"prolonged", "hours:1")
    files.hold(parse_reference(stored[b"held"].storage_ref), True)
    files.delete(parse_reference(stored[b"deleted"].storage_ref))
    assert execute_sweep(store.catalog, made) == Swept(1, 1)
    assert execute_sweep(store.catalog, made) == Swept(0, 0)
    assert len(files.list().items) == 2
    audit(store)


def test_files_on_hold_do_not_keep_others_from_their_turn(
    store: Store, files: Files, clock: HandClock
) -> None:
    for number in range(7):
        held = put(files, b"held %d" % number, "hours:1")
        files.hold(parse_reference(held.storage_ref), True)
    put(files, b"over", "hours:2")
    put(files, b"over too", "hours:2")
    clock.advance(2 * HOUR_US)
    for _ in range(2):
        made = plan(store, limit=1)
        assert len(made.file_ids) == 1
        assert execute_sweep(store.catalog, made).files == 1
    assert plan(store, limit=1).file_ids == []


def test_a_swept_upload_lets_go_of_its_slots(store: Store, clock: HandClock) -> None:
    uploads = store.uploads("acme", "ada")
    upload = uploads.request(UploadRequest("a", max_files=2, expires_in_s=3600))
    link = store.upload_link(upload.upload_token)
    link.put(0, b"abc", filename="a")
    clock.advance(HOUR_US)
    assert sweep(store) == Swept(0, 1)
    assert sweep(store) == Swept(0, 0)
    assert link.slots() == []
    with store.catalog.read() as snapshot:
        blob = snapshot.get(Blob, digest_of(b"abc"))
    assert blob is not None
    assert blob.condemned_at == clock.now_us()
    clock.advance(DAY_US + 1)
    assert collect(store) == 1
    audit(store)


def test_more_than_one_transaction_holds_is_swept(
    store: Store, files: Files, clock: HandClock
) -> None:
    from cas.files import PutItem

    items = [PutItem(b"%d" % number, "it") for number in range(1200)]
    files.put_many(items, retention=parse_retention("hours:1"))
    clock.advance(HOUR_US)
    assert sweep(store).files == 1200
    assert files.list().items == []
    clock.advance(DAY_US + 1)
    assert collect(store) == 1200
    assert list((store.root / "objects").glob("*/*")) == []
    audit(store)


# --- a clock that is not to be believed (invariant 10)


def test_a_clock_that_goes_back_expires_nothing_early_or_twice(
    store: Store, files: Files, clock: HandClock
) -> None:
    clock.advance(10 * DAY_US)
    file = put(files, b"one", "days:1")
    clock.advance(-9 * DAY_US)
    assert "behind" in store.clock_trouble()
    later = put(files, b"two", "days:1")
    # Time stands still until the clock has caught up.
    assert later.created_at == file.created_at
    # A time service vouches for it: what is counted from where time stands ends no earlier.
    assert later.expires_at == file.expires_at
    clock.advance(9 * DAY_US)
    assert store.clock_trouble() == ""


def test_a_clock_far_ahead_sweeps_nothing_until_it_is_synchronised(
    store: Store, files: Files, clock: HandClock
) -> None:
    file = put(files, b"one", "days:1")
    clock.trusted = False
    clock.advance(SETTINGS.sweeper.max_clock_gap + SECOND_US)
    assert "ahead" in store.clock_trouble()
    assert plan(store).file_ids == []
    assert files.stat(parse_reference(file.storage_ref)) == file
    clock.trusted = True
    assert store.clock_trouble() == ""
    assert sweep(store).files == 1
    with pytest.raises(NotFound):
        files.stat(parse_reference(file.storage_ref))


def test_a_clock_a_little_ahead_is_believed(store: Store, files: Files, clock: HandClock) -> None:
    put(files, b"one", "days:1")
    clock.trusted = False
    clock.advance(SETTINGS.sweeper.max_clock_gap)
    assert store.clock_trouble() == ""
    assert sweep(store).files == 1


# --- what workflows leave behind


def swept_workflows(store: Store) -> Forgotten:
    with store.catalog.read() as snapshot:
        made = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    done = execute_sweep(store.catalog, made)
    with store.catalog.read() as snapshot:
        after = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    assert not after, "a sweep leaves nothing that it would look at again"
    return done.workflows


def waits(
    store: Store, step: str, name: str = "paid", *, run: str = "run-1", timeout_us: int | None
) -> Subscription:
    return store.catalog.write(
        lambda txn: subscribe(txn, "acme", run, step, name, None, timeout_us)
    )


def claims(store: Store, wait: Subscription) -> Subscription:
    def change(txn: Transaction) -> Subscription:
        found = txn.get(Subscription, wait.subscription_id)
        assert found is not None
        return claim(txn, found, KEEP_US)

    return store.catalog.write(change)


def inserted(store: Store, *records: Record) -> None:
    def change(txn: Transaction) -> None:
        for record in records:
            txn.insert(record)

    store.catalog.write(change)


def left(store: Store, kind: type[R]) -> list[R]:
    with store.catalog.read() as snapshot:
        return snapshot.range(kind, "", limit=10_000)


def run_of(name: str, *, ended_us: int | None = None) -> Run:
    ended = ended_us is not None
    return Run(
        name,
        "acme",
        "it",
        "completed" if ended else "waiting",
        1,
        "ada",
        open=None if ended else "open",
        ended_at=ended_us,
        forget_at=None if ended_us is None else ended_us + KEEP_US,
    )


def approval_of(name: str, run: str, now_us: int, **changes: Any) -> Approval:
    made = Approval(
        name, "acme", run, "pay", "Pay?", "", ["ada"], False, None, "pending", now_us, "run",
        now_us + DAY_US, now_us + DAY_US,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def webhook_of(name: str, run: str, expires_at: int | None) -> Webhook:
    return Webhook(
        name, "acme", run, "push", "github", "s", b"{}", "pushed", None, [], False, 1, "run",
        expires_at,
    )  # fmt: skip


def test_a_claimed_wait_is_forgotten_after_its_time_and_its_event_with_it(
    store: Store, clock: HandClock
) -> None:
    wait = waits(store, "a", timeout_us=None)
    store.catalog.write(lambda txn: publish(txn, "acme", "paid", b"1", keep_us=DAY_US))
    clock.advance(5 * DAY_US)
    swept_workflows(store)  # the event is due, and needed
    claims(store, wait)
    clock.advance(KEEP_US - 1)
    assert swept_workflows(store) == Forgotten()
    assert len(left(store, Event)) == 1
    clock.advance(1)
    assert swept_workflows(store) == Forgotten(waits=1)
    assert left(store, Event) == []
    assert left(store, Subscription) == []
    assert left(store, Event) == []


def test_an_event_that_is_kept_for_who_got_it_is_given_to_no_other(
    store: Store, clock: HandClock
) -> None:
    waits(store, "a", timeout_us=None)
    store.catalog.write(lambda txn: publish(txn, "acme", "paid", b"1", open_us=DAY_US))
    clock.advance(DAY_US)
    assert sweep(store).total == 0
    assert waits(store, "b", run="run-2", timeout_us=None).event_id is None
    assert len(left(store, Event)) == 1


def test_a_wait_that_nobody_asks_for_goes_in_the_end(store: Store, clock: HandClock) -> None:
    clock.trusted = True
    over = waits(store, "over", "never", timeout_us=HOUR_US)
    told = waits(store, "told", timeout_us=HOUR_US)
    direct = waits(store, "poll", "never", run="direct", timeout_us=HOUR_US)
    waits(store, "for ever", "never", timeout_us=None)
    store.catalog.write(lambda txn: publish(txn, "acme", "paid", b"1"))
    clock.advance(2 * HOUR_US)
    assert swept_workflows(store) == Forgotten(waits=1)
    kept = {wait.subscription_id for wait in left(store, Subscription)}
    assert direct.subscription_id not in kept
    clock.advance(KEEP_US - HOUR_US - 1)
    assert swept_workflows(store) == Forgotten()
    assert {over.subscription_id, told.subscription_id} < kept
    clock.advance(1)
    assert swept_workflows(store) == Forgotten(waits=2)
    assert [wait.step for wait in left(store, Subscription)] == ["for ever"]


def test_a_held_event_of_a_wait_that_nobody_asked_for_is_there_for_others(
    store: Store, clock: HandClock
) -> None:
    clock.trusted = True
    store.catalog.write(
        lambda txn: publish(txn, "acme", "paid", b"1", open_us=10 * KEEP_US, once=True)
    )
    first = waits(store, "b", timeout_us=HOUR_US)
    assert first.event_id is not None
    clock.advance(KEEP_US + HOUR_US)
    assert swept_workflows(store) == Forgotten(waits=1)
    assert waits(store, "c", timeout_us=None).event_id == first.event_id


def test_a_run_that_is_open_may_ask_again_however_late(store: Store, clock: HandClock) -> None:
    clock.trusted = True
    inserted(store, run_of("run-1"))
    over = waits(store, "over", "never", timeout_us=HOUR_US)
    told = waits(store, "told", timeout_us=HOUR_US)
    store.catalog.write(lambda txn: publish(txn, "acme", "paid", b"1"))
    taken = claims(store, waits(store, "taken", "never", timeout_us=0))
    for _ in range(3):
        clock.advance(2 * KEEP_US)
        assert swept_workflows(store) == Forgotten()
    assert len(left(store, Event)) == 1
    assert claims(store, told).event_id is not None
    assert claims(store, over).claimed_at is not None
    assert claims(store, taken).claimed_at == taken.claimed_at


def test_an_approval_and_what_it_came_to_are_there_for_as_long_as_their_run(
    store: Store, clock: HandClock
) -> None:
    clock.trusted = True
    now_us = clock.now_us()
    inserted(store, run_of("run-1"), approval_of("a", "run-1", now_us))
    clock.advance(DAY_US)
    assert swept_workflows(store) == Forgotten(approvals=1)  # nobody decided
    spy = claims(store, waits(store, "waiter:spy", "approval_pay", timeout_us=None))
    for _ in range(3):
        clock.advance(2 * KEEP_US)
        with store.catalog.read() as snapshot:
            made = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
        swept = execute_sweep(store.catalog, made)
        assert (swept.workflows.approvals, swept.events) == (0, 0)
        assert not plan(store)
    [approval] = left(store, Approval)
    assert approval.status == "expired"
    taken = claims(store, waits(store, "ask", "approval_pay", timeout_us=None))
    assert taken.event_id == spy.event_id is not None
    store.catalog.write(lambda txn: txn.replace(run_of("run-1", ended_us=clock.now_us())))
    clock.advance(2 * KEEP_US)
    sweep(store)
    clock.advance(2 * DAY_US)
    sweep(store)
    assert (left(store, Run), left(store, Approval), left(store, Event)) == ([], [], [])


def test_a_client_that_waited_in_vain_leaves_nothing_for_long(
    store: Store, clock: HandClock
) -> None:
    clock.trusted = True
    asked = [
        waits(store, f"waiter:{n}", "never", run=run, timeout_us=0)
        for n, run in enumerate(("direct", "run-1", "direct"))
    ]
    claims(store, asked[0])
    clock.advance(IN_VAIN_US - 1)
    assert swept_workflows(store) == Forgotten()
    clock.advance(1)
    assert swept_workflows(store) == Forgotten(waits=3)
    assert left(store, Subscription) == []


def test_a_client_whose_key_a_run_took_leaves_nothing_for_long(
    store: Store, clock: HandClock
) -> None:
    clock.trusted = True
    for run, step in (("direct", "waiter:a"), ("run-1", "a")):
        store.catalog.write(
            lambda txn, run=run, step=step: subscribe(  # type: ignore[misc]
                txn, "acme", run, step, "paid", "key", None
            )
        )
    clock.advance(IN_VAIN_US)
    assert swept_workflows(store) == Forgotten(waits=1)
    assert [wait.step for wait in left(store, Subscription)] == ["a"]


def test_a_run_is_forgotten_with_all_that_belongs_to_it(store: Store, clock: HandClock) -> None:
    now_us = clock.now_us()
    for run in ("run-1", "run-2", "run-10"):
        waits(store, "a", run=run, timeout_us=None)
        inserted(
            store,
            RunText(run, b"{}", b"{}"),
            *(Step(run, "sum", f"{n}", "completed", 1, now_us) for n in range(700)),
            *(StepValue(run, "result", "sum", f"{n}", b"1") for n in range(300)),
            *(Once("acme", f"run:{run}", f"{n}", "", b"", now_us, None) for n in range(600)),
            approval_of(f"approval-{run}", run, now_us, open_until=None, status="approved"),
            webhook_of(f"webhook-{run}", run, None),
        )
    inserted(store, run_of("run-1", ended_us=now_us), run_of("run-2"), run_of("run-10"))
    clock.advance(KEEP_US - 1)
    assert swept_workflows(store) == Forgotten()
    clock.advance(1)
    before = store.catalog.position().seq
    assert swept_workflows(store) == Forgotten(runs=1)
    # In portions, between which others write.
    assert max(len(change.ops) for change in store.catalog.changes(before)) <= 501
    assert {run.run_id for run in left(store, Run)} == {"run-2", "run-10"}
    for kind, count in (
        (RunText, 2), (Step, 1400), (StepValue, 600), (Once, 1200), (Approval, 2), (Webhook, 2),
        (Subscription, 2),
    ):  # fmt: skip
        assert len(left(store, kind)) == count


def test_an_approval_that_nobody_decides_expires_and_tells_its_run(
    store: Store, clock: HandClock
) -> None:
    clock.trusted = True
    inserted(store, approval_of("a", "run-1", clock.now_us()))
    wait = waits(store, "ask", "approval_pay", timeout_us=None)
    clock.advance(DAY_US - 1)
    assert swept_workflows(store) == Forgotten()
    clock.advance(1)
    assert swept_workflows(store) == Forgotten(approvals=1)
    [approval] = left(store, Approval)
    assert (approval.status, approval.open_until) == ("expired", None)
    taken = claims(store, wait)
    [event] = left(store, Event)
    assert taken.event_id == event.event_id
    assert json.loads(event.payload)["status"] == "expired"
    clock.advance(KEEP_US)
    assert swept_workflows(store) == Forgotten(waits=1, approvals=1)
    assert left(store, Approval) == []


def test_keys_and_webhooks_end_when_they_expire(store: Store, clock: HandClock) -> None:
    expires_at = clock.now_us() + DAY_US
    inserted(
        store,
        Once("acme", "events", "a", "", b"", 1, expires_at),
        Once("acme", "run:run-1", "a", "", b"", 1, None),
        webhook_of("a", "run-1", expires_at),
        webhook_of("b", "run-1", None),
    )
    clock.advance(DAY_US - 1)
    assert swept_workflows(store) == Forgotten()
    clock.advance(1)
    assert swept_workflows(store) == Forgotten(keys=1, webhooks=1)
    assert [key.scope for key in left(store, Once)] == ["run:run-1"]
    assert [webhook.webhook_id for webhook in left(store, Webhook)] == ["b"]


def test_what_changed_since_the_plan_of_workflows_is_left_alone(
    store: Store, clock: HandClock
) -> None:
    clock.trusted = True
    inserted(store, approval_of("a", "run-1", clock.now_us()))
    wait = waits(store, "a", timeout_us=HOUR_US)
    inserted(store, run_of("run-1", ended_us=clock.now_us()))
    clock.advance(KEEP_US + DAY_US)
    made = plan(store)
    assert made.workflows.counts() == {
        "waits": 1, "keys": 0, "approvals": 1, "webhooks": 0, "runs": 1, "ends": 0,
    }  # fmt: skip

    def change(txn: Transaction) -> None:
        approval, run = txn.get(Approval, "a"), txn.get(Run, "run-1")
        assert approval is not None
        assert run is not None
        txn.replace(msgspec.structs.replace(approval, open_until=None, status="approved"))
        txn.replace(msgspec.structs.replace(run, forget_at=None, open="open"))

    store.catalog.write(change)
    claims(store, wait)
    assert execute_sweep(store.catalog, made) == Swept(0, 0)
    assert left(store, Approval)[0].status == "approved"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_what_must_stay_keeps_no_other_wait_from_its_turn(
    store: Store, clock: HandClock, limit: int
) -> None:
    clock.trusted = True
    inserted(store, run_of("run-1"))
    for number in range(5):
        waits(store, f"kept-{number}", "never", timeout_us=HOUR_US)
    over = waits(store, "over", "never", run="direct", timeout_us=HOUR_US + 1)
    clock.advance(DAY_US)
    with store.catalog.read() as snapshot:
        made = plan_sweep(snapshot, store.now_us(snapshot), limit, keep_us=KEEP_US)
    assert made.workflows.wait_ids == [over.subscription_id]


def test_the_verb_counts_them(memory: Path, clock: HandClock) -> None:
    root = memory / "store"
    with Store.open(root, SETTINGS, clock=clock) as store:
        inserted(store, webhook_of("a", "run-1", clock.now_us()))
        waits(store, "poll", "never", run="direct", timeout_us=0)
    counts = []
    for options in (["--accept-clock"], []):
        words = ["sweep", *options, "--json", "--root", str(root)]
        form = json.loads(CliRunner().invoke(main, words).stdout)
        counts.append([form[kind] for kind in ("waits", "keys", "approvals", "webhooks", "runs")])
    assert counts == [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
