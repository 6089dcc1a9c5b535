"""`Idempotency-Key`: a request that is sent again, because its answer was lost, does its thing
once and is answered the same.

The client chooses a key for each thing that it wants done, such as a UUID, and sends it with
every attempt. Keys belong to a tenant and to a kind of thing, and are remembered for a day.
"""

from __future__ import annotations

from typing import Annotated, Final

import falcon
from msgspec import Meta

from cas.errors import InvalidRequest
from cas.once import KEY_CHARS_MAX, OnceKey
from gateway.operations import Parameter

HEADER: Final = "Idempotency-Key"
PARAMETER: Final = Parameter(
    HEADER,
    f"A name of the client's choice, 1 to {KEY_CHARS_MAX} printable ASCII characters: the same"
    " request with the same key is done once within 24 hours, and answered alike.",
    Annotated[str, Meta(min_length=1, max_length=KEY_CHARS_MAX, pattern="^[ -~]+$")],
    where="header",
)


def once_key(req: falcon.Request, scope: str, body: bytes) -> OnceKey | None:
    """The key of a request whose body is `body`; None where the client sent none.

    `scope` says what kind of thing is done ("uploads", "events"). Raises InvalidRequest for
    what is no key. The same key with another body is refused when it is used (KeyReused).
    """
    name = req.get_header(HEADER)
    if name is None:
        return None
    if not (0 < len(name) <= KEY_CHARS_MAX and name.isascii() and name.isprintable()):
        raise InvalidRequest(HEADER, f"1 to {KEY_CHARS_MAX} printable ASCII characters")
    # Never empty, which would take any question.
    return OnceKey(scope, name, b"body\0" + body)
