"""What the pages for people have in common: their headers, and how their templates are filled.

Nothing from elsewhere, nothing inline: a page's own policy names what it may do beyond that.
Pages name their files relative to themselves, so they work under any host or path prefix that
a proxy gives them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from urllib.parse import urlsplit

import jinja2

from cas.clock import SECOND_US
from gateway.phrases import ENGLISH

# The address of a page is a right: no other site may learn it, and nobody may keep the page.
HEADERS: Final = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # as `frame-ancestors` says to browsers that know it
    "X-Robots-Tag": "noindex, nofollow",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def environment() -> jinja2.Environment:
    """Templates that escape what is put into them, and know the phrases."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("gateway"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(say=ENGLISH.say, language=ENGLISH.language)
    made.filters.update(moment=moment, host=host)
    return made


def moment(at_us: int) -> str:
    """A time for people, where no script knows their zone."""
    at = datetime.fromtimestamp(at_us // SECOND_US, UTC)
    return f"{at.day} {ENGLISH.say(f'month.{at.month}')} {at.year}, {at:%H:%M} UTC"


def host(url: str) -> str:
    """Where an address leads, as a person should see it before going there."""
    return urlsplit(url).netloc.rpartition("@")[2]
