"""Approvals: a question to people that one of them decides.

    pending → approved | rejected | cancelled | expired

`Approvals` is a tenant's view (request, list, cancel). `ApprovalLink` is what one signed link
opens: it lets one addressee decide one way, once for all addressees together, and its
signature is the right (invariant 9). What was decided is recorded with its event, in one
transaction (invariant 6), and so are the request and the mails that carry its links: these are
written and sealed before it, since meanwhile nobody else could write.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypedDict, final

import msgspec

from cas.approvals import approval_as_of, close_approval, take_key
from cas.catalog import Catalog, Snapshot, Transaction
from cas.clock import DAY_US, SECOND_US
from cas.config import Settings
from cas.deliveries import message
from cas.errors import (
    ApprovalClosed,
    InvalidRequest,
    InvalidSetting,
    LinkExpired,
    NotFound,
    TooManyApprovals,
    TooManyMails,
)
from cas.events import refuse_ended
from cas.identifiers import new_id
from cas.links import SignedLinks
from cas.listing import Page, newest, own
from cas.mailboxes import read_mailbox
from cas.once import OnceKey, once
from cas.records import (
    APPROVED,
    CANCELLED,
    EXPIRED,
    MAIL,
    PENDING,
    REJECTED,
    Approval,
    Delivery,
    DeliveryPayload,
)
from cas.references import DIRECT_RUN, check_segment
from cas.sealing import Ring
from cas.totals import approvals_of, mails_of
from cas.uploads import check_url
from workflows.mails import approval_mail

DEFAULT_EXPIRY_US: Final = 7 * DAY_US  # people are away for a weekend, and for a holiday of days
ADDRESSEES_MAX: Final = 50
COMMENT_CHARS_MAX: Final = 2000

_EXPIRES_IN_S_MAX: Final = 366 * 24 * 3600
_KEY_CHARS_MAX: Final = 200
_TITLE_CHARS_MAX: Final = 200
_MESSAGE_CHARS_MAX: Final = 4000
_ADDRESSEE_CHARS_MAX: Final = 254  # of a mail address (RFC 5321)


@final
@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """What people are asked. An addressee with an @ is a mail address, and is mailed the links
    where `[mail] host` is set; another one is a name. No addressee at all is "somebody"."""

    approval_key: str
    title: str
    message: str = ""
    addressees: list[str] = field(default_factory=list)
    expires_in_s: int | None = None
    one_click: bool = False  # whether opening a link decides, without a page in between
    redirect_url: str | None = None  # where who has decided is sent to
    run: str = DIRECT_RUN


class ApprovalLinksForm(TypedDict):
    """The links of one addressee: whoever has them can decide in that name. `mailed` says
    whether a mail brings them; it does where mail is set up and the addressee has an @."""

    addressee: str
    approve_url: str
    reject_url: str
    mailed: bool


@final
@dataclass(frozen=True, slots=True)
class ApprovalLinks:
    """The two links of one addressee. Whoever has them can decide in that name."""

    addressee: str
    approve_url: str
    reject_url: str
    mailed: bool = False

    def form(self) -> ApprovalLinksForm:
        """The same as JSON."""
        return {
            "addressee": self.addressee,
            "approve_url": self.approve_url,
            "reject_url": self.reject_url,
            "mailed": self.mailed,
        }


Pairs = list[ApprovalLinks]
_Mails = list[tuple[Delivery, DeliveryPayload]]


@final
class Approvals:
    """The approvals of one tenant. Made by `Workflows.approvals`; safe for threads."""

    def __init__(
        self,
        catalog: Catalog,
        links: SignedLinks,
        settings: Settings,
        ring: Ring,
        *,
        tenant_id: str,
        actor: str,
        request_id: str,
    ) -> None:
        """`ring` is `Keys.secrets`: what is mailed is recorded sealed."""
        self._catalog = catalog
        self._links = links
        self._settings = settings
        self._ring = ring
        self._tenant_id = check_segment(tenant_id, "tenant")
        self._actor = actor
        self._request_id = request_id

    def request(self, wanted: ApprovalRequest, key: OnceKey | None = None) -> Approval:
        """Record a question and the mails that carry its links; durable on return. With a
        `key`, once: what was asked before is returned, and nobody is mailed again.

        One at a time of each `approval_key` in a run (`direct` is one, too): what the one
        before it came to is told to nobody who begins to wait after this.

        Links in mails begin with `[gateway] public_url` and nothing else: whoever asks must
        not choose where people are led to by a mail of ours.

        Raises ApprovalKeyTaken while another one with this key is pending in the run, RunEnded
        for a run of the tenant's that has ended, InvalidRequest with the field and the reason,
        InvalidName, KeyReused, TooManyApprovals and TooManyMails (unless the key's approval is
        there), and InvalidSetting where mails need an address and there is none.
        """
        _check(wanted)
        approval = self._asked(wanted)
        mails = self._mails(approval)

        def insert(txn: Transaction) -> str:
            keep_us = self._settings.events.keep
            refuse_ended(txn, self._tenant_id, wanted.run)  # nobody would hear the answer
            take_key(txn, self._tenant_id, wanted.run, wanted.approval_key, keep_us=keep_us)
            self._refuse_more(txn, len(mails))
            txn.insert(approval if txn.believed else _undated(approval))
            for delivery, sent in mails:
                txn.insert(delivery)
                txn.insert(sent)
            return approval.approval_id

        def change(txn: Transaction) -> Approval:
            approval_id, _ = once(txn, self._tenant_id, key, lambda: insert(txn))
            return approval_as_of(self._own(txn, approval_id), txn.now_us)

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def get(self, approval_id: str) -> Approval:
        """One approval as it stands; raises NotFound, also for another tenant's."""
        with self._catalog.read() as snapshot:
            approval = self._own(snapshot, approval_id)
        return approval_as_of(approval, self._links.now_us())

    def list(
        self, *, run: str | None = None, cursor: str | None = None, limit: int = 100
    ) -> Page[Approval]:
        """A page of approvals, newest first; those of one `run`."""
        index = "tenant" if run is None else "run"
        prefix = (self._tenant_id,) if run is None else (self._tenant_id, run)
        with self._catalog.read() as snapshot:
            page = newest(snapshot, Approval, index, prefix, cursor, limit)
        now_us = self._links.now_us()
        return Page([approval_as_of(one, now_us) for one in page.items], page.next_cursor)

    def links(self, base: str, approval: Approval) -> Pairs:
        """The links of each addressee, in their order: the same ones at every call. `base` is
        the address that they begin with; "" takes `[gateway] public_url`."""
        base = base or self._settings.gateway.public_url
        return [
            ApprovalLinks(
                addressee,
                self._links.approval(base, approval, index, APPROVED),
                self._links.approval(base, approval, index, REJECTED),
                self._is_mailed(addressee),
            )
            for index, addressee in enumerate(approval.addressees)
        ]

    def cancel(self, approval_id: str) -> Approval:
        """End a pending approval undecided; its run is told. Durable on return.

        Raises NotFound, ApprovalClosed.
        """

        def change(txn: Transaction) -> Approval:
            approval = approval_as_of(self._own(txn, approval_id), txn.now_us)
            if approval.status != PENDING:
                raise ApprovalClosed(approval.status, approval.decided_by, approval.decided_at)
            keep_us = self._settings.events.keep
            return close_approval(txn, approval, CANCELLED, keep_us=keep_us)

        return self._catalog.write(change, actor=self._actor, request_id=self._request_id)

    def _asked(self, wanted: ApprovalRequest) -> Approval:
        """The approval that is asked for, from now on."""
        now_us = self._links.now_us()
        term_us = DEFAULT_EXPIRY_US
        if wanted.expires_in_s is not None:
            term_us = wanted.expires_in_s * SECOND_US
        return Approval(
            approval_id=new_id(now_us),
            tenant_id=self._tenant_id,
            workflow_run_id=wanted.run,
            approval_key=wanted.approval_key,
            title=wanted.title,
            message=wanted.message,
            addressees=wanted.addressees or [""],
            one_click=wanted.one_click,
            redirect_url=wanted.redirect_url,
            status=PENDING,
            created_at=now_us,
            created_by=self._actor,
            expires_at=now_us + term_us,
            open_until=now_us + term_us,
        )

    def _mails(self, approval: Approval) -> _Mails:
        """What is mailed to its addressees, as it is to be recorded; raises InvalidSetting."""
        if not any(map(self._is_mailed, approval.addressees)):
            return []
        if not self._settings.gateway.public_url:
            raise InvalidSetting("gateway", "public_url", "", "mailed links need an address")
        return [
            message(
                approval.created_at,
                self._tenant_id,
                MAIL,
                approval.approval_id,
                pair.addressee,
                {
                    "to": pair.addressee,
                    **approval_mail(approval, pair.approve_url, pair.reject_url),
                },
                ring=self._ring,
            )
            for pair in self.links("", approval)
            if pair.mailed
        ]

    def _is_mailed(self, addressee: str) -> bool:
        return bool(self._settings.mail.host) and "@" in addressee

    def _refuse_more(self, txn: Transaction, mails: int) -> None:
        """Raise TooManyApprovals, TooManyMails where another approval with so many mails is
        more than the tenant may have."""
        limits = self._settings.limits
        remembered = approvals_of(txn, self._tenant_id)
        if 0 < limits.tenant_approvals <= remembered:
            raise TooManyApprovals(limits.tenant_approvals, remembered)
        waiting = mails_of(txn, self._tenant_id)
        if mails and 0 < limits.tenant_mails < waiting + mails:
            raise TooManyMails(limits.tenant_mails, waiting, mails)

    def _own(self, snapshot: Snapshot, approval_id: str) -> Approval:
        approval = own(snapshot, Approval, self._tenant_id, approval_id)
        if approval is None:
            raise NotFound("approval", approval_id)
        return approval


