"""An approval from its question to its end: one decision, by whoever may decide, told once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from click.testing import CliRunner

from cas.catalog import Snapshot
from cas.catalog.local import LocalCatalog
from cas.cli import main
from cas.clock import DAY_US, HOUR_US, SECOND_US
from cas.config import (
    GatewaySettings,
    LimitSettings,
    MailSettings,
    Settings,
    Size,
    StoreSettings,
    Url,
    Word,
)
from cas.dating import date
from cas.deliveries import Outcome, opened_payload, payload_of, record_attempt, reseal_mails
from cas.errors import (
    ApprovalClosed,
    ApprovalKeyTaken,
    BadSignature,
    InvalidName,
    InvalidRequest,
    InvalidSetting,
    KeyReused,
    LinkExpired,
    NotFound,
    RunEnded,
    TooManyApprovals,
    TooManyMails,
)
from cas.events import subscribe
from cas.keys import Keys
from cas.once import OnceKey, step_key
from cas.records import APPROVED, REJECTED, Approval, Delivery, Event, Run, Subscription
from cas.references import DIRECT_RUN
from cas.sealing import seal
from cas.store import Store
from cas.sweep import execute_sweep, plan_sweep
from cas.totals import approvals_of, mails_of, miscounted_totals
from tests.clocks import KEEP_US, START_US, HandClock
from workflows.approvals import ApprovalLink, ApprovalRequest, Approvals
from workflows.embedded import EmbeddedPlace
from workflows.mails import approval_mail
from workflows.tools.toolbox import Toolbox
from workflows.views import Workflows

BASE = "https://files.example.org"
PLAIN = Settings(
    store=StoreSettings(min_free=Size(0)), gateway=GatewaySettings(public_url=Url(BASE))
)
MAILING = msgspec.structs.replace(
    PLAIN, mail=MailSettings(host=Word("mail.example.org"), sender=Word("us@example.org"))
)
KEYS = Keys((b"s" * 32,), b"j" * 32, b"c" * 32, (b"r" * 32,), (b"k" * 32,))


def opened(root: Path, clock: HandClock, settings: Settings) -> Iterator[Workflows]:
    with Store.open(root / "store", settings, clock=clock) as store:
        workflows = Workflows(store, KEYS)
        yield workflows
        workflows.close()


@pytest.fixture
def workflows(memory: Path, clock: HandClock) -> Iterator[Workflows]:
    yield from opened(memory, clock, PLAIN)


@pytest.fixture
def mailing(memory: Path, clock: HandClock) -> Iterator[Workflows]:
    yield from opened(memory, clock, MAILING)


def approvals(workflows: Workflows, tenant: str = "acme") -> Approvals:
    return workflows.approvals(tenant, "ann")


def request(workflows: Workflows, key: OnceKey | None = None, **wanted: Any) -> Approval:
    asked = {"approval_key": "payment", "title": "Pay 100?", "run": "run-1", **wanted}
    return approvals(workflows).request(ApprovalRequest(**asked), key)


def link(workflows: Workflows, url: str, **instead: str) -> ApprovalLink:
    """What a URL opens, or one like it in which something was changed."""
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    opens = {"approval_id": parts.path.split("/")[-2], **query, **instead}
    return workflows.approval_link(opens["approval_id"], opens["decision"], opens["token"])


def urls(workflows: Workflows, approval: Approval, index: int = 0) -> tuple[str, str]:
    pair = approvals(workflows).links("", approval)[index]
    return pair.approve_url, pair.reject_url


def events(workflows: Workflows) -> list[Event]:
    with workflows._store.catalog.read() as snapshot:
        return snapshot.range(Event, "")


def mails(workflows: Workflows) -> list[tuple[Delivery, dict[str, str]]]:
    with workflows._store.catalog.read() as snapshot:
        found = snapshot.range(Delivery, "")
        return [(each, json.loads(mailed(snapshot, each))) for each in found]


def mailed(snapshot: Snapshot, delivery: Delivery) -> bytes:
    sealed = payload_of(snapshot, delivery.delivery_id)
    assert sealed is not None
    return opened_payload(delivery, sealed, KEYS.secrets) or b""


# --- asking


def test_a_question_is_pending_and_has_a_pair_of_links_for_each_addressee(
    workflows: Workflows,
) -> None:
    approval = request(workflows, addressees=["ada", "bob@example.org"], expires_in_s=60)
    assert approval.status == "pending"
    assert approval.expires_at == START_US + 60 * SECOND_US
    assert approvals(workflows).get(approval.approval_id) == approval
    pairs = approvals(workflows).links("", approval)
    assert [pair.addressee for pair in pairs] == ["ada", "bob@example.org"]
    found = [url for pair in pairs for url in (pair.approve_url, pair.reject_url)]
    assert len(set(found)) == 4
    assert all(url.startswith(f"{BASE}/api/v1/approvals/{approval.approval_id}/") for url in found)
    assert approvals(workflows).links("", approval) == pairs  # the same at every call
    opened = [link(workflows, url) for url in found]
    assert [(each.addressee, each.decision) for each in opened] == [
        ("ada", APPROVED),
        ("ada", REJECTED),
        ("bob@example.org", APPROVED),
        ("bob@example.org", REJECTED),
    ]


def test_without_addressees_there_is_one_pair_for_somebody(workflows: Workflows) -> None:
    approval = request(workflows)
    assert approval.addressees == [""]
    assert approval.expires_at == START_US + 7 * DAY_US
    decided = link(workflows, urls(workflows, approval)[0]).decide()
    assert (decided.status, decided.decided_by) == (APPROVED, "")


@pytest.mark.parametrize(
    "wanted",
    [
        {"approval_key": ""},
        {"approval_key": " a"},
        {"approval_key": "a\nb"},
        {"approval_key": "a\u200db"},
        {"approval_key": "x" * 201},
        {"title": ""},
        {"title": "a\r\nBcc: eve@example.org"},
        {"title": "a\u202eb"},
        {"title": "a\u2028b"},
        {"title": "\ud800"},
        {"title": "x" * 201},
        {"message": "x" * 4001},
        {"message": "a\x00b"},
        {"message": "a\u202eb"},
        {"expires_in_s": 0},
        {"expires_in_s": 367 * 86_400},
        {"addressees": ["a"] * 2},
        {"addressees": [f"a{n}" for n in range(51)]},
        {"addressees": [""]},
        {"addressees": ["Ada <ada@example.org>"]},
        {"addressees": ["ada@example.org, eve@example.org"]},
        {"addressees": ["ada@example.org\nBcc: eve@example.org"]},
        {"addressees": ["ada@"]},
        {"addressees": ["@example.org"]},
        {"addressees": ["ada@[192.0.2.1]"]},
        {"addressees": ['"a b"@example.org']},
        {"addressees": ["ada@example..org"]},
        {"redirect_url": "javascript:alert(1)"},
        {"redirect_url": "https://user@example.org/"},
    ],
)
def test_a_wrong_question_is_refused(workflows: Workflows, wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        request(workflows, **wanted)
    assert approvals(workflows).list().items == []


def test_a_wrong_run_is_refused(workflows: Workflows) -> None:
    with pytest.raises(InvalidName):
        request(workflows, run="a b")


def test_what_one_step_asks_is_asked_once(mailing: Workflows) -> None:
    key = step_key("run-1", "ask", "request_approval")
    first = request(mailing, key, addressees=["ada@example.org"])
    assert request(mailing, key, addressees=["ada@example.org"]) == first
    assert len(mails(mailing)) == 1
    other = step_key("run-1", "ask#1", "request_approval")
    asked_by_other = request(
        mailing, other, approval_key="payment-1", addressees=["ada@example.org"]
    )
    assert asked_by_other != first


def test_a_clients_key_is_good_for_one_question(workflows: Workflows) -> None:
    request(workflows, OnceKey("approvals", "k", b"one"))
    with pytest.raises(KeyReused):
        request(workflows, OnceKey("approvals", "k", b"two"))


def test_so_many_approvals_of_a_tenant_are_remembered_and_no_more(
    memory: Path, clock: HandClock
) -> None:
    """Those that have ended, too, until they are forgotten."""
    limited = msgspec.structs.replace(PLAIN, limits=LimitSettings(tenant_approvals=2))
    for workflows in opened(memory, clock, limited):
        key = OnceKey("approvals", "k", b"the same")
        first = request(workflows, key)
        approvals(workflows).cancel(first.approval_id)
        request(workflows)
        with pytest.raises(TooManyApprovals) as refused:
            request(workflows, OnceKey("approvals", "later", b""), approval_key="another")
        assert (refused.value.limit, refused.value.remembered) == (2, 2)
        assert request(workflows, key).approval_id == first.approval_id  # it is there
        approvals(workflows, "other").request(ApprovalRequest("payment", "Pay 100?"))
        clock.advance(31 * DAY_US)
        sweep(workflows)  # the first is forgotten, the second expires
        request(workflows, OnceKey("approvals", "later", b""), approval_key="another")
        with pytest.raises(TooManyApprovals):
            request(workflows)
        with workflows._store.catalog.read() as snapshot:
            assert (approvals_of(snapshot, "acme"), approvals_of(snapshot, "other")) == (2, 1)
            assert miscounted_totals(snapshot) == []


def test_so_many_mails_of_a_tenant_wait_to_go_out_and_no_more(
    memory: Path, clock: HandClock
) -> None:
    limited = msgspec.structs.replace(MAILING, limits=LimitSettings(tenant_mails=3))
    for workflows in opened(memory, clock, limited):
        first = request(workflows, addressees=["ada@example.org", "bob@example.org", "the board"])
        with pytest.raises(TooManyMails) as refused:
            request(workflows, approval_key="b", addressees=["a@example.org", "b@example.org"])
        assert (refused.value.limit, refused.value.waiting, refused.value.needed) == (3, 2, 2)
        assert len(approvals(workflows).list().items) == 1
        request(workflows, approval_key="c", addressees=["ada@example.org"])
        request(workflows, approval_key="d", addressees=["the board"])  # which is not mailed
        eve = approvals(workflows, "other")
        eve.request(ApprovalRequest("payment", "Pay 100?", addressees=["eve@example.org"]))

        # One goes out, one is given up, one is called off: there is room again.
        catalog = workflows._store.catalog
        sent, refused_mail = (
            each.delivery_id for each, _ in mails(workflows) if each.subject == first.approval_id
        )
        record_attempt(catalog, sent, Outcome(250), give_up_after_us=DAY_US, jitter=0.0)
        gone = Outcome(550, "no such user", hopeless=True)
        record_attempt(catalog, refused_mail, gone, give_up_after_us=DAY_US, jitter=0.0)
        asked = request(workflows, approval_key="b", addressees=["a@example.org", "b@example.org"])
        with catalog.read() as snapshot:
            assert (mails_of(snapshot, "acme"), mails_of(snapshot, "other")) == (3, 1)
        approvals(workflows).cancel(asked.approval_id)
        with catalog.read() as snapshot:
            assert mails_of(snapshot, "acme") == 1
            assert miscounted_totals(snapshot) == []


def test_limits_of_zero_are_none(memory: Path, clock: HandClock) -> None:
    none = LimitSettings(tenant_approvals=0, tenant_mails=0)
    for workflows in opened(memory, clock, msgspec.structs.replace(MAILING, limits=none)):
        for number in range(3):
            request(workflows, approval_key=f"k{number}", addressees=["ada@example.org"])
        assert len(mails(workflows)) == 3


def test_a_step_that_asks_for_more_than_may_be_fails_with_it(
    memory: Path, clock: HandClock
) -> None:
    limited = msgspec.structs.replace(PLAIN, limits=LimitSettings(tenant_approvals=1))
    for workflows in opened(memory, clock, limited):
        place = EmbeddedPlace(workflows._store, workflows, "acme", "ann")
        tools = Toolbox(place, run="run-1")
        tools.workflow.request_approval("one", "Pay 100?", wait=False)
        with pytest.raises(TooManyApprovals):
            tools.workflow.request_approval("two", "Pay 100?", wait=False)


def test_a_tenant_sees_its_own_only(workflows: Workflows, clock: HandClock) -> None:
    ours = []
    for number, run in enumerate(("run-1", "run-2", "run-1")):
        clock.advance(SECOND_US)
        ours.append(request(workflows, run=run, approval_key=f"payment-{number}"))
    theirs = approvals(workflows, "other")
    assert theirs.list().items == []
    with pytest.raises(NotFound):
        theirs.get(ours[0].approval_id)
    with pytest.raises(NotFound):
        theirs.cancel(ours[0].approval_id)
    own = approvals(workflows)
    assert own.list().items == ours[::-1]
    assert own.list(run="run-1").items == [ours[2], ours[0]]
    page = own.list(limit=2)
    assert own.list(limit=2, cursor=page.next_cursor).items == [ours[0]]


# --- mails


def test_whoever_has_an_address_is_mailed_links_of_his_own(mailing: Workflows) -> None:
    approval = request(
        mailing,
        title='Pay <b>100</b> & "more"?',
        message="Line one\n<script>alert(1)</script>",
        addressees=["ada@example.org", "the board", "bob@example.org"],
    )
    sent = sorted(mails(mailing), key=lambda one: one[0].target)  # those of one µs have no order
    assert [(each.kind, each.target, each.subject) for each, _ in sent] == [
        ("mail", "ada@example.org", approval.approval_id),
        ("mail", "bob@example.org", approval.approval_id),
    ]
    pairs = mailing.approvals("acme", "svc").links("", approval)
    assert [pair.form()["mailed"] for pair in pairs] == [True, False, True]
    for index, (_, mail) in zip((0, 2), sent, strict=True):
        approve, reject = urls(mailing, approval, index)
        assert mail["to"] == approval.addressees[index]
        assert mail["subject"] == 'Pay <b>100</b> & "more"?'
        assert approve in mail["text"]
        assert reject in mail["text"]
        assert "<script>alert(1)</script>" in mail["text"]
        assert "<script>" not in mail["html"]
        assert "<b>100" not in mail["html"]
        for url in (approve, reject):
            assert f'href="{url.replace("&", "&amp;")}"' in mail["html"]
        assert "8 January 2026, 00:00 UTC" in mail["text"]
        assert "asks you to confirm" in mail["text"]
    assert link(mailing, urls(mailing, approval, 2)[0]).addressee == "bob@example.org"


def test_a_mail_says_when_its_links_decide_at_once(mailing: Workflows) -> None:
    request(mailing, one_click=True, addressees=["ada@example.org"])
    [(_, mail)] = mails(mailing)
    assert "Opening a link decides at once" in mail["text"]
    assert "Opening a link decides at once" in mail["html"]


def test_mails_are_written_before_others_have_to_wait_for_them(
    mailing: Workflows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 50 of them: in the transaction nobody else could write meanwhile."""
    told: list[str] = []

    def telling(what: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def tells(*words: Any, **named: Any) -> Any:
            told.append(what)
            return really(*words, **named)

        return tells

    monkeypatch.setattr("workflows.approvals.approval_mail", telling("written", approval_mail))
    monkeypatch.setattr("cas.deliveries.seal", telling("sealed", seal))
    monkeypatch.setattr(LocalCatalog, "write", telling("recorded", LocalCatalog.write))
    request(mailing, addressees=["ada@example.org", "bob@example.org"])
    assert told == ["written", "sealed"] * 2 + ["recorded"]


def test_nobody_is_mailed_where_no_mail_is_sent(workflows: Workflows) -> None:
    request(workflows, addressees=["ada@example.org"])
    assert mails(workflows) == []


def test_mailed_links_need_an_address_of_this_server(memory: Path, clock: HandClock) -> None:
    settings = msgspec.structs.replace(MAILING, gateway=GatewaySettings())
    for workflows in opened(memory, clock, settings):
        with pytest.raises(InvalidSetting):
            request(workflows, addressees=["ada@example.org"])
        request(workflows, addressees=["ada"])
        assert mails(workflows) == []


def test_no_link_of_a_mail_can_be_read_in_the_journal(mailing: Workflows) -> None:
    approval = request(mailing, addressees=["ada@example.org"])
    journal = mailing._store.root / "catalog" / "journal"
    written = b"".join(path.read_bytes() for path in journal.iterdir())
    assert approval.approval_id.encode() in written
    for url in urls(mailing, approval):
        [token] = parse_qs(urlsplit(url).query)["token"]
        assert token.encode() not in written
        assert token in mails(mailing)[0][1]["text"]


def test_a_sealed_mail_is_shown_sealed_in_the_journal(memory: Path, clock: HandClock) -> None:
    for workflows in opened(memory, clock, MAILING):
        request(workflows, addressees=["ada@example.org"])
    shown = CliRunner().invoke(main, ["journal", "tail", "--json", "--root", str(memory / "store")])
    assert shown.exit_code == 0, shown.output
    assert "delivery_payloads" in shown.stdout
    assert "token=" not in shown.stdout


def test_a_sealed_mail_is_good_for_its_own_delivery_only(mailing: Workflows) -> None:
    request(mailing, addressees=["ada@example.org", "bob@example.org"])
    [(ada, _), (bob, _)] = mails(mailing)
    with mailing._store.catalog.read() as snapshot:
        sealed = payload_of(snapshot, ada.delivery_id) or b""
    assert opened_payload(bob, sealed, KEYS.secrets) is None
    assert opened_payload(ada, sealed, (b"x" * 32,)) is None


def test_mails_are_sealed_anew_with_the_secrets(mailing: Workflows) -> None:
    request(mailing, addressees=["ada@example.org", "bob@example.org"])
    before = mails(mailing)
    new = b"n" * 32
    reseal_mails(mailing._store.catalog, (*KEYS.secrets, new))
    reseal_mails(mailing._store.catalog, KEYS.secrets)  # which opens none, and harms none
    with mailing._store.catalog.read() as snapshot:
        for delivery, mail in before:
            sealed = payload_of(snapshot, delivery.delivery_id) or b""
            assert json.loads(opened_payload(delivery, sealed, (new,)) or b"") == mail
            assert opened_payload(delivery, sealed, KEYS.secrets) is None


@pytest.mark.parametrize("end", ["decided", "withdrawn", "swept", "asked anew"])
def test_what_was_not_mailed_when_it_ended_is_not_mailed(
    mailing: Workflows, clock: HandClock, end: str
) -> None:
    asked = request(mailing, addressees=["ada@example.org", "bob@example.org"], expires_in_s=60)
    first = mails(mailing)[0][0].delivery_id
    other = request(mailing, approval_key="other", addressees=["ada@example.org"])
    catalog = mailing._store.catalog
    record_attempt(catalog, first, Outcome(250), give_up_after_us=DAY_US, jitter=0.0)
    if end == "decided":
        link(mailing, urls(mailing, asked)[0]).decide()
    elif end == "withdrawn":
        approvals(mailing).cancel(asked.approval_id)
    else:
        clock.advance(60 * SECOND_US)
        sweep(mailing) if end == "swept" else request(mailing)
    status = approvals(mailing).get(asked.approval_id).status
    found = {
        each.delivery_id: each for each, _ in mails(mailing) if each.subject == asked.approval_id
    }
    assert found.pop(first).status == "done"
    [left] = found.values()
    assert (left.status, left.next_attempt_at, left.done_at) == ("cancelled", None, clock.time_us)
    assert left.last_error == f"the approval is {status} already"
    [still] = [each for each, _ in mails(mailing) if each.subject == other.approval_id]
    assert still.status == "waiting"


def test_a_mail_that_was_on_its_way_when_it_ended_is_known_to_have_arrived(
    mailing: Workflows,
) -> None:
    asked = request(mailing, addressees=["ada@example.org", "bob@example.org"])
    names = {each.target: each.delivery_id for each, _ in mails(mailing)}
    approvals(mailing).cancel(asked.approval_id)
    came_of = {
        "ada@example.org": Outcome(250),
        "bob@example.org": Outcome(None, "no mail server"),
    }
    for target, outcome in came_of.items():
        catalog = mailing._store.catalog
        record_attempt(catalog, names[target], outcome, give_up_after_us=DAY_US, jitter=0.0)
    found = {each.target: each.status for each, _ in mails(mailing)}
    assert found == {"ada@example.org": "done", "bob@example.org": "cancelled"}


def test_nobody_is_asked_for_a_run_that_has_ended(mailing: Workflows) -> None:
    store = mailing._store
    for number, (tenant, is_open) in enumerate((("acme", None), ("acme", "open"), ("other", None))):
        run = Run(f"run-{number}", tenant, "x", "cancelled", 1, "ann", open=is_open)
        store.catalog.write(lambda txn, run=run: txn.insert(run), actor="test")  # type: ignore[misc]
    with pytest.raises(RunEnded) as refused:
        request(mailing, run="run-0", addressees=["ada@example.org"])
    assert refused.value.status == "cancelled"
    assert mails(mailing) == []
    for run_id in ("run-1", "run-2", "run-3"):  # open; another tenant's, which is none; a name
        request(mailing, run=run_id)


def test_what_was_asked_before_its_run_ended_is_told_again(workflows: Workflows) -> None:
    key = OnceKey("approvals", "k", b"one")
    asked = request(workflows, key, run="run-0")
    run = Run("run-0", "acme", "x", "completed", 1, "ann", open=None)
    workflows._store.catalog.write(lambda txn: txn.insert(run), actor="test")
    assert request(workflows, key, run="run-0").approval_id == asked.approval_id


# --- deciding


@pytest.mark.parametrize("decision", [APPROVED, REJECTED])
def test_a_decision_is_recorded_and_told_to_its_run(
    workflows: Workflows, clock: HandClock, decision: str
) -> None:
    approval = request(workflows, addressees=["ada", "bob"])
    waits = {run: wait(workflows, run) for run in ("run-1", "run-2")}
    clock.advance(HOUR_US)
    opened = link(workflows, urls(workflows, approval, 1)[decision == REJECTED])
    decided = opened.decide("  fine\r\nby me\x07\u202e ")
    assert decided == opened.approval == approvals(workflows).get(approval.approval_id)
    assert opened.decided_here
    assert (decided.status, decided.decided_by) == (decision, "bob")
    assert (decided.decided_at, decided.comment) == (START_US + HOUR_US, "fine\nby me")
    assert decided.open_until is None
    [event] = events(workflows)
    assert event.event_name == "approval_payment"
    assert json.loads(event.payload) == {
        "status": decision,
        "approval_id": approval.approval_id,
        "approval_key": "payment",
        "approved_by": "bob" if decision == APPROVED else None,
        "decided_by": "bob",
        "decided_at": "2026-01-01T01:00:00Z",
        "comment": "fine\nby me",
    }
    assert given(workflows, waits["run-1"]) == event.event_id
    assert given(workflows, waits["run-2"]) is None  # another run may use the same key


def test_what_was_decided_before_anybody_waits_is_kept(workflows: Workflows) -> None:
    approval = request(workflows)
    link(workflows, urls(workflows, approval)[0]).decide()
    [event] = events(workflows)
    assert given(workflows, wait(workflows, "run-2")) is None
    assert given(workflows, wait(workflows, "run-1")) == event.event_id


def wait(workflows: Workflows, run: str, step: str = "wait") -> str:
    def change(txn: Any) -> Subscription:
        return subscribe(txn, "acme", run, step, "approval_payment", None, DAY_US)

    return workflows._store.catalog.write(change, actor="test").subscription_id


def given(workflows: Workflows, subscription_id: str) -> str | None:
    with workflows._store.catalog.read() as snapshot:
        found = snapshot.get(Subscription, subscription_id)
    assert found is not None
    return found.event_id


# --- one decision, one approval


def test_a_key_is_for_one_pending_approval_of_a_run(workflows: Workflows) -> None:
    """As the items of a foreach, which would all be answered by the first decision."""
    first = request(workflows, run="run-1")
    with pytest.raises(ApprovalKeyTaken) as refused:
        request(workflows, step_key("run-1", "ask#1", "approval"), title="Pay 1,000,000?")
    assert (refused.value.approval_key, refused.value.run) == ("payment", "run-1")
    assert "{{index}}" in str(refused.value)  # what to do about it
    request(workflows, run="run-2")
    request(workflows, approval_key="payment-1")
    approvals(workflows, "other").request(ApprovalRequest("payment", "?", run="run-1"))
    # Nothing of the refused one is left: its step may ask once the first one has ended.
    link(workflows, urls(workflows, first)[1]).decide()
    second = request(workflows, step_key("run-1", "ask#1", "approval"), title="Pay 1,000,000?")
    assert second.status == "pending"


def test_a_long_key_is_told_from_others_as_a_short_one(workflows: Workflows) -> None:
    """The index keeps a digest of what is longer than it takes."""
    for end in "ab":
        request(workflows, approval_key="ü" * 199 + end, run="r" * 60)
        with pytest.raises(ApprovalKeyTaken):
            request(workflows, approval_key="ü" * 199 + end, run="r" * 60)


@pytest.mark.parametrize("run", ["run-1", DIRECT_RUN])
def test_an_earlier_decision_answers_no_later_question(workflows: Workflows, run: str) -> None:
    first = request(workflows, run=run)
    before = wait(workflows, run, "before")
    link(workflows, urls(workflows, first)[0]).decide()
    told = given(workflows, before)
    assert told is not None
    # Open still, where waits have nothing to do with each other.
    late = given(workflows, wait(workflows, run, "late"))
    assert late == (told if run == DIRECT_RUN else None)
    second = request(workflows, run=run, title="Pay 200?")
    after = wait(workflows, run, "after")
    assert given(workflows, after) is None
    assert given(workflows, before) == told
    link(workflows, urls(workflows, second)[1]).decide()
    answered = given(workflows, after)
    [payload] = [
        json.loads(event.payload) for event in events(workflows) if event.event_id == answered
    ]
    assert (payload["approval_id"], payload["status"]) == (second.approval_id, REJECTED)


def test_a_question_whose_time_is_over_leaves_its_key_to_the_next(
    workflows: Workflows, clock: HandClock
) -> None:
    """Before the sweep has come; its run is told of the end all the same."""
    first = request(workflows, expires_in_s=60)
    waited = wait(workflows, "run-1")
    clock.advance(59 * SECOND_US)
    with pytest.raises(ApprovalKeyTaken):
        request(workflows)
    clock.advance(SECOND_US)
    second = request(workflows)
    [ended] = events(workflows)
    assert json.loads(ended.payload)["approval_id"] == first.approval_id
    assert given(workflows, waited) == ended.event_id
    assert ended.open_for is None
    assert given(workflows, wait(workflows, "run-1", "after")) is None
    statuses = [each.status for each in approvals(workflows).list().items]
    assert statuses == ["pending", "expired"]
    assert approvals(workflows).get(second.approval_id).status == "pending"


def test_of_many_questions_of_a_key_at_once_one_is_asked(workflows: Workflows) -> None:
    def ask(number: int) -> bool:
        try:
            request(workflows, step_key("run-1", f"ask#{number}", "approval"))
        except ApprovalKeyTaken:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(ask, range(32))) == 1


