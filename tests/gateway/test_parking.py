"""What parked requests are made of: bells that are heard once, and a lot that knows the time."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from cas.errors import TooManyWaiters
from gateway.board import ALIVE, AT_SINGLES, AT_TENANTS, WAITING, Board, Waiters
from gateway.parking import Lot, Parked
from gateway.worker import Worker

TURN_S = 60.0


def parked(patience_s: float = TURN_S) -> Parked:
    return Parked(None, "a request", patience_s)


@pytest.mark.parametrize("first", ["ring", "listen"])
def test_a_bell_is_heard_once_whether_it_rings_before_or_after(first: str) -> None:
    heard: list[str] = []
    one = parked()
    if first == "ring":
        one.ring()
    one.when_rung(lambda: heard.append("rung"))
    assert heard == (["rung"] if first == "ring" else [])
    one.ring()
    one.ring()
    assert heard == ["rung"]


def test_a_bell_that_rings_while_somebody_begins_to_listen_is_never_missed() -> None:
    for _ in range(500):
        one, heard = parked(), threading.Event()
        ringing = threading.Thread(target=one.ring)
        ringing.start()
        one.when_rung(heard.set)
        assert heard.wait(TURN_S)
        ringing.join()


def test_a_thread_that_waits_for_a_bell_goes_on_when_it_rings_or_the_time_is_over() -> None:
    one = parked()
    threading.Thread(target=one.ring).start()
    one.wait()
    parked(0.0).wait()


def test_leaving_is_done_once() -> None:
    left: list[str] = []
    one = parked()
    one.on_leaving([lambda: left.append("place"), lambda: left.append("watch")])
    one.leave()
    one.leave()
    assert sorted(left) == ["place", "watch"]


# --- the lot


def test_the_first_to_end_is_told_first_and_those_that_left_are_not() -> None:
    lot: Lot[str] = Lot()
    for name, ends_at_s in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("d", 4.0)):
        lot.add(name, ends_at_s)
    assert lot.remove("a")
    assert not lot.remove("a")
    assert lot.next_end_s() == 2.0
    ended = []
    for name in lot.over(3.0):
        ended.append(name)
        lot.remove(name)
    assert ended == ["b", "c"]
    assert (list(lot), "b" in lot, "d" in lot) == (["d"], False, True)


def test_one_that_comes_again_counts_by_its_later_end() -> None:
    lot: Lot[str] = Lot()
    lot.add("a", 1.0)
    lot.remove("a")
    lot.add("a", 5.0)
    assert list(lot.over(4.0)) == []
    assert list(lot.over(5.0)) == ["a"]


def test_a_lot_forgets_those_that_left_early() -> None:
    lot: Lot[int] = Lot()
    for number in range(10_000):
        lot.add(number, float(number + 10))
        lot.remove(number)
    assert len(lot) == 0
    assert len(vars(lot)["_by_end"]) < 100
    assert lot.next_end_s() == float("inf")


# --- the worker's loop


class Loop:
    """What parking needs of a worker that serves nobody, with its own methods."""

    _park, _resume, _on_parked = Worker._park, Worker._resume, Worker._on_parked

    def __init__(self) -> None:
        self.parked: Lot[Connection] = Lot()
        self.nr_conns = 1
        self.alive = True
        self.poller = selectors.DefaultSelector()
        self.method_queue = self
        self.tpool = self
        self.deferred: list[Callable[[], None]] = []
        self.served: list[Parked] = []

    def defer(self, act: Callable[..., None], *args: Any) -> None:
        self.deferred.append(partial(act, *args))

    def submit(self, serve: Callable[[], None]) -> None:
        serve()

    def _serve_parked(self, conn: Connection) -> None:
        assert conn.parked is not None
        self.served.append(conn.parked)
        conn.parked = None

    def park(self, conn: Connection, one: Parked) -> None:
        conn.parked = one
        cast(Any, self)._park(conn)

    def turn(self) -> None:
        while self.deferred:
            self.deferred.pop()()


class Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.parked: Parked | None = None
        self.early_bytes = 0


def test_a_bell_that_rings_late_ends_nothing_else_of_its_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop, conn = Loop(), Connection(ours)
        first, second = parked(), parked()
        loop.park(conn, first)
        cast(Any, loop)._resume(conn, first)  # its time is over
        first.ring()  # its watcher had begun to ring before it was told to stop
        loop.park(conn, second)
        loop.turn()
        assert (loop.served, len(loop.parked)) == ([first], 1)
        second.ring()
        loop.turn()
        assert (loop.served, len(loop.parked)) == ([first, second], 0)
        loop.poller.close()


# --- places


def test_places_are_counted_over_all_workers_and_within_each() -> None:
    board = Board(2)
    mine = Waiters(board, board.take(), most=3, most_here=2)
    theirs = Waiters(board, board.take(), most=3)
    mine.enter("a")
    mine.enter("b")
    with pytest.raises(TooManyWaiters):
        mine.enter("c")
    theirs.enter("c")
    with pytest.raises(TooManyWaiters):
        theirs.enter("d")
    mine.leave("a")
    theirs.enter("d")
    assert board.waiting() == 3


def test_a_tenant_has_half_of_the_places_over_all_workers() -> None:
    board = Board(2)
    mine, theirs = (Waiters(board, board.take(), most=8) for _ in range(2))
    for waiters in (mine, theirs, mine, theirs):
        waiters.enter("greedy")
    for waiters in (mine, theirs):
        with pytest.raises(TooManyWaiters) as refused:
            waiters.enter("greedy")
        assert (refused.value.waiters_max, "tenant" in str(refused.value)) == (4, True)
    for number in range(4):
        mine.enter(f"modest-{number}")
    with pytest.raises(TooManyWaiters):
        theirs.enter("modest-4")
    theirs.leave("greedy")
    mine.enter("greedy")  # wherever a place of it became free
    assert (board.waiting(), board.waiting_of("greedy")) == (8, 4)


def test_a_tenant_has_half_of_the_places_of_a_worker_and_one_in_any_case() -> None:
    board = Board(2)
    here = Waiters(board, board.take(), most=100, most_here=4)
    here.enter("greedy")
    here.enter("greedy")
    with pytest.raises(TooManyWaiters):
        here.enter("greedy")
    here.enter("modest")
    Waiters(Board(), 0, most=1).enter("alone")


def test_tenants_are_told_apart_among_many() -> None:
    board = Board()
    waiters = Waiters(board, board.take(), most=5000)
    for number in range(2000):
        waiters.enter(f"tenant-{number}")
    assert max(board.waiting_of(f"tenant-{number}") for number in range(2000)) < 20
    for number in range(2000):
        waiters.leave(f"tenant-{number}")
    assert board.waiting_of("tenant-0") == 0


def test_what_is_told_of_waiters_names_no_tenant() -> None:
    board = Board()
    Waiters(board, board.take(), most=10).enter("a tenant")
    totals = board.totals()
    assert (len(totals), totals[AT_SINGLES + WAITING]) == (AT_TENANTS, 1)


def test_the_places_of_a_worker_that_was_killed_are_free_again() -> None:
    board = Board(1)
    slot = board.take()
    Waiters(board, slot, most=1).enter("its tenant")
    board.give_back(slot)
    assert board.waiting_of("its tenant") == 0
    Waiters(board, board.take(), most=1).enter("its tenant")


def test_a_row_that_two_workers_share_is_not_forgotten_under_the_other() -> None:
    """Where there are more workers than rows: those that end their requests stay for long."""
    board = Board(2)
    board.take()
    last = board.take()
    waiters = Waiters(board, last, most=5)
    waiters.enter("its tenant")
    assert board.take() == last
    assert (board.waiting(), board.waiting_of("its tenant")) == (1, 1)
    board.give_back(last)
    assert (board.waiting(), board.totals()[AT_SINGLES + ALIVE]) == (1, 2)
    waiters.leave("its tenant")
    board.give_back(last)
    assert (board.waiting(), board.totals()[AT_SINGLES + ALIVE]) == (0, 1)
