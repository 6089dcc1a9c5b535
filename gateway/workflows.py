"""Runs of workflows: submitting one, looking at it, cancelling it.

The gateway runs nothing: it checks a definition and records the run, which the runner beside
it takes up at once. All of it is for bearer tokens with `manage_workflows`, whose holder may
do what the tools of a workflow may.
"""

from __future__ import annotations

import json
from typing import Any, Final, final

import falcon
import msgspec

from cas.errors import (
    InvalidRequest,
    InvalidWorkflow,
    KeyReused,
    NotFound,
    OperatorUnsupported,
    RunEnded,
    TooLarge,
)
from cas.records import CANCELLED, COMPLETED, FAILED, QUEUED, RUNNING, WAITING
from gateway import forms, idempotency
from gateway.auth import MANAGE_WORKFLOWS, Tokens
from gateway.body import BodyTooSlow, BodyTruncated, read_small, refuse_encodings
from gateway.door import Door
from gateway.errors import PermissionMissing
from gateway.operations import Parameter, Reply, Right, operation
from workflows.definitions import DEFINITION_BYTES_MAX, Definition
from workflows.forms import RunForm, RunsForm, WholeRunForm, run_form, whole_run
from workflows.notation import check_depth
from workflows.tools.registry import Registry

INPUTS_BYTES_MAX: Final = 1 << 20
_STATUSES: Final = (QUEUED, RUNNING, WAITING, COMPLETED, FAILED, CANCELLED)


class SubmissionForm(msgspec.Struct, forbid_unknown_fields=True):
    """What is to run: highway_dsl's JSON or YAML as a text, or its JSON as an object."""

    definition: str | dict[str, Any]
    inputs: dict[str, Any] = {}  # variables of the run; they win over the definition's own


def read_submission(body: bytes, tools: Registry) -> tuple[Definition, dict[str, Any]]:
    """The definition and inputs of a body; raises InvalidRequest, InvalidWorkflow, TooLarge."""
    form = forms.read(body, SubmissionForm)
    if len(msgspec.json.encode(form.inputs)) > INPUTS_BYTES_MAX:
        raise TooLarge(INPUTS_BYTES_MAX)
    check_depth(form.inputs)
    text = form.definition if isinstance(form.definition, str) else json.dumps(form.definition)
    definition = Definition.parse(text)
    definition.check_tools(tools.names)
    return definition, form.inputs


@final
class WorkflowsResource:
    """`/api/v1/workflows`"""

    def __init__(self, door: Door, tokens: Tokens, tools: Registry) -> None:
        self._door = door
        self._tokens = tokens
        self._tools = tools

    @operation(
        Right.BEARER,
        name="submitWorkflow",
        body=SubmissionForm,
        parameters=[idempotency.PARAMETER],
        replies={201: Reply("The run, which begins at once.", RunForm)},
        refuses=[
            InvalidRequest,
            InvalidWorkflow,
            OperatorUnsupported,
            KeyReused,
            PermissionMissing,
            TooLarge,
            BodyTruncated,
            BodyTooSlow,
        ],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Run a workflow."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS)
        refuse_encodings(req.env)
        # Twice: a definition may come as a JSON text inside the JSON, with its quotes escaped.
        body = read_small(req.env, 2 * (DEFINITION_BYTES_MAX + INPUTS_BYTES_MAX))
        definition, inputs = read_submission(body, self._tools)
        key = idempotency.once_key(req, "workflows", body)
        run = self._door.runs(caller, req.context.request_id).submit(definition, inputs, key)
        forms.answer(resp, run_form(run), 201)
        resp.location = f"/api/v1/workflows/{run.run_id}"

    @operation(
        Right.BEARER,
        name="listWorkflows",
        parameters=[
            Parameter("status", f"Only runs that are {', '.join(_STATUSES)}."),
            forms.CURSOR,
            forms.LIMIT,
        ],
        replies={200: Reply("A page of them.", RunsForm)},
        refuses=[InvalidRequest, PermissionMissing],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the tenant's runs, newest first, without their steps."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS)
        status = req.get_param("status")
        if status is not None and status not in _STATUSES:
            raise InvalidRequest(status[:64], f"status: one of {', '.join(_STATUSES)}")
        page = self._door.runs(caller, req.context.request_id).list(
            status=status, cursor=forms.cursor(req), limit=forms.page_limit(req)
        )
        runs = [run_form(run) for run in page.items]
        forms.answer(resp, {"runs": runs, "next_cursor": page.next_cursor})

    @operation(
        Right.BEARER,
        name="getWorkflow",
        replies={200: Reply("The run, its steps and its variables.", WholeRunForm)},
        refuses=[NotFound],
    )
    def on_get_one(self, req: falcon.Request, resp: falcon.Response, run_id: str) -> None:
        """Show a run. While a step waits, what it waits for is among the variables."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS, to_see=MANAGE_WORKFLOWS)
        view = self._door.runs(caller, req.context.request_id).get(run_id)
        forms.answer(resp, whole_run(view))

    @operation(
        Right.BEARER,
        name="cancelWorkflow",
        replies={200: Reply("The run, cancelled.", RunForm)},
        refuses=[NotFound, RunEnded],
    )
    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response, run_id: str) -> None:
        """End a run. Steps that are at work at this moment end first, for nothing."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS, to_see=MANAGE_WORKFLOWS)
        run = self._door.runs(caller, req.context.request_id).cancel(run_id)
        forms.answer(resp, run_form(run))
