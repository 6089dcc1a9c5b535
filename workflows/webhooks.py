"""Webhooks: addresses where others post what happened, which becomes an event.

A call is taken when somebody signed it who knows the webhook's secret, and once: what is
signed is remembered with its event, in the same transaction (invariant 6), and the same call
is answered with that event again, however often it comes. That is what senders need, which
try again after an answer that they did not get, and all that a replay gains.

What is remembered is remembered until the webhook ends, or for a year. So a call whose scheme
has no time in it cannot be replayed either, and one with a time is judged by that, too. A call
that has a time and no identifier of its own is remembered only until its time is too old.

The event is for the waits of the webhook's run, or for any of the tenant where it was
registered for no run. It stays open to one wait that begins later, as long as any held event,
whatever becomes of its webhook: who called was told that it is kept.

What a sender asks of an address before it sends anything (`workflows.handshakes`) is answered
and is no event.
"""

from __future__ import annotations

import ipaddress
import logging
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import msgspec

from cas.catalog import Catalog, Snapshot, Transaction
from cas.clock import DAY_US, SECOND_US, rfc3339
from cas.config import EventSettings
from cas.errors import (
    BadSignature,
    InvalidRequest,
    NotFound,
    SecretSealed,
    TooLarge,
    TooManyHeld,
    TooManyKept,
    WebhookClosed,
)
from cas.events import (
    NO_LIMIT,
    Room,
    check_correlation_key,
    check_event_name,
    publish,
    refuse_ended,
)
from cas.forgetting import BATCH, forget_webhook
from cas.identifiers import new_id
from cas.listing import Page, newest, own
from cas.once import OnceKey, once, remembered, webhook_scope
from cas.records import Run, Secret, Webhook
from cas.references import DIRECT_RUN, check_segment
from workflows import secrets, signatures
from workflows.complaints import Complaints
from workflows.handshakes import Handshake, read_handshake
from workflows.posted import readable
from workflows.signatures import ACCEPT, REFUSE, Address, Call, Proof

log = logging.getLogger("blobcask.workflows")

EXPIRES_IN_S_MAX: Final = 366 * 24 * 3600
NETWORKS_MAX: Final = 100
CALLS_REMEMBERED_US: Final = 366 * DAY_US
CALLS_FORGOTTEN_MAX: Final = 10_000  # by the request that removes their webhook
_NAME_CHARS_MAX: Final = 200
_HEADER_CHARS_MAX: Final = 1000  # of one that an event tells of
_SHOWN: Final = ("Content-Type", "User-Agent")


@final
@dataclass(frozen=True, slots=True)
class WebhookRequest:
    """What is expected from whom. `signature`: see `workflows.signatures.Scheme`; `repeats`:
    REFUSE, or ACCEPT with what `workflows.signatures.Proof.by_delivery` says of it."""

    name: str  # of a run, or of the tenant: its event is `webhook_<name>` when none is named
    kind: str
    secret_id: str
    signature: Mapping[str, Any] | None = None
    event_name: str | None = None
    correlation_key: str | None = None
    allowed_networks: list[str] = field(default_factory=list)  # empty: any
    single_use: bool = False
    expires_in_s: int | None = None  # None: it ends with its run
    run: str = DIRECT_RUN
    repeats: str = REFUSE


