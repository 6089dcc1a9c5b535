"""How a callback is signed: the Standard Webhooks scheme, with a secret for each tenant.

    secret     HKDF-SHA256 of ROOT/keys/callbacks, told apart by the tenant; shown `whsec_…`
    signature  v1,<base64 of HMAC-SHA256(secret, "<id>.<timestamp>.<body>")>

A receiver verifies with any library of that scheme. Secrets are derived, so none is stored,
and no tenant can compute another's.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64encode
from typing import Final

SECRET_BYTES: Final = 32
_PURPOSE: Final = b"blobcask callback v1\0"


def tenant_secret(master: bytes, tenant_id: str) -> bytes:
    """The 32 bytes that sign a tenant's callbacks; `master` is `Keys.callbacks`."""
    # Late: only who signs or shows a secret pays for loading OpenSSL's bindings.
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = _PURPOSE + tenant_id.encode()
    return HKDF(SHA256(), SECRET_BYTES, salt=None, info=info).derive(master)


def shown_secret(secret: bytes) -> str:
    """`whsec_…`, the form in which libraries take it."""
    return "whsec_" + b64encode(secret).decode()


def signature(secret: bytes, message_id: str, at_s: int, body: bytes) -> str:
    """The value of `webhook-signature`; `at_s` is that of `webhook-timestamp`."""
    signed = b"%s.%d.%s" % (message_id.encode(), at_s, body)
    return "v1," + b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()
