"""Settings, read once at start from an ini file and the environment.

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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import msgspec

from cas.config import PRIMARY, Names, Settings
from cas.errors import InvalidSetting
from cas.setting_checks import check_sections, check_targets, target_meant, uploads_meant
from cas.setting_keys import Key, setting_keys, target_section
from cas.setting_kinds import in_environment

ENVIRONMENT_PREFIX = "BLOBCASK_"
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
            if self.section == in_environment(target_section(name)):
                return msgspec.structs.replace(self, section=target_section(name))
        return self


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
    sections["uploads"] = uploads_meant(sections["uploads"])
    settings = Settings(**sections)
    check_sections(settings)
    targets = tuple(target_meant(name, values[target_section(name)], settings) for name in names)
    settings = msgspec.structs.replace(settings, targets=targets)
    check_targets(settings)
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


def _unknown(given: _Given, known: list[tuple[str, str]]) -> str:
    """Why a key is unknown, with the one that was probably meant."""
    names = [name for section, name in known if section == given.section]
    what, wanted = "key", given.name
    if not names:
        what, wanted = "section", given.section
        names = sorted({section for section, _ in known})
    meant = difflib.get_close_matches(wanted, names, n=1)
    return f"unknown {what}" + (f": did you mean {meant[0]!r}?" if meant else "")


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
