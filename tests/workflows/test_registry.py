"""The registry: tools by name, the built-in ones and those of installed packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from cas.errors import InvalidToolCall, InvalidWorkflow, ToolFailed
from cas.records import Event, Subscription
from tests.conftest import CHECKOUT
from workflows.events import Claimed
from workflows.tools import Calling, Place, Registry, Waiting, built_in, default_registry, raw
from workflows.tools.registry import installed

NOWHERE = cast(Place, None)
CALLING = Calling("t", "r", "sum", NOWHERE, iteration="2")

ACME = """
def translate(calling, text, to="en"):
    return {"text": text, "to": to, "tenant": calling.tenant_id}
"""


def test_the_tools_that_workflows_know() -> None:
    assert set(built_in().names) == {
        "tools.storage.store", "tools.storage.retrieve", "tools.storage.get_url",
        "tools.storage.delete", "tools.storage.request_upload",
        "tools.workflow.wait_for_event", "tools.workflow.request_approval",
        "tools.workflow.register_webhook", "tools.llm.call", "tools.shell.run",
    }  # fmt: skip


def test_each_built_in_tool_is_there() -> None:
    registry = built_in()
    for name in registry.names:
        assert callable(registry.tool(name).function), name


def test_knowing_the_names_loads_none_of_the_libraries() -> None:
    script = (
        "import sys; from workflows.tools.registry import default_registry;"
        "assert default_registry().names;"
        "heavy = {'openai', 'pypdf', 'sumy', 'numpy', 'stabilize'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)


def test_what_is_installed_brings_its_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_tools.py").write_text(ACME)
    about = tmp_path / "acme_tools-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-tools\nVersion: 1.0\n")
    points = about / "entry_points.txt"
    points.write_text("[blobcask.tools]\ntools.acme.translate = acme_tools:translate\n")
    monkeypatch.syspath_prepend(tmp_path)
    tool = installed().tool("tools.acme.translate")
    assert tool(CALLING, "Hallo") == {"text": "Hallo", "to": "en", "tenant": "t"}
    points.write_text("[blobcask.tools]\ntools.acme.gone = acme_tools:gone\n")
    with pytest.raises(ToolFailed, match=r"tools\.acme\.gone: cannot be loaded"):
        installed().tool("tools.acme.gone")(CALLING)
    points.write_text("[blobcask.tools]\ntools.storage.store = acme_tools:translate\n")
    with pytest.raises(ValueError, match=r"'tools\.storage\.store' already"):
        installed()


@pytest.mark.parametrize("name", ["", "tools", "tools.", "Tools.a", "tools.a b", "tools.ä"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a tool"):
        Registry().add(name, lambda calling: None)


def test_an_unknown_tool_is_told_with_those_there_are() -> None:
    registry = Registry()
    registry.add("tools.a.b", lambda calling: None)
    assert "tools.a.b" in registry
    says = r"^tool 'tools\.a\.c': no such tool; there are tools\.a\.b"
    with pytest.raises(InvalidToolCall, match=says) as refused:
        registry.tool("tools.a.c")
    assert isinstance(refused.value, InvalidWorkflow)


def test_only_marked_tools_are_raw() -> None:
    @raw
    def quote(calling: Calling, text: str) -> Any:
        return calling.render(text)

    registry = Registry()
    registry.add("tools.a.quote", quote)
    registry.add("tools.a.plain", lambda calling: None)
    assert (registry.tool("tools.a.quote").raw, registry.tool("tools.a.plain").raw) == (True, False)


def test_arguments_are_checked_without_a_call() -> None:
    tool = default_registry().tool("tools.storage.store")
    tool.check([], {"name": "{{a}}", "data": "{{b}}"})
    tool.check(["a", "b"], {})
    says = r"^tool 'tools\.storage\.store': too many positional arguments; it is called with "
    takes = r"\(name, data, content_type=None, retention_policy=None, filename=None\)$"
    with pytest.raises(InvalidToolCall, match=says + takes):
        tool.check(["x"] * 9, {})


def test_a_step_has_its_keys_to_itself() -> None:
    other = Calling("t", "r", "sum", NOWHERE, iteration="3")
    assert CALLING.step_name == "sum#2"
    assert CALLING.key("upload") == CALLING.key("upload")
    keys = {CALLING.key("upload"), CALLING.key("approval"), other.key("upload")}
    assert len(keys) == 3


def claimed(event: bytes | None) -> Claimed:
    wait = Subscription("s", "t", "r", "sum", "e", None, 0, None, None, None, None)
    happened = None if event is None else Event("i", "t", "e", None, event, 0)
    return Claimed(wait, happened)


def test_a_wait_comes_to_the_payload_of_its_event() -> None:
    assert Waiting("tools.a.b", "e").result(claimed(b'{"a": [1]}')) == {"a": [1]}


def test_a_wait_makes_of_its_event_what_its_tool_says() -> None:
    def count(came: Claimed) -> Any:
        return len(came.payload)

    assert Waiting("tools.a.b", "e", then=count).result(claimed(b"[1, 2]")) == 2


def test_a_wait_whose_time_is_over_fails_its_step() -> None:
    waiting = Waiting("tools.a.b", "e", timeout_s=90)
    with pytest.raises(ToolFailed, match=r"tools\.a\.b: 'e' did not come: timed out after 90 s"):
        waiting.result(claimed(None))
