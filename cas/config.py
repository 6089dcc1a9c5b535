"""Settings: read once at start from an ini file and the environment, into frozen values.

Each key is declared once, as a field below: its type says how its text is read and which
values are possible, its default what holds when nobody says otherwise. `config.ini` is the
documentation of the same keys, and a test keeps the two equal.

`BLOBCASK_SECTION__KEY` in the environment wins over the file; `STORAGE_TYPE`, `S3_BUCKET_NAME`
and so on stand between the two. A secret may stand in a file of its own, named by the same
key with `_file` appended. Whatever is unknown, misspelt or impossible stops the start: a
setting that is silently not in force is worse than none.

Each target has a section `[target:NAME]`; in the environment that is `BLOBCASK_TARGET_NAME__KEY`,
with `_` for a `-` in the name, because shells take no other signs.
"""

from __future__ import annotations

import configparser
import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, final, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.errors import InvalidSetting
from cas.mailboxes import read_mailbox
from cas.references import SCHEME

ENVIRONMENT_PREFIX = "BLOBCASK_"

Duration = NewType("Duration", int)  # µs
Size = NewType("Size", int)  # bytes
Address = NewType("Address", str)  # HOST:PORT, [IPv6]:PORT or unix:PATH
Url = NewType("Url", str)  # http(s), without a slash at its end; empty: not given
Scheme = NewType("Scheme", str)  # of references, without "://"
UriPath = NewType("UriPath", str)  # begins and ends with a slash; empty: not given
SigningSecret = NewType("SigningSecret", str)  # at least 32 bytes of UTF-8; empty: not given
Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]

Origins = NewType("Origins", tuple[str, ...])  # scheme://host[:port] each
OptionalPath = NewType("OptionalPath", Path)  # None: not given
Endpoint = NewType("Endpoint", str)  # a URL, or HOST[:PORT]; empty: not given
Word = NewType("Word", str)  # may be empty: not given
Credential = NewType("Credential", str)  # a secret of another party; empty: not given
Prefix = NewType("Prefix", str)  # of object keys, without slashes at its ends; empty: none
Encryption = NewType("Encryption", str)  # "", "AES256" or "aws:kms"
Names = tuple[str, ...]  # of targets

PRIMARY = "primary"  # the target that `storage_type = s3` makes
GOOGLE_ENDPOINT = "https://storage.googleapis.com"

MIB = 1 << 20
SIGNING_SECRET_BYTES_MIN = 32  # RFC 7518: an HS256 key is at least as long as its digest


@final
class Rate(msgspec.Struct, frozen=True):
    """So many things (requests, guesses) in each period; none is no limit."""

    count: int
    period_us: int

    def __bool__(self) -> bool:
        return self.count > 0


@final
class ByteRate(msgspec.Struct, frozen=True):
    """So many bytes in each period; none is no limit."""

    size_bytes: int
    period_us: int

    def __bool__(self) -> bool:
        return self.size_bytes > 0


@final
class Bounds(msgspec.Struct, frozen=True):
    """The least and the most possible value, both included, written as a user writes them."""

    least: str
    most: str | None = None


Count = Annotated[int, Bounds("1", "1000")]
Days = Annotated[int, Bounds("1", "9999999")]  # as many digits as a retention policy takes
Hours = Annotated[int, Bounds("1", "9999999")]


class Section(msgspec.Struct, frozen=True):
    """One section of the settings. Its text form hides secrets, so that logs may show it."""

    def __repr__(self) -> str:
        shown = (
            f"{field.name}=***"
            if _is_secret(field.type) and getattr(self, field.name)
            else f"{field.name}={getattr(self, field.name)!r}"
            for field in msgspec.structs.fields(self)
        )
        return f"{type(self).__name__}({', '.join(shown)})"


@final
class StoreSettings(Section, frozen=True):
    root: Path = Path("data")
    name: str = "local"
    grace: Annotated[Duration, Bounds("1s")] = Duration(24 * HOUR_US)
    trust_verified_for: Duration = Duration(90 * DAY_US)
    min_free: Size = Size(256 * MIB)


