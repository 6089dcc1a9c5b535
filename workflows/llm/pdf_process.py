"""Reads the text of one PDF, in a process: `python pdf_process.py TEXT_BYTES_MAX CPU_S_MAX`.

The PDF comes on stdin, and JSON goes to stdout: {"title", "pages"} or {"problem"}.

Anybody with an upload link wrote the file, and a parser that is led astray can only be stopped
from outside: here by the limits below, which end this process and nothing else. It is started
by its path, isolated, and imports nothing of ours.
"""

from __future__ import annotations

import io
import json
import resource
import sys
from typing import Any, Final

from pypdf import PdfReader
from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError

PAGES_MAX: Final = 2_000
MEMORY_BYTES_MAX: Final = 2 << 30  # address space: the interpreter's own is in it
ENCRYPTED: Final = "encrypted"
TOO_COSTLY: Final = "costly"
TOO_MANY_PAGES: Final = "pages"
TOO_MUCH_TEXT: Final = "text"


def text_of(data: bytes, text_bytes_max: int) -> dict[str, Any]:
    """The title as its author gave it, and the text of each page; or the problem.

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
    except (LimitReachedError, MemoryError, RecursionError):
        return {"problem": TOO_COSTLY}
    return {"title": str(title or "").encode(errors="replace").decode(), "pages": pages}


def main() -> None:
    """Read stdin, write stdout; ends with an error for what is no PDF."""
    text_bytes_max, cpu_s_max = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s_max, cpu_s_max))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    json.dump(text_of(sys.stdin.buffer.read(), text_bytes_max), sys.stdout)


if __name__ == "__main__":
    main()
