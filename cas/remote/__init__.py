"""The verbs of `cas.Store` over HTTP, for a store that another machine serves.

    with RemoteStore("https://files.example.org", token) as store:
        file = store.files().put(Path("report.pdf"), name="report")

The same values come back as from an embedded store (`StoredFile`, `PendingUpload`, `Page`),
and the same errors are raised; two are its own, AccessDenied and ServerUnreachable. A
returned call means what it means there: the bytes are durable (invariant 4), and their
SHA-256, counted here while they were sent, is the one the server stored.

    wire      requests: retries with backoff, problems as errors
    bodies    what is sent: sources, their progress and digest
    files     a tenant's files                uploads   requests for files, and their links
    events    posting them, waiting           questions approvals and webhooks
    runs      of workflows
    values    JSON to records                 idempotency  doing a thing once

Only this package of `cas` speaks HTTP, and only the command line and `workflows.remote` import
it.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from types import TracebackType
from typing import Any, Self, final

from cas.errors import NotFound
from cas.remote.events import RemoteEvents
from cas.remote.files import RemoteFiles
from cas.remote.questions import RemoteApprovals, RemoteWebhooks
from cas.remote.runs import RemoteRuns
from cas.remote.uploads import RemoteLink, RemoteUploads
from cas.remote.wire import PATIENCE_S, Wire

__all__ = [
    "RemoteApprovals",
    "RemoteEvents",
    "RemoteFiles",
    "RemoteLink",
    "RemoteRuns",
    "RemoteStore",
    "RemoteUploads",
    "RemoteWebhooks",
]


@final
class RemoteStore:
    """One server, spoken to with one bearer token. Safe for threads."""

    def __init__(self, server: str, token: str = "", *, patience_s: float = PATIENCE_S) -> None:
        """`server` is its public URL, path prefix included; `patience_s` is how long a call
        that meets lost connections or an overloaded server goes on trying."""
        self._wire = Wire(server, token, patience_s)
        self.tenant_id = _tenant_of(token)

    def files(self, tenant_id: str = "", actor: str = "") -> RemoteFiles:
        """The files of the token's tenant ("" is that one); raises NotFound for another.

        `actor` is the token's subject, whatever is given here.
        """
        self._check_tenant(tenant_id)
        return RemoteFiles(self._wire)

    def uploads(self, tenant_id: str = "", actor: str = "") -> RemoteUploads:
        """The uploads of the token's tenant; raises NotFound for another one."""
        self._check_tenant(tenant_id)
        return RemoteUploads(self._wire)

    def events(self, tenant_id: str = "", actor: str = "") -> RemoteEvents:
        """The events of the token's tenant; raises NotFound for another one."""
        self._check_tenant(tenant_id)
        return RemoteEvents(self._wire, tenant_id or self.tenant_id)

    def approvals(self, tenant_id: str = "", actor: str = "") -> RemoteApprovals:
        """The approvals of the token's tenant; raises NotFound for another one."""
        self._check_tenant(tenant_id)
        return RemoteApprovals(self._wire)

    def webhooks(self, tenant_id: str = "", actor: str = "") -> RemoteWebhooks:
        """The webhooks of the token's tenant; raises NotFound for another one."""
        self._check_tenant(tenant_id)
        return RemoteWebhooks(self._wire)

    def runs(self, tenant_id: str = "", actor: str = "") -> RemoteRuns:
        """The runs of the token's tenant; raises NotFound for another one."""
        self._check_tenant(tenant_id)
        return RemoteRuns(self._wire)

    def upload_link(self, token: str) -> RemoteLink:
        """What an upload token opens, without any login; raises NotFound."""
        return RemoteLink(self._wire, token)

    def close(self) -> None:
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_tenant(self, tenant_id: str) -> None:
        # The server would say no more; this says which of the two was meant.
        if tenant_id and self.tenant_id and tenant_id != self.tenant_id:
            raise NotFound("tenant for this token", tenant_id)


def _tenant_of(token: str) -> str:
    """Whom a token says it speaks for; "" when it does not say. The server checks it."""
    try:
        payload = token.split(".")[1]
        claims: Any = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return str(claims["tenant"])
    except (IndexError, KeyError, TypeError, ValueError):
        return ""