@final
@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a call. `event_id` None: it was none that an event is made of, but a
    handshake, and `challenge` is what its sender wants to read."""

    event_id: str | None
    delivered_to: int  # waits that the event was given to when it came first
    duplicate: bool = False  # it came before, and this is what it was answered then
    challenge: str | None = None


@final
class Webhooks:
    """The webhooks of one tenant. Safe for threads."""

    def __init__(self, catalog: Catalog, *, tenant_id: str, actor: str, request_id: str) -> None:
        self._catalog = catalog
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id

    def register(self, wanted: WebhookRequest, key: OnceKey | None = None) -> Webhook:
        """Record a webhook, which takes calls from then on; durable on return. With a `key`,
        once.

        Its run need not be known here. So that of another tenant is as good as one that is not
        there: neither is told of, then or by a call (invariant 9).

        Raises InvalidRequest with the field and the reason; InvalidName; RunEnded for a run of
        the tenant's that has ended, which would take no call; KeyReused; NotFound where the
        key's webhook was removed since.
        """
        event_name = _check(wanted)
        signature = signatures.read_scheme(wanted.kind, wanted.signature)
        signatures.check_repeats(wanted.repeats, wanted.kind, signature)
        networks = [str(_network(text)) for text in wanted.allowed_networks]
        term_us = None if wanted.expires_in_s is None else wanted.expires_in_s * SECOND_US

        def change(txn: Transaction) -> Webhook:
            def insert() -> str:
                refuse_ended(txn, self._tenant_id, wanted.run)
                if txn.get(Secret, self._tenant_id, wanted.secret_id) is None:
                    command = f"blobcask secret set {wanted.secret_id} --tenant {self._tenant_id}"
                    reason = f"there is no secret {wanted.secret_id!r}; `{command}` keeps one"
                    raise InvalidRequest("secret_id", reason)
                webhook = Webhook(
                    webhook_id=new_id(txn.now_us),
                    tenant_id=self._tenant_id,
                    workflow_run_id=wanted.run,
                    name=wanted.name,
                    kind=wanted.kind,
                    secret_id=wanted.secret_id,
                    signature=signature,
                    event_name=event_name,
                    correlation_key=wanted.correlation_key,
                    allowed_networks=networks,
                    single_use=wanted.single_use,
                    created_at=txn.now_us,
                    created_by=self._actor,
                    expires_at=None if term_us is None else txn.now_us + term_us,
                    # A term is not counted from a time in doubt (invariant 10).
                    undated_at=None if txn.believed or term_us is None else txn.now_us,
                    repeats=wanted.repeats,
                )
                txn.insert(webhook)
                return webhook.webhook_id

            webhook_id, _ = once(txn, self._tenant_id, key, insert)
            return self._own(txn, webhook_id)

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def get(self, webhook_id: str) -> Webhook:
        """One of the tenant's webhooks; raises NotFound."""
        with self._catalog.read() as snapshot:
            return self._own(snapshot, webhook_id)

    def list(
        self, *, run: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page[Webhook]:
        """A page of them, newest first."""
        index = "tenant" if run is None else "run"
        prefix = (self._tenant_id,) if run is None else (self._tenant_id, run)
        with self._catalog.read() as snapshot:
            page = newest(snapshot, Webhook, index, prefix, cursor, limit)
        return Page([one for one in page.items if not one.is_removed], page.next_cursor)

    def remove(self, webhook_id: str) -> None:
        """Take no more calls; events that came stay. Durable on return; raises NotFound.

        Which calls came is forgotten with it. Where it were more than CALLS_FORGOTTEN_MAX, or
        this is stopped half-way, it is there for nobody but the sweep, which goes on.
        """

        def begin(txn: Transaction) -> bool:
            return forget_webhook(txn, self._own(txn, webhook_id))

        def go_on(txn: Transaction) -> bool:
            left = txn.get(Webhook, webhook_id)
            return left is None or forget_webhook(txn, left)

        for portion in range(CALLS_FORGOTTEN_MAX // BATCH):
            change = go_on if portion else begin
            if self._catalog.write(change, actor=self._actor, request_id=self._request_id):
                break

    def _own(self, snapshot: Snapshot, webhook_id: str) -> Webhook:
        webhook = own(snapshot, Webhook, self._tenant_id, webhook_id)
        if webhook is None or webhook.is_removed:
            raise NotFound("webhook", webhook_id)
        return webhook


@final
@dataclass(frozen=True, slots=True)
class Reception:
    """Where calls come in, whichever webhook is called: what it takes to prove one and to make
    it an event. Safe for threads."""

    catalog: Catalog
    ring: tuple[bytes, ...]  # ROOT/keys/secrets
    settings: EventSettings
    now_us: Callable[[Snapshot], int]  # catalog time, which judges old secrets (invariant 10)
    complaints: Complaints
    room: Room = NO_LIMIT  # for the events of each tenant

    def open(self, webhook_id: str, request_id: str = "") -> WebhookCall:
        """The call of the webhook with this identifier. Where there is none, another one's
        secret is opened and compared, which takes as long; `prove` then never succeeds. Nor
        does it where the secret was removed, or no key opens it: who calls has proved nothing,
        and hears nothing else than of a webhook that is not there. `complaints` tell of it.

        Raises NotFound where there is no webhook at all.
        """
        complaints = self.complaints
        with self.catalog.read() as snapshot:
            webhook = _nearest(snapshot, webhook_id)
            if webhook is None:
                raise NotFound("webhook", webhook_id)
            try:
                secret = secrets.verifying(
                    snapshot,
                    self.ring,
                    webhook.tenant_id,
                    webhook.secret_id,
                    self.now_us(snapshot),
                    complaints,
                )
            except NotFound:
                secret = b""  # removed: no signature is good any more
            except SecretSealed:
                secret = b""
                if webhook.webhook_id == webhook_id:
                    complaints.make(
                        "webhook %s: its secret %s cannot be opened with ROOT/keys/secrets, so "
                        "its calls are refused",
                        webhook_id,
                        webhook.secret_id,
                    )
        return WebhookCall(self, webhook_id, request_id, webhook, secret)


@final
class WebhookCall:
    """What somebody calls who has proved nothing yet: not even that there is such a webhook
    can be told before that (invariant 9)."""

    def __init__(
        self,
        reception: Reception,
        webhook_id: str,
        request_id: str,
        webhook: Webhook,
        secret: bytes,
    ) -> None:
        """`webhook` is the one of `webhook_id`, or another one where there is none."""
        self._reception = reception
        self._webhook_id = webhook_id
        self._request_id = request_id
        self._webhook = webhook
        self._secret = secret

    def prove(self, call: Call) -> ProvedCall:
        """The call, if its signature is good and it comes from where it may; raises
        BadSignature, also where there is no such webhook, and TooLarge."""
        limit_bytes = self._reception.settings.payload_max
        if len(call.body) > limit_bytes:
            raise TooLarge(limit_bytes)
        webhook = self._webhook
        there = webhook.webhook_id == self._webhook_id
        proof = signatures.prove(webhook.kind, webhook.signature, self._secret, call, may_be=there)
        if webhook.repeats == ACCEPT:
            proof = proof.by_delivery()
        if not _may_come(webhook, call.address):
            log.warning(
                "webhook %s: a call with a good signature came from %s, which is not in its "
                "allowed_networks",
                webhook.webhook_id,
                call.address,
            )
            raise BadSignature
        return ProvedCall(self._reception, self._request_id, webhook, call, proof)


def _nearest(snapshot: Snapshot, webhook_id: str) -> Webhook | None:
    """The webhook with this identifier, else one beside it: both are found by the same work."""
    before = snapshot.range(Webhook, "", before=(f"{webhook_id}\0",), limit=1, reverse=True)
    return next(iter(before or snapshot.range(Webhook, "", limit=1)), None)


@final
class ProvedCall:
    """A call whose signature is good."""

    def __init__(
        self,
        reception: Reception,
        request_id: str,
        webhook: Webhook,
        call: Call,
        proof: Proof,
    ) -> None:
        self._reception = reception
        self._request_id = request_id
        self.webhook = webhook
        self._call = call
        self._proof = proof

    def take(self) -> Taken:
        """Make the call an event, or find the one that it was made before; durable on return.

        Raises WebhookClosed when the webhook takes no more, InvalidRequest when the call was
        signed too long ago or in the future; TooManyHeld, TooManyKept, which the log tells of, too:
        not every sender tries again. Who may read that has a good signature.
        """
        handshake = read_handshake(self._call, self.webhook.kind)

        def change(txn: Transaction) -> Taken:
            return self._take(txn) if handshake is None else self._greet(txn, handshake)

        actor = f"webhook:{self.webhook.webhook_id}"
        try:
            return self._reception.catalog.write(change, actor=actor, request_id=self._request_id)
        except (TooManyHeld, TooManyKept) as error:
            which = "held" if isinstance(error, TooManyHeld) else "kept"
            # Without the numbers: it is one complaint, however much each call has.
            self._reception.complaints.make(
                "webhook %s of %s: its calls are refused, since the tenant has as many %s "
                "events as [limits] tenant_%s_events allows",
                self.webhook.webhook_id,
                self.webhook.tenant_id,
                which,
                which,
            )
            raise

    def _greet(self, txn: Transaction, handshake: Handshake) -> Taken:
        """Answer a handshake, which leaves no trace: nothing has happened, and a webhook for a
        single call must not be spent on it. The same one is answered alike while its time is
        near enough, and tells who repeats it nothing but what it said itself."""
        self._open_webhook(txn)
        self._check_time(txn)
        return Taken(None, 0, challenge=handshake.challenge)

    def _open_webhook(self, txn: Transaction) -> tuple[Webhook, int | None]:
        """The webhook and for how long it takes calls (None: it has no end of its own)."""
        webhook = txn.get(Webhook, self.webhook.webhook_id)
        if webhook is None:
            raise NotFound("webhook", self.webhook.webhook_id)
        left_us = _left_us(webhook, txn.now_us)
        if left_us is not None and left_us <= 0:
            raise WebhookClosed("the webhook's time is over")
        return webhook, left_us

    def _take(self, txn: Transaction) -> Taken:
        webhook, left_us = self._open_webhook(txn)
        keep_us = self._remembered_us(txn.now_us)
        if left_us is not None:
            keep_us = min(left_us, keep_us)
        key = OnceKey(webhook_scope(webhook.webhook_id), self._proof.known_by, keep_us=keep_us)
        if remembered(txn, webhook.tenant_id, key) is None:
            self._check_time(txn)
            self._check_open(txn, webhook)

        def act() -> str:
            event, delivered_to = publish(
                txn,
                webhook.tenant_id,
                webhook.event_name,
                self._payload(txn.now_us),
                webhook.correlation_key,
                run="" if webhook.workflow_run_id == DIRECT_RUN else webhook.workflow_run_id,
                open_us=self._reception.settings.keep,
                once=True,
                room=self._reception.room,
            )
            taken = msgspec.structs.replace(
                webhook, consumed_at=txn.now_us, calls=webhook.calls + 1
            )
            txn.replace(taken)
            return msgspec.json.encode([event.event_id, delivered_to]).decode()

        result, fresh = once(txn, webhook.tenant_id, key, act, room=self._reception.room)
        event_id, delivered_to = msgspec.json.decode(result, type=tuple[str, int])
        return Taken(event_id, delivered_to, duplicate=not fresh)

    def _check_time(self, txn: Transaction) -> None:
        proof = self._proof
        if proof.at_s is None:
            return
        ago_s = txn.now_us // SECOND_US - proof.at_s
        if not txn.believed and (ago_s < 0 or not proof.is_known_by_time):
            # While our clock is in doubt it judges nobody of whom is known what came before.
            # Of the others it is, up to where catalog time stands: what was signed long before
            # that may have come, and be forgotten.
            return
        if abs(ago_s) > proof.tolerance_s:
            reason = f"the call was signed {abs(ago_s)} s from now, more than {proof.tolerance_s} s"
            raise InvalidRequest("timestamp", reason)

    def _remembered_us(self, now_us: int) -> int:
        """For how long it must be known that this call came: where its time is part of what it
        is known by, until that is too old for certain."""
        proof = self._proof
        if proof.at_s is None or not proof.is_known_by_time:
            return CALLS_REMEMBERED_US
        # Of a time in doubt it may be further ahead of us than the tolerance. And a second
        # more, which the rounding to seconds takes.
        ahead_s = max(proof.at_s - now_us // SECOND_US, proof.tolerance_s)
        return min((ahead_s + proof.tolerance_s + 1) * SECOND_US, CALLS_REMEMBERED_US)

    def _check_open(self, txn: Transaction, webhook: Webhook) -> None:
        if webhook.single_use and webhook.calls:
            raise WebhookClosed("the webhook took its only call")
        run = txn.get(Run, webhook.workflow_run_id)
        if run is not None and run.tenant_id == webhook.tenant_id and run.open is None:
            raise WebhookClosed(f"the run that waited for this is {run.status}")

    def _payload(self, now_us: int) -> bytes:
        webhook = self.webhook
        names = (*_SHOWN, *signatures.shown_headers(webhook.kind, webhook.signature))
        delivery_id = self._proof.delivery_id
        form, body = self._body()
        payload = {
            "webhook_id": webhook.webhook_id,
            "name": webhook.name,
            "kind": webhook.kind,
            "delivery_id": None if delivery_id is None else delivery_id[:_HEADER_CHARS_MAX],
            "received_at": rfc3339(now_us),
            "headers": {
                name.lower(): value[:_HEADER_CHARS_MAX]
                for name in names
                if (value := self._call.header(name))
            },
            "body_form": form,
            "body": body,
        }
        return msgspec.json.encode(payload)

    def _body(self) -> tuple[str, msgspec.Raw]:
        """As a workflow reads it, unless that is much more than what came: control characters
        are six times as long in JSON. Base64 is a third longer, whatever it is, so no body is
        more in its event than four thirds of `payload_max`."""
        form, body = readable(self._call, self.webhook.kind)
        shown = msgspec.json.encode(body)
        if len(shown) > _base64_bytes(self._reception.settings.payload_max):
            form, shown = "base64", msgspec.json.encode(b64encode(self._call.body).decode())
        return form, msgspec.Raw(shown)


def _base64_bytes(size: int) -> int:
    """Of so many bytes, with the quotes."""
    return 4 * ((size + 2) // 3) + 2


def _left_us(webhook: Webhook, now_us: int) -> int | None:
    """For how long it takes calls; None: it has no end of its own."""
    if webhook.expires_at is None:
        return None
    return webhook.expires_at - (now_us if webhook.undated_at is None else webhook.undated_at)


def _may_come(webhook: Webhook, address: Address | None) -> bool:
    if not webhook.allowed_networks:
        return True
    networks = map(ipaddress.ip_network, webhook.allowed_networks)
    return address is not None and any(address in network for network in networks)


def address_of(base: str, webhook_id: str) -> str:
    """Where to send the calls, under a `base` without a slash at its end."""
    return f"{base}/api/v1/webhooks/{webhook_id}"


def _check(wanted: WebhookRequest) -> str:
    """Raises InvalidRequest, InvalidName; returns the name of its events."""
    if not 1 <= len(wanted.name) <= _NAME_CHARS_MAX or not wanted.name.isprintable():
        raise InvalidRequest("name", f"1 to {_NAME_CHARS_MAX} printable characters")
    check_segment(wanted.run, "run")
    check_segment(wanted.secret_id, "secret")
    event_name = wanted.event_name or f"webhook_{wanted.name}"
    check_event_name(event_name, of_webhook=True)
    check_correlation_key(wanted.correlation_key)
    term_s = wanted.expires_in_s
    if term_s is not None and not 1 <= term_s <= EXPIRES_IN_S_MAX:
        raise InvalidRequest("expires_in", f"1 to {EXPIRES_IN_S_MAX} seconds")
    if len(wanted.allowed_networks) > NETWORKS_MAX:
        raise InvalidRequest("allowed_networks", f"at most {NETWORKS_MAX}")
    return event_name


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidRequest("allowed_networks", str(error)) from None
