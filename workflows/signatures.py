"""Who signed a webhook's call, by the scheme of who sends it.

    github    X-Hub-Signature-256: HMAC-SHA256 of the body, hex
    slack     X-Slack-Signature: HMAC-SHA256 of "v0:<time>:<body>", hex
    stripe    Stripe-Signature: HMAC-SHA256 of "<t>.<body>", hex, where t is the time
    twilio    X-Twilio-Signature: HMAC-SHA1 of the URL and the sorted parameters, base64
    generic   Standard Webhooks, or what a `Scheme` says

Of Standard Webhooks it is the symmetric signature, `v1`: the asymmetric one, `v1a`, would need a
public key in place of a secret.

Only what is signed proves anything. GitHub's and Twilio's delivery identifiers are not, so
that a call is known again by its signed bytes, whichever part of it they are said to be
(unless a registration accepts repeats: see `Proof.by_delivery`);
the events of Slack and Stripe and the message of Standard Webhooks have a signed identifier,
which stays the same when the sender tries again with a new time, and is what they are known
by. Where a time is signed and no identifier, the time belongs to what a call is known by:
nobody can tell a sender's second attempt from the same thing that happened again, and a lost
event is worse than one too many.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from base64 import b64decode
from binascii import Error as NotBase64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, final
from urllib.parse import parse_qsl, urlsplit

import msgspec

from cas.errors import BadSignature, InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

GITHUB: Final = "github"
SLACK: Final = "slack"
STRIPE: Final = "stripe"
TWILIO: Final = "twilio"
GENERIC: Final = "generic"
REFUSE: Final = "refuse"  # what says the same again is the same call
ACCEPT: Final = "accept"  # unless its sender gives it another identifier, signed or not
KINDS: Final = (GITHUB, SLACK, STRIPE, TWILIO, GENERIC)

FORM: Final = "application/x-www-form-urlencoded"

# How far the time in a call may be from ours, as Slack, Stripe and Standard Webhooks advise.
TOLERANCE_S: Final = 300
_SIGNATURES_MAX: Final = 20  # of one call: a sender that changes its secret sends some
PARAMETERS_MAX: Final = 1000  # of a form
# A call that proves nothing is compared with so many keys by each algorithm: those of two values
# with the two lines that each may have. Only secrets that were set when a value could have more
# lines have more keys, whose time is told.
_KEYS_ALIKE: Final = 4
_BODY: Final = "body"
_PLACES = re.compile(r"(\{(?:body|id|timestamp)\})")
_ID = re.compile(r"[!-~]{1,255}")  # what is printed, and no space
# In a signed text the first such character after an identifier or a time ends it, and is in
# none of them.
_PARTING = re.compile(r"[^A-Za-z0-9_-]", re.ASCII)
_HEADER_NAME: Final = r"^[A-Za-z0-9-]{1,100}$"

HeaderName = Annotated[str, msgspec.Meta(pattern=_HEADER_NAME)]
Prefix = Annotated[str, msgspec.Meta(max_length=100)]
Algorithm = Literal["sha1", "sha256", "sha512"]
Encoding = Literal["hex", "base64"]
SignedText = Annotated[str, msgspec.Meta(max_length=200)]
SecretForm = Literal["text", "base64"]
Tolerance = Annotated[int, msgspec.Meta(ge=1, le=24 * 3600)]  # seconds
HeaderNames = Annotated[list[HeaderName], msgspec.Meta(max_length=20)]


@final
class Scheme(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a `generic` webhook is signed; STANDARD where nothing is said of it.

    `signed` is the text that is signed: "{body}", with "{timestamp}" and "{id}" where the
    headers of both are given, and between them something that is in neither, such as a dot.
    The signature header holds one signature or, with spaces between
    them, several; each begins with `prefix`, the others are left out.
    """

    header: HeaderName
    prefix: Prefix = ""
    algorithm: Algorithm = "sha256"
    encoding: Encoding = "hex"
    signed: SignedText = "{body}"
    id_header: HeaderName | None = None
    timestamp_header: HeaderName | None = None
    # "base64": the secret is `whsec_` and base64, or base64 alone; "text": its own bytes.
    secret: SecretForm = "text"
    tolerance: Tolerance = TOLERANCE_S
    headers: HeaderNames = []  # shown in the event
    # What the sender calls the delivery, which it does not sign.
    delivery_header: HeaderName | None = None


