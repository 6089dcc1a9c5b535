"""What the upload page says, in one file for server and script: `templates/en.json`.

A phrase is a text with `{values}`, or one text for each plural category of its `count`
(one, other), as Unicode names them. Another language is another such file, its categories
chosen by its own rule; the script takes them from the browser's `Intl.PluralRules`.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Final, final

_VALUE: Final = re.compile(r"\{(\w+)\}")


@final
class Phrases:
    """The phrases of one language."""

    def __init__(self, language: str) -> None:
        path = files("gateway").joinpath("templates", f"{language}.json")
        self.language = language
        self._phrases: dict[str, str | dict[str, str]] = json.loads(path.read_bytes())

    def __contains__(self, key: object) -> bool:
        return key in self._phrases

    def say(self, key: str, **values: object) -> str:
        """The phrase with its values filled in, as plain text; raises KeyError."""
        phrase = self._phrases[key]
        if isinstance(phrase, dict):
            phrase = phrase["one" if values["count"] == 1 else "other"]
        return _VALUE.sub(lambda match: str(values[match[1]]), phrase)

    def module(self) -> bytes:
        """All phrases as a module of the page's script."""
        text = json.dumps(self._phrases, ensure_ascii=False, indent=1)
        return f'export const language = "{self.language}";\nexport default {text};\n'.encode()


ENGLISH: Final = Phrases("en")
