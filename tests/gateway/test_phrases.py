"""The words of the pages: none is missing, none is left over."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from gateway.errors import TABLE
from gateway.phrases import Phrases

GATEWAY = Path(str(files("gateway")))
SOURCES = [
    *GATEWAY.joinpath("static").glob("*.js"),
    *GATEWAY.joinpath("templates").glob("*.html"),
    GATEWAY / "upload_page.py",
    GATEWAY / "approval_page.py",
]
# Keys that are put together: what stands before the part that varies.
UPLOADS = ("row.", "closed.", "problem.", "missing.", "busy.", "large.", "month.")
APPROVALS = ("confirm.", "recorded.", "verdict.", "over.", "gone.", "slow.")
VARYING = (*UPLOADS, *APPROVALS)


def keys(language: str) -> set[str]:
    return set(re.findall(r'"([\w.]+)":', Phrases(language).module().decode())) - {"one", "other"}


def test_every_phrase_is_there_and_is_used() -> None:
    text = "\n".join(path.read_text() for path in SOURCES)
    used = set(re.findall(r"""["'`](\w+\.[\w.]+)["'`]""", text))
    there = keys("en")
    asked = set(re.findall(r"""say\(\s*["'](\w+\.[\w.]+)["']""", text))
    assert asked - there == set()
    assert {key for key in there - used if not key.startswith(VARYING)} == set()


def test_phrases_about_problems_name_codes_that_exist() -> None:
    codes = {row.code for row in TABLE.values()}
    own = {"offline", "unreadable", "unknown"}
    problems = {key.removeprefix("problem.") for key in keys("en") if key.startswith("problem.")}
    assert problems - codes - own == set()


def test_values_and_plurals_are_filled_in() -> None:
    english = Phrases("en")
    assert english.say("wanted.files", count=1) == "1 file"
    assert english.say("wanted.files", count=3) == "up to 3 files"
    assert english.say("choose.twice", name="<b>") == "“<b>” is in the list already."
