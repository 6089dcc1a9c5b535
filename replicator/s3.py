"""An S3 bucket as a target: Amazon's, Google's by its S3 interface, Ceph's, anybody's.

boto3 speaks; only PUTs and HEADs, which a mirror does millions of times, go below its client
(see `s3_express`). It retries nothing, adds no checksums unasked, since servers differ in them,
and signs by the server's time. Blobs are sent with what the server can check them by: their
MD5, or their SHA-256. An answer is believed only where it has the form of one of S3: a portal
that says 200 to everything is none.

What Google does otherwise: it knows no checksum of SHA-256, and the etag of an object that
came in parts says nothing about its bytes. `probe` finds out the second by itself.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Final, TypeVar, final
from urllib.parse import quote, urlsplit

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from urllib3.exceptions import HTTPError

from cas.clock import SECOND_US, Clock, SystemClock
from cas.config import GOOGLE_ENDPOINT, TargetSettings
from replicator.s3_express import Answer, Express, is_good
from replicator.s3_signing import UNSIGNED_PAYLOAD, ServerTime, Signer
from replicator.targets import (
    OBJECTS,
    Body,
    BytesDiffer,
    Changed,
    Incoming,
    ObjectAbsent,
    ObjectRefused,
    ObjectStat,
    Part,
    TargetBusy,
    TargetError,
    TargetRefused,
    TargetUnreachable,
    Traits,
    Unfinished,
)

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials
    from types_boto3_s3 import S3Client

T = TypeVar("T")

_HASH_BYTES: Final = 1 << 20
_CONNECT_S: Final = 10.0
_SILENCE_S: Final = 60.0  # without a byte from the server
_MAKING_S: Final = 600.0  # an object of 10,000 parts may take its time
_PRESIGNED_S: Final = 300
_CONTENT_TYPE: Final = "application/octet-stream"
_CONNECTIONS_MAX: Final = 64

# What the codes of S3 mean here, where the status alone would tell another thing.
_CODES: Final[Mapping[str, type[TargetError]]] = {
    "BadDigest": BytesDiffer,
    "ContentSHA256Mismatch": BytesDiffer,
    "IncompleteBody": BytesDiffer,
    "InvalidDigest": BytesDiffer,
    "InvalidPart": BytesDiffer,
    "InvalidPartOrder": BytesDiffer,
    "XAmzContentChecksumMismatch": BytesDiffer,
    "XAmzContentSHA256Mismatch": BytesDiffer,
    "NoSuchKey": ObjectAbsent,
    "NoSuchUpload": ObjectAbsent,
    "NoSuchVersion": ObjectAbsent,
    "AuthorizationHeaderMalformed": TargetRefused,
    "ExpiredToken": TargetRefused,
    "InvalidBucketName": TargetRefused,
    "InvalidToken": TargetRefused,
    "NoSuchBucket": TargetRefused,
    "TokenRefreshRequired": TargetRefused,
    "XMinioStorageFull": TargetRefused,
    "InvalidObjectState": ObjectRefused,  # in an archive that takes hours to be read
    "RequestTimeout": TargetUnreachable,
    "ServiceUnavailable": TargetBusy,
    "SlowDown": TargetBusy,
    "TooManyRequests": TargetBusy,
    "OperationAborted": TargetBusy,
    "ConditionalRequestConflict": Changed,
    "PreconditionFailed": Changed,
}
_STATUSES: Final[Mapping[int, type[TargetError]]] = {
    HTTPStatus.UNAUTHORIZED: TargetRefused,
    HTTPStatus.FORBIDDEN: TargetRefused,
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED: TargetRefused,
    HTTPStatus.NOT_FOUND: ObjectAbsent,
    HTTPStatus.REQUEST_TIMEOUT: TargetUnreachable,
    HTTPStatus.CONFLICT: TargetBusy,
    HTTPStatus.PRECONDITION_FAILED: Changed,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: BytesDiffer,
    HTTPStatus.TOO_MANY_REQUESTS: TargetBusy,
    HTTPStatus.NOT_IMPLEMENTED: ObjectRefused,
    HTTPStatus.INSUFFICIENT_STORAGE: TargetRefused,
}


@final
class S3Target:
    """See the module. A `Target`."""

    def __init__(self, settings: TargetSettings, *, clock: Clock | None = None) -> None:
        """Asks nobody yet."""
        self._settings = settings
        self._name = settings.name
        self._bucket = settings.bucket
        self._google = settings.endpoint == GOOGLE_ENDPOINT
        self._address = settings.endpoint or _amazon(settings.region)
        self._prefix = f"{settings.prefix}/" if settings.prefix else ""
        self._plain_etags = False  # a condition takes them without quotes
        self._time = ServerTime(clock or SystemClock())
        self._signer = Signer(lambda: self._credentials, settings.region, self._time)
        self._client = self._connected(_SILENCE_S)
        self._express = Express(
            _located(settings, self._address),
            self._signer,
            self._time,
            settings.ca_file,
            (_CONNECT_S, _SILENCE_S),
        )

    @property
    def name(self) -> str:
        return self._name

    @property
    def place(self) -> str:
        where = f"{self._bucket}/{self._prefix}".rstrip("/")
        return f"s3://{where} at {self._address}"

    # --- objects

    def put(
        self,
        key: str,
        body: Body,
        size_bytes: int,
        *,
        md5: bytes | None = None,
        sha256: bytes | None = None,
        if_match: str | None = None,
        if_absent: bool = False,
    ) -> str:
        headers = self._making(key)
        if if_absent:
            headers["If-None-Match"] = "*"
        if sha256 is not None and not self._google:
            headers["x-amz-checksum-sha256"] = _base64(sha256)

        def put(condition: dict[str, str]) -> str:
            return self._put(key, "", {**headers, **condition}, body, size_bytes, md5, sha256)

        if if_match is None:
            return put({})
        if self._plain_etags:
            return put({"If-Match": if_match})
        start = body.tell()
        try:
            return put({"If-Match": f'"{if_match}"'})
        except Changed:
            if self.stat(key).etag != if_match:
                raise
        # It is the very object: older Cephs compare the etag with its quotes on.
        body.seek(start)
        etag = put({"If-Match": if_match})
        self._plain_etags = True
        return etag

    @contextmanager
    def get(
        self, key: str, *, first_byte: int = 0, last_byte: int | None = None
    ) -> Iterator[Incoming]:
        where: dict[str, Any] = {"Bucket": self._bucket, "Key": self._key(key)}
        if first_byte or last_byte is not None:
            where["Range"] = f"bytes={first_byte}-{'' if last_byte is None else last_byte}"
        found = self._ask(f"get {key}", lambda: self._client.get_object(**where))
        with found["Body"] as stream:
            yield _Arriving(self, key, first_byte, found, stream)

    def stat(self, key: str) -> ObjectStat:
        # Asked for, a checksum is told by the servers that keep it.
        headers = {} if self._google else {"x-amz-checksum-mode": "ENABLED"}
        answer = self._sent(lambda: self._express.head(self._key(key), headers), f"stat {key}")
        if answer.status == HTTPStatus.NOT_FOUND:
            self._refuse_without_bucket()
        self._refuse(answer, f"stat {key}")
        return self.stat_of(key, answer.headers.get, answer.headers.get("content-length"))

    def delete(self, key: str) -> None:
        with suppress(ObjectAbsent):
            self._ask(
                f"delete {key}",
                lambda: self._client.delete_object(Bucket=self._bucket, Key=self._key(key)),
            )

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectStat]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket,
            Prefix=self._prefix + prefix,
            **({"StartAfter": self._prefix + after} if after else {}),  # type: ignore[arg-type]
        )
        for page in self._pages(pages, f"list {prefix}", "NextContinuationToken"):
            for entry in page.get("Contents", ()):
                yield ObjectStat(
                    entry["Key"].removeprefix(self._prefix),
                    entry["Size"],
                    entry["ETag"].strip('"'),
                    _time_us(entry["LastModified"]),
                )

    # --- in parts

    def begin(self, key: str) -> str:
        settings = self._settings
        options: dict[str, Any] = {
            "ServerSideEncryption": settings.sse,
            "SSEKMSKeyId": settings.sse_kms_key,
            "StorageClass": settings.storage_class if key.startswith(OBJECTS) else "",
        }
        found = self._ask(
            f"begin {key}",
            lambda: self._client.create_multipart_upload(
                Bucket=self._bucket,
                Key=self._key(key),
                ContentType=_CONTENT_TYPE,
                **{name: value for name, value in options.items() if value},
            ),
        )
        return self._said(found, "UploadId", f"begin {key}")

    def put_part(
        self, key: str, upload_id: str, number: int, body: Body, size_bytes: int, md5: bytes | None
    ) -> str:
        query = f"?partNumber={number}&uploadId={quote(upload_id, safe='-_.~')}"
        return self._put(key, query, {}, body, size_bytes, md5, None)

    def parts(self, key: str, upload_id: str) -> Sequence[Part]:
        pages = self._client.get_paginator("list_parts").paginate(
            Bucket=self._bucket, Key=self._key(key), UploadId=upload_id
        )
        return [
            Part(part["PartNumber"], part["Size"], part["ETag"].strip('"'))
            for page in self._pages(pages, f"parts of {key}", "NextPartNumberMarker")
            for part in page.get("Parts", ())
        ]

    def complete(self, key: str, upload_id: str, etags: Sequence[str]) -> str:
        parts = [
            {"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in enumerate(etags, 1)
        ]
        try:
            found = self._ask(
                f"complete {key}",
                lambda: self._patient.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key(key),
                    UploadId=upload_id,
                    MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]
                ),
            )
        except TargetUnreachable:
            # Ceph says that of an upload it does not know, because it was completed or aborted.
            self.parts(key, upload_id)
            raise
        return found.get("ETag", "").strip('"') or self.stat(key).etag

    def abort(self, key: str, upload_id: str) -> None:
        with suppress(ObjectAbsent):
            self._ask(
                f"abort {key}",
                lambda: self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._key(key), UploadId=upload_id
                ),
            )

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        for page in self._pages(pages, f"list uploads below {prefix}", "NextKeyMarker"):
            for upload in page.get("Uploads", ()):
                yield Unfinished(
                    upload["Key"].removeprefix(self._prefix),
                    upload["UploadId"],
                    _time_us(upload["Initiated"]),
                )

    # --- of itself

    def traits(self, key: str) -> Traits:
        return Traits(
            in_parts=True,
            sha256_checked=self._checks_sha256(key),
            presigned=self._presigns(key),
            versioning=self._says_yes(
                lambda: self._client.get_bucket_versioning(Bucket=self._bucket).get("Status")
            ),
            object_lock=self._says_yes(
                lambda: (
                    self._client.get_object_lock_configuration(Bucket=self._bucket)
                    .get("ObjectLockConfiguration", {})
                    .get("ObjectLockEnabled")
                )
            ),
            clock_offset_us=self._time.offset_us,
        )

    def close(self) -> None:
        self._express.close()
        self._client.close()
        if "_patient" in self.__dict__:
            self._patient.close()

    # --- inside: asking

    def _connected(self, silence_s: float) -> S3Client:
        settings = self._settings
        with self.telling("the settings"):
            client: S3Client = boto3.session.Session().client(
                "s3",
                region_name=settings.region,
                endpoint_url=self._address,
                verify=str(settings.ca_file) if settings.ca_file else None,
                config=Config(
                    signature_version=UNSIGNED,  # `_sign` does it, by the server's time
                    retries={"total_max_attempts": 1},
                    connect_timeout=_CONNECT_S,
                    read_timeout=silence_s,
                    max_pool_connections=_CONNECTIONS_MAX,
                    parameter_validation=False,
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    s3={
                        "addressing_style": "virtual"
                        if _is_virtual(settings, self._address)
                        else "path"
                    },
                ),
            )
        client.meta.events.register_last("request-created.s3", self._sign)
        client.meta.events.register("after-call.s3", self._learn)
        return client

    @cached_property
    def _credentials(self) -> Credentials | None:
        """Who asks: as the settings say, or as the tools of AWS find it."""
        settings = self._settings
        return boto3.session.Session(
            aws_access_key_id=settings.access_key or None,
            aws_secret_access_key=settings.secret_key or None,
            aws_session_token=settings.session_token or None,
            profile_name=settings.profile or None,
        ).get_credentials()

    @cached_property
    def _patient(self) -> S3Client:
        return self._connected(_MAKING_S)

    def _sign(self, request: AWSRequest, **_: object) -> None:
        self._signer.sign(request)

    def _learn(self, http_response: Any, **_: object) -> None:
        self._time.learn(http_response.headers.get("date"))

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """Make a call; once more where the server refused the time and told its own by that."""
        signed_us = self._time.now_us()
        try:
            with self.telling(what):
                return call()
        except TargetRefused:
            if not self._time.was_wrong(signed_us):
                raise
        with self.telling(what):
            return call()

    def _sent(self, call: Callable[[], Answer], what: str) -> Answer:
        """The same for what does not go through the client."""
        signed_us = self._time.now_us()
        with self.telling(what):
            answer = call()
        if answer.status == HTTPStatus.FORBIDDEN and self._time.was_wrong(signed_us):
            with self.telling(what):
                answer = call()
        return answer

    def _put(
        self,
        key: str,
        query: str,
        headers: dict[str, str],
        body: Body,
        size_bytes: int,
        md5: bytes | None,
        sha256: bytes | None,
    ) -> str:
        """PUT an object or a part, with what is known of its bytes for the server to check."""
        payload = UNSIGNED_PAYLOAD
        if md5 is not None:
            headers["Content-MD5"] = _base64(md5)
        elif sha256 is not None or not self._address.startswith("https:"):
            payload = (sha256 or _hashed(body, size_bytes)).hex()
        start = body.tell()
        if body.seek(0, io.SEEK_END) - start < size_bytes:
            # The server would wait for the rest, and this for its answer.
            raise BytesDiffer(self._name, f"{key} has less than its {size_bytes} bytes here")

        def send() -> Answer:
            body.seek(start)
            return self._express.put(self._key(key), query, headers, body, size_bytes, payload)

        answer = self._sent(send, f"put {key}")
        self._refuse(answer, f"put {key}")
        etag = (answer.headers.get("etag") or "").strip('"')
        if not etag:
            raise BytesDiffer(self._name, f"the answer to the PUT of {key} is not one of S3")
        return etag

    def _pages(self, pages: Any, what: str, *markers: str) -> Iterator[Any]:
        """The pages of a listing. One that says there are more, and not from where, is an error:
        a paginator would end there, and what it left out would look lost."""
        iterator = iter(pages)
        while (page := self._ask(what, lambda: next(iterator, None))) is not None:
            if page.get("IsTruncated") and not any(page.get(marker) for marker in markers):
                raise TargetUnreachable(self._name, f"{what}: the listing does not go on")
            yield page

    def _refuse_without_bucket(self) -> None:
        """A HEAD says 404 for both; what is not there must not be mistaken for what is lost."""
        try:
            self._ask("the bucket", lambda: self._client.head_bucket(Bucket=self._bucket))
        except ObjectAbsent:
            raise TargetRefused(self._name, f"no bucket {self._bucket}") from None
        except TargetRefused:
            return  # it may not be asked for, which says that it is there

    # --- inside: errors

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """What boto3, the network and the server say, as the error of a target."""
        try:
            yield
        except ClientError as error:
            raise self._refused(error, what) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            reason = "no credentials: set access_key and secret_key"
            raise TargetRefused(self._name, reason) from error
        except (CredentialRetrievalError, ProfileNotFound) as error:
            raise TargetRefused(self._name, f"no credentials: {error}") from error
        except SSLError as error:
            # Nothing but somebody who acts will help, and the credentials stay here.
            raise TargetRefused(self._name, f"{self._address} is not trusted: {error}") from error
        except (BotoCoreError, OSError, HTTPException, HTTPError) as error:
            told = str(error) or type(error).__name__
            raise TargetUnreachable(self._name, f"{what}: {told}") from error

    def _refused(self, error: ClientError, what: str) -> TargetError:
        told = error.response
        meta: Any = told.get("ResponseMetadata", {})
        status = meta.get("HTTPStatusCode", 0)
        found: Any = told.get("Error", {})
        region = meta.get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
        return self._error(what, status, found.get("Code", ""), found.get("Message", ""), region)

    def _refuse(self, answer: Answer, what: str) -> None:
        if not is_good(answer.status):
            code, message = answer.error()
            region = answer.headers.get("x-amz-bucket-region") or ""
            raise self._error(what, answer.status, code, message, region)

    def _error(self, what: str, status: int, code: str, message: str, region: str) -> TargetError:
        kind = _CODES.get(code) or _kind_of(status)
        told = ": ".join(word for word in (code, message) if word and word != str(status))
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST and region:
            told = f"{told} (the bucket is in region {region})"
        return kind(self._name, f"{what}: {status} {told}".rstrip())

    # --- inside: forms

    def _key(self, key: str) -> str:
        return f"{self._prefix}{key}"

    def _making(self, key: str) -> dict[str, str]:
        """The headers of what makes an object."""
        headers = {"Content-Type": _CONTENT_TYPE}
        if self._settings.sse:
            headers["x-amz-server-side-encryption"] = self._settings.sse
        if self._settings.sse_kms_key:
            headers["x-amz-server-side-encryption-aws-kms-key-id"] = self._settings.sse_kms_key
        if self._settings.storage_class and key.startswith(OBJECTS):
            headers["x-amz-storage-class"] = self._settings.storage_class
        return headers

    def _said(self, found: Any, name: str, what: str) -> str:
        value = found.get(name)
        if not value:
            raise TargetUnreachable(self._name, f"the answer to {what} is not one of S3")
        return str(value)

    def stat_of(
        self, key: str, header: Callable[[str], str | None], size: str | None
    ) -> ObjectStat:
        etag = (header("etag") or "").strip('"')
        try:
            modified_us = _time_us(parsedate_to_datetime(header("last-modified") or ""))
            size_bytes = int(size or "")
        except ValueError:
            etag = ""
        if not etag:
            raise TargetUnreachable(self._name, f"the answer about {key} is not one of S3")
        return ObjectStat(key, size_bytes, etag, modified_us, _sha256_of(header))

    # --- inside: traits

    def _checks_sha256(self, key: str) -> bool:
        """Send bytes with another one's checksum, in a request that is right otherwise."""
        if self._google:
            return False
        content, other = b"the bytes that are sent", hashlib.sha256(b"other bytes").digest()
        headers = {**self._making(key), "x-amz-checksum-sha256": _base64(other)}
        md5 = hashlib.md5(content, usedforsecurity=False).digest()
        try:
            self._put(key, "", headers, io.BytesIO(content), len(content), md5, None)
        except (BytesDiffer, ObjectRefused):
            return True
        finally:
            self.delete(key)
        return False

    def _presigns(self, key: str) -> bool:
        content = b"read by its address"
        self.put(key, io.BytesIO(content), len(content))
        try:
            with self.telling("a signed address"):
                url = self._express.presigned(self._key(key), _PRESIGNED_S)
                answer = self._express.fetch(url)
            return answer.status == HTTPStatus.OK and answer.body == content
        finally:
            self.delete(key)

    def _says_yes(self, call: Callable[[], str | None]) -> bool | None:
        """Whether the bucket is set to something; None where the server will not say."""
        try:
            return self._ask("the bucket's settings", call) == "Enabled"
        except ObjectAbsent:
            return False
        except (TargetRefused, ObjectRefused):
            return None


