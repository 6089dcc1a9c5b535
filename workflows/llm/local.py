"""The model `local/extractive`, asked in its process: see `extractive`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from cas.errors import ToolFailed
from workflows.llm import confined, text_process
from workflows.llm.answer import Answer
from workflows.llm.documents import Document

NAME: Final = "local/extractive"
_ELSE: Final = "[llm] base_url names a provider for all else"


def ask(
    tool: str, tenant: str, prompt: str, documents: Sequence[Document], words_max: int | None
) -> Answer:
    """Its answer, of at most so many words where that is said; raises ToolFailed."""
    given = {
        "prompt": prompt,
        "sources": [{"text": one.text, "title": one.title} for one in documents],
        "words_max": words_max,
    }
    try:
        found = confined.work(tenant, text_process.EXTRACT, json.dumps(given).encode())
    except confined.TooCostly as error:
        raise ToolFailed(tool, f"{NAME}: {error}") from None
    except confined.Broken:
        raise ToolFailed(tool, f"{NAME} cannot shorten this") from None
    if found.get("problem") == text_process.NOTHING:
        raise ToolFailed(tool, f"{NAME} shortens texts, and this call has none; {_ELSE}")
    usage = {"input_words": found["input_words"], "output_words": found["output_words"]}
    return Answer(found["content"], NAME, "stop", usage)
