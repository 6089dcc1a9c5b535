"""An OpenAI-compatible server on loopback: remembers what it was asked, and can fail on request.

    with LlmServer() as server:
        server.hold_until(3, "Summarize")       # no such answer before three have been asked for
        settings = LlmSettings(base_url=Url(server.url))
        ...
        server.wait_for(3)
        assert server.answered == {key: 1 ...}  # by Idempotency-Key

It runs in threads of the test's process, so that its counts outlive whatever is killed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self, final

DEADLINE_S = 30.0

FaultKind = Literal["status", "hang", "drop", "cut", "drip", "head"]


@final
@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    number: int  # from 0, in the order of arrival
    key: str  # Idempotency-Key; "" without one
    body: dict[str, Any]
    headers: dict[str, str]  # names in lower case
    at_s: float  # since 1970 UTC, when it arrived

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The parts of all messages; a message of plain text is one part."""
        found: list[dict[str, Any]] = []
        for message in self.body["messages"]:
            content = message["content"]
            found += [{"type": "text", "text": content}] if isinstance(content, str) else content
        return found

    @property
    def text(self) -> str:
        """All text of all messages."""
        return "\n".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def files(self) -> list[bytes]:
        """The bytes of the file parts that carry any."""
        return [
            base64.b64decode(part["file"]["file_data"].partition(";base64,")[2])
            for part in self.parts
            if part["type"] == "file" and part["file"]["file_data"].startswith("data:")
        ]


