"""Room for bodies in memory: so much for all, half of it for a tenant, half for all strangers, and
whose body gives way where there is none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import pytest

from cas.repeats import QUIET_S, Repeats
from gateway.pool import Pool
from gateway.room import Holder, NoRoom, Place, Room

ANN, BOB = Holder("ann", is_believed=True), Holder("192.0.2.7", is_believed=True)
CAROL = Holder("carol", is_believed=True)
HOME, WORK, TRAIN = Holder("192.0.2.7"), Holder("192.0.2.8"), Holder("192.0.2.9")
PATIENCE_S = 60.0


class Bodies:
    """Bodies of one room, of which those that are told to give way do."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.ended: list[Place] = []
        self._threads = ThreadPoolExecutor(1)

    def one(self, whose: Holder, count: int = 0) -> Place:
        """A body that has taken so much."""
        place = Place(whose, lambda: self.end(place))
        if count:
            self.room.take(place, count)
        return place

    def end(self, place: Place) -> None:
        self.ended.append(place)
        self._threads.submit(self.room.give_back, place)

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture
def bodies() -> Iterator[Bodies]:
    made = Bodies(Room(100))
    yield made
    made.close()


def test_a_tenant_has_half_of_the_room_and_others_the_rest(bodies: Bodies) -> None:
    place = bodies.one(ANN, 50)
    bodies.room.keep(place)
    with pytest.raises(NoRoom):
        bodies.room.take(place, 1)
    with pytest.raises(NoRoom):
        bodies.one(ANN, 1)
    bodies.one(HOME, 20)
    place = bodies.one(BOB, 30)  # a tenant is no address, whatever it is called
    with pytest.raises(NoRoom):
        bodies.room.take(place, 1)
    assert bodies.room.held_bytes == 100
    assert bodies.ended == []


def test_whoever_has_a_token_has_room_however_many_strangers_come(bodies: Bodies) -> None:
    for whose in (HOME, WORK):
        bodies.room.keep(bodies.one(whose, 25))
    for whose in (HOME, TRAIN):
        with pytest.raises(NoRoom):
            bodies.one(whose, 1)
    tenant = bodies.one(ANN, 50)
    for whose in (HOME, TRAIN):
        with pytest.raises(NoRoom):
            bodies.one(whose, 1)
    assert bodies.ended == []
    bodies.room.give_back(tenant)
    with pytest.raises(NoRoom):
        bodies.one(TRAIN, 1)


def test_what_is_given_back_can_be_taken_again_and_what_was_refused_was_not_taken(
    bodies: Bodies,
) -> None:
    place = bodies.one(ANN, 40)
    with pytest.raises(NoRoom):
        bodies.room.take(place, 11)
    bodies.room.take(place, 10)
    bodies.room.give_back(place)
    assert bodies.room.held_bytes == 0
    bodies.one(ANN, 50)


# --- giving way


def test_of_strangers_the_body_that_has_been_arriving_for_longest_gives_way(
    bodies: Bodies,
) -> None:
    """Who sends what can be used comes to its end; who only fills the room does not."""
    old = [bodies.one(whose, 10) for whose in (HOME, WORK, HOME, WORK)]
    whole = bodies.one(HOME, 5)
    bodies.room.keep(whole)
    tenant = bodies.one(ANN, 50)
    fast = bodies.one(TRAIN, 5)
    bodies.room.take(fast, 15)
    assert bodies.ended == old[:2]
    bodies.room.keep(fast)
    # Of an address that has its half of theirs, its own.
    bodies.one(HOME, 11)
    assert bodies.ended == old[:3]
    bodies.room.give_back(fast)
    bodies.one(HOME, 9)
    assert len(bodies.ended) == 3
    bodies.one(HOME, 1)
    assert [place.whose for place in bodies.ended[3:]] == [HOME]
    assert (whole.size_bytes, tenant.size_bytes, old[3].size_bytes) == (5, 50, 10)
    assert bodies.room.held_bytes <= 100


def test_a_body_that_has_been_arriving_for_longest_itself_ends_no_other(bodies: Bodies) -> None:
    """Else who trickles would displace all who came later."""
    trickling = bodies.one(HOME, 25)
    bodies.one(WORK, 25)
    with pytest.raises(NoRoom):
        bodies.room.take(trickling, 1)
    assert bodies.ended == []


def test_what_has_come_whole_stays_though_it_was_told_to_give_way(bodies: Bodies) -> None:
    room = bodies.room
    told = threading.Event()
    place = Place(HOME, told.set)
    room.take(place, 25)
    with ThreadPoolExecutor(1) as threads:
        taking = threads.submit(bodies.one, HOME, 1)
        assert told.wait(PATIENCE_S)
        room.keep(place)  # it came to its end meanwhile
        with pytest.raises(NoRoom):
            taking.result(PATIENCE_S)
    assert place.size_bytes == room.held_bytes == 25
    room.give_back(place)
    bodies.one(HOME, 25)


