"""What a server asks of people and programs outside, for a workflow: approvals and webhooks.

Spoken in the forms of the HTTP API: what is in them is the matter of `workflows`, which is
above this package.
"""

from __future__ import annotations

from typing import final
from urllib.parse import quote

from cas.once import OnceKey
from cas.remote.idempotency import once_header
from cas.remote.wire import JSON, Wire


@final
class RemoteApprovals:
    """The approvals of the token's tenant. Safe for threads."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def request(self, asked: JSON, key: OnceKey | None = None) -> JSON:
        """Put a question to people; the answer has its links. A lost answer is asked for again,
        and asks nobody a second time. Raises InvalidRequest, KeyReused, ApprovalKeyTaken,
        RunEnded, AccessDenied, InvalidSetting where the server has no address for mails."""
        return self._wire.form("POST", "/api/v1/approvals", form=asked, headers=once_header(key))

    def get(self, approval_id: str) -> JSON:
        """How it stands; raises NotFound."""
        return self._wire.form("GET", f"/api/v1/approvals/{quote(approval_id, safe='')}")

    def cancel(self, approval_id: str) -> JSON:
        """End it undecided; raises NotFound, ApprovalClosed."""
        return self._wire.form("POST", f"/api/v1/approvals/{quote(approval_id, safe='')}/cancel")


@final
class RemoteWebhooks:
    """The webhooks of the token's tenant. Safe for threads."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def register(self, asked: JSON, key: OnceKey | None = None) -> JSON:
        """Make an address for others' calls; the answer has it. A lost answer is asked for
        again, and makes no second one. Raises InvalidRequest, KeyReused, AccessDenied."""
        return self._wire.form("POST", "/api/v1/webhooks", form=asked, headers=once_header(key))

    def get(self, webhook_id: str) -> JSON:
        """How it stands; raises NotFound."""
        return self._wire.form("GET", f"/api/v1/webhooks/{quote(webhook_id, safe='')}")

    def remove(self, webhook_id: str) -> None:
        """Take no more calls there; raises NotFound."""
        self._wire.ask("DELETE", f"/api/v1/webhooks/{quote(webhook_id, safe='')}")
