"""Works on a text of strangers, in a process: `python text_process.py CPU_S_MAX JOB [ARGUMENT]`.

    pdf TEXT_BYTES_MAX   a PDF on stdin; its {"title", "text"} as JSON on stdout
    extract              {"prompt", "sources", "words_max"} on stdin; {"content", "input_words",
                         "output_words"} on stdout

or {"problem"}, one of those below.

Anybody with an upload link wrote the text, and a parser or a pattern that is led astray can only
be stopped from outside: here by the limits below, which end this process and nothing else. It is
started by its path, isolated, and imports of ours only what does the job.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

MEMORY_BYTES_MAX: Final = 2 << 30  # address space: the interpreter's own is in it
PAGES_MAX: Final = 2_000

_PR_SET_PDEATHSIG: Final = 1  # of Linux

PDF: Final = "pdf"
EXTRACT: Final = "extract"

ENCRYPTED: Final = "encrypted"
NOTHING: Final = "nothing"
TOO_COSTLY: Final = "costly"
TOO_MANY_PAGES: Final = "pages"
TOO_MUCH_TEXT: Final = "text"


def _pdf(data: bytes, text_bytes_max: str) -> dict[str, Any]:
    from workflows.llm import pdf_text

    return pdf_text.text_of(data, int(text_bytes_max))


def _extract(data: bytes) -> dict[str, Any]:
    from workflows.llm import extractive

    given = json.loads(data)
    sources = [extractive.Source(**one) for one in given["sources"]]
    words_max = given["words_max"]
    if words_max is None:
        words_max = extractive.WORDS_MAX
    try:
        found = extractive.extract(given["prompt"], sources, words_max)
    except extractive.NothingToShorten:
        return {"problem": NOTHING}
    return {
        "content": found.content,
        "input_words": found.input_words,
        "output_words": found.output_words,
    }


def _limit(cpu_s_max: int) -> None:
    # Nobody waits for it any more when the thread that started it, and waits, is gone: the whole
    # process that this was of was killed.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Where the machine's memory ends before the limit does, it is this process that goes.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s_max, cpu_s_max))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main() -> None:
    """Read stdin, write stdout; ends with an error for what the job cannot read."""
    cpu_s_max, job, *arguments = sys.argv[1:]
    _limit(int(cpu_s_max))
    jobs: dict[str, Callable[..., dict[str, Any]]] = {PDF: _pdf, EXTRACT: _extract}
    try:
        found = jobs[job](sys.stdin.buffer.read(), *arguments)
    except (MemoryError, RecursionError):
        found = {"problem": TOO_COSTLY}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    # The code of who started this, also where another copy of it is installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