@final
class CatalogSettings(Section, frozen=True):
    checkpoint_every: Annotated[Size, Bounds("1MiB")] = Size(256 * MIB)
    journal_keep: Duration = Duration(7 * DAY_US)


@final
class UploadSettings(Section, frozen=True):
    storage_type: Literal["local", "s3", "gcs"] = "local"  # "gcs" is loaded as "s3"
    s3_endpoint: Annotated[str, Endpoint] = ""
    s3_bucket: Word = Word("")
    s3_region: Word = Word("us-east-1")
    s3_access_key: Word = Word("")
    s3_secret_key: Credential = Credential("")
    s3_use_ssl: bool | None = None  # None: as s3_endpoint says, which says https when it does not
    default_retention_days: Days = 30
    default_expiry_hours: Hours = 24
    max_file_size_mb: Annotated[int, Bounds("0")] = 0
    partial_expiry: Annotated[Duration, Bounds("1m")] = Duration(24 * HOUR_US)


@final
class ReferenceSettings(Section, frozen=True):
    scheme: Scheme = Scheme(SCHEME)


@final
class GatewaySettings(Section, frozen=True):
    bind: Address = Address("127.0.0.1:8080")
    workers: Count = 2
    threads: Count = 8
    public_url: Url = Url("")
    accel_redirect: UriPath = UriPath("")
    trusted_proxies: Networks = ()
    url_expiry: Annotated[Duration, Bounds("1s")] = Duration(HOUR_US)
    min_rate: Size = Size(512)
    cors_origins: Origins = Origins(())
    metrics_from: Networks = (
        ipaddress.IPv4Network("127.0.0.0/8"),
        ipaddress.IPv6Network("::1/128"),
    )


@final
class AuthSettings(Section, frozen=True):
    jwt_secret: SigningSecret = SigningSecret("")
    public_keys: OptionalPath | None = None
    jwks_file: OptionalPath | None = None
    jwks_url: Url = Url("")
    jwks_refresh: Annotated[Duration, Bounds("10s")] = Duration(5 * 60 * SECOND_US)
    issuer: Word = Word("")
    audience: Word = Word("")


@final
class LimitSettings(Section, frozen=True):
    tenant_requests: Rate = Rate(12_000, 60 * SECOND_US)
    address_requests: Rate = Rate(6_000, 60 * SECOND_US)
    tenant_bytes: ByteRate = ByteRate(0, HOUR_US)
    address_bytes: ByteRate = ByteRate(0, HOUR_US)
    link_bytes: ByteRate = ByteRate(1 << 40, DAY_US)
    tenant_events: Rate = Rate(6_000, 60 * SECOND_US)
    guesses: Rate = Rate(30, 60 * SECOND_US)
    all_guesses: Rate = Rate(600, 60 * SECOND_US)
    address_connections: Annotated[int, Bounds("0")] = 200
    quota_bytes: Size = Size(0)
    quota_files: Annotated[int, Bounds("0")] = 0


@final
class CallbackSettings(Section, frozen=True):
    allowed_networks: Networks = ()
    timeout: Annotated[Duration, Bounds("1s", "5m")] = Duration(10 * SECOND_US)
    give_up_after: Annotated[Duration, Bounds("1m")] = Duration(3 * DAY_US)


@final
class EventSettings(Section, frozen=True):
    keep: Annotated[Duration, Bounds("1h")] = Duration(30 * DAY_US)
    hold_max: Annotated[Duration, Bounds("1s")] = Duration(7 * DAY_US)
    payload_max: Annotated[Size, Bounds("1KiB", "16MiB")] = Size(256 << 10)
    poll_max: Annotated[Duration, Bounds("1s", "1h")] = Duration(60 * SECOND_US)
    waiters_max: Annotated[int, Bounds("1", "100000")] = 2_000


@final
class MailSettings(Section, frozen=True):
    host: Word = Word("")  # empty: no mail is sent
    port: Annotated[int, Bounds("1", "65535")] = 587
    security: Literal["starttls", "tls", "none"] = "starttls"
    user: Word = Word("")
    password: Credential = Credential("")
    sender: Word = Word("")
    ca_file: Path | None = None
    timeout: Annotated[Duration, Bounds("1s", "5m")] = Duration(30 * SECOND_US)


