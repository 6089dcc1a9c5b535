"""What a route is called in the log, the numbers and the document: its template, without the
converters of its fields, which are no business of whoever reads."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

NO_ROUTE: Final = "none"

_CONVERTER: Final = re.compile(r"{(\w+):[^}]*}")


@lru_cache(256)  # of templates, so of what the app has
def route_name(template: str) -> str:
    """`/x/{index:int(min=0)}` is `/x/{index}`."""
    return _CONVERTER.sub(r"{\1}", template)
