"""Approvals: asking people to decide, looking at how it stands, and withdrawing the question.

All of it is for bearer tokens with `manage_workflows`. Who is asked needs none: the signature
of a link is the right, and what it opens is `gateway.approval_page`.
"""

from __future__ import annotations

from typing import Annotated, Final, TypedDict, final

import falcon
import msgspec

from cas.approvals import event_name
from cas.clock import rfc3339
from cas.errors import (
    ApprovalClosed,
    ApprovalKeyTaken,
    InvalidName,
    InvalidRequest,
    InvalidSetting,
    KeyReused,
    NotFound,
    RunEnded,
    TooManyApprovals,
    TooManyMails,
)
from cas.forms import shown_time
from cas.records import APPROVED, CANCELLED, EXPIRED, PENDING, REJECTED, Approval
from cas.references import DIRECT_RUN
from gateway import forms, idempotency
from gateway.auth import MANAGE_WORKFLOWS, Caller, Tokens
from gateway.body import BodyTooSlow, BodyTruncated, read_small, refuse_encodings
from gateway.door import Door
from gateway.errors import PermissionMissing
from gateway.links import Links
from gateway.operations import Parameter, Reply, Right, operation
from workflows.approvals import ApprovalLinksForm, ApprovalRequest, Approvals

REQUEST_BYTES_MAX: Final = 64 * 1024

ApprovalStatus = Annotated[
    str,
    msgspec.Meta(extra_json_schema={"enum": [PENDING, APPROVED, REJECTED, CANCELLED, EXPIRED]}),
]


class ApprovalRequestForm(msgspec.Struct, forbid_unknown_fields=True):
    """What people are asked."""

    approval_key: str
    title: str
    message: str = ""
    # An address of mail, which is mailed the links where the server sends mail, or a name;
    # empty: one pair of links for whoever gets them.
    addressees: list[str] = []
    expires_in: int | None = None  # seconds; null: 7 days
    one_click: bool = False  # whether opening a link decides, without a page in between
    redirect_url: str | None = None
    run: str = DIRECT_RUN


class ListedApprovalForm(TypedDict):
    """An approval as the tenant that asked for it sees it, without the links: these are told
    of one approval at a time."""

    approval_id: str
    approval_key: str
    event_name: str
    workflow_run_id: str
    tenant_id: str
    title: str
    message: str
    addressees: list[str]
    one_click: bool
    redirect_url: str | None
    status: ApprovalStatus
    created_at: forms.Time
    created_by: str
    expires_at: forms.Time
    decided_at: forms.Time | None
    decided_by: str | None
    comment: str


class ApprovalForm(ListedApprovalForm):
    """An approval as the tenant that asked for it sees it; `links` are there while it is
    pending."""

    links: list[ApprovalLinksForm]


class ApprovalsForm(TypedDict):
    """A page of approvals, newest first; `next_cursor` asks for the next."""

    approvals: list[ListedApprovalForm]
    next_cursor: str | None


def read_request(body: bytes) -> ApprovalRequest:
    """What a JSON body asks for; raises InvalidRequest."""
    asked = forms.read(body, ApprovalRequestForm)
    return ApprovalRequest(
        approval_key=asked.approval_key,
        title=asked.title,
        message=asked.message,
        addressees=asked.addressees,
        expires_in_s=asked.expires_in,
        one_click=asked.one_click,
        redirect_url=asked.redirect_url,
        run=asked.run,
    )