@final
class _Arriving:
    """An `Incoming`: the body of an answer, which must come whole."""

    def __init__(
        self, target: S3Target, key: str, first_byte: int, found: Any, stream: Any
    ) -> None:
        self._target = target
        self._name = target.name
        self._key = key
        self._stream = stream
        meta = found["ResponseMetadata"]
        headers: Mapping[str, str] = meta["HTTPHeaders"]
        size = headers.get("content-length", "")
        if not size.isdigit():
            raise TargetUnreachable(self._name, f"{key} came without its length")
        self._left = int(size)
        if meta["HTTPStatusCode"] == HTTPStatus.PARTIAL_CONTENT:
            begins, _, size = headers.get("content-range", "").rpartition("/")
            if not begins.startswith(f"bytes {first_byte}-"):
                raise TargetUnreachable(self._name, f"another range of {key} came: {begins}")
        elif first_byte:
            raise TargetUnreachable(self._name, f"the server gives no ranges of {key}")
        self.stat = target.stat_of(key, headers.get, size)

    def read(self, size: int) -> bytes:
        with self._target.telling(f"get {self._key}"):
            piece: bytes = self._stream.read(min(size, self._left)) if self._left and size else b""
        if not piece and self._left and size:
            raise TargetUnreachable(
                self._name, f"{self._key} was cut {self._left} bytes before its end"
            )
        self._left -= len(piece)
        return piece


