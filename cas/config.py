"""Settings: what can be set, as frozen values with one attribute a section.

Each key is declared once, as a field below: its type says how its text is read
(`cas/setting_kinds.py`) and which values are possible, its default what holds when nobody says
otherwise. `config.ini` is the documentation of the same keys, and a test keeps the two equal.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, final, get_args, get_origin

import msgspec

from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.references import SCHEME

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


def meaning(annotation: Any) -> tuple[Any, Bounds | None]:
    """What a field's text is read as, its own type or the one its annotation names; its bounds."""
    if get_origin(annotation) is not Annotated:
        return annotation, None
    plain, mark = get_args(annotation)
    return (plain, mark) if isinstance(mark, Bounds) else (mark, None)


def is_secret(annotation: object) -> bool:
    """Whether no log and no message may show a value of this type."""
    return meaning(annotation)[0] in (SigningSecret, Credential)


class Section(msgspec.Struct, frozen=True):
    """One section of the settings. Its text form hides secrets, so that logs may show it."""

    def __repr__(self) -> str:
        shown = (
            f"{field.name}=***"
            if is_secret(field.type) and getattr(self, field.name)
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
    tenant_held_events: Size = Size(256 * MIB)
    tenant_kept_events: Size = Size(1 << 30)
    tenant_submissions: Rate = Rate(600, 60 * SECOND_US)
    tenant_runs: Annotated[int, Bounds("0")] = 1_000  # that have not ended
    tenant_approvals: Annotated[int, Bounds("0")] = 10_000  # that are not forgotten
    tenant_mails: Annotated[int, Bounds("0")] = 1_000  # neither delivered nor given up
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
    concurrency: Count = 16  # calls of tools at a time
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
