"""`/u/{token}`: the page a person with an upload link sees, and its files.

Nothing from elsewhere, nothing inline, no build step: the Content-Security-Policy below
names all the page may do. Its script reaches the API by relative addresses, so the page
works under any host or path prefix a proxy gives it.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final, final

import falcon
import jinja2

from cas.clock import rfc3339
from cas.errors import NotFound
from cas.records import PENDING
from cas.store import Store

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# The token in the address is the right to upload: no other site may learn it.
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@final
class UploadPageResource:
    def __init__(self, store: Store) -> None:
        self._store = store
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("gateway"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["size"] = size_in_words
        environment.filters["rfc3339"] = rfc3339
        self._template = environment.get_template("upload.html")
        self._versions = {asset.name: asset.version for asset in _ASSETS.values()}

    def on_get(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        try:
            upload = self._store.upload_link(token, req.context.request_id).upload
        except NotFound:
            upload = None
        resp.status = 404 if upload is None else 200
        resp.set_headers(_HEADERS)
        resp.content_type = "text/html; charset=utf-8"
        resp.text = self._template.render(upload=upload, pending=PENDING, versions=self._versions)

    on_head = on_get


@final
class _Asset:
    """One file of `static/`, read once: there are few and they are small."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data
        self.version = hashlib.sha256(data).hexdigest()[:16]
        self.content_type = f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"


_ASSETS: Final = {
    entry.name: _Asset(entry.name, entry.read_bytes())
    for entry in files("gateway").joinpath("static").iterdir()
    if entry.name.rpartition(".")[2] in _TYPES
}


@final
class StaticResource:
    """`/static/{name}`; the page asks with `?v=`, so an answer may be kept for ever."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        asset = _ASSETS.get(name)
        if asset is None:
            raise falcon.HTTPRouteNotFound()
        current = req.get_param("v") == asset.version
        resp.set_header(
            "Cache-Control", "public, max-age=31536000, immutable" if current else "no-cache"
        )
        resp.set_header("ETag", f'"{asset.version}"')
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.content_type = asset.content_type
        resp.data = asset.data

    on_head = on_get


def size_in_words(size_bytes: int) -> str:
    """`50 MB`, in steps of 1024 as the limits are given; the page's script counts alike."""
    amount, unit = float(size_bytes), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    text = f"{amount:.1f}".removesuffix(".0") if unit != "bytes" else f"{size_bytes}"
    return f"{text} {unit}"
