"""`tools.workflow.*`: what a run waits for: events, people's decisions, others' calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cas.clock import rfc3339
from cas.errors import InvalidToolCall, ToolFailed
from cas.forms import shown_time
from cas.records import CANCELLED, EXPIRED
from workflows.approvals import ApprovalRequest
from workflows.events import Claimed
from workflows.signatures import REFUSE
from workflows.tools.arguments import Arguments
from workflows.tools.calling import Calling, Waiting
from workflows.webhooks import WebhookRequest

_WAIT: Final = "tools.workflow.wait_for_event"
_APPROVAL: Final = "tools.workflow.request_approval"
_WEBHOOK: Final = "tools.workflow.register_webhook"
_UPLOAD_EVENT: Final = "upload_"


def wait_for_event(
    calling: Calling,
    event_name: str,
    timeout_seconds: Any = None,
    correlation_key: str | None = None,
) -> Waiting:
    """Sleep until the event `event_name` comes; its payload is the result.

    With a `correlation_key` it is the event that was posted with this key, and without one that
    was posted without. Fails when `timeout_seconds` are over first, and when an upload that is
    waited for was cancelled or has expired. An upload that was completed before the wait began
    is found.
    """
    given = Arguments(_WAIT)
    key = given.maybe_text("correlation_key", correlation_key)
    name = given.text("event_name", event_name)
    if not name:
        raise InvalidToolCall(_WAIT, "event_name: which event?")
    timeout_s = (
        None if timeout_seconds is None else given.number("timeout_seconds", timeout_seconds)
    )

    def payload(claimed: Claimed) -> Any:
        if name.startswith(_UPLOAD_EVENT) and isinstance(claimed.payload, Mapping):
            status = claimed.payload.get("status")
            if status in (CANCELLED, EXPIRED):
                raise ToolFailed(_WAIT, f"the upload was not completed: it is {status}")
        return claimed.payload

    shown = {"event_name": name, "correlation_key": key}
    return Waiting(_WAIT, name, key, timeout_s, shown, payload)


def request_approval(
    calling: Calling,
    approval_key: str,
    title: str,
    message: str = "",
    addressees: Sequence[str] = (),
    expires_in: Any = None,
    one_click: Any = False,
    redirect_url: str | None = None,
    wait: Any = True,
) -> Any:
    """Put a question to people, and sleep until one of them decides it.

    The result is `{status, approved_by, decided_by, decided_at, comment, approval_id}`, where
    `status` is approved, rejected, expired or cancelled. Each of them completes the step, so
    what follows must look at it: a condition such as `{{decision.status}} == 'approved'`.

    People read `title` and `message`. Of `addressees` those with an @ are mailed their links
    where mail is set up; others are names, and nothing is sent to them. All links are shown with
    the step while it waits, and `mailed` beside them says which were sent. `expires_in` is in
    seconds, and a week unless it is said. With `one_click` a link decides when it is opened,
    without a page in between; `redirect_url` is where it leads afterwards.

    With `wait=False` the result is `{approval_id, event_name, links, expires_at}`, and
    `event_name` is what to wait for. A step asks (and mails) once, however often it is begun.

    One approval of an `approval_key` can be pending in a run: inside a foreach the key has the
    item in it, such as `publish-{{index}}`. Fails with ApprovalKeyTaken otherwise.
    """
    given = Arguments(_APPROVAL)
    wanted = ApprovalRequest(
        approval_key=given.text("approval_key", approval_key),
        title=given.text("title", title),
        message=given.text("message", message),
        addressees=given.texts("addressees", addressees),
        expires_in_s=given.maybe_whole("expires_in", expires_in),
        one_click=given.flag("one_click", one_click),
        redirect_url=given.maybe_text("redirect_url", redirect_url),
        run=calling.run,
    )
    waits = given.flag("wait", wait)
    made = calling.place.request_approval(wanted, calling.key("approval"))
    asked = {
        "approval_id": made.approval_id,
        "event_name": made.event_name,
        "links": [pair.form() for pair in made.links],
        "expires_at": rfc3339(made.expires_at),
    }
    if not waits:
        return asked

    if not made.links:
        # It ended before this step was begun again, and a later one may have its key by now.
        ended = calling.place.ended_approval(made.approval_id)
        if ended is not None:
            return _decision(ended)

    def decision(claimed: Claimed) -> Any:
        told: Mapping[str, Any] | None = claimed.payload
        if told is None or told.get("approval_id") != made.approval_id:
            # Of a later approval, which could be asked for only once this one had ended.
            told = calling.place.ended_approval(made.approval_id)
        if told is None:
            raise ToolFailed(_APPROVAL, "what came is the decision on another approval")
        return _decision(told)

    # No time limit: an approval that is over says so by its event, and by catalog time, which
    # no wrong clock makes too short (invariant 10).
    return Waiting(_APPROVAL, made.event_name, None, None, asked, decision)


def _decision(told: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a step that asked, from what the event of its approval tells."""
    return {
        "status": told["status"],
        "approved_by": told["approved_by"],
        "decided_by": told["decided_by"],
        "decided_at": told["decided_at"],
        "comment": told["comment"],
        "approval_id": told["approval_id"],
    }


