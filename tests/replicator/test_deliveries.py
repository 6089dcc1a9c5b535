"""The job that sends: to real receivers, with a store whose clock the test moves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from cas.catalog import Transaction
from cas.catalog.snapshot import LmdbSnapshot
from cas.clock import DAY_US, SECOND_US, SystemClock
from cas.config import CallbackSettings, Duration, MailSettings, Settings
from cas.deliveries import DELAYS_US, RETRY_AFTER_US_MAX, Outcome, enqueue
from cas.records import DONE, FAILED, WAITING, Delivery
from cas.store import Store
from replicator.callbacks import Sender
from replicator.deliveries import PLACES, TENANT_PLACES, SendDeliveries
from replicator.destinations import CheckedNetwork
from replicator.loop import Loop
from replicator.mail import Mailer
from replicator.names import Names
from tests.clocks import HandClock
from tests.replicator.receivers import Received, Receiver, hangs, nobody, receiving, status

LOOPBACK = (ip_network("127.0.0.0/8"),)
NO_MAIL = Mailer(MailSettings())
SETTINGS = Settings(
    callbacks=CallbackSettings(
        allowed_networks=LOOPBACK, timeout=Duration(5 * SECOND_US), give_up_after=Duration(DAY_US)
    )
)


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, SETTINGS, clock=clock) as opened:
        yield opened


def enqueued(store: Store, target: str, tenant_id: str = "t1") -> Delivery:
    return store.catalog.write(lambda txn: enqueue(txn, tenant_id, "callback", "u", target, {}))


def job_of(store: Store, timeout_us: int = 60 * SECOND_US) -> SendDeliveries:
    names = Names(lambda _host, _port: ["127.0.0.1"])
    sender = Sender(CheckedNetwork(names.resolve, LOOPBACK), SystemClock(), timeout_us=timeout_us)
    return SendDeliveries(store, bytes(32), sender, NO_MAIL, jitter=lambda: 0.0)


async def settle(job: SendDeliveries, store: Store) -> None:
    while await job.step(now_us(store)):
        pass


def now_us(store: Store) -> int:
    with store.catalog.read() as snapshot:
        return store.now_us(snapshot)


def send_due(store: Store) -> None:
    """One process's life: sends what is due, and ends."""

    async def live() -> None:
        job = job_of(store)
        await settle(job, store)
        await job.close()

    asyncio.run(live())


def state(store: Store, delivery: Delivery) -> Delivery:
    return store.deliveries(delivery.tenant_id, "tests").get(delivery.delivery_id)


def identifiers(received: Sequence[Received]) -> list[str]:
    return [request.headers["webhook-id"] for request in received]


def test_what_is_due_is_sent_once_and_is_done(store: Store) -> None:
    with receiving() as receiver:
        delivery = enqueued(store, receiver.url())
        send_due(store)
        send_due(store)
        assert identifiers(receiver.received) == [delivery.delivery_id]
    done = state(store, delivery)
    assert (done.status, done.attempts, done.last_status) == (DONE, 1, 204)


def test_a_failed_attempt_is_made_again_with_the_same_identifier_and_bytes(
    store: Store, clock: HandClock
) -> None:
    with receiving() as receiver:
        receiver.answers = [status(500), status(404)]
        delivery = enqueued(store, receiver.url())
        for delay_us in (0, *DELAYS_US[:2]):
            send_due(store)
            send_due(store)  # not yet
            clock.advance(DELAYS_US[0] if delay_us == 0 else DELAYS_US[1])
        assert identifiers(receiver.received) == [delivery.delivery_id] * 3
        assert len({request.body for request in receiver.received}) == 1
    assert state(store, delivery).status == DONE


def test_gone_ends_it_and_the_others_of_the_receiver_go_on(store: Store) -> None:
    with receiving() as receiver:
        receiver.answers = [status(410)]
        first = enqueued(store, receiver.url())
        send_due(store)
        second = enqueued(store, receiver.url())
        send_due(store)
        assert identifiers(receiver.received) == [first.delivery_id, second.delivery_id]
    assert (state(store, first).status, state(store, second).status) == (FAILED, DONE)


