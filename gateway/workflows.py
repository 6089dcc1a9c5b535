"""Runs of workflows: submitting one, looking at it, cancelling it.

The gateway runs nothing: it checks a definition and records the run, which the runner beside
it takes up at once. All of it is for bearer tokens with `manage_workflows`, whose holder may
do what the tools of a workflow may.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Final, final

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
    TooManyRuns,
)
from cas.records import CANCELLED, COMPLETED, FAILED, QUEUED, RUNNING, WAITING
from gateway import forms, idempotency
from gateway.auth import MANAGE_WORKFLOWS, Tokens
from gateway.body import BodyTooSlow, BodyTruncated, read_small, refuse_encodings
from gateway.door import Door
from gateway.errors import PermissionMissing
from gateway.operations import JSON_TYPE, Parameter, Reply, Right, operation
from workflows.definitions import DEFINITION_BYTES_MAX
from workflows.events import STEP_CHARS_MAX
from workflows.forms import (
    RunForm,
    RunsForm,
    StepForm,
    StepsForm,
    WholeRunForm,
    one_step,
    run_form,
    steps_page,
    whole_run,
)
from workflows.run_view import RunView
from workflows.submissions import INPUTS_BYTES_MAX, read_submission
from workflows.tools.registry import Registry

# Of a result, what is in memory while a client reads it, at its own pace.
PIECE_BYTES: Final = 4 << 20
_ITERATION: Final = Parameter(
    "iteration", "Of a step in a loop, the item's number from 0; in a loop of a loop `2.0`."
)
_STATUSES: Final = (QUEUED, RUNNING, WAITING, COMPLETED, FAILED, CANCELLED)


class SubmissionForm(msgspec.Struct, forbid_unknown_fields=True):
    """What is to run: highway_dsl's JSON or YAML as a text, or its JSON as an object."""

    definition: Annotated[
        msgspec.Raw,
        msgspec.Meta(extra_json_schema={"anyOf": [{"type": "string"}, {"type": "object"}]}),
    ]
    # Variables of the run; they win over the definition's own.
    inputs: Annotated[
        msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object", "default": {}})
    ] = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))