def test_the_first_decision_counts_and_later_ones_are_told_of_it(workflows: Workflows) -> None:
    approval = request(workflows, addressees=["ada", "bob"])
    link(workflows, urls(workflows, approval, 0)[1]).decide("no")
    for index in (0, 1):
        for url in urls(workflows, approval, index):
            opened = link(workflows, url)
            assert opened.decided_here == (index == 0 and opened.decision == REJECTED)
            with pytest.raises(ApprovalClosed) as caught:
                opened.decide("yes!")
            found = caught.value
            assert (found.status, found.decided_by, found.decided_at) == (REJECTED, "ada", START_US)
    assert approvals(workflows).get(approval.approval_id).comment == "no"
    assert len(events(workflows)) == 1


def test_of_many_decisions_at_once_one_counts(workflows: Workflows) -> None:
    approval = request(workflows, addressees=[f"person {n}" for n in range(8)])
    opened = [link(workflows, url) for n in range(8) for url in urls(workflows, approval, n)]

    def decide(each: ApprovalLink) -> bool:
        try:
            each.decide()
        except ApprovalClosed as closed:
            return closed.decided_by is None
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(decide, opened)) == 1
    assert len(events(workflows)) == 1
    decided = approvals(workflows).get(approval.approval_id)
    assert [each.approval for each in opened] == [decided] * 16


