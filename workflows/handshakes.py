"""Handshakes: what a sender asks of an address before it sends anything there.

    github    `ping`, whose body has `zen` and a `hook`: that it is taken (200)
    slack     `url_verification`: that its `challenge` is answered

A handshake is told by its body, which is signed, and never by a header or a content type:
these are signed by nobody, and whoever holds an old call could send it again as another one.
Twilio, Stripe and Standard Webhooks ask for none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from cas.errors import InvalidRequest
from workflows.posted import signed_object
from workflows.signatures import GITHUB, SLACK, Call

CHALLENGE_CHARS_MAX: Final = 256  # Slack's have 52


@final
@dataclass(frozen=True, slots=True)
class Handshake:
    """What is wanted: `challenge` as the answer's body, None: any answer that is a good one."""

    challenge: str | None = None


def read_handshake(call: Call, kind: str) -> Handshake | None:
    """What the sender of a well signed call asks, None where it tells what happened.

    Raises InvalidRequest for a challenge that nobody has to answer: what is answered stands
    under our address.
    """
    if kind not in (GITHUB, SLACK):
        return None
    told = signed_object(call, kind)
    if kind == GITHUB:
        is_ping = isinstance(told.get("zen"), str) and ("hook" in told or "hook_id" in told)
        return Handshake() if is_ping else None
    if told.get("type") != "url_verification":
        return None
    challenge = told.get("challenge")
    if not (
        isinstance(challenge, str)
        and 1 <= len(challenge) <= CHALLENGE_CHARS_MAX
        and challenge.isascii()
        and challenge.isprintable()
    ):
        reason = f"1 to {CHALLENGE_CHARS_MAX} printable characters of ASCII"
        raise InvalidRequest("challenge", reason)
    return Handshake(challenge)
