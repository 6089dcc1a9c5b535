"""Settings: read from file and environment, refused by name, and documented key by key."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.config import Settings, TargetSettings
from cas.errors import InvalidSetting
from cas.setting_keys import Key, setting_keys
from cas.setting_kinds import parse_duration, parse_size
from cas.setting_sources import load_settings
from tests.conftest import CHECKOUT

DOCUMENTATION = CHECKOUT / "config.ini"
SECRET = "correct horse battery staple, and then some"


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    return tmp_path / "blobcask.ini"


def refusal(ini: Path, text: str, environ: dict[str, str] | None = None) -> InvalidSetting:
    ini.write_text(text)
    with pytest.raises(InvalidSetting) as caught:
        load_settings(ini, environ or {})
    return caught.value


# --- reading


def test_nothing_given_means_the_defaults() -> None:
    assert load_settings(None, {}) == Settings()


def test_a_file_sets_what_it_names_and_nothing_else(ini: Path) -> None:
    ini.write_text("[store]\nroot = /srv/blobs\ngrace = 90d\n\n[gateway]\nworkers = 4\n")
    settings = load_settings(ini, {})
    assert settings.store.root == Path("/srv/blobs")
    assert settings.store.grace == 90 * 86_400 * 1_000_000
    assert settings.gateway.workers == 4
    assert settings.catalog == Settings().catalog


def test_the_environment_wins_over_the_file(ini: Path) -> None:
    ini.write_text("[store]\nmin_free = 1GiB\n")
    settings = load_settings(ini, {"BLOBCASK_STORE__MIN_FREE": "64MiB", "HOME": "/"})
    assert settings.store.min_free == 64 << 20


def test_variables_that_name_no_section_are_left_alone() -> None:
    assert load_settings(None, {"BLOBCASK_HOME": "x", "STORE__ROOT": "y"}) == Settings()


def test_percent_and_hash_belong_to_a_value(ini: Path) -> None:
    ini.write_text(f"[auth]\njwt_secret = 100%s #1 ; {SECRET}\n")
    assert load_settings(ini, {}).auth.jwt_secret == f"100%s #1 ; {SECRET}"


def test_a_public_url_loses_its_last_slash(ini: Path) -> None:
    ini.write_text("[gateway]\npublic_url = https://files.example.org/blobs/\n")
    assert load_settings(ini, {}).gateway.public_url == "https://files.example.org/blobs"


def test_trusted_proxies_are_networks(ini: Path) -> None:
    ini.write_text("[gateway]\ntrusted_proxies = 10.0.0.7, fd00::/8\n")
    expected = (ip_network("10.0.0.7/32"), ip_network("fd00::/8"))
    assert load_settings(ini, {}).gateway.trusted_proxies == expected


@pytest.mark.parametrize("bind", ["0.0.0.0:80", "[::1]:0", "files.example:8080", "unix:/run/b"])
def test_an_address_is_kept_as_written(ini: Path, bind: str) -> None:
    ini.write_text(f"[gateway]\nbind = {bind}\n")
    assert load_settings(ini, {}).gateway.bind == bind


@given(st.integers(0, 10_000), st.sampled_from(["us", "ms", "s", "m", "h", "d", "w"]))
def test_durations_grow_with_their_number_and_unit(number: int, unit: str) -> None:
    assert parse_duration(f"{number}{unit}") == number * parse_duration(f"1{unit}")


def test_units_are_worth_what_they_say() -> None:
    assert [parse_duration(f"1{unit}") for unit in ("us", "ms", "s")] == [1, 1000, 10**6]
    assert parse_duration("1w") == 7 * parse_duration("1d") == 168 * parse_duration("1h")
    assert parse_duration("1h") == 60 * parse_duration("1m") == 3600 * parse_duration("1s")
    sizes = [parse_size(f"1{unit}") for unit in ("B", "KiB", "MiB", "GiB", "TiB")]
    assert sizes == [1, 2**10, 2**20, 2**30, 2**40]


# --- refusing


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("store", "grace", "24", "needs a unit"),
        ("store", "grace", "24 hours", "'hours' is no unit"),
        ("store", "grace", "1.5h", "whole number"),
        ("store", "grace", "-1h", "whole number"),
        ("store", "grace", "0s", "at least 1s"),
        ("store", "grace", "999999999999999w", "too large"),
        ("store", "grace", "", "whole number"),
        ("store", "min_free", "64MB", "'MB' is no unit"),
        ("store", "min_free", "64mib", "'mib' is no unit"),
        ("store", "root", "", "empty"),
        ("catalog", "checkpoint_every", "1KiB", "at least 1MiB"),
        ("uploads", "storage_type", "tape", "use 'local', 's3' or 'gcs'"),
        ("uploads", "s3_use_ssl", "yes", "use 'true' or 'false'"),
        ("uploads", "s3_endpoint", "ftp://s3.example.org", "not a URL"),
        ("replicator", "targets", "Off Site", "no name of a target"),
        ("replicator", "targets", "a__b", "no name of a target"),
        ("replicator", "targets", "a-b, a_b", "the same"),
        ("replicator", "targets", "a, a", "the same"),
        ("replicator", "stalled_after", "1s", "at least 1m"),
        ("cache", "max_size", "1GB", "'GB' is no unit"),
        ("uploads", "default_retention_days", "0", "at least 1"),
        ("uploads", "default_retention_days", "30d", "not a whole number"),
        ("uploads", "max_file_size_mb", "-1", "not a whole number"),
        ("gateway", "bind", "8080", "HOST:PORT"),
        ("gateway", "bind", "localhost:99999", "not a port"),
        ("gateway", "bind", "::1:8080", "brackets"),
        ("gateway", "bind", "unix:", "missing"),
        ("gateway", "workers", "0", "at least 1"),
        ("gateway", "threads", "1001", "at most 1000"),
        ("gateway", "public_url", "files.example.org", "not a URL"),
        ("gateway", "public_url", "https://u:p@example.org", "no user"),
        ("references", "scheme", "HWY://", "not a scheme"),
        ("gateway", "accel_redirect", "blobs", "slash"),
        ("gateway", "trusted_proxies", "10.0.0.1/8", "host bits"),
        ("sweeper", "max_clock_gap", "1s", "at least 1m"),
    ],
)
def test_an_impossible_value_is_named(
    ini: Path, section: str, key: str, value: str, reason: str
) -> None:
    error = refusal(ini, f"[{section}]\n{key} = {value}\n")
    assert (error.section, error.key, error.value) == (section, key, value)
    assert reason in error.reason
    assert str(ini) in error.reason


def test_the_refusal_of_a_variable_names_the_variable() -> None:
    with pytest.raises(InvalidSetting) as caught:
        load_settings(None, {"BLOBCASK_GATEWAY__WORKERS": "many"})
    assert "BLOBCASK_GATEWAY__WORKERS" in caught.value.reason


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(ini: Path) -> None:
    error = refusal(ini, "[store]\nroots = /srv\n")
    assert (error.section, error.key) == ("store", "roots")
    assert "did you mean 'root'" in error.reason


def test_an_unknown_section_is_refused_wherever_it_stands(ini: Path) -> None:
    assert "did you mean 'store'" in refusal(ini, "[stor]\nroot = /srv\n").reason
    assert "unknown section" in refusal(ini, "[DEFAULT]\nroot = /srv\n").reason
    assert "unknown section" in refusal(ini, "", {"BLOBCASK_WEATHER__WIND": "1"}).reason


def test_keys_are_written_in_lower_case(ini: Path) -> None:
    assert refusal(ini, "[store]\nRoot = /srv\n").key == "Root"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("root = /srv\n", "before the first"),
        ("[store]\nroot\n", "neither"),
        ("[store]\nroot = a\nroot = b\n", "second time in line 3"),
        ("[store]\n[gateway]\n[store]\n", "second time in line 3"),
    ],
)
def test_a_file_that_is_no_ini_file_is_refused(ini: Path, text: str, reason: str) -> None:
    assert reason in refusal(ini, text).reason


def test_a_file_that_cannot_be_read_is_refused(ini: Path) -> None:
    with pytest.raises(InvalidSetting, match="No such file"):
        load_settings(ini, {})
    ini.write_bytes(b"[store]\nroot = \xff\n")
    with pytest.raises(InvalidSetting, match="UTF-8"):
        load_settings(ini, {})


# --- secrets


def test_a_secret_may_stand_in_a_file_of_its_own(ini: Path, tmp_path: Path) -> None:
    (tmp_path / "jwt").write_text(f"{SECRET}\n")
    ini.write_text(f"[auth]\njwt_secret_file = {tmp_path / 'jwt'}\n")
    assert load_settings(ini, {}).auth.jwt_secret == SECRET


def test_a_secret_in_the_environment_wins_over_the_files(ini: Path, tmp_path: Path) -> None:
    (tmp_path / "jwt").write_text("x" * 64)
    ini.write_text(f"[auth]\njwt_secret_file = {tmp_path / 'jwt'}\n")
    assert load_settings(ini, {"BLOBCASK_AUTH__JWT_SECRET": SECRET}).auth.jwt_secret == SECRET


def test_an_empty_secret_is_none_and_overrides_nothing(ini: Path) -> None:
    ini.write_text(f"[auth]\njwt_secret = {SECRET}\njwt_secret_file =\n")
    environ = {"BLOBCASK_AUTH__JWT_SECRET": "", "BLOBCASK_AUTH__JWT_SECRET_FILE": ""}
    assert load_settings(ini, environ).auth.jwt_secret == SECRET


def test_a_secret_given_twice_is_refused(ini: Path, tmp_path: Path) -> None:
    (tmp_path / "jwt").write_text(SECRET)
    text = f"[auth]\njwt_secret = {SECRET}\njwt_secret_file = {tmp_path / 'jwt'}\n"
    assert "both given" in refusal(ini, text).reason


def test_a_secret_file_that_helps_nobody_is_refused(ini: Path, tmp_path: Path) -> None:
    text = f"[auth]\njwt_secret_file = {tmp_path / 'jwt'}\n"
    assert "No such file" in refusal(ini, text).reason
    (tmp_path / "jwt").write_text("\n")
    assert "empty" in refusal(ini, text).reason
    (tmp_path / "jwt").write_text("short")
    assert "shorter than 32 bytes" in refusal(ini, text).reason


def test_no_message_and_no_log_shows_a_secret(ini: Path) -> None:
    for text in ("[auth]\njwt_secret = hunter2\n", "[auth]\njwt_secert = hunter2\n"):
        assert "hunter2" not in str(refusal(ini, text))
    settings = load_settings(None, {"BLOBCASK_AUTH__JWT_SECRET": SECRET})
    assert SECRET not in repr(settings)
    assert "jwt_secret=***" in repr(settings)


# --- targets

OFFSITE = "[replicator]\ntargets = offsite\n[target:offsite]\n"
BUCKET = f"{OFFSITE}kind = s3\nbucket = blobs\n"


def test_a_target_is_what_its_section_says(ini: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cr3t\n")
    ini.write_text(
        f"{BUCKET}endpoint = https://s3.example.org/\nprefix = /a/b/\naccess_key = me\n"
        f"secret_key_file = {tmp_path / 'secret'}\naddressing = path\nsse = aws:kms\n"
    )
    assert load_settings(ini, {}).targets == (
        TargetSettings(
            name="offsite",
            kind="s3",
            endpoint="https://s3.example.org",
            bucket="blobs",
            prefix="a/b",
            access_key="me",
            secret_key="s3cr3t",
            addressing="path",
            sse="aws:kms",
        ),
    )


def test_targets_stand_in_the_order_of_their_names_in_the_list(ini: Path) -> None:
    ini.write_text(
        "[target:b]\nkind = folder\npath = /b\n[target:a]\nkind = folder\npath = /a\n"
        "[replicator]\ntargets = b, a\n"
    )
    assert [target.name for target in load_settings(ini, {}).targets] == ["b", "a"]


def test_the_environment_makes_a_target_and_wins_over_its_section(ini: Path) -> None:
    environ = {
        "BLOBCASK_REPLICATOR__TARGETS": "off-site",
        "BLOBCASK_TARGET_OFF_SITE__KIND": "folder",
        "BLOBCASK_TARGET_OFF_SITE__PATH": "/mnt/b",
    }
    made = TargetSettings(name="off-site", kind="folder", path=Path("/mnt/b"))
    assert load_settings(None, environ).targets == (made,)
    ini.write_text("[target:off-site]\npath = /mnt/a\n")
    assert load_settings(ini, environ).targets == (made,)


def test_no_text_form_shows_what_a_target_is_spoken_to_with(ini: Path) -> None:
    ini.write_text(f"{BUCKET}access_key = me\nsecret_key = hunter2\nsession_token = hunter3\n")
    shown = repr(load_settings(ini, {}))
    assert "hunter" not in shown
    assert "secret_key=***" in shown


@pytest.mark.parametrize(
    ("text", "section", "key", "reason"),
    [
        ("[replicator]\ntargets = offsite\n", "target:offsite", "kind", "'folder' or 's3'"),
        ("[target:offsite]\nkind = s3\n", "target:offsite", "kind", "unknown section"),
        (f"{OFFSITE}kind = tape\n", "target:offsite", "kind", "use 'folder' or 's3'"),
        (f"{OFFSITE}kind = folder\n", "target:offsite", "path", "needs it"),
        (f"{OFFSITE}kind = folder\npath = data/copy\n", "target:offsite", "path", "in ROOT"),
        (f"{OFFSITE}kind = folder\npath = /a\nbucket = b\n", "target:offsite", "bucket", "no use"),
        (f"{OFFSITE}kind = s3\n", "target:offsite", "bucket", "needs it"),
        (f"{BUCKET}path = /a\n", "target:offsite", "path", "no use"),
        (f"{BUCKET}prefix = a//b\n", "target:offsite", "prefix", "empty part"),
        (f"{BUCKET}prefix = a/../b\n", "target:offsite", "prefix", ".."),
        (f"{BUCKET}access_key = me\n", "target:offsite", "secret_key", "belong together"),
        (f"{BUCKET}secret_key = x\n", "target:offsite", "access_key", "belong together"),
        (f"{BUCKET}session_token = x\n", "target:offsite", "session_token", "access_key"),
        (
            f"{BUCKET}access_key = me\nsecret_key = x\nprofile = p\n",
            "target:offsite",
            "profile",
            "both given",
        ),
        (f"{BUCKET}sse_kms_key = x\n", "target:offsite", "sse_kms_key", "aws:kms"),
        (f"{BUCKET}buckets = x\n", "target:offsite", "buckets", "did you mean 'bucket'"),
        ("[cache]\nmax_size = 1GiB\n", "cache", "max_size", "without a target"),
    ],
)
def test_a_target_that_cannot_be_is_refused(
    ini: Path, text: str, section: str, key: str, reason: str
) -> None:
    error = refusal(ini, text)
    assert (error.section, error.key) == (section, key)
    assert reason in error.reason


def test_two_targets_at_one_place_are_refused(ini: Path) -> None:
    text = (
        "[replicator]\ntargets = a, b\n[target:a]\nkind = s3\nbucket = x\n"
        "[target:b]\nkind = s3\nbucket = x\n"
    )
    assert "the same place as 'a'" in refusal(ini, text).reason
    ini.write_text(f"{text}prefix = other\n")
    assert len(load_settings(ini, {}).targets) == 2


# --- storage_type = s3

MINIO = {
    "STORAGE_TYPE": "s3",
    "S3_ENDPOINT_URL": "http://127.0.0.1:9000",
    "S3_ACCESS_KEY_ID": "minioadmin",
    "S3_SECRET_ACCESS_KEY": "minioadmin",
    "S3_BUCKET_NAME": "workflow-files",
    "S3_REGION": "us-east-1",
    "S3_USE_SSL": "false",
}


def test_the_names_of_other_tools_make_the_target_primary() -> None:
    settings = load_settings(None, MINIO)
    assert settings.uploads.storage_type == "s3"
    assert settings.targets == (
        TargetSettings(
            name="primary",
            kind="s3",
            endpoint="http://127.0.0.1:9000",
            bucket="workflow-files",
            access_key="minioadmin",
            secret_key="minioadmin",
        ),
    )


def test_google_is_one_more_s3_server() -> None:
    environ = {"STORAGE_TYPE": "gcs", "S3_BUCKET_NAME": "b", "S3_REGION": "us-central1"}
    settings = load_settings(None, environ)
    assert settings.uploads.storage_type == "s3"
    (primary,) = settings.targets
    assert primary.endpoint == "https://storage.googleapis.com"
    assert primary.region == "us-central1"


def test_our_own_names_win_over_those_of_other_tools_and_these_over_the_file(ini: Path) -> None:
    ini.write_text("[uploads]\nstorage_type = s3\ns3_bucket = file\ns3_region = file\n")
    environ = {"S3_BUCKET_NAME": "theirs", "S3_REGION": "theirs"}
    environ["BLOBCASK_UPLOADS__S3_REGION"] = "ours"
    (primary,) = load_settings(ini, environ).targets
    assert (primary.bucket, primary.region) == ("theirs", "ours")


@pytest.mark.parametrize(
    ("use_ssl", "scheme"), [("true", "https"), ("false", "http"), ("", "https")]
)
def test_an_endpoint_without_a_scheme_is_spoken_to_with_tls_unless_told(
    use_ssl: str, scheme: str
) -> None:
    environ = MINIO | {"S3_ENDPOINT_URL": "127.0.0.1:9000", "S3_USE_SSL": use_ssl}
    assert load_settings(None, environ).targets[0].endpoint == f"{scheme}://127.0.0.1:9000"


def test_tls_that_the_endpoint_excludes_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="in the clear"):
        load_settings(None, MINIO | {"S3_USE_SSL": "true"})


def test_the_section_of_primary_says_more_and_not_otherwise(ini: Path) -> None:
    text = "[uploads]\nstorage_type = s3\ns3_bucket = b\n[target:primary]\n"
    ini.write_text(f"{text}prefix = edge-7\naddressing = virtual\n")
    (primary,) = load_settings(ini, {}).targets
    assert (primary.kind, primary.bucket, primary.prefix) == ("s3", "b", "edge-7")
    assert "the place of this setting" in refusal(ini, f"{text}bucket = c\n").reason
    assert "kind = s3" in refusal(ini, f"{text}kind = folder\n").reason


def test_s3_without_a_bucket_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="s3_bucket"):
        load_settings(None, {"STORAGE_TYPE": "s3"})


# --- the documentation

_COMMENTED_KEY = re.compile(r"#([a-z0-9_]+) =(?: (.*))?")


def documented() -> dict[tuple[str, str], tuple[str, str]]:
    """(section, key) -> (prose, default) as config.ini has them."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    section, prose = "", list[str]()
    for line in DOCUMENTATION.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section, prose = line.strip("[]"), []
        elif match := _COMMENTED_KEY.fullmatch(line):
            assert (section, match[1]) not in found, f"[{section}] {match[1]} stands twice"
            found[section, match[1]] = (" ".join(prose), match[2] or "")
            prose = []
        elif line.startswith("# "):
            prose.append(line.removeprefix("# "))
        else:
            assert line in ("", "#"), f"config.ini sets or says something else: {line!r}"
            prose = []
    return found


