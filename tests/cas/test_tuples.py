"""Order-preserving keys."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.catalog.tuples import KEY_BYTES_MAX, Value, pack, unpack

# NUL and FF are what keys are made with; none is so long that it is hashed.
SHORT_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text(
    "\0ÿa", max_size=12
)
SHORT_BYTES = st.binary(max_size=12) | st.lists(st.sampled_from([0, 1, 255])).map(
    lambda numbers: bytes(numbers[:12])
)
NUMBERS = st.integers(0, (1 << 64) - 1)


@given(st.lists(st.tuples(SHORT_TEXT, NUMBERS, SHORT_BYTES), min_size=2, max_size=2))
def test_keys_sort_as_their_tuples_do(pair: list[tuple[str, int, bytes]]) -> None:
    left, right = pair
    as_bytes = [(text.encode(), number, data) for text, number, data in pair]
    assert (pack(left) < pack(right)) == (as_bytes[0] < as_bytes[1])
    assert (pack(left) == pack(right)) == (left == right)


@given(st.lists(SHORT_TEXT, min_size=1, max_size=4), st.lists(SHORT_TEXT, max_size=3))
def test_a_prefix_of_a_tuple_packs_to_a_prefix_of_its_key(head: list[str], tail: list[str]) -> None:
    assert pack([*head, *tail]).startswith(pack(head))


@given(SHORT_TEXT, SHORT_TEXT, SHORT_TEXT)
def test_no_other_tuple_begins_with_a_prefixs_key(one: str, other: str, tail: str) -> None:
    begins = pack([other, tail]).startswith(pack([one]))
    # Whatever follows a component is the code of the next one, never the FF of an escape.
    assert begins == (one == other) or pack([other, tail])[len(pack([one]))] == 0xFF


@given(st.integers(128, 400), st.sampled_from([b"x", b"\0", b"\xff"]))
def test_long_values_are_told_apart_and_sort_by_their_first_bytes(size: int, byte: bytes) -> None:
    value = byte * size
    assert pack([value]) != pack([value + byte])
    assert pack([value]) < pack([b"\xff" * 97]) or byte == b"\xff"
    assert len(pack([value])) <= 2 + 2 * 128


@given(st.integers(128, 300))
def test_no_short_value_spells_the_key_of_a_long_one(size: int) -> None:
    long = b"x" * size
    spelt = long[:96] + hashlib.sha256(long).digest()
    assert pack([long]) != pack([spelt])


def test_every_kind_of_value_has_its_own_keys() -> None:
    values: list[Value] = ["a", b"a", 97, "", b"", 0]
    assert len({pack([value]) for value in values}) == len(values)


def test_a_key_that_the_index_cannot_hold_is_refused() -> None:
    pack(["x" * 1000, "y" * 1000, "z" * 100])
    with pytest.raises(ValueError, match="too long"):
        pack(["\0" * 127] * 3)
    assert len(pack(["x" * 1000] * 3)) <= KEY_BYTES_MAX - 2


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_a_number_beyond_eight_bytes_is_refused(number: int) -> None:
    with pytest.raises(OverflowError):
        pack([number])


@given(st.lists(SHORT_TEXT | SHORT_BYTES | NUMBERS, max_size=5))
def test_a_key_can_be_read_again(values: list[Value]) -> None:
    assert unpack(pack(values)) == values


def test_a_key_with_a_long_part_is_read_as_what_stands_for_it() -> None:
    text, data, number = unpack(pack(["a" * 500, b"b" * 500, 7]))
    assert str(text).startswith("a" * 96)
    assert data == b"b" * 96 + hashlib.sha256(b"b" * 500).digest()
    assert number == 7
