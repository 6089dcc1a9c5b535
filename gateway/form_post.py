"""The upload page's plain form: `POST /u/{token}` as multipart/form-data, without script.

    files    any number of files, each into the next free slot
    finish   with any value: these are all, complete the upload
    remove   the number of a slot to empty, or the identifier of an unfinished upload

Parts are read one after the other and go straight into the store: nothing is held in
memory whole or spooled (invariant 11), and each file is durable before the next is read
(invariant 4). What follows a refused file is still tried; its own bytes are read and
thrown away, because a browser shows no answer before all is sent.

There is no token against forged requests: the page knows no cookie and no login. The right
is the upload's token in the address, and who can name that may upload anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol, final

import falcon
from falcon.media.multipart import (
    BodyPart,
    MultipartForm,
    MultipartFormHandler,
    MultipartParseError,
    MultipartParseOptions,
)
from falcon.util import BufferedReader

from cas.errors import (
    BlobcaskError,
    FilesRefused,
    InvalidName,
    NotFound,
    QuotaExceeded,
    SlotsTaken,
    SlotTaken,
    StoreFull,
    TooLarge,
)
from cas.references import check_name
from cas.upload_links import UploadLink
from gateway import forms
from gateway.body import body_of, refuse_encodings

FORM: Final = "multipart/form-data"
FIELD_BYTES_MAX: Final = 1024  # a slot's number, a box that is ticked
PART_HEADER_BYTES_MAX: Final = 8 * 1024
OTHER_PARTS_MAX: Final = 64  # beside one for each slot: fields, and files that are too many
_STEP_BYTES: Final = 256 * 1024
_UNKNOWN_LENGTH: Final = 2**62  # of a chunked body; the sizes of files are limited one by one

# What refuses one file and leaves the others their chance.
_REFUSALS: Final = (InvalidName, TooLarge, SlotsTaken, SlotTaken, StoreFull, QuotaExceeded)


class _Peekable(Protocol):
    """Falcon's reader, as far as it is used here."""

    def peek(self, size: int = -1) -> bytes: ...


@final
class Posted:
    """What became of a form: `stored` files, and the refused ones with their reasons."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.refused: list[tuple[str, BlobcaskError]] = []
        self.finish = False


def receive(req: falcon.Request, link: UploadLink) -> Posted:
    """Put the files of a form into free slots; what is stored is durable on return.

    Raises MultipartParseError or HTTPInvalidHeader for what is no whole form (files before
    the fault stay stored), UploadClosed, and what reading a body raises.
    """
    refuse_encodings(req.env)
    posted = Posted()
    reader, form = _open(req, link.upload.max_files)
    # Checked by the form already: what stands between two parts.
    delimiter = (
        b"\r\n--" + falcon.parse_header(req.content_type or "")[1]["boundary"].rstrip().encode()
    )
    slots = _FreeSlots(link)
    with _readable():
        for part in form:
            _refuse_nested(part)
            if part.filename is not None:
                if part.filename:  # else a picker in which nothing was chosen
                    _store(part, _FileBytes(part, reader, delimiter), link, slots, posted)
            else:
                _field(part, link, slots, posted)
    return posted


def _open(req: falcon.Request, max_files: int) -> tuple[_Peekable, MultipartForm]:
    content_type = req.content_type or ""
    if content_type.partition(";")[0].strip().lower() != FORM:
        raise MultipartParseError(description=f"the form is not {FORM}")
    options = MultipartParseOptions()
    options.max_body_part_count = max_files + OTHER_PARTS_MAX
    options.max_body_part_buffer_size = FIELD_BYTES_MAX
    options.max_body_part_headers_size = PART_HEADER_BYTES_MAX
    body = body_of(req.env)
    length_bytes = _UNKNOWN_LENGTH if body.length_bytes is None else body.length_bytes
    reader = BufferedReader(_Reading(body).read, length_bytes)
    form = MultipartFormHandler(options).deserialize(reader, content_type, length_bytes)
    return reader, form


@contextmanager
def _readable() -> Iterator[None]:
    """Names and types in a part's head must be text."""
    try:
        yield
    except UnicodeDecodeError:
        raise MultipartParseError(description="the head of a part is not text") from None


