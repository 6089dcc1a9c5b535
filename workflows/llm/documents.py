"""The text of files, for models that read nothing else.

Of a PDF it is what the PDF says it is: the text layer. A scan has none, and is refused rather
than passed on empty. Page numbers and running heads go, and words that a line end divided are
whole again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from workflows.llm import pdf_process

PDF: Final = "application/pdf"
PDF_CPU_S_MAX: Final = 60
PDF_SECONDS_MAX: Final = 180.0  # of the clock: a machine may be busy with other things
_TEXT_TYPES: Final = re.compile(
    r"text/.*|application/(.*\+)?(json|xml|yaml|toml|x-yaml|x-ndjson|javascript|sql)", re.ASCII
)
_PDF_MARK: Final = b"%PDF-"
_PDF_MARK_WITHIN: Final = 1024  # bytes of white space that may stand before it
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_LIGATURES: Final = re.compile("[\ufb00-\ufb06]")
_DIVIDED: Final = re.compile(r"(\w+)[-\u00ad\u2010]\n(\w+)")
_PAGE_NUMBER: Final = re.compile(r"\W*(page )?\d{1,4}( (of|/) \d{1,4})?\W*", re.IGNORECASE)
_NO_TITLE: Final = re.compile(
    r".*\.(pdf|docx?|odt|tex|dvi|indd|txt)|untitled.*|microsoft \w+ - .*", re.IGNORECASE
)
_TOO_COSTLY: Final = "the PDF takes more time or memory than a document may"
_TITLE_CHARS_MAX: Final = 300
_RUNNING_PAGES_MIN: Final = 3  # fewer pages do not tell a running head from a repeated line


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


def read_document(data: bytes, content_type: str, name: str, text_bytes_max: int) -> Document:
    """The text of a file; raises Unreadable."""
    name = one_line(name)
    if is_pdf(data, content_type):
        title, text = _pdf_text(data, text_bytes_max)
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
    return Document(name, _plain(content_type), _CONTROLS.sub(" ", text.replace("\r\n", "\n")))


def one_line(text: str, chars_max: int = 200) -> str:
    """What a stranger wrote, as a name that cannot leave its line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:chars_max]


def _plain(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _too_much(text_bytes_max: int) -> str:
    return f"more text than the {text_bytes_max} bytes of [llm] text_max"


# --- PDF


def _pdf_text(data: bytes, text_bytes_max: int) -> tuple[str, str]:
    """Its title, and its text with empty lines between pages."""
    found = _pages_of(data, text_bytes_max)
    text = _tidy([_CONTROLS.sub(" ", page.replace("\r", "\n")) for page in found["pages"]])
    if not any(character.isalnum() for character in text):
        raise Unreadable("the PDF has no text: a scan has to go through text recognition first")
    title = one_line(found["title"], _TITLE_CHARS_MAX)
    return ("" if " " not in title or _NO_TITLE.fullmatch(title) else title), text


def _pages_of(data: bytes, text_bytes_max: int) -> dict[str, Any]:
    limits = [str(text_bytes_max), str(PDF_CPU_S_MAX)]
    words = [sys.executable, "-I", str(Path(pdf_process.__file__)), *limits]
    try:
        done = subprocess.run(
            words,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # pypdf's remarks quote the file
            env={},  # a parser of strangers' files needs none of our secrets
            cwd="/",
            timeout=PDF_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreadable(f"the PDF could not be read within {PDF_SECONDS_MAX:g} s") from None
    if done.returncode < 0:  # killed, at the limit of its time
        raise Unreadable(_TOO_COSTLY)
    if done.returncode != 0:
        raise Unreadable("the PDF is damaged, or none")
    found: dict[str, Any] = json.loads(done.stdout)
    match found.get("problem"):
        case None:
            return found
        case pdf_process.ENCRYPTED:
            raise Unreadable("the PDF is encrypted and needs a password")
        case pdf_process.TOO_COSTLY:
            raise Unreadable(_TOO_COSTLY)
        case pdf_process.TOO_MANY_PAGES:
            raise Unreadable(f"the PDF has more than {pdf_process.PAGES_MAX} pages")
        case _:
            raise Unreadable(_too_much(text_bytes_max))


def _tidy(pages: list[str]) -> str:
    lines = [[line.strip() for line in page.splitlines() if line.strip()] for page in pages]
    # The same first or last line on most pages: the running head, which would stand in the
    # middle of sentences.
    edges = Counter(line for page in lines for line in {*page[:1], *page[-1:]})
    running = {
        line
        for line, count in edges.items()
        if len(pages) >= _RUNNING_PAGES_MIN and count > len(pages) / 2
    }
    kept = [[line for line in page if line not in running] for page in lines]
    # A number is one of a page only at the page's edge; in between it may be a table's.
    for page in kept:
        for edge in (0, -1):
            if page and _PAGE_NUMBER.fullmatch(page[edge]):
                del page[edge]
    text = "\n".join("\n".join(page) for page in kept if page)
    text = _LIGATURES.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return _DIVIDED.sub(lambda found: _joined(found, text), text)


def _joined(divided: re.Match[str], text: str) -> str:
    """A word that a line end divided: with its hyphen where that is how the text writes it."""
    hyphenated = f"{divided[1]}-{divided[2]}"
    # Before a capital or a digit the hyphen is the word's own: "F-\nmeasure" may go either way,
    # "Cook-\nLevin" and "GPT-\n4" may not.
    own = not divided[2][0].islower() or hyphenated in text
    return hyphenated if own else divided[1] + divided[2]
