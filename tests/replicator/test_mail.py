"""Mails: to a real SMTP server, which is good, bad, slow or gone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from email import message_from_string, policy
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from ipaddress import ip_network
from pathlib import Path
from queue import SimpleQueue
from typing import Any, final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cas.approvals import close_approval
from cas.catalog import Transaction
from cas.clock import DAY_US, HOUR_US, SECOND_US, SystemClock
from cas.config import CallbackSettings, Duration, MailSettings, Settings, StoreSettings
from cas.deliveries import DELAYS_US, Outcome, enqueue
from cas.keys import load_keys
from cas.mailboxes import read_mailbox
from cas.records import (
    CALLBACK,
    CANCELLED,
    DONE,
    FAILED,
    MAIL,
    PENDING,
    WAITING,
    Approval,
    Delivery,
)
from cas.store import Store
from replicator.callbacks import Sender
from replicator.deliveries import MAIL_PLACES, PLACES, TENANT_MAIL_PLACES, SendDeliveries
from replicator.destinations import CheckedNetwork
from replicator.mail import Mail, Mailer, _content, _message
from replicator.names import Names
from tests.clocks import HandClock
from tests.conftest import CHECKOUT
from tests.replicator.mail_servers import (
    PASSWORD,
    USER,
    Answer,
    MailServer,
    Received,
    hangs,
    hangs_up,
    mail_server,
    says,
)
from tests.replicator.receivers import ARRIVES_S, certificate, nobody, receiving

RING = (b"o" * 32, b"n" * 32)  # what was sealed by the old one opens by both
LOOPBACK = (ip_network("127.0.0.0/8"),)
SETTINGS = Settings(
    callbacks=CallbackSettings(allowed_networks=LOOPBACK, timeout=Duration(5 * SECOND_US))
)
TEXT = "Please decide:\n\nhttps://files.example.org/a?decision=approved&token=abc\n"
HEADERS = [
    "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type",
]  # fmt: skip
HTML = "<p>Please decide: <a href='https://files.example.org/a'>here</a></p>\n"


@pytest.fixture
def store(root: Path, clock: HandClock) -> Iterator[Store]:
    with Store.open(root, SETTINGS, clock=clock) as opened:
        yield opened


def enqueued(
    store: Store,
    to: str = "ada@example.org",
    *,
    about: str = "approval",
    tenant: str = "t1",
    ring: tuple[bytes, ...] = RING[:1],
    **other: Any,
) -> Delivery:
    payload = {"to": to, "subject": "A decision – yours", "text": TEXT, "html": HTML, **other}

    def change(txn: Transaction) -> Delivery:
        if txn.get(Approval, about) is None:
            txn.insert(approval(txn.now_us, about, 100 * DAY_US))
        return enqueue(txn, tenant, MAIL, about, to, payload, ring=ring)

    return store.catalog.write(change)


def mail_settings(server: MailServer, **other: Any) -> MailSettings:
    given = {
        "host": "127.0.0.1",
        "port": server.port,
        "security": "none",
        "sender": "Approvals <approvals@example.com>",
        "timeout": Duration(60 * SECOND_US),
        **other,
    }
    return MailSettings(**given)


def job_of(
    store: Store, settings: MailSettings, ring: tuple[bytes, ...] | None = None
) -> SendDeliveries:
    names = Names(lambda _host, _port: ["127.0.0.1"])
    network = CheckedNetwork(names.resolve, LOOPBACK)
    sender = Sender(network, SystemClock(), timeout_us=60 * SECOND_US)
    ring = RING if ring is None else ring
    return SendDeliveries(store, bytes(32), sender, Mailer(settings), ring=ring, jitter=lambda: 0.0)


def now_us(store: Store) -> int:
    with store.catalog.read() as snapshot:
        return store.now_us(snapshot)


def send_due(store: Store, settings: MailSettings, ring: tuple[bytes, ...] | None = None) -> None:
    """One process's life: sends what is due, and ends."""

    async def live() -> None:
        job = job_of(store, settings, ring)
        while await job.step(now_us(store)):
            pass
        await job.close()

    asyncio.run(live())


def state(store: Store, delivery: Delivery) -> Delivery:
    return store.deliveries(delivery.tenant_id, "tests").get(delivery.delivery_id)


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return certificate(tmp_path, "localhost")


