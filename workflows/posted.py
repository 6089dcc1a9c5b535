"""What a webhook's call says, in the form in which a workflow reads it."""

from __future__ import annotations

from base64 import b64encode
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from workflows.notation import is_too_deep
from workflows.signatures import FORM, GITHUB, PARAMETERS_MAX, SLACK, Call


def readable(call: Call, kind: str) -> tuple[str, Any]:
    """The body as a workflow reads it: ("json", a value), ("form", names and values), ("text",
    text) or ("base64", text). A body that is not what it says, or is nested too deep, is kept as
    it came."""
    media_type = call.media_type
    if media_type == FORM:
        found = _form(call.body)
        value = None if found is None else _payload(found, kind)
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


def signed_object(call: Call, kind: str) -> dict[str, Any]:
    """The JSON object of a body, {} where it is none. The content type is not asked: it is
    signed by nobody, and must not decide what a call means."""
    value = _json(call.body)
    if value is None:
        found = _form(call.body)
        value = None if found is None else _payload(found, kind)
    return value[0] if value is not None and isinstance(value[0], dict) else {}


def _payload(form: dict[str, str | list[str]], kind: str) -> tuple[Any] | None:
    """What GitHub, where it is told to, and Slack, of what people do, send as one parameter."""
    payload = form.get("payload") if kind in (GITHUB, SLACK) and len(form) == 1 else None
    return _json(payload.encode()) if isinstance(payload, str) else None


def _json(text: bytes) -> tuple[Any] | None:
    """The value in a tuple, or None where there is none, or one that is too deep to be kept."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    # In its event it is a level deeper.
    return None if is_too_deep([value]) else (value,)


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