@final
class LlmSettings(Section, frozen=True):
    base_url: Url = Url("")  # empty: the model local/extractive answers
    api_key: Credential = Credential("")
    model: Word = Word("")  # empty: the one that the workflow names
    attachments: Literal["text", "file", "url"] = "text"
    timeout: Annotated[Duration, Bounds("1s", "1h")] = Duration(2 * 60 * SECOND_US)
    retries: Annotated[int, Bounds("0", "20")] = 3
    attachment_max: Annotated[Size, Bounds("1KiB")] = Size(32 * MIB)
    text_max: Annotated[Size, Bounds("1KiB")] = Size(MIB)
    answer_max: Annotated[Size, Bounds("1KiB", "16MiB")] = Size(256 << 10)


@final
class WorkflowSettings(Section, frozen=True):
    concurrency: Count = 16  # steps at a time
    allow_shell: bool = False
    shell_timeout: Annotated[Duration, Bounds("1s")] = Duration(60 * SECOND_US)
    shell_output: Annotated[Size, Bounds("1KiB", "16MiB")] = Size(64 << 10)
    result_max: Annotated[Size, Bounds("1KiB", "16MiB")] = Size(MIB)
    items_max: Annotated[int, Bounds("1", "100000")] = 1_000  # of one foreach
    keep: Duration = Duration(30 * DAY_US)


@final
class LogSettings(Section, frozen=True):
    format: Literal["json", "text"] = "json"
    requests: Literal["all", "errors", "none"] = "all"


@final
class SweeperSettings(Section, frozen=True):
    interval: Annotated[Duration, Bounds("1s")] = Duration(60 * SECOND_US)
    max_clock_gap: Annotated[Duration, Bounds("1m")] = Duration(30 * DAY_US)
    scrub_rate: Size = Size(20 * MIB)


@final
class ReplicatorSettings(Section, frozen=True):
    targets: Names = ()  # each has its section [target:NAME]
    ship_every: Annotated[Duration, Bounds("1s")] = Duration(10 * SECOND_US)
    concurrency: Count = 16  # copies at a time, at each target
    bandwidth: Size = Size(0)  # bytes a second, all targets together; 0: no limit
    delete_delay: Duration = Duration(7 * DAY_US)
    history: Duration = Duration(7 * DAY_US)  # how far back `restore --at` reaches
    canary_every: Annotated[Duration, Bounds("10s")] = Duration(15 * 60 * SECOND_US)
    drill_every: Duration = Duration(0)  # 0: only by hand
    stalled_after: Annotated[Duration, Bounds("1m")] = Duration(HOUR_US)


@final
class TargetSettings(Section, frozen=True):
    """One `[target:NAME]`; `name` is that NAME."""

    name: str
    kind: Literal["folder", "s3"]
    path: Path | None = None  # of a folder
    endpoint: Annotated[str, Url] = ""  # empty: Amazon's for the region
    bucket: Annotated[str, Word] = ""
    prefix: Annotated[str, Prefix] = ""
    region: Annotated[str, Word] = "us-east-1"
    access_key: Annotated[str, Word] = ""  # empty: as the AWS tools find it
    secret_key: Annotated[str, Credential] = ""
    session_token: Annotated[str, Credential] = ""
    profile: Annotated[str, Word] = ""  # of the AWS configuration files
    addressing: Literal["auto", "path", "virtual"] = "auto"
    ca_file: Path | None = None
    sse: Annotated[str, Encryption] = ""
    sse_kms_key: Annotated[str, Word] = ""
    storage_class: Annotated[str, Word] = ""


@final
class CacheSettings(Section, frozen=True):
    max_size: Size = Size(0)  # 0: nothing is evicted


