"""Deliveries: recorded with what they speak of, tried again on time, given up in the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.completions import resume_payload
from cas.deliveries import (
    DELAYS_US,
    JITTER,
    KEPT_US,
    RETRY_AFTER_US_MAX,
    Outcome,
    after_attempt,
    backlog,
    due,
    due_of,
    enqueue,
    failed_deliveries,
    forget,
    payload_of,
    plan_forgetting,
    record_attempt,
    waiting_tenant,
)
from cas.errors import FilesRefused, InvalidRequest, NotFound
from cas.records import CALLBACK, DONE, FAILED, MAIL, WAITING, Delivery, DeliveryPayload
from cas.store import Store
from cas.uploads import UploadRequest
from tests.clocks import HandClock

GIVE_UP_US = 3 * DAY_US
TAKEN = Outcome(204)
BROKEN = Outcome(500, "answered 500")


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, clock=clock) as opened:
        yield opened


def enqueued(store: Store, tenant_id: str = "t1", subject: str = "u1") -> Delivery:
    return store.catalog.write(
        lambda txn: enqueue(txn, tenant_id, "callback", subject, "https://a.test/", {"a": 1})
    )


def all_due(store: Store) -> list[Delivery]:
    with store.catalog.read() as snapshot:
        return due(snapshot, store.now_us(snapshot), 100)


def sent_by(store: Store, delivery: Delivery) -> bytes:
    with store.catalog.read() as snapshot:
        payload = payload_of(snapshot, delivery.delivery_id)
    assert payload is not None
    return payload


def attempted(store: Store, delivery: Delivery, outcome: Outcome) -> Delivery:
    recorded = record_attempt(
        store.catalog, delivery.delivery_id, outcome, give_up_after_us=GIVE_UP_US, jitter=0
    )
    assert recorded is not None
    return recorded


# --- recording


def test_completing_an_upload_records_its_callback_with_the_resume_payload(store: Store) -> None:
    uploads = store.uploads("t1", "tests")
    wanted = UploadRequest(name="papers", callback_url="https://bank.test/hook", run="r1")
    upload = uploads.request(wanted)
    link = store.upload_link(upload.upload_token)
    link.put(0, b"%PDF-1.4 hello", filename="a.pdf")
    assert all_due(store) == []

    done = link.complete()

    (delivery,) = all_due(store)
    assert (delivery.tenant_id, delivery.kind) == ("t1", "callback")
    assert (delivery.subject, delivery.target) == (upload.upload_id, "https://bank.test/hook")
    assert json.loads(sent_by(store, delivery)) == {
        "type": "upload.completed",
        "upload_id": upload.upload_id,
        "event_name": upload.event_name,
        "name": "papers",
        "tenant_id": "t1",
        "workflow_run_id": "r1",
        **resume_payload(done),
    }


def test_an_upload_without_a_callback_url_sends_nothing(store: Store) -> None:
    upload = store.uploads("t1", "tests").request(UploadRequest(name="papers"))
    link = store.upload_link(upload.upload_token)
    link.put(0, b"hello", filename="a.txt")
    link.complete()
    assert all_due(store) == []


def test_a_refused_completion_records_no_callback(store: Store) -> None:
    wanted = UploadRequest(name="papers", callback_url="https://a.test/", allowed_types=["pdf"])
    link = store.upload_link(store.uploads("t1", "tests").request(wanted).upload_token)
    link.put(0, b"plain text", filename="a.pdf")
    with pytest.raises(FilesRefused):
        link.complete()
    assert all_due(store) == []


@pytest.mark.parametrize(
    "url", ["https://user:secret@bank.test/", "https://user@bank.test/", "http://a.test:99999/"]
)
def test_a_callback_url_with_a_password_or_an_impossible_port_is_refused(
    store: Store, url: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        store.uploads("t1", "tests").request(UploadRequest(name="papers", callback_url=url))
    assert "secret" not in str(refused.value)


# --- a tenant's view


def test_a_tenant_sees_its_own_deliveries_newest_first(store: Store, clock: HandClock) -> None:
    first = enqueued(store)
    clock.advance(SECOND_US)  # identifiers of one millisecond come in any order
    second = enqueued(store, subject="u2")
    enqueued(store, "t2")
    own = store.deliveries("t1", "tests")
    assert own.list().items == [second, first]
    page = own.list(limit=1)
    assert page.items == [second]
    assert own.list(cursor=page.next_cursor).items == [first]
    assert own.list(subject="u2").items == [second]
    attempted(store, first, TAKEN)
    assert [each.delivery_id for each in own.list(status=DONE).items] == [first.delivery_id]
    assert own.list(status=WAITING).items == [second]


def test_the_newest_delivery_of_each_subject_is_found_and_no_foreign_one(
    store: Store, clock: HandClock
) -> None:
    enqueued(store)
    clock.advance(SECOND_US)
    newest, other = enqueued(store), enqueued(store, subject="u2")
    enqueued(store, "t2", subject="u3")
    found = store.deliveries("t1", "ada").newest(["u1", "u2", "u3", "u4"])
    assert found == {"u1": newest, "u2": other}


def test_a_foreign_delivery_is_as_unknown_as_none(store: Store) -> None:
    theirs = enqueued(store, "t2")
    own = store.deliveries("t1", "tests")
    for verb in (own.get, own.resend):
        with pytest.raises(NotFound) as foreign:
            verb(theirs.delivery_id)
        with pytest.raises(NotFound) as unknown:
            verb("nothing")
        assert foreign.value.kind == unknown.value.kind
    assert store.deliveries("t2", "tests").get(theirs.delivery_id) == theirs


def test_a_failed_delivery_that_is_sent_again_has_all_its_attempts_before_it(
    store: Store, clock: HandClock
) -> None:
    delivery = enqueued(store)
    failed = attempted(store, delivery, Outcome(410, "answered 410"))
    assert failed.status == FAILED
    assert all_due(store) == []
    clock.advance(HOUR_US)

    again = store.deliveries("t1", "tests").resend(delivery.delivery_id)

    assert again.delivery_id == delivery.delivery_id
    assert json.loads(sent_by(store, again)) == {"a": 1}
    assert (again.status, again.attempts, again.done_at) == (WAITING, 0, None)
    assert again.last_error == "answered 410"
    assert all_due(store) == [again]


# --- attempts


def test_what_is_due_comes_longest_due_first_and_not_before_its_time(
    store: Store, clock: HandClock
) -> None:
    first = enqueued(store)
    clock.advance(SECOND_US)
    second = enqueued(store)
    assert [each.delivery_id for each in all_due(store)] == [first.delivery_id, second.delivery_id]
    attempted(store, first, BROKEN)
    assert [each.delivery_id for each in all_due(store)] == [second.delivery_id]
    clock.advance(DELAYS_US[0] - 1)
    assert len(all_due(store)) == 1
    clock.advance(1)
    assert [each.delivery_id for each in all_due(store)] == [second.delivery_id, first.delivery_id]


def test_delays_grow_up_to_six_hours_until_the_patience_is_spent(store: Store) -> None:
    delivery = enqueued(store)
    delays_s = []
    while delivery.status == WAITING:
        delivery = after_attempt(delivery, BROKEN, 0, give_up_after_us=GIVE_UP_US, jitter=0)
        delays_s.append((delivery.next_attempt_at or 0) // SECOND_US)
    assert delays_s[:9] == [5, 30, 120, 600, 1800, 3600, 7200, 14400, 21600]
    assert set(delays_s[9:-1]) == {21600}
    assert 2.5 * 86400 < sum(delays_s) <= 3 * 86400
    assert (delivery.status, delivery.next_attempt_at, delivery.last_status) == (FAILED, None, 500)


def test_a_store_that_was_down_for_a_week_still_has_its_patience(
    store: Store, clock: HandClock
) -> None:
    delivery = enqueued(store)
    clock.advance(7 * DAY_US)
    assert attempted(store, delivery, BROKEN).status == WAITING


@pytest.mark.parametrize("jitter", [-1.0, 1.0])
def test_jitter_moves_a_delay_by_a_fifth_at_most(store: Store, jitter: float) -> None:
    delivery = after_attempt(enqueued(store), BROKEN, 0, give_up_after_us=GIVE_UP_US, jitter=jitter)
    assert delivery.next_attempt_at == int(DELAYS_US[0] * (1 + JITTER * jitter))


@pytest.mark.parametrize("code", [429, 503])
def test_a_receiver_may_ask_for_a_later_attempt_within_reason(store: Store, code: int) -> None:
    delivery = enqueued(store)

    def asked(seconds: int) -> int | None:
        outcome = Outcome(code, "busy", retry_after_us=seconds * SECOND_US)
        return after_attempt(
            delivery, outcome, 0, give_up_after_us=GIVE_UP_US, jitter=0
        ).next_attempt_at

    assert asked(77) == 77 * SECOND_US
    assert asked(0) == DELAYS_US[0]
    assert asked(10**9) == RETRY_AFTER_US_MAX


def test_retry_after_of_any_other_answer_means_nothing(store: Store) -> None:
    outcome = Outcome(500, "broken", retry_after_us=HOUR_US)
    delivery = after_attempt(enqueued(store), outcome, 0, give_up_after_us=GIVE_UP_US, jitter=0)
    assert delivery.next_attempt_at == DELAYS_US[0]


@pytest.mark.parametrize("outcome", [Outcome(410, "answered 410"), Outcome(None, "no", None, True)])
def test_gone_and_hopeless_are_never_tried_again(store: Store, outcome: Outcome) -> None:
    assert attempted(store, enqueued(store), outcome).status == FAILED
    assert all_due(store) == []


def test_an_attempt_of_what_is_decided_already_changes_nothing(store: Store) -> None:
    delivery = enqueued(store)
    done = attempted(store, delivery, TAKEN)
    assert (done.status, done.last_error, done.attempts) == (DONE, "", 1)
    late = record_attempt(
        store.catalog, delivery.delivery_id, BROKEN, give_up_after_us=GIVE_UP_US, jitter=0
    )
    assert late is None
    assert store.deliveries("t1", "tests").get(delivery.delivery_id) == done


def test_an_error_text_is_cut_before_it_is_kept(store: Store) -> None:
    kept = attempted(store, enqueued(store), Outcome(None, "x" * 10_000))
    assert len(kept.last_error) == 300


def test_an_attempt_writes_nothing_of_what_is_sent_again(store: Store, root: Path) -> None:
    """A message about a thousand files has 300 KB, and is tried for three days."""
    big = {"text": "x" * 300_000}
    delivery = store.catalog.write(
        lambda txn: enqueue(txn, "t1", "callback", "u1", "https://a.test/", big)
    )
    before = journalled(root)
    for _ in range(10):
        attempted(store, delivery, BROKEN)
    assert journalled(root) - before < 20_000
    assert json.loads(sent_by(store, delivery)) == big


def journalled(root: Path) -> int:
    return sum(len(path.read_bytes().rstrip(b"\0")) for path in root.glob("catalog/journal/*"))


# --- the queue


def test_each_tenant_that_waits_is_found_whatever_else_there_is(
    store: Store, clock: HandClock
) -> None:
    busy = [enqueued(store, "busy") for _ in range(5)]
    later = enqueued(store, "later")
    attempted(store, later, BROKEN)
    attempted(store, enqueued(store, "over"), TAKEN)
    attempted(store, gone := enqueued(store, "refused"), Outcome(410))
    attempted(store, busy[0], BROKEN)
    with store.catalog.read() as snapshot:
        now_us = store.now_us(snapshot)
        assert waiting_tenant(snapshot, CALLBACK) == "busy"
        assert waiting_tenant(snapshot, CALLBACK, "busy") == "later"
        assert waiting_tenant(snapshot, CALLBACK, "later") is None
        assert waiting_tenant(snapshot, MAIL) is None
        ready = {each.delivery_id for each in due_of(snapshot, CALLBACK, "busy", now_us, 10)}
        assert ready == {each.delivery_id for each in busy[1:]}
        assert len(due_of(snapshot, CALLBACK, "busy", now_us, 3)) == 3
        assert due_of(snapshot, CALLBACK, "later", now_us, 10) == []
        assert due_of(snapshot, MAIL, "busy", now_us, 10) == []
        last = due_of(snapshot, CALLBACK, "busy", now_us + HOUR_US, 10)[-1]
        assert last.delivery_id == busy[0].delivery_id
        failed = failed_deliveries(snapshot, 10)
        assert [each.delivery_id for each in failed] == [gone.delivery_id]


# --- what is owed, and what is over


def test_the_backlog_counts_all_tenants(store: Store, clock: HandClock) -> None:
    with store.catalog.read() as snapshot:
        assert backlog(snapshot, clock.now_us()).waiting == 0
    old, _ = enqueued(store, "t1"), enqueued(store, "t2")
    attempted(store, enqueued(store, "t3"), Outcome(410))
    attempted(store, old, BROKEN)
    clock.advance(HOUR_US)
    with store.catalog.read() as snapshot:
        counted = backlog(snapshot, store.now_us(snapshot))
    assert (counted.waiting, counted.failed, counted.oldest_us) == (2, 1, HOUR_US)


def test_what_is_decided_is_forgotten_in_the_end_and_what_waits_never(
    store: Store, clock: HandClock
) -> None:
    done, waiting, late = enqueued(store), enqueued(store), enqueued(store)
    attempted(store, done, TAKEN)
    clock.advance(KEPT_US)
    attempted(store, late, TAKEN)
    clock.advance(SECOND_US)
    with store.catalog.read() as snapshot:
        now_us = store.now_us(snapshot)
        plan = plan_forgetting(snapshot, now_us)
    assert plan == [done.delivery_id]
    assert forget(store.catalog, plan, now_us) == 1
    assert forget(store.catalog, plan, now_us) == 0
    kept = {each.delivery_id for each in store.deliveries("t1", "tests").list().items}
    assert kept == {waiting.delivery_id, late.delivery_id}
    with store.catalog.read() as snapshot:
        sent = {each.delivery_id for each in snapshot.range(DeliveryPayload, "")}
    assert sent == kept


def test_a_delivery_that_is_sent_again_after_the_plan_is_not_forgotten(
    store: Store, clock: HandClock
) -> None:
    delivery = enqueued(store)
    attempted(store, delivery, TAKEN)
    clock.advance(KEPT_US + SECOND_US)
    with store.catalog.read() as snapshot:
        plan = plan_forgetting(snapshot, store.now_us(snapshot))
    store.deliveries("t1", "tests").resend(delivery.delivery_id)
    assert forget(store.catalog, plan, clock.now_us()) == 0