def test_the_documentation_names_exactly_the_keys_there_are_in_their_order() -> None:
    assert list(documented()) == [(key.section, key.name) for key in setting_keys()]


def each_key(key: Key) -> str:
    return f"{key.section}-{key.name}"


@pytest.mark.parametrize("key", list(setting_keys()), ids=each_key)
def test_the_documentation_of_a_key_is_true(key: Key) -> None:
    prose, default = documented()[key.section, key.name]
    assert key.read(default) == key.default if default else not key.default
    unit, what = prose.split(". ", 1)
    assert unit.startswith(key.kind.noun), "begins with the kind of its value"
    assert len(what) > 60, "says what it is for and why"
    assert prose.endswith(".")
    if key.bounds and key.bounds.most is not None:
        assert f"{key.bounds.least} to {key.bounds.most}" in unit
    elif key.bounds and key.read(key.bounds.least):
        assert f"at least {key.bounds.least}" in unit


def test_the_documentation_is_itself_a_file_that_changes_nothing(ini: Path) -> None:
    assert load_settings(DOCUMENTATION, {}) == Settings()
    written = re.sub(r"(?m)^#(?=[a-z0-9_]+ =)", "", DOCUMENTATION.read_text())
    # All keys of a section that is nobody's cannot be in force: they are read as somebody's.
    written = written.replace("[target:NAME]", "[target:offsite]")
    written = written.replace("\ntargets =\n", "\ntargets = offsite\n")
    ini.write_text(re.sub(r"\n(kind|path) =\n", r"\n\1 = folder\n", written))
    settings = load_settings(ini, {})
    offsite = TargetSettings(name="offsite", kind="folder", path=Path("folder"))
    assert settings.targets == (offsite,)
    replicator = msgspec.structs.replace(settings.replicator, targets=())
    assert msgspec.structs.replace(settings, targets=(), replicator=replicator) == Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().store.root = Path("/")  # type: ignore[misc]
    changed = msgspec.structs.replace(Settings().store, root=Path("/"))
    assert changed.root == Path("/")