@final
class Settings(msgspec.Struct, frozen=True):
    """All settings, one attribute a section. `Settings()` holds the defaults.

    `targets` are in the order of `replicator.targets`; PRIMARY stands first where
    `storage_type` makes one.
    """

    store: StoreSettings = msgspec.field(default_factory=StoreSettings)
    catalog: CatalogSettings = msgspec.field(default_factory=CatalogSettings)
    uploads: UploadSettings = msgspec.field(default_factory=UploadSettings)
    references: ReferenceSettings = msgspec.field(default_factory=ReferenceSettings)
    gateway: GatewaySettings = msgspec.field(default_factory=GatewaySettings)
    auth: AuthSettings = msgspec.field(default_factory=AuthSettings)
    limits: LimitSettings = msgspec.field(default_factory=LimitSettings)
    callbacks: CallbackSettings = msgspec.field(default_factory=CallbackSettings)
    events: EventSettings = msgspec.field(default_factory=EventSettings)
    mail: MailSettings = msgspec.field(default_factory=MailSettings)
    llm: LlmSettings = msgspec.field(default_factory=LlmSettings)
    workflows: WorkflowSettings = msgspec.field(default_factory=WorkflowSettings)
    sweeper: SweeperSettings = msgspec.field(default_factory=SweeperSettings)
    replicator: ReplicatorSettings = msgspec.field(default_factory=ReplicatorSettings)
    targets: tuple[TargetSettings, ...] = ()
    cache: CacheSettings = msgspec.field(default_factory=CacheSettings)
    log: LogSettings = msgspec.field(default_factory=LogSettings)


# --- from text to values: each reader raises ValueError with the reason


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
    if len({_in_environment(name) for name in names}) < len(names):
        raise ValueError("two of these names are the same, or are in the environment")
    return names


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


