"""Runs: what the catalog knows of a workflow is all that is needed to go on with it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from highway_dsl import WorkflowBuilder

from cas.catalog import Transaction
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import Settings, Size, StoreSettings
from cas.dating import date_all
from cas.errors import (
    KeyReused,
    NotFound,
    NoWaitingWorkflow,
    RunEnded,
    ToolFailed,
    TooManyRuns,
)
from cas.events import append_event
from cas.forgetting import execute_forgetting, plan_forgetting
from cas.links import SignedLinks
from cas.once import OnceKey, step_key
from cas.records import (
    CANCELLED,
    COMPLETED,
    FAILED,
    PENDING,
    QUEUED,
    RUNNING,
    SKIPPED,
    WAITING,
    Approval,
    Run,
    RunText,
    Step,
    StepValue,
    Subscription,
)
from cas.signing import Signer
from cas.store import Store
from cas.totals import miscounted_totals, open_runs_of, steps_of, values_of
from cas.uploads import UploadRequest
from tests.clocks import KEEP_US, START_US, HandClock
from workflows.approvals import ApprovalRequest, Approvals
from workflows.definitions import Definition
from workflows.events import Events
from workflows.forms import plain, whole_run
from workflows.run_log import RunLog
from workflows.runs import Runs
from workflows.secrets import Secrets
from workflows.watcher import Watcher
from workflows.webhooks import WebhookRequest, Webhooks


@pytest.fixture
def store(memory: Path, clock: HandClock) -> Iterator[Store]:
    settings = Settings(store=StoreSettings(min_free=Size(0)))
    with Store.open(memory / "store", settings, clock=clock) as store:
        yield store


@pytest.fixture
def runs(store: Store) -> Runs:
    return Runs(
        store.catalog,
        tenant_id="acme",
        actor="ann",
        request_id="",
        keep_us=KEEP_US,
        events_keep_us=KEEP_US,
    )


def definition(name: str = "example") -> Definition:
    builder = WorkflowBuilder(name=name)
    builder.task("ask", "t.ask", result_key="request")
    builder.foreach("each", "{{xs}}", lambda f: f.task("one", "t.one", result_key="r"))
    builder.task("last", "t.last")
    builder.workflow.set_variables({"greeting": "hello", "xs": []})
    return Definition.parse(builder.build().to_json())


def begun(store: Store, runs: Runs, inputs: dict[str, Any] | None = None) -> RunLog:
    log = RunLog(
        store.catalog,
        runs.submit(definition(), inputs or {}).run_id,
        keep_us=KEEP_US,
        events_keep_us=KEEP_US,
    )
    log.start()
    return log


# --- submitting


def test_a_submitted_run_is_queued_for_the_runner(store: Store, runs: Runs) -> None:
    run = runs.submit(definition(), {"xs": [1]})
    assert (run.status, run.name, run.created_by, run.created_at) == (
        QUEUED, "example", "ann", START_US,
    )  # fmt: skip
    with store.catalog.read() as snapshot:
        assert snapshot.range(Run, "open", ("open",)) == [run]
    view = runs.get(run.run_id)
    assert Definition.from_json(view.text.definition) == definition()
    assert view.inputs == {"xs": msgspec.Raw(b"[1]")}


def test_the_same_key_submits_once(runs: Runs) -> None:
    key = OnceKey("workflows", "k", b"the same")
    first = runs.submit(definition(), {}, key)
    assert runs.submit(definition(), {}, key) == first
    with pytest.raises(KeyReused):
        runs.submit(definition(), {}, OnceKey("workflows", "k", b"another"))
    assert len(runs.list().items) == 1


def test_so_many_runs_of_a_tenant_are_open_at_once_and_no_more(
    store: Store, clock: HandClock
) -> None:
    runs = Runs(
        store.catalog,
        tenant_id="acme",
        actor="ann",
        request_id="",
        open_max=2,
        keep_us=KEEP_US,
        events_keep_us=KEEP_US,
    )
    key = OnceKey("workflows", "k", b"the same")
    first = runs.submit(definition(), {}, key)
    second = runs.submit(definition(), {})
    with pytest.raises(TooManyRuns) as refused:
        runs.submit(definition(), {})
    assert (refused.value.limit, refused.value.open) == (2, 2)
    assert runs.submit(definition(), {}, key) == first  # it is there
    other = Runs(
        store.catalog,
        tenant_id="other",
        actor="eve",
        request_id="",
        open_max=2,
        keep_us=KEEP_US,
        events_keep_us=KEEP_US,
    )
    other.submit(definition(), {})
    log = RunLog(store.catalog, second.run_id, keep_us=KEEP_US, events_keep_us=KEEP_US)
    log.start()
    with pytest.raises(TooManyRuns):
        runs.submit(definition(), {}, OnceKey("workflows", "later", b""))
    log.end(FAILED, "no")
    third = runs.submit(definition(), {}, OnceKey("workflows", "later", b""))
    with pytest.raises(TooManyRuns):
        runs.submit(definition(), {})
    runs.cancel(third.run_id)
    runs.submit(definition(), {})
    with store.catalog.read() as snapshot:
        assert (open_runs_of(snapshot, "acme"), open_runs_of(snapshot, "other")) == (2, 1)
        assert miscounted_totals(snapshot) == []


def test_runs_of_others_are_not_found(store: Store, runs: Runs) -> None:
    run = runs.submit(definition(), {})
    other = Runs(
        store.catalog,
        tenant_id="other",
        actor="eve",
        request_id="",
        keep_us=KEEP_US,
        events_keep_us=KEEP_US,
    )
    for act in (other.get, other.cancel):
        with pytest.raises(NotFound):
            act(run.run_id)
    assert other.list().items == []


def test_runs_are_listed_newest_first_by_page_and_status(
    store: Store, runs: Runs, clock: HandClock
) -> None:
    submitted = []
    for _ in range(3):
        clock.advance(SECOND_US)
        submitted.append(runs.submit(definition(), {}).run_id)
    page = runs.list(limit=2)
    assert [run.run_id for run in page.items] == submitted[:0:-1]
    rest = runs.list(limit=2, cursor=page.next_cursor)
    assert ([run.run_id for run in rest.items], rest.next_cursor) == (submitted[:1], None)
    RunLog(store.catalog, submitted[1], keep_us=KEEP_US, events_keep_us=KEEP_US).start()
    assert [run.run_id for run in runs.list(status=RUNNING).items] == [submitted[1]]


# --- steps


def test_a_finished_step_is_never_begun_again(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    assert log.begin("ask").status == RUNNING
    finished = log.finish("ask", "", {"url": "u"})
    assert log.begin("ask") == finished
    assert log.finish("ask", "", {"url": "another"}) == finished, "only the first one counts"


def test_a_step_that_was_broken_off_is_another_attempt(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    log.begin("ask")
    again = log.begin("ask")
    assert (again.attempts, again.status) == (2, RUNNING)
    log.fail("ask", "", "no answer")
    assert log.begin("ask").attempts == 3


def test_waking_is_no_further_attempt(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    log.begin("ask")
    log.wait("ask", "", {"url": "u"})
    assert log.read().run.status == WAITING
    assert log.begin("ask").attempts == 1
    assert log.read().run.status == RUNNING


def test_a_run_waits_only_while_nothing_of_it_runs(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    log.begin("ask")
    log.begin("one", "0")
    log.wait("ask", "", None)
    assert log.read().run.status == RUNNING
    log.finish("one", "0", 1)
    assert log.read().run.status == WAITING


def test_variables_are_inputs_results_and_what_waiting_steps_show(store: Store, runs: Runs) -> None:
    log = begun(store, runs, {"xs": [1, 2]})
    log.begin("ask")
    log.wait("ask", "", {"upload_url": "u"})
    view = log.read()
    assert view.variables == {
        "greeting": "hello",
        "xs": [1, 2],
        "request": {"upload_url": "u"},
    }
    log.finish("ask", "", {"token": "t"})
    log.begin("one", "0")
    log.finish("one", "0", "of one item")
    log.begin("each")
    log.finish("each", "", {"results": ["of one item"], "count": 1})
    seen = log.read().variables
    assert seen["request"] == {"token": "t"}
    assert seen["each"]["results"] == ["of one item"]
    assert not {"r", "one"} & set(seen), "what is in a loop is the loop's"


def test_a_skipped_step_gives_nothing(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    assert log.skip("last").status == SKIPPED
    assert log.begin("last").status == SKIPPED
    assert "last" not in log.read().variables


# --- the end


def test_a_run_ends_once(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    assert log.end(COMPLETED).status == COMPLETED
    assert log.end(FAILED, "late").status == COMPLETED
    with pytest.raises(RunEnded):
        log.begin("ask")
    with pytest.raises(RunEnded):
        runs.cancel(log.run_id)
    with store.catalog.read() as snapshot:
        assert snapshot.range(Run, "open", ("open",)) == []


def test_a_cancelled_run_takes_no_more_results(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    log.begin("ask")
    log.wait("ask", "", {"upload_url": "u"})
    runs.cancel(log.run_id)
    with pytest.raises(RunEnded):
        log.finish("ask", "", {})
    view = log.read()
    assert view.run.status == CANCELLED
    assert [step.status for step in view.steps] == [CANCELLED]


def test_an_ended_run_is_kept_for_its_time(store: Store, runs: Runs, clock: HandClock) -> None:
    run_id = runs.submit(definition(), {}).run_id
    clock.advance(SECOND_US)
    ended = RunLog(store.catalog, run_id, keep_us=2 * DAY_US, events_keep_us=KEEP_US).end(
        FAILED, "x" * 5000
    )
    assert ended.forget_at == START_US + SECOND_US + 2 * DAY_US
    assert len(ended.error) == 2000


def test_the_steps_of_an_ended_run_have_ended_for_all_who_look(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the end was broken off before their own records said so."""
    monkeypatch.setattr("cas.endings.PORTION", 0)
    monkeypatch.setattr("workflows.run_log.let_go", lambda *_: None)
    log = begun(store, runs)
    log.begin("ask")
    log.wait("ask", "", {"upload_url": "u"})
    runs.cancel(log.run_id)
    raw = log.step("ask")
    assert raw is not None
    assert raw.status == WAITING
    view = runs.get(log.run_id)
    assert [step.status for step in (*view.steps, *view.page(None, 10).items)] == [CANCELLED] * 2
    one = view.step("ask")
    assert one is not None
    assert (one.status, one.ended_at) == (CANCELLED, START_US)
    form = plain(whole_run(view))
    assert (form["steps"][0]["shown"], form["variables"]) == (None, {"greeting": "hello", "xs": []})