def test_an_unreachable_receiver_is_given_up_when_the_patience_is_spent(
    store: Store, clock: HandClock
) -> None:
    with nobody() as port:
        delivery = enqueued(store, Receiver(port).url())
        for _ in range(100):
            send_due(store)
            if state(store, delivery).status != WAITING:
                break
            clock.advance(RETRY_AFTER_US_MAX)
    failed = state(store, delivery)
    assert failed.status == FAILED
    assert failed.last_error.startswith("no connection")
    assert sum(DELAYS_US[: min(failed.attempts, len(DELAYS_US))]) <= 2 * DAY_US


def test_an_attempt_whose_record_was_lost_is_made_again_under_the_same_identifier(
    store: Store,
) -> None:
    with receiving() as receiver:
        delivery = enqueued(store, receiver.url())

        async def die_after_the_answer() -> None:
            job = job_of(store)

            def die(*_words: object) -> None:
                raise OSError("the process was killed here")

            job._record = die  # type: ignore[assignment,method-assign]
            with pytest.raises(OSError, match="killed"):
                await settle(job, store)

        asyncio.run(die_after_the_answer())
        assert state(store, delivery).attempts == 0
        send_due(store)
        assert identifiers(receiver.received) == [delivery.delivery_id] * 2
    assert state(store, delivery).status == DONE


def test_a_tenant_whose_receivers_hang_does_not_keep_another_waiting(store: Store) -> None:
    with receiving() as hanging, receiving() as good:
        hanging.answers = [hangs] * 20
        for _ in range(20):
            enqueued(store, hanging.url(), "slow")
        prompt = [enqueued(store, good.url(), "prompt") for _ in range(12)]

        async def until_the_prompt_are_done() -> None:
            job = job_of(store)
            while any(state(store, each).status != DONE for each in prompt):
                assert await job.step(now_us(store))
            for _ in range(TENANT_PLACES):  # its threads may be later than those of the other
                await asyncio.to_thread(hanging.next)
            hanging.over.set()
            await job.close()

        asyncio.run(until_the_prompt_are_done())
        assert len(hanging.received) == TENANT_PLACES


def test_no_more_than_so_many_are_on_their_way_at_a_time(store: Store) -> None:
    tenants = PLACES // TENANT_PLACES + 3
    with receiving() as receiver:
        receiver.answers = [hangs] * (tenants * TENANT_PLACES)
        for number in range(tenants):
            for _ in range(TENANT_PLACES):
                enqueued(store, receiver.url(), f"t{number}")

        async def look() -> None:
            job = job_of(store)
            assert await job.step(now_us(store))
            for _ in range(PLACES):
                await asyncio.to_thread(receiver.next)
            assert await job.step(now_us(store))
            assert len(receiver.received) == PLACES
            receiver.over.set()
            await job.close()

        asyncio.run(look())


