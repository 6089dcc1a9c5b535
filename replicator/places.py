"""Places that commands name: a target of the settings, a bucket or a folder."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cas.cli.call import Call
from cas.config import TargetSettings
from cas.errors import InvalidRequest


def place_of(call: Call, source: str | None) -> TargetSettings:
    """The target that NAME, s3://… or a folder means; raises InvalidRequest."""
    known = {target.name: target for target in call.settings.targets}
    if source is None:
        if len(known) != 1:
            raise InvalidRequest("--from", f"one of {', '.join(known)}" if known else "is needed")
        return next(iter(known.values()))
    if source in known:
        return known[source]
    if source.startswith("s3://"):
        parts = urlsplit(source)
        return _bucket(call, parts.netloc, parts.path.strip("/"))
    if "/" in source:
        path = Path(source).absolute()
        for target in known.values():
            if target.kind == "folder" and target.path and target.path.absolute() == path:
                return target
        return TargetSettings(name="source", kind="folder", path=path)
    raise InvalidRequest("--from", f"no target {source!r}; there are {', '.join(known) or 'none'}")


def _bucket(call: Call, bucket: str, prefix: str) -> TargetSettings:
    """A bucket by its name: at the endpoint and with the credentials of the settings."""
    for target in call.settings.targets:
        if target.kind == "s3" and target.bucket == bucket:
            if target.prefix.strip("/") == prefix:
                return target
            return msgspec.structs.replace(target, name="source", prefix=prefix)
    for target in call.settings.targets:
        if target.kind == "s3":
            return msgspec.structs.replace(target, name="source", bucket=bucket, prefix=prefix)
    uploads = call.settings.uploads
    return TargetSettings(
        name="source",
        kind="s3",
        endpoint=uploads.s3_endpoint,
        region=uploads.s3_region,
        access_key=uploads.s3_access_key,
        secret_key=uploads.s3_secret_key,
        bucket=bucket,
        prefix=prefix,
    )
