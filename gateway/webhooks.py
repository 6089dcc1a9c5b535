"""Webhooks: registering an address, and the calls that come to it.

Registering, listing and removing need a bearer token of the tenant. A call needs a signature
by the webhook's secret, and nothing else (invariant 9).

A call that is taken is answered as its sender reads answers: Twilio takes them for TwiML, what
to do with the message or call now, and Slack shows people what it is answered to a command. The
first gets a document that says nothing, the second an empty one.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypedDict, final

import falcon
import msgspec

from cas.clock import rfc3339
from cas.config import Settings
from cas.errors import (
    BadSignature,
    InvalidName,
    InvalidRequest,
    KeyReused,
    NotFound,
    RunEnded,
    TooManyHeld,
    WebhookClosed,
)
from cas.forms import Time, shown_time
from cas.records import Webhook
from cas.references import DIRECT_RUN
from gateway import forms, idempotency
from gateway.addresses import client_address
from gateway.auth import MANAGE_WORKFLOWS, Tokens
from gateway.body import BodyTooSlow, BodyTruncated, read_small, refuse_encodings
from gateway.door import Door
from gateway.errors import PermissionMissing
from gateway.links import Links
from gateway.operations import ANY_MEDIA, Parameter, Reply, Right, operation
from workflows.signatures import SLACK, TWILIO, Call
from workflows.webhooks import Taken, WebhookRequest, Webhooks, address_of

REQUEST_BYTES_MAX: Final = 64 * 1024
NO_TWIML: Final = '<?xml version="1.0" encoding="UTF-8"?><Response/>'
_XML: Final = "text/xml"
_TEXT: Final = "text/plain"


class RegistrationForm(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a registration; `signature` says how a `generic` one is signed, and of `slack`
    and `stripe` how many seconds of `tolerance` their times have.

    The same body again is the same call, and no second event. With `repeats` "accept" it is a
    call of its own where the sender gives its delivery another identifier: `X-GitHub-Delivery`,
    `I-Twilio-Idempotency-Token`, or of `generic` the header that `signature.delivery_header`
    names. That is weaker, since nobody signs it: whoever has an old call can send it as a new
    one. It is not for calls that have a signed time or identifier, which need it not.
    """

    name: str
    kind: Literal["github", "slack", "stripe", "twilio", "generic"]
    secret_id: str
    signature: dict[str, Any] | None = None
    event_name: str | None = None  # webhook_{name} when none is given
    correlation_key: str | None = None
    allowed_networks: list[str] = []  # empty: any
    single_use: bool = False
    expires_in: int | None = None  # seconds; null: it ends with its run
    run: str = DIRECT_RUN
    repeats: Literal["refuse", "accept"] = "refuse"


class WebhookForm(TypedDict):
    """A webhook, and where its calls are to be sent. `signature` is what is known of how they
    are signed besides the kind; `calls` are those that were taken, each counted once."""

    webhook_id: str
    webhook_url: str
    name: str
    kind: str
    secret_id: str
    signature: dict[str, Any]
    event_name: str
    correlation_key: str | None
    allowed_networks: list[str]
    single_use: bool
    workflow_run_id: str
    created_at: Time
    created_by: str
    expires_at: Time | None
    consumed_at: Time | None
    calls: int
    repeats: str


class WebhooksForm(TypedDict):
    """A page of webhooks, newest first; `next_cursor` asks for the next."""

    webhooks: list[WebhookForm]
    next_cursor: str | None


class TakenForm(TypedDict):
    """`event_id` is null where nothing was to be told; `duplicate`: the same call came before,
    and this is its event."""

    status: Literal["accepted"]
    event_id: str | None
    delivered_to: int
    duplicate: bool
    message: str


def read_registration(body: bytes) -> WebhookRequest:
    """What a JSON body asks for; raises InvalidRequest."""
    asked = forms.read(body, RegistrationForm)
    return WebhookRequest(
        name=asked.name,
        kind=asked.kind,
        secret_id=asked.secret_id,
        signature=asked.signature,
        event_name=asked.event_name,
        correlation_key=asked.correlation_key,
        allowed_networks=asked.allowed_networks,
        single_use=asked.single_use,
        expires_in_s=asked.expires_in,
        run=asked.run,
        repeats=asked.repeats,
    )


