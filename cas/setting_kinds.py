"""Kinds of settings: how the text of each is read, and what is refused.

Each reader takes the text as somebody wrote it, and raises ValueError with the reason.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, final
from urllib.parse import urlsplit

import msgspec

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import (
    MIB,
    Address,
    ByteRate,
    Credential,
    Duration,
    Encryption,
    Endpoint,
    Names,
    Networks,
    OptionalPath,
    Origins,
    Prefix,
    Rate,
    Scheme,
    SigningSecret,
    Size,
    UriPath,
    Url,
    Word,
)

SIGNING_SECRET_BYTES_MIN = 32  # RFC 7518: an HS256 key is at least as long as its digest


def parse_duration(text: str) -> Duration:
    """`24h`, `90d`, `500ms` in µs: a whole number with one of us, ms, s, m, h, d, w."""
    return Duration(_with_unit(text, _DURATION_UNITS, "a duration", "24h"))


def parse_size(text: str) -> Size:
    """`64MiB` in bytes: a whole number with one of B, KiB, MiB, GiB, TiB.

    `MB` is refused: half of its readers take it for 1000², the other half for 1024².
    """
    return Size(_with_unit(text, _SIZE_UNITS, "a size", "64MiB"))


_DURATION_UNITS = {
    "us": 1,
    "ms": 1000,
    "s": SECOND_US,
    "m": 60 * SECOND_US,
    "h": HOUR_US,
    "d": DAY_US,
    "w": 7 * DAY_US,
}
_PERIODS = {unit: _DURATION_UNITS[unit] for unit in "smhd"}
_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": MIB, "GiB": 1 << 30, "TiB": 1 << 40}
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_NUMBER_AND_UNIT = re.compile(r"([0-9]{1,18}) ?([A-Za-z]*)", re.ASCII)
_NAME = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*", re.ASCII)  # no "__": it ends a section's name
_NAME_MAX = 40
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,15}", re.ASCII)
_INTEGER_MAX = (1 << 63) - 1  # what a record and LMDB can hold


def _with_unit(text: str, units: Mapping[str, int], what: str, example: str) -> int:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if not match:
        raise ValueError(f"not {what}: write a whole number and a unit, as in {example}")
    number, unit = int(match[1]), match[2]
    if unit not in units:
        problem = f"{unit!r} is no unit of {what}" if unit else f"{what} needs a unit"
        raise ValueError(f"{problem}: use {' '.join(units)}, as in {example}")
    if number * units[unit] > _INTEGER_MAX:
        raise ValueError(f"too large for {what}")
    return number * units[unit]


def _whole_number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError("not a whole number")
    return int(text)


def _text(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


def _path(text: str) -> Path:
    return Path(_text(text))


def _address(text: str) -> Address:
    if text.startswith("unix:"):
        if text == "unix:":
            raise ValueError("the path of the socket is missing after 'unix:'")
        return Address(text)
    host, colon, port = text.rpartition(":")
    if not host or not colon:
        raise ValueError("write HOST:PORT, [IPv6]:PORT or unix:PATH")
    if not _NUMBER.fullmatch(port) or int(port) > 65535:
        raise ValueError(f"{port!r} is not a port, 0 to 65535 (0: any free one)")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("write an IPv6 address in brackets, as in [::1]:8080")
    return Address(text)


def _url(text: str) -> Url:
    if not text:
        return Url("")
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not a URL such as https://files.example.org")
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError("a URL here has no user, query or fragment")
    return Url(text.rstrip("/"))


def _endpoint(text: str) -> Endpoint:
    return Endpoint(_url(text) if "://" in text else _url(f"https://{text}" if text else "")[8:])


def _scheme(text: str) -> Scheme:
    if not _SCHEME.fullmatch(text):
        raise ValueError("not a scheme: write a-z, then up to 15 of a-z 0-9 + . -")
    return Scheme(text)


def _uri_path(text: str) -> UriPath:
    if text and not (text.startswith("/") and text.endswith("/")):
        raise ValueError("not a path that begins and ends with a slash, as in /blobs/")
    return UriPath(text)


def _networks(text: str) -> Networks:
    # strict: `10.0.0.1/8` is a slip, and taking it for 10.0.0.0/8 would trust a whole network.
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def _signing_secret(text: str) -> SigningSecret:
    if text and len(text.encode()) < SIGNING_SECRET_BYTES_MIN:
        raise ValueError(f"shorter than {SIGNING_SECRET_BYTES_MIN} bytes: it could be guessed")
    return SigningSecret(text)


def _rate(text: str) -> Rate:
    """`600/m`; 0 is no limit."""
    amount, period_us = _per_period(text, "600/m")
    return Rate(_whole_number(amount), period_us)


def _byte_rate(text: str) -> ByteRate:
    """`100GiB/h`; 0B/h is no limit."""
    amount, period_us = _per_period(text, "100GiB/h")
    return ByteRate(parse_size(amount), period_us)


def _per_period(text: str, example: str) -> tuple[str, int]:
    amount, slash, period = text.partition("/")
    if not slash or period not in _PERIODS:
        raise ValueError(f"not a rate: write an amount, / and one of s m h d, as in {example}")
    return amount.strip(), _PERIODS[period]


def _origins(text: str) -> Origins:
    origins = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in origins:
        parts = urlsplit(origin)
        if origin != f"{parts.scheme}://{parts.netloc}" or parts.scheme not in ("http", "https"):
            raise ValueError(f"{origin!r} is no origin such as https://app.example.org")
        # Compared as browsers write it: anything else would be in force for nobody.
        usual = {"http": ":80", "https": ":443"}[parts.scheme]
        if origin != origin.lower() or origin.endswith(usual) or set("@*") & set(origin):
            raise ValueError(f"{origin!r}: write lower case, no user, no pattern and no usual port")
    return Origins(origins)


def _optional_path(text: str) -> Path | None:
    return Path(text) if text else None


def _prefix(text: str) -> Prefix:
    prefix = text.strip("/")
    if {"", ".", ".."} & set(prefix.split("/")) and prefix:
        raise ValueError("has an empty part, . or .. between its slashes")
    return Prefix(prefix)


def _names(text: str) -> Names:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if not _NAME.fullmatch(name) or len(name) > _NAME_MAX:
            raise ValueError(
                f"{name!r} is no name of a target: write a-z and 0-9 with single - or _ between, "
                f"{_NAME_MAX} characters at most"
            )
    if len({in_environment(name) for name in names}) < len(names):
        raise ValueError("two of these names are the same, or are in the environment")
    return names


def in_environment(name: str) -> str:
    """How a section's name is written in a variable's, in lower case."""
    return name.replace(":", "_").replace("-", "_")


def _yes_or_no(text: str) -> bool | None:
    if not text:
        return None
    if text.lower() not in ("true", "false"):
        raise ValueError("use 'true' or 'false'")
    return text.lower() == "true"


def _switch(text: str) -> bool:
    if text.lower() not in ("yes", "no"):
        raise ValueError("use 'yes' or 'no'")
    return text.lower() == "yes"


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"use {', '.join(map(repr, words[:-1]))} or {words[-1]!r}")
        return text

    return read


@final
class Kind(msgspec.Struct, frozen=True):
    """A type of setting: what its documentation calls it, and its reader."""

    noun: str
    read: Callable[[str], Any]


KINDS: Mapping[Any, Kind] = {
    Duration: Kind("Duration", parse_duration),
    Size: Kind("Size", parse_size),
    int: Kind("Whole number", _whole_number),
    str: Kind("Text", _text),
    Path: Kind("Path", _path),
    Address: Kind("Address", _address),
    Url: Kind("URL", _url),
    Scheme: Kind("Word", _scheme),
    UriPath: Kind("URI path", _uri_path),
    Networks: Kind("Networks", _networks),
    SigningSecret: Kind("Secret", _signing_secret),
    Credential: Kind("Secret", str),
    bool | None: Kind("'true' or 'false'", _yes_or_no),
    bool: Kind("'yes' or 'no'", _switch),
    Endpoint: Kind("URL", _endpoint),
    Prefix: Kind("Path", _prefix),
    Names: Kind("Names", _names),
    Encryption: Kind("Word", _one_of("", "AES256", "aws:kms")),
    Literal["local", "s3", "gcs"]: Kind("Word", _one_of("local", "s3", "gcs")),
    Literal["folder", "s3"]: Kind("Word", _one_of("folder", "s3")),
    Literal["auto", "path", "virtual"]: Kind("Word", _one_of("auto", "path", "virtual")),
    Literal["starttls", "tls", "none"]: Kind("Word", _one_of("starttls", "tls", "none")),
    Literal["text", "file", "url"]: Kind("Word", _one_of("text", "file", "url")),
    Literal["json", "text"]: Kind("Word", _one_of("json", "text")),
    Literal["all", "errors", "none"]: Kind("Word", _one_of("all", "errors", "none")),
    Word: Kind("Text", str),
    Origins: Kind("Origins", _origins),
    OptionalPath | None: Kind("Path", _optional_path),
    Path | None: Kind("Path", _optional_path),
    Rate: Kind("Rate", _rate),
    ByteRate: Kind("Byte rate", _byte_rate),
}
