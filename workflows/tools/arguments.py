"""The arguments of tools: JSON values that somebody wrote, or that templates gave.

Checked once, here; what is impossible is InvalidToolCall with the argument's name. A number
may come as text, since `--input` and templates inside texts give no other.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, final

from cas.errors import InvalidToolCall
from cas.retention import Retention, parse_retention

T = TypeVar("T")


@final
class Arguments:
    """Reads the arguments of one tool."""

    def __init__(self, tool: str) -> None:
        self._tool = tool

    def text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._refused(name, value, "a text")
        return value

    def maybe_text(self, name: str, value: Any) -> str | None:
        """A text; None and "" are none, for that is what an empty template gives."""
        return None if value is None or value == "" else self.text(name, value)

    def number(self, name: str, value: Any) -> float:
        """A finite number from 0 on."""
        try:
            found = float(value) if isinstance(value, int | float | str) else -1.0
        except (ValueError, OverflowError):
            found = -1.0
        if isinstance(value, bool) or not 0 <= found < float("inf"):
            raise self._refused(name, value, "a number from 0 on")
        return found

    def maybe_number(self, name: str, value: Any) -> float | None:
        return None if value is None else self.number(name, value)

    def whole(self, name: str, value: Any) -> int:
        """A whole number from 0 on, that a float can hold."""
        found = self.number(name, value)
        if found != int(found):
            raise self._refused(name, value, "a whole number")
        return int(found)

    def maybe_whole(self, name: str, value: Any) -> int | None:
        return None if value is None else self.whole(name, value)

    def flag(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self._refused(name, value, "true or false")
        return value

    def texts(self, name: str, value: Any) -> list[str]:
        """A list of texts."""
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._refused(name, value, "a list of texts")
        return [self.text(f"{name}[{index}]", one) for index, one in enumerate(value)]

    def retention(self, value: Any) -> Retention | None:
        """A retention policy; None is the store's own. Raises InvalidRetention too."""
        policy = self.maybe_text("retention_policy", value)
        return None if policy is None else parse_retention(policy)

    def reference(self, value: Any, name: str = "storage_ref") -> str:
        """A reference, or what `tools.storage.store` and uploads tell of a file."""
        if isinstance(value, Mapping) and "storage_ref" in value:
            value = value["storage_ref"]
        return self.text(name, value)

    def data(self, value: Any) -> bytes:
        """Bytes: a text as UTF-8, `{"base64": …}`, or (in Python) bytes themselves."""
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, Mapping) and list(value) == ["base64"]:
            try:
                return base64.b64decode(self.text("data.base64", value["base64"]), validate=True)
            except (binascii.Error, ValueError):
                raise InvalidToolCall(self._tool, "data.base64: not base64") from None
        raise self._refused("data", value, 'a text or {"base64": "…"}')

    def mapping(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self._refused(name, value, "an object")
        return dict(value)

    def _refused(self, name: str, value: Any, wanted: str) -> InvalidToolCall:
        # The kind alone: a value may be long, or a secret.
        return InvalidToolCall(self._tool, f"{name}: {wanted}, not {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    names = {type(None): "nothing", bool: "true or false", str: "this text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else "such a value")