@pytest.fixture
def tls(pem: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


# --- what arrives


def test_a_mail_arrives_once_with_both_its_forms(store: Store) -> None:
    with mail_server() as server:
        delivery = enqueued(store, "Ada <ada@example.org>")
        send_due(store, mail_settings(server))
        send_due(store, mail_settings(server))
        (mail,) = server.received
    assert (mail.sender, mail.recipients) == ("approvals@example.com", ["ada@example.org"])
    assert mail.client == "example.com"
    message = mail.message
    assert message["From"].addresses == (Address("Approvals", "approvals", "example.com"),)
    assert message["To"].addresses == (Address("Ada", "ada", "example.org"),)
    assert message["Subject"] == "A decision – yours"
    assert message["Message-ID"] == f"<{delivery.delivery_id}@example.com>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert int(message["Date"].datetime.timestamp()) == delivery.created_at // SECOND_US
    assert mail.part("plain").replace("\r\n", "\n") == TEXT
    assert mail.part("html").replace("\r\n", "\n") == HTML
    done = state(store, delivery)
    assert (done.status, done.attempts, done.last_status, done.last_error) == (DONE, 1, 250, "")


def test_letters_of_all_scripts_come_as_they_were_sent(store: Store) -> None:
    text = "Größe: 5 €\n.\nеще раз\n" + "long " * 400 + "\n"
    with mail_server() as server:
        enqueued(store, "Жанна <zh@пример.example>", subject="日本語" * 40, text=text, html="")
        send_due(store, mail_settings(server))
        (mail,) = server.received
    assert mail.recipients == ["zh@xn--e1afmkfd.example"]
    assert mail.message["To"].addresses[0].display_name == "Жанна"
    assert mail.message["Subject"] == "日本語" * 40
    assert mail.message.get_content().replace("\r\n", "\n") == text
    assert max(map(len, mail.content.splitlines())) <= 78 + 10


def test_an_address_that_is_not_ascii_needs_a_server_that_takes_it(store: Store) -> None:
    with mail_server() as server, mail_server(utf8=False) as old:
        taken = enqueued(store, "jürgen@example.org")
        send_due(store, mail_settings(server))
        refused = enqueued(store, "jürgen@example.org")
        send_due(store, mail_settings(old))
        assert server.received[0].recipients == ["jürgen@example.org"]
        assert old.received == []
    assert state(store, taken).status == DONE
    assert state(store, refused).status == FAILED
    assert "SMTPUTF8" in state(store, refused).last_error


@pytest.mark.parametrize(
    "subject",
    [
        "=?utf-8?q?a=0d=0aReply-To=3a_evil=0d=0a=0d=0a<h1>Pay</h1>?=",
        "Merge: =?utf-8?b?SGkNCkJjYzogYUBiLmM=?= now",
        "Größe =?utf-8?q?a=0d=0aBcc=3a_eve=40example.org?= " + "ä" * 100,
        "=?utf-8?q?=E2=80=AEgpj?= ==??= =?",  # turns the direction of a text around
    ],
)
def test_an_encoded_word_in_a_title_is_shown_and_not_read(store: Store, subject: str) -> None:
    with mail_server() as server:
        enqueued(store, subject=subject)
        send_due(store, mail_settings(server))
        (mail,) = server.received
    assert mail.message.keys() == HEADERS
    assert mail.message["Subject"] == subject.replace("=?", "= ?")
    assert mail.part("plain").replace("\r\n", "\n") == TEXT


PIECES = st.sampled_from(
    [
        "=?utf-8?q?a=0d=0aBcc=3a_x?=",
        "=?utf-8?q?",
        "=?utf-8?b?",
        "?=",
        "=0d=0a",
        "Bcc=3a_x",
        "SGkNCkI6IGE=",
        "=",
        "?",
        "é",
        ".",
    ]
)


@given(
    subject=st.lists(PIECES | st.text(" \t\r\n\x0b\x85\u202e", max_size=2)).map("".join),
    name=st.lists(PIECES | st.text('\\" ,', max_size=2), max_size=6).map("".join),
    local=st.lists(PIECES, min_size=1, max_size=6).map("".join),
)
def test_whatever_others_wrote_a_mail_has_our_headers_or_is_none(
    subject: str, name: str, local: str
) -> None:
    delivery = Delivery("d", "t1", MAIL, "approval", "", WAITING, 0, 0)
    sender = read_mailbox("approvals@example.com")
    try:
        to = read_mailbox(f"{name} <{local}@example.org>")
        message = _message(delivery, Mail("", subject, TEXT, HTML), sender, to)
        content = _content(message, utf8=not to.address.isascii())
    except (ValueError, LookupError, MessageError):
        return
    read = message_from_string(content.decode(), policy=policy.default)
    assert read.keys() == HEADERS
    assert [address.addr_spec for address in read["To"].addresses] == [to.address]


WORDS = st.text('a"\\ ,;:@(=_.ä漢😀', min_size=1) | st.sampled_from(["b" * 58, "é" * 58])


@given(words=st.lists(WORDS, max_size=9), utf8=st.booleans())
@example(words=[":" + "b" * 100 + "@c", "d" * 80], utf8=False)  # Python breaks it where it may not
def test_of_every_sender_that_is_read_a_mail_can_be_made(words: list[str], utf8: bool) -> None:
    try:
        sender = read_mailbox(f"{' '.join(words)} <us@example.com>")
    except ValueError:
        return
    delivery = Delivery("d", "t1", MAIL, "approval", "", WAITING, 0, 0)
    message = _message(delivery, Mail("", "s", TEXT, HTML), sender, read_mailbox("ada@example.org"))
    assert message_from_string(_content(message, utf8=utf8).decode()).keys() == HEADERS


# --- what is recorded of it is sealed


def test_what_was_recorded_before_mails_were_sealed_goes_out(store: Store) -> None:
    payload = {"to": "ada@example.org", "subject": "s", "text": TEXT, "html": ""}
    with mail_server() as server:
        store.catalog.write(lambda txn: txn.insert(approval(txn.now_us, "asked")))
        delivery = store.catalog.write(
            lambda txn: enqueue(txn, "t1", MAIL, "asked", "ada@example.org", payload)
        )
        send_due(store, mail_settings(server))
        (mail,) = server.received
    assert mail.message.get_content().replace("\r\n", "\n") == TEXT
    assert state(store, delivery).status == DONE


def test_what_cannot_be_opened_waits_for_its_key(store: Store, clock: HandClock) -> None:
    with mail_server() as server:
        delivery = enqueued(store)
        send_due(store, mail_settings(server), (b"x" * 32,))
        waiting = state(store, delivery)
        assert (waiting.status, server.received) == (WAITING, [])
        assert "ROOT/keys/secrets" in waiting.last_error
        clock.advance(DELAYS_US[0])
        send_due(store, mail_settings(server))
    assert state(store, delivery).status == DONE


# --- what it asks is over


@pytest.mark.parametrize("end", ["expired", "approved"])
def test_a_mail_whose_links_would_decide_nothing_is_not_sent(
    store: Store, clock: HandClock, end: str
) -> None:
    """Also one that the sweep has not ended yet, and one that is sent again by hand."""
    asked = approval(clock.time_us)
    store.catalog.write(lambda txn: txn.insert(asked))
    delivery, other = enqueued(store, about=asked.approval_id), enqueued(store)
    if end == "expired":
        clock.advance(HOUR_US)
    else:
        store.catalog.write(lambda txn: close_approval(txn, asked, end, keep_us=DAY_US))
        assert state(store, delivery).status == CANCELLED
        store.deliveries("t1", "tests").resend(delivery.delivery_id)
    with mail_server() as server:
        send_due(store, mail_settings(server))
        assert len(server.received) == 1
    assert state(store, other).status == DONE
    ended = state(store, delivery)
    assert (ended.status, ended.attempts, ended.next_attempt_at) == (CANCELLED, 0, None)
    assert ended.last_error == f"the approval is {end} already"


def test_a_mail_for_an_approval_that_is_forgotten_is_not_sent(store: Store) -> None:
    asked = approval(store.about_now_us(), "gone")
    store.catalog.write(lambda txn: txn.insert(asked))
    delivery = enqueued(store, about="gone")
    store.catalog.write(lambda txn: txn.delete(asked))
    with mail_server() as server:
        send_due(store, mail_settings(server))
        assert server.received == []
    ended = state(store, delivery)
    assert (ended.status, ended.last_error) == (CANCELLED, "the approval is forgotten already")


def test_a_mail_that_arrived_stays_done_when_it_is_sent_again_for_nothing(store: Store) -> None:
    asked = approval(store.about_now_us())
    store.catalog.write(lambda txn: txn.insert(asked))
    delivery = enqueued(store, about=asked.approval_id)
    with mail_server() as server:
        send_due(store, mail_settings(server))
        store.deliveries("t1", "tests").resend(delivery.delivery_id)
        store.catalog.write(lambda txn: close_approval(txn, asked, "approved", keep_us=DAY_US))
        assert state(store, delivery).status == DONE
        store.deliveries("t1", "tests").resend(delivery.delivery_id)
        send_due(store, mail_settings(server))
        assert len(server.received) == 1
    assert (state(store, delivery).status, state(store, delivery).last_error) == (DONE, "")


def approval(
    now_us: int, name: str = "01890000-0000-7000-8000-000000000001", term_us: int = HOUR_US
) -> Approval:
    """A pending one, for an hour."""
    return Approval(
        approval_id=name,
        tenant_id="t1",
        workflow_run_id="run-1",
        approval_key="k",
        title="?",
        message="",
        addressees=["ada@example.org"],
        one_click=False,
        redirect_url=None,
        status=PENDING,
        created_at=now_us,
        created_by="ann",
        expires_at=now_us + term_us,
        open_until=now_us + term_us,
    )


# --- the connection is protected


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_login_and_the_mail_go_over_tls(
    store: Store, tls: ssl.SSLContext, pem: Path, security: str
) -> None:
    with mail_server(tls, at_once=security == "tls", login=True) as server:
        delivery = enqueued(store)
        settings = mail_settings(
            server,
            host="localhost",
            security=security,
            user=USER,
            password=PASSWORD,
            ca_file=pem,
        )
        send_due(store, settings)
        (mail,) = server.received
    assert (mail.encrypted, mail.user) == (True, USER)
    assert state(store, delivery).status == DONE


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_server_that_nobody_vouches_for_gets_neither_login_nor_mail(
    store: Store, tls: ssl.SSLContext, security: str
) -> None:
    with mail_server(tls, at_once=security == "tls", login=True) as server:
        delivery = enqueued(store)
        settings = mail_settings(
            server, host="localhost", security=security, user=USER, password=PASSWORD
        )
        send_due(store, settings)
        assert (server.received, server.logins) == ([], [])
    waiting = state(store, delivery)
    assert waiting.status == WAITING
    assert "certificate verify failed" in waiting.last_error


def test_a_certificate_for_another_name_is_none(
    store: Store, tls: ssl.SSLContext, pem: Path
) -> None:
    with mail_server(tls) as server:
        delivery = enqueued(store)
        send_due(store, mail_settings(server, security="starttls", ca_file=pem))
        assert server.received == []
    assert state(store, delivery).status == WAITING


def test_a_server_without_tls_is_not_spoken_to_in_the_clear(store: Store) -> None:
    with mail_server() as server:
        delivery = enqueued(store)
        settings = mail_settings(server, security="starttls", user=USER, password=PASSWORD)
        send_due(store, settings)
        assert (server.received, server.logins) == ([], [])
    waiting = state(store, delivery)
    assert waiting.status == WAITING
    assert "STARTTLS" in waiting.last_error


def test_authorities_that_cannot_be_read_are_told_and_looked_for_again(
    store: Store, tls: ssl.SSLContext, pem: Path, tmp_path: Path, clock: HandClock
) -> None:
    with mail_server(tls) as server:
        delivery = enqueued(store)
        missing = tmp_path / "authorities.pem"
        settings = mail_settings(server, host="localhost", security="starttls", ca_file=missing)
        send_due(store, settings)
        assert "No such file" in state(store, delivery).last_error
        missing.write_bytes(pem.read_bytes())
        clock.advance(DELAYS_US[0])
        send_due(store, settings)
    assert state(store, delivery).status == DONE


# --- what is refused


@pytest.mark.parametrize("at", ["recipient_answers", "data_answers"])
def test_a_greylisted_mail_is_sent_again_with_the_same_identifier_and_bytes(
    store: Store, clock: HandClock, at: str
) -> None:
    with mail_server() as server:
        getattr(server, at).extend([says("451 4.7.1 greylisted"), says("450 not yet")])
        delivery = enqueued(store)
        for delay_us in DELAYS_US[:2]:
            send_due(store, mail_settings(server))
            send_due(store, mail_settings(server))  # not yet
            waiting = state(store, delivery)
            assert waiting.status == WAITING
            assert waiting.last_error
            clock.advance(delay_us)
        send_due(store, mail_settings(server))
        assert len({mail.content for mail in server.received}) == 1
        assert server.received[0].message["Message-ID"].startswith(f"<{delivery.delivery_id}@")
    done = state(store, delivery)
    assert (done.status, done.attempts) == (DONE, 3)


@pytest.mark.parametrize(
    ("at", "answer", "told"),
    [
        ("recipient_answers", "550 5.1.1 no such user", "refused this address: 550 5.1.1 no such"),
        ("data_answers", "554 5.6.0 looks like spam", "refused this mail: 554 5.6.0 looks like"),
    ],
)
def test_what_is_refused_for_good_is_not_sent_again_and_others_are(
    store: Store, at: str, answer: str, told: str
) -> None:
    with mail_server() as server:
        getattr(server, at).append(says(answer))
        refused = enqueued(store, "nobody@example.org")
        send_due(store, mail_settings(server))
        other = enqueued(store)
        send_due(store, mail_settings(server))
    failed = state(store, refused)
    assert (failed.status, failed.attempts) == (FAILED, 1)
    assert failed.last_error.startswith(told)
    assert state(store, other).status == DONE


def test_a_wrong_password_loses_no_mail(
    store: Store, tls: ssl.SSLContext, pem: Path, clock: HandClock
) -> None:
    with mail_server(tls, login=True) as server:
        delivery = enqueued(store)
        wrong = mail_settings(
            server, host="localhost", security="starttls", user=USER, password="no", ca_file=pem
        )
        send_due(store, wrong)
        waiting = state(store, delivery)
        assert (waiting.status, waiting.last_status) == (WAITING, 535)
        assert "no" not in waiting.last_error.split()
        clock.advance(DELAYS_US[0])
        right = mail_settings(
            server, host="localhost", security="starttls", user=USER, password=PASSWORD, ca_file=pem
        )
        send_due(store, right)
    assert state(store, delivery).status == DONE


def test_a_server_that_wants_a_login_is_the_operators_to_mend(
    store: Store, tls: ssl.SSLContext, pem: Path
) -> None:
    with mail_server(tls, login=True) as server:
        delivery = enqueued(store)
        settings = mail_settings(server, host="localhost", security="starttls", ca_file=pem)
        send_due(store, settings)
    waiting = state(store, delivery)
    assert (waiting.status, waiting.last_status) == (WAITING, 530)


@pytest.mark.parametrize(
    "payload",
    [
        {"subject": "one\nBcc: spy@example.org"},
        {"subject": "one\r\n\r\nbody"},
        {"subject": "one\n"},  # which Python takes, and what follows is no header any more
        {"to": "=?utf-8?q?a=0d=0aX-Evil=3a_1?=@example.org"},
        {"to": "=?utf-8?q?a=0d=0aX-Evil=3a_1?= <ada@example.org>"},
        {"to": "ada@example.org\r\nRCPT TO:<spy@example.org>"},
        {"to": "ada@example.org, spy@example.org"},
        {"to": ""},
        {"text": None},
    ],
)
def test_what_is_no_mail_is_given_up_before_anybody_is_asked(
    store: Store, payload: dict[str, Any]
) -> None:
    with mail_server() as server:
        delivery = enqueued(store, **payload)
        send_due(store, mail_settings(server))
        assert server.received == []
    failed = state(store, delivery)
    assert (failed.status, failed.attempts) == (FAILED, 1)
    assert failed.last_error.startswith("no mail can be made of it")


def test_what_python_refuses_to_write_is_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As later ones do with a header that has a line break in it."""

    def refuse(*_words: Any, **_named: Any) -> bytes:
        raise MessageError("folded header contains newline")

    monkeypatch.setattr(EmailMessage, "as_bytes", refuse)
    with mail_server() as server:
        delivery = enqueued(store)
        send_due(store, mail_settings(server))
        assert server.received == []
    failed = state(store, delivery)
    assert (failed.status, failed.attempts) == (FAILED, 1)
    assert failed.last_error.startswith("no mail can be made of it: folded header")


def test_without_a_mail_server_it_fails_at_once_and_can_be_sent_later(store: Store) -> None:
    delivery = enqueued(store)
    send_due(store, MailSettings())
    failed = state(store, delivery)
    assert (failed.status, failed.last_error) == (FAILED, "no mail is sent: [mail] host is empty")
    with mail_server() as server:
        store.deliveries("t1", "tests").resend(delivery.delivery_id)
        send_due(store, mail_settings(server))
    assert state(store, delivery).status == DONE


# --- servers that hang, or are gone


def test_nobody_there_is_tried_again(store: Store) -> None:
    delivery = enqueued(store)
    with nobody() as port:
        send_due(store, mail_settings(MailServer(port)))
    waiting = state(store, delivery)
    assert waiting.status == WAITING
    assert waiting.last_error.startswith("no mail server: ")


def timeout_of(answer: Answer) -> Duration:
    """Long enough for all that comes before it; what hangs is waited for until then."""
    return Duration((5 if answer is hangs else 60) * SECOND_US)


@pytest.mark.parametrize("answer", [hangs, hangs_up, says("421 4.3.2 shutting down")])
def test_whatever_comes_after_it_was_taken_does_not_count(store: Store, answer: Answer) -> None:
    with mail_server() as server:
        server.quit_answers = [answer]
        delivery = enqueued(store)
        send_due(store, mail_settings(server, timeout=timeout_of(answer)))
        send_due(store, mail_settings(server))
        assert len(server.received) == 1
    assert state(store, delivery).status == DONE


@pytest.mark.parametrize(
    ("at", "answer"),
    [
        ("recipient_answers", hangs),
        ("data_answers", hangs),
        ("recipient_answers", hangs_up),
        ("data_answers", hangs_up),
    ],
)
def test_a_server_that_says_nothing_is_left_in_time_and_asked_again(
    store: Store, clock: HandClock, at: str, answer: Answer
) -> None:
    with mail_server() as server:
        getattr(server, at).append(answer)
        delivery = enqueued(store)
        send_due(store, mail_settings(server, timeout=timeout_of(answer)))
        waiting = state(store, delivery)
        assert waiting.status == WAITING
        told = "not done within 5 s" if answer is hangs else "no mail server"
        assert told in waiting.last_error
        clock.advance(DELAYS_US[0])
        send_due(store, mail_settings(server))
        assert len({mail.content for mail in server.received}) == 1
    assert state(store, delivery).status == DONE


def test_a_server_that_never_greets_is_left_in_time(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        delivery = enqueued(store)
        server = MailServer(silent.getsockname()[1])
        send_due(store, mail_settings(server, timeout=Duration(SECOND_US)))
    assert state(store, delivery).status == WAITING
    assert "not done within 1 s" in state(store, delivery).last_error


def test_a_mail_server_that_hangs_holds_no_callback(store: Store) -> None:
    """Mails of more tenants than there are places at all, and then one callback."""

    def fill(txn: Transaction) -> None:
        for number in range(PLACES + 1):
            payload = {"to": "ada@example.org", "subject": "s", "text": "t"}
            enqueue(txn, f"t{number}", MAIL, "approval", "ada@example.org", payload)

    with mail_server() as server, receiving() as receiver:
        server.recipient_answers = [hangs] * PLACES

        async def until_it_is_called() -> None:
            job = job_of(store, mail_settings(server, timeout=Duration(60 * SECOND_US)))
            store.catalog.write(fill)
            await job.step(now_us(store))
            target = receiver.url()
            store.catalog.write(lambda txn: enqueue(txn, "zz", CALLBACK, "u", target, {}))
            while not receiver.received:
                await job.step(now_us(store))
            for task in job._flying:  # as if the moment of `close` were over
                task.cancel()
            await job.close()

        asyncio.run(until_it_is_called())
        assert len(server.recipient_answers) >= PLACES - MAIL_PLACES


def test_mails_of_one_tenant_that_hang_keep_none_of_another_waiting(store: Store) -> None:
    """The mail server takes its time for the addresses of one tenant."""
    many = [enqueued(store, f"ada{n}@slow.example", tenant="slow") for n in range(30)]
    other = enqueued(store, tenant="zz")
    mailer = Waiting("slow")

    async def until_it_is_sent() -> None:
        job = mailing_job(store, mailer)
        for _ in range(5):
            await job.step(now_us(store))
            if state(store, other).status == DONE:
                break
        assert sorted(mailer.begun) == ["slow"] * TENANT_MAIL_PLACES + ["zz"]
        mailer.go_on.set()
        while await job.step(now_us(store)):
            pass
        await job.close()

    asyncio.run(until_it_is_sent())
    assert {state(store, each).status for each in many} == {DONE}


@pytest.mark.parametrize("each", [10, 100])
def test_tenants_take_turns_with_their_mails(store: Store, each: int) -> None:
    """However little is due: those who were first have others after them, and not before."""
    assert 2 * TENANT_MAIL_PLACES >= MAIL_PLACES  # two tenants have all places

    for tenant in ("early", "first"):
        for number in range(each):
            enqueued(store, f"ada{number}@example.org", tenant=tenant)
    last = enqueued(store, tenant="zz")
    mailer = Waiting()

    async def until_it_is_sent() -> None:
        job = mailing_job(store, mailer)
        while state(store, last).status != DONE:
            assert await job.step(now_us(store))
        await job.close()

    asyncio.run(until_it_is_sent())
    assert mailer.begun.index("zz") <= 2 * MAIL_PLACES


@final
class Waiting:
    """Sends at once, but for one tenant, whose mails wait until they may go on."""

    def __init__(self, tenant_id: str = "") -> None:
        self._tenant_id = tenant_id
        self.go_on = asyncio.Event()
        self.begun: list[str] = []

    async def send(self, delivery: Delivery, _payload: bytes) -> Outcome:
        self.begun.append(delivery.tenant_id)
        if delivery.tenant_id == self._tenant_id:
            await self.go_on.wait()
        return Outcome(250)


def mailing_job(store: Store, mailer: Waiting) -> SendDeliveries:
    nobody: Any = None  # no callback is due
    sends: Any = mailer
    return SendDeliveries(store, bytes(32), nobody, sends, ring=RING, jitter=lambda: 0.0)


# --- killed in the middle


def test_an_attempt_whose_record_was_lost_is_made_again_and_can_be_recognised(root: Path) -> None:
    """The process is killed between the server's having the mail and the record of it."""
    with Store.open(root, SETTINGS) as store:
        ring = load_keys(Settings(store=StoreSettings(root=root))).secrets
        delivery = enqueued(store, ring=ring)
    with mail_server() as server:
        started: SimpleQueue[int] = SimpleQueue()

        async def kill(_server: MailServer) -> str:
            os.kill(await asyncio.to_thread(started.get, timeout=ARRIVES_S), signal.SIGKILL)
            return "250 fine"

        server.data_answers = [kill]
        first = replicating(root, server)
        started.put(first.pid)
        assert first.wait(60) == -signal.SIGKILL
        assert replicating(root, server).wait(60) == 0
        mails: list[Received] = [server.next(), server.next()]
    assert len({mail.content for mail in mails}) == 1
    assert mails[0].message["Message-ID"] == f"<{delivery.delivery_id}@example.com>"
    with Store.open(root, SETTINGS) as store:
        done = state(store, delivery)
    assert (done.status, done.attempts) == (DONE, 1)


def replicating(root: Path, server: MailServer) -> subprocess.Popen[bytes]:
    """`blobcask replicate once`, which does all that is due."""
    environ = {
        **{name: value for name, value in os.environ.items() if "BLOBCASK" not in name},
        "BLOBCASK_STORE__ROOT": str(root),
        "BLOBCASK_MAIL__HOST": "127.0.0.1",
        "BLOBCASK_MAIL__PORT": str(server.port),
        "BLOBCASK_MAIL__SECURITY": "none",
        "BLOBCASK_MAIL__SENDER": "approvals@example.com",
        "BLOBCASK_GATEWAY__PUBLIC_URL": "https://files.example.com",
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, "-m", "cas", "replicate", "once"]
    return subprocess.Popen(command, env=environ, cwd=CHECKOUT)
