"""Limits: what an address, a tenant, a link and everybody together may do in a while.

    requests   of an address: before anything else; of a tenant: once its token is believed
    events, submissions
               of a tenant, each beside the request that it is: they cost more
    bytes      of an address, a tenant, a link: paid for while they come, the first step of a
               known length before it is invited; a body ends where a limit is reached. For a
               link, which nobody shares, a known length is paid as a whole before it is
               invited, and what did not come is given back
    guesses    unknown upload tokens and bad signatures: see `Guesses`

`/healthz`, `/readyz` and `/metrics` are for those who watch the server, above all when it
refuses others: nothing is counted there. Tokens of the API that are not valid are no guesses:
what signs them has 256 bits, and a program whose token has expired must not close the upload
pages of everybody at its address.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final, final

import falcon
from limits import RateLimitItemPerSecond
from limits.strategies import SlidingWindowCounterRateLimiter

from cas.clock import SECOND_US
from cas.config import LimitSettings, Settings
from cas.errors import BadSignature, NotFound, TooLarge
from cas.records import PendingUpload
from gateway.addresses import Address, client_address
from gateway.body import RequestBody
from gateway.counters import Counters, monotonic_us
from gateway.errors import TooManyRequests
from gateway.parking import RESUMED
from gateway.room import Holder

log = logging.getLogger("blobcask.gateway")

EXEMPT_PATHS: Final = frozenset(("/healthz", "/readyz", "/metrics"))
# A household or a rented machine has a whole IPv6 network of this size to choose from.
IPV6_NETWORK_BITS: Final = 64
# Bodies are paid for in steps of this size, so that one that is announced long, and then
# trickles, closes nothing for others.
STEP_BYTES: Final = 1 << 20
# Requests are taken ahead in parts of their limit, so that those who make thousands do not
# all wait for one lock; a limit below this is counted one by one.
AHEAD_PART: Final = 400
AHEAD_PART_OF_BYTES: Final = 1 << 16
AHEAD_FROM_BYTES: Final = 1 << 30
PURSE_US: Final = 1_000_000
PURSES_MAX: Final = 4096
INNOCENT_US: Final = 250_000
_NO_LIMIT: Final = 1 << 62
_EVERYBODY: Final = ""


@lru_cache(4096)
def network_of(address: Address | None) -> str:
    """For whom an address counts. Those whom nobody names (a Unix socket without
    X-Forwarded-For) are one."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(address), IPV6_NETWORK_BITS), strict=False))
    return str(address or "")


@final
class Purse:
    """What one process has taken ahead for somebody, and until when it may be spent."""

    __slots__ = ("left", "until_us")

    def __init__(self, until_us: int) -> None:
        self.left = 0
        self.until_us = until_us


