"""One callback to a real receiver: what it gets, and what its answer means."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from email.utils import formatdate
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from cas.callbacks import shown_secret
from cas.clock import SECOND_US, SystemClock
from cas.config import Networks
from cas.deliveries import Outcome
from cas.records import WAITING, Delivery
from replicator.callbacks import Sender, _retry_after_us
from replicator.destinations import CheckedNetwork
from replicator.names import Ask, Names
from tests.replicator.receivers import (
    Answer,
    Receiver,
    certificate,
    drips,
    drips_body,
    endless,
    garbage,
    hangs,
    nobody,
    receiving,
    status,
)

SECRET = b"s" * 32
LOOPBACK = (ip_network("127.0.0.0/8"),)
IMPATIENT_US = SECOND_US
DATE_LIKE = r"Mon, [0-9]{1,3} (Jan|Dec) [0-9]{1,20} [0-9]{1,3}:[0-9]{2}:[0-9]{2} [+-]?[0-9]{1,9}"


def local(_host: str, _port: int) -> list[str]:
    return ["127.0.0.1"]


def sent(
    target: str,
    *,
    timeout_us: int = 60 * SECOND_US,
    allowed: Networks = LOOPBACK,
    ask: Ask = local,
    tls: ssl.SSLContext | None = None,
) -> Outcome:
    """The outcome of one attempt to deliver {"n": 1} to `target`."""
    delivery = Delivery(
        "01890000-0000-7000-8000-000000000001",
        "t1",
        "callback",
        "u1",
        target,
        WAITING,
        0,
        0,
    )
    network = CheckedNetwork(Names(ask).resolve, allowed)
    sender = Sender(network, SystemClock(), timeout_us=timeout_us, tls=tls)
    return asyncio.run(sender.send(delivery, b'{"n": 1}', SECRET))


def answered(answer: Answer, timeout_us: int = 60 * SECOND_US) -> Outcome:
    with receiving() as receiver:
        receiver.answers.append(answer)
        return sent(receiver.url(), timeout_us=timeout_us)


# --- what arrives


def test_a_receiver_gets_the_payload_signed_so_that_any_library_verifies_it() -> None:
    with receiving() as receiver:
        outcome = sent(receiver.url(path="/hook?a=1&b=%20"))
        (request,) = receiver.received
        port = receiver.port
    assert outcome == Outcome(204)
    assert outcome.taken
    assert Webhook(shown_secret(SECRET)).verify(request.body, dict(request.headers)) == {"n": 1}
    headers = request.headers
    assert request.path == "/hook?a=1&b=%20"
    assert headers["webhook-id"] == headers["idempotency-key"]
    assert headers["webhook-id"] == "01890000-0000-7000-8000-000000000001"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert headers["content-type"] == "application/json"
    assert headers["user-agent"].startswith("blobcask/")
    assert headers["host"] == f"receiver.test:{port}"


def test_https_reaches_the_checked_address_and_proves_the_name(tmp_path: Path) -> None:
    pem = certificate(tmp_path, "receiver.test")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    trusting = ssl.create_default_context(cafile=str(pem))
    with receiving(server) as receiver:
        assert sent(receiver.url(), tls=trusting).taken
        assert asked == ["receiver.test"]
        assert [request.headers["host"] for request in receiver.received] == [
            f"receiver.test:{receiver.port}"
        ]
        other = sent(receiver.url("other.test"), tls=trusting)
        stranger = sent(receiver.url())
        assert len(receiver.received) == 1
    for outcome in (other, stranger):
        assert outcome.status is None
        assert "CERTIFICATE_VERIFY_FAILED" in outcome.error


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would connect to whatever it likes, and no check of ours would count.
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with receiving() as receiver:
        assert sent(receiver.url()).taken


# --- what an answer means


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
def test_every_2xx_is_taken(code: int) -> None:
    assert answered(status(code)).taken


@pytest.mark.parametrize("code", [400, 401, 403, 404, 409, 429, 500, 502, 503])
def test_4xx_and_5xx_are_tried_again(code: int) -> None:
    outcome = answered(status(code))
    assert (outcome.status, outcome.taken, outcome.final) == (code, False, False)
    assert outcome.error == f"answered {code}"


def test_gone_is_never_tried_again() -> None:
    assert answered(status(410)).final


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_target_is_named(code: int) -> None:
    with receiving() as receiver, receiving() as inside:
        receiver.answers.append(status(code, Location=inside.url("127.0.0.1", "/admin")))
        outcome = sent(receiver.url())
        assert inside.received == []
    assert (outcome.status, outcome.taken, outcome.final) == (code, False, False)
    assert "/admin" in outcome.error


def test_retry_after_is_read_in_seconds_and_as_a_date() -> None:
    assert answered(status(503, Retry_After="120")).retry_after_us == 120 * SECOND_US
    dated = answered(status(429, Retry_After=formatdate(time.time() + 600, usegmt=True)))
    assert dated.retry_after_us is not None
    assert 540 * SECOND_US <= dated.retry_after_us <= 600 * SECOND_US
    past = answered(status(503, Retry_After=formatdate(0, usegmt=True)))
    assert past.retry_after_us == 0
    for nonsense in ("soon", "-5", "9" * 40, "Wed, 99 Foo"):
        assert answered(status(503, Retry_After=nonsense)).retry_after_us is None


def test_retry_after_of_any_other_answer_is_not_read() -> None:
    assert answered(status(500, Retry_After="120")).retry_after_us is None
    assert answered(status(200, Retry_After="120")) == Outcome(200)


@given(st.binary(max_size=60) | st.from_regex(DATE_LIKE, fullmatch=True).map(str.encode))
@example(b"Fri, 31 Dec 9999 23:59:59 -9900")
@example(b"Mon, 01 Jan 0001 00:00:00 +9900")
@example(b"Mon, 01 Jan 99999999999999999999 00:00:00 GMT")
@example(b"Mon, 01 Jan 2026 00:00:00 +99999999999999999999")
def test_whatever_retry_after_says_is_a_time_or_nothing(value: bytes) -> None:
    found = _retry_after_us(value, 1_750_000_000)
    assert found is None or found >= 0


# --- receivers that are no good


@pytest.mark.parametrize("bad", [hangs, drips])
def test_a_receiver_that_never_ends_its_answer_is_left_in_time(bad: Answer) -> None:
    began = time.monotonic()
    outcome = answered(bad, IMPATIENT_US)
    assert time.monotonic() - began < 60
    assert (outcome.status, outcome.error) == (None, "no answer within 1 s")


def test_a_receiver_that_said_yes_and_then_drips_has_taken_it() -> None:
    began = time.monotonic()
    assert answered(drips_body, 5 * SECOND_US).taken  # the head must come before that is over
    assert time.monotonic() - began < 60


def test_an_answer_of_a_gigabyte_is_not_read() -> None:
    with receiving() as receiver:
        receiver.answers.append(endless(receiver))
        assert sent(receiver.url()).taken
    assert receiver.wrote_bytes < 64 << 20  # what the sockets' buffers took


def test_garbage_in_place_of_http_is_a_failure_in_words() -> None:
    outcome = answered(garbage)
    assert outcome.status is None
    assert "no valid answer" in outcome.error


def test_nobody_listening_is_a_failure_in_words() -> None:
    with nobody() as port:
        outcome = sent(Receiver(port).url())
    assert (outcome.status, outcome.final) == (None, False)
    assert outcome.error.startswith("no connection")


# --- places where a callback must not go


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "2130706433",
        "0x7f.1",
        "017700000001",
        "127.1",
        "0.0.0.0",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
    ],
)
def test_no_form_of_an_inside_address_gets_a_request(host: str) -> None:
    from replicator.names import ask_system

    with receiving() as receiver:
        outcome = sent(f"http://{host}:{receiver.port}/", allowed=(), ask=ask_system)
        assert receiver.received == []
    assert (outcome.status, outcome.taken) == (None, False)
    assert "not a public one" in outcome.error


def test_a_name_that_turns_inward_after_the_first_look_reaches_nobody() -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.1"]])
    with receiving() as receiver:
        # The first attempt finds it inside an allowed network, the second nowhere allowed.
        assert sent(receiver.url(), ask=lambda *_: next(answers)).taken
        assert not sent(receiver.url(), ask=lambda *_: next(answers), allowed=()).taken
        assert len(receiver.received) == 1


@pytest.mark.parametrize(
    "target",
    [
        "http://user:secret@receiver.test/",
        "http://user@receiver.test/",
        "ftp://receiver.test/",
        "file:///etc/passwd",
        "gopher://receiver.test/",
        "http:///nowhere",
        "no url at all",
        "http://[::1/",
        "http://a.test:99999/",
        "http://\x00.test/",
    ],
)
def test_a_url_that_can_never_work_is_given_up_at_once(target: str) -> None:
    outcome = sent(target)
    assert outcome.final
    assert "secret" not in json.dumps(outcome.error)