def test_one_that_ends_when_nothing_is_left_has_sent_all_of_a_tenant(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is due beyond the places of a tenant has its turn, however prompt the receiver."""
    monkeypatch.setattr("replicator.deliveries.TENANT_PLACES", 1)
    sent = [enqueued(store, "http://a.test/") for _ in range(100)]

    class Prompt:
        async def send(self, _delivery: Delivery, _payload: bytes, _secret: bytes) -> Outcome:
            return Outcome(204)

    job = SendDeliveries(store, bytes(32), Prompt(), NO_MAIL)  # type: ignore[arg-type]
    assert asyncio.run(Loop([job], lambda: now_us(store)).once())
    assert {state(store, each).status for each in sent} == {DONE}


@pytest.mark.parametrize("busy_tenants", [1, PLACES // TENANT_PLACES + 1])
def test_tenants_with_thousands_due_keep_no_other_one_from_its_turn(
    store: Store, busy_tenants: int
) -> None:
    def fill(txn: Transaction) -> None:
        for number in range(2_000):
            tenant_id = f"busy{number % busy_tenants}"
            enqueue(txn, tenant_id, "callback", "u", "http://a.test/", {})

    store.catalog.write(fill)
    last = enqueued(store, "http://a.test/", "zz")
    sent: list[str] = []

    class Prompt:
        async def send(self, delivery: Delivery, _payload: bytes, _secret: bytes) -> Outcome:
            sent.append(delivery.tenant_id)
            return Outcome(204)

    async def until_the_last_is_sent() -> None:
        job = SendDeliveries(store, bytes(32), Prompt(), NO_MAIL)  # type: ignore[arg-type]
        while "zz" not in sent:
            assert await job.step(now_us(store))
        await job.close()

    asyncio.run(until_the_last_is_sent())
    assert len(sent) <= 3 * PLACES
    assert state(store, last).status == DONE


def test_a_look_costs_no_more_however_much_is_due(store: Store) -> None:
    """It runs on the loop, where it holds up everything else."""
    for _ in range(4):
        store.catalog.write(
            lambda txn: [
                enqueue(txn, "t1", "callback", "u", "http://a.test/", {}) for _ in range(1_000)
            ]
        )
    job = job_of(store)
    read: list[int] = []
    reading = LmdbSnapshot.range

    def counting(*words: Any, **named: Any) -> list[Any]:
        found = reading(*words, **named)
        read.append(len(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LmdbSnapshot, "range", counting)
        chosen, many = job._choose(now_us(store))
    assert (len(chosen), many) == (TENANT_PLACES, True)
    assert sum(read) < 200


def test_no_place_to_look_a_name_up_is_no_attempt(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicator.names.TENANT_QUESTIONS_MAX", 2)
    monkeypatch.setattr("replicator.deliveries._STEP_S", 0.01)
    release, asked = threading.Event(), threading.Semaphore(0)

    def slow(_host: str, _port: int) -> list[str]:
        asked.release()
        assert release.wait(60)
        return ["127.0.0.1"]

    with receiving() as receiver:
        due = [enqueued(store, receiver.url()) for _ in range(TENANT_PLACES)]

        async def live() -> None:
            names = Names(slow)
            network = CheckedNetwork(names.resolve, LOOPBACK)
            sender = Sender(network, SystemClock(), timeout_us=60 * SECOND_US)
            job = SendDeliveries(store, bytes(32), sender, NO_MAIL)
            for _ in range(5):
                assert await job.step(now_us(store))
            assert [state(store, each).attempts for each in due] == [0] * TENANT_PLACES
            # Another tenant finds a place meanwhile.
            other = enqueued(store, receiver.url(), "t2")
            for _ in range(2):
                await asyncio.to_thread(asked.acquire)
            while not asked.acquire(blocking=False):
                assert await job.step(now_us(store))
            release.set()
            await settle(job, store)
            await job.close()
            due.append(other)

        asyncio.run(live())
    assert [(each.status, each.attempts) for each in (state(store, one) for one in due)] == [
        (DONE, 1)
    ] * (TENANT_PLACES + 1)


def test_closing_waits_for_what_is_on_its_way(store: Store) -> None:
    release = threading.Event()
    with receiving() as receiver:

        def slowly(request: object, over: threading.Event) -> None:
            release.wait(60)
            status(200)(request, over)  # type: ignore[arg-type]

        receiver.answers = [slowly]
        delivery = enqueued(store, receiver.url())

        async def stop_meanwhile() -> None:
            job = job_of(store)
            step = asyncio.create_task(job.step(now_us(store)))
            await asyncio.to_thread(receiver.next)
            release.set()
            await step
            await job.close()

        asyncio.run(stop_meanwhile())
    assert state(store, delivery).status == DONE


def test_a_bug_that_one_delivery_sets_off_is_its_own_failure(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    async def buggy(host: str, _port: int) -> Sequence[str]:
        if host == "poison.test":
            raise RuntimeError("a bug")
        return ["127.0.0.1"]

    with receiving() as receiver:
        poison = enqueued(store, "http://poison.test/")
        good = enqueued(store, receiver.url())

        async def live() -> None:
            network = CheckedNetwork(buggy, LOOPBACK)
            sender = Sender(network, SystemClock(), timeout_us=60 * SECOND_US)
            job = SendDeliveries(store, bytes(32), sender, NO_MAIL)
            await settle(job, store)
            await job.close()

        asyncio.run(live())
    assert state(store, good).status == DONE
    assert state(store, poison).last_error == "an internal error"
    assert "a bug" in caplog.text


def test_an_inside_address_is_told_to_the_operator_and_not_to_the_tenant(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    delivery = enqueued(store, "http://inside.test/")

    async def live() -> None:
        names = Names(lambda _host, _port: ["10.9.8.7"])
        sender = Sender(CheckedNetwork(names.resolve), SystemClock(), timeout_us=60 * SECOND_US)
        job = SendDeliveries(store, bytes(32), sender, NO_MAIL)
        await settle(job, store)
        await job.close()

    asyncio.run(live())
    assert "10.9.8.7" in caplog.text
    refused = state(store, delivery)
    assert refused.status == WAITING
    assert "inside.test" in refused.last_error
    assert "10.9.8.7" not in refused.last_error
