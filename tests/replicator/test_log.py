"""The background process's log: every line is whole, whatever was to be said."""

from __future__ import annotations

import json
import logging
import os
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.log_forms import LINE_BYTES_MAX
from replicator.log import Lines

LONG = "\N{PILE OF POO}" * 5_000  # twelve bytes each in JSON


def written(form: Literal["json", "text"], record: logging.LogRecord) -> bytes:
    read, write = os.pipe()
    try:
        Lines(form, write).emit(record)
        os.set_blocking(read, False)
        try:
            return os.read(read, 1 << 20)
        except BlockingIOError:
            return b""
    finally:
        os.close(read)
        os.close(write)


def record(message: Any, *words: Any, error: BaseException | None = None) -> logging.LogRecord:
    told = None if error is None else (type(error), error, None)
    return logging.LogRecord("blobcask.tests", logging.ERROR, __file__, 1, message, words, told)


@pytest.mark.parametrize("message", [LONG, "x" * 5_000, "\ud800" * 500, "\0" * 500])
def test_a_line_of_json_is_shortened_and_never_cut(message: str) -> None:
    line = written("json", record(message, error=ValueError(message)))
    assert len(line) <= LINE_BYTES_MAX
    facts = json.loads(line)
    head, _, tail = facts["message"].partition("\n…\n")
    assert message.startswith(head)
    assert message.endswith(tail)
    assert len(facts["message"]) > 50
    assert facts["trace"]


@given(st.text(st.characters(), max_size=600), st.sampled_from(["json", "text"]))
def test_whatever_is_logged_is_a_line(message: str, form: Literal["json", "text"]) -> None:
    line = written(form, record("%s", message, error=OSError(message)))
    assert line.endswith(b"\n")
    assert len(line) <= LINE_BYTES_MAX
    if form == "json":
        json.loads(line)


def test_a_message_that_does_not_fit_its_words_is_logged_and_raises_nothing() -> None:
    facts = json.loads(written("json", record("%d of %d", "three")))
    assert "%d of %d" in facts["message"]

    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError("no")

        __repr__ = __str__

    assert written("json", record(Unspeakable())) == b""


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        Lines("json", write).emit(record("hello"))
    finally:
        os.close(write)
