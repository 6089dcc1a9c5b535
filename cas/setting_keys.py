"""Keys of the settings: which there are, and what the text of each stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, final

import msgspec

from cas.config import Bounds, OptionalPath, Section, Settings, TargetSettings, is_secret, meaning
from cas.setting_kinds import KINDS, Kind


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


def target_section(name: str) -> str:
    """The section of the target `name`."""
    return f"target:{name}"


def setting_keys(targets: Iterable[str] = ("NAME",)) -> Iterator[Key]:
    """Every key there is, in the order of their declarations; each target has its own."""
    for section in msgspec.structs.fields(Settings):
        if section.name == "targets":
            for name in targets:
                yield from _keys(target_section(name), TargetSettings)
        else:
            yield from _keys(section.name, section.type)


def _keys(section: str, fields: type[Section]) -> Iterator[Key]:
    for field in msgspec.structs.fields(fields):
        if field.name == "name" and fields is TargetSettings:
            continue  # it stands in the section's name
        annotation, bounds = meaning(field.type)
        default = None if field.default is msgspec.NODEFAULT else field.default
        secret = is_secret(annotation)
        yield Key(section, field.name, KINDS[annotation], default, bounds, secret)
        if secret:
            name = f"{field.name}_file"
            yield Key(section, name, KINDS[OptionalPath | None], None, names_file_of=field.name)