def test_a_run_with_many_waits_ends_in_many_transactions(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.endings.PORTION", 20)
    events = waits_of(store)
    for end in (lambda log: runs.cancel(log.run_id), lambda log: log.end(FAILED)):
        log = begun(store, runs)
        for number in range(50):
            log.begin("one", f"{number}")
            events.subscribe(log.run_id, f"one#{number}", "paid", None, None)
            log.wait("one", f"{number}")
        before = store.catalog.position().seq
        assert end(log).ending is None
        changes = list(store.catalog.changes(before))
        counts = [sum(op[0] in (Step, Subscription) for op in change.ops) for change in changes]
        assert (sum(counts), max(counts), len(counts)) == (100, 20, 5)
        [run, *_] = [op[2] for op in changes[0].ops if op[0] is Run]
        assert isinstance(run, Run)
        assert run.open is None, "for all others it has ended with the first"
        assert {step.status for step in log.read().steps} == {CANCELLED}


def test_a_repeated_end_goes_on_with_one_that_was_broken_off(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.endings.PORTION", 2)
    log = begun(store, runs)
    for number in range(5):
        log.begin("one", f"{number}")
    with monkeypatch.context() as broken:
        broken.setattr("workflows.run_log.let_go", lambda *_: None)
        log.end(FAILED, "no")
    log.end(COMPLETED)
    raw = [log.step("one", f"{number}") for number in range(5)]
    assert [step and step.status for step in raw] == [CANCELLED] * 5
    assert log.read().run.error == "no"


# --- what ends with a run


def test_an_ended_run_waits_no_more_and_blocks_no_key(store: Store, runs: Runs) -> None:
    events = waits_of(store)
    for end in (
        lambda log: log.end(COMPLETED),
        lambda log: log.end(FAILED),
        lambda log: runs.cancel(log.run_id),
    ):
        log = begun(store, runs)
        wait = events.subscribe(log.run_id, "ask", "paid", "order-7", None)
        assert events.claim(wait.subscription_id) is None
        end(log)
        with pytest.raises(NoWaitingWorkflow):
            events.emit("paid", {}, "order-7")


def test_what_a_cancelled_run_asked_people_for_is_closed(store: Store, runs: Runs) -> None:
    for status, upload_status, approval_status in (
        (CANCELLED, CANCELLED, CANCELLED),
        (COMPLETED, PENDING, PENDING),
    ):
        log = begun(store, runs)
        wanted = UploadRequest("papers", run=log.run_id)
        key = step_key(log.run_id, "ask", "upload")
        upload = store.uploads("acme", "ann").request(wanted, key)
        approval_id = asked(store, log.run_id)
        if status == CANCELLED:
            runs.cancel(log.run_id)
        else:
            log.end(status)
        assert store.upload_link(upload.upload_token).upload.status == upload_status
        with store.catalog.read() as snapshot:
            approval = snapshot.get(Approval, approval_id)
        assert approval is not None
        assert approval.status == approval_status


def waits_of(store: Store) -> Events:
    watcher = Watcher(store.catalog)
    return Events(
        store.catalog, watcher, store.settings.events, tenant_id="acme", actor="ann", request_id=""
    )


def asked(store: Store, run: str) -> str:
    """A pending approval of a run."""
    links = SignedLinks(Signer((b"k" * 32,)), store.about_now_us, store.settings.gateway)
    ring = (b"k" * 32,)
    approvals = Approvals(
        store.catalog, links, store.settings, ring, tenant_id="acme", actor="ann", request_id=""
    )
    return approvals.request(ApprovalRequest("publish", "Publish?", run=run)).approval_id


def test_the_webhooks_of_a_run_that_came_to_nothing_are_over(store: Store, runs: Runs) -> None:
    secrets = Secrets(store.catalog, (b"k" * 32,), tenant_id="acme", actor="ann", request_id="")
    secrets.put("s", b"k" * 32)
    webhooks = Webhooks(store.catalog, tenant_id="acme", actor="ann", request_id="")
    for end, expires_at in (
        (lambda log: log.end(COMPLETED), None),
        (lambda log: log.end(FAILED, "no"), START_US),
        (lambda log: runs.cancel(log.run_id), START_US),
    ):
        log = begun(store, runs)
        webhook = webhooks.register(WebhookRequest("pay", "github", "s", run=log.run_id))
        end(log)
        assert webhooks.get(webhook.webhook_id).expires_at == expires_at


def test_a_step_of_an_ended_run_begins_nothing_that_others_wait_for(
    store: Store, runs: Runs
) -> None:
    log = begun(store, runs)
    runs.cancel(log.run_id)
    events = waits_of(store)
    event_id = events.emit("paid", 1, "order-7", hold_us=DAY_US).event_id
    with pytest.raises(RunEnded):
        events.subscribe(log.run_id, "ask", "paid", "order-7", None)
    with pytest.raises(RunEnded):
        asked(store, log.run_id)
    secrets = Secrets(store.catalog, (b"k" * 32,), tenant_id="acme", actor="ann", request_id="")
    secrets.put("s", b"k" * 32)
    webhooks = Webhooks(store.catalog, tenant_id="acme", actor="ann", request_id="")
    with pytest.raises(RunEnded):
        webhooks.register(WebhookRequest("pay", "github", "s", run=log.run_id))
    live = begun(store, runs)
    wait = events.subscribe(live.run_id, "ask", "paid", "order-7", None)
    assert wait.event_id == event_id


def test_what_tells_of_the_end_is_kept_as_events_are(store: Store) -> None:
    runs = Runs(
        store.catalog,
        tenant_id="acme",
        actor="ann",
        request_id="",
        events_keep_us=2 * HOUR_US,
        keep_us=KEEP_US,
    )
    for by_runner in (False, True):
        run_id = runs.submit(definition(), {}).run_id
        approval_id = asked(store, run_id)
        if by_runner:
            RunLog(store.catalog, run_id, events_keep_us=2 * HOUR_US, keep_us=KEEP_US).end(FAILED)
        else:
            runs.cancel(run_id)
        with store.catalog.read() as snapshot:
            approval = snapshot.get(Approval, approval_id)
        assert approval is not None
        assert (approval.status, approval.forget_at) == (CANCELLED, START_US + 2 * HOUR_US)


def test_a_step_of_an_ended_run_begins_nothing_under_its_key(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    key = step_key(log.run_id, "ask", "upload")
    upload = store.uploads("acme", "run").request(UploadRequest("x", run=log.run_id), key)
    runs.cancel(log.run_id)
    again = store.uploads("acme", "run").request(UploadRequest("x", run=log.run_id), key)
    assert again.upload_id == upload.upload_id
    another = step_key(log.run_id, "ask", "another")
    with pytest.raises(RunEnded):
        store.uploads("acme", "run").request(UploadRequest("x", run=log.run_id), another)


# --- how long it is remembered


def test_a_cancelled_run_is_kept_as_long_as_it_is_to_be(store: Store, clock: HandClock) -> None:
    runs = Runs(
        store.catalog,
        tenant_id="acme",
        actor="ann",
        request_id="",
        keep_us=DAY_US,
        events_keep_us=KEEP_US,
    )
    run = runs.submit(definition(), {})
    assert runs.cancel(run.run_id).forget_at == START_US + DAY_US


def test_no_time_is_counted_from_a_clock_in_doubt(
    store: Store, runs: Runs, clock: HandClock
) -> None:
    log = begun(store, runs)
    log.begin("ask")
    log.finish("ask", "", "kept")
    clock.trusted = False
    clock.advance(-400 * DAY_US)
    ended = log.end(COMPLETED)
    assert ended.undated_at is not None
    clock.trusted = True
    clock.advance(500 * DAY_US)
    keep_us = 30 * DAY_US
    with store.catalog.read() as snapshot:
        assert plan_forgetting(snapshot, clock.now_us(), keep_us, 10).run_ids == []
    date_all(store.catalog)
    dated = log.read().run
    assert (dated.forget_at, dated.undated_at) == (clock.now_us() + 30 * DAY_US, None)
    clock.advance(30 * DAY_US)
    with store.catalog.read() as snapshot:
        due = plan_forgetting(snapshot, clock.now_us(), keep_us, 10)
        assert values_of(snapshot, log.run_id) > 0
    assert due.run_ids == [log.run_id]
    execute_forgetting(store.catalog, due, clock.now_us(), keep_us)
    with store.catalog.read() as snapshot:
        assert snapshot.range(StepValue, "") == []
        assert values_of(snapshot, log.run_id) == 0


# --- what is large


def test_a_change_of_a_step_writes_no_results_again(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    log.begin("ask")
    step = log.finish("ask", "", "x" * 1_000_000)
    assert step.value_bytes == 1_000_002
    assert len(msgspec.msgpack.encode(step)) < 200
    assert msgspec.json.decode(log.result("ask") or b"") == "x" * 1_000_000


def test_a_run_takes_no_more_results_than_its_limit(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.step_values.VALUES_BYTES_MAX", 1000)
    log = begun(store, runs)
    log.begin("one", "0")
    log.finish("one", "0", "x" * 600)
    log.begin("one", "1")
    with pytest.raises(ToolFailed, match="store them as files"):
        log.finish("one", "1", "x" * 600)
    with pytest.raises(ToolFailed):
        log.wait("one", "1", {"shown": "x" * 600})
    with pytest.raises(ToolFailed):
        log.record_items("each", "", ["x" * 600])
    log.wait("one", "1", {"shown": "x" * 300})
    log.fail("one", "1", "no")  # what it showed counts no more
    log.begin("last")
    assert log.finish("last", "", "x" * 300).status == COMPLETED


def test_a_run_that_had_too_many_results_begins_nothing_more(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.step_values.VALUES_BYTES_MAX", 1000)
    log, other = begun(store, runs), begun(store, runs)
    log.begin("one", "0")
    log.check_room("t.one")
    with pytest.raises(ToolFailed, match="store them as files"):
        log.finish("one", "0", "x" * 1000)
    for _ in range(2):
        # Also by the next runner, which knows nothing but the catalog.
        with pytest.raises(ToolFailed, match=r"t\.one: not begun"):
            RunLog(store.catalog, log.run_id, keep_us=KEEP_US, events_keep_us=KEEP_US).check_room(
                "t.one"
            )
        with pytest.raises(ToolFailed, match="store them as files"):
            log.finish("one", "0", "x" * 1000)
    other.check_room("t.one")
    assert [step.status for step in log.read().steps] == [RUNNING]


def test_what_a_run_was_asked_is_written_once(store: Store, runs: Runs) -> None:
    before = store.catalog.position().seq
    log = begun(store, runs, {"text": "x" * 1_000_000})
    for number in range(5):  # of the run itself, two changes each
        log.begin("ask", f"{number}")
        log.wait("ask", f"{number}")
    log.end(COMPLETED)
    written = [op for change in store.catalog.changes(before) for op in change.ops]
    statuses = [record.status for _, _, record in written if isinstance(record, Run)]
    assert statuses == [QUEUED, *[RUNNING, WAITING] * 5, COMPLETED]
    texts = [record for _, _, record in written if isinstance(record, RunText)]
    assert len(texts) == 1
    assert sum(len(msgspec.msgpack.encode(record)) for _, _, record in written) < 1_100_000
    # It takes no room of what its steps come to.
    with store.catalog.read() as snapshot:
        assert values_of(snapshot, log.run_id) == 0


def test_the_loops_of_a_run_have_so_many_steps_and_no_more(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.run_log.STEPS_MAX", 10)
    log, other = begun(store, runs), begun(store, runs)
    log.record_items("each", "0", list(range(2)), tasks=3)
    with pytest.raises(ToolFailed, match=r"each: .* 12 of 10 steps"):
        log.record_items("each", "1", list(range(2)), tasks=3)
    assert log.items("each", "1") is None
    with store.catalog.read() as snapshot:
        assert steps_of(snapshot, log.run_id) == 6, "nothing of it was written"
    log.record_items("each", "1", list(range(4)))
    other.record_items("each", "", list(range(5)), tasks=2)
    with store.catalog.read() as snapshot:
        assert miscounted_totals(snapshot) == []


def test_items_that_were_recorded_in_part_count_once(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.run_log.STEPS_MAX", 2400)
    log = begun(store, runs)
    items = list(range(1200))
    log.record_items("each", "", items, tasks=2)

    def stopped(txn: Transaction) -> None:  # as after a kill before the second portion
        for number in range(500, 1200):
            txn.delete(StepValue(log.run_id, "item", "each", f"{number}", b""))
        txn.delete(StepValue(log.run_id, "items", "each", "", b""))

    store.catalog.write(stopped)
    log.record_items("each", "", items, tasks=2)
    assert (log.items("each", ""), log.item("each", "1199")) == (1200, b"1199")


def test_items_are_kept_as_they_were(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    assert log.items("each", "") is None
    items = list(range(1200))
    log.record_items("each", "", items)
    log.record_items("each", "7", ["a"])
    assert (log.items("each", ""), log.items("each", "7")) == (1200, 1)
    assert (log.item("each", "1199"), log.item("each", "1200")) == (b"1199", None)
    assert log.item("each", "7.0") == b'"a"'


def test_what_there_is_within_a_loop_is_its_own(store: Store, runs: Runs) -> None:
    log = begun(store, runs)
    for iteration in ("", "0", "1", "10", "1.0", "1.1", "10.0", "1.0.0"):
        log.begin("one", iteration)
        log.finish("one", iteration, iteration)
    assert set(log.results_within("one", "")) == {"0", "1", "10"}
    assert set(log.results_within("one", "1")) == {"1.0", "1.1"}
    assert [step.iteration for step in log.steps_within("one", "10")] == ["10.0"]


def test_a_run_with_much_is_told_within_limits(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.run_view.TOLD_BYTES_MAX", 100)
    monkeypatch.setattr("workflows.run_view.TOLD_IN_ALL_BYTES_MAX", 250)
    log = begun(store, runs, {"xs": [1]})
    for step, iteration, size in (
        ("one", "0", 90), ("one", "1", 90), ("ask", "", 200), ("each", "", 80), ("last", "", 70),
    ):  # fmt: skip
        log.begin(step, iteration)
        log.finish(step, iteration, "x" * size)
    form = plain(whole_run(runs.get(log.run_id)))
    whole = f"/api/v1/workflows/{log.run_id}/steps"
    cut = {"truncated": True, "size_bytes": 202, "result_url": f"{whole}/ask/result"}
    told = {(step["step"], step["iteration"]): step["result"] for step in form["steps"]}
    assert told == {
        ("one", "0"): "x" * 90,
        ("one", "1"): {
            "truncated": True,
            "size_bytes": 92,
            "result_url": f"{whole}/one/result?iteration=1",
        },
        ("ask", ""): cut,
        ("each", ""): "x" * 80,
        ("last", ""): "x" * 70,
    }
    # Each by one name alone: its `result_key`, or its own.
    assert form["variables"] == {
        "greeting": "hello", "xs": [1], "request": cut, "each": "x" * 80, "last": "x" * 70,
    }  # fmt: skip


def test_what_was_held_for_an_ended_run_goes_to_another_one(store: Store, runs: Runs) -> None:
    """Whatever the order of its waits: none of them may take along what another leaves."""
    events = waits_of(store)
    for number in range(8):
        name = f"paid-{number}"
        ending, other = begun(store, runs), begun(store, runs)
        given = events.subscribe(ending.run_id, "first", name, None, None)
        events.emit(name, {"n": number}, hold_us=DAY_US)  # given to the first
        for step in ("second", "third"):
            events.subscribe(ending.run_id, step, name, None, None)
        later = events.subscribe(other.run_id, "ask", name, None, None)
        assert events.claim(later.subscription_id) is None
        ending.end(FAILED)
        claimed = events.claim(later.subscription_id)
        assert claimed is not None
        assert claimed.payload == {"n": number}, given


def test_what_a_client_was_given_outlives_the_run(store: Store, runs: Runs) -> None:
    events = waits_of(store)
    log = begun(store, runs)
    client = events.subscribe(log.run_id, "waiter:me", "told", None, 60 * SECOND_US)
    store.catalog.write(
        lambda txn: append_event(txn, "acme", "told", {"x": 1}, run=log.run_id, keep_us=KEEP_US),
        actor="test",
    )
    log.end(COMPLETED)
    claimed = events.claim(client.subscription_id)
    assert claimed is not None
    assert claimed.payload == {"x": 1}


def test_a_cancelled_run_is_cancelled_also_where_the_rest_cannot_be_written(
    store: Store, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cas.endings.PORTION", 1)
    events, log = waits_of(store), begun(store, runs)
    for number in range(3):
        events.subscribe(log.run_id, f"step {number}", f"name {number}", None, None)
    write, writes = store.catalog.write, []

    def full(*args: Any, **kwargs: Any) -> Any:
        writes.append(args)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, "no space left")
        return write(*args, **kwargs)

    monkeypatch.setattr(store.catalog, "write", full)
    cancelled = runs.cancel(log.run_id)
    assert cancelled.status == CANCELLED
    assert cancelled.ending is not None  # the sweep ends it
    assert len(writes) > 1
