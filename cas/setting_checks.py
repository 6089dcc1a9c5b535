"""What settings say together, and what they forbid together though each alone is possible.

A check raises InvalidSetting with the section, the key, its value and the reason.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cas.config import (
    GOOGLE_ENDPOINT,
    PRIMARY,
    GatewaySettings,
    MailSettings,
    Settings,
    TargetSettings,
    UploadSettings,
)
from cas.errors import InvalidSetting
from cas.mailboxes import read_mailbox
from cas.setting_keys import target_section


def uploads_meant(uploads: UploadSettings) -> UploadSettings:
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


def target_meant(name: str, given: dict[str, Any], settings: Settings) -> TargetSettings:
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


def check_sections(settings: Settings) -> None:
    """Refuse what each key of a section allows and all of them together do not."""
    _check_primary(settings.uploads)
    _check_mail(settings.mail, settings.gateway)


def _check_primary(uploads: UploadSettings) -> None:
    if uploads.storage_type == "local":
        return
    if not uploads.s3_bucket:
        raise InvalidSetting("uploads", "s3_bucket", "", "storage_type = s3 needs it")
    if uploads.s3_use_ssl and uploads.s3_endpoint.startswith("http://"):
        reason = f"s3_endpoint is {uploads.s3_endpoint}, which would send all in the clear"
        raise InvalidSetting("uploads", "s3_use_ssl", "true", reason)


def _check_mail(mail: MailSettings, gateway: GatewaySettings) -> None:
    """Without a host nothing of it is used, so whatever else is given may wait for one."""
    if not mail.host:
        return
    if not mail.sender:
        raise InvalidSetting("mail", "sender", "", "host needs it: mail must come from somebody")
    try:
        read_mailbox(mail.sender)
    except ValueError as error:
        raise InvalidSetting("mail", "sender", mail.sender, str(error)) from None
    if not gateway.public_url:
        # Not the address that is served: whoever reads a mail is rarely on this machine.
        reason = "[mail] host needs it: links in mails begin with it, and people must reach it"
        raise InvalidSetting("gateway", "public_url", "", reason)
    if not mail.host.isprintable() or set(mail.host) & set(" /@"):
        raise InvalidSetting("mail", "host", mail.host, "write a name or an address, and no URL")
    if bool(mail.user) != bool(mail.password):
        lacking = "password" if mail.user else "user"
        raise InvalidSetting("mail", lacking, "", "user and password belong together")
    if mail.user and mail.security == "none":
        reason = "would send the password in the clear: use starttls or tls"
        raise InvalidSetting("mail", "security", "none", reason)


def check_targets(settings: Settings) -> None:
    """Refuse what each key of a target, and each target, allows and all together do not."""
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


def _refused(name: str, key: str, value: object, reason: str) -> InvalidSetting:
    return InvalidSetting(target_section(name), key, value, reason)
