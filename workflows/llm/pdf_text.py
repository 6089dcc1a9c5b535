"""The text of a PDF, page by page as its author put it, made readable. For `text_process` alone.

Page numbers and running heads go, and words that a line end divided are whole again.

The text is of strangers. Each pattern here takes time in proportion to it: none begins in the
middle of a word, and none takes more of one than a real word has.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections import Counter
from typing import Any, Final

from pypdf import PdfReader
from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError

from workflows.llm.documents import without_controls
from workflows.llm.text_process import (
    ENCRYPTED,
    PAGES_MAX,
    TOO_COSTLY,
    TOO_MANY_PAGES,
    TOO_MUCH_TEXT,
)

_TITLE_CHARS_MAX: Final = 4 << 10  # of what the file says; what is shown of it is far less
_RUNNING_PAGES_MIN: Final = 3  # fewer pages do not tell a running head from a repeated line
_PAGE_NUMBER_CHARS_MAX: Final = 40

_LIGATURES: Final = re.compile("[\ufb00-\ufb06]")
_PART: Final = r"\w{1,60}"  # of a word: longer ones are no words, and stay as they are
_DIVIDED: Final = re.compile(rf"(?<!\w)({_PART})[-\u00ad\u2010]\n(?=({_PART}))")
_HYPHENATED: Final = re.compile(rf"(?<!\w)({_PART})-(?=({_PART}))")
_PAGE_NUMBER: Final = re.compile(r"\W*(page )?\d{1,4}( (of|/) \d{1,4})?\W*", re.IGNORECASE)


def text_of(data: bytes, text_bytes_max: int) -> dict[str, Any]:
    """Its title as its author gave it, and its text; or the problem.

    Raises anything: pypdf does, for files that are no PDF.
    """
    try:
        reader = PdfReader(io.BytesIO(data))
        if len(reader.pages) > PAGES_MAX:
            return {"problem": TOO_MANY_PAGES}
        pages: list[str] = []
        text_bytes = 0
        for page in reader.pages:
            # A font may map to half a character, which no JSON and no file can hold.
            raw = page.extract_text().encode(errors="replace")
            text_bytes += len(raw)
            if text_bytes > text_bytes_max:
                return {"problem": TOO_MUCH_TEXT}
            pages.append(raw.decode())
        title = reader.metadata.title if reader.metadata else None
    except (FileNotDecryptedError, DependencyError):
        return {"problem": ENCRYPTED}
    except LimitReachedError:
        return {"problem": TOO_COSTLY}
    named = str(title or "")[:_TITLE_CHARS_MAX].encode(errors="replace").decode()
    return {"title": named, "text": tidy(pages)}


def tidy(pages: list[str]) -> str:
    """The text of the pages, as one."""
    plain = [without_controls(page.replace("\r", "\n")) for page in pages]
    lines = [[line.strip() for line in page.splitlines() if line.strip()] for page in plain]
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
            if page and _is_page_number(page[edge]):
                del page[edge]
    text = "\n".join("\n".join(page) for page in kept if page)
    text = _LIGATURES.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    return _whole_words(text)


def _is_page_number(line: str) -> bool:
    return len(line) <= _PAGE_NUMBER_CHARS_MAX and bool(_PAGE_NUMBER.fullmatch(line))


def _whole_words(text: str) -> str:
    """Words that a line end divided: with the hyphen where that is how the text writes them."""
    hyphenated = set(_HYPHENATED.findall(text))

    def joined(divided: re.Match[str]) -> str:
        # Before a capital or a digit the hyphen is the word's own: "F-\nmeasure" may go either
        # way, "Cook-\nLevin" and "GPT-\n4" may not.
        own = not divided[2][0].islower() or divided.groups() in hyphenated
        return f"{divided[1]}-" if own else divided[1]

    return _DIVIDED.sub(joined, text)
