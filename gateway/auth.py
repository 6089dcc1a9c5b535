"""Who is calling: bearer tokens (JWT, HS256 with the key of this ROOT) and permissions.

Claims: `tenant`, `sub` (the actor in the audit log), `permissions`, `exp`. A token speaks
for one tenant only, `admin` included; what belongs to others is not found, never forbidden
(invariant 9).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import falcon
import jwt
import msgspec

from cas.clock import SECOND_US
from cas.errors import InvalidName, InvalidRequest, NotFound
from cas.references import check_name, check_segment
from gateway.errors import PermissionMissing, Unauthorized

ADMIN: Final = "admin"
MANAGE_UPLOADS: Final = "manage_uploads"
VIEW_UPLOADS: Final = "view_uploads"
MANAGE_STORAGE: Final = "manage_storage"
VIEW_STORAGE: Final = "view_storage"
PERMISSIONS: Final = (
    MANAGE_UPLOADS,
    VIEW_UPLOADS,
    MANAGE_STORAGE,
    VIEW_STORAGE,
    "emit_events",
    "manage_workflows",
    ADMIN,
)
# Who may change a thing may see it.
_IMPLIED_BY: Final = {VIEW_UPLOADS: MANAGE_UPLOADS, VIEW_STORAGE: MANAGE_STORAGE}
_ALGORITHM: Final = "HS256"
_TOKEN_CHARS_MAX: Final = 4096


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


@final
class Tokens:
    """Issues and reads the tokens of one ROOT."""

    def __init__(self, secret: bytes, now_us: Callable[[], int]) -> None:
        self._secret = secret
        self._now_us = now_us

    def issue(
        self, tenant_id: str, actor: str, permissions: tuple[str, ...], lifetime_s: int
    ) -> str:
        """A token that is good for `lifetime_s` seconds; raises InvalidInput."""
        for permission in permissions:
            if permission not in PERMISSIONS:
                raise InvalidRequest(permission, f"permission: one of {', '.join(PERMISSIONS)}")
        now_s = self._now_us() // SECOND_US
        claims = {
            "tenant": check_segment(tenant_id, "tenant"),
            "sub": check_name(actor),
            "permissions": list(permissions),
            "iat": now_s,
            "exp": now_s + lifetime_s,
        }
        return jwt.encode(claims, self._secret, _ALGORITHM)

    def caller(self, req: falcon.Request) -> Caller:
        """Who sent this request; raises Unauthorized."""
        scheme, _, token = (req.get_header("Authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("send a token as 'Authorization: Bearer …'")
        return self.read(token.strip())

    def read(self, token: str) -> Caller:
        """What a token says; raises Unauthorized."""
        if len(token) > _TOKEN_CHARS_MAX:
            raise Unauthorized("the token is too long")
        try:
            # Times are compared below, by the clock that issued them.
            claims: dict[str, Any] = jwt.decode(
                token,
                self._secret,
                [_ALGORITHM],
                options={
                    "require": ["tenant", "sub", "exp"],
                    "verify_exp": False,
                    "verify_iat": False,
                },
            )
            expires_s = float(claims["exp"])
            caller = Caller(
                check_segment(claims["tenant"], "tenant"),
                check_name(claims["sub"]),
                frozenset(claims.get("permissions", ())),
            )
        except (jwt.PyJWTError, InvalidName, TypeError, ValueError):
            raise Unauthorized("the token is not valid") from None
        if expires_s * SECOND_US <= self._now_us():
            raise Unauthorized("the token has expired")
        return caller
