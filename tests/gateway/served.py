"""A real server for tests: `blobcask serve` as a process, and a client that hides nothing."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

from tests.conftest import CHECKOUT

START_S = 30.0
# A worker that is just being forked may miss the arbiter's signal; the arbiter then ends it
# after its graceful timeout of 30 s.
STOP_S = 60.0
ANSWER_S = 60.0
PATIENCE_S = 60.0
ALONE = ("--no-replicator", "--no-runner")
ACCOMPANIED = ("--replicator", "--no-runner")
WITH_RUNNER = ("--no-replicator", "--runner")
COMPLETE = ("--replicator", "--runner")  # as it is for users
# As in pyproject.toml: errors, but for what the runner's engine brings along.
WARNINGS = "error,ignore:The anyio.abc.BlockingPortal alias is deprecated:DeprecationWarning"
# Off unless a test is about them: all tests come from one address.
RATES = (
    "TENANT_REQUESTS",
    "ADDRESS_REQUESTS",
    "GUESSES",
    "ALL_GUESSES",
    "TENANT_EVENTS",
    "TENANT_SUBMISSIONS",
)


def until(condition: Callable[[], object], what: str = "it never was so") -> None:
    """Look until it is so; other processes tell nobody when they are done."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        select.select((), (), (), 0.005)


@contextmanager
def held_port() -> Iterator[int]:
    """A port that no other program is given meanwhile; servers may come and go on it."""
    with socket.socket() as held:
        # Bound, and not listening: another one that says the same may have it as well.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        yield port


@final
@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def form(self) -> dict[str, Any]:
        form = json.loads(self.body)
        assert isinstance(form, dict)
        return form

    @property
    def code(self) -> str:
        """The stable code of a refusal, in capital letters where workflows are spoken to."""
        if self.headers["content-type"] == "application/json":
            assert self.form["status"] == "error"
            return str(self.form["code"])
        assert self.headers["content-type"] == "application/problem+json"
        assert self.form["status"] == self.status
        return str(self.form["code"])


@final
@dataclass
class Served:
    """A running server; `first` is the link it printed, `admin` the token."""

    process: subprocess.Popen[str]
    root: Path
    environ: Mapping[str, str]
    address: str
    admin: str = ""
    first: str = ""
    printed: list[str] = field(default_factory=list)
    _log: list[str] = field(default_factory=list)
    _more: threading.Condition = field(default_factory=threading.Condition)

    def logged(self, until: Callable[[list[str]], bool] = lambda _lines: True) -> list[str]:
        """The lines of its log so far, waiting for `until` to be content with them."""
        with self._more:
            found = self._more.wait_for(lambda: until(self._log), ANSWER_S)
            assert found, "not logged:\n" + "".join(self._log[-50:])
            return list(self._log)

    def drain(self) -> None:
        """Read what it logs to its end, so that its pipe never fills."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self._log.append(line)
                self._more.notify_all()

    @property
    def port(self) -> int:
        port = urlsplit(self.address).port
        assert port is not None
        return port

    def ask(
        self,
        method: str,
        url: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on its own connection; `url` may be absolute."""
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request(method, url.removeprefix(self.address), body, sent)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """A raw connection, for what no decent client sends."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_S)

    def token(self, *permissions: str, tenant: str = "default") -> str:
        """What `blobcask token` prints."""
        wanted = [word for name in permissions for word in ("--permission", name)]
        command = [sys.executable, "-m", "cas", "token", "--tenant", tenant, *wanted]
        run = subprocess.run(
            command, env=self.environ, cwd=CHECKOUT, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    def request_upload(self, **wanted: Any) -> dict[str, Any]:
        """Ask for files as the admin."""
        body = json.dumps({"name": "documents", **wanted})
        answer = self.ask("POST", "/api/v1/uploads", body, token=self.admin)
        assert answer.status == 201, answer.body
        return answer.form

    def objects(self) -> set[str]:
        """The names of all blobs, and of whatever else lies where bytes are written."""
        folders = (self.root / "objects", self.root / "partial")
        return {path.name for folder in folders for path in folder.rglob("*") if path.is_file()}

    def workers(self) -> list[int]:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children]


@contextmanager
def serving(
    root: Path,
    options: Sequence[str] = ALONE,
    listener: socket.socket | None = None,
    /,
    program: Sequence[str] = ("-m", "cas"),
    **settings: str,
) -> Iterator[Served]:
    """Run the server on a free port; `settings` are SECTION__KEY=value.

    With ACCOMPANIED the background process runs beside it, with WITH_RUNNER the one that runs
    workflows, and both with COMPLETE. A `listener` is handed over as systemd hands sockets to
    services. `program` is what Python runs, where a test needs another beginning.
    """
    environ = {
        **{name: value for name, value in os.environ.items() if "BLOBCASK" not in name},
        "BLOBCASK_STORE__ROOT": str(root),
        "BLOBCASK_GATEWAY__BIND": "127.0.0.1:0",
        **{f"BLOBCASK_LIMITS__{name}": "0/m" for name in RATES},
        "BLOBCASK_LIMITS__ADDRESS_CONNECTIONS": "0",
        "BLOBCASK_LIMITS__TENANT_RUNS": "0",
        "PYTHONWARNINGS": WARNINGS,
        "PYTHONUNBUFFERED": "1",
        **{f"BLOBCASK_{name}": value for name, value in settings.items()},
    }
    process = subprocess.Popen(
        [*_given(listener), sys.executable, *program, "serve", *options],
        env=environ,
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        pass_fds=() if listener is None else (listener.fileno(),),
        text=True,
    )
    drain: threading.Thread | None = None
    try:
        served = _read_start(process, root, environ)
        drain = threading.Thread(target=served.drain, daemon=True)
        drain.start()
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            if drain is not None:
                drain.join(ANSWER_S)  # its end of file is the end of the last worker
            assert process.stderr is not None
            process.stderr.close()


def _given(listener: socket.socket | None) -> list[str]:
    """What runs a command with `listener` as its descriptor 3."""
    if listener is None:
        return []
    return [sys.executable, "-c", _HAND_OVER, str(listener.fileno())]


_HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def _read_start(process: subprocess.Popen[str], root: Path, environ: Mapping[str, str]) -> Served:
    """Follow what a starting server prints, up to its last line."""
    served = Served(process, root, environ, "")
    assert process.stderr is not None
    for line in process.stderr:
        served.printed.append(line)
        text = line.strip()
        if text.startswith("Serving"):
            served.address = text.rpartition(" ")[2]
        elif text.startswith("eyJ"):
            served.admin = text
        elif "/u/" in text:
            served.first = text
            return served
        elif text.startswith("A token:"):
            return served
    raise AssertionError("the server ended: " + "".join(served.printed))
