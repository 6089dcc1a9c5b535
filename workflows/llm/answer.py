"""What a language model answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `model` is the one that gave it, in the words of whoever runs it."""

    content: str
    model: str
    finish_reason: str
    usage: Mapping[str, Any]  # what it counted: tokens, or words
