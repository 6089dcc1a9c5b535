"""Opening a target: from its settings to what speaks to it."""

from __future__ import annotations

from cas.config import TargetSettings
from replicator.folder import FolderTarget
from replicator.targets import Target


def open_target(settings: TargetSettings, *, known: bool = False) -> Target:
    """The target of `settings`; it is not spoken to yet. `known`: it was written to before."""
    if settings.kind == "folder":
        assert settings.path is not None, "load_settings sees to it"
        return FolderTarget(settings.name, settings.path, known=known)
    from replicator.s3 import S3Target  # late: not all stores have one

    return S3Target(settings)
