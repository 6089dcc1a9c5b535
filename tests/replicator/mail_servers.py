"""A real SMTP server (aiosmtpd) in a thread, as good or bad as wanted."""

from __future__ import annotations

import asyncio
import email
import email.policy
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from queue import SimpleQueue
from typing import Any, final

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

ARRIVES_S = 60.0
USER, PASSWORD = "approvals", "it's no secret here"


@final
@dataclass(frozen=True)
class Received:
    """One mail as it came, and how."""

    sender: str
    recipients: list[str]
    content: bytes
    client: str  # what it said it was
    encrypted: bool
    user: str  # who logged in

    @property
    def message(self) -> EmailMessage:
        return email.message_from_bytes(self.content, policy=email.policy.default)

    def part(self, subtype: str) -> str:
        """The text of one form of it: "plain" or "html"."""
        part = self.message.get_body((subtype,))
        assert part is not None
        return str(part.get_content())


Answer = Callable[["MailServer"], Awaitable[str]]


def says(answer: str) -> Answer:
    """This, such as "451 come again"."""

    async def answered(_server: MailServer) -> str:
        return answer

    return answered


async def hangs(_server: MailServer) -> str:
    """Nothing, until the client is gone."""
    await asyncio.Event().wait()
    raise AssertionError


async def hangs_up(server: MailServer) -> str:
    """No answer: the connection ends."""
    assert server.connection is not None
    server.connection.abort()
    return await hangs(server)


@final
@dataclass
class MailServer:
    """Answers each command with what its list begins with, then as it should for ever.

    `received` has each mail whose bytes came, however that was answered.
    """

    port: int = 0
    recipient_answers: list[Answer] = field(default_factory=list)
    data_answers: list[Answer] = field(default_factory=list)
    quit_answers: list[Answer] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    arrived: SimpleQueue[Received] = field(default_factory=SimpleQueue)
    logins: list[str] = field(default_factory=list)
    connection: Any = None

    def next(self) -> Received:
        """The next mail that has not been asked for; waits for it."""
        return self.arrived.get(timeout=ARRIVES_S)

    # --- what aiosmtpd calls

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, _options: Any
    ) -> str:
        answer = await self._answer(self.recipient_answers, server)
        if answer.startswith("2"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        assert isinstance(envelope.content, bytes)
        transport: Any = server.transport
        mail = Received(
            str(envelope.mail_from),
            list(envelope.rcpt_tos),
            envelope.content,
            str(session.host_name),
            transport.get_extra_info("cipher") is not None,
            str(session.auth_data),
        )
        self.received.append(mail)
        answer = await self._answer(self.data_answers, server)
        self.arrived.put(mail)
        return answer

    async def handle_QUIT(  # noqa: N802
        self, server: SMTP, _session: Session, _envelope: Envelope
    ) -> str:
        return await self._answer(self.quit_answers, server, "221 bye")

    async def _answer(
        self, answers: list[Answer], server: SMTP, otherwise: str = "250 fine"
    ) -> str:
        self.connection = server.transport
        return await answers.pop(0)(self) if answers else otherwise

    def login(
        self, _server: SMTP, _session: Session, _envelope: Envelope, _how: str, data: Any
    ) -> AuthResult:
        assert isinstance(data, LoginPassword)
        user, password = data.login.decode(), data.password.decode()
        self.logins.append(user)
        right = (user, password) == (USER, PASSWORD)
        return AuthResult(success=right, handled=False, auth_data=user)


@contextmanager
def mail_server(
    tls: ssl.SSLContext | None = None,
    *,
    at_once: bool = False,
    login: bool = False,
    utf8: bool = True,
) -> Iterator[MailServer]:
    """A server on a free port of 127.0.0.1.

    With `tls` it offers STARTTLS, or speaks TLS `at_once`. `login`: nothing goes without one.
    """
    found = MailServer()
    loop = asyncio.new_event_loop()

    def connected() -> SMTP:
        return SMTP(
            found,
            hostname="mail.test",
            enable_SMTPUTF8=utf8,
            tls_context=None if at_once else tls,
            # Of TLS that was there before it, aiosmtpd knows nothing: a login is offered then,
            # and the test looks whether it was used.
            auth_required=login and not at_once,
            auth_require_tls=not at_once,
            authenticator=found.login,
            loop=loop,
        )

    async def open_server() -> asyncio.Server:
        where = ("127.0.0.1", 0)
        return await loop.create_server(connected, *where, ssl=tls if at_once else None)

    async def close_server() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    server = loop.run_until_complete(open_server())
    found.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield found
    finally:
        asyncio.run_coroutine_threadsafe(close_server(), loop).result(ARRIVES_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
