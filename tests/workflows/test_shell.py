"""`tools.shell.run`: one command without a shell, its words cut before templates are filled in."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from cas.clock import SECOND_US
from cas.config import Duration, Settings, Size
from cas.errors import InvalidWorkflow, ToolFailed
from workflows import templates
from workflows.tools import Calling, Place, default_registry, shell

NOWHERE = cast(Place, None)  # a command has no use for a place


def settings(**workflows: Any) -> Settings:
    return Settings(
        workflows=msgspec.structs.replace(Settings().workflows, allow_shell=True, **workflows)
    )


def filling_in(values: Mapping[str, str]) -> Callable[[str], str]:
    def render(text: str) -> str:
        for name, value in values.items():
            text = text.replace("{{" + name + "}}", value).replace("{{ " + name + " }}", value)
        return text

    return render


def run(command: str, given: Settings | None = None, **values: str) -> dict[str, Any]:
    calling = Calling("t", "r", "s", NOWHERE, given or settings(), render=filling_in(values))
    result: dict[str, Any] = default_registry().tool("tools.shell.run")(calling, command)
    return result


def test_nothing_runs_unless_the_operator_allows_it() -> None:
    with pytest.raises(ToolFailed, match=r"\[workflows\] allow_shell = yes") as refused:
        run("echo hello", Settings())
    assert not refused.value.again


def test_the_command_of_the_acceptance_workflow() -> None:
    said = run(
        "echo 'Workflow complete. Download your summary at: {{public_url}}'",
        public_url="https://files.example.org/d/1/a.txt?expires=1&signature=x",
    )
    assert said == {
        "stdout": "Workflow complete. Download your summary at: "
        "https://files.example.org/d/1/a.txt?expires=1&signature=x",
        "stderr": "",
        "exit_code": 0,
        "truncated": False,
    }


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "'; touch /tmp/owned; '",
        '"$(id)"',
        "a\nb",
        "`id` && true | cat > /x",
        "{{other}}",
        "$HOME *",
        "\\",
    ],
)
def test_what_a_template_gives_stays_one_word(value: str) -> None:
    assert run("printf %s|%s| {{ v }} 'and {{v}}'", v=value)["stdout"] == f"{value}|and {value}|"


def test_there_is_no_shell() -> None:
    assert run("echo $HOME > x | cat; *")["stdout"] == "$HOME > x | cat; *"


def test_spaces_and_quotes_inside_of_a_template_cut_no_word() -> None:
    calling = Calling("t", "r", "s", NOWHERE, settings(), render=lambda text: f"<{text}>")
    tool = default_registry().tool("tools.shell.run")
    assert tool(calling, "printf %s| {{ x['a b'].c }} end")["stdout"] == "<{{ x['a b'].c }}>|end|"


def test_braces_in_quotes_inside_of_a_template_do_not_end_it() -> None:
    command = """printf %s| {{ "}}" }} "{{ a ~ '}}' }}" {{ a }}b {{open"""
    known = templates.Rendering({"a": "v"})
    calling = Calling("t", "r", "s", NOWHERE, settings(), render=known.text)
    said = default_registry().tool("tools.shell.run")(calling, command)["stdout"]
    assert said == "}}|v}}|vb|{{open|"


@pytest.mark.parametrize(("value", "word"), [(3, "3"), ([1, "a b"], '[1,"a b"]'), (None, "null")])
def test_a_value_that_is_no_text_is_json(value: Any, word: str) -> None:
    calling = Calling("t", "r", "s", NOWHERE, settings(), render=lambda _text: value)
    assert default_registry().tool("tools.shell.run")(calling, "echo {{v}}")["stdout"] == word


def test_the_program_is_never_a_template() -> None:
    with pytest.raises(InvalidWorkflow, match="written out"):
        run("{{p}} -rf /", p="rm")


@pytest.mark.parametrize(
    ("command", "reason"),
    [("", "no program"), ("   ", "no program"), ("echo 'open", "quotation"), ("echo \0", "NUL")],
)
def test_what_is_no_command_is_refused(command: str, reason: str) -> None:
    with pytest.raises(InvalidWorkflow, match=reason):
        run(command)


def test_a_command_is_a_text() -> None:
    with pytest.raises(InvalidWorkflow, match="command: a text"):
        run(cast(str, ["echo", "x"]))


def test_a_template_with_a_nul_is_refused() -> None:
    with pytest.raises(ToolFailed, match="NUL"):
        run("echo {{v}}", v="a\0b")


def test_an_unknown_program_is_named() -> None:
    with pytest.raises(ToolFailed, match="'no-such-program' cannot be run: No such file") as failed:
        run("no-such-program")
    assert not failed.value.again


def test_the_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOBCASK_LLM__API_KEY", "secret")
    said = run("env")["stdout"]
    assert {line.partition("=")[0] for line in said.splitlines()} == {
        "PATH", "LANG", "HOME", "TMPDIR",
    }  # fmt: skip


def test_it_works_in_an_empty_folder_that_is_gone_afterwards() -> None:
    folder = run("sh -c 'ls -A; echo left > file; pwd'")["stdout"].strip()
    assert folder.startswith("/")
    assert not Path(folder).exists()


def test_it_reads_nothing_from_the_terminal() -> None:
    assert run("cat")["stdout"] == ""


def test_what_it_says_on_both_streams_is_kept_apart() -> None:
    said = run("sh -c 'echo out; echo err >&2'")
    assert (said["stdout"], said["stderr"]) == ("out", "err")


def test_outputs_are_without_the_newlines_at_their_end() -> None:
    said = run("printf '\\n two\\nlines \\n\\n'")
    assert said["stdout"] == "\n two\nlines "  # as `$(…)`: nothing else is taken away
    assert run("printf '\\n\\n'")["stdout"] == ""


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert run(r"printf 'a\377b'")["stdout"] == "a\ufffdb"


def test_an_exit_code_fails_the_step_with_what_was_said() -> None:
    with pytest.raises(ToolFailed, match="'sh' ended with 3: no luck") as failed:
        run("sh -c 'echo no luck >&2; exit 3'")
    assert failed.value.again


def test_a_signal_fails_the_step() -> None:
    with pytest.raises(ToolFailed, match="ended by SIGTERM") as failed:
        run("sh -c 'kill -TERM $$'")
    assert failed.value.again
    with pytest.raises(ToolFailed, match="ended by signal 40"):  # of real time: it has no name
        run("sh -c 'kill -40 $$'")


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(content: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not content():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_at_its_time_limit_it_is_killed_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    begins = iter([0.0])

    def monotonic() -> float:
        """Its time is over when it has begun all that it begins, however soon that was."""
        for now_s in begins:
            return now_s
        return 600.0 if pids.exists() and pids.read_text().endswith("\n") else 0.0

    monkeypatch.setattr(shell, "time", SimpleNamespace(monotonic=monotonic))
    with pytest.raises(ToolFailed, match="'sh' took over 600 s") as failed:
        run(
            f"sh -c 'sleep 600 & echo $! > {pids}; trap \"\" TERM; echo begun; sleep 600'",
            settings(shell_timeout=Duration(600 * SECOND_US)),
        )
    assert failed.value.again
    wait_until(lambda: gone(int(pids.read_text())))


def test_what_it_leaves_in_the_background_is_neither_waited_for_nor_left() -> None:
    begun = time.monotonic()
    said = run("sh -c 'sleep 600 & echo $!'")
    assert time.monotonic() - begun < 30
    wait_until(lambda: gone(int(said["stdout"])))


def test_of_what_it_says_the_beginning_is_kept() -> None:
    said = run("sh -c 'seq 1 100000; echo done >&2'", settings(shell_output=Size(4096)))
    assert said["stdout"].startswith("1\n2\n3\n")
    assert (len(said["stdout"]), said["stderr"], said["truncated"]) == (4096, "done", True)


def test_all_that_is_allowed_may_be_said() -> None:
    limited = settings(shell_output=Size(300_000))
    said = run("head -c 300000 /dev/zero", limited)
    assert (len(said["stdout"]), said["truncated"]) == (300_000, False)


def test_a_command_that_talks_without_end_is_killed_at_its_time() -> None:
    with pytest.raises(ToolFailed, match=r"took over 0\.5 s"):
        run("cat /dev/zero", settings(shell_timeout=Duration(SECOND_US // 2)))


def test_what_is_left_in_the_background_is_not_listened_to() -> None:
    begun = time.monotonic()
    said = run("sh -c 'yes & sleep 0.1; echo end >&2'", settings(shell_output=Size(1 << 24)))
    assert said["stderr"] == "end"
    assert time.monotonic() - begun < 30


def test_no_descriptor_is_left_open() -> None:
    run("true")
    gc.collect()  # what other tests have left does not go meanwhile
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run("true")
        with pytest.raises(ToolFailed):
            run("false")
        with pytest.raises(ToolFailed):
            run("no-such-program")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_it_takes_its_argument_before_templates_are_filled_in() -> None:
    registry = default_registry()
    raws = [name for name in registry.names if name != "tools.llm.call" and registry.tool(name).raw]
    assert raws == ["tools.shell.run"]