def _refuse_nested(part: BodyPart) -> None:
    if part.content_type.strip().lower().startswith("multipart/"):  # given up by RFC 7578
        raise MultipartParseError(description="forms within forms are not read")


def _store(
    part: BodyPart, source: _FileBytes, link: UploadLink, slots: _FreeSlots, posted: Posted
) -> None:
    # Browsers write a quote so, and everything else as it is.
    filename = (part.filename or "").replace("%22", '"')
    try:
        check_name(filename)
        link.put(
            slots.first(),
            source,
            filename=filename,
            content_type=forms.fit_media_type(part.content_type),
            only_free=True,
        )
    except _REFUSALS as refusal:
        if isinstance(refusal, SlotTaken):  # another window was faster
            slots.forget()
        posted.refused.append((filename, refusal))
    else:
        slots.filled()
        posted.stored.append(filename)


@final
class _FreeSlots:
    """The slots that are neither filled nor waited for, looked up once for a form: it may
    have as many files as an upload has slots."""

    def __init__(self, link: UploadLink) -> None:
        self._link = link
        self._free: deque[int] | None = None

    def first(self) -> int:
        """Raises SlotsTaken."""
        if self._free is None:
            self._free = self._look()
        if not self._free:
            raise SlotsTaken(self._link.upload.max_files)
        return self._free[0]

    def filled(self) -> None:
        """The first one is not free any more."""
        if self._free:
            self._free.popleft()

    def forget(self) -> None:
        """Something else changed the slots: look again."""
        self._free = None

    def _look(self) -> deque[int]:
        taken = {slot.file_index for slot in self._link.slots()}
        taken |= {partial.index for partial in self._link.partials()}
        return deque(index for index in range(self._link.upload.max_files) if index not in taken)


def _field(part: BodyPart, link: UploadLink, slots: _FreeSlots, posted: Posted) -> None:
    if part.name == "files":
        raise MultipartParseError(description="a file came without its name")
    text = part.get_data().decode().strip()
    if part.name == "finish":
        posted.finish = True
    elif part.name == "remove":
        _remove(text, link)
        slots.forget()


def _remove(text: str, link: UploadLink) -> None:
    with suppress(NotFound):  # it is gone already
        if text.isascii() and text.isdecimal() and len(text) <= 5:
            link.empty(int(text))
        else:
            link.drop_partial(text[:64])


@final
class _Reading:
    """A body as Falcon's reader takes it."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, size: int) -> bytes:
        buffer = bytearray(min(size, _STEP_BYTES))
        count = self._body.readinto(memoryview(buffer))
        del buffer[count:]
        return bytes(buffer)


@final
class _FileBytes:
    """The bytes of one part, as a source of the store.

    Falcon's reader ends a part at the end of the body too. Such a file has lost its end:
    it must fail, not be stored.
    """

    def __init__(self, part: BodyPart, whole: _Peekable, delimiter: bytes) -> None:
        self._stream = part.stream
        self._whole = whole
        self._delimiter = delimiter

    def readinto(self, buffer: memoryview, /) -> int:
        data = self._stream.read(min(len(buffer), _STEP_BYTES))
        if not data and len(buffer) and self._whole.peek(len(self._delimiter)) != self._delimiter:
            raise MultipartParseError(description="the last file did not arrive whole")
        buffer[: len(data)] = data
        return len(data)


def complete(link: UploadLink) -> list[tuple[str, str]]:
    """Complete the upload; answers the refused files with their reasons, none when it is done.

    Raises UploadClosed.
    """
    try:
        link.complete()
    except FilesRefused as refused:
        return [(filename, reason) for _, filename, reason in refused.reasons]
    return []