def test_who_holds_most_gives_way_to_who_holds_less_where_everything_is_taken(
    bodies: Bodies,
) -> None:
    old = [bodies.one(whose, 10) for whose in [ANN] * 5 + [BOB] * 3]
    mixed = bodies.one(HOME, 20)
    bodies.one(CAROL, 10)
    assert bodies.ended == old[:1]
    # Now they have 40, 30, 20 and 10: who asks for as much as the first has is refused.
    carols = bodies.one(CAROL)
    with pytest.raises(NoRoom):
        bodies.room.take(carols, 30)
    bodies.room.take(carols, 10)
    assert bodies.ended == old[:2]
    # Strangers, who are one of these, end what is theirs where nobody holds more.
    for place in old[2:5]:
        bodies.room.keep(place)
    bodies.one(WORK, 5)
    assert bodies.ended == [*old[:2], old[5]]
    for place in (*old[6:], carols):
        bodies.room.keep(place)
    bodies.one(TRAIN, 10)
    assert bodies.ended == [*old[:2], old[5], mixed]
    assert bodies.room.held_bytes <= 100


def test_who_holds_less_is_helped_however_long_it_has_been_arriving(bodies: Bodies) -> None:
    slow = bodies.one(CAROL, 1)
    large = bodies.one(ANN, 33)
    bodies.one(BOB, 33)
    bodies.one(ANN, 17)
    bodies.room.take(slow, 20)
    assert bodies.ended == [large]


def test_who_is_told_to_give_way_waits_for_nobody(bodies: Bodies) -> None:
    """So no two wait for each other."""
    told = threading.Event()
    first = Place(HOME, told.set)
    bodies.room.take(first, 25)
    with ThreadPoolExecutor(1) as threads:
        taking = threads.submit(bodies.one, HOME, 25)
        assert told.wait(PATIENCE_S)
        with pytest.raises(NoRoom):
            bodies.room.take(first, 1)
        bodies.room.give_back(first)
        assert taking.result(PATIENCE_S).size_bytes == 25


def test_one_body_gives_way_for_as_many_as_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room, waits = Room(100), threading.Semaphore(0)

    def outside_slot() -> AbstractContextManager[None]:
        waits.release()
        return nullcontext()

    monkeypatch.setattr("gateway.room.outside_slot", outside_slot)
    ended: list[str] = []
    first = Place(HOME, lambda: ended.append("first"))
    second = Place(HOME, lambda: ended.append("second"))
    room.take(first, 20)
    room.take(second, 5)
    with ThreadPoolExecutor(3) as threads:
        taking = []
        try:
            for count, so_far in ((10, ["first"]), (10, ["first"]), (5, ["first", "second"])):
                place = Place(HOME, lambda: ended.append("another"))
                taking.append(threads.submit(room.take, place, count))
                assert waits.acquire(timeout=PATIENCE_S)
                assert ended == so_far
        finally:
            room.give_back(second)
            room.give_back(first)
        for taken in taking:
            taken.result(PATIENCE_S)
    assert ended == ["first", "second"]
    assert room.held_bytes == 25


def test_who_waits_for_room_holds_no_slot_which_the_other_needs_to_leave() -> None:
    room, pool = Room(100), Pool(1)
    told, answered = threading.Event(), threading.Event()
    other = Place(HOME, told.set)
    room.take(other, 25)

    def sends() -> None:
        with pool.waiting():
            assert told.wait(PATIENCE_S)
        room.give_back(other)

    def asks() -> None:
        room.take(Place(HOME, lambda: None), 25)
        answered.set()

    pool.submit(sends)
    pool.submit(asks)
    assert answered.wait(PATIENCE_S)


# --- the log


def test_the_log_tells_once_a_minute_that_there_is_no_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times_s = iter((0.0, 1.0, QUIET_S - 1, QUIET_S, QUIET_S + 1))
    room = Room(100, Repeats(lambda: next(times_s)))
    place = Place(HOME, lambda: None)
    for _ in range(5):
        with pytest.raises(NoRoom):
            room.take(place, 26)
    assert len(caplog.messages) == 2
    assert "'192.0.2.7'" in caplog.messages[0]
    assert "3 bodies were refused" in caplog.messages[1]


def test_a_log_that_nobody_reads_stops_no_other_body(bodies: Bodies) -> None:
    room = bodies.room
    for _ in range(2):
        bodies.one(HOME, 10)
    taken: list[int] = []

    class Stuck(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            place = Place(ANN, lambda: None)
            # In a thread of its own, for the lock may be this one's.
            other = threading.Thread(target=room.take, args=(place, 1), daemon=True)
            other.start()
            other.join(PATIENCE_S)
            taken.append(place.size_bytes)

    log, stuck = logging.getLogger("blobcask.gateway"), Stuck()
    log.addHandler(stuck)
    try:
        bodies.one(HOME, 10)  # one gives way
        with pytest.raises(NoRoom):
            bodies.one(HOME, 26)  # and this is refused
    finally:
        log.removeHandler(stuck)
    assert taken == [1, 1]


def test_the_log_tells_that_bodies_give_way(
    bodies: Bodies, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        bodies.one(HOME, 25)
    assert len(bodies.ended) == 4
    assert len(caplog.messages) == 1
    assert "'192.0.2.7'" in caplog.messages[0]
    assert "1 bodies gave way" in caplog.messages[0]
