"""The header that has a server do a thing once, however often it is asked for it."""

from __future__ import annotations

import hashlib
from typing import Final
from urllib.parse import quote
from uuid import uuid4

from cas.once import KEY_CHARS_MAX, OnceKey

_PLAIN: Final = "/:#"  # of a key's own signs, so that one can read it in a log


def once_header(key: OnceKey | None) -> dict[str, str]:
    """`Idempotency-Key` for `key`; without one, of this call alone, so that a lost answer can
    be asked for again.

    What the key was `asked` for is not sent: the server compares the bodies. It remembers a key
    for a day, however long `keep_us` is.
    """
    name = uuid4().hex if key is None else quote(f"{key.scope}/{key.name}", safe=_PLAIN)
    if len(name) > KEY_CHARS_MAX:
        name = hashlib.sha256(name.encode()).hexdigest()
    return {"Idempotency-Key": name}
