"""References: `hwy://uploads/{tenant_id}/{workflow_run_id}/{sha256}.{ext}`.

The authority names a family. Everything that becomes part of a reference, and the
names users give files, is checked here once; nothing below handles an unchecked string.
"""

from __future__ import annotations

import mimetypes
import re
import unicodedata
from typing import final

import msgspec

from cas.digest import Digest, parse_digest
from cas.errors import InvalidDigest, InvalidName, InvalidReference

SCHEME = "hwy"
UPLOADS = "uploads"
DIRECT_RUN = "direct"  # the run of files that no workflow stored
NAME_CHARS_MAX = 255  # what a filesystem the file may be saved on can hold

# One path segment of the reference; no percent-encoding is ever needed for it.
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_EXTENSION = re.compile(r"[a-z0-9]{1,16}", re.ASCII)
_LAST = re.compile(r"([0-9a-f]{64})\.([a-z0-9]{1,16})", re.ASCII)


@final
class Reference(msgspec.Struct, frozen=True):
    """A parsed reference; `str()` gives its one canonical text (ASCII, at most 400 chars)."""

    tenant_id: str
    workflow_run_id: str
    digest: Digest
    extension: str
    family: str = UPLOADS
    scheme: str = SCHEME

    def __str__(self) -> str:
        return (
            f"{self.scheme}://{self.family}/{self.tenant_id}/{self.workflow_run_id}"
            f"/{self.digest.hex()}.{self.extension}"
        )


def parse_reference(text: str, scheme: str = SCHEME) -> Reference:
    """Read a reference, with or without its `scheme://`; raises InvalidReference."""
    prefix = f"{scheme}://"
    parts = text.removeprefix(prefix).split("/")
    if len(parts) != 4:
        raise InvalidReference(text, f"not {prefix}FAMILY/TENANT/RUN/SHA256.EXT")
    family, tenant_id, run, last = parts
    for segment in (family, tenant_id, run):
        if not _SEGMENT.fullmatch(segment):
            raise InvalidReference(text, f"{segment!r} is not a segment of a reference")
    match = _LAST.fullmatch(last)
    if not match:
        raise InvalidReference(text, "does not end in a SHA-256 and an extension")
    try:
        digest = parse_digest(match[1])
    except InvalidDigest as error:
        raise InvalidReference(text, error.reason) from None
    return Reference(tenant_id, run, digest, match[2], family, scheme)


def check_segment(text: str, kind: str) -> str:
    """Pass a tenant or run identifier that fits a reference; raises InvalidName."""
    if not _SEGMENT.fullmatch(text):
        raise InvalidName(
            text, f"a {kind} is 1-128 of A-Z a-z 0-9 . _ - and begins with none of ._-"
        )
    return text


def check_name(text: str) -> str:
    """Pass a name or filename a user gave; raises InvalidName with the reason.

    A name is shown to people, written into headers and offered for saving, so separators
    (traversal), control characters (header splitting, terminals), bidirectional controls
    (`photo<RLO>gpj.exe` reads as an image) and lone surrogates are refused, not repaired:
    a repaired name could become another file's.
    """
    if not text or text != text.strip():
        raise InvalidName(text, "empty, or begins or ends with a space")
    if len(text) > NAME_CHARS_MAX:
        raise InvalidName(text[:32] + "…", f"longer than {NAME_CHARS_MAX} characters")
    if text in (".", ".."):
        raise InvalidName(text, "names a folder")
    if "/" in text or "\\" in text:
        raise InvalidName(text, "holds a path separator")
    if text.isprintable():  # none of the kinds below, and told at once: most names
        return text
    for char in text:
        # Cc control, Cs surrogate, Zl/Zp line breaks; Cf holds the bidirectional controls
        # and other invisible marks. The joiners are Cf too, but Persian and emoji need them.
        kind = unicodedata.category(char)
        if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and char not in "\u200c\u200d"):
            raise InvalidName(text, f"holds the control character U+{ord(char):04X}")
    return text


def extension_of(filename: str | None, content_type: str | None) -> str:
    """The extension a reference gets: the filename's, else the content type's, else `bin`."""
    if filename and "." in filename:
        extension = filename.rpartition(".")[2].lower()
        if _EXTENSION.fullmatch(extension):
            return extension
    if content_type:
        guessed = mimetypes.guess_extension(content_type.partition(";")[0].strip())
        if guessed and _EXTENSION.fullmatch(guessed[1:]):
            return guessed[1:]
    return "bin"
