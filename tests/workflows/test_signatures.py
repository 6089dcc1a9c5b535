"""Signatures of webhooks: what their senders publish as examples is good, all else is not."""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook as StandardWebhook

from cas.errors import BadSignature, InvalidRequest
from workflows.signatures import (
    FORM,
    GENERIC,
    GITHUB,
    KINDS,
    SLACK,
    STRIPE,
    TWILIO,
    Call,
    Proof,
    prove,
    read_scheme,
)

URL = "https://hooks.example/api/v1/webhooks/1"


def proved(
    kind: str,
    secret: str,
    body: bytes,
    headers: dict[str, str],
    url: str = URL,
    config: dict[str, Any] | None = None,
) -> Proof:
    return prove(kind, read_scheme(kind, config), secret.encode(), Call(headers, body, url))


# --- GitHub, by the example of its documentation

GITHUB_SECRET = "It's a Secret to Everybody"
GITHUB_BODY = b"Hello, World!"
GITHUB_SIGNATURE = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"


def github(signature: str, body: bytes = GITHUB_BODY, secret: str = GITHUB_SECRET) -> Proof:
    headers = {"X-Hub-Signature-256": signature, "X-GitHub-Delivery": "72d3162e"}
    return proved(GITHUB, secret, body, headers)


def test_githubs_example_is_good() -> None:
    proof = github(GITHUB_SIGNATURE)
    assert (proof.at_s, proof.delivery_id) == (None, "72d3162e")


def test_a_call_of_github_is_known_by_its_body_whatever_its_headers_say() -> None:
    first = github(GITHUB_SIGNATURE)
    headers = {"X-HUB-SIGNATURE-256": GITHUB_SIGNATURE, "X-GITHUB-DELIVERY": "another"}
    assert proved(GITHUB, GITHUB_SECRET, GITHUB_BODY, headers).known_by == first.known_by


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "sha256=",
        GITHUB_SIGNATURE[:-1],
        GITHUB_SIGNATURE[:-1] + "8",
        GITHUB_SIGNATURE + " ",
        GITHUB_SIGNATURE.replace("sha256=", ""),
        GITHUB_SIGNATURE.replace("sha256=", "sha1="),
        "sha256=" + "g" * 64,
        "sha256=" + "é" * 32,
    ],
)
def test_any_other_signature_of_githubs_example_is_not(signature: str) -> None:
    with pytest.raises(BadSignature):
        github(signature)


def test_the_old_sha1_signature_is_not_looked_at() -> None:
    # HMAC-SHA1 of the same example: GitHub sends it beside the other one.
    headers = {"X-Hub-Signature": "sha1=01dc10d0c83e72ed246219cdd91669667fe2ca59"}
    with pytest.raises(BadSignature):
        proved(GITHUB, GITHUB_SECRET, GITHUB_BODY, headers)


def test_each_line_of_a_secret_is_good_while_it_is_changed() -> None:
    proof = github(GITHUB_SIGNATURE, secret=f"the next one\r\n{GITHUB_SECRET}\n")
    assert proof == github(GITHUB_SIGNATURE)
    with pytest.raises(BadSignature):
        github(GITHUB_SIGNATURE, secret="the next one\nthe one after it")


