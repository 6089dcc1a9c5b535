"""Where tools work: a store in this process, or one behind a gateway.

A `Place` is one tenant's, and asks nothing of any other (invariant 9): a reference of
another tenant is as absent as an unknown one. `workflows.embedded` and `workflows.remote`
are the two there are; `tests/workflows/test_tools.py` holds both to the same promises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

from cas.once import OnceKey
from cas.records import StoredFile
from cas.retention import Retention
from cas.uploads import UploadRequest
from workflows.approvals import ApprovalLinks, ApprovalRequest
from workflows.events import Claimed
from workflows.webhooks import WebhookRequest


@final
@dataclass(frozen=True, slots=True)
class RequestedUpload:
    """An upload that people can be sent to; its event is `event_name`. The URLs of the slots
    expire before it does, and its page makes fresh ones."""

    upload_id: str
    upload_token: str
    page_url: str
    slot_urls: list[str]
    event_name: str
    expires_at: int  # µs since 1970 UTC


@final
@dataclass(frozen=True, slots=True)
class RequestedApproval:
    """A question that was put; its event is `event_name`. One that has ended, which a step
    that is begun again may find, has no links."""

    approval_id: str
    event_name: str
    expires_at: int  # µs since 1970 UTC
    links: list[ApprovalLinks]


@final
@dataclass(frozen=True, slots=True)
class RegisteredWebhook:
    """An address that others may call; each call is the event `event_name`."""

    webhook_id: str
    url: str
    event_name: str
    correlation_key: str | None
    expires_at: int | None  # µs since 1970 UTC


class Place(Protocol):
    """What tools ask of a store, for one tenant. Safe for threads.

    What is returned is durable (invariant 4). With a key, what is asked for is done once
    however often it is asked for; the first answer is given again.
    """

    @property
    def tenant_id(self) -> str: ...

    # --- files

    def store(
        self,
        data: bytes,
        *,
        name: str,
        run: str,
        filename: str | None = None,
        content_type: str | None = None,
        retention: Retention | None = None,
    ) -> StoredFile:
        """Make `data` a file; the same bytes again, in the same run, are the same file."""
        ...

    def stat(self, reference: str) -> StoredFile:
        """The record; raises NotFound, InvalidReference."""
        ...

    def read(self, reference: str, limit_bytes: int) -> tuple[bytes, str, str]:
        """The bytes, their content type and the filename they are offered under.

        Raises TooLarge before anything is read, NotFound, BlobUnavailable.
        """
        ...

    def url(self, reference: str, expires_in_s: int | None = None) -> str:
        """A signed URL that downloads the file without a login; None: for as long as
        `[gateway] url_expiry`. Raises NotFound, InvalidRequest for an impossible time."""
        ...

    def delete(self, reference: str) -> None:
        """Forget the file; raises NotFound, Held."""
        ...

    # --- what people and programs are asked for

    def request_upload(self, wanted: UploadRequest, key: OnceKey | None = None) -> RequestedUpload:
        """Ask a person for files; raises InvalidRequest, InvalidName, KeyReused, InvalidSetting
        where this process has no address that links could begin with."""
        ...

    def request_approval(
        self, wanted: ApprovalRequest, key: OnceKey | None = None
    ) -> RequestedApproval:
        """Put a question to people, and mail it where mail is set up; raises InvalidRequest,
        InvalidName, KeyReused, ApprovalKeyTaken, RunEnded, InvalidSetting as `request_upload`."""
        ...

    def ended_approval(self, approval_id: str) -> Mapping[str, Any] | None:
        """What its event tells, as far as the record knows it; None while it is pending.
        Raises NotFound."""
        ...

    def register_webhook(
        self, wanted: WebhookRequest, key: OnceKey | None = None
    ) -> RegisteredWebhook:
        """Make an address for others' calls; raises InvalidRequest, InvalidName, KeyReused,
        RunEnded, InvalidSetting as `request_upload`, NotFound where the key's webhook was
        removed since."""
        ...

    # --- events

    def wait(
        self,
        event_name: str,
        correlation_key: str | None = None,
        timeout_s: float | None = None,
        *,
        run: str,
    ) -> Claimed:
        """Block this thread until the event comes, or the time is over (`event` is None then).

        The engine has a way of its own, which blocks nothing and is found again after a crash.
        Raises InvalidRequest, InvalidName, SubscriptionTaken, RunEnded.
        """
        ...
