"""Signatures of S3 requests by the server's time, not by this machine's.

A server refuses what is signed more than 15 minutes off its own clock; it also tells its time
with each answer. So an edge node with a dead battery goes on mirroring (invariant 10).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final, final

from botocore.auth import SIGV4_TIMESTAMP, S3SigV4Auth, S3SigV4QueryAuth
from botocore.exceptions import NoCredentialsError

from cas.clock import SECOND_US, Clock

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials, ReadOnlyCredentials

UNSIGNED_PAYLOAD: Final = "UNSIGNED-PAYLOAD"
EMPTY_PAYLOAD: Final = hashlib.sha256().hexdigest()
_PAYLOAD: Final = "payload_sha256"  # of a request's context: what is known of its body
_TIMESTAMP: Final = "timestamp"  # of a request's context: botocore's own
_STEP_US: Final = 2 * SECOND_US  # a Date has whole seconds, and an answer takes its time
_SKEW_US: Final = 60 * SECOND_US  # servers allow 15 minutes; less is never the reason


@final
class ServerTime:
    """The server's clock, as its answers tell it. Safe for threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.offset_us = 0  # what the server is ahead of this machine

    def now_us(self) -> int:
        return self._clock.now_us() + self.offset_us

    def learn(self, date: str | None) -> None:
        """Take over the Date of an answer, where it differs by more than its own coarseness."""
        try:
            told = parsedate_to_datetime(date or "")
        except ValueError:
            return
        offset_us = int(told.timestamp()) * SECOND_US + SECOND_US // 2 - self._clock.now_us()
        if abs(offset_us - self.offset_us) > _STEP_US:
            self.offset_us = offset_us

    def was_wrong(self, signed_us: int) -> bool:
        """Whether what was signed with that time may have been refused for it."""
        return abs(self.now_us() - signed_us) > _SKEW_US

    def stamp(self) -> str:
        now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.now_us())
        return now.strftime(SIGV4_TIMESTAMP)


class _ByServerTime(S3SigV4Auth):
    def __init__(self, credentials: ReadOnlyCredentials, region: str, time: ServerTime) -> None:
        super().__init__(credentials, "s3", region)
        self._time = time

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        request.context[_TIMESTAMP] = self._time.stamp()
        super()._modify_request_before_signing(request)  # type: ignore[misc]  # not in the stubs

    def payload(self, request: AWSRequest) -> str:
        known: str | None = request.context.get(_PAYLOAD)
        return known or str(super().payload(request))


class _AddressByServerTime(S3SigV4QueryAuth):
    def __init__(
        self, credentials: ReadOnlyCredentials, region: str, time: ServerTime, valid_s: int
    ) -> None:
        super().__init__(credentials, "s3", region, expires=valid_s)
        self._time = time

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        request.context[_TIMESTAMP] = self._time.stamp()
        super()._modify_request_before_signing(request)  # type: ignore[misc]  # not in the stubs


@final
class Signer:
    """Signs for one login and region. Safe for threads."""

    def __init__(
        self, find: Callable[[], Credentials | None], region: str, time: ServerTime
    ) -> None:
        """`find` is asked at each request; what it finds may renew itself."""
        self._find = find
        self._region = region
        self._time = time

    def sign(self, request: AWSRequest, payload: str | None = None) -> None:
        """Add what proves the sender; `payload` is the body's SHA-256 in hex where it is known,
        or UNSIGNED_PAYLOAD. Raises NoCredentialsError and what renewing them raises."""
        if payload is not None:
            request.context[_PAYLOAD] = payload
        _ByServerTime(self._login(), self._region, self._time).add_auth(request)

    def presign(self, request: AWSRequest, valid_s: int) -> str:
        """The address by which anybody may do what `request` says, for so long."""
        _AddressByServerTime(self._login(), self._region, self._time, valid_s).add_auth(request)
        return str(request.url)

    def _login(self) -> ReadOnlyCredentials:
        credentials = self._find()
        if credentials is None:
            raise NoCredentialsError
        return credentials.get_frozen_credentials()