def test_a_comment_that_is_too_long_decides_nothing(workflows: Workflows) -> None:
    approval = request(workflows)
    with pytest.raises(InvalidRequest):
        link(workflows, urls(workflows, approval)[0]).decide("x" * 2001)
    assert approvals(workflows).get(approval.approval_id).status == "pending"
    link(workflows, urls(workflows, approval)[0]).decide("x" * 2000 + "\n")


def test_a_question_can_be_withdrawn(workflows: Workflows) -> None:
    approval = request(workflows)
    url = urls(workflows, approval)[0]
    cancelled = approvals(workflows).cancel(approval.approval_id)
    assert cancelled.status == "cancelled"
    [event] = events(workflows)
    payload = json.loads(event.payload)
    assert (payload["status"], payload["approved_by"], payload["decided_by"]) == (
        "cancelled",
        None,
        None,
    )
    opened = link(workflows, url)
    assert not opened.decided_here
    with pytest.raises(ApprovalClosed):
        opened.decide()
    with pytest.raises(ApprovalClosed):
        approvals(workflows).cancel(approval.approval_id)
    assert len(events(workflows)) == 1


# --- links that are not good


def test_what_is_changed_in_a_link_opens_nothing(workflows: Workflows) -> None:
    approval, other = (
        request(workflows, approval_key=key, addressees=["ada", "bob"])
        for key in ("payment", "other")
    )
    approve, reject = urls(workflows, approval)
    token = parse_qs(urlsplit(approve).query)["token"][0]
    index, expires, signature = token.split(".")
    swapped = [
        {"decision": REJECTED},
        {"decision": "Approved"},
        {"decision": ""},
        {"approval_id": other.approval_id},
        {"approval_id": approval.approval_id.upper()},
        {"token": parse_qs(urlsplit(reject).query)["token"][0]},
        {"token": parse_qs(urlsplit(urls(workflows, other)[0]).query)["token"][0]},
        {"token": f"1.{expires}.{signature}"},
        {"token": f"00.{expires}.{signature}"},
        {"token": f"0.{int(expires) + 1}.{signature}"},
        {"token": f"0.0{expires}.{signature}"},
        {"token": f"0.{expires}.{signature[::-1]}"},
        {"token": f"0.{expires}.{signature[:-1]}"},
        {"token": f"0.{expires}.{signature}="},
        {"token": f" {token}"},
        {"token": f"{token}\n"},
        {"token": f"٠.{expires}.{signature}"},
        {"token": ""},
        {"token": "x" * 10_000},
    ]
    assert index == "0"
    for instead in swapped:
        with pytest.raises(BadSignature):
            link(workflows, approve, **instead)
    assert link(workflows, approve).approval == approval


