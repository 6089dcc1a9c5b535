"""Working slots: few work, many wait, and all come to their turn.

Invariant 11: no request holds a worker for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest

from gateway.pool import Pool, outside_slot

TURN_S = 60.0


def test_no_more_than_the_slots_work_at_once() -> None:
    pool, lock = Pool(2), threading.Lock()
    working, most = 0, 0
    done: SimpleQueue[None] = SimpleQueue()

    def work() -> None:
        nonlocal working, most
        for _ in range(20):
            with lock:
                working += 1
                most = max(most, working)
            with lock:
                working -= 1
            with pool.waiting():
                pass
        done.put(None)

    for _ in range(16):
        pool.submit(work)
    for _ in range(16):
        done.get(timeout=TURN_S)
    assert most <= 2


@pytest.mark.parametrize("waiting", [1, 50])
def test_those_who_wait_for_clients_stop_nobody(waiting: int) -> None:
    pool = Pool(1)
    clients = threading.Event()
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)

    def wait() -> None:
        with pool.waiting():
            begun.release()
            clients.wait(TURN_S)
        ended.release()

    for _ in range(waiting):
        pool.submit(wait)
    for _ in range(waiting):
        assert begun.acquire(timeout=TURN_S)
    quick = threading.Event()
    pool.submit(quick.set)
    assert quick.wait(TURN_S)
    clients.set()
    for _ in range(waiting):
        assert ended.acquire(timeout=TURN_S)


def test_a_new_request_has_its_turn_among_those_that_come_back() -> None:
    """Two uploads that hand the only slot to and fro never let it be free."""
    pool = Pool(1)
    stop = threading.Event()
    ended = threading.Semaphore(0)

    def upload() -> None:
        while not stop.is_set():
            with pool.waiting():
                pass
        ended.release()

    pool.submit(upload)
    pool.submit(upload)
    new = threading.Event()
    pool.submit(new.set)
    assert new.wait(TURN_S)
    stop.set()
    assert ended.acquire(timeout=TURN_S)
    assert ended.acquire(timeout=TURN_S)


def test_requests_begin_in_the_order_they_came() -> None:
    pool = Pool(1)
    first = threading.Event()
    order: SimpleQueue[int] = SimpleQueue()

    def numbered(number: int) -> Callable[[], None]:
        return lambda: order.put(number)

    def hold() -> None:
        first.wait(TURN_S)

    pool.submit(hold)
    for number in range(20):
        pool.submit(numbered(number))
    first.set()
    assert [order.get(timeout=TURN_S) for _ in range(20)] == list(range(20))


def test_an_error_while_waiting_comes_through_and_keeps_the_slot_in_use() -> None:
    pool = Pool(1)
    outcomes: SimpleQueue[str] = SimpleQueue()

    def broken() -> None:
        try:
            with pool.waiting():
                raise ConnectionResetError
        except ConnectionResetError:
            outcomes.put("reset")

    pool.submit(broken)
    assert outcomes.get(timeout=TURN_S) == "reset"
    pool.submit(lambda: outcomes.put("next"))
    assert outcomes.get(timeout=TURN_S) == "next"


def test_idle_threads_work_again() -> None:
    pool = Pool(1)
    names: SimpleQueue[int] = SimpleQueue()
    seen = set()
    for _ in range(50):
        pool.submit(lambda: names.put(threading.get_ident()))
        seen.add(names.get(timeout=TURN_S))
    # One more may be made while the first is on its way back.
    assert len(seen) <= 2


def test_where_no_thread_can_be_made_one_that_came_back_gets_the_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool(1)
    waits, come_back, on_its_way = threading.Event(), threading.Event(), threading.Event()
    go_on, back, done = threading.Event(), threading.Event(), threading.Event()

    def returns() -> None:
        with pool.waiting():
            waits.set()
            come_back.wait(TURN_S)
            on_its_way.set()
        back.set()

    def works() -> None:
        go_on.wait(TURN_S)
        with pool.waiting():
            assert back.wait(TURN_S), "a slot is free, and nobody has it"

    pool.submit(returns)
    assert waits.wait(TURN_S)
    pool.submit(works)
    pool.submit(done.set)
    come_back.set()
    assert on_its_way.wait(TURN_S)
    while len(pool._line) < 2:  # `done.set`, and then the gate of `returns`
        pass

    def no_more(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    go_on.set()
    assert back.wait(TURN_S / 2)
    assert done.wait(TURN_S)


def test_a_wait_outside_the_slot_is_for_threads_of_a_pool_and_harmless_in_others() -> None:
    pool = Pool(1)
    other = threading.Event()

    def wait() -> None:
        with outside_slot():
            assert other.wait(TURN_S)

    pool.submit(wait)
    pool.submit(other.set)
    assert other.wait(TURN_S / 2)
    with outside_slot():
        pass