STANDARD: Final = Scheme(
    header="webhook-signature",
    prefix="v1,",
    encoding="base64",
    signed="{id}.{timestamp}.{body}",
    id_header="webhook-id",
    timestamp_header="webhook-timestamp",
    secret="base64",
)


@final
class Timed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be said of `slack` and `stripe`."""

    tolerance: Tolerance = TOLERANCE_S


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

    def by_delivery(self) -> Proof:
        """The same, of a sender that says the same at several times and signs neither time nor
        identifier: known by what is signed and by what it calls the delivery, where it does.

        Weaker: whoever has the call can send it again as a new one, under a name of theirs.
        """
        if self.delivery_id is None:
            return self
        named = f"{self.known_by}\0{self.delivery_id}".encode()
        return replace(self, known_by=f"delivery:{hashlib.sha256(named).hexdigest()}")


def read_scheme(kind: str, config: Mapping[str, Any] | None) -> bytes:
    """What a registration says of its signature, as it is kept; raises InvalidRequest."""
    if kind not in KINDS:
        reason = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, which by itself is Standard Webhooks"
        raise InvalidRequest("kind", reason)
    given = dict(config or {})
    if kind in (GITHUB, TWILIO):
        if given:
            raise InvalidRequest("signature", f"there is nothing to say of {kind}")
        return b"{}"
    if kind == GENERIC and not given:
        return msgspec.json.encode(STANDARD)
    try:
        scheme = msgspec.convert(given, Scheme if kind == GENERIC else Timed)
    except msgspec.ValidationError as error:
        raise InvalidRequest("signature", str(error)) from None
    if isinstance(scheme, Scheme):
        _check(scheme)
    return msgspec.json.encode(scheme)


def check_repeats(repeats: str, kind: str, signature: bytes) -> None:
    """Raises InvalidRequest where the calls that are signed so cannot be told apart in this
    way, or need not be."""
    if repeats not in (REFUSE, ACCEPT):
        raise InvalidRequest("repeats", f"{REFUSE} or {ACCEPT}")
    if repeats == REFUSE or kind in (GITHUB, TWILIO):
        return
    scheme = _scheme(signature) if kind == GENERIC else None
    if scheme is None or scheme.id_header or scheme.timestamp_header:
        reason = "an identifier or a time that is signed tells these calls apart"
        raise InvalidRequest("repeats", reason)
    if scheme.delivery_header is None:
        raise InvalidRequest("repeats", "signature.delivery_header is needed")


def _check(scheme: Scheme) -> None:
    places = _PLACES.findall(scheme.signed)
    wanted = ["{body}"]
    wanted += ["{id}"] if scheme.id_header else []
    wanted += ["{timestamp}"] if scheme.timestamp_header else []
    if sorted(places) != sorted(wanted):
        raise InvalidRequest("signature.signed", f"each of {' '.join(wanted)} once")
    if not scheme.signed.endswith("{body}"):
        # Else its end could be taken for an identifier, or for a time.
        raise InvalidRequest("signature.signed", "{body} comes last")
    if not all(map(_PARTING.search, _PLACES.split(scheme.signed)[2:-1:2])):
        # Else the same signed text could be cut elsewhere, and so be another call.
        reason = (
            "between {id}, {timestamp} and {body} comes a character that is no ASCII "
            "letter or digit, nor _ or -"
        )
        raise InvalidRequest("signature.signed", reason)
    if scheme.id_header and scheme.delivery_header:
        raise InvalidRequest("signature.delivery_header", "id_header is signed")
    if not (scheme.prefix.isascii() and scheme.prefix.isprintable() and " " not in scheme.prefix):
        raise InvalidRequest("signature.prefix", "ASCII without spaces")


def shown_headers(kind: str, signature: bytes) -> tuple[str, ...]:
    """Which headers an event tells of, besides the content type and who sent it."""
    if kind == GITHUB:
        return ("X-GitHub-Event", "X-GitHub-Delivery", "X-GitHub-Hook-ID")
    if kind == TWILIO:
        return ("I-Twilio-Idempotency-Token",)
    return tuple(_scheme(signature).headers) if kind == GENERIC else ()


def prove(kind: str, signature: bytes, secret: bytes, call: Call, *, may_be: bool = True) -> Proof:
    """What the signature of a call proves; raises BadSignature where it is not a good one, or
    it `may_be` none, whatever it is.

    `secret` has one key a line; each of them is good. Whether the time of the call is near
    enough is judged by who has a clock.

    What proves nothing takes the same time, however its webhook is signed and whatever of that
    the call has (invariant 9), as long as its secret has no more than _KEYS_ALIKE keys.
    """
    keys = _Keys(secret)
    try:
        proof = _proved(kind, signature, keys, call)
        if may_be:
            return proof
    except BadSignature:
        pass
    if kind != GENERIC:
        with suppress(BadSignature):  # reading how it is signed takes its time, too
            _signed(_Keys(b""), call, _scheme(_ANY_SCHEME))
    keys.spend_rest(call)
    raise BadSignature


def _proved(kind: str, signature: bytes, keys: _Keys, call: Call) -> Proof:
    if kind == GITHUB:
        return _github(keys, call)
    if kind == SLACK:
        return _slack(keys, call, msgspec.json.decode(signature, type=Timed).tolerance)
    if kind == STRIPE:
        return _stripe(keys, call, msgspec.json.decode(signature, type=Timed).tolerance)
    if kind == TWILIO:
        return _twilio(keys, call)
    return _generic(keys, call, _scheme(signature))


def _scheme(signature: bytes) -> Scheme:
    return msgspec.json.decode(signature, type=Scheme)


@final
class _Keys:
    """The keys of one secret, and how much was computed with them for one call."""

    def __init__(self, secret: bytes) -> None:
        lines = [line.strip() for line in secret.splitlines()]
        # A line that a value and the one before it have in common is one key.
        self._keys = list(dict.fromkeys(filter(None, lines)))
        self._spent: Counter[tuple[str, str]] = Counter()
        self._texts: list[bytes] | None = None

    def decode(self) -> None:
        """Take them as those of Standard Webhooks, which are shown in base64."""
        self._keys = [_key(key) for key in self._keys]

    def match(
        self, signed: Iterable[bytes], algorithm: str, given: list[bytes], of: str = _BODY
    ) -> None:
        """Raises BadSignature unless one of the signatures is by one of the keys. Every pair is
        compared, in a time that tells nothing. `signed` are the parts of what is signed, which
        are not joined: the time of a copy of the body would tell. `of` names it."""
        good = False
        for key in self._keys:
            self._spent[of, algorithm] += 1
            right = _mac(key, signed, algorithm)
            for signature in given[:_SIGNATURES_MAX]:
                good |= hmac.compare_digest(right, signature)
        if not good:
            raise BadSignature

    def texts(self, call: Call) -> list[bytes]:
        """What Twilio may have signed of a call; raises BadSignature."""
        self._texts = []
        self._texts = list(_twilio_texts(call))
        return self._texts

    def spend_rest(self, call: Call) -> None:
        """Do what else would have been done if the call's webhook were signed in another way."""
        if self._texts is None:
            with suppress(BadSignature):
                self.texts(call)
        works = [(_BODY, algorithm, call.body) for algorithm in ("sha1", "sha256", "sha512")]
        works += [(str(place), "sha1", text) for place, text in enumerate(self._texts or ())]
        for of, algorithm, signed in works:
            for _ in range(_KEYS_ALIKE - self._spent[of, algorithm]):
                _mac(b"", (signed,), algorithm)


