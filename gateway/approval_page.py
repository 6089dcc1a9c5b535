"""`/api/v1/approvals/{approval_id}/respond`: what a link of an approval opens.

A GET shows a page whose button decides by POST, since programs that look at mails follow
links; only where `one_click` was asked for does it decide itself, and a HEAD or a prefetch
never does. Programs that prefer JSON are answered that. The page has no script.

There is no token against forged requests: the page knows no cookie and no login. The right is
the signature in the address, and who can name that may decide anyway.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypedDict, final
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit, urlunsplit

import falcon
import msgspec

from cas.clock import rfc3339
from cas.errors import (
    ApprovalClosed,
    BadSignature,
    InvalidRequest,
    LinkExpired,
    NotFound,
    StoreFull,
    TooLarge,
)
from cas.forms import shown_time
from cas.records import APPROVED, EXPIRED, PENDING, REJECTED, Approval
from gateway import forms
from gateway.approvals import ApprovalStatus
from gateway.body import BodyTooSlow, BodyTruncated, read_small, refuse_encodings
from gateway.door import Door
from gateway.errors import MediaTypeUnsupported, TooManyRequests
from gateway.operations import JSON_TYPE, Parameter, Reply, Right, operation
from gateway.pages import HEADERS, environment
from gateway.phrases import ENGLISH
from gateway.upload_page import ASSETS_VERSION
from workflows.approvals import COMMENT_CHARS_MAX, ApprovalLink

_HTML: Final = "text/html"
_FORM: Final = "application/x-www-form-urlencoded"
# A character is up to 12 bytes of a form (4 of UTF-8, each percent-encoded). More than fits into
# a comment, so that who has typed too much sees it again.
BODY_BYTES_MAX: Final = 3 * 12 * COMMENT_CHARS_MAX
_POLICY: Final = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action {actions}; frame-ancestors 'none'"
)

# How browsers, old ones too, say what they fetch an address for, before anybody opens it.
_PURPOSES: Final = ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz")
_AHEAD: Final = ("prefetch", "preview", "prerender")
_TOLD: Final = ("id", "decision")  # what `redirect_url` is given

_say = ENGLISH.say


Decision = Annotated[str, msgspec.Meta(extra_json_schema={"enum": [APPROVED, REJECTED]})]
Comment = Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": COMMENT_CHARS_MAX})]


class CommentForm(msgspec.Struct):
    """The body of a decision; what else is in it is not looked at."""

    comment: Comment = ""


class LinkForm(TypedDict):
    """What the holder of a link may know; `decision` is what the link decides, and `status`
    how it stands."""

    status: ApprovalStatus
    approval_id: str
    approval_key: str
    title: str
    message: str
    addressee: str
    decision: Decision
    expires_at: forms.Time
    decided_at: forms.Time | None
    decided_by: str | None
    comment: str


_PARAMETERS: Final = (
    Parameter("decision", "What the link decides.", Decision, required=True),
    Parameter(
        "token", "The link's signature, of the approval, addressee and decision.", required=True
    ),
)
_ONWARD: Final = {"Location": "Where who has decided is sent to."}


@final
class ApprovalPageResource:
    """`/api/v1/approvals/{approval_id}/respond`"""

    def __init__(self, door: Door) -> None:
        self._door = door
        templates = environment()
        templates.globals.update(
            assets=f"../../../../static/{ASSETS_VERSION}",
            pending=PENDING,
            decisions=(APPROVED, REJECTED),
            rejected=REJECTED,
            comment_chars_max=COMMENT_CHARS_MAX,
        )
        templates.filters["rfc3339"] = rfc3339
        self._template = templates.get_template("approval.html")

    @operation(
        Right.SIGNATURE,
        name="openApprovalLink",
        parameters=_PARAMETERS,
        replies={
            200: Reply("How it stands, or a page with a button.", LinkForm, texts=[_HTML]),
            302: Reply("Decided; to the approval's `redirect_url`.", headers=_ONWARD),
        },
        refuses=[NotFound, BadSignature, ApprovalClosed, LinkExpired, StoreFull],
        texts=[_HTML],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response, approval_id: str) -> None:
        """Open a link of an approval; whoever has it decides in the name of its addressee.

        Who prefers `application/json` is answered that, everybody else a page. Nothing is
        decided, unless the approval was asked for with `one_click`, and then by no HEAD and by
        no browser that only fetches ahead.
        """
        link = self._find(req, resp, approval_id)
        if link is None:
            return
        pending = link.approval.status == PENDING
        if pending and link.approval.one_click and _is_opened(req):
            if self._may_decide(req, resp, link):
                self._decide(req, resp, link, "", 302)
        elif not _prefers_json(req):
            self._show(resp, link)
        elif pending:
            forms.answer(resp, _form(link))
        else:
            _refuse(link)

    @operation(
        Right.SIGNATURE,
        name="decideApproval",
        body=CommentForm,
        body_media=[_FORM],
        body_required=False,
        parameters=_PARAMETERS,
        replies={
            200: Reply("Decided.", LinkForm),
            303: Reply(
                "Decided; to the approval's `redirect_url`, or to the page that shows it.",
                headers=_ONWARD,
            ),
            422: Reply(
                "The page again, where a browser sent a comment that cannot be taken.", _HTML
            ),
        },
        refuses=[
            NotFound,
            BadSignature,
            ApprovalClosed,
            LinkExpired,
            InvalidRequest,
            MediaTypeUnsupported,
            BodyTruncated,
            BodyTooSlow,
        ],
        texts=[_HTML],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response, approval_id: str) -> None:
        """Decide what the link says, for all who were asked.

        The first decision counts; who comes later is told what it was. A reload of what is
        answered decides nothing again.
        """
        refuse_encodings(req.env)
        link = self._find(req, resp, approval_id)
        if link is None or not self._may_decide(req, resp, link):
            return
        comment = ""
        try:
            comment = _comment(req)
            self._decide(req, resp, link, comment, 303)
        except (TooLarge, InvalidRequest):
            if _prefers_json(req):
                raise
            notices = [_say("approval.long", count=COMMENT_CHARS_MAX)]
            self._show(resp, link, 422, notices, typed=comment)

    def _decide(
        self, req: falcon.Request, resp: falcon.Response, link: ApprovalLink, comment: str, on: int
    ) -> None:
        """`on` is the status that sends a browser on."""
        json = _prefers_json(req)
        try:
            approval = link.decide(comment)
        except (ApprovalClosed, LinkExpired):
            if json:
                raise
            self._show(resp, link, 409)
            return
        if json:
            forms.answer(resp, _form(link))
            return
        resp.set_headers(_headers(approval))
        if approval.redirect_url is not None:
            resp.status, resp.location = on, _onward(approval.redirect_url, approval)
        elif req.method == "POST":
            # Relative: whatever the proxy's prefix. It shows what was recorded.
            query = urlencode({"decision": link.decision, "token": req.get_param("token") or ""})
            resp.status, resp.location = 303, f"respond?{query}"
        else:
            self._show(resp, link)

    def _find(
        self, req: falcon.Request, resp: falcon.Response, approval_id: str
    ) -> ApprovalLink | None:
        """What the link opens; None when it was answered that it opens nothing, or not now."""
        decision, token = req.get_param("decision") or "", req.get_param("token") or ""
        resp.set_header("Vary", "Accept")
        try:
            return self._door.approval(req, approval_id, decision, token)
        except (NotFound, BadSignature):
            if _prefers_json(req):
                raise
            self._render(resp, 404, approval=None, trouble="gone")
        except (TooManyRequests, TooLarge) as error:
            self._limited(req, resp, error)
        return None

    def _may_decide(self, req: falcon.Request, resp: falcon.Response, link: ApprovalLink) -> bool:
        """False when it was answered that too much is decided now."""
        try:
            self._door.deciding(req, link)
        except (TooManyRequests, TooLarge) as error:
            self._limited(req, resp, error)
            return False
        return True

    def _limited(
        self, req: falcon.Request, resp: falcon.Response, error: TooManyRequests | TooLarge
    ) -> None:
        if _prefers_json(req):
            raise error
        if isinstance(error, TooManyRequests):
            self._render(resp, 429, approval=None, trouble="slow")
            resp.set_header("Retry-After", str(error.retry_after_s))
        else:
            self._render(resp, 413, approval=None, trouble="slow")

    def _show(
        self,
        resp: falcon.Response,
        link: ApprovalLink,
        status: int = 200,
        notices: list[str] | None = None,
        typed: str = "",
    ) -> None:
        approval = link.approval
        if approval.status == EXPIRED:
            status = 410
        self._render(
            resp,
            status,
            approval=approval,
            decision=link.decision,
            addressee=link.addressee,
            decided_here=link.decided_here,
            onward=approval.redirect_url and _onward(approval.redirect_url, approval),
            notices=notices or [],
            typed=typed,
        )

    def _render(
        self, resp: falcon.Response, status: int, *, approval: Approval | None, **values: Any
    ) -> None:
        resp.status = status
        resp.set_headers(_headers(approval))
        resp.content_type = f"{_HTML}; charset=utf-8"
        resp.text = self._template.render(approval=approval, **values)


def _prefers_json(req: falcon.Request) -> bool:
    return req.client_prefers((_HTML, JSON_TYPE)) == JSON_TYPE


def _is_opened(req: falcon.Request) -> bool:
    """Whether somebody opens the address, and does not only look at what is there, or fetch
    it for a person who may open it later."""
    purpose = " ".join(req.get_header(name) or "" for name in _PURPOSES).lower()
    return req.method == "GET" and not any(ahead in purpose for ahead in _AHEAD)


def _refuse(link: ApprovalLink) -> None:
    approval = link.approval
    if approval.status == EXPIRED:
        raise LinkExpired
    raise ApprovalClosed(approval.status, approval.decided_by, approval.decided_at)


def _comment(req: falcon.Request) -> str:
    """The comment of a form or of JSON; raises InvalidRequest, TooLarge, MediaTypeUnsupported."""
    body = read_small(req.env, BODY_BYTES_MAX)
    kind = (req.content_type or "").partition(";")[0].strip().lower()
    if not body:
        return ""
    if kind == _FORM:
        try:
            fields = parse_qs(body.decode("ascii", "replace"), max_num_fields=8)
        except ValueError as error:
            raise InvalidRequest("body", str(error)) from None
        return fields.get("comment", [""])[-1]
    if kind == JSON_TYPE:
        try:
            return msgspec.json.decode(body, type=CommentForm).comment
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise InvalidRequest("body", str(error)) from None
    raise MediaTypeUnsupported(f"{_FORM} or {JSON_TYPE}")


def _form(link: ApprovalLink) -> LinkForm:
    approval = link.approval
    return {
        "status": approval.status,
        "approval_id": approval.approval_id,
        "approval_key": approval.approval_key,
        "title": approval.title,
        "message": approval.message,
        "addressee": link.addressee,
        "decision": link.decision,
        "expires_at": rfc3339(approval.expires_at),
        "decided_at": shown_time(approval.decided_at),
        "decided_by": approval.decided_by,
        "comment": approval.comment,
    }


def _onward(url: str, approval: Approval) -> str:
    """Where who has decided is sent to: it is told what was decided, and nothing else by the
    same names, whichever of two a reader would take. All the rest stays as it was written."""
    parts = urlsplit(url)
    others = [
        each
        for each in parts.query.split("&")
        if each and unquote_plus(each.partition("=")[0]) not in _TOLD
    ]
    told = urlencode(dict(zip(_TOLD, (approval.approval_id, approval.status), strict=True)))
    return urlunsplit(parts._replace(query="&".join([*others, told])))


def _headers(approval: Approval | None) -> dict[str, str]:
    """A browser holds a form to its policy along all redirects that follow, also those behind
    `redirect_url`, such as to a login: hosts cannot be named, only schemes."""
    actions = "'self'"
    if approval is not None and approval.redirect_url is not None:
        https = approval.redirect_url.lower().startswith("https:")
        actions = "'self' https:" if https else "'self' https: http:"
    return {**HEADERS, "Content-Security-Policy": _POLICY.format(actions=actions)}
