"""`tools.storage.*`: files of the run's tenant, and requests for files from people.

A reference of another tenant is as absent as an unknown one (invariant 9). What is repeated
after a crash does nothing twice: the same bytes in one run are one file, and an upload is
asked for under the step's own key.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final

from cas.clock import rfc3339
from cas.config import MIB
from cas.errors import InvalidToolCall, NotFound
from cas.forms import shown_time
from cas.uploads import UploadRequest
from workflows.tools.arguments import Arguments
from workflows.tools.calling import Calling

URL_EXPIRES_IN_S: Final = 3600  # of `get_url`, when the workflow says nothing
_SIZE_MB_MAX: Final = 2**40


def store(
    calling: Calling,
    name: str,
    data: Any,
    content_type: str | None = None,
    retention_policy: str | None = None,
    filename: str | None = None,
) -> dict[str, Any]:
    """Make `data` (a text, or `{"base64": …}`) a file of the run; durable on return.

    The result is `{storage_ref, file_id, size_bytes, checksum_sha256, content_type, name,
    expires_at}`. `name` is what listings call it, `filename` what it is downloaded as, and
    `content_type` what is told of it there. `retention_policy` is `days:30`, `hours:12`,
    `until:2030-01-01T00:00:00Z` or `forever`, or else the store's own.
    """
    given = Arguments("tools.storage.store")
    file = calling.place.store(
        given.data(data),
        name=given.text("name", name),
        run=calling.run,
        filename=given.maybe_text("filename", filename),
        content_type=given.maybe_text("content_type", content_type),
        retention=given.retention(retention_policy),
    )
    return {
        "storage_ref": file.storage_ref,
        "file_id": file.file_id,
        "size_bytes": file.size_bytes,
        "checksum_sha256": file.checksum_sha256.hex(),
        "content_type": file.content_type,
        "name": file.name,
        "expires_at": shown_time(file.expires_at),
    }


def retrieve(calling: Calling, storage_ref: Any) -> Any:
    """What a file holds: its text where it is UTF-8, else `{"base64": …}`.

    `storage_ref` is a reference, or what an upload or `tools.storage.store` tells of a file.
    Fails above `[workflows] result_max`: what a step returns is kept with the run.
    """
    given = Arguments("tools.storage.retrieve")
    limit_bytes = calling.settings.workflows.result_max
    data, _, _ = calling.place.read(given.reference(storage_ref), limit_bytes)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def get_url(calling: Calling, storage_ref: Any, expires_in: Any = URL_EXPIRES_IN_S) -> str:
    """A signed URL that downloads the file without a login, for `expires_in` seconds.

    `storage_ref` is a reference, or what an upload or `tools.storage.store` tells of a file.
    """
    given = Arguments("tools.storage.get_url")
    expires_in_s = given.maybe_whole("expires_in", expires_in)
    return calling.place.url(given.reference(storage_ref), expires_in_s)


def delete(calling: Calling, storage_ref: Any) -> dict[str, Any]:
    """Forget a file; the result is `{storage_ref, deleted}`.

    `storage_ref` is a reference, or what an upload or `tools.storage.store` tells of a file.
    Fails where it is not there (NotFound), or is under a legal hold (Held).
    """
    reference = Arguments("tools.storage.delete").reference(storage_ref)
    try:
        calling.place.delete(reference)
    except NotFound:
        # An attempt that was cut off may have done it.
        if calling.attempt <= 1:
            raise
    return {"storage_ref": reference, "deleted": True}


def request_upload(
    calling: Calling,
    name: str,
    allowed_types: Sequence[str] = (),
    max_size_mb: Any = 0,
    max_files: Any = 1,
    prompt: str = "",
    retention_policy: str | None = None,
    expires_in: Any = None,
    callback_url: str | None = None,
    redirect_url: str | None = None,
) -> dict[str, Any]:
    """Ask a person for files; a step asks once, however often it is begun.

    The result is `{upload_id, upload_token, upload_url, presigned_urls, event_name,
    expires_at}`: `upload_url` is where to send the person, and `event_name` what to wait for.
    That event's payload has `files`, and each of them `storage_ref`, `filename`, `size_bytes`
    and `content_type`.

    The page shows `name` and `prompt`, and takes up to `max_files`. `allowed_types` are
    extensions, such as `["pdf", "jpg"]`, and none is any. `max_size_mb` is for each file, and 0
    no limit but the store's. `expires_in` is in seconds. `retention_policy` is as of
    `tools.storage.store`. `callback_url` is told of the end by a signed POST, and `redirect_url`
    is where the page leads afterwards.
    """
    given = Arguments("tools.storage.request_upload")
    size_mb = given.number("max_size_mb", max_size_mb)
    if size_mb > _SIZE_MB_MAX:
        raise InvalidToolCall("tools.storage.request_upload", "max_size_mb: up to 2^40")
    wanted = UploadRequest(
        name=given.text("name", name),
        allowed_types=given.texts("allowed_types", allowed_types),
        max_size_bytes=int(size_mb * MIB),
        max_files=given.whole("max_files", max_files),
        prompt=given.text("prompt", prompt),
        retention=given.retention(retention_policy),
        expires_in_s=given.maybe_whole("expires_in", expires_in),
        callback_url=given.maybe_text("callback_url", callback_url),
        redirect_url=given.maybe_text("redirect_url", redirect_url),
        run=calling.run,
    )
    made = calling.place.request_upload(wanted, calling.key("upload"))
    return {
        "upload_id": made.upload_id,
        "upload_token": made.upload_token,
        "upload_url": made.page_url,
        "presigned_urls": made.slot_urls,
        "event_name": made.event_name,
        "expires_at": rfc3339(made.expires_at),
    }
