"""One callback: a signed POST of JSON, and what its receiver's answer means.

    webhook-id         the delivery's identifier, the same at every attempt
    webhook-timestamp  seconds since 1970 UTC, of this attempt
    webhook-signature  v1,<base64>; see `cas.callbacks`
    idempotency-key    the identifier again, for receivers that know this header

A 2xx is the answer that counts, wherever the body ends. No redirect is followed, no cookie
kept, no proxy asked, no more than 4 KiB of an answer read, and all of it, from resolving
the name on, happens within one time limit.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import ssl
from typing import Final, final

import httpcore
import httpx

from cas import __version__
from cas.callbacks import signature
from cas.clock import SECOND_US, Clock
from cas.deliveries import RETRY_AFTER_STATUS, Outcome
from cas.records import Delivery
from replicator.destinations import ForbiddenDestination, UnknownName
from replicator.names import asking_for

ANSWER_BYTES_MAX: Final = 4096  # polite: closing over an unread answer resets the connection
_LOCATION_CHARS_MAX: Final = 200
_DIGITS_MAX: Final = 10  # of Retry-After; more is a mistake

_log = logging.getLogger("blobcask.deliveries")


@final
class Sender:
    """Sends callbacks over `network`, which decides where a connection may go."""

    def __init__(
        self,
        network: httpcore.AsyncNetworkBackend,
        clock: Clock,
        *,
        timeout_us: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` None trusts the usual authorities, or those that SSL_CERT_FILE names."""
        self._network = network
        self._clock = clock
        self._timeout_s = timeout_us / SECOND_US
        self._tls = tls or httpx.create_ssl_context()

    async def send(self, delivery: Delivery, payload: bytes, secret: bytes) -> Outcome:
        """Make one attempt, and say what came of it. Raises nothing that a receiver causes;
        TooManyQuestions: no attempt was made, for want of a place to look its name up."""
        asking_for.set(delivery.tenant_id)
        at_s = self._clock.now_us() // SECOND_US
        try:
            url = httpx.URL(delivery.target)
            request = _request(url, delivery, payload, secret, at_s)
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            return Outcome(None, f"no usable URL: {error}", hopeless=True)
        try:
            status, headers = await self._ask(request)
        except ForbiddenDestination as error:
            _log.warning("delivery %s: %s is %s", delivery.delivery_id, error.host, error.address)
            return Outcome(None, str(error))
        except UnknownName as error:
            return Outcome(None, str(error))
        except (TimeoutError, httpcore.TimeoutException):
            return Outcome(None, f"no answer within {self._timeout_s:g} s")
        except (httpcore.NetworkError, OSError) as error:
            return Outcome(None, f"no connection: {_printable(str(error) or 'it broke')}")
        except (httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
            return Outcome(None, f"no valid answer: {_printable(str(error))}")
        retry_after = headers.get(b"retry-after", b"") if status in RETRY_AFTER_STATUS else b""
        return Outcome(status, _complaint(status, headers), _retry_after_us(retry_after, at_s))

    async def _ask(self, request: httpcore.Request) -> tuple[int, dict[bytes, bytes]]:
        """Status and headers (names in lower case) of the answer."""
        answered: tuple[int, dict[bytes, bytes]] | None = None
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                httpcore.AsyncHTTPConnection(
                    request.url.origin, self._tls, network_backend=self._network
                ) as connection,
            ):
                response = await connection.handle_async_request(request)
                headers = {name.lower(): value for name, value in response.headers}
                answered = response.status, headers
                await _drain(response)
        except (
            TimeoutError,
            httpcore.TimeoutException,
            httpcore.NetworkError,
            httpcore.ProtocolError,
        ):
            # Whoever has said 2xx has taken it, however the rest of the answer goes wrong.
            if answered is None:
                raise
        assert answered is not None
        return answered


def _request(
    url: httpx.URL, delivery: Delivery, payload: bytes, secret: bytes, at_s: int
) -> httpcore.Request:
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("it is http or https, with a host")
    if url.port is not None and not 0 < url.port < 65536:
        raise ValueError("its port is 1 to 65535")
    if url.userinfo:
        raise ValueError("it has a user or a password")
    headers: list[tuple[str | bytes, str | bytes]] = [
        ("host", url.netloc),
        ("user-agent", f"blobcask/{__version__}"),
        ("accept", "*/*"),
        ("content-type", "application/json"),
        ("content-length", str(len(payload))),
        ("connection", "close"),
        ("idempotency-key", delivery.delivery_id),
        ("webhook-id", delivery.delivery_id),
        ("webhook-timestamp", str(at_s)),
        ("webhook-signature", signature(secret, delivery.delivery_id, at_s, payload)),
    ]
    where = httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
    return httpcore.Request("POST", where, headers=headers, content=payload)


async def _drain(response: httpcore.Response) -> None:
    read_bytes = 0
    async for part in response.aiter_stream():
        read_bytes += len(part)
        if read_bytes >= ANSWER_BYTES_MAX:
            return


def _complaint(status: int, headers: dict[bytes, bytes]) -> str:
    """What is wrong with an answer; "" when nothing is."""
    if 200 <= status < 300:
        return ""
    if 300 <= status < 400:
        location = headers.get(b"location", b"").decode("latin-1")[:_LOCATION_CHARS_MAX]
        return f"answered {status} to {_printable(location)!r}; redirects are not followed"
    return f"answered {status}"


def _retry_after_us(value: bytes, at_s: int) -> int | None:
    """Seconds, or a date: how long the receiver wants to be left alone, in µs."""
    text = value.decode("latin-1").strip()
    if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX:
        return int(text) * SECOND_US
    try:
        until = email.utils.parsedate_to_datetime(text)
        if until.tzinfo is None:
            return None
        return max(0, int(until.timestamp()) - at_s) * SECOND_US
    except (ValueError, OverflowError):  # no date, or one of a year that is none
        return None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)
