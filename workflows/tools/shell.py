"""`tools.shell.run`: one command, without a shell, where `[workflows] allow_shell` says so.

The command is split into words first, and the templates of each word are filled in after
that: whatever a template gives stays inside its word, and no value of a run becomes a second
argument, another program or a redirection. The program itself is written out.

What is run is the operator's risk: it has the rights of the runner. It gets an empty folder
to work in, an environment that holds no secret, and a process group of its own that is killed
when it ends or its time is over. A process that leaves that group outlives it; so may one whose
runner was killed, and the step runs again then.
"""

from __future__ import annotations

import fcntl
import os
import re
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from typing import IO, Any, Final, final

import msgspec

from cas.clock import SECOND_US
from cas.errors import InvalidToolCall, ToolFailed
from workflows import templates
from workflows.tools.arguments import Arguments
from workflows.tools.calling import Calling
from workflows.tools.registry import SHELL, SHELL_BARRED, raw

_TOOL: Final = SHELL
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
# Where a template was while its text is split: no space or quote in it cuts a word.
_PLACE: Final = re.compile("\0([0-9]+)\0")
_CHUNK_BYTES: Final = 64 << 10
_SAID_CHARS_MAX: Final = 500  # of what a command that failed said, in the error


@raw
def run(calling: Calling, command: str) -> dict[str, Any]:
    """Run a command; the result is `{"stdout", "stderr", "exit_code", "truncated"}`.

    `command` is a program and its words, and no shell reads it: `|`, `>`, `&&` and `$(…)` are
    words like others, and `sh -c '…'` is the way to have them. It is split into words first, so
    what a template gives stays inside of its word; the program itself is no template.

    Each output is as `$(…)` would give it, without the newlines at its end, so that a condition
    can compare it. Its beginning is kept, up to `[workflows] shell_output`; `truncated` says
    whether there was more.

    Fails where the operator does not allow commands. Fails, and is tried again where the step
    has a retry policy, for an exit code that is not 0, for a signal, and after `shell_timeout`
    or the step's own time.
    """
    settings = calling.settings.workflows
    if not settings.allow_shell:
        raise ToolFailed(_TOOL, SHELL_BARRED)
    words = _words(calling, Arguments(_TOOL).text("command", command))
    with (
        tempfile.TemporaryDirectory(prefix="blobcask-shell-", ignore_cleanup_errors=True) as folder,
        _Command(words, folder) as running,
    ):
        most_s = settings.shell_timeout / SECOND_US
        limit_s = most_s if calling.timeout_s is None else min(most_s, calling.timeout_s)
        running.read(limit_s, settings.shell_output)
        return running.outcome()


def _words(calling: Calling, command: str) -> list[str]:
    """The words of the command, their templates filled in."""
    if "\0" in command:
        raise InvalidToolCall(_TOOL, "command: holds a NUL")
    pieces = templates.divided(command)
    given = pieces[1::2]
    pieces[1::2] = [f"\0{number}\0" for number in range(len(given))]
    try:
        split = shlex.split("".join(pieces))
    except ValueError as error:
        raise InvalidToolCall(_TOOL, f"command: {error}") from None
    if not split:
        raise InvalidToolCall(_TOOL, "command: names no program")
    if "\0" in split[0]:
        raise InvalidToolCall(_TOOL, "command: the program is written out, not a template")
    words = [
        _text(calling.render(_PLACE.sub(lambda match: given[int(match[1])], word)))
        if "\0" in word
        else word
        for word in split
    ]
    if any("\0" in word for word in words):
        raise ToolFailed(_TOOL, "a template gave a text with a NUL, which no argument can hold")
    return words


def _text(value: Any) -> str:
    """What a template gave, as templates inside of texts give it."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _said(output: bytes | bytearray) -> str:
    """One output as text, as `$(…)` gives it: a newline that is at the end of nearly every one
    would make each comparison with what a command says false."""
    return bytes(output).decode(errors="replace").rstrip("\n")


def _name(number: int) -> str:
    """Of a signal; those of real time have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@final
class _Command:
    """A running command; leaving it kills what is left of it."""

    def __init__(self, words: list[str], folder: str) -> None:
        self._words = words
        environment = {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder}
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment,
                start_new_session=True,  # a process group of its own, and no terminal
            )
        except OSError as error:
            raise ToolFailed(_TOOL, f"{words[0]!r} cannot be run: {error.strerror}") from None
        self._said: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._output_bytes_max = 0  # of each of them
        self._truncated = False

    def __enter__(self) -> _Command:
        return self

    def __exit__(self, *error: object) -> None:
        # The group has the number of its first process, which is not waited for before this:
        # nobody else has got the number meanwhile.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def read(self, timeout_s: float, output_bytes_max: int) -> None:
        """Read what it says until it ends, and keep so much; raises ToolFailed at its time.

        What it leaves running in the background is not waited for.
        """
        until = time.monotonic() + timeout_s
        self._output_bytes_max = output_bytes_max
        ended = os.pidfd_open(self._process.pid)
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(ended, selectors.EVENT_READ)
                for name in self._said:
                    pipe = self._pipe(name)
                    os.set_blocking(pipe.fileno(), False)
                    ready.register(pipe, selectors.EVENT_READ, name)
                while True:
                    left_s = until - time.monotonic()
                    events = ready.select(max(0.0, left_s))
                    if any(key.fd == ended for key, _ in events):
                        break
                    if left_s <= 0:  # looked at each time: it may talk without a pause
                        told = f"{self._words[0]!r} took over {timeout_s:g} s"
                        # Another attempt has the whole time again.
                        raise ToolFailed(_TOOL, told, again=True)
                    for key, _ in events:
                        if self._take(key.data, _CHUNK_BYTES) == 0:
                            ready.unregister(key.fileobj)
            for name in self._said:
                self._take_rest(name)
        finally:
            os.close(ended)

    def outcome(self) -> dict[str, Any]:
        """What a command that ended said; raises ToolFailed unless it ended well. Whether it
        would end better another time only its author knows: his retry policy says so."""
        code = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert code is not None
        said = {name: _said(data) for name, data in self._said.items()}
        if code.si_code != os.CLD_EXITED:
            told = f"{self._words[0]!r} was ended by {_name(code.si_status)}"
            raise ToolFailed(_TOOL, told, again=True)
        if code.si_status:
            why = (said["stderr"].strip() or said["stdout"].strip())[-_SAID_CHARS_MAX:]
            told = f"{self._words[0]!r} ended with {code.si_status}" + (f": {why}" if why else "")
            raise ToolFailed(_TOOL, told, again=True)
        return {**said, "exit_code": 0, "truncated": self._truncated}

    def _take(self, name: str, bytes_max: int) -> int:
        """Read a piece of one stream: how long it was, 0 at the end, -1 when nothing is there."""
        try:
            piece = os.read(self._pipe(name).fileno(), bytes_max)
        except BlockingIOError:
            return -1
        said = self._said[name]
        kept = piece[: self._output_bytes_max - len(said)]
        said += kept
        self._truncated |= len(kept) < len(piece)
        return len(piece)

    def _take_rest(self, name: str) -> None:
        """Read what a command that has ended left in its pipe, and not what others, whom it
        left running, go on to write."""
        rest = fcntl.fcntl(self._pipe(name).fileno(), fcntl.F_GETPIPE_SZ)
        while rest > 0 and (count := self._take(name, rest)) > 0:
            rest -= count

    def _pipe(self, name: str) -> IO[bytes]:
        pipe: IO[bytes] | None = getattr(self._process, name)
        assert pipe is not None
        return pipe
