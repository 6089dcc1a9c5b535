"""Who signed a webhook's call, by the scheme of who sends it.

    github    X-Hub-Signature-256: HMAC-SHA256 of the body, hex
    stripe    Stripe-Signature: HMAC-SHA256 of "<t>.<body>", hex, where t is the time
    twilio    X-Twilio-Signature: HMAC-SHA1 of the URL and the sorted parameters, base64
    generic   Standard Webhooks, or what a `Scheme` says

Only what is signed proves anything. GitHub's and Twilio's delivery identifiers are not, so
that a call is known again by its signed bytes, whichever part of it they are said to be;
Stripe's event and the message of Standard Webhooks have a signed identifier, which stays the
same when the sender tries again with a new time, and is what they are known by. Where a time
is signed and no identifier, the time belongs to what a call is known by: nobody can tell a
sender's second attempt from the same thing that happened again, and a lost event is worse
than one too many.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, final
from urllib.parse import parse_qsl, urlsplit

import msgspec

from cas.errors import BadSignature, InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

GITHUB: Final = "github"
STRIPE: Final = "stripe"
TWILIO: Final = "twilio"
GENERIC: Final = "generic"
KINDS: Final = (GITHUB, STRIPE, TWILIO, GENERIC)

FORM: Final = "application/x-www-form-urlencoded"

# How far the time in a call may be from ours, as Stripe and Standard Webhooks advise.
TOLERANCE_S: Final = 300
_SECRETS_MAX: Final = 10  # that are good at once: lines of a secret
_SIGNATURES_MAX: Final = 20  # of one call: a sender that changes its secret sends some
PARAMETERS_MAX: Final = 1000  # of a form
_PLACES = re.compile(r"(\{(?:body|id|timestamp)\})")
# No dot nor colon: what stands between the parts of a signed text is in none of them.
_ID = re.compile(r"[A-Za-z0-9_-]{1,255}", re.ASCII)
_PARTING = re.compile(r"[^A-Za-z0-9_-]", re.ASCII)
_HEADER_NAME: Final = r"^[A-Za-z0-9-]{1,100}$"

_Header = Annotated[str, msgspec.Meta(pattern=_HEADER_NAME)]
_Tolerance = Annotated[int, msgspec.Meta(ge=1, le=24 * 3600)]  # seconds


@final
class Scheme(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a `generic` webhook is signed; the defaults are Standard Webhooks.

    `signed` is the text that is signed: "{body}", with "{timestamp}" and "{id}" where the
    headers of both are given, and between them something that is in neither, such as a dot.
    The signature header holds one signature or, with spaces between
    them, several; each begins with `prefix`, the others are left out.
    """

    header: _Header = "webhook-signature"
    prefix: Annotated[str, msgspec.Meta(max_length=100)] = "v1,"
    algorithm: Literal["sha1", "sha256", "sha512"] = "sha256"
    encoding: Literal["hex", "base64"] = "base64"
    signed: Annotated[str, msgspec.Meta(max_length=200)] = "{id}.{timestamp}.{body}"
    id_header: _Header | None = "webhook-id"
    timestamp_header: _Header | None = "webhook-timestamp"
    # "base64": the secret is `whsec_` and base64, or base64 alone; "text": its own bytes.
    secret: Literal["text", "base64"] = "base64"
    tolerance: _Tolerance = TOLERANCE_S
    headers: Annotated[list[_Header], msgspec.Meta(max_length=20)] = []  # shown in the event


@final
class Timed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be said of `stripe`."""

    tolerance: _Tolerance = TOLERANCE_S


@final
@dataclass(frozen=True, slots=True)
class Call:
    """A request as it came. `url` is the public address that it was sent to, with its query;
    `address` is who sent it, as far as that is known."""

    headers: Mapping[str, str]
    body: bytes
    url: str
    address: Address | None = None

    def header(self, name: str) -> str:
        """A header's value, by its name in any case; "" where it did not come."""
        wanted = name.lower()
        return next((value for key, value in self.headers.items() if key.lower() == wanted), "")

    @property
    def media_type(self) -> str:
        return self.header("content-type").partition(";")[0].strip().lower()


@final
@dataclass(frozen=True, slots=True)
class Proof:
    """What a good signature proves of a call."""

    known_by: str  # the same for the same call, however often it is sent
    at_s: int | None  # when it was signed; None: the scheme does not say
    tolerance_s: int = 0
    delivery_id: str | None = None  # as its sender calls it
    # Whether `known_by` has the time in it: a call that is too old need not be remembered.
    is_known_by_time: bool = False