@final
class ApprovalLink:
    """One addressee's link to one decision. Made by `Workflows.approval_link`."""

    def __init__(
        self,
        catalog: Catalog,
        links: SignedLinks,
        settings: Settings,
        approval_id: str,
        index: int,
        decision: str,
        request_id: str,
    ) -> None:
        self._catalog = catalog
        self._links = links
        self._keep_us = settings.events.keep
        self._approval_id = approval_id
        self._request_id = request_id
        self.decision = decision
        self.approval = self._read()  # as it stood when this last looked
        self.addressee = self.approval.addressees[index]

    @classmethod
    def open(
        cls,
        catalog: Catalog,
        links: SignedLinks,
        settings: Settings,
        approval_id: str,
        decision: str,
        token: str,
        request_id: str = "",
    ) -> ApprovalLink:
        """What a link opens, also once it is decided or over. The signature is judged before
        anything is looked up, so that nobody learns by it what there is (invariant 9).

        Raises BadSignature, NotFound for an approval that was forgotten.
        """
        index = links.check_approval(approval_id, decision, token)
        return cls(catalog, links, settings, approval_id, index, decision, request_id)

    @property
    def decided_here(self) -> bool:
        """Whether this very link has decided it."""
        approval = self.approval
        return (approval.status, approval.decided_by) == (self.decision, self.addressee)

    def decide(self, comment: str = "") -> Approval:
        """Decide for all addressees, with the event that the run waits for; durable on return.

        The first decision counts, however many come at once. Raises ApprovalClosed with what
        became of it, LinkExpired, InvalidRequest for a comment that is too long; `approval` is
        then as it stands.
        """
        comment = _readable(comment)

        def change(txn: Transaction) -> Approval:
            approval = txn.get(Approval, self._approval_id)
            if approval is None:
                raise NotFound("approval", self._approval_id)
            # Who decides is judged by the record, whose time may have been moved on by dating
            # since the link was signed (invariant 10).
            approval = approval_as_of(approval, txn.now_us)
            if approval.status != PENDING:
                raise _closed(approval)
            return close_approval(
                txn,
                approval,
                self.decision,
                decided_by=self.addressee,
                comment=comment,
                keep_us=self._keep_us,
            )

        actor = f"approval:{self._approval_id}"
        try:
            self.approval = self._catalog.write(change, actor=actor, request_id=self._request_id)
        except (ApprovalClosed, LinkExpired):
            self.approval = self._read()
            raise
        return self.approval

    def _read(self) -> Approval:
        with self._catalog.read() as snapshot:
            approval = snapshot.get(Approval, self._approval_id)
        if approval is None:
            raise NotFound("approval", self._approval_id)
        return approval_as_of(approval, self._links.now_us())


