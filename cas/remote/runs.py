"""Runs of workflows on a server, as the JSON that its API answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final
from urllib.parse import quote

from cas.remote.idempotency import once_header
from cas.remote.wire import JSON, Wire

_PATH = "/api/v1/workflows"


@final
class RemoteRuns:
    """The runs of the token's tenant. Made by `RemoteStore.runs`; safe for threads."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def submit(self, definition: str, inputs: Mapping[str, Any]) -> JSON:
        """Run a workflow, highway_dsl's JSON or YAML; recorded on return, and once, however
        often the connection breaks.

        Raises InvalidWorkflow, OperatorUnsupported, AccessDenied.
        """
        form = {"definition": definition, "inputs": dict(inputs)}
        return self._wire.form("POST", _PATH, form=form, headers=once_header(None))

    def get(self, run_id: str) -> JSON:
        """A run with its steps and variables; raises NotFound."""
        return self._wire.form("GET", f"{_PATH}/{quote(run_id, safe='')}")

    def list(self, status: str | None, cursor: str | None, limit: int) -> JSON:
        """A page of runs, newest first: `{"runs": [...], "next_cursor": ...}`."""
        params = {"status": status, "cursor": cursor, "limit": limit}
        return self._wire.form("GET", _PATH, params=params)

    def cancel(self, run_id: str) -> JSON:
        """End a run; raises NotFound, RunEnded."""
        return self._wire.form("POST", f"{_PATH}/{quote(run_id, safe='')}/cancel")
