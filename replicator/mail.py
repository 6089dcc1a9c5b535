"""One mail: handed to the operator's SMTP server, and what its answer means.

Its `Message-ID` is made of the delivery's identifier and all its bytes are the same at every
attempt, so that a mail that came twice (invariant 6 allows that, never none) is recognised.

    refused for this address (RCPT), or its content (DATA), with 5xx    hopeless
    anything else: 4xx, no login, no TLS, nobody there                  tried again

What somebody wrote stands in headers as letters and never as anything that decodes to others, and
a mail with another header than we set is none: nobody who asks speaks for us in it.

Whatever is wrong with the server, the login or the sender is the operator's to mend, so no
mail is lost by it until patience ends (`[callbacks] give_up_after`). Once the server has
said 250 it has the mail, however the rest of the conversation goes.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
from datetime import UTC, datetime
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.policy import SMTP as SMTP_POLICY
from email.policy import SMTPUTF8 as SMTPUTF8_POLICY
from typing import Final, final

import msgspec
from aiosmtplib import (
    SMTP,
    SMTPDataError,
    SMTPException,
    SMTPNotSupported,
    SMTPRecipientsRefused,
    SMTPResponseException,
)

from cas.clock import SECOND_US
from cas.config import MailSettings
from cas.deliveries import Outcome
from cas.mailboxes import Mailbox, read_mailbox
from cas.records import Delivery

_ACCEPTED: Final = 250
# Answers to RCPT that are about us and not about the address: log in first, and so on.
_OURS: Final = frozenset({530, 534, 535, 538})


@final
class Mail(msgspec.Struct, frozen=True):
    """The payload of a delivery of kind "mail": `to` is one address, `html` may be empty."""

    to: str
    subject: str
    text: str
    html: str = ""


@final
class Mailer:
    """Sends mails as `settings` say. For one event loop, some at a time."""

    def __init__(self, settings: MailSettings) -> None:
        self._settings = settings
        self._timeout_s = settings.timeout / SECOND_US

    async def send(self, delivery: Delivery, payload: bytes) -> Outcome:
        """Make one attempt, within `[mail] timeout`, and say what came of it. Raises nothing
        that a mail or a server causes."""
        if not self._settings.host:
            return Outcome(None, "no mail is sent: [mail] host is empty", hopeless=True)
        try:
            sender = read_mailbox(self._settings.sender)
            mail = msgspec.json.decode(payload, type=Mail)
            to = read_mailbox(mail.to)
            utf8 = not (sender.address + to.address).isascii()
            content = _content(_message(delivery, mail, sender, to), utf8=utf8)
        except (msgspec.MsgspecError, MessageError, ValueError, LookupError) as error:
            return Outcome(None, f"no mail can be made of it: {error}", hopeless=True)
        accepted = False
        try:
            async with asyncio.timeout(self._timeout_s):
                client = await self._client(sender)
                try:
                    await client.connect()
                    # These very bytes, which were looked at: `send_message` makes its own.
                    options = ["SMTPUTF8"] if utf8 else []
                    await client.sendmail(sender.address, to.address, content, mail_options=options)
                    accepted = True
                    await client.quit()
                finally:
                    client.close()  # and no QUIT to a server that hangs
        except (SMTPException, OSError, ValueError) as error:
            if not accepted:
                return self._outcome(error)
        return Outcome(_ACCEPTED)

    async def _client(self, sender: Mailbox) -> SMTP:
        settings = self._settings
        # In a thread: it reads files. Anew each time, since certificates are renewed.
        tls = await asyncio.to_thread(ssl.create_default_context, cafile=settings.ca_file)
        return SMTP(
            hostname=settings.host,
            port=settings.port,
            username=settings.user or None,
            password=settings.password or None,
            # What we say we are. The machine's own name is asked of the DNS, which may take
            # its time, and is often one that mail servers refuse.
            local_hostname=sender.domain,
            timeout=self._timeout_s,
            use_tls=settings.security == "tls",
            # True, and not "where it is offered": who is in between could hide the offer.
            start_tls=settings.security == "starttls",
            tls_context=tls,
        )

    def _outcome(self, error: Exception) -> Outcome:
        """What an attempt that failed by `error` means."""
        if isinstance(error, SMTPRecipientsRefused):
            refused = error.recipients[0]
            text = f"refused this address: {_said(refused)}"
            return Outcome(
                refused.code, text, hopeless=refused.code >= 500 and refused.code not in _OURS
            )
        if isinstance(error, SMTPDataError):
            return Outcome(
                error.code, f"refused this mail: {_said(error)}", hopeless=error.code >= 500
            )
        if isinstance(error, SMTPNotSupported):  # an address that is not ASCII
            return Outcome(None, _printable(error.message), hopeless=True)
        if isinstance(error, SMTPResponseException):
            return Outcome(error.code, f"the mail server said {_said(error)}")
        if isinstance(error, TimeoutError):
            return Outcome(None, f"the mail server was not done within {self._timeout_s:g} s")
        return Outcome(None, f"no mail server: {_printable(str(error) or 'the connection broke')}")


def _message(delivery: Delivery, mail: Mail, sender: Mailbox, to: Mailbox) -> EmailMessage:
    """Raises ValueError for headers that cannot be, such as a subject of two lines."""
    message = EmailMessage(policy=SMTP_POLICY)
    message["From"] = Address(sender.name, sender.local, sender.domain)
    message["To"] = Address(to.name, to.local, to.domain)
    # An encoded word (RFC 2047) is taken apart: Python decodes what it is given, line breaks and
    # all, and some programs on the way decode again what was encoded to be shown as it is.
    message["Subject"] = mail.subject.replace("=?", "= ?")
    message["Date"] = email.utils.format_datetime(_moment(delivery.created_at))
    message["Message-ID"] = f"<{delivery.delivery_id}@{sender.domain}>"
    # RFC 3834: nobody's holiday reply is wanted.
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(mail.text, cte="quoted-printable")
    if mail.html:
        message.add_alternative(mail.html, subtype="html", cte="quoted-printable")
        # Not one by chance: the bytes are the same at every attempt. "=_" is in no part.
        message.set_boundary(f"=_{delivery.delivery_id}")
    return message


def _content(message: EmailMessage, *, utf8: bool) -> bytes:
    """What goes over the wire; `utf8` where an address is not ASCII. Raises ValueError where it
    would be read with other headers than it was given."""
    content = message.as_bytes(policy=SMTPUTF8_POLICY if utf8 else SMTP_POLICY)
    if BytesHeaderParser().parsebytes(content).keys() != message.keys():
        raise ValueError("what stands in a header would be read as a header of its own")
    return content


def _moment(at_us: int) -> datetime:
    return datetime.fromtimestamp(at_us // SECOND_US, UTC)


def _said(error: SMTPResponseException) -> str:
    return f"{error.code} {_printable(error.message)}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