# --- mail


MAIL = (
    "[gateway]\npublic_url = https://files.example.org\n"
    "[mail]\nhost = mail.example.org\nsender = Approvals <approvals@example.org>\n"
)


def test_a_mail_server_and_a_sender_are_enough(ini: Path) -> None:
    ini.write_text(MAIL)
    mail = load_settings(ini, {}).mail
    assert (mail.host, mail.port, mail.security) == ("mail.example.org", 587, "starttls")
    assert mail.sender == "Approvals <approvals@example.org>"


@pytest.mark.parametrize(
    ("more", "key", "why"),
    [
        ({"SENDER": ""}, "sender", "host needs it"),
        ({"SENDER": "approvals"}, "sender", "no address such as"),
        ({"SENDER": "a@example.org, b@example.org"}, "sender", "no address such as"),
        ({"HOST": "smtp://mail.example.org"}, "host", "no URL"),
        ({"USER": "us"}, "password", "belong together"),
        ({"PASSWORD": "secret"}, "user", "belong together"),
        ({"USER": "us", "PASSWORD": "s", "SECURITY": "none"}, "security", "in the clear"),
        ({"SECURITY": "ssl"}, "security", "'starttls', 'tls' or 'none'"),
        ({"PORT": "0"}, "port", "at least 1"),
    ],
)
def test_what_no_mail_could_be_sent_with_is_refused(
    ini: Path, more: dict[str, str], key: str, why: str
) -> None:
    environ = {f"BLOBCASK_MAIL__{name}": value for name, value in more.items()}
    refused = refusal(ini, MAIL, environ)
    assert (refused.section, refused.key) == ("mail", key)
    assert why in refused.reason
    assert "secret" not in str(refused)


def test_mails_need_an_address_that_their_links_begin_with(ini: Path) -> None:
    refused = refusal(ini, MAIL, {"BLOBCASK_GATEWAY__PUBLIC_URL": ""})
    assert (refused.section, refused.key) == ("gateway", "public_url")
    assert "[mail] host needs it" in refused.reason


def test_without_a_mail_server_the_other_settings_of_mail_may_wait(ini: Path) -> None:
    ini.write_text("[mail]\nuser = us\nsecurity = none\n")
    assert load_settings(ini, {}).mail.host == ""
