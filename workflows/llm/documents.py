"""The text of files, for models that read nothing else.

Of a PDF it is what the PDF says it is: the text layer, see `pdf_text`. A scan has none, and is
refused rather than passed on empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, final

from workflows.llm import confined, text_process

PDF: Final = "application/pdf"
_TEXT_TYPES: Final = re.compile(
    r"text/.*|application/(.*\+)?(json|xml|yaml|toml|x-yaml|x-ndjson|javascript|sql)", re.ASCII
)
_PDF_MARK: Final = b"%PDF-"
_PDF_MARK_WITHIN: Final = 1024  # bytes of white space that may stand before it
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_NO_TITLE: Final = re.compile(
    r".*\.(pdf|docx?|odt|tex|dvi|indd|txt)|untitled.*|microsoft \w+ - .*", re.IGNORECASE
)
_TITLE_CHARS_MAX: Final = 300


@final
class Unreadable(ValueError):
    """A file has no text that can be had; the text of this error says why."""


@final
@dataclass(frozen=True, slots=True)
class Document:
    """The text of a file. `name` is of a stranger's making, but one line without controls."""

    name: str
    content_type: str
    text: str
    title: str = ""  # as the file itself says; "" when it says none


def is_pdf(data: bytes, content_type: str) -> bool:
    """Whether this is a PDF; the bytes are believed before the type."""
    head = data[:_PDF_MARK_WITHIN].lstrip()
    return head.startswith(_PDF_MARK) or _plain(content_type) == PDF


def has_text(data: bytes, content_type: str) -> bool:
    """Whether this is a text as it is, as far as its type says."""
    return not is_pdf(data, content_type) and bool(_TEXT_TYPES.fullmatch(_plain(content_type)))


def read_document(
    tenant: str, data: bytes, content_type: str, name: str, text_bytes_max: int
) -> Document:
    """The text of a tenant's file; raises Unreadable."""
    name = one_line(name)
    if is_pdf(data, content_type):
        title, text = _pdf_text(tenant, data, text_bytes_max)
        return Document(name, PDF, text, title)
    if not has_text(data, content_type):
        raise Unreadable(
            f"{_plain(content_type) or 'a file without a type'} has no text that can be read"
        )
    if len(data) > text_bytes_max:
        raise Unreadable(_too_much(text_bytes_max))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("the text is not UTF-8") from None
    return Document(name, _plain(content_type), without_controls(text.replace("\r\n", "\n")))


def one_line(text: str, chars_max: int = 200) -> str:
    """What a stranger wrote, as a name that cannot leave its line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:chars_max]


def without_controls(text: str) -> str:
    """A stranger's text with a space for each control but tabs and line ends."""
    return _CONTROLS.sub(" ", text)


def _plain(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _too_much(text_bytes_max: int) -> str:
    return f"more text than the {text_bytes_max} bytes of [llm] text_max"


# --- PDF


def _pdf_text(tenant: str, data: bytes, text_bytes_max: int) -> tuple[str, str]:
    """Its title, and its text."""
    try:
        found = confined.work(tenant, text_process.PDF, data, str(text_bytes_max))
    except confined.TooCostly as error:
        raise Unreadable(f"the PDF: {error}") from None
    except confined.Broken:
        raise Unreadable("the PDF is damaged, or none") from None
    match found.get("problem"):
        case None:
            pass
        case text_process.ENCRYPTED:
            raise Unreadable("the PDF is encrypted and needs a password")
        case text_process.TOO_MANY_PAGES:
            raise Unreadable(f"the PDF has more than {text_process.PAGES_MAX} pages")
        case _:
            raise Unreadable(_too_much(text_bytes_max))
    text: str = found["text"]
    if not any(character.isalnum() for character in text):
        raise Unreadable("the PDF has no text: a scan has to go through text recognition first")
    title = one_line(found["title"], _TITLE_CHARS_MAX)
    return ("" if " " not in title or _NO_TITLE.fullmatch(title) else title), text
