"""The secrets of one ROOT, made on the first serve.

    ROOT/keys/signing   one key per line, base64url, oldest first; the last signs, all verify
    ROOT/keys/jwt       the HS256 secret of bearer tokens, base64url
    ROOT/keys/callbacks the secret from which each tenant's callback secret is derived
    ROOT/keys/secrets   what the secrets of tenants are encrypted with; one per line, as `signing`
    ROOT/keys/receipts  the Ed25519 seeds that sign receipts, one per line, the last signs

The folder is 0700, the files are 0600. To rotate: append a line to `signing`, restart;
remove the old line when the URLs that it signed have expired. `receipts` likewise, but keep
its old lines: a receipt is for ever, and the server lists the keys that prove it.
"""

from __future__ import annotations

import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path
from typing import Final, final

import msgspec

from cas.config import Settings
from cas.durable import DISK, Disk, locked
from cas.errors import InvalidSetting

_KEY_BYTES: Final = 32


@final
class Keys(msgspec.Struct, frozen=True):
    """`signing` is ordered oldest to newest; `fresh` tells that they were made just now."""

    signing: tuple[bytes, ...]
    jwt: bytes
    callbacks: bytes
    receipts: tuple[bytes, ...]
    secrets: tuple[bytes, ...]
    fresh: bool = False


def load_keys(settings: Settings, disk: Disk = DISK) -> Keys:
    """The keys of ROOT, made when there are none; durable on return.

    A `[auth] jwt_secret` takes the place of the one in ROOT, and is written nowhere.

    Raises InvalidSetting for a file that holds no usable key.
    """
    root = settings.store.root
    folder = root / "keys"
    if disk.make_folder(folder, 0o700):
        disk.sync_folder(root)
    # Two commands on a new ROOT at once must not each go on with keys of their own.
    with locked(folder):
        fresh = not (folder / "signing").exists()
        for name in ("signing", "jwt", "callbacks", "receipts", "secrets"):
            if not (folder / name).exists():
                line = urlsafe_b64encode(secrets.token_bytes(_KEY_BYTES)) + b"\n"
                disk.write_file(folder / name, line, mode=0o600)
    given = settings.auth.jwt_secret.encode()
    return Keys(
        _ring(folder / "signing"),
        given or _ring(folder / "jwt")[-1],
        _ring(folder / "callbacks")[-1],
        _ring(folder / "receipts"),
        _ring(folder / "secrets"),
        fresh,
    )


def _ring(path: Path) -> tuple[bytes, ...]:
    try:
        lines = path.read_text("ascii").split()
        keys = tuple(urlsafe_b64decode(line) for line in lines)
    except ValueError:
        keys = ()
    if not keys or any(len(key) < _KEY_BYTES for key in keys):
        reason = f"not lines of base64url keys of at least {_KEY_BYTES} bytes"
        raise InvalidSetting("auth", path.name, path, reason)
    return keys
