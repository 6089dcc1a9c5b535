"""Leftovers are removed after the answer, all of them, in another thread."""

from __future__ import annotations

import logging
import threading
from functools import partial

import pytest

from cas.leftovers import Leftovers


def test_adding_does_not_wait_and_closing_does() -> None:
    leftovers, answered = Leftovers(), threading.Event()
    removed: list[int] = []
    leftovers.add(lambda: answered.wait(60))
    for number in range(10):
        leftovers.add(partial(removed.append, number))
    assert removed == []
    answered.set()
    leftovers.close()
    assert removed == list(range(10))


def test_a_flood_is_removed_by_those_who_add() -> None:
    leftovers, answered = Leftovers(), threading.Event()
    removed: list[threading.Thread] = []
    leftovers.add(lambda: answered.wait(60))
    for _ in range(200):
        leftovers.add(lambda: removed.append(threading.current_thread()))
    assert removed
    assert set(removed) == {threading.current_thread()}
    answered.set()
    leftovers.close()
    assert len(removed) == 200


def test_what_cannot_be_removed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(5, "broken")

    leftovers = Leftovers()
    removed: list[int] = []
    with caplog.at_level(logging.WARNING):
        leftovers.add(fail)
        leftovers.add(lambda: removed.append(1))
        leftovers.close()
    assert "broken" in caplog.text
    assert removed == [1]


def test_closing_twice_or_unused_is_harmless_and_adding_begins_again() -> None:
    leftovers = Leftovers()
    leftovers.close()
    removed: list[int] = []
    for number in range(2):
        leftovers.add(partial(removed.append, number))
        leftovers.close()
        leftovers.close()
    assert removed == [0, 1]