# --- settings


def _amazon(region: str) -> str:
    ending = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"https://s3.{region}.{ending}"


def _is_virtual(settings: TargetSettings, address: str) -> bool:
    """Whether requests name the bucket in the host."""
    host = urlsplit(address).hostname or ""
    amazon = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    # A certificate for *.HOST holds for one name before it, so none with dots.
    return settings.addressing == "virtual" or (
        settings.addressing == "auto" and amazon and "." not in settings.bucket
    )


def _located(settings: TargetSettings, address: str) -> str:
    """The address of the bucket."""
    address = address.rstrip("/")
    if not _is_virtual(settings, address):
        return f"{address}/{settings.bucket}"
    parts = urlsplit(address)
    return parts._replace(netloc=f"{settings.bucket}.{parts.netloc}").geturl()


# --- forms


def _hashed(body: Body, size_bytes: int) -> bytes:
    """The SHA-256 of what will be sent; the body is where it was on return."""
    start = body.tell()
    found, left = hashlib.sha256(), size_bytes
    while left and (piece := body.read(min(left, _HASH_BYTES))):
        found.update(piece)
        left -= len(piece)
    body.seek(start)
    return found.digest()


def _sha256_of(header: Callable[[str], str | None]) -> bytes | None:
    """The checksum of the whole object; of one in parts S3 tells that of the checksums."""
    with suppress(ValueError):
        raw = base64.b64decode(header("x-amz-checksum-sha256") or "", validate=True)
        if len(raw) == hashlib.sha256().digest_size:
            return raw
    return None


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _kind_of(status: int) -> type[TargetError]:
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _STATUSES.get(status, TargetUnreachable)
    if status < HTTPStatus.BAD_REQUEST:  # a redirect: to where the bucket really is
        return TargetRefused
    return _STATUSES.get(status, ObjectRefused)


def _time_us(moment: datetime) -> int:
    return int(moment.timestamp() * SECOND_US)