def register_webhook(
    calling: Calling,
    webhook_path: str,
    signature_config: Mapping[str, Any],
    event_name: str | None = None,
    correlation_key: str | None = None,
    allowed_networks: Sequence[str] = (),
    single_use: Any = False,
    expires_in: Any = None,
    repeats: str = REFUSE,
) -> dict[str, Any]:
    """Make an address that GitHub, Slack, Stripe, Twilio or another program calls.

    The result is `{webhook_id, webhook_url, event_name, correlation_key, expires_at}`. Each call
    whose signature is good is the event `event_name` with the `correlation_key`, if one is given;
    its payload has `headers` and `body`. A step registers once, however often it is begun.

    `webhook_path` is what HTTP calls the webhook's `name`, and no part of its address, which is
    made here. `signature_config` is `{"kind": "github", "secret_id": "hub"}`, of kind github,
    slack, stripe, twilio or generic, and with the name that `blobcask secret set` keeps the
    secret under. The kind `generic` by itself is Standard Webhooks. For another scheme its
    members stand beside these two: `header`, which has the signature, and where they differ from
    their defaults `prefix` (""), `algorithm` ("sha256"), `encoding` ("hex"), `signed` ("{body}"),
    `id_header` and `timestamp_header` (none), `secret` ("text"), `tolerance` (300 s), `headers`
    (none) and `delivery_header` (none). They are explained as `SignatureForm` at `/docs`.

    `allowed_networks` are those that calls may come from, such as `["192.0.2.0/24"]`, and none
    is any. With `single_use` it takes one call. `expires_in` is in seconds; without it the
    webhook ends with its run.

    Each webhook needs a secret of its own: a call of one could be sent to another that has the
    same, unless its sender signs the address, as only Twilio does.

    The same body again is the same call, and no second event. Of a sender that says the same
    each night `repeats="accept"` makes one event of each identifier of a delivery
    (`X-GitHub-Delivery`, of kind `generic` the header that `delivery_header` names). Nobody
    signs that: whoever has an old call can then send it as a new one.
    """
    given = Arguments(_WEBHOOK)
    signature = given.mapping("signature_config", signature_config)
    kind = given.text("signature_config.kind", signature.pop("kind", None))
    secret_id = given.text("signature_config.secret_id", signature.pop("secret_id", None))
    wanted = WebhookRequest(
        name=given.text("webhook_path", webhook_path),
        kind=kind,
        secret_id=secret_id,
        signature=signature or None,
        event_name=given.maybe_text("event_name", event_name),
        correlation_key=given.maybe_text("correlation_key", correlation_key),
        allowed_networks=given.texts("allowed_networks", allowed_networks),
        single_use=given.flag("single_use", single_use),
        expires_in_s=given.maybe_whole("expires_in", expires_in),
        run=calling.run,
        repeats=given.text("repeats", repeats),
    )
    made = calling.place.register_webhook(wanted, calling.key("webhook"))
    return {
        "webhook_id": made.webhook_id,
        "webhook_url": made.url,
        "event_name": made.event_name,
        "correlation_key": made.correlation_key,
        "expires_at": shown_time(made.expires_at),
    }