@final
class ApprovalsResource:
    """`/api/v1/approvals`"""

    def __init__(self, door: Door, tokens: Tokens, links: Links) -> None:
        self._door = door
        self._tokens = tokens
        self._links = links

    @operation(
        Right.BEARER,
        name="requestApproval",
        body=ApprovalRequestForm,
        parameters=[idempotency.PARAMETER],
        replies={201: Reply("The question, with the links of each addressee.", ApprovalForm)},
        refuses=[
            InvalidRequest,
            InvalidName,
            KeyReused,
            ApprovalKeyTaken,
            RunEnded,
            TooManyApprovals,
            TooManyMails,
            InvalidSetting,
            PermissionMissing,
            BodyTruncated,
            BodyTooSlow,
        ],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Ask people to approve or reject something.

        Each addressee has a link for either decision, good without a login:
        `/api/v1/approvals/{approval_id}/respond?decision=…&token=…`. The first decision counts
        for all. A GET shows a page that asks to confirm, and only a POST decides (with an
        optional `comment`, as a form or JSON), unless `one_click` was asked for: programs that
        look at mails follow links. With `Accept: application/json` a link answers JSON. The
        event `approval_{approval_key}` tells those who wait for it, in the run it was asked in:
        of one key in one run (`direct` is one, too) one approval can be pending at a time.

        So many approvals of a tenant are remembered at once, also such as have ended
        (`[limits] tenant_approvals`), and so many mails of its are still to go out
        (`tenant_mails`): further ones are refused with 429.

        Where the server sends mail, addresses of mail need `[gateway] public_url`: links in
        mails begin with it, and never with the address that this request came to.
        """
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS)
        refuse_encodings(req.env)
        body = read_small(req.env, REQUEST_BYTES_MAX)
        key = idempotency.once_key(req, "approvals", body)
        approvals = self._approvals(caller, req)
        approval = approvals.request(read_request(body), key)
        forms.answer(resp, self._form(req, approvals, approval), 201)
        resp.location = f"/api/v1/approvals/{approval.approval_id}"

    @operation(
        Right.BEARER,
        name="listApprovals",
        parameters=[
            Parameter("run", "Only approvals of this run."),
            forms.CURSOR,
            forms.LIMIT,
        ],
        replies={200: Reply("A page of them.", ApprovalsForm)},
        refuses=[InvalidRequest, PermissionMissing],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List one's own approvals, newest first. Without their links, which
        `/api/v1/approvals/{approval_id}` tells."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS)
        approvals = self._approvals(caller, req)
        page = approvals.list(
            run=req.get_param("run"), cursor=forms.cursor(req), limit=forms.page_limit(req)
        )
        items = [_listed(approval) for approval in page.items]
        forms.answer(resp, {"approvals": items, "next_cursor": page.next_cursor})

    @operation(
        Right.BEARER,
        name="getApproval",
        replies={200: Reply("The approval.", ApprovalForm)},
        refuses=[NotFound],
    )
    def on_get_one(self, req: falcon.Request, resp: falcon.Response, approval_id: str) -> None:
        """Tell how an approval stands, and who decided what and when."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS, to_see=MANAGE_WORKFLOWS)
        approvals = self._approvals(caller, req)
        forms.answer(resp, self._form(req, approvals, approvals.get(approval_id)))

    @operation(
        Right.BEARER,
        name="cancelApproval",
        replies={200: Reply("The approval, cancelled.", ApprovalForm)},
        refuses=[NotFound, ApprovalClosed],
    )
    def on_post_cancel(self, req: falcon.Request, resp: falcon.Response, approval_id: str) -> None:
        """Withdraw a question that nobody has decided; its run is told."""
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS, to_see=MANAGE_WORKFLOWS)
        approvals = self._approvals(caller, req)
        forms.answer(resp, self._form(req, approvals, approvals.cancel(approval_id)))

    def _form(self, req: falcon.Request, approvals: Approvals, approval: Approval) -> ApprovalForm:
        pending = approval.status == PENDING
        pairs = approvals.links(self._links.base(req), approval) if pending else []
        return {**_listed(approval), "links": [pair.form() for pair in pairs]}

    def _approvals(self, caller: Caller, req: falcon.Request) -> Approvals:
        return self._door.approvals(caller, req.context.request_id)


def _listed(approval: Approval) -> ListedApprovalForm:
    return {
        "approval_id": approval.approval_id,
        "approval_key": approval.approval_key,
        "event_name": event_name(approval.approval_key),
        "workflow_run_id": approval.workflow_run_id,
        "tenant_id": approval.tenant_id,
        "title": approval.title,
        "message": approval.message,
        "addressees": approval.addressees,
        "one_click": approval.one_click,
        "redirect_url": approval.redirect_url,
        "status": approval.status,
        "created_at": rfc3339(approval.created_at),
        "created_by": approval.created_by,
        "expires_at": rfc3339(approval.expires_at),
        "decided_at": shown_time(approval.decided_at),
        "decided_by": approval.decided_by,
        "comment": approval.comment,
    }