@final
class WebhooksResource:
    """`/api/v1/webhooks` and, with the suffix `one`, `/api/v1/webhooks/{webhook_id}`"""

    def __init__(self, door: Door, tokens: Tokens, links: Links, settings: Settings) -> None:
        self._door = door
        self._tokens = tokens
        self._links = links
        self._proxies = settings.gateway.trusted_proxies
        self._call_bytes_max = settings.events.payload_max

    @operation(
        Right.BEARER,
        name="registerWebhook",
        body=RegistrationForm,
        parameters=[idempotency.PARAMETER],
        replies={201: Reply("The webhook, which takes calls at once.", WebhookForm)},
        refuses=[
            InvalidRequest,
            InvalidName,
            KeyReused,
            RunEnded,
            NotFound,
            PermissionMissing,
            BodyTruncated,
            BodyTooSlow,
        ],
    )
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Make an address that another program calls when something happens.

        Each call that is signed by the secret becomes one event, however often it is sent. The
        secret must be there: `blobcask secret set` makes it.
        """
        webhooks = self._webhooks(req)
        refuse_encodings(req.env)
        body = read_small(req.env, REQUEST_BYTES_MAX)
        wanted = read_registration(body)
        webhook = webhooks.register(wanted, idempotency.once_key(req, "webhooks", body))
        forms.answer(resp, self._form(req, webhook), 201)
        resp.location = f"/api/v1/webhooks/{webhook.webhook_id}"

    @operation(
        Right.BEARER,
        name="listWebhooks",
        parameters=[
            Parameter("run", "Only those of this run."),
            forms.CURSOR,
            forms.LIMIT,
        ],
        replies={200: Reply("A page of them.", WebhooksForm)},
        refuses=[InvalidRequest, PermissionMissing],
    )
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """List the tenant's webhooks, newest first."""
        page = self._webhooks(req).list(
            run=req.get_param("run"), cursor=forms.cursor(req), limit=forms.page_limit(req)
        )
        shown = [self._form(req, webhook) for webhook in page.items]
        forms.answer(resp, {"webhooks": shown, "next_cursor": page.next_cursor})

    @operation(
        Right.BEARER,
        name="getWebhook",
        replies={200: Reply("The webhook.", WebhookForm)},
        refuses=[NotFound],
    )
    def on_get_one(self, req: falcon.Request, resp: falcon.Response, webhook_id: str) -> None:
        """Show one of the tenant's webhooks."""
        forms.answer(resp, self._form(req, self._own(req).get(webhook_id)))

    @operation(
        Right.BEARER,
        name="removeWebhook",
        replies={204: Reply("It takes no more calls.")},
        refuses=[NotFound],
    )
    def on_delete_one(self, req: falcon.Request, resp: falcon.Response, webhook_id: str) -> None:
        """Take no more calls; the events of those that came stay."""
        self._own(req).remove(webhook_id)
        resp.status = 204

    @operation(
        Right.CALL,
        name="callWebhook",
        body=ANY_MEDIA,
        body_required=False,
        replies={
            200: Reply(
                "The event that the call is. To Twilio an empty TwiML document (`text/xml`); to "
                "Slack nothing, or the `challenge` of its `url_verification` (`text/plain`).",
                TakenForm,
                texts=[_XML, _TEXT],
            )
        },
        refuses=[
            BadSignature,
            InvalidRequest,
            WebhookClosed,
            TooManyHeld,
            BodyTruncated,
            BodyTooSlow,
        ],
    )
    def on_post_one(self, req: falcon.Request, resp: falcon.Response, webhook_id: str) -> None:
        """Tell what happened, signed as the webhook's kind is.

        The same call is one event, and is answered alike whenever it comes again.
        """
        refuse_encodings(req.env)
        # Before the webhook is looked up: how a call is read says nothing of whether there is
        # one.
        body = read_small(req.env, self._call_bytes_max)
        url = f"{self._links.base(req)}/api/v1/webhooks/{webhook_id}"
        if req.query_string:
            url += f"?{req.query_string}"
        call = Call(req.headers, body, url, client_address(req.env, self._proxies))
        proved = self._door.webhook(req, webhook_id, call)
        taken = proved.take()
        if taken.duplicate or taken.event_id is None:
            self._door.came_before(proved)
        if proved.webhook.kind == TWILIO:
            _answer_text(resp, NO_TWIML, _XML)
        elif proved.webhook.kind == SLACK:
            _answer_text(resp, taken.challenge or "", _TEXT)
        else:
            forms.answer(resp, _taken(taken))

    def _form(self, req: falcon.Request, webhook: Webhook) -> WebhookForm:
        return {
            "webhook_id": webhook.webhook_id,
            "webhook_url": address_of(self._links.base(req), webhook),
            "name": webhook.name,
            "kind": webhook.kind,
            "secret_id": webhook.secret_id,
            "signature": msgspec.json.decode(webhook.signature),
            "event_name": webhook.event_name,
            "correlation_key": webhook.correlation_key,
            "allowed_networks": webhook.allowed_networks,
            "single_use": webhook.single_use,
            "workflow_run_id": webhook.workflow_run_id,
            "created_at": rfc3339(webhook.created_at),
            "created_by": webhook.created_by,
            "expires_at": shown_time(webhook.expires_at),
            "consumed_at": shown_time(webhook.consumed_at),
            "calls": webhook.calls,
            "repeats": webhook.repeats,
        }

    def _webhooks(self, req: falcon.Request, *, to_see: str | None = None) -> Webhooks:
        caller = self._tokens.caller(req)
        caller.need(MANAGE_WORKFLOWS, to_see=to_see)
        return self._door.webhooks(caller, req.context.request_id)

    def _own(self, req: falcon.Request) -> Webhooks:
        return self._webhooks(req, to_see=MANAGE_WORKFLOWS)


def _answer_text(resp: falcon.Response, text: str, media_type: str) -> None:
    """Send what its sender reads, and nobody else: no browser makes more of it than text."""
    resp.content_type = f"{media_type}; charset=utf-8"
    resp.data = text.encode()
    resp.set_header("Cache-Control", "no-store")
    resp.set_header("X-Content-Type-Options", "nosniff")


def _taken(taken: Taken) -> TakenForm:
    if taken.event_id is None:
        message = "Nothing to tell: the address is right"
    elif taken.duplicate:
        message = "The same call came before"
    elif taken.delivered_to:
        message = "Event delivered to waiting workflow"
    else:
        message = "Event kept for the workflow"
    return {
        "status": "accepted",
        "event_id": taken.event_id,
        "delivered_to": taken.delivered_to,
        "duplicate": taken.duplicate,
        "message": message,
    }
