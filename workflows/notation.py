"""Notation: the JSON or YAML that a definition is written in, as plain values.

What comes from here can be kept: it is JSON, in Unicode, and not nested without end. How deep
anything may be that is kept as JSON is said here, once: definitions, inputs, the payloads of
events, the results of tools.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import msgspec

from cas.errors import InvalidWorkflow

# Even with libyaml, YAML takes a hundred times as long as JSON, in a process that others need.
YAML_BYTES_MAX: Final = 128 << 10
# Fixed, and far from what any reader's stack takes: whoever reads a value later may have less of
# it left than who took it.
LEVELS_MAX: Final = 100
_WHAT: Final = "definition"
_PLAIN: Final = frozenset((str, int, float, bool, type(None)))
# With these PyYAML meets values that their tags do not go with, such as `!!bool x`.
_ODD: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_notation(text: str) -> Any:
    """The value that `text` writes down, in JSON or in YAML. Raises InvalidWorkflow."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise InvalidWorkflow(_WHAT, "too deep") from None
    except ValueError:
        if text.lstrip().startswith("{"):
            raise InvalidWorkflow(_WHAT, "not valid JSON") from None
        value = _yaml(text)
    check_depth(value)
    try:
        as_json(value)
    except ValueError as error:
        raise InvalidWorkflow(_WHAT, str(error)) from None
    return value


def as_json(value: Any) -> bytes:
    """JSON of a value that it keeps as it is. Raises ValueError, which says why it does not."""
    try:
        raw = msgspec.json.encode(value)
        json.dumps(value, allow_nan=False)  # msgspec writes NaN and the infinite as null
    except UnicodeEncodeError:
        # JSON can write it as \ud800, and nothing can keep it: it is no text in UTF-8.
        raise ValueError("it holds half of a surrogate pair") from None
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"it is no JSON value: {error}"[:300]) from None
    return raw


def _yaml(text: str) -> Any:
    # Late: who sends JSON does not pay for it.
    import yaml

    from workflows.yaml_loader import PlainLoader

    if len(text.encode(errors="surrogatepass")) > YAML_BYTES_MAX:
        reason = f"not valid JSON, and YAML may have {YAML_BYTES_MAX} bytes at most"
        raise InvalidWorkflow(_WHAT, reason)
    try:
        # All that it makes is plain values: it is a SafeLoader.
        return yaml.load(text, PlainLoader)  # noqa: S506
    except RecursionError:
        raise InvalidWorkflow(_WHAT, "too deep") from None
    except (yaml.YAMLError, *_ODD) as error:
        reason = " ".join(str(error).split())
        raise InvalidWorkflow(_WHAT, f"not valid YAML: {reason[:300]}") from None


def check_depth(value: Any) -> None:
    """Raises InvalidWorkflow for what has more than LEVELS_MAX levels."""
    if is_too_deep(value):
        raise InvalidWorkflow(_WHAT, f"too deep: more than {LEVELS_MAX} levels")


def is_too_deep(value: Any) -> bool:
    """Whether there are more than LEVELS_MAX lists and objects in each other, as there are in a
    circle. What stands in several places of a level is looked at once."""
    level = _nested([value])
    for _ in range(LEVELS_MAX):
        if not level:
            return False
        level = _nested(inner for one in level for inner in _members(one) or ())
    return bool(level)


def least_bytes(value: Any, enough: int) -> int:
    """How long a value is as JSON, at least; counted no further than past `enough`. What stands
    in several places counts in each, for so it is written. In a value that is not too deep."""
    found, rest = 1, [value]
    while rest and found <= enough:
        one = rest.pop()
        if isinstance(one, str | bytes | bytearray):
            found += len(one)
        elif isinstance(one, Mapping):
            found += 2 * len(one)
            rest += one.keys()
        members = _members(one) or ()
        found += len(members)
        if found <= enough:
            rest += members
    return found


def _nested(values: Iterable[Any]) -> list[Any]:
    return list({id(one): one for one in values if _members(one) is not None}.values())


def _members(value: Any) -> Collection[Any] | None:
    """What is in a list or an object; None for any other value."""
    if type(value) in _PLAIN:
        return None
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, msgspec.Struct):
        return [getattr(value, name) for name in value.__struct_fields__]
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    fields = getattr(type(value), "__attrs_attrs__", None)  # attrs: msgspec writes these, too
    return fields and [getattr(value, field.name, None) for field in fields]