@final
@dataclass(frozen=True)
class Fault:
    """What happens to a request in place of an answer.

    status: it is answered so.  hang: not at all, until the server closes.  drop: the
    connection ends without an answer.  cut: it ends in the middle of one.  drip: the
    answer comes a byte at a time, with spaces in front that never end.  head: it comes a
    byte at a time from its first line on, and that never ends.
    """

    kind: FaultKind
    status: int = 500
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@final
class LlmServer:
    """The server; `url` is what goes into `[llm] base_url`. Close it, or use it in a `with`."""

    def __init__(self, api_key: str = "", answer: Callable[[Asked], str] | None = None) -> None:
        self.api_key = api_key  # "": any is welcome
        self.answer = answer or summary_of
        # What is laid over every answer, such as {"model": ...}; `finish_reason` goes into
        # the choice, and `message` into the message.
        self.finish_reason = "stop"
        self.message: dict[str, Any] = {}
        self.over: dict[str, Any] = {}
        self._asked: list[Asked] = []
        self._answered: Counter[str] = Counter()
        self._sending = 0  # answers: who asked may have read one that is not counted yet
        self._faults: deque[tuple[str, Fault]] = deque()
        self._holds: list[tuple[str, int]] = []
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.05,), name="llm", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    # --- what arrived

    @property
    def asked(self) -> list[Asked]:
        """All requests so far, those that were failed too."""
        with self._changed:
            return list(self._asked)

    def asked_for(self, containing: str) -> list[Asked]:
        """The requests whose text contains this."""
        return [one for one in self.asked if containing in one.text]

    @property
    def asked_by_key(self) -> Counter[str]:
        """How often each Idempotency-Key has arrived."""
        return Counter(one.key for one in self.asked)

    @property
    def answered(self) -> Counter[str]:
        """How many answers were sent to the end, by Idempotency-Key. The caller may have died
        before it read one."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._sending, timeout=DEADLINE_S)
            return Counter(self._answered)

    def wait_for(self, count: int, containing: str = "", deadline_s: float = DEADLINE_S) -> None:
        """Return when so many requests with this text have arrived; fails after the deadline."""
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: self._count(containing) >= count, timeout=deadline_s
            )
        assert arrived, f"{self._count(containing)} requests of {count} within {deadline_s} s"

    # --- what it is to do

    def hold_until(self, count: int, containing: str = "") -> None:
        """Answer none whose text contains this before `count` of them have arrived, by
        different keys. After DEADLINE_S they are answered 500, so that a test ends."""
        with self._changed:
            self._holds.append((containing, count))

    def release(self) -> None:
        """Hold no more."""
        with self._changed:
            self._holds.clear()
            self._changed.notify_all()

    def fail(self, *faults: Fault, containing: str = "") -> None:
        """Let these befall the next requests whose text contains this, one each."""
        with self._changed:
            self._faults.extend((containing, fault) for fault in faults)

    # --- its inside

    def take(self, key: str, body: dict[str, Any], headers: dict[str, str]) -> Asked:
        with self._changed:
            asked = Asked(len(self._asked), key, body, headers, time.time())
            self._asked.append(asked)
            self._changed.notify_all()
        return asked

    def fault_for(self, asked: Asked) -> Fault | None:
        with self._changed:
            for index, (containing, fault) in enumerate(self._faults):
                if containing in asked.text:
                    del self._faults[index]
                    return fault
        return None

    def held(self, asked: Asked) -> bool:
        """Wait until it may be answered; whether it may."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closing.is_set() or not self._is_held(asked), timeout=DEADLINE_S
            )

    def send(self, asked: Asked, say: Callable[[], bool]) -> None:
        """Have an answer sent by `say`, and count it if that says that it went out."""
        with self._changed:
            self._sending += 1
        went = False
        try:
            went = say()
        finally:
            with self._changed:
                self._sending -= 1
                if went:
                    self._answered[asked.key] += 1
                self._changed.notify_all()

    def hang(self) -> None:
        self._closing.wait()

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    def pause(self, seconds: float) -> None:
        """The time between two bytes of a dripping answer."""
        self._closing.wait(seconds)

    def _is_held(self, asked: Asked) -> bool:
        return any(
            containing in asked.text
            and len({one.key or one.number for one in self._asked if containing in one.text})
            < count
            for containing, count in self._holds
        )

    def _count(self, containing: str) -> int:
        return sum(containing in one.text for one in self._asked)

    def close(self) -> None:
        """Let go of all who wait, and end."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def summary_of(asked: Asked) -> str:
    """What this model makes of a request: words of its end, which is where attachments are."""
    words = re.findall(r"\w+", asked.text)[-60:]
    return f"This is what the model makes of {len(asked.text)} characters: {' '.join(words)}."


def _handler(server: LlmServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(404, {"error": {"message": f"no {self.path}"}})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                self._say(404, {"error": {"message": f"no {self.path}"}})
                return
            if server.api_key and self.headers["Authorization"] != f"Bearer {server.api_key}":
                message = f"Incorrect API key provided: {self.headers['Authorization']}"
                self._say(401, {"error": {"message": message, "code": "invalid_api_key"}})
                return
            asked = server.take(
                self.headers["Idempotency-Key"] or "",
                json.loads(raw),
                {name.lower(): value for name, value in self.headers.items()},
            )
            fault = server.fault_for(asked)
            if fault is not None:
                self._fail(fault)
                return
            if not server.held(asked):
                self._say(500, {"error": {"message": "held for too long"}})
                return
            answer = server.answer(asked)
            server.send(asked, lambda: self._say(200, _completion(server, asked, answer)))

        def _fail(self, fault: Fault) -> None:
            if fault.kind == "status":
                error = {"message": f"failed as asked: {fault.status}", **fault.body}
                self._say(fault.status, {"error": error}, fault.headers)
                return
            self.close_connection = True
            if fault.kind == "hang":
                server.hang()
            elif fault.kind in ("cut", "drip", "head"):
                with contextlib.suppress(OSError):
                    self._begin(fault)

        def _begin(self, fault: Fault) -> None:
            if fault.kind == "head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
                self._drip(b"x")
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            if fault.kind == "cut":
                self.wfile.write(b'{"id": "x", "choices": [{"message": {"content": "This is')
                return
            self._drip(b" ")

        def _drip(self, byte: bytes) -> None:
            while not server.closing:
                self.wfile.write(byte)
                server.pause(0.02)

        def _say(
            self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
        ) -> bool:
            """Whether the answer went out; the caller may be dead by now."""
            raw = json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                self.close_connection = True
                return False
            return True

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    return Handler


def _completion(server: LlmServer, asked: Asked, answer: str) -> dict[str, Any]:
    read, written = len(asked.text.split()), len(answer.split())
    return {
        "id": f"chatcmpl-{asked.number}",
        "object": "chat.completion",
        "created": 1_767_225_600,
        "model": f"{asked.model}-2026-01-01",
        "choices": [
            {
                "index": 0,
                "finish_reason": server.finish_reason,
                "message": {"role": "assistant", "content": answer, **server.message},
            }
        ],
        "usage": {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        },
        **server.over,
    }
