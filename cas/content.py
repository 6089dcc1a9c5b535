"""What bytes are, judged by the bytes: neither by a name nor by what a client says."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable
from pathlib import Path
from typing import final

import msgspec
import puremagic

from cas.elsewhere import Fetched

_HEAD_BYTES = 64 << 10  # all magic numbers in use lie in the first few KiB

_SAME = ({"jpg", "jpeg", "jpe", "jfif"}, {"tif", "tiff"}, {"htm", "html"}, {"yml", "yaml"})
# Kinds that have no magic number: anything that reads as text may be one of them.
_TEXT = frozenset("txt text csv tsv md log json ndjson xml yaml yml toml ini sql".split())
# Text that a browser runs is named by what it is, never let through as plain text.
_ACTIVE = frozenset("html htm svg xhtml".split())
_SURE = 0.4  # four bytes of magic, in the measure of puremagic
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f\x1b")


@final
class Content(msgspec.Struct, frozen=True):
    """What bytes may be: `extensions` without dots, and how to say it to a person."""

    extensions: frozenset[str]
    content_type: str | None  # None where the bytes do not tell
    described: str

    def is_one_of(self, allowed: Iterable[str]) -> bool:
        """Whether any of the allowed extensions names what the bytes are."""
        wanted = {extension.lower().removeprefix(".") for extension in allowed}
        for same in _SAME:
            if wanted & same:
                wanted |= same
        return not self.extensions.isdisjoint(wanted)


def look_at(path: Path) -> Content:
    """Judge the file at `path` by its first bytes; raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return judge(file.read(_HEAD_BYTES))


def look_into(stream: io.RawIOBase, size_bytes: int) -> Content:
    """The same for a stream of `size_bytes`; raises what reading it raises."""
    wanted_bytes = min(_HEAD_BYTES, size_bytes)
    if isinstance(stream, Fetched):
        stream.only(0, wanted_bytes)  # so that its end proves the bytes
    head = b""
    while len(head) < wanted_bytes and (piece := stream.read(wanted_bytes - len(head))):
        head += piece
    return judge(head)


def judge(head: bytes) -> Content:
    """Judge by the first bytes of a file (64 KiB of them, or all)."""
    if not head:
        return Content(frozenset(), None, "empty")
    try:
        matches = puremagic.magic_string(head)
    except puremagic.PureError:
        matches = []
    # Sorted by confidence. A match without a type is a guess of one or two bytes.
    named = [match for match in matches if match.extension and match.mime_type]
    text = _reads_as_text(head)
    if named and not text:
        best = named[0]
        kinds = frozenset(m.extension.lstrip(".") for m in named if m.confidence >= best.confidence)
        return Content(kinds, best.mime_type, _described(best.extension, best.name))
    if text:
        found = frozenset(match.extension.lstrip(".") for match in named)
        if active := found & _ACTIVE:
            return Content(active, "text/html", f"{min(active)} text")
        # Some formats begin as text does (PDF, PostScript, RTF) and say so clearly.
        sure = [m for m in named if m.confidence >= _SURE and m.extension.lstrip(".") not in _TEXT]
        if sure:
            kinds = frozenset(match.extension.lstrip(".") for match in sure)
            return Content(kinds, sure[0].mime_type, _described(sure[0].extension, sure[0].name))
        return Content(_TEXT, None, "plain text")
    return Content(frozenset(), None, "of no kind that is known here")


def _described(extension: str, name: str) -> str:
    kind = extension.lstrip(".").upper()
    return f"a {kind} file" if kind else name


def _reads_as_text(head: bytes) -> bool:
    if not _CONTROL.isdisjoint(head):
        return False
    try:
        # The head may end inside a character; that is no fault.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
