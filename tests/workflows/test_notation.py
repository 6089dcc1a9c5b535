"""Notation: how deep and how long a value is, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import attrs
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from workflows.notation import LEVELS_MAX, is_too_deep, least_bytes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@dataclass
class Node:
    name: str
    children: list[Node] = field(default_factory=list)
    parent: Node | None = None


@attrs.define
class Pair:
    left: Any
    right: Any


class Looked(Mapping[str, Any]):
    """An object that counts how often it is looked into."""

    def __init__(self, **members: Any) -> None:
        self.members = members
        self.looks = 0

    def __getitem__(self, name: str) -> Any:
        return self.members[name]

    def __iter__(self) -> Iterator[str]:
        self.looks += 1
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)


def test_a_circle_is_too_deep_and_looked_at_once_a_level() -> None:
    root = Looked()
    children = [Looked(parent=root, number=number) for number in range(3)]
    root.members["children"] = children
    assert is_too_deep(root)
    assert root.looks <= LEVELS_MAX
    assert sum(child.looks for child in children) <= 3 * LEVELS_MAX


def test_members_of_classes_count_as_well() -> None:
    root = Node("root")
    root.children = [Node("a", [], root), Node("b", [], root)]
    assert is_too_deep(root)
    assert not is_too_deep(Node("root", [Node("a"), Node("b")]))
    deep: Any = 1
    for _ in range(LEVELS_MAX):
        deep = msgspec.defstruct("One", ["inner"])(deep)
    assert not is_too_deep(deep)
    assert is_too_deep([deep])


def test_what_stands_in_several_places_is_long() -> None:
    value: Any = "x"
    for _ in range(60):
        value = [value, value]
    assert not is_too_deep(value)
    assert least_bytes(value, 1000) > 1000
    assert least_bytes(["x" * 100] * 100, 5000) > 5000
    assert least_bytes([{"x" * 100: 1}] * 100, 5000) > 5000


@given(value=VALUES)
def test_a_value_is_never_held_to_be_longer_than_it_is(value: Any) -> None:
    assert least_bytes(value, 1 << 30) <= len(msgspec.json.encode(value))


def test_objects_of_attrs_are_looked_into() -> None:
    pair: Any = None
    for _ in range(40):
        pair = Pair(pair, pair)
    assert least_bytes(pair, 1000) > 1000
    pair.left = pair
    assert is_too_deep(pair)