def _mac(key: bytes, signed: Iterable[bytes], algorithm: str) -> bytes:
    mac = hmac.new(key, digestmod=algorithm)
    for part in signed:
        mac.update(part)
    return mac.digest()


def _github(keys: _Keys, call: Call) -> Proof:
    given = call.header("x-hub-signature-256")
    if not given.startswith("sha256="):
        raise BadSignature
    keys.match((call.body,), "sha256", [_hex(given.removeprefix("sha256="))])
    return Proof(_named(call.body), None, delivery_id=call.header("x-github-delivery") or None)


# What a webhook of kind `generic` may say, to be read where there is none.
_ANY_SCHEME: Final = msgspec.json.encode(STANDARD)

# How Slack signs, said as a registration of kind `generic` would say it.
_SLACK: Final = Scheme(
    header="x-slack-signature",
    prefix="v0=",
    signed="v0:{timestamp}:{body}",
    timestamp_header="x-slack-request-timestamp",
)


def _slack(keys: _Keys, call: Call, tolerance_s: int) -> Proof:
    signed, at_s, _ = _signed(keys, call, _SLACK)
    # The Events API sends again, with a new time. Commands and what people do have no event,
    # come once, and are known by their time.
    return _proof(signed, at_s, tolerance_s, _identifier(call.body, "event_id"))


