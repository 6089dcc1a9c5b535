"""A mail server that keeps what it is given; it outlives whatever the test kills."""

from __future__ import annotations

import email
import email.policy
import threading
from dataclasses import dataclass
from email.message import EmailMessage
from types import TracebackType
from typing import Any, Self, final

from aiosmtpd.controller import Controller

from bench.ports import free_port

READY_S = 60.0


@final
@dataclass(frozen=True)
class Mail:
    message_id: str
    recipient: str
    subject: str
    text: str


@final
class Mailbox:
    """A real SMTP server on loopback, in a thread of the test's process."""

    def __init__(self) -> None:
        self._mails: list[Mail] = []
        self._lock = threading.Lock()
        self.port = free_port()
        self._controller = Controller(
            self, hostname="127.0.0.1", port=self.port, ready_timeout=READY_S
        )

    @property
    def mails(self) -> list[Mail]:
        with self._lock:
            return list(self._mails)

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        body = message.get_body(("plain",))
        text = "" if body is None else str(body.get_content())
        with self._lock:
            self._mails += [
                Mail(str(message["Message-ID"]), recipient, str(message["Subject"]), text)
                for recipient in envelope.rcpt_tos
            ]
        return "250 kept"

    def __enter__(self) -> Self:
        self._controller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._controller.stop()
