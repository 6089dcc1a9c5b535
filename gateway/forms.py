"""Records as JSON: the names of requirement 1, times as RFC 3339, digests as hex."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final, NotRequired, TypedDict, TypeVar, cast

import falcon
import msgspec

from cas.clock import rfc3339
from cas.completions import Completion, ResumePayload, resume_payload
from cas.errors import InvalidRequest, TooLarge
from cas.forms import Bytes, Sha256, shown_time
from cas.forms import FileForm as FileForm
from cas.forms import ShownUploadForm as ShownUploadForm
from cas.forms import SlotForm as SlotForm
from cas.forms import Status as Status
from cas.forms import Time as Time
from cas.forms import UploadForm as UploadForm
from cas.forms import pending_upload as pending_upload
from cas.forms import slot as slot
from cas.forms import stored_file as stored_file
from cas.forms import upload_shown as upload_shown
from cas.partials import Progress
from cas.records import Delivery, StoredFile, UploadFile
from gateway.operations import Parameter
from gateway.pool import outside_slot

JSON = dict[str, Any]
Read = TypeVar("Read")
PAGE_ITEMS: Final = 100
PAGE_ITEMS_MAX: Final = 1000

UNKNOWN_TYPE: Final = "application/octet-stream"
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MEDIA_TYPE: Final = re.compile(
    rf'{_TOKEN}/{_TOKEN}(?:[ \t]*;[ \t]*{_TOKEN}=(?:{_TOKEN}|"[^"\\\x00-\x1f\x7f-\uffff]*"))*',
    re.ASCII,
)
_MEDIA_TYPE_CHARS_MAX: Final = 255
_CURSOR: Final = re.compile(r"[0-9a-f-]{36}", re.ASCII)
_NAME_CHARS_SHOWN: Final = 64  # of a member, in a refusal

# Of bodies that are longer one at a time is read in a process, for values take more than the
# text that they are made of: `[[],[],…]` 25 times as much.
_LARGE_BYTES: Final = 256 << 10
_large = threading.RLock()
_SPACES: Final = b" \t\r\n"
# Of valid JSON: each text, with its colon where it is a member's name, and the ends of objects.
_NAME_OR_BRACE: Final = re.compile(
    rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"(?:[ \t\r\n]*+(:))?|[{}]', re.DOTALL
)


# --- the types of the forms: what is answered, and what the API's document says of it


class InternalForm(TypedDict):
    """A stored file and the place of its bytes."""

    storage_type: str
    bucket: str
    key: str
    content_type: str
    size_bytes: Bytes
    checksum_sha256: Sha256
    original_filename: str | None
    created_at: Time
    retention_policy: str
    workflow_run_id: str
    tenant_id: str


class FilesForm(TypedDict):
    """A page of files, newest first; `next_cursor` asks for the next."""

    files: list[FileForm]
    next_cursor: str | None


class UrlForm(TypedDict):
    """A signed URL and how many seconds it works."""

    url: str
    expires_in: int


class CallbackForm(TypedDict):
    """How it stands with an upload's callback; `last_error` is "" when nothing was wrong."""

    delivery_id: str
    status: str
    attempts: int
    last_error: str
    next_attempt_at: str | None


class LinkedUploadForm(UploadForm):
    """An upload with the address of its page, null for those who may only view; `callback` is
    null where none is sent (yet)."""

    upload_url: str | None
    callback: CallbackForm | None


class UploadsForm(TypedDict):
    """A page of uploads, newest first; `next_cursor` asks for the next."""

    uploads: list[LinkedUploadForm]
    next_cursor: str | None


class RequestedForm(TypedDict):
    """An upload that was just asked for."""

    upload_id: str
    upload_token: str
    upload_url: str
    presigned_urls: list[str]
    event_name: str
    expires_at: Time


class ShownFileForm(TypedDict):
    """A file as the holder of a link sees it: a filled slot with the signed URL that empties
    it, or a stored file with its reference."""

    filename: str
    content_type: str
    size_bytes: Bytes
    checksum_sha256: Sha256 | None
    index: NotRequired[int]
    stored_at: NotRequired[Time]
    delete_url: NotRequired[str]
    storage_ref: NotRequired[str]


