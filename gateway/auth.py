"""Who is calling: bearer tokens (JWT) and permissions.

HS256 with the secret of this ROOT, or RS256 and EdDSA with the public keys of `issuers`.
Claims: `tenant`, `sub` (the actor in the audit log), `permissions`, `exp`, and where given
`nbf` and `iat`. A token speaks for one tenant only, `admin` included; what belongs to others
is not found, never forbidden (invariant 9).

Times are judged by this server's clock alone. A token that begins in the future is let pass
up to CLOCK_SKEW_S early, since its issuer's clock may lead; one that is over is over, since
whoever made it chose how long it lives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import falcon
import jwt
import msgspec

from cas.clock import SECOND_US
from cas.errors import InvalidName, InvalidRequest, NotFound
from cas.references import check_name, check_segment
from gateway.errors import PermissionMissing, Unauthorized
from gateway.issuers import Issuers

ADMIN: Final = "admin"
MANAGE_UPLOADS: Final = "manage_uploads"
VIEW_UPLOADS: Final = "view_uploads"
MANAGE_STORAGE: Final = "manage_storage"
VIEW_STORAGE: Final = "view_storage"
EMIT_EVENTS: Final = "emit_events"
WAIT_EVENTS: Final = "wait_events"
MANAGE_WORKFLOWS: Final = "manage_workflows"
PERMISSIONS: Final = (
    MANAGE_UPLOADS,
    VIEW_UPLOADS,
    MANAGE_STORAGE,
    VIEW_STORAGE,
    EMIT_EVENTS,
    WAIT_EVENTS,
    MANAGE_WORKFLOWS,
    ADMIN,
)
# Who may change a thing may see it.
_IMPLIED_BY: Final = {
    VIEW_UPLOADS: MANAGE_UPLOADS,
    VIEW_STORAGE: MANAGE_STORAGE,
    WAIT_EVENTS: MANAGE_WORKFLOWS,
}
CLOCK_SKEW_S: Final = 60
_HS256: Final = "HS256"
_TOKEN_CHARS_MAX: Final = 8192  # those of identity providers are long
_NOT_VALID: Final = "the token is not valid"


@final
class Caller(msgspec.Struct, frozen=True):
    """What a token says of its holder."""

    tenant_id: str
    actor: str
    permissions: frozenset[str]

    def may(self, permission: str) -> bool:
        return bool(self.permissions & {permission, ADMIN, _IMPLIED_BY.get(permission, ADMIN)})

    def need(self, permission: str, *, to_see: str | None = None) -> None:
        """Raise unless the caller has `permission`.

        Lacking it is PermissionMissing; but where the request names a thing and the caller
        may not even see such things (`to_see`), it is NotFound.
        """
        if to_see is not None and not self.may(to_see):
            raise NotFound("thing", "")
        if not self.may(permission):
            raise PermissionMissing(permission)


def _check_actor(name: str) -> str:
    """Pass a name for the audit log; raises InvalidName."""
    if name.startswith(("upload:", "approval:", "webhook:", "run:")):
        raise InvalidName(name, "the audit log calls those so who come without a token")
    return check_name(name)


class _Claims(msgspec.Struct):
    """The claims that count, by their types; times are seconds since 1970 UTC."""

    tenant: str
    sub: str
    exp: float
    permissions: list[str] = []
    nbf: float = 0
    iat: float = 0
    iss: str | None = None
    aud: str | list[str] = []


_JWS: Final = jwt.PyJWS()
_decode: Final = msgspec.json.Decoder(_Claims).decode


@final
class Tokens:
    """Issues the tokens of one ROOT, and reads them and those of its `issuers`."""

    def __init__(
        self,
        secret: bytes,
        now_us: Callable[[], int],
        issuers: Issuers | None = None,
        admit: Callable[[falcon.Request, str], None] = lambda _req, _tenant_id: None,
    ) -> None:
        """`admit` is told of each request and the tenant that sent it, and may refuse it."""
        self._secret = secret
        self._admit = admit
        self._now_us = now_us
        self._issuers = issuers or Issuers()

    def issue(
        self, tenant_id: str, actor: str, permissions: tuple[str, ...], lifetime_s: int
    ) -> str:
        """A token that is good for `lifetime_s` seconds; raises InvalidInput."""
        for permission in permissions:
            if permission not in PERMISSIONS:
                raise InvalidRequest("permission", f"one of {', '.join(PERMISSIONS)}")
        now_s = self._now_us() // SECOND_US
        claims = {
            "tenant": check_segment(tenant_id, "tenant"),
            "sub": _check_actor(actor),
            "permissions": list(permissions),
            "iat": now_s,
            "exp": now_s + lifetime_s,
        }
        return jwt.encode(claims, self._secret, _HS256)

    def caller(self, req: falcon.Request) -> Caller:
        """Who sent this request; raises Unauthorized, TooManyRequests."""
        scheme, _, token = (req.get_header("Authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("send a token as 'Authorization: Bearer …'")
        caller = self.read(token.strip())
        self._admit(req, caller.tenant_id)
        return caller

    def read(self, token: str) -> Caller:
        """What a token says; raises Unauthorized."""
        if len(token) > _TOKEN_CHARS_MAX:
            raise Unauthorized("the token is too long")
        try:
            claims = self._claims(token)
            caller = Caller(
                check_segment(claims.tenant, "tenant"),
                _check_actor(claims.sub),
                frozenset(claims.permissions),
            )
        except (jwt.PyJWTError, msgspec.MsgspecError, InvalidName, ValueError, RecursionError):
            raise Unauthorized(_NOT_VALID) from None
        self._check_times(claims)
        return caller

    def _claims(self, token: str) -> _Claims:
        """What a token says, once its signature is found good."""
        header = jwt.get_unverified_header(token)
        if "crit" in header:  # it asks for what nobody here understands (RFC 7515, 4.1.11)
            raise Unauthorized(_NOT_VALID)
        algorithm = header.get("alg")
        if algorithm == _HS256:
            # The one secret, which no public key can be taken for.
            return _decode(_JWS.decode(token, self._secret, [_HS256]))
        if not isinstance(algorithm, str):
            raise Unauthorized(_NOT_VALID)
        for key in self._issuers.candidates(algorithm, header.get("kid")):
            with suppress(jwt.InvalidSignatureError):
                claims = _decode(_JWS.decode(token, key.public, [key.algorithm]))
                self._check_origin(claims)
                return claims
        raise Unauthorized(_NOT_VALID)

    def _check_origin(self, claims: _Claims) -> None:
        """An issuer may sign for many: its token must be meant for this server."""
        issuers = self._issuers
        audience = [claims.aud] if isinstance(claims.aud, str) else claims.aud
        if issuers.issuer and claims.iss != issuers.issuer:
            raise Unauthorized("the token is of another issuer")
        if issuers.audience and issuers.audience not in audience:
            raise Unauthorized("the token is for another audience")

    def _check_times(self, claims: _Claims) -> None:
        now_s = self._now_us() / SECOND_US
        if claims.exp <= now_s:
            raise Unauthorized("the token has expired")
        if max(claims.nbf, claims.iat) > now_s + CLOCK_SKEW_S:
            raise Unauthorized("the token is not valid yet")
