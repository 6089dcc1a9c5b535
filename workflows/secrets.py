"""Secrets that a tenant shares with somebody, such as who signs its webhooks.

A secret is kept as AES-256-GCM of its value, by the newest key of ROOT/keys/secrets; its
tenant and its name are authenticated with it, so that what is sealed for one opens for no
other. The journal and what is shipped of it hold it sealed only, and ROOT/keys is in neither:
where the keys are lost the secrets are, and must be set anew.

A value may have several lines. Each of them is a secret that is good, so that there are two
while one is being changed.
"""

from __future__ import annotations

import json
import os
from typing import Final, final

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction, pages
from cas.errors import InvalidRequest, NotFound, SecretSealed
from cas.records import Secret
from cas.references import check_segment

VALUE_BYTES_MAX: Final = 4096
SECRETS_MAX: Final = 1000  # of one tenant
_FORM: Final = b"\1"  # the first byte: how the others are to be read
_NONCE_BYTES: Final = 12
_BATCH: Final = 200  # secrets a transaction
_ACTOR: Final = "secrets"


@final
class Secrets:
    """The secrets of one tenant. Safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        ring: tuple[bytes, ...],
        *,
        tenant_id: str,
        actor: str,
        request_id: str,
    ) -> None:
        """`ring` is `Keys.secrets`: oldest first, the last one seals, all open."""
        self._catalog = catalog
        self._ring = ring
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id

    def put(self, secret_id: str, value: bytes) -> Secret:
        """Keep a secret, in place of the one of this name; durable on return.

        Raises InvalidName, InvalidRequest.
        """
        check_segment(secret_id, "secret")
        if not value.strip() or len(value) > VALUE_BYTES_MAX:
            # Never the value itself: what is refused is shown and logged.
            raise InvalidRequest("value", f"a secret is 1 to {VALUE_BYTES_MAX} bytes")
        sealed = _seal(self._ring, self._tenant_id, secret_id, value)

        def change(txn: Transaction) -> Secret:
            secret = Secret(self._tenant_id, secret_id, sealed, txn.now_us, self._actor)
            if txn.get(Secret, self._tenant_id, secret_id) is not None:
                txn.replace(secret)
                return secret
            held = txn.range(Secret, "", (self._tenant_id,), limit=SECRETS_MAX)
            if len(held) >= SECRETS_MAX:
                raise InvalidRequest(secret_id, f"a tenant has at most {SECRETS_MAX} secrets")
            txn.insert(secret)
            return secret

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def get(self, secret_id: str) -> bytes:
        """The value of a secret; raises NotFound, SecretSealed."""
        with self._catalog.read() as snapshot:
            return opened(snapshot, self._ring, self._tenant_id, secret_id)

    def list(self) -> list[Secret]:
        """All of them by name, still sealed."""
        with self._catalog.read() as snapshot:
            return snapshot.range(Secret, "", (self._tenant_id,), limit=SECRETS_MAX)

    def remove(self, secret_id: str) -> None:
        """Forget a secret: what it signs is good no more; raises NotFound.

        Its sealed value stays in the journal for as long as the journal goes back.
        """

        def change(txn: Transaction) -> None:
            found = txn.get(Secret, self._tenant_id, secret_id)
            if found is None:
                raise NotFound("secret", secret_id)
            txn.delete(found)

        self._catalog.write(change, actor=self._actor, request_id=self._request_id)


def opened(snapshot: Snapshot, ring: tuple[bytes, ...], tenant_id: str, secret_id: str) -> bytes:
    """The value of a tenant's secret; raises NotFound, SecretSealed."""
    found = snapshot.get(Secret, tenant_id, secret_id)
    if found is None:
        raise NotFound("secret", secret_id)
    return _open(ring, found)


def reseal(catalog: Catalog, ring: tuple[bytes, ...]) -> int:
    """Seal the secrets of all tenants by the newest key, and count them; durable on return.

    After it the older keys may be taken out of the ring. Harmless to stop and to repeat.
    Raises SecretSealed.
    """
    with catalog.read() as snapshot:
        keys = [secret.primary_key() for page in pages(snapshot, Secret) for secret in page]
    for start in range(0, len(keys), _BATCH):

        def change(
            txn: Transaction, chunk: list[tuple[str, ...]] = keys[start : start + _BATCH]
        ) -> None:
            for key in chunk:
                secret = txn.get(Secret, *key)
                if secret is None:
                    continue
                value = _open(ring, secret)
                sealed = _seal(ring, secret.tenant_id, secret.secret_id, value)
                txn.replace(msgspec.structs.replace(secret, sealed=sealed))

        catalog.write(change, actor=_ACTOR)
    return len(keys)


def _seal(ring: tuple[bytes, ...], tenant_id: str, secret_id: str, value: bytes) -> bytes:
    # Late: only who has to do with secrets pays for loading OpenSSL's bindings.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(_NONCE_BYTES)
    bound = _bound(tenant_id, secret_id)
    return _FORM + nonce + AESGCM(ring[-1][:32]).encrypt(nonce, value, bound)


def _open(ring: tuple[bytes, ...], secret: Secret) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = secret.sealed[1 : 1 + _NONCE_BYTES]
    if secret.sealed[:1] == _FORM and len(nonce) == _NONCE_BYTES:
        bound = _bound(secret.tenant_id, secret.secret_id)
        for key in reversed(ring):
            try:
                return AESGCM(key[:32]).decrypt(nonce, secret.sealed[1 + _NONCE_BYTES :], bound)
            except InvalidTag:
                continue
    raise SecretSealed(secret.secret_id)


def _bound(tenant_id: str, secret_id: str) -> bytes:
    return json.dumps(["secret", tenant_id, secret_id]).encode()