class PartialForm(TypedDict):
    """An unfinished resumable upload."""

    partial_id: str
    index: int
    filename: str
    size_bytes: Bytes
    offset_bytes: Bytes
    expires_at: Time | None
    tus_url: str


class InfoForm(ShownUploadForm):
    """All that the holder of a link may know. URLs are fresh at each call; `files` are the
    filled slots while it is pending, the stored files once it is completed."""

    upload_id: str
    presigned_urls: list[str]
    files: list[ShownFileForm]
    partials: list[PartialForm]
    tus_url: str | None
    uploaded_at: Time | None


# --- parameters that several operations take

CURSOR: Final = Parameter("cursor", "The `next_cursor` of an earlier page.")
LIMIT: Final = Parameter(
    "limit",
    "Up to how many items. A page of long ones ends earlier, at about 1 MiB, and its `next_cursor` "
    "asks for the rest.",
    Annotated[int, msgspec.Meta(ge=1, le=PAGE_ITEMS_MAX)],
)
EXPIRES: Final = Parameter("expires", "Of the signature: seconds since 1970.", int, required=True)
SIGNATURE: Final = Parameter("signature", "HMAC-SHA256 in base64url.", required=True)
CONTENT_DIGEST: Final = Parameter(
    "Content-Digest", "`sha-256=:BASE64:`; what arrives must have it.", where="header"
)
REPR_DIGEST: Final = {"Repr-Digest": "The SHA-256 of what is stored (RFC 9530)."}


def answer(resp: falcon.Response, form: object, status: int = 200) -> None:
    """Send a form; nothing of it may be cached, for it is somebody's own. A part of it that is
    JSON already (`msgspec.Raw`) is sent as it is."""
    resp.status = status
    resp.content_type = "application/json"
    # Made once and as bytes, which are in memory until the slowest reader has them.
    resp.data = msgspec.json.encode(form)
    resp.set_header("Cache-Control", "no-store")


def internal(file: StoredFile, store_name: str) -> InternalForm:
    """The internal form of requirement 1, field for field; the place says what is true."""
    digest = file.checksum_sha256.hex()
    return {
        "storage_type": "local",
        "bucket": store_name,
        "key": f"objects/{digest[:2]}/{digest}",
        "content_type": file.content_type,
        "size_bytes": file.size_bytes,
        "checksum_sha256": digest,
        "original_filename": file.original_filename,
        "created_at": rfc3339(file.created_at),
        "retention_policy": file.retention_policy,
        "workflow_run_id": file.workflow_run_id,
        "tenant_id": file.tenant_id,
    }


def callback(delivery: Delivery) -> CallbackForm:
    """A callback as the tenant that asked for it sees it."""
    return {
        "delivery_id": delivery.delivery_id,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "last_error": delivery.last_error,
        "next_attempt_at": shown_time(delivery.next_attempt_at),
    }


def shown_slot(file: UploadFile, delete_url: str) -> ShownFileForm:
    """A filled slot, with the signed URL that empties it."""
    return cast(ShownFileForm, {**slot(file), "delete_url": delete_url})


def shown_files(done: ResumePayload) -> list[ShownFileForm]:
    """The stored files of a completed upload."""
    return cast(list[ShownFileForm], done["files"])


def tus_path(token: str, partial_id: str = "") -> str:
    """Where resumable uploads begin, or where one goes on."""
    return f"/api/v1/uploads/{token}/tus/{partial_id}"


def partial(progress: Progress, base: str, token: str) -> PartialForm:
    """An unfinished resumable upload; `base` is the address that URLs begin with."""
    return {
        "partial_id": progress.partial_id,
        "index": progress.index,
        "filename": progress.filename,
        "size_bytes": progress.length_bytes,
        "offset_bytes": progress.offset_bytes,
        "expires_at": shown_time(progress.expires_at),
        "tus_url": base + tus_path(token, progress.partial_id),
    }