def read_scheme(kind: str, config: Mapping[str, Any] | None) -> bytes:
    """What a registration says of its signature, as it is kept; raises InvalidRequest."""
    if kind not in KINDS:
        raise InvalidRequest(kind, f"kind: {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    given = dict(config or {})
    if kind in (GITHUB, TWILIO):
        if given:
            raise InvalidRequest(min(given), f"signature: there is nothing to say of {kind}")
        return b"{}"
    form = Scheme if kind == GENERIC else Timed
    if form is Scheme and given:
        # Who says how it is signed says all of it: nobody wants half of Standard Webhooks.
        plain = {"prefix": "", "encoding": "hex", "signed": "{body}", "secret": "text"}
        given = {**plain, "id_header": None, "timestamp_header": None, **given}
        if "header" not in given:
            raise InvalidRequest("signature", "signature: header is needed")
    try:
        scheme = msgspec.convert(given, form)
    except msgspec.ValidationError as error:
        raise InvalidRequest("signature", f"signature: {error}") from None
    if isinstance(scheme, Scheme):
        _check(scheme)
    return msgspec.json.encode(scheme)


def _check(scheme: Scheme) -> None:
    places = _PLACES.findall(scheme.signed)
    wanted = ["{body}"]
    wanted += ["{id}"] if scheme.id_header else []
    wanted += ["{timestamp}"] if scheme.timestamp_header else []
    if sorted(places) != sorted(wanted):
        raise InvalidRequest(scheme.signed, f"signed: each of {' '.join(wanted)} once")
    if not scheme.signed.endswith("{body}"):
        # Else its end could be taken for an identifier, or for a time.
        raise InvalidRequest(scheme.signed, "signed: {body} comes last")
    if not all(map(_PARTING.search, _PLACES.split(scheme.signed)[2:-1:2])):
        # Else the same signed text could be cut elsewhere, and so be another call.
        reason = (
            "signed: between {id}, {timestamp} and {body} comes a character that is no ASCII "
            "letter or digit, nor _ or -"
        )
        raise InvalidRequest(scheme.signed, reason)
    if not (scheme.prefix.isascii() and scheme.prefix.isprintable() and " " not in scheme.prefix):
        raise InvalidRequest(scheme.prefix, "prefix: ASCII without spaces")


def shown_headers(kind: str, signature: bytes) -> tuple[str, ...]:
    """Which headers an event tells of, besides the content type and who sent it."""
    if kind == GITHUB:
        return ("X-GitHub-Event", "X-GitHub-Delivery", "X-GitHub-Hook-ID")
    if kind == TWILIO:
        return ("I-Twilio-Idempotency-Token",)
    return tuple(_scheme(signature).headers) if kind == GENERIC else ()


def prove(kind: str, signature: bytes, secret: bytes, call: Call) -> Proof:
    """What the signature of a call proves; raises BadSignature where it is not a good one.

    `secret` has one key a line; each of them is good. Whether the time of the call is near
    enough is judged by who has a clock.
    """
    keys = [line.strip() for line in secret.splitlines() if line.strip()][:_SECRETS_MAX]
    if kind == GITHUB:
        return _github(keys, call)
    if kind == STRIPE:
        return _stripe(keys, call, msgspec.json.decode(signature, type=Timed).tolerance)
    if kind == TWILIO:
        return _twilio(keys, call)
    return _generic(keys, call, _scheme(signature))


def _scheme(signature: bytes) -> Scheme:
    return msgspec.json.decode(signature, type=Scheme)


def _github(keys: list[bytes], call: Call) -> Proof:
    given = call.header("x-hub-signature-256")
    if not given.startswith("sha256="):
        raise BadSignature
    _match(keys, call.body, "sha256", [_hex(given.removeprefix("sha256="))])
    return Proof(_named(call.body), None, delivery_id=call.header("x-github-delivery") or None)


def _stripe(keys: list[bytes], call: Call, tolerance_s: int) -> Proof:
    times: list[str] = []
    given: list[bytes] = []
    for part in call.header("stripe-signature").split(","):
        name, _, value = part.strip().partition("=")
        if name == "t":
            times.append(value)
        elif name == "v1":  # v0 is for tests of theirs; to take it would be a downgrade
            given.append(_hex(value))
    if len(times) != 1:
        raise BadSignature
    at_s = _seconds(times[0])
    signed = b"%s.%s" % (times[0].encode(), call.body)
    _match(keys, signed, "sha256", given)
    return _proof(signed, at_s, tolerance_s, _stripe_event(call.body))


def _stripe_event(body: bytes) -> str | None:
    """The identifier that Stripe gives an event: the same at each attempt, whose body may
    differ in what else it tells."""
    try:
        event = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    found = event.get("id") if isinstance(event, dict) else None
    return found if isinstance(found, str) and _ID.fullmatch(found) else None


def _twilio(keys: list[bytes], call: Call) -> Proof:
    given = [_base64(call.header("x-twilio-signature"))]
    try:
        address = urlsplit(call.url)
        query = parse_qsl(address.query, max_num_fields=PARAMETERS_MAX)
        hashes = [value for name, value in query if name == "bodySHA256"]
        parameters = "" if hashes else _twilio_parameters(call)
        texts = [(url + parameters).encode() for url in _with_and_without_port(call.url)]
    except ValueError:
        raise BadSignature from None
    if hashes:
        # Not a form: the URL, which is signed, has the hash of the body.
        body = hashlib.sha256(call.body).hexdigest()
        if len(hashes) != 1 or not hmac.compare_digest(hashes[0].lower().encode(), body.encode()):
            raise BadSignature
    signed = next((text for text in texts if _matches(keys, text, "sha1", given)), None)
    if signed is None:
        raise BadSignature
    token = call.header("i-twilio-idempotency-token")
    # By all that is signed, and as it is: nothing stands between the address and the
    # parameters, so that what was one of these could come as a part of that.
    return Proof(_named(signed), None, delivery_id=token or None)


def _twilio_parameters(call: Call) -> str:
    if not call.body:
        return ""
    if call.media_type != FORM:
        raise BadSignature  # nothing of this body is signed
    pairs = parse_qsl(
        call.body.decode(),
        keep_blank_values=True,
        errors="strict",
        max_num_fields=PARAMETERS_MAX,
    )
    return "".join(name + value for name, value in sorted(set(pairs)))


def _with_and_without_port(url: str) -> Iterator[str]:
    """Twilio signs the port of the scheme in some of its products, and leaves it out in
    others."""
    yield url
    parts = urlsplit(url)
    if parts.port is not None:
        netloc = parts.netloc.rpartition(":")[0]
    else:
        netloc = f"{parts.netloc}:{443 if parts.scheme == 'https' else 80}"
    yield url.replace(f"://{parts.netloc}", f"://{netloc}", 1)


def _generic(keys: list[bytes], call: Call, scheme: Scheme) -> Proof:
    named = {"{body}": call.body}
    identifier = None
    at_s = None
    if scheme.id_header is not None:
        identifier = call.header(scheme.id_header)
        if not _ID.fullmatch(identifier):
            raise BadSignature
        named["{id}"] = identifier.encode()
    if scheme.timestamp_header is not None:
        text = call.header(scheme.timestamp_header)
        at_s = _seconds(text)
        named["{timestamp}"] = text.encode()
    parts = (named.get(part, part.encode()) for part in _PLACES.split(scheme.signed))
    signed = b"".join(parts)

    read = _hex if scheme.encoding == "hex" else _base64
    found = call.header(scheme.header).split(" ")[:_SIGNATURES_MAX]
    given = [
        read(text.removeprefix(scheme.prefix)) for text in found if text.startswith(scheme.prefix)
    ]
    if scheme.secret == "base64":
        keys = [_key(key) for key in keys]
    _match(keys, signed, scheme.algorithm, given)
    return _proof(signed, at_s, scheme.tolerance, identifier)


def _proof(signed: bytes, at_s: int | None, tolerance_s: int, identifier: str | None) -> Proof:
    """By its identifier, which is signed; else by all that is signed."""
    if identifier is not None:
        return Proof(f"id:{identifier}", at_s, tolerance_s, identifier)
    return Proof(_named(signed), at_s, tolerance_s, is_known_by_time=at_s is not None)


def _match(keys: list[bytes], signed: bytes, algorithm: str, given: list[bytes]) -> None:
    if not _matches(keys, signed, algorithm, given):
        raise BadSignature


def _matches(keys: list[bytes], signed: bytes, algorithm: str, given: list[bytes]) -> bool:
    """Whether one of the signatures is by one of the keys. Every pair is compared, in a time
    that tells nothing."""
    good = False
    for key in keys:
        right = hmac.digest(key, signed, algorithm)
        for signature in given[:_SIGNATURES_MAX]:
            good |= hmac.compare_digest(right, signature)
    return good


def _named(signed: bytes) -> str:
    return f"sha256:{hashlib.sha256(signed).hexdigest()}"


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise BadSignature
    return int(text)


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text) if text.isalnum() else b""
    except ValueError:
        return b""


def _base64(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (NotBase64, ValueError):
        return b""


def _key(shown: bytes) -> bytes:
    """The key of Standard Webhooks, in the form in which it is shown: `whsec_…`."""
    text = shown.removeprefix(b"whsec_")
    try:
        return b64decode(text + b"=" * (-len(text) % 4), validate=True) or shown
    except (NotBase64, ValueError):
        return shown


def standard_secret(key: bytes) -> bytes:
    """A key as senders of Standard Webhooks are told it."""
    return b"whsec_" + b64encode(key)