def _stripe(keys: _Keys, call: Call, tolerance_s: int) -> Proof:
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
    signed = (times[0].encode(), b".", call.body)
    keys.match(signed, "sha256", given)
    return _proof(signed, at_s, tolerance_s, _identifier(call.body, "id"))


def _identifier(body: bytes, member: str) -> str | None:
    """The identifier that Stripe or Slack gives an event: the same at each attempt, whose body
    may differ in what else it tells."""
    try:
        event = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    found = event.get(member) if isinstance(event, dict) else None
    return found if isinstance(found, str) and _ID.fullmatch(found) else None


def _twilio(keys: _Keys, call: Call) -> Proof:
    given = [_base64(call.header("x-twilio-signature"))]
    for place, signed in enumerate(keys.texts(call)):
        with suppress(BadSignature):
            keys.match((signed,), "sha1", given, str(place))
            break
    else:
        raise BadSignature
    token = call.header("i-twilio-idempotency-token")
    # By all that is signed, and as it is: nothing stands between the address and the
    # parameters, so that what was one of these could come as a part of that.
    return Proof(_named(signed), None, delivery_id=token or None)


def _twilio_texts(call: Call) -> Iterator[bytes]:
    """What is signed, in each of the ways that Twilio writes it; raises BadSignature."""
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
    yield from texts


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


def _generic(keys: _Keys, call: Call, scheme: Scheme) -> Proof:
    signed, at_s, identifier = _signed(keys, call, scheme)
    proof = _proof(signed, at_s, scheme.tolerance, identifier)
    if scheme.delivery_header is None:
        return proof
    return replace(proof, delivery_id=call.header(scheme.delivery_header) or None)


def _signed(
    keys: _Keys, call: Call, scheme: Scheme
) -> tuple[Sequence[bytes], int | None, str | None]:
    """The parts of what was signed by the scheme, its time and its identifier; raises
    BadSignature."""
    named = {"{body}": call.body}
    identifier = None
    at_s = None
    if scheme.id_header is not None:
        identifier = call.header(scheme.id_header)
        if not _ID.fullmatch(identifier) or _end_of_identifier(scheme.signed) in identifier:
            raise BadSignature
        named["{id}"] = identifier.encode()
    if scheme.timestamp_header is not None:
        text = call.header(scheme.timestamp_header)
        at_s = _seconds(text)
        named["{timestamp}"] = text.encode()
    signed = [named.get(part, part.encode()) for part in _PLACES.split(scheme.signed)]

    read = _hex if scheme.encoding == "hex" else _base64
    found = call.header(scheme.header).split(" ")[:_SIGNATURES_MAX]
    given = [
        read(text.removeprefix(scheme.prefix)) for text in found if text.startswith(scheme.prefix)
    ]
    if scheme.secret == "base64":
        keys.decode()
    keys.match(signed, scheme.algorithm, given)
    return signed, at_s, identifier


def _end_of_identifier(signed: str) -> str:
    """The character that ends it, so that the same text cannot be cut elsewhere."""
    found = _PARTING.search(signed, signed.index("{id}") + len("{id}"))
    assert found is not None  # `_check` saw to it
    return found[0]


def _proof(
    signed: Sequence[bytes], at_s: int | None, tolerance_s: int, identifier: str | None
) -> Proof:
    """By its identifier, which is signed; else by all that is signed."""
    if identifier is not None:
        return Proof(f"id:{identifier}", at_s, tolerance_s, identifier)
    return Proof(_named(*signed), at_s, tolerance_s, is_known_by_time=at_s is not None)


def _named(*signed: bytes) -> str:
    """By all parts of what is signed, as if they were one."""
    found = hashlib.sha256()
    for part in signed:
        found.update(part)
    return f"sha256:{found.hexdigest()}"


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