@final
class WorkflowsResource:
    """`/api/v1/workflows`"""

    def __init__(
        self,
        door: Door,
        tokens: Tokens,
        tools: Registry,
        barred: Mapping[str, str],
        trouble: Callable[[], list[str]],
    ) -> None:
        """`barred`: the tools that workflows may not call here, each with the reason. `trouble`
        says why nobody carries runs out."""
        self._door = door
        self._tokens = tokens
        self._tools = tools
        self._barred = barred
        self._trouble = trouble
        # Whoever reads a result has all of it for a moment, 64 MiB at worst: one at a time.
        self._large = threading.Lock()

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
            TooManyRuns,
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
        self._door.submission(caller)
        refuse_encodings(req.env)
        # Twice: a definition may come as a JSON text inside the JSON, with its quotes escaped.
        body = read_small(req.env, 2 * (DEFINITION_BYTES_MAX + INPUTS_BYTES_MAX))
        key = idempotency.once_key(req, "workflows", body)
        runs = self._door.runs(caller, req.context.request_id)
        with forms.building(body):
            form = forms.read(body, SubmissionForm)
            inputs = forms.built("inputs", form.inputs, dict[str, Any], INPUTS_BYTES_MAX)
            text = _text(form.definition)
            definition = read_submission(text, inputs, self._tools, self._barred)
            run = runs.submit(definition, inputs, key)
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
            raise InvalidRequest("status", f"one of {', '.join(_STATUSES)}")
        page = self._door.runs(caller, req.context.request_id).list(
            status=status, cursor=forms.cursor(req), limit=forms.page_limit(req)
        )
        runs = [run_form(run) for run in page.items]
        trouble = self._trouble()
        forms.answer(resp, {"runs": runs, "next_cursor": page.next_cursor, "trouble": trouble})

    @operation(
        Right.BEARER,
        name="getWorkflow",
        replies={200: Reply("The run, its steps and its variables.", WholeRunForm)},
        refuses=[NotFound],
    )
    def on_get_one(self, req: falcon.Request, resp: falcon.Response, run_id: str) -> None:
        """Show a run. While a step waits, what it waits for is among the variables."""
        forms.answer(resp, whole_run(self._run(req, run_id), self._trouble))

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

    @operation(
        Right.BEARER,
        name="listWorkflowSteps",
        parameters=[forms.CURSOR, forms.LIMIT],
        replies={200: Reply("A page of them.", StepsForm)},
        refuses=[InvalidRequest, NotFound],
    )
    def on_get_steps(self, req: falcon.Request, resp: falcon.Response, run_id: str) -> None:
        """List the steps of a run by name and iteration, which is a text: 10 is before 2."""
        view, cursor = self._run(req, run_id), req.get_param("cursor")
        if cursor is not None and len(cursor) > STEP_CHARS_MAX:
            raise InvalidRequest("cursor", "the next_cursor of an earlier page")
        forms.answer(resp, steps_page(view, cursor, forms.page_limit(req)))

    @operation(
        Right.BEARER,
        name="getWorkflowStep",
        parameters=[_ITERATION],
        replies={200: Reply("The step.", StepForm)},
        refuses=[NotFound],
    )
    def on_get_step(
        self, req: falcon.Request, resp: falcon.Response, run_id: str, step_id: str
    ) -> None:
        """Show one step of a run."""
        forms.answer(resp, one_step(self._run(req, run_id), step_id, _iteration(req)))

    @operation(
        Right.BEARER,
        name="getWorkflowResult",
        parameters=[_ITERATION],
        replies={200: Reply("The value, of any JSON type.", JSON_TYPE)},
        refuses=[NotFound],
    )
    def on_get_result(
        self, req: falcon.Request, resp: falcon.Response, run_id: str, step_id: str
    ) -> None:
        """Tell what a step came to, whole. A step that has not come to anything is not found."""
        view, iteration = self._run(req, run_id), _iteration(req)
        step = view.step(step_id, iteration)
        size_bytes = 0 if step is None else step.value_bytes or 0
        with self._reading(size_bytes):
            raw = view.result(step_id, iteration)
        resp.content_type = JSON_TYPE
        resp.set_header("Cache-Control", "no-store")
        if len(raw) <= PIECE_BYTES:
            resp.data = raw
            return
        resp.content_length = len(raw)
        resp.stream = self._pieces(view, step_id, iteration, raw[:PIECE_BYTES], len(raw))

    def _pieces(
        self, view: RunView, step_id: str, iteration: str, piece: bytes, size_bytes: int
    ) -> Iterator[bytes]:
        """A result in pieces, each read when the one before it was sent: it never changes, and
        a snapshot that is kept open for a slow client would keep the index from using its pages
        again. Where the run was forgotten meanwhile the answer breaks off, before its end."""
        at = 0
        while True:
            yield piece
            at += len(piece)
            if at == size_bytes:
                return
            with self._reading(size_bytes):
                piece = view.result(step_id, iteration)[at : at + PIECE_BYTES]

    def _reading(self, size_bytes: int) -> AbstractContextManager[object]:
        return self._large if size_bytes > PIECE_BYTES else nullcontext()

    def _run(self, req: falcon.Request, run_id: str) -> RunView:
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS, to_see=MANAGE_WORKFLOWS)
        return self._door.runs(caller, req.context.request_id).get(run_id)


def _text(definition: msgspec.Raw) -> str:
    """A definition as a text. Nothing is built of one that is an object."""
    raw = bytes(definition)
    if not raw.startswith(b"{"):
        return forms.built("definition", definition, str, len(raw))
    try:
        return msgspec.json.format(raw, indent=-1).decode()
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InvalidRequest("definition", str(error)) from None


def _iteration(req: falcon.Request) -> str:
    return req.get_param("iteration") or ""
