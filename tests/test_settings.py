"""Settings: read from file and environment, refused by name, and documented key by key."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.config import (
    Key,
    Settings,
    load_settings,
    parse_duration,
    parse_size,
    setting_keys,
)
from cas.errors import InvalidSetting
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
        ("uploads", "storage_type", "s3", "comes with the mirror"),
        ("uploads", "storage_type", "tape", "use 'local'"),
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
    ini.write_text(re.sub(r"(?m)^#(?=[a-z0-9_]+ =)", "", DOCUMENTATION.read_text()))
    assert load_settings(ini, {}) == Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().store.root = Path("/")  # type: ignore[misc]
    changed = msgspec.structs.replace(Settings().store, root=Path("/"))
    assert changed.root == Path("/")