def completion(done: Completion) -> ResumePayload:
    """What the workflow resumes with (requirement 1)."""
    return resume_payload(done)


@contextmanager
def building(body: bytes) -> Iterator[None]:
    """Around all that is built of a body, until it is let go of: large ones one at a time.

    What a worker has built at a time is so that of one large body, of which `built` judges each
    part before: a workflow's definition and inputs, 1 MiB of empty lists each, take 90 MiB while
    they are looked through. Beside it there is what `threads` small ones come to, 25 times
    _LARGE_BYTES each: 50 MiB of eight.
    """
    if len(body) <= _LARGE_BYTES:
        yield
        return
    if not _large.acquire(blocking=False):
        with outside_slot():
            _large.acquire()
    try:
        yield
    finally:
        _large.release()


def read(body: bytes, kind: type[Read]) -> Read:
    """A JSON body of this kind; raises InvalidRequest with the member and the reason.

    Where a large one may come, members of any form are `msgspec.Raw`, which `built` makes values
    of, all of it in `building`.
    """
    try:
        asked = msgspec.json.decode(body, type=kind)
        _check_each_once(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InvalidRequest("body", str(error)) from None
    return asked


def built(name: str, raw: msgspec.Raw, kind: type[Read], bytes_max: int) -> Read:
    """The value of this kind that a member is; raises InvalidRequest, and TooLarge before
    anything is built, where it has more than `bytes_max` however it is written."""
    check_length(raw, bytes_max)
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InvalidRequest(name, str(error)) from None


def check_length(raw: msgspec.Raw, bytes_max: int) -> None:
    """Raises TooLarge for JSON that has more bytes without the spaces between its members and
    with each escape as one byte, which is less than it comes to."""
    text = bytes(raw)
    if len(text) <= bytes_max:
        return
    escapes_bytes = 5 * text.count(b"\\u") + text.count(b"\\/")
    if len(text.translate(None, _SPACES)) - escapes_bytes > bytes_max:
        raise TooLarge(bytes_max)


def _check_each_once(body: bytes) -> None:
    """Refuse a member that is there twice: of two readers, each could take another one."""
    # Without its values, and once through all of them: a body has room for a million.
    above: list[set[bytes]] = []
    names: set[bytes] = set()
    for found in _NAME_OR_BRACE.finditer(body):
        if found[2]:
            name = found[1]
            if b"\\" in name:
                name = json.loads(b'"%b"' % name).encode()
            if name in names:
                shown = name.decode()[:_NAME_CHARS_SHOWN]
                raise ValueError(f"{shown!r} is there twice")
            names.add(name)
        elif (mark := found[0]) == b"{":
            above.append(names)
            names = set()
        elif mark == b"}":
            names = above.pop()


def page_limit(req: falcon.Request) -> int:
    """How many items of a listing are wanted; raises InvalidRequest."""
    return whole_number(req, "limit", PAGE_ITEMS, 1, PAGE_ITEMS_MAX)


def cursor(req: falcon.Request) -> str | None:
    """Where a listing goes on: an identifier that an earlier page ended with."""
    text = req.get_param("cursor")
    if text is None or _CURSOR.fullmatch(text):
        return text
    raise InvalidRequest("cursor", "the next_cursor of an earlier page")


def whole_number(req: falcon.Request, name: str, default: int, low: int, high: int) -> int:
    """A number in the query; raises InvalidRequest."""
    text = req.get_param(name)
    if text is None:
        return default
    if text.isascii() and text.isdecimal() and len(text) <= 12 and low <= int(text) <= high:
        return int(text)
    raise InvalidRequest(name, f"a whole number, {low} to {high}")


def media_type(req: falcon.Request) -> str | None:
    """The content type the sender names, None when it names none or nothing of that form.

    A claim, never a fact: it is kept, and answered under `nosniff` and a sandbox.
    """
    return fit_media_type((req.content_type or "").strip())


def fit_media_type(given: str) -> str | None:
    """`given` where it has the form of a media type."""
    if len(given) <= _MEDIA_TYPE_CHARS_MAX and _MEDIA_TYPE.fullmatch(given):
        return given
    return None
