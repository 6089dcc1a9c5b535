"""Room for bodies in memory: so much for all, half of it for a tenant, half for all strangers."""

from __future__ import annotations

import pytest

from cas.repeats import QUIET_S, Repeats
from gateway.room import Holder, NoRoom, Room

ANN, BOB = Holder("ann", is_believed=True), Holder("192.0.2.7", is_believed=True)
HOME, WORK, TRAIN = Holder("192.0.2.7"), Holder("192.0.2.8"), Holder("192.0.2.9")


def test_a_tenant_has_half_of_the_room_and_others_the_rest() -> None:
    room = Room(100)
    room.take(ANN, 30)
    room.take(ANN, 20)
    with pytest.raises(NoRoom):
        room.take(ANN, 1)
    room.take(HOME, 20)
    room.take(BOB, 30)  # a tenant is no address, whatever it is called
    with pytest.raises(NoRoom):
        room.take(BOB, 1)
    assert room.held_bytes == 100


def test_whoever_has_a_token_has_room_however_many_strangers_come() -> None:
    room = Room(100)
    room.take(HOME, 25)
    with pytest.raises(NoRoom):
        room.take(HOME, 1)
    room.take(WORK, 25)
    with pytest.raises(NoRoom):
        room.take(TRAIN, 1)
    room.take(ANN, 50)
    room.give_back(WORK, 10)
    room.take(TRAIN, 10)


def test_what_is_given_back_can_be_taken_again_and_what_was_refused_was_not_taken() -> None:
    room = Room(100)
    room.take(ANN, 40)
    with pytest.raises(NoRoom):
        room.take(ANN, 11)
    room.take(ANN, 10)
    room.give_back(ANN, 50)
    assert room.held_bytes == 0
    room.take(ANN, 50)


def test_the_log_tells_once_a_minute_that_there_is_no_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times_s = iter((0.0, 1.0, QUIET_S - 1, QUIET_S, QUIET_S + 1))
    room = Room(100, Repeats(lambda: next(times_s)))
    for _ in range(5):
        with pytest.raises(NoRoom):
            room.take(HOME, 26)
    assert len(caplog.messages) == 2
    assert "'192.0.2.7'" in caplog.messages[0]
    assert "3 bodies were refused" in caplog.messages[1]
