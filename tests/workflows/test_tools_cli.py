"""`blobcask workflow tools`: what those who write workflows are told of what steps can call."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from cas.cli import main
from workflows.tools import Calling, built_in
from workflows.tools.registry import BUILT_IN


def translate(calling: Calling, text: str, *, to: str = "en") -> str:
    """Translate a text.

    `to` is the language.
    """
    raise NotImplementedError


def gone() -> Callable[..., Any]:
    raise ImportError("no module named acme")


def odd() -> Callable[..., Any]:
    raise RuntimeError("no license")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other packages bring, beside the built-in tools."""
    registry = built_in()
    registry.add("tools.acme.translate", translate)
    registry.add_lazily("tools.acme.gone", gone)
    registry.add_lazily("tools.acme.odd", odd)
    monkeypatch.setattr("workflows.tools.registry.default_registry", lambda: registry)


def told(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["workflow", "tools", *words], prog_name="blobcask")
    assert result.exit_code == code, result.output
    return result.output


def test_each_tool_is_told_with_its_arguments_and_what_it_does() -> None:
    lines = told().splitlines()
    assert set(BUILT_IN) <= {line.partition("(")[0] for line in lines}
    at = lines.index("tools.acme.translate(text, *, to='en')")
    assert lines[at + 1] == "    Translate a text."
    assert "tools.storage.get_url(storage_ref, expires_in=3600)" in lines
    # One that cannot be loaded keeps nobody from the others.
    at = lines.index("tools.acme.gone")
    assert lines[at + 1] == "    cannot be loaded: no module named acme"
    at = lines.index("tools.acme.odd")
    assert lines[at + 1] == "    cannot be loaded: RuntimeError: no license"


def test_of_one_tool_all_is_told() -> None:
    assert told("tools.acme.translate").splitlines() == [
        "tools.acme.translate(text, *, to='en')",
        "",
        "Translate a text.",
        "",
        "`to` is the language.",
    ]
    assert told("tools.acme.gone", code=13) == (
        "Error: tools.acme.gone: cannot be loaded: no module named acme\n"
    )
    assert "no such tool; there are" in told("tools.acme.none", code=2)


def test_programs_read_it_as_json() -> None:
    (found,) = (
        tool
        for tool in json.loads(told("--json"))["tools"]
        if tool["name"] == "tools.acme.translate"
    )
    assert found == {
        "name": "tools.acme.translate",
        "signature": "tools.acme.translate(text, *, to='en')",
        "doc": "Translate a text.\n\n`to` is the language.",
    }
    assert json.loads(told("tools.acme.translate", "--json")) == found


def test_of_a_server_nothing_is_told() -> None:
    told("--server", "http://127.0.0.1:1", "--token", "x", code=2)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_the_docstring_of_a_tool_tells_each_of_its_arguments(name: str) -> None:
    function = built_in().tool(name).function
    _, *arguments = inspect.signature(function).parameters
    doc = inspect.getdoc(function) or ""
    assert [each for each in arguments if not re.search(rf"`{each}\b", doc)] == []
    assert "result" in doc or name in ("tools.storage.retrieve", "tools.storage.get_url")
