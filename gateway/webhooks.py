"""Webhooks: registering an address, and the calls that come to it.

Registering, listing and removing need a bearer token of the tenant. A call needs a signature
by the webhook's secret, and nothing else (invariant 9).

A call that is taken is answered as its sender reads answers: Twilio takes them for TwiML, what
to do with the message or call now, and Slack shows people what it is answered to a command. The
first gets a document that says nothing, the second an empty one.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypedDict, final

import falcon
import msgspec
from msgspec import UNSET, Meta, UnsetType

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
    TooManyKept,
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
from workflows import signatures
from workflows.signatures import KINDS, REFUSE, SLACK, TWILIO, Call
from workflows.webhooks import Taken, WebhookRequest, Webhooks, address_of

REQUEST_BYTES_MAX: Final = 64 * 1024
NO_TWIML: Final = '<?xml version="1.0" encoding="UTF-8"?><Response/>'
_XML: Final = "text/xml"
_TEXT: Final = "text/plain"


Kind = Annotated[
    str,
    Meta(
        description=(
            "Whose scheme the calls are signed by. `generic` is Standard Webhooks, symmetric "
            "(`v1`), or what `signature` says."
        ),
        extra_json_schema={"enum": list(KINDS)},
    ),
]


def _said(default: object, about: str) -> Meta:
    """What the document says of a member that may be left out, and is `default` then."""
    return Meta(description=about, extra_json_schema={"default": default})


class SignatureForm(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How the calls of a `generic` webhook are signed: all of it, for what is left out is not
    that of Standard Webhooks but the default given here. Of `slack` and `stripe` there is only
    the `tolerance` to say, of `github` and `twilio` nothing."""

    header: Annotated[
        signatures.HeaderName | UnsetType,
        Meta(description="The header with the signature, or several with spaces between; needed."),
    ] = UNSET
    prefix: Annotated[
        signatures.Prefix | UnsetType,
        _said("", "What each signature begins with, such as `sha256=`; others are left out."),
    ] = UNSET
    algorithm: Annotated[
        signatures.Algorithm | UnsetType, _said("sha256", "The hash of the HMAC.")
    ] = UNSET
    encoding: Annotated[
        signatures.Encoding | UnsetType, _said("hex", "How each signature is written.")
    ] = UNSET
    signed: Annotated[
        signatures.SignedText | UnsetType,
        _said(
            "{body}",
            "What is signed: `{body}` at its end, and before it `{id}` and `{timestamp}` where "
            "their headers are named, such as `{timestamp}.{body}`. What stands after each of "
            "these two has a character that is no letter, digit, `_` or `-`.",
        ),
    ] = UNSET
    id_header: Annotated[
        signatures.HeaderName | UnsetType | None,
        _said(
            None,
            "The header with the signed identifier, by which a call is known again: 1 to 255 "
            "printable characters of ASCII, without spaces and without the one that ends it in "
            "`signed`.",
        ),
    ] = UNSET
    timestamp_header: Annotated[
        signatures.HeaderName | UnsetType | None,
        _said(None, "The header with the signed time, in seconds since 1970."),
    ] = UNSET
    secret: Annotated[
        signatures.SecretForm | UnsetType,
        _said(
            "text",
            "What the key is: the secret's own bytes (`text`), or what it is in base64, with or "
            "without `whsec_` before it (`base64`).",
        ),
    ] = UNSET
    tolerance: Annotated[
        signatures.Tolerance | UnsetType,
        _said(signatures.TOLERANCE_S, "How many seconds the signed time may be from ours."),
    ] = UNSET
    headers: Annotated[
        signatures.HeaderNames | UnsetType,
        _said([], "Which headers its events tell of, beside `Content-Type` and `User-Agent`."),
    ] = UNSET
    delivery_header: Annotated[
        signatures.HeaderName | UnsetType | None,
        _said(
            None,
            "The header with what the sender calls the delivery, signed by nobody; see `repeats`.",
        ),
    ] = UNSET


class RegistrationForm(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a registration."""

    name: Annotated[
        str, Meta(description="What the event calls the webhook; of the tool its `webhook_path`.")
    ]
    kind: Kind
    secret_id: Annotated[
        str,
        Meta(
            description=(
                "The secret that calls are signed by, as `blobcask secret set` named it. One for "
                "each webhook: most schemes do not sign the address, so that a call of one could "
                "be sent to another with the same secret."
            )
        ),
    ]
    signature: Annotated[
        SignatureForm | None,
        Meta(description="How they are signed, where the kind does not say it all."),
    ] = None
    event_name: Annotated[str | None, Meta(description="null: `webhook_` and the name.")] = None
    correlation_key: str | None = None
    allowed_networks: Annotated[
        list[str], Meta(description="Who may call, such as `192.0.2.0/24`; empty: anybody.")
    ] = []
    single_use: Annotated[bool, Meta(description="Whether it takes one call and no other.")] = False
    expires_in: Annotated[int | None, Meta(description="Seconds; null: it ends with its run.")] = (
        None
    )
    run: Annotated[
        str, Meta(description="Whose waits the events are for; `direct`: any of the tenant.")
    ] = DIRECT_RUN
    repeats: Annotated[
        Literal["refuse", "accept"],
        Meta(
            description=(
                "The same body again is the same call, and no second event. With `accept` it is a "
                "call of its own where the sender gives its delivery another identifier: "
                "`X-GitHub-Delivery`, `I-Twilio-Idempotency-Token`, or of `generic` the header "
                "that `signature.delivery_header` names. That is weaker, since nobody signs it: "
                "whoever has an old call can send it as a new one. It is not for calls that have "
                "a signed time or identifier, which need it not."
            )
        ),
    ] = REFUSE


class WebhookForm(TypedDict):
    """A webhook, and where its calls are to be sent. `signature` is what is known of how they
    are signed besides the kind; `calls` are those that were taken, each counted once."""

    webhook_id: str
    webhook_url: str
    name: str
    kind: Kind
    secret_id: str
    signature: SignatureForm
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
        signature=msgspec.to_builtins(asked.signature),
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
        secret must be there: `blobcask secret set` makes it. Each webhook needs one of its own,
        for a call can be sent to any webhook with the same secret, unless its sender signs the
        address, as only Twilio does.
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
            TooManyKept,
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
        url = address_of(self._links.base(req), webhook_id)
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
            "webhook_url": address_of(self._links.base(req), webhook.webhook_id),
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
