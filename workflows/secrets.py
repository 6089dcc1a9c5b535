"""Secrets that a tenant shares with somebody, such as who signs its webhooks.

A secret is kept sealed (`cas.sealing`), bound to its tenant and its name. Where the keys are
lost the secrets are, and must be set anew.

A secret that is set anew is good at once, and what it was before no more, unless it is said
for how long: until then calls are verified by both (`verifying`), since the other side cannot
change at the same moment. What is good no more stays here, sealed, until the secret is set or
sealed anew. A value may also have two lines, each of which is a secret that is good.
"""

from __future__ import annotations

from typing import Final, final

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction, pages
from cas.clock import DAY_US, SECOND_US
from cas.deliveries import reseal_mails
from cas.errors import InvalidRequest, NotFound, SecretSealed
from cas.records import Secret
from cas.references import check_segment
from cas.sealing import Names, seal, unseal
from workflows.complaints import Complaints

VALUE_BYTES_MAX: Final = 4096
# Of one value. Each costs whoever calls, signed or not, and as much is computed where there are
# fewer: `workflows.signatures`.
LINES_MAX: Final = 2
_LINES_READ: Final = 20  # of one that was set when a value could have more
KEEP_OLD_US_MAX: Final = 90 * DAY_US
SECRETS_MAX: Final = 1000  # of one tenant
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

    def put(self, secret_id: str, value: bytes, *, keep_old_us: int | None = None) -> Secret:
        """Keep a secret, in place of the one of this name; durable on return.

        The one that is replaced is good for `keep_old_us` more, None: it is good no more. Only
        the last one is: what that had replaced is not, unless the value is the same as now,
        which changes nothing but how long the one before it is good.

        Raises InvalidName, InvalidRequest; SecretSealed where what is there is to be kept, and
        cannot be opened.
        """
        check_segment(secret_id, "secret")
        if not value.strip() or len(value) > VALUE_BYTES_MAX:
            # Never the value itself: what is refused is shown and logged.
            raise InvalidRequest("value", f"1 to {VALUE_BYTES_MAX} bytes")
        if sum(bool(line.strip()) for line in value.splitlines()) > LINES_MAX:
            raise InvalidRequest("value", f"at most {LINES_MAX} lines")
        if keep_old_us is not None and not SECOND_US <= keep_old_us <= KEEP_OLD_US_MAX:
            most = KEEP_OLD_US_MAX // DAY_US
            raise InvalidRequest("keep_old", f"the old one is kept for 1 second to {most} days")
        sealed = seal(self._ring, _names(self._tenant_id, secret_id), value)

        def change(txn: Transaction) -> Secret:
            secret = Secret(self._tenant_id, secret_id, sealed, txn.now_us, self._actor)
            found = txn.get(Secret, self._tenant_id, secret_id)
            if found is not None:
                if keep_old_us is not None and (old := self._old(found, value, txn.now_us)):
                    secret = msgspec.structs.replace(
                        secret,
                        old_sealed=old,
                        old_until=txn.now_us + keep_old_us,
                        # A term is not counted from a time in doubt (invariant 10).
                        undated_at=None if txn.believed else txn.now_us,
                    )
                txn.replace(secret)
                return secret
            held = txn.range(Secret, "", (self._tenant_id,), limit=SECRETS_MAX)
            if len(held) >= SECRETS_MAX:
                raise InvalidRequest("secret_id", f"a tenant has at most {SECRETS_MAX} secrets")
            txn.insert(secret)
            return secret

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def _old(self, found: Secret, value: bytes, now_us: int) -> bytes:
        """What is to be kept, sealed as it is, where `value` comes in the place of `found`."""
        if _open(self._ring, found, found.sealed) != value:
            return found.sealed
        # Set again, as after an answer that was lost: it is not its own older one.
        return b"" if old_until(found, now_us) is None else found.old_sealed

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
    found = _found(snapshot, tenant_id, secret_id)
    return _open(ring, found, found.sealed)


def verifying(
    snapshot: Snapshot,
    ring: tuple[bytes, ...],
    tenant_id: str,
    secret_id: str,
    now_us: int,
    complaints: Complaints,
) -> bytes:
    """All that is good of a tenant's secret at `now_us` (catalog time), a line each: its value,
    and what it was before where that was kept; raises NotFound, SecretSealed."""
    found = _found(snapshot, tenant_id, secret_id)
    lines = _lines(_open(ring, found, found.sealed))
    if old_until(found, now_us) is None:
        return b"\n".join(lines)
    try:
        return b"\n".join(lines + _lines(_open(ring, found, found.old_sealed)))
    except SecretSealed:
        complaints.make(
            "secret %s of %s: what it was before cannot be opened, so it is not good",
            secret_id,
            tenant_id,
        )
        return b"\n".join(lines)


def _lines(value: bytes) -> list[bytes]:
    return [line for line in value.splitlines() if line.strip()][:_LINES_READ]


def _found(snapshot: Snapshot, tenant_id: str, secret_id: str) -> Secret:
    found = snapshot.get(Secret, tenant_id, secret_id)
    if found is None:
        raise NotFound("secret", secret_id)
    return found


def old_until(secret: Secret, now_us: int) -> int | None:
    """When what a secret was before will be good no more, as far as is known at `now_us`
    (catalog time); None: nothing is kept that still is."""
    if secret.old_until is None:
        return None
    # What was kept by a clock in doubt is over at no time before its term is dated.
    began_us = 0 if secret.undated_at is None else now_us - secret.undated_at
    ends_at = secret.old_until + began_us
    return ends_at if ends_at > now_us else None


def reseal(catalog: Catalog, ring: tuple[bytes, ...]) -> int:
    """Seal the secrets of all tenants by the newest key, and count them; what is mailed, too,
    which is not counted. Durable on return.

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
                txn.replace(_resealed(ring, secret, txn.now_us))

        catalog.write(change, actor=_ACTOR)
    reseal_mails(catalog, ring)
    return len(keys)


def _resealed(ring: tuple[bytes, ...], secret: Secret, now_us: int) -> Secret:
    def anew(sealed: bytes) -> bytes:
        names = _names(secret.tenant_id, secret.secret_id)
        return seal(ring, names, _open(ring, secret, sealed))

    if old_until(secret, now_us) is None:
        return msgspec.structs.replace(
            secret, sealed=anew(secret.sealed), old_sealed=b"", old_until=None, undated_at=None
        )
    return msgspec.structs.replace(
        secret, sealed=anew(secret.sealed), old_sealed=anew(secret.old_sealed)
    )


def _open(ring: tuple[bytes, ...], secret: Secret, sealed: bytes) -> bytes:
    """What was `sealed` for this secret; raises SecretSealed."""
    value = unseal(ring, _names(secret.tenant_id, secret.secret_id), sealed)
    if value is None:
        raise SecretSealed(secret.secret_id)
    return value


def _names(tenant_id: str, secret_id: str) -> Names:
    return "secret", tenant_id, secret_id
