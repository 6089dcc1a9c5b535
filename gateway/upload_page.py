"""`/u/{token}`: the page a person with an upload link sees, and its files.

Nothing from elsewhere, nothing inline, no build step: the Content-Security-Policy below
names all the page may do. Its script reaches the API by relative addresses, so the page
works under any host or path prefix a proxy gives it. Without script, or until it runs,
the page is a plain form (`form_post`).
"""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, Final, final

import falcon
from falcon.media.multipart import MultipartParseError

from cas.clock import rfc3339
from cas.errors import NotFound, SlotsTaken, TooLarge, UploadClosed
from cas.records import COMPLETED, PENDING
from cas.upload_links import UploadLink
from gateway import form_post
from gateway.door import Door
from gateway.errors import TooManyRequests, code_of
from gateway.form_post import Posted
from gateway.pages import HEADERS, environment
from gateway.phrases import ENGLISH

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS: Final = {**HEADERS, "Content-Security-Policy": _POLICY}
_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# What a name may end with and is the same; phones choose by the type, desktops by the name.
_ALIASES: Final = {"jpg": ("jpeg",), "jpeg": ("jpg",), "tif": ("tiff",), "tiff": ("tif",)}

_say = ENGLISH.say


@final
class UploadPageResource:
    def __init__(self, door: Door) -> None:
        self._door = door
        templates = environment()
        templates.filters.update(size=size_in_words, rfc3339=rfc3339)
        templates.globals.update(
            assets=f"../static/{ASSETS_VERSION}",
            modules=sorted(name for name in _ASSETS if name.endswith(".js")),
            pending=PENDING,
            completed=COMPLETED,
        )
        self._template = templates.get_template("upload.html")

    def on_get(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        link = self._find(req, resp, token)
        if link is not None:
            self._show(resp, link)

    def on_post(self, req: falcon.Request, resp: falcon.Response, token: str) -> None:
        """Take the plain form; a reload of what is answered sends no file again."""
        link = self._find(req, resp, token)
        if link is None:
            return
        try:
            notices = self._receive(req, link)
        except UploadClosed:
            notices = []
        except (MultipartParseError, falcon.HTTPInvalidHeader):
            self._show(resp, link, 400, [_say("plain.broken")])
            return
        except TooManyRequests as error:
            self._ask_to_wait(resp, error)
            return
        except TooLarge:
            self._render(resp, 413, upload=None, trouble="large")
            return
        if notices:
            self._show(resp, link, 422, notices)
        else:
            resp.status = 303
            resp.set_headers(_HEADERS)
            resp.location = link.upload.upload_token  # relative: whatever the proxy's prefix

    def _receive(self, req: falcon.Request, link: UploadLink) -> list[str]:
        """What was refused, in words; completes the upload where that was asked."""
        if link.upload.status != PENDING:
            raise UploadClosed(link.upload.status)
        posted = form_post.receive(req, link)
        notices = [_refusal(filename, error, link) for filename, error in posted.refused]
        if posted.finish and not notices:
            notices = _finish(link, posted)
        return notices

    def _find(self, req: falcon.Request, resp: falcon.Response, token: str) -> UploadLink | None:
        """The upload; None when it was answered that there is none, or none now."""
        try:
            return self._door.upload_link(req, token)
        except NotFound:
            self._render(resp, 404, upload=None, trouble="missing")
        except TooManyRequests as error:
            self._ask_to_wait(resp, error)
        except TooLarge:  # more than the limits let anybody send at a time
            self._render(resp, 413, upload=None, trouble="large")
        return None

    def _ask_to_wait(self, resp: falcon.Response, error: TooManyRequests) -> None:
        self._render(resp, 429, upload=None, trouble="busy")
        resp.set_header("Retry-After", str(error.retry_after_s))

    def _show(
        self,
        resp: falcon.Response,
        link: UploadLink,
        status: int = 200,
        notices: Iterable[str] = (),
    ) -> None:
        upload = link.upload
        values: dict[str, Any] = {"upload": upload, "notices": list(notices)}
        if upload.status == PENDING:
            values["slots"] = link.slots()
            values["partials"] = link.partials()
            values["limit_bytes"] = link.size_limit_bytes
            values["accept"] = _accept(upload.allowed_types)
            values["photos"] = not upload.allowed_types or "jpg" in _with_aliases(
                upload.allowed_types
            )
        elif upload.status == COMPLETED:
            done = link.completion()
            values["received"] = list(zip(done.filenames, done.files, strict=True))
        self._render(resp, status, **values)

    def _render(self, resp: falcon.Response, status: int, **values: Any) -> None:
        resp.status = status
        resp.set_headers(_HEADERS)
        resp.content_type = "text/html; charset=utf-8"
        resp.text = self._template.render(**values)


def _finish(link: UploadLink, posted: Posted) -> list[str]:
    refused = form_post.complete(link)
    if not refused:
        return []
    if not posted.stored and not link.slots():
        return [_say("plain.nothing")]
    return [
        _say("plain.refused", name=filename, reason=_say("refused.reason", reason=reason))
        for filename, reason in refused
    ]


def _refusal(filename: str, error: Exception, link: UploadLink) -> str:
    """Why one file of a form was refused, in the words of the script."""
    if isinstance(error, SlotsTaken):
        return _say("choose.too_many", name=filename, count=error.max_files)
    key = f"problem.{code_of(error)}"
    reason = _say(
        key if key in ENGLISH else "problem.unknown",
        limit=size_in_words(link.size_limit_bytes),
        reason=getattr(error, "reason", ""),
    )
    return _say("plain.refused", name=filename, reason=reason)


def _with_aliases(types: Iterable[str]) -> set[str]:
    return {name for kind in types for name in (kind, *_ALIASES.get(kind, ()))}


def _accept(types: list[str]) -> str:
    """The `accept` of a picker: names for desktops, media types for phones."""
    names = sorted(_with_aliases(types))
    media = {mimetypes.guess_type(f"a.{name}", strict=False)[0] for name in names}
    return ",".join([f".{name}" for name in names] + sorted(filter(None, media)))


# --- the page's files


@final
class _Asset:
    """One file of `static/`, read once: there are few and they are small."""

    def __init__(self, name: str, data: bytes) -> None:
        self.data = data
        self.content_type = f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"


def _read_assets() -> dict[str, _Asset]:
    found = {
        entry.name: entry.read_bytes()
        for entry in files("gateway").joinpath("static").iterdir()
        if entry.name.rpartition(".")[2] in _TYPES
    }
    found["phrases.js"] = ENGLISH.module()
    return {name: _Asset(name, data) for name, data in sorted(found.items())}


_ASSETS: Final = _read_assets()
# Of all files together: what a module imports has then the version of the module.
_FINGERPRINT: Final = hashlib.sha256(b"".join(asset.data for asset in _ASSETS.values()))
ASSETS_VERSION: Final = _FINGERPRINT.hexdigest()[:16]


@final
class StaticResource:
    """`/static/{version}/{name}`; an answer of the present version may be kept for ever."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, version: str, name: str) -> None:
        asset = _ASSETS.get(name)
        if asset is None:
            raise falcon.HTTPRouteNotFound()
        current = version == ASSETS_VERSION
        resp.set_header(
            "Cache-Control", "public, max-age=31536000, immutable" if current else "no-cache"
        )
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.content_type = asset.content_type
        resp.data = asset.data


def size_in_words(size_bytes: int) -> str:
    """`50 MB`, in steps of 1024 as the limits are given; the page's script counts alike."""
    amount, unit = float(size_bytes), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    text = f"{amount:.1f}".removesuffix(".0") if unit != "bytes" else f"{size_bytes}"
    return f"{text} {unit}"