def _closed(approval: Approval) -> ApprovalClosed | LinkExpired:
    if approval.status == EXPIRED:
        return LinkExpired()
    return ApprovalClosed(approval.status, approval.decided_by, approval.decided_at)


def _readable(comment: str) -> str:
    """A comment as it is kept: people paste what nobody sees, which is left out."""
    text = comment.replace("\r\n", "\n").replace("\r", "\n").strip()
    text = "".join(char for char in text if char not in _unreadable(text, "\n\t"))
    if len(text) > COMMENT_CHARS_MAX:
        raise InvalidRequest("comment", f"at most {COMMENT_CHARS_MAX} characters")
    return text


def _unreadable(text: str, beside: str = "") -> Iterator[str]:
    """Controls, lone surrogates, and what turns the direction of a text around."""
    for char in text:
        kind = unicodedata.category(char)
        if char not in beside and (
            kind in ("Cc", "Cs") or unicodedata.bidirectional(char) in _TURNS
        ):
            yield char


_TURNS: Final = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def _undated(approval: Approval) -> Approval:
    """The same, whose term waits for a clock that can be believed (invariant 10)."""
    return msgspec.structs.replace(approval, open_until=None, undated_at=approval.created_at)


def _check(wanted: ApprovalRequest) -> None:
    check_segment(wanted.run, "run")
    _check_line("approval_key", wanted.approval_key, _KEY_CHARS_MAX)
    if not wanted.approval_key.isprintable():  # as the name of its event must be
        raise InvalidRequest("approval_key", "it holds what cannot be seen")
    _check_line("title", wanted.title, _TITLE_CHARS_MAX)
    if len(wanted.message) > _MESSAGE_CHARS_MAX:
        raise InvalidRequest("message", f"at most {_MESSAGE_CHARS_MAX} characters")
    if any(_unreadable(wanted.message, "\n\t\r")):
        raise InvalidRequest("message", "it holds a control character")
    seconds = wanted.expires_in_s
    if seconds is not None and not 1 <= seconds <= _EXPIRES_IN_S_MAX:
        raise InvalidRequest("expires_in", f"1 to {_EXPIRES_IN_S_MAX} seconds")
    if wanted.redirect_url is not None:
        check_url("redirect_url", wanted.redirect_url)
    if len(wanted.addressees) > ADDRESSEES_MAX:
        raise InvalidRequest("addressees", f"at most {ADDRESSEES_MAX} entries")
    if len(set(wanted.addressees)) < len(wanted.addressees):
        raise InvalidRequest("addressees", "somebody is named twice")
    for addressee in wanted.addressees:
        _check_addressee(addressee)


def _check_line(field: str, text: str, chars_max: int) -> None:
    if not text or text != text.strip() or len(text) > chars_max:
        raise InvalidRequest(field, f"1 to {chars_max} characters, with no space at the ends")
    if any(_unreadable(text)) or any(unicodedata.category(char) in ("Zl", "Zp") for char in text):
        raise InvalidRequest(field, "one line without control characters")


def _check_addressee(text: str) -> None:
    """A name, or one bare address that a mail may be sent to."""
    _check_line("addressees", text, _ADDRESSEE_CHARS_MAX)
    if "@" not in text:
        return
    try:
        read_mailbox(text)
    except ValueError as error:
        raise InvalidRequest("addressees", f"{text!r}: {error}") from None
    if "<" in text:
        raise InvalidRequest("addressees", "one with an @ is a bare address: ada@example.org")
