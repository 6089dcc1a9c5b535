"""What a webhook's call says, as a workflow reads it; the deepest JSON that is kept as such."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from cas.errors import InvalidWorkflow
from workflows.notation import LEVELS_MAX, check_depth, is_too_deep
from workflows.posted import readable, signed_object
from workflows.signatures import GITHUB, Call

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def called(body: str, media_type: str) -> Call:
    return Call({"Content-Type": media_type}, body.encode(), "https://files.example.org/")


def test_lists_and_objects_are_counted_and_what_is_in_the_last_is_not() -> None:
    for innermost in ("", "1", '"text"'):
        for levels, too_deep in ((LEVELS_MAX, False), (LEVELS_MAX + 1, True)):
            deep = json.loads("[" * levels + innermost + "]" * levels)
            assert is_too_deep(deep) is too_deep
    value: Any = {}
    for level in range(LEVELS_MAX):
        assert not is_too_deep(value)
        value = ({"a": 1, "b": value}, (1, value), [value])[level % 3]
    assert is_too_deep(value)
    assert not is_too_deep([nested(500), *range(500)])
    value = []
    value.append(value)
    with pytest.raises(InvalidWorkflow, match="too deep"):
        check_depth(value)


@pytest.mark.parametrize("levels", [LEVELS_MAX, 985, 5000, 100_000])
def test_a_body_that_is_nested_too_deep_is_kept_as_text(levels: int) -> None:
    """A run that waits for it has less of the stack left than who takes it."""
    assert readable(called(nested(levels), JSON), GITHUB) == ("text", nested(levels))
    packed = urlencode({"payload": nested(levels)})
    assert readable(called(packed, FORM), GITHUB) == ("form", {"payload": nested(levels)})
    assert signed_object(called(f'{{"a":{nested(levels)}}}', JSON), GITHUB) == {}


def test_the_deepest_body_is_read() -> None:
    """Which is a level deeper in its event."""
    deepest = nested(LEVELS_MAX - 1)
    assert readable(called(deepest, JSON), GITHUB) == ("json", json.loads(deepest))