@pytest.mark.parametrize("secret", ["a", "a\nb", "a\nb\nb\nc", "a\nb\nc\nd", "\n".join("abcdab")])
@pytest.mark.parametrize("kind", KINDS)
def test_as_much_is_computed_for_what_proves_nothing_whatever_the_secret_is(
    kind: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two values with two lines each are good while the first is changed to the second."""
    body = urlencode(TWILIO_DOCUMENTED).encode()
    computed: Counter[tuple[str, bytes]] = Counter()
    begin = hmac.new

    class Counted:
        def __init__(self, key: bytes, *, digestmod: str) -> None:
            self._mac = begin(key, digestmod=digestmod)
            self._algorithm, self._text = digestmod, b""

        def update(self, part: bytes) -> None:
            self._mac.update(part)
            self._text += part

        def digest(self) -> bytes:
            computed[self._algorithm, self._text] += 1
            return self._mac.digest()

    headers = {
        "Content-Type": FORM,
        "X-Hub-Signature-256": "sha256=" + "0" * 64,
        "X-Twilio-Signature": "A" * 27 + "=",
        "X": "0" * 64,
    }
    config = {"header": "X"} if kind == GENERIC else None
    monkeypatch.setattr(hmac, "new", Counted)
    with pytest.raises(BadSignature):
        proved(kind, secret, body, headers, TWILIO_URL, config)
    assert len(computed) == 5  # the body by three algorithms, and what Twilio may have signed
    assert set(computed.values()) == {4}


def test_a_call_is_known_by_what_its_sender_calls_it_only_where_that_is_asked_for() -> None:
    proof = github(GITHUB_SIGNATURE)
    named = proof.by_delivery()
    assert named.known_by != proof.known_by
    assert replace(named, known_by=proof.known_by) == proof
    headers = {"X-Hub-Signature-256": GITHUB_SIGNATURE, "X-GitHub-Delivery": "another"}
    other = proved(GITHUB, GITHUB_SECRET, GITHUB_BODY, headers).by_delivery()
    assert other.known_by not in (proof.known_by, named.known_by)
    del headers["X-GitHub-Delivery"]
    bare = proved(GITHUB, GITHUB_SECRET, GITHUB_BODY, headers)
    assert bare.by_delivery() == bare
    config = {"header": "X-Hub-Signature-256", "prefix": "sha256=", "delivery_header": "D"}
    headers["d"] = "72d3162e"
    described = proved(GENERIC, GITHUB_SECRET, GITHUB_BODY, headers, config=config)
    assert described.by_delivery().known_by == named.known_by


@pytest.mark.parametrize("secret", ["", "\n\n"])
def test_nothing_is_signed_by_no_secret(secret: str) -> None:
    # HMAC-SHA256 of the body with an empty key: what anybody can make.
    empty = "sha256=2bbcfa9524f3218c7a34b30e6936f8b1a4516cb097f1a85a1c7d98b5977ec769"
    with pytest.raises(BadSignature):
        github(empty, secret=secret)


# --- Stripe, by the steps of its documentation; the value is of `openssl dgst`

STRIPE_SECRET = "whsec_test_secret"
STRIPE_BODY = b'{"id": "evt_1", "object": "event"}'
STRIPE_V1 = "09357d4fb8d9eba6f07fdea6b2428fa819063ec7bb7f9eca18b88cf0ff729476"
# What the documentation shows, whose secret it does not tell.
STRIPE_SHOWN = (
    "t=1492774577,"
    "v1=5257a869e7ecebeda32affa62cdca3fa51cad7e77a0e56ff536d0ce8e108d8bd,"
    "v0=6ffbb59b2300aae63f272406069a9788598b792a944a07aba816edb039989a39"
)


def stripe(header: str, body: bytes = STRIPE_BODY) -> Proof:
    return proved(STRIPE, STRIPE_SECRET, body, {"Stripe-Signature": header})


def test_a_signature_of_stripe_proves_its_time_and_event() -> None:
    assert stripe(f"t=1492774577,v1={STRIPE_V1}") == Proof("id:evt_1", 1492774577, 300, "evt_1")


def test_one_good_signature_of_several_is_enough() -> None:
    assert stripe(f"{STRIPE_SHOWN},v1={STRIPE_V1}").at_s == 1492774577


@pytest.mark.parametrize(
    "header",
    [
        "",
        STRIPE_SHOWN,
        f"t=1492774577,v0={STRIPE_V1}",  # a downgrade
        f"v1={STRIPE_V1}",
        f"t=1492774578,v1={STRIPE_V1}",
        f"t=1492774577,t=1492774578,v1={STRIPE_V1}",
        f"t=1492774577x,v1={STRIPE_V1}",
        f"t=²,v1={STRIPE_V1}",
        f"t={'9' * 5000},v1={STRIPE_V1}",
        "t=1492774577,v1=",
    ],
)
def test_any_other_signature_of_stripe_is_not_good(header: str) -> None:
    with pytest.raises(BadSignature):
        stripe(header)


def test_without_an_event_of_stripe_the_time_says_which_call_it_is() -> None:
    # HMAC-SHA256 of "<t>.{}" for two times.
    calls = [
        "t=1492774577,v1=53140ab8fa70c511cc40d5c9198af7dde7bbaee877038c056d8250c3bd3b2e11",
        "t=1492774578,v1=629b75556353d6ac682ce5b3173cd790c7caf0af65ed8e176065822a2627cc2b",
    ]
    proofs = [stripe(call, b"{}") for call in calls]
    assert all(proof.is_known_by_time for proof in proofs)
    assert proofs[0].known_by != proofs[1].known_by
    assert not stripe(f"t=1492774577,v1={STRIPE_V1}").is_known_by_time


# --- Twilio, by the examples of its documentation and of its libraries' tests

TWILIO_URL = "https://mycompany.com/myapp.php?foo=1&bar=2"
TWILIO_DOCUMENTED = {
    "CallSid": "CA1234567890ABCDE",
    "Caller": "+14158675310",
    "Digits": "1234",
    "From": "+14158675310",
    "To": "+18005551212",
}
TWILIO_TESTED = {**TWILIO_DOCUMENTED, "Caller": "+14158675309", "From": "+14158675309"}
TWILIO_JSON = b'{"property": "value", "boolean": true}'
TWILIO_HASH = "0a1ff7634d9ab3b95db5c9a2dfe9416e41502b283a80c7cf19632632f96e6620"


def twilio(signature: str, url: str, body: bytes, media_type: str = FORM) -> Proof:
    headers = {"X-Twilio-Signature": signature, "Content-Type": media_type}
    return proved(TWILIO, "12345", body, headers, url)


@pytest.mark.parametrize(
    ("signature", "url", "parameters"),
    [
        ("GvWf1cFY/Q7PnoempGyD5oXAezc=", TWILIO_URL, TWILIO_DOCUMENTED),
        ("RSOYDt4T1cUTdK1PDd93/VVr8B8=", TWILIO_URL, TWILIO_TESTED),
        # Its port is signed in some products and left out in others.
        (
            "RSOYDt4T1cUTdK1PDd93/VVr8B8=",
            TWILIO_URL.replace(".com", ".com:443"),
            TWILIO_TESTED,
        ),
        (
            "RSOYDt4T1cUTdK1PDd93/VVr8B8=",
            TWILIO_URL.replace(".com", ".com:1234"),
            TWILIO_TESTED,
        ),
        ("kvajT1Ptam85bY51eRf/AJRuM3w=", TWILIO_URL, TWILIO_TESTED),
        (
            "0ZXoZLH/DfblKGATFgpif+LLRf4=",
            TWILIO_URL.replace("https", "http"),
            TWILIO_TESTED,
        ),
    ],
)
def test_twilios_examples_are_good(signature: str, url: str, parameters: dict[str, str]) -> None:
    assert twilio(signature, url, urlencode(parameters).encode()).at_s is None


@pytest.mark.parametrize(
    ("signature", "url"),
    [
        ("a9nBmqA0ju/hNViExpshrM61xv4=", f"{TWILIO_URL}&bodySHA256={TWILIO_HASH}"),
        (
            "y77kIzt2vzLz71DgmJGsen2scGs=",
            f"https://mycompany.com/myapp.php?bodySHA256={TWILIO_HASH}",
        ),
    ],
)
def test_twilio_signs_the_hash_of_what_is_no_form(signature: str, url: str) -> None:
    assert twilio(signature, url, TWILIO_JSON, "application/json").at_s is None
    with pytest.raises(BadSignature):
        twilio(signature, url, TWILIO_JSON.replace(b"true", b"false"), "application/json")


@pytest.mark.parametrize(
    ("url", "body", "media_type"),
    [
        (TWILIO_URL + "&baz=3", urlencode(TWILIO_DOCUMENTED).encode(), FORM),
        (TWILIO_URL.replace("mycompany", "other"), urlencode(TWILIO_DOCUMENTED).encode(), FORM),
        (TWILIO_URL, urlencode({**TWILIO_DOCUMENTED, "Digits": "9"}).encode(), FORM),
        (TWILIO_URL, urlencode({**TWILIO_DOCUMENTED, "New": "1"}).encode(), FORM),
        (TWILIO_URL, urlencode(TWILIO_DOCUMENTED).encode(), "text/plain"),
        (TWILIO_URL, b"", FORM),
        (TWILIO_URL, b"\xff", FORM),
        ("https://[broken/", b"", FORM),
        ("https://mycompany.com:99999/", b"", FORM),
    ],
)
def test_any_other_call_with_twilios_signature_is_not_good(
    url: str, body: bytes, media_type: str
) -> None:
    with pytest.raises(BadSignature):
        twilio("GvWf1cFY/Q7PnoempGyD5oXAezc=", url, body, media_type)


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ("CallSidCA1234567890ABCDE", list(TWILIO_DOCUMENTED)[1:]),
        ("CallSidCA1234567890ABCDECaller+1", ["4158675310", *list(TWILIO_DOCUMENTED)[2:]]),
        ("".join(name + value for name, value in TWILIO_DOCUMENTED.items()), []),
    ],
)
def test_what_twilio_signed_is_one_call_wherever_its_address_is_said_to_end(
    taken: str, left: list[str]
) -> None:
    signature = "GvWf1cFY/Q7PnoempGyD5oXAezc="
    whole = twilio(signature, TWILIO_URL, urlencode(TWILIO_DOCUMENTED).encode())
    body = urlencode({name: TWILIO_DOCUMENTED.get(name, "") for name in left}).encode()
    assert twilio(signature, TWILIO_URL + taken, body).known_by == whole.known_by


def test_what_twilio_signed_is_one_call_wherever_its_parameters_are_said_to_end() -> None:
    signature = "GvWf1cFY/Q7PnoempGyD5oXAezc="
    whole = twilio(signature, TWILIO_URL, urlencode(TWILIO_DOCUMENTED).encode())
    cut = {**TWILIO_DOCUMENTED, "CallSidCA1234567890": "ABCDE"}
    del cut["CallSid"]
    assert twilio(signature, TWILIO_URL, urlencode(cut).encode()).known_by == whole.known_by


def test_the_port_that_twilio_did_not_sign_makes_no_other_call() -> None:
    signature = "GvWf1cFY/Q7PnoempGyD5oXAezc="
    body = urlencode(TWILIO_DOCUMENTED).encode()
    other = TWILIO_URL.replace(".com", ".com:443")
    assert twilio(signature, TWILIO_URL, body) == twilio(signature, other, body)


def test_a_body_that_twilio_did_not_sign_is_not_taken() -> None:
    # Good for the URL alone, as for a call without a body.
    signature = "zYQTYrRWXE7LtzbG4PfP7/bkkGo="
    with pytest.raises(BadSignature):
        twilio(signature, TWILIO_URL, TWILIO_JSON, "application/json")


# --- generic: Standard Webhooks

STANDARD_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
STANDARD = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
STANDARD_BODY = b'{"test": 2432232314}'


def test_the_example_of_standard_webhooks_is_good() -> None:
    proof = proved(GENERIC, STANDARD_SECRET, STANDARD_BODY, STANDARD)
    name = STANDARD["webhook-id"]
    assert proof == Proof(f"id:{name}", 1614265330, 300, name)
    bare = STANDARD_SECRET.removeprefix("whsec_")
    assert proved(GENERIC, bare, STANDARD_BODY, STANDARD) == proof


def test_a_message_of_standard_webhooks_may_have_several_signatures() -> None:
    several = f"v1,AAAA v1a,BBBB {STANDARD['webhook-signature']}"
    headers = {**STANDARD, "webhook-signature": several}
    assert proved(GENERIC, STANDARD_SECRET, STANDARD_BODY, headers).at_s == 1614265330


@pytest.mark.parametrize(
    "changed",
    [
        {"webhook-id": "msg_another"},
        {"webhook-id": ""},
        {"webhook-timestamp": "1614265331"},
        {"webhook-timestamp": ""},
        {"webhook-signature": ""},
        {"webhook-signature": STANDARD["webhook-signature"].replace("v1,", "v2,")},
        {"webhook-signature": STANDARD["webhook-signature"].removeprefix("v1,")},
        {"webhook-signature": "v1,g0hM9SsE-OTPJTGt_tmIKtSyZlE3uFJELVlNIOLJ1OE="},
    ],
)
def test_any_other_message_is_not_good(changed: dict[str, str]) -> None:
    with pytest.raises(BadSignature):
        proved(GENERIC, STANDARD_SECRET, STANDARD_BODY, {**STANDARD, **changed})
    with pytest.raises(BadSignature):
        proved(GENERIC, STANDARD_SECRET, STANDARD_BODY + b" ", STANDARD)


def standard(identifier: str) -> Proof:
    at = datetime.fromtimestamp(1614265330, UTC)
    headers = {
        "webhook-id": identifier,
        "webhook-timestamp": "1614265330",
        "webhook-signature": StandardWebhook(STANDARD_SECRET).sign(identifier, at, "{}"),
    }
    return proved(GENERIC, STANDARD_SECRET, b"{}", headers)


@pytest.mark.parametrize(
    "identifier", ["evt:2026-11-21/a=b", "~!#$%&'()*+,;<>?@[]^`{|}", "x" * 255]
)
def test_the_identifier_of_a_message_may_have_any_character_but_a_dot(identifier: str) -> None:
    assert standard(identifier).known_by == f"id:{identifier}"


@pytest.mark.parametrize("identifier", ["a.b", ".", "a b", "a\tb", "é", "", "x" * 256])
def test_no_other_identifier_of_a_message_is_taken_however_well_it_is_signed(
    identifier: str,
) -> None:
    with pytest.raises(BadSignature):
        standard(identifier)


@given(key=st.binary(min_size=1, max_size=64), body=st.text(max_size=200))
def test_what_the_library_of_that_scheme_signs_is_good(key: bytes, body: str) -> None:
    secret = f"whsec_{b64encode(key).decode()}"
    at = datetime.fromtimestamp(1614265330, UTC)
    signature = StandardWebhook(secret).sign("msg_1", at, body)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": "1614265330",
        "webhook-signature": signature,
    }
    assert proved(GENERIC, secret, body.encode(), headers).delivery_id == "msg_1"


# --- generic: as a registration says

SLACKS_SCHEME = {
    "header": "X-Slack-Signature",
    "prefix": "v0=",
    "signed": "v0:{timestamp}:{body}",
    "timestamp_header": "X-Slack-Request-Timestamp",
}
SLACK_BODY = (
    b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow"
    b"&channel_id=G8PSS9T3V&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner"
    b"&command=%2Fwebhook-collect&text="
    b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554"
    b"%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121."
    b"803a0bc887a14d10d2c447fce8b6703c"
)


SLACK_SECRET = "8f742231b10e8888abcd99yyyzzz85a5"
SLACK_HEADERS = {
    "X-Slack-Request-Timestamp": "1531420618",
    "X-Slack-Signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
}


def test_slacks_example_is_good_by_its_kind_and_by_a_scheme_that_says_how_slack_signs() -> None:
    proof = proved(SLACK, SLACK_SECRET, SLACK_BODY, SLACK_HEADERS)
    assert (proof.at_s, proof.tolerance_s, proof.delivery_id) == (1531420618, 300, None)
    assert proof.is_known_by_time
    described = proved(GENERIC, SLACK_SECRET, SLACK_BODY, SLACK_HEADERS, config=SLACKS_SCHEME)
    assert described == proof


@pytest.mark.parametrize(
    "changed",
    [
        {"X-Slack-Request-Timestamp": "1531420619"},
        {"X-Slack-Request-Timestamp": "1531420618 "},
        {"X-Slack-Request-Timestamp": ""},
        {"X-Slack-Signature": ""},
        {"X-Slack-Signature": "v0="},
        {"X-Slack-Signature": SLACK_HEADERS["X-Slack-Signature"].removeprefix("v0=")},
        {"X-Slack-Signature": SLACK_HEADERS["X-Slack-Signature"].replace("v0=", "v1=")},
    ],
)
def test_any_other_call_of_slack_is_not_good(changed: dict[str, str]) -> None:
    with pytest.raises(BadSignature):
        proved(SLACK, SLACK_SECRET, SLACK_BODY, {**SLACK_HEADERS, **changed})
    with pytest.raises(BadSignature):
        proved(SLACK, SLACK_SECRET, SLACK_BODY + b"&x=1", SLACK_HEADERS)


def test_an_event_of_slack_is_known_by_its_identifier() -> None:
    def event(at_s: int, body: bytes) -> Proof:
        signature = hmac.digest(b"secret", b"v0:%d:%s" % (at_s, body), "sha256").hex()
        headers = {
            "X-Slack-Request-Timestamp": str(at_s),
            "X-Slack-Signature": f"v0={signature}",
        }
        return proved(SLACK, "secret", body, headers, config={"tolerance": 60})

    body = b'{"type": "event_callback", "event_id": "Ev0LAN670R"}'
    assert event(1, body) == Proof("id:Ev0LAN670R", 1, 60, "Ev0LAN670R")
    assert event(2, body).known_by == event(1, body).known_by
    for other in (b'{"event_id": "a b"}', b'{"event_id": 1}', b"[]", b"event_id=Ev1"):
        assert event(1, other).is_known_by_time


@given(at=st.integers(0, 10**10), later=st.integers(1, 10**6), body=st.binary(max_size=40))
def test_what_is_signed_with_a_time_alone_is_known_by_it(at: int, later: int, body: bytes) -> None:
    def call(at_s: int) -> Proof:
        signed = b"v0:%d:%s" % (at_s, body)
        signature = hmac.digest(b"secret", signed, "sha256").hex()
        headers = {
            "X-Slack-Request-Timestamp": str(at_s),
            "X-Slack-Signature": f"v0={signature}",
        }
        return proved(GENERIC, "secret", body, headers, config=SLACKS_SCHEME)

    assert call(at) == call(at)
    assert call(at).known_by != call(at + later).known_by


@given(
    identifier=st.text("ab1-_.:/=", min_size=1, max_size=12),
    between=st.text("ab1-_.: /", min_size=1, max_size=4),
    body=st.text("ab1-_.: /", max_size=12),
    cut=st.integers(0, 30),
)
def test_a_signed_text_is_of_one_call_however_it_is_cut(
    identifier: str, between: str, body: str, cut: int
) -> None:
    config = {"header": "X", "id_header": "I", "signed": f"{{id}}{between}{{body}}"}
    parting = next((each for each in between if each not in "ab1-_"), "")
    if not parting:
        with pytest.raises(InvalidRequest, match="between"):
            read_scheme(GENERIC, config)
        return
    text = identifier + between + body
    signature = hmac.digest(b"secret", text.encode(), "sha256").hex()
    if text[cut : cut + len(between)] != between:
        return
    sent, rest = text[:cut], text[cut + len(between) :].encode()
    try:
        proof = proved(GENERIC, "secret", rest, {"X": signature, "I": sent}, config=config)
    except BadSignature:
        assert sent != identifier or parting in identifier
    else:
        only = text[: text.index(parting) - between.index(parting)]
        assert proof.known_by == f"id:{only}"
        assert only == identifier or parting in identifier


def test_githubs_example_is_good_by_a_scheme_that_says_how_github_signs() -> None:
    config = {"header": "X-Hub-Signature-256", "prefix": "sha256="}
    headers = {"X-Hub-Signature-256": GITHUB_SIGNATURE}
    proof = proved(GENERIC, GITHUB_SECRET, GITHUB_BODY, headers, config=config)
    assert proof.known_by == github(GITHUB_SIGNATURE).known_by


def test_no_scheme_is_standard_webhooks() -> None:
    assert (
        read_scheme(GENERIC, None)
        == read_scheme(GENERIC, {})
        == read_scheme(
            GENERIC,
            {
                "header": "webhook-signature",
                "prefix": "v1,",
                "encoding": "base64",
                "signed": "{id}.{timestamp}.{body}",
                "id_header": "webhook-id",
                "timestamp_header": "webhook-timestamp",
                "secret": "base64",
            },
        )
    )
    assert msgspec.json.decode(read_scheme(GENERIC, None))["tolerance"] == 300


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        ("gitlab", None, "kind"),
        ("standard", None, "or generic, which by itself is Standard Webhooks"),
        (GITHUB, {"header": "X"}, "nothing to say"),
        (TWILIO, {"tolerance": 3}, "nothing to say"),
        (SLACK, {"tolerance": 24 * 3600 + 1}, "tolerance"),
        (SLACK, {"header": "X"}, "header"),
        (STRIPE, {"tolerance": 0}, "tolerance"),
        (STRIPE, {"header": "X"}, "header"),
        (GENERIC, {"prefix": "v1"}, "`header`"),
        (GENERIC, {"header_name": "X"}, "`header_name`"),
        (GENERIC, {"header": "X Y"}, "header"),
        (GENERIC, {"header": "X", "algorithm": "md5"}, "algorithm"),
        (GENERIC, {"header": "X", "signed": "fixed"}, "{body}"),
        (GENERIC, {"header": "X", "signed": "{body}{body}"}, "{body}"),
        (GENERIC, {"header": "X", "signed": "{timestamp}.{body}"}, "{body}"),
        (GENERIC, {"header": "X", "timestamp_header": "T"}, "{timestamp}"),
        (
            GENERIC,
            {"header": "X", "timestamp_header": "T", "signed": "{body}{timestamp}"},
            "last",
        ),
        (
            GENERIC,
            {
                "header": "X",
                "timestamp_header": "T",
                "id_header": "I",
                "signed": "{id}{timestamp}.{body}",
            },
            "between",
        ),
        (GENERIC, {"header": "X", "id_header": "I", "signed": "{id}{body}"}, "between"),
        (GENERIC, {"header": "X", "id_header": "I", "signed": "v0:{id}-{body}"}, "between"),
        (
            GENERIC,
            {"header": "X", "timestamp_header": "T", "signed": "{timestamp}{body}"},
            "between",
        ),
        (
            GENERIC,
            {
                "header": "X",
                "timestamp_header": "T",
                "id_header": "I",
                "signed": "{timestamp}.{id}body{body}",
            },
            "between",
        ),
        (GENERIC, {"header": "X", "prefix": "a b"}, "prefix"),
        (GENERIC, {"header": "X", "delivery_header": "a b"}, "delivery_header"),
        (
            GENERIC,
            {"header": "X", "id_header": "I", "signed": "{id}.{body}", "delivery_header": "D"},
            "delivery_header",
        ),
        (GENERIC, {"header": "X", "unknown": 1}, "unknown"),
    ],
)
def test_a_scheme_that_proves_nothing_is_refused(
    kind: str, config: dict[str, Any] | None, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        read_scheme(kind, config)


@given(
    kind=st.sampled_from(KINDS),
    values=st.lists(st.text(max_size=40), min_size=8, max_size=8),
    body=st.binary(max_size=60),
    url=st.text(max_size=60),
)
def test_whatever_comes_is_refused_and_nothing_else(
    kind: str, values: list[str], body: bytes, url: str
) -> None:
    names = (
        "x-hub-signature-256",
        "stripe-signature",
        "x-twilio-signature",
        "x-slack-signature",
        "x-slack-request-timestamp",
        "webhook-signature",
        "webhook-id",
        "content-type",
    )
    headers = dict(zip(names, values, strict=True))
    with pytest.raises(BadSignature):
        proved(kind, "secret", body, headers, url)
