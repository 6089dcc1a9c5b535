"""What a webhook's call says, in the form in which a workflow reads it."""

from __future__ import annotations

from base64 import b64encode
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from workflows.signatures import FORM, GITHUB, PARAMETERS_MAX, Call


def readable(call: Call, kind: str) -> tuple[str, Any]:
    """The body as a workflow reads it: ("json", a value), ("form", names and values), ("text",
    text) or ("base64", text). A body that is not what it says is kept as it came."""
    media_type = call.media_type
    if media_type == FORM:
        found = _form(call.body)
        if found is not None and kind == GITHUB and set(found) == {"payload"}:
            # GitHub's other form of the same.
            payload = found["payload"]
            value = _json(payload.encode()) if isinstance(payload, str) else None
            if value is not None:
                return "json", value[0]
        if found is not None:
            return "form", found
    elif media_type == "application/json" or media_type.endswith("+json"):
        value = _json(call.body)
        if value is not None:
            return "json", value[0]
    try:
        return "text", call.body.decode()
    except UnicodeDecodeError:
        return "base64", b64encode(call.body).decode()


def _json(text: bytes) -> tuple[Any] | None:
    """The value in a tuple, or None where there is none."""
    try:
        return (msgspec.json.decode(text),)
    except (msgspec.DecodeError, RecursionError):
        return None


def _form(body: bytes) -> dict[str, str | list[str]] | None:
    """Names and values; a name that is there several times has a list."""
    try:
        pairs = parse_qsl(
            body.decode(),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=PARAMETERS_MAX,
        )
    except ValueError:
        return None
    found: dict[str, str | list[str]] = {}
    for name, value in pairs:
        held = found.get(name)
        if held is None:
            found[name] = value
        elif isinstance(held, list):
            held.append(value)
        else:
            found[name] = [held, value]
    return found