def test_a_link_of_another_server_opens_nothing(workflows: Workflows) -> None:
    approval = request(workflows)
    foreign = Workflows(workflows._store, msgspec.structs.replace(KEYS, signing=(b"x" * 32,)))
    url = urls(foreign, approval)[0]
    with pytest.raises(BadSignature):
        link(workflows, url)
    assert link(foreign, url).approval == approval


def test_the_time_of_a_question_ends(workflows: Workflows, clock: HandClock) -> None:
    approval = request(workflows, expires_in_s=60)
    url = urls(workflows, approval)[0]
    opened = link(workflows, url)
    clock.advance(60 * SECOND_US - 1)
    assert link(workflows, url).approval.status == "pending"
    clock.advance(1)
    with pytest.raises(LinkExpired):
        opened.decide()
    assert opened.approval.status == "expired"
    assert link(workflows, url).approval.status == "expired"
    assert approvals(workflows).get(approval.approval_id).status == "expired"
    with pytest.raises(ApprovalClosed) as caught:
        approvals(workflows).cancel(approval.approval_id)
    assert caught.value.status == "expired"
    assert events(workflows) == []  # until the sweep has been there


def test_what_was_decided_in_time_stays_decided(workflows: Workflows, clock: HandClock) -> None:
    approval = request(workflows, expires_in_s=60)
    url = urls(workflows, approval)[0]
    link(workflows, url).decide()
    clock.advance(DAY_US)
    assert link(workflows, url).decided_here
    with pytest.raises(ApprovalClosed):
        link(workflows, url).decide()


