"""The two forms of a line of the log, alike in every process that writes to one stderr.

    {"at": "2026-02-03T04:05:06.789012Z", "level": "warning", "pid": 77, "event": "message",
     "logger": "blobcask.replicator", "message": …, "error": …, "trace": …}

A record with `facts` is an event: its message is the event's name, the facts its fields.
"""

from __future__ import annotations

import json
import logging
import select
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, Literal, final

LINE_BYTES_MAX: Final = select.PIPE_BUF  # 4,096 on Linux: the longest write that is never split
_TEXT_CHARS_MAX: Final = 400  # of any one field: somebody else may have chosen it
_TRACE_CHARS_MAX: Final = 2_400
# (field, trace) characters, tried in turn: one character may be 12 bytes in JSON.
_LIMITS: Final = ((_TEXT_CHARS_MAX, _TRACE_CHARS_MAX), (100, 900), (100, 200), (20, 100))


class _Form(logging.Formatter):
    """What both forms have in common: the facts of a record."""

    def __init__(
        self,
        redacted: Callable[[str], str] = str,
        context: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """`redacted` takes out of a message what opens something; `context` has what is known
        of every record of this thread."""
        super().__init__()
        self._redacted = redacted
        self._context = context

    def facts(self, record: logging.LogRecord) -> dict[str, Any]:
        """All that the line tells, in this order."""
        facts: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "pid": record.process,
            **self._context(),
        }
        given = getattr(record, "facts", None)
        if given is not None:
            return {**facts, "event": record.getMessage(), **given}
        facts |= {"event": "message", "logger": record.name}
        facts["message"] = self._redacted(_message(record))
        if record.exc_info and record.exc_info[1] is not None:
            facts["error"] = type(record.exc_info[1]).__name__
            facts["trace"] = _middle_cut(
                self._redacted(_trace(record.exc_info[1])), _TRACE_CHARS_MAX
            )
        return facts


@final
class JsonForm(_Form):
    """One JSON document a line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = self.facts(record)
        # ASCII: what a client sent cannot steer the terminal of whoever reads.
        for chars_max, trace_max in _LIMITS:
            line = json.dumps(_shortened(facts, chars_max, trace_max))
            if len(line) < LINE_BYTES_MAX:
                return line
        return json.dumps({name: facts[name] for name in ("at", "level", "pid", "event")})


@final
class TextForm(_Form):
    """A line for people; a trace follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        facts = _shortened(self.facts(record), _TEXT_CHARS_MAX)
        at, level, pid = facts.pop("at"), facts.pop("level"), facts.pop("pid")
        trace = facts.pop("trace", "")
        event = facts.pop("event")
        told = facts.pop("message", event)
        facts.pop("logger", None)
        rest = " ".join(f"{name}={_plain(value)}" for name, value in facts.items())
        line = f"{at} {level.upper():7} [{pid}] {_plain(told)} {rest}".rstrip()
        if trace:
            line += "".join(f"\n    {_plain(part)}" for part in trace.splitlines())
        return line


def form_of(
    name: Literal["json", "text"],
    redacted: Callable[[str], str] = str,
    context: Callable[[], dict[str, Any]] = dict,
) -> JsonForm | TextForm:
    """The form that `[log] format` names."""
    return (JsonForm if name == "json" else TextForm)(redacted, context)


def line_of(form: logging.Formatter, record: logging.LogRecord) -> bytes:
    """The line, with its end: never longer than LINE_BYTES_MAX."""
    line = form.format(record).encode(errors="backslashreplace")
    return line[: LINE_BYTES_MAX - 1] + b"\n"


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001  a bug of who logged; better half of it than none
        return f"{record.msg!r} does not fit its arguments: {type(error).__name__}"


def _plain(value: object) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _middle_cut(text: str, chars_max: int) -> str:
    """`text` with its middle left out when it is long: a trace tells most at its ends."""
    if len(text) <= chars_max:
        return text
    head = chars_max // 4
    return f"{text[:head]}\n…\n{text[head - chars_max :]}"


def _shortened(facts: dict[str, Any], chars_max: int, trace_max: int = _TRACE_CHARS_MAX) -> Any:
    return {
        name: _middle_cut(value, trace_max if name == "trace" else chars_max)
        if isinstance(value, str)
        else value
        for name, value in facts.items()
    }
