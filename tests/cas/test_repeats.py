"""What happens again and again is told once a minute, and costs no more memory for it."""

from __future__ import annotations

from cas.repeats import KEYS_MAX, QUIET_S, Repeats


def test_the_same_is_told_once_a_minute_with_how_often_it_happened() -> None:
    now_s = 0.0
    repeats = Repeats(lambda: now_s)
    assert [repeats.note(key) for key in ("ann", "ann", "bob", "ann")] == [1, 0, 1, 0]
    now_s += QUIET_S - 1
    assert repeats.note("ann") == 0
    now_s += 1
    assert [repeats.note("ann"), repeats.note("ann"), repeats.note("bob")] == [4, 0, 1]


def test_of_more_keys_than_are_kept_the_oldest_go() -> None:
    now_s = 0.0
    repeats = Repeats(lambda: now_s)
    for number in range(KEYS_MAX):
        assert repeats.note(f"{number}") == 1
    now_s += QUIET_S
    assert repeats.note("0") == 1  # it is the youngest now
    assert repeats.note("another") == 1
    assert repeats.known == KEYS_MAX
    assert repeats.note("0") == 0
    assert repeats.note("2") == 1
    assert repeats.known == KEYS_MAX
