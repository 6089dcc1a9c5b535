"""Addresses of mail, as people write them: `ada@example.org`, `Ada <ada@example.org>`.

Narrower than RFC 5321: no quoted local parts, comments or domain literals, which hardly
anybody has and which are how addresses are smuggled past a check; no encoded words (RFC 2047)
either, which hold what nobody sees before it is decoded. Whether an address exists only its
server knows.
"""

from __future__ import annotations

import re
from typing import Final, final

import idna
import msgspec

_LOCAL_BYTES_MAX: Final = 64  # RFC 5321, 4.5.3.1, as are the others
_DOMAIN_CHARS_MAX: Final = 255
_NAME_CHARS_MAX: Final = 200
# Of a word of a name: a line of a header is broken between words, and no mail can be made where
# one has to be broken elsewhere.
_WORD_CHARS_MAX: Final = 60

_NAMED: Final = re.compile(r"(?P<name>[^<>]*)<(?P<address>[^<>]*)>")
_ATOM: Final = r'[^\s"(),.:;<>@\[\]\\\x00-\x20\x7f]+'
_LOCAL: Final = re.compile(rf"{_ATOM}(\.{_ATOM})*")
_LABEL: Final = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*", re.ASCII)


@final
class Mailbox(msgspec.Struct, frozen=True):
    """One address, and the name that stands before it, or ""."""

    name: str
    local: str  # may be of any letters: not every server takes one that is not ASCII
    domain: str  # in ASCII: that of a name in other letters is its punycode (IDNA 2008)

    @property
    def address(self) -> str:
        """`local@domain`, as SMTP wants it."""
        return f"{self.local}@{self.domain}"


def read_mailbox(text: str) -> Mailbox:
    """The one address that `text` is; raises ValueError with what is wrong."""
    if not text.isprintable():
        raise ValueError("an address has no line breaks or other controls")
    if "=?" in text:
        raise ValueError("an address has no encoded words (=?…?=): write the letters themselves")
    named = _NAMED.fullmatch(text.strip())
    name = named["name"].strip() if named else ""
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = name[1:-1]
    local, at, domain = (named["address"] if named else text.strip()).rpartition("@")
    try:
        # Not Python's codec "idna", which is that of 2003: it makes fass.de of faß.de, which
        # is another domain, of other people.
        domain = domain if domain.isascii() else idna.encode(domain, uts46=True).decode()
    except idna.IDNAError:  # a label that is empty or too long, or letters that are in no name
        domain = ""
    if not (at and _LOCAL.fullmatch(local) and _DOMAIN.fullmatch(domain)):
        raise ValueError(f"{text[:80]!r} is no address such as ada@example.org")
    if (
        len(local.encode()) > _LOCAL_BYTES_MAX
        or len(domain) > _DOMAIN_CHARS_MAX
        or len(name) > _NAME_CHARS_MAX
    ):
        raise ValueError(f"{text[:80]!r} is longer than an address may be")
    if any(len(word) > _WORD_CHARS_MAX for word in name.split()):
        raise ValueError(f"a name before an address has words of at most {_WORD_CHARS_MAX} letters")
    return Mailbox(name, local, domain)