@final
class Limit:
    """At most `amount` of something in each period, by whoever it is counted for.

    An amount of 0 is no limit: nothing is refused, and nothing counted.

    `ahead` are taken at once for somebody who comes again and again, and spent without the
    counters that all processes share. Never are more let pass than the amount; somebody who
    comes to several processes may be refused that many too early.
    """

    def __init__(
        self,
        counters: Counters,
        whose: str,
        what: str,
        amount: int,
        period_us: int,
        *,
        ahead: int = 0,
    ) -> None:
        self.amount = amount
        self._ahead = ahead
        self._purses: dict[str, Purse] = {}
        self._purses_lock = threading.Lock()
        self._what = what
        self._counters = counters
        self._strategy = SlidingWindowCounterRateLimiter(counters)
        self._item = RateLimitItemPerSecond(amount, max(1, period_us // SECOND_US), whose)

    def take(self, who: str, cost: int = 1) -> None:
        """Count so many; raises TooManyRequests, and counts nothing, beyond the limit."""
        if not self.amount or (self._ahead and self._spend(who, cost)):
            return
        if not self._strategy.hit(self._item, self._what, who, cost=cost):
            raise self.refusal(who, cost)

    def _spend(self, who: str, cost: int) -> bool:
        """Pay from what was taken ahead, taking anew where somebody comes often."""
        now_us = monotonic_us()
        with self._purses_lock:
            purse = self._purses.get(who)
            if purse is None or now_us >= purse.until_us:
                if len(self._purses) >= PURSES_MAX:
                    self._purses.clear()  # what is in them stays counted: the safe side
                self._purses[who] = Purse(now_us + PURSE_US)
            elif purse.left >= cost:
                purse.left -= cost
                return True
        if purse is None:
            return False  # the first in a while
        if now_us >= purse.until_us:
            self.charge(who, -purse.left)
            return False
        if not self._strategy.hit(self._item, self._what, who, cost=cost + self._ahead):
            return False  # near the limit every one is counted by itself
        with self._purses_lock:
            purse.left += self._ahead
        return True

    def charge(self, who: str, amount: int) -> None:
        """Count so many, whatever the limit; a negative amount is given back."""
        if self.amount and amount:
            self._counters.charge(self._key(who), self._item.get_expiry(), amount)

    def count(self, who: str) -> int:
        """How many count now."""
        return self._counters.count(self._key(who), self._item.get_expiry())

    def refusal(self, who: str, cost: int = 1) -> TooManyRequests:
        """With the time after which so many would be let pass, if nobody took them before."""
        key, period_s = self._key(who), self._item.get_expiry()
        wait_us = self._counters.wait_us(key, self.amount, period_s, cost)
        return TooManyRequests(self._what, -(-wait_us // SECOND_US))

    def _key(self, who: str) -> str:
        return self._item.key_for(self._what, who)


@final
class Guesses:
    """The attempts to find what one was not given.

    An address over its own limit is refused before anything is looked up, so that its
    further guesses say nothing. When all addresses together are over theirs, those that
    have guessed lately are refused so, too, and nobody else: who only ever comes with the
    link that he was given goes on, and who shares guessing out over many addresses has one
    guess for each.
    """

    def __init__(self, counters: Counters, settings: LimitSettings) -> None:
        each, everybody = settings.guesses, settings.all_guesses
        self._on = bool(each or everybody)
        self._innocent_until_us: dict[str, int] = {}
        # Counted without a limit of its own, too: who has guessed is asked for below.
        self._each = Limit(counters, "address", "guesses", each.count or _NO_LIMIT, each.period_us)
        self._all = Limit(counters, "everybody", "guesses", everybody.count, everybody.period_us)

    def refuse(self, who: str) -> None:
        """Before anything is looked up; raises TooManyRequests."""
        if not self._on or monotonic_us() < self._innocent_until_us.get(who, 0):
            return
        if not (guessed := self._each.count(who)):
            # Looking costs the lock of all processes. Another process may be told of a first
            # guess meanwhile: that is one guess more for each process, once.
            if len(self._innocent_until_us) >= PURSES_MAX:
                self._innocent_until_us.clear()
            self._innocent_until_us[who] = monotonic_us() + INNOCENT_US
            return
        if guessed >= self._each.amount:
            raise self._each.refusal(who)
        if self._all.amount and self._all.count(_EVERYBODY) >= self._all.amount:
            raise self._all.refusal(_EVERYBODY)

    def note(self, who: str) -> None:
        """One was wrong; raises TooManyRequests when it should not have been tried."""
        if self._on:
            self._innocent_until_us.pop(who, None)
            self._each.take(who)
            self._all.take(_EVERYBODY)


@final
class Tally:
    """The bytes of one request's body, and who pays for them."""

    def __init__(self, promised_bytes: int | None) -> None:
        self._promised_bytes = promised_bytes
        self._received_bytes = 0
        self._paid_bytes: dict[tuple[Limit, str], int] = {}

    def bill(self, limit: Limit, who: str, *, ahead: bool = False) -> None:
        """Have `who` pay, a step or, `ahead`, all that is promised.

        Raises TooManyRequests, or TooLarge for what is never let pass.
        """
        if not limit.amount or (limit, who) in self._paid_bytes:
            return
        promised_bytes = self._promised_bytes
        if promised_bytes is None:
            cost = 1
        elif promised_bytes > limit.amount:
            raise TooLarge(limit.amount)
        elif ahead:
            cost = promised_bytes
        else:
            cost = max(self._received_bytes, min(promised_bytes, STEP_BYTES))
        limit.take(who, cost)
        self._paid_bytes[limit, who] = cost

    def received(self, count: int) -> None:
        """So much has come; raises TooManyRequests when it was not paid for and cannot be."""
        self._received_bytes += count
        for (limit, who), paid_bytes in self._paid_bytes.items():
            owed_bytes = self._received_bytes - paid_bytes
            if self._promised_bytes is not None:
                if owed_bytes <= 0:
                    continue
                owed_bytes = max(owed_bytes, min(self._promised_bytes - paid_bytes, STEP_BYTES))
            elif owed_bytes < STEP_BYTES:
                continue
            limit.take(who, owed_bytes)
            self._paid_bytes[limit, who] = paid_bytes + owed_bytes

    def settle(self) -> None:
        """Nothing more will come: what was paid too much is given back."""
        for (limit, who), paid_bytes in self._paid_bytes.items():
            limit.charge(who, self._received_bytes - paid_bytes)
        self._paid_bytes.clear()


@final
class Limits:
    """Middleware, and what the way to the store asks. Safe for threads.

    An address that is not told counts as one with all others of its kind; so do all who
    come through a proxy that `[gateway] trusted_proxies` does not name.
    """

    def __init__(self, settings: Settings, counters: Counters) -> None:
        limits = settings.limits

        def requests(whose: str) -> Limit:
            rate = getattr(limits, f"{whose}_requests")
            ahead = rate.count // AHEAD_PART
            return Limit(counters, whose, "requests", rate.count, rate.period_us, ahead=ahead)

        def body_bytes(whose: str) -> Limit:
            rate = getattr(limits, f"{whose}_bytes")
            size_bytes = rate.size_bytes
            ahead = size_bytes // AHEAD_PART_OF_BYTES if size_bytes >= AHEAD_FROM_BYTES else 0
            return Limit(counters, whose, "bytes", size_bytes, rate.period_us, ahead=ahead)

        self._proxies = settings.gateway.trusted_proxies
        self._address_requests = requests("address")
        self._tenant_requests = requests("tenant")
        events = limits.tenant_events
        self._tenant_events = Limit(counters, "tenant", "events", events.count, events.period_us)
        runs = limits.tenant_submissions
        self._tenant_runs = Limit(counters, "tenant", "submissions", runs.count, runs.period_us)
        self._address_bytes = body_bytes("address")
        self._tenant_bytes = body_bytes("tenant")
        self._link_bytes = body_bytes("link")
        self._guesses = Guesses(counters, limits)
        self._warned = False

    # --- middleware

    def process_request(self, req: falcon.Request, _resp: falcon.Response) -> None:
        address = client_address(req.env, self._proxies)
        network = network_of(address)
        req.context.address, req.context.network = str(address or ""), network
        _holds_for(req, Holder(network))
        if req.path in EXEMPT_PATHS or RESUMED in req.env:  # counted when it came
            return
        try:
            self._address_requests.take(network)
        except TooManyRequests:
            self._warn_of_proxy(req, str(address))
            raise
        req.context.tally = tally = _tally(req)
        tally.bill(self._address_bytes, network)

    def process_response(
        self, req: falcon.Request, _resp: falcon.Response, _resource: object, _ok: bool
    ) -> None:
        if "tally" in req.context:
            req.context.tally.settle()

    def _warn_of_proxy(self, req: falcon.Request, address: str) -> None:
        """Once: an address that speaks for others may be a proxy that nobody named."""
        if self._warned or address != req.remote_addr or not req.get_header("X-Forwarded-For"):
            return
        self._warned = True
        log.warning(
            "%s reached a limit and sends X-Forwarded-For; if it is your proxy, name it in "
            "[gateway] trusted_proxies: all who come through it count as one address",
            address,
        )

    # --- on the way to the store

    def tenant(self, req: falcon.Request, tenant_id: str) -> None:
        """A token of this tenant was believed; raises TooManyRequests, TooLarge."""
        if req.context.get("limited_tenant") != tenant_id:
            req.context.limited_tenant = tenant_id
            _holds_for(req, Holder(tenant_id, is_believed=True))
            self._tenant_requests.take(tenant_id)
            self._bill(req, self._tenant_bytes, tenant_id)

    def event(self, req: falcon.Request, tenant_id: str) -> None:
        """Something comes for this tenant that may wake its workflows; raises
        TooManyRequests, TooLarge."""
        self._tenant_events.take(tenant_id)
        self.body(req, tenant_id)

    def event_again(self, tenant_id: str) -> None:
        """What `event` counted was known already, and counts for nothing."""
        self._tenant_events.charge(tenant_id, -1)

    def submission(self, tenant_id: str) -> None:
        """A workflow is submitted for this tenant, also one that was before; raises
        TooManyRequests."""
        self._tenant_runs.take(tenant_id)

    def body(self, req: falcon.Request, tenant_id: str) -> None:
        """The body that comes is for this tenant; raises TooManyRequests, TooLarge."""
        self._bill(req, self._tenant_bytes, tenant_id)

    def link(self, req: falcon.Request, upload: PendingUpload) -> None:
        """The link of this upload was opened; raises TooManyRequests, TooLarge."""
        self._bill(req, self._link_bytes, upload.upload_id, ahead=True)
        self._bill(req, self._tenant_bytes, upload.tenant_id)

    @contextmanager
    def looking_up(self, req: falcon.Request) -> Iterator[None]:
        """Around a search for what a token opens. A NotFound or BadSignature in it counts as
        a guess; raises TooManyRequests before it, or in their place."""
        self._guesses.refuse(req.context.network)
        with self.verifying(req):
            yield

    @contextmanager
    def verifying(self, req: falcon.Request) -> Iterator[None]:
        """The same around what tells nothing without a good signature: a good one passes,
        however often others of its address were wrong."""
        try:
            yield
        except (NotFound, BadSignature):
            self._guesses.note(req.context.network)
            raise

    def _bill(self, req: falcon.Request, limit: Limit, who: str, *, ahead: bool = False) -> None:
        if "tally" in req.context:
            req.context.tally.bill(limit, who, ahead=ahead)


def _holds_for(req: falcon.Request, whose: Holder) -> None:
    """What this request's body takes in memory counts for this one (`gateway.room`)."""
    body = req.env["wsgi.input"]
    if isinstance(body, RequestBody):
        body.whose = whose


def _tally(req: falcon.Request) -> Tally:
    """For the body of this request; it is told what comes by the body itself."""
    body = req.env["wsgi.input"]
    if isinstance(body, RequestBody):
        tally = Tally(body.length_bytes)
        body.on_received = tally.received
        return tally
    # Another server's: what is promised is taken for received.
    tally = Tally(req.content_length or 0)
    tally.received(req.content_length or 0)
    return tally
