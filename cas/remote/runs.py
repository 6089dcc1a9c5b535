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

    def step(self, run_id: str, step_id: str, iteration: str = "") -> JSON:
        """One step; `iteration` is the item's number, of a step in a loop. Raises NotFound."""
        return self._wire.form("GET", _step(run_id, step_id), params=_of(iteration))

    def result(self, run_id: str, step_id: str, iteration: str = "") -> Any:
        """What a step came to, whole, also where `get` tells only how large it is.

        Raises NotFound where it is not there, or has not come to anything.
        """
        path = f"{_step(run_id, step_id)}/result"
        return self._wire.ask("GET", path, params=_of(iteration)).json()

    def list(self, status: str | None, cursor: str | None, limit: int) -> JSON:
        """A page of runs, newest first: `{"runs": [...], "next_cursor": ..., "trouble": [...]}`;
        the last says why nobody carries runs out."""
        params = {"status": status, "cursor": cursor, "limit": limit}
        return self._wire.form("GET", _PATH, params=params)

    def cancel(self, run_id: str) -> JSON:
        """End a run; raises NotFound, RunEnded."""
        return self._wire.form("POST", f"{_PATH}/{quote(run_id, safe='')}/cancel")


def _step(run_id: str, step_id: str) -> str:
    return f"{_PATH}/{quote(run_id, safe='')}/steps/{quote(step_id, safe='')}"


def _of(iteration: str) -> dict[str, str | int | None]:
    return {"iteration": iteration or None}