_KINDS: Mapping[Any, Kind] = {
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
_SECRETS = (SigningSecret, Credential)
_SECRET_FILE = Kind("Path", _optional_path)


def _meaning(annotation: Any) -> tuple[Any, Bounds | None]:
    """What a field's text is read as: its own type, or the one its annotation names."""
    if get_origin(annotation) is not Annotated:
        return annotation, None
    plain, mark = get_args(annotation)
    return (plain, mark) if isinstance(mark, Bounds) else (mark, None)


def _is_secret(annotation: object) -> bool:
    return _meaning(annotation)[0] in _SECRETS


@final
class Key(msgspec.Struct, frozen=True):
    """One key as it may stand in the file: its place, kind, default and bounds."""

    section: str
    name: str
    kind: Kind
    default: Any
    bounds: Bounds | None = None
    secret: bool = False
    names_file_of: str | None = None  # the secret whose text is in the file this key names

    def read(self, text: str) -> Any:
        """The value that `text` stands for; raises ValueError with the reason."""
        value = self.kind.read(text)
        if self.bounds:
            if value < self.kind.read(self.bounds.least):
                raise ValueError(f"must be at least {self.bounds.least}")
            if self.bounds.most is not None and value > self.kind.read(self.bounds.most):
                raise ValueError(f"must be at most {self.bounds.most}")
        return value


def setting_keys(targets: Iterable[str] = ("NAME",)) -> Iterator[Key]:
    """Every key there is, in the order of the declarations above; each target has its own."""
    for section in msgspec.structs.fields(Settings):
        if section.name == "targets":
            for name in targets:
                yield from _keys(f"{_TARGET}{name}", TargetSettings)
        else:
            yield from _keys(section.name, section.type)


def _keys(section: str, fields: type[Section]) -> Iterator[Key]:
    for field in msgspec.structs.fields(fields):
        if field.name == "name" and fields is TargetSettings:
            continue  # it stands in the section's name
        annotation, bounds = _meaning(field.type)
        default = None if field.default is msgspec.NODEFAULT else field.default
        secret = _is_secret(annotation)
        yield Key(section, field.name, _KINDS[annotation], default, bounds, secret)
        if secret:
            name = f"{field.name}_file"
            yield Key(section, name, _SECRET_FILE, None, names_file_of=field.name)


# --- from file and environment to settings

_TARGET = "target:"  # begins the names of the sections of targets
# Names that other tools of the same house use, with the keys they stand for.
_OTHER_NAMES: Mapping[str, tuple[str, str]] = {
    "STORAGE_TYPE": ("uploads", "storage_type"),
    "S3_ENDPOINT_URL": ("uploads", "s3_endpoint"),
    "S3_BUCKET_NAME": ("uploads", "s3_bucket"),
    "S3_REGION": ("uploads", "s3_region"),
    "S3_ACCESS_KEY_ID": ("uploads", "s3_access_key"),
    "S3_SECRET_ACCESS_KEY": ("uploads", "s3_secret_key"),
    "S3_USE_SSL": ("uploads", "s3_use_ssl"),
}


@final
class _Given(msgspec.Struct, frozen=True):
    """The text somebody gave a key, and where."""

    section: str
    name: str
    text: str
    source: str

    def refuse(self, reason: str, shown: str | None = None) -> InvalidSetting:
        text = self.text if shown is None else shown
        return InvalidSetting(self.section, self.name, text, f"{reason} (in {self.source})")

    def meant(self, targets: Iterable[str]) -> _Given:
        """The same, with the section that `target_name` stands for in the environment."""
        for name in targets:
            if self.section == _in_environment(f"{_TARGET}{name}"):
                return msgspec.structs.replace(self, section=f"{_TARGET}{name}")
        return self


def _in_environment(name: str) -> str:
    """How a section's name is written in a variable's, in lower case."""
    return name.replace(":", "_").replace("-", "_")


def load_settings(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """The settings of the ini file at `path` (None: no file), overlaid by `environ`.

    Raises InvalidSetting, with section, key, value and reason, for the first thing that is
    unknown, unreadable or impossible. Reads the files that `*_file` keys name.
    """
    layers = [list(_from_file(path)), list(_other_names(environ)), list(_from_environment(environ))]
    names = _target_names(layers)
    known = {(key.section, key.name): key for key in setting_keys(names)}
    values: dict[str, dict[str, Any]] = {section: {} for section, _ in known}
    for layer in layers:
        _fill(values, known, [given.meant(names) for given in layer])
    sections = {
        section.name: section.type(**values[section.name])
        for section in msgspec.structs.fields(Settings)
        if section.name != "targets"
    }
    sections["uploads"] = _uploads(sections["uploads"])
    settings = Settings(**sections)
    _check_primary(settings.uploads)
    _check_mail(settings.mail)
    targets = tuple(_target(name, values[f"{_TARGET}{name}"], settings) for name in names)
    settings = msgspec.structs.replace(settings, targets=targets)
    _check_targets(settings)
    return settings


def _fill(
    values: dict[str, dict[str, Any]], known: Mapping[tuple[str, str], Key], layer: list[_Given]
) -> None:
    """Lay one layer of what was given over `values`."""
    filled: set[tuple[str, str]] = set()
    for given in layer:
        key = known.get((given.section, given.name))
        if key is None:
            raise given.refuse(_unknown(given, list(known)), shown="***")
        if (key.secret or key.names_file_of) and not given.text:
            continue  # an empty secret is none, however it was to be given
        place, value = _value(key, given, known)
        # Only within a layer: the environment's secret simply wins over the file's.
        if (key.section, place) in filled:
            raise given.refuse(f"{place} and {place}_file are both given", shown="***")
        filled.add((key.section, place))
        values[key.section][place] = value


def _value(key: Key, given: _Given, known: Mapping[tuple[str, str], Key]) -> tuple[str, Any]:
    """The field that a given key fills, and its value."""
    if key.names_file_of is None:
        try:
            return key.name, key.read(given.text)
        except ValueError as error:
            raise given.refuse(str(error), "***" if key.secret else None) from None
    try:
        # The line end is the editor's; any other space may be the secret's.
        text = Path(given.text).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise given.refuse(f"cannot be read: {reason}") from None
    if not text:
        raise given.refuse("the file is empty")
    try:
        return key.names_file_of, known[key.section, key.names_file_of].read(text)
    except ValueError as error:
        raise given.refuse(str(error)) from None


def _from_file(path: Path | None) -> Iterator[_Given]:
    if path is None:
        return
    # No interpolation and no inline comments: '%' and '#' belong to values. No section is
    # special: a [DEFAULT] that slipped keys into every other would be hard to see.
    parser = configparser.ConfigParser(
        interpolation=None,
        delimiters=("=",),
        comment_prefixes=("#", ";"),
        default_section="",
        empty_lines_in_values=False,
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # its documented use
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise InvalidSetting("config", "path", path, reason) from None
    except UnicodeDecodeError:
        raise InvalidSetting("config", "path", path, "not UTF-8 text") from None
    except configparser.DuplicateOptionError as error:
        reason = f"given a second time in line {error.lineno} of {path}"
        raise InvalidSetting(error.section, error.option, "***", reason) from None
    except configparser.DuplicateSectionError as error:
        reason = f"the section begins a second time in line {error.lineno} of {path}"
        raise InvalidSetting(error.section, "*", "***", reason) from None
    except configparser.MissingSectionHeaderError as error:
        reason = f"line {error.lineno} stands before the first [section]"
        raise InvalidSetting("config", "path", path, reason) from None
    except configparser.ParsingError as error:
        lines = ", ".join(str(number) for number, _ in error.errors)
        reason = f"line {lines} is neither [section] nor key = value"
        raise InvalidSetting("config", "path", path, reason) from None
    for section in parser.sections():
        for name, text in parser.items(section):
            yield _Given(section, name, text, str(path))


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Given]:
    for variable in sorted(environ):
        section, separator, name = variable.removeprefix(ENVIRONMENT_PREFIX).partition("__")
        # Without the double underscore it is no setting of ours, such as BLOBCASK_HOME.
        if variable.startswith(ENVIRONMENT_PREFIX) and separator:
            yield _Given(section.lower(), name.lower(), environ[variable], variable)


def _other_names(environ: Mapping[str, str]) -> Iterator[_Given]:
    for variable, (section, name) in _OTHER_NAMES.items():
        if variable in environ:
            yield _Given(section, name, environ[variable], variable)


# --- targets


def _target_names(layers: Iterable[Iterable[_Given]]) -> Names:
    """The targets there are to be; each has its section of keys."""
    known = {(key.section, key.name): key for key in setting_keys(())}
    found: dict[str, Any] = {"targets": (), "storage_type": "local"}
    for layer in layers:
        for given in layer:
            if (given.section, given.name) in (
                ("replicator", "targets"),
                ("uploads", "storage_type"),
            ):
                _, found[given.name] = _value(known[given.section, given.name], given, known)
    names: Names = found["targets"]
    makes_one = found["storage_type"] != "local" and PRIMARY not in names
    return (PRIMARY, *names) if makes_one else names


def _uploads(uploads: UploadSettings) -> UploadSettings:
    """With the endpoint as a URL, and Google's storage as what it is to us: one more S3."""
    endpoint = uploads.s3_endpoint
    if uploads.storage_type == "gcs":
        endpoint = endpoint or GOOGLE_ENDPOINT
    if endpoint and "://" not in endpoint:
        endpoint = f"{'http' if uploads.s3_use_ssl is False else 'https'}://{endpoint}"
    return msgspec.structs.replace(
        uploads,
        storage_type="local" if uploads.storage_type == "local" else "s3",
        s3_endpoint=endpoint,
    )


def _target(name: str, given: dict[str, Any], settings: Settings) -> TargetSettings:
    """The target of one section; of PRIMARY the `s3_*` keys say what is not said there."""
    uploads = settings.uploads
    if name == PRIMARY and uploads.storage_type == "s3":
        if "kind" in given and given["kind"] != "s3":
            raise _refused(name, "kind", given["kind"], "storage_type = s3 needs kind = s3")
        other = {
            "endpoint": uploads.s3_endpoint,
            "bucket": uploads.s3_bucket,
            "region": uploads.s3_region,
            "access_key": uploads.s3_access_key,
            "secret_key": uploads.s3_secret_key,
        }
        for key in other.keys() & given.keys():
            raise _refused(name, key, "***", f"[uploads] s3_{key} is the place of this setting")
        given = {"kind": "s3", **other, **given}
    if "kind" not in given:
        raise _refused(name, "kind", "", "say what [replicator] targets names: 'folder' or 's3'")
    return TargetSettings(name=name, **given)


def _refused(name: str, key: str, value: object, reason: str) -> InvalidSetting:
    return InvalidSetting(f"{_TARGET}{name}", key, value, reason)


def _check_targets(settings: Settings) -> None:
    """Refuse what each key allows and all of them together do not."""
    places: dict[tuple[str, ...], str] = {}
    for target in settings.targets:
        (_check_folder if target.kind == "folder" else _check_s3)(target, settings)
        place = _place(target)
        if place in places:
            raise _refused(target.name, "kind", target.kind, f"the same place as {places[place]!r}")
        places[place] = target.name
    if settings.cache.max_size and not settings.targets:
        reason = "without a target nothing can be evicted: see [replicator] targets"
        raise InvalidSetting("cache", "max_size", settings.cache.max_size, reason)


def _check_primary(uploads: UploadSettings) -> None:
    if uploads.storage_type == "local":
        return
    if not uploads.s3_bucket:
        raise InvalidSetting("uploads", "s3_bucket", "", "storage_type = s3 needs it")
    if uploads.s3_use_ssl and uploads.s3_endpoint.startswith("http://"):
        reason = f"s3_endpoint is {uploads.s3_endpoint}, which would send all in the clear"
        raise InvalidSetting("uploads", "s3_use_ssl", "true", reason)


def _check_mail(mail: MailSettings) -> None:
    """Without a host nothing of it is used, so whatever else is given may wait for one."""
    if not mail.host:
        return
    if not mail.sender:
        raise InvalidSetting("mail", "sender", "", "host needs it: mail must come from somebody")
    try:
        read_mailbox(mail.sender)
    except ValueError as error:
        raise InvalidSetting("mail", "sender", mail.sender, str(error)) from None
    if not mail.host.isprintable() or set(mail.host) & set(" /@"):
        raise InvalidSetting("mail", "host", mail.host, "write a name or an address, and no URL")
    if bool(mail.user) != bool(mail.password):
        lacking = "password" if mail.user else "user"
        raise InvalidSetting("mail", lacking, "", "user and password belong together")
    if mail.user and mail.security == "none":
        reason = "would send the password in the clear: use starttls or tls"
        raise InvalidSetting("mail", "security", "none", reason)


def _check_folder(target: TargetSettings, settings: Settings) -> None:
    if target.path is None:
        raise _refused(target.name, "path", "", "kind = folder needs it")
    root = settings.store.root.resolve()
    path = target.path.resolve()
    if path == root or root in path.parents:
        raise _refused(
            target.name, "path", target.path, f"lies in ROOT ({root}): it would be lost with it"
        )
    defaults = TargetSettings(name=target.name, kind="folder")
    for field in TargetSettings.__struct_fields__:
        if field != "path" and getattr(target, field) != getattr(defaults, field):
            raise _refused(target.name, field, "***", "kind = folder has no use for it")


def _check_s3(target: TargetSettings, _settings: Settings) -> None:
    def refuse(key: str, reason: str) -> InvalidSetting:
        value = getattr(target, key)
        return _refused(target.name, key, "***" if key != "path" and value else value, reason)

    if target.path is not None:
        raise refuse("path", "kind = s3 has no use for it")
    if not target.bucket:
        raise refuse("bucket", "kind = s3 needs it")
    if bool(target.access_key) != bool(target.secret_key):
        lacking = "secret_key" if target.access_key else "access_key"
        raise refuse(lacking, "access_key and secret_key belong together")
    if target.session_token and not target.access_key:
        raise refuse("session_token", "belongs to an access_key")
    if target.profile and target.access_key:
        raise refuse("profile", "access_key and profile are both given")
    if target.sse_kms_key and target.sse != "aws:kms":
        raise refuse("sse_kms_key", "belongs to sse = aws:kms")


def _place(target: TargetSettings) -> tuple[str, ...]:
    if target.path is not None:
        return (str(target.path.resolve()),)
    return (target.endpoint, target.bucket, target.prefix)


def _unknown(given: _Given, known: list[tuple[str, str]]) -> str:
    """Why a key is unknown, with the one that was probably meant."""
    names = [name for section, name in known if section == given.section]
    what, wanted = "key", given.name
    if not names:
        what, wanted = "section", given.section
        names = sorted({section for section, _ in known})
    meant = difflib.get_close_matches(wanted, names, n=1)
    return f"unknown {what}" + (f": did you mean {meant[0]!r}?" if meant else "")
