"""Records as JSON, where the command line tells more or other than `cas.forms`."""

from __future__ import annotations

from cas.cli.call import JSON
from cas.forms import pending_upload, slot, stored_file
from cas.records import PendingUpload, StoredFile, UploadFile


def file_form(file: StoredFile) -> JSON:
    """A stored file."""
    return {**stored_file(file)}


def upload_form(upload: PendingUpload, url: str | None) -> JSON:
    """An upload; `url` is that of its page, None where the server's address is not known."""
    # The server keeps the token from those who may only view.
    return {**pending_upload(upload, opening=bool(upload.upload_token)), "upload_url": url}


def slot_form(filled: UploadFile) -> JSON:
    """A filled slot; its digest has gone to the file once the upload is completed."""
    return {**slot(filled), "file_id": filled.file_id}