def test_the_sweep_tells_the_run_that_nobody_decided_and_forgets_it_later(
    workflows: Workflows, clock: HandClock
) -> None:
    approval = request(workflows, expires_in_s=60)
    url = urls(workflows, approval)[0]
    waiting = wait(workflows, "run-1")
    clock.advance(61 * SECOND_US)
    sweep(workflows)
    [event] = events(workflows)
    payload = json.loads(event.payload)
    assert (payload["status"], payload["decided_by"]) == ("expired", None)
    assert given(workflows, waiting) == event.event_id
    with pytest.raises(LinkExpired):
        link(workflows, url).decide()
    clock.advance(31 * DAY_US)
    sweep(workflows)
    with pytest.raises(NotFound):
        link(workflows, url)
    assert approvals(workflows).list().items == []


def sweep(workflows: Workflows) -> None:
    store = workflows._store
    with store.catalog.read() as snapshot:
        plan = plan_sweep(snapshot, store.now_us(snapshot), keep_us=KEEP_US)
    execute_sweep(store.catalog, plan)


def test_a_term_that_began_under_a_wrong_clock_is_counted_from_a_right_one(
    workflows: Workflows, clock: HandClock
) -> None:
    approvals(workflows).request(ApprovalRequest("first", "of all"))
    clock.trusted = False
    clock.advance(1000 * DAY_US)  # far ahead, and nobody vouches for it
    approval = request(workflows, expires_in_s=60, addressees=["ada"])
    assert approval.undated_at is not None
    url = urls(workflows, approval)[0]
    clock.trusted = True
    assert link(workflows, url).approval.status == "pending"
    date(workflows._store.catalog)
    dated = approvals(workflows).get(approval.approval_id)
    assert dated.expires_at == clock.time_us + 60 * SECOND_US
    # The link that was mailed then is as good as one that is made now.
    clock.advance(59 * SECOND_US)
    assert link(workflows, url).decide().decided_by == "ada"
    assert link(workflows, urls(workflows, dated)[0]).decided_here
