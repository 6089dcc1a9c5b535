"""Sealing: what must stand in the journal, and must not be read there.

AES-256-GCM by the newest key of ROOT/keys/secrets. The names of what it is for are
authenticated with it, so that what is sealed for one opens for no other. The journal and what
is shipped of it hold it sealed only, and ROOT/keys is in neither: where the keys are lost, so
is what they sealed.
"""

from __future__ import annotations

import json
import os
from typing import Final

_FORM: Final = b"\1"  # the first byte: how the others are to be read. JSON never begins so
_NONCE_BYTES: Final = 12

Ring = tuple[bytes, ...]  # `Keys.secrets`: oldest first, the last one seals, all open
Names = tuple[str, ...]  # what kind of thing it is, and whose and which


def seal(ring: Ring, names: Names, value: bytes) -> bytes:
    """`value`, sealed for the thing of these names."""
    # Late: only who has to do with secrets pays for loading OpenSSL's bindings.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(_NONCE_BYTES)
    return _FORM + nonce + AESGCM(ring[-1][:32]).encrypt(nonce, value, _bound(names))


def unseal(ring: Ring, names: Names, sealed: bytes) -> bytes | None:
    """What was sealed for the thing of these names; None where no key of `ring` did that."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = sealed[1 : 1 + _NONCE_BYTES]
    if is_sealed(sealed) and len(nonce) == _NONCE_BYTES:
        for key in reversed(ring):
            try:
                return AESGCM(key[:32]).decrypt(nonce, sealed[1 + _NONCE_BYTES :], _bound(names))
            except InvalidTag:
                continue
    return None


def is_sealed(value: bytes) -> bool:
    """Whether this was sealed, where it is JSON otherwise."""
    return value[:1] == _FORM


def _bound(names: Names) -> bytes:
    return json.dumps(names).encode()
