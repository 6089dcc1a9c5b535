"""Room for bodies in memory: so much for all, and half of it for one."""

from __future__ import annotations

import pytest

from gateway.room import NoRoom, Room

ANN, BOB, CY = ("tenant", "ann"), ("address", "192.0.2.7"), ("tenant", "192.0.2.7")


def test_one_has_half_of_the_room_and_others_the_rest() -> None:
    room = Room(100)
    room.take(ANN, 30)
    room.take(ANN, 20)
    with pytest.raises(NoRoom):
        room.take(ANN, 1)
    room.take(BOB, 40)
    room.take(CY, 10)  # a tenant is no address, whatever it is called
    with pytest.raises(NoRoom):
        room.take(CY, 1)
    assert room.held_bytes == 100


def test_what_is_given_back_can_be_taken_again_and_what_was_refused_was_not_taken() -> None:
    room = Room(100)
    room.take(ANN, 40)
    with pytest.raises(NoRoom):
        room.take(ANN, 11)
    room.take(ANN, 10)
    room.give_back(ANN, 50)
    assert room.held_bytes == 0
    room.take(ANN, 50)
