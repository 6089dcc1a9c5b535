"""Asks an OpenAI-compatible server for a chat completion, within the limits of `[llm]`.

Overload, silence and broken connections are met by the client's own retries, with backoff,
or after as long as the server says; all these tries carry one Idempotency-Key, since the answer
may be there. One that came and is no good is asked for again with another, if there is one. What
is left is ToolFailed, which knows whether another attempt of the step may help.

An answer counts when it is whole: one that ended because it became too long is refused,
unless the caller set `max_tokens` and so asked for it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, cast, final
from urllib.parse import urlsplit

import httpx2
import openai
from openai.types.chat import ChatCompletion

from cas.clock import SECOND_US
from cas.config import LlmSettings
from cas.errors import ToolFailed
from workflows.llm.answer import Answer

_CONNECT_S: Final = 10.0
_SAID_CHARS_MAX: Final = 300  # of what a provider says about an error
_ESCAPED: Final = 6  # bytes that JSON may need for one byte of text
_AROUND_BYTES: Final = 256 << 10  # of an answer that are not its text
_LATER: Final = (408, 409, 425, 429)
# A quota that is used up looks like overload and stays.
_USED_UP: Final = ("insufficient_quota", "billing_hard_limit_reached")


@final
class Provider:
    """The server of `[llm] base_url`. Safe for threads; holds no connection between calls."""

    def __init__(self, tool: str, settings: LlmSettings) -> None:
        self._tool = tool
        self._settings = settings

    @property
    def name(self) -> str:
        """Its host, as results and errors name it."""
        return urlsplit(self._settings.base_url).hostname or self._settings.base_url

    def ask(
        self,
        messages: list[dict[str, Any]],
        *,
        model: str,
        keys: Sequence[str],
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """Its answer, by the first key; by the next one where that gives none that is of use.

        Raises ToolFailed.
        """
        given = {"temperature": temperature, "max_tokens": max_tokens}
        reason = ""
        for key in keys:
            try:
                completion = self._completion(messages, model, key, given)
                return self._answer(completion, model, shortened=max_tokens is not None)
            except _NoUse as error:
                reason = str(error)
        raise self._failed(reason, again=True)

    def _completion(
        self, messages: list[dict[str, Any]], model: str, key: str, given: dict[str, Any]
    ) -> Any:
        settings = self._settings
        timeout_s = settings.timeout / SECOND_US
        limit_bytes = _ESCAPED * settings.answer_max + _AROUND_BYTES
        with (
            _Bounds(timeout_s, limit_bytes) as bounds,
            httpx2.Client(
                # What is behind a redirect is not what the operator wrote down.
                follow_redirects=False,
                event_hooks={"request": [bounds.begin], "response": [bounds.put_on]},
            ) as http,
            openai.OpenAI(
                base_url=settings.base_url,
                api_key=settings.api_key or "none",  # "" would be looked up in the environment
                timeout=openai.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S)),
                max_retries=settings.retries,
                http_client=http,
                default_headers=_HEADERS,
            ) as client,
        ):
            try:
                return client.chat.completions.create(
                    model=settings.model or model,
                    messages=cast(Any, messages),
                    extra_headers={"Idempotency-Key": key},
                    **{name: value for name, value in given.items() if value is not None},
                )
            except _TooLong:
                raise self._failed(f"an answer of over {limit_bytes} bytes") from None
            except openai.APIStatusError as error:
                raise self._refused(error) from None
            except openai.APIConnectionError as error:
                if bounds.over or isinstance(error, openai.APITimeoutError):
                    raise self._failed(f"no answer within {timeout_s:g} s", again=True) from None
                reason = f"cannot be reached: {error.__cause__ or error}"
                raise self._failed(reason, again=True) from None
            except (openai.OpenAIError, ValueError) as error:
                # ValueError: what says it is JSON and is none.
                raise _NoUse(f"no answer: {error}") from None

    def _answer(self, completion: Any, model: str, *, shortened: bool) -> Answer:
        # The client hands on whatever came, typed or not.
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            raise _NoUse("what it said is no chat completion")
        choice = completion.choices[0]
        # Its types promise what no server has to keep.
        message: Any = choice.message
        reason = str(getattr(choice, "finish_reason", None) or "stop")
        content = getattr(message, "content", None)
        refusal = getattr(message, "refusal", None)
        if refusal or reason == "content_filter":
            raise self._failed(f"it refuses to answer: {refusal or 'its content filter'}")
        if not isinstance(content, str) or not content.strip():
            raise _NoUse(f"an empty answer (finish_reason {reason})")
        if reason == "length" and not shortened:
            raise self._failed("the answer was cut off at the limit of the model")
        # JSON can hold half of a character, which no file and no record can.
        raw = content.encode(errors="replace")
        if len(raw) > self._settings.answer_max:
            raise self._failed(f"an answer of {len(raw)} bytes, over [llm] answer_max")
        usage = completion.usage
        counted = () if usage is None else ("prompt_tokens", "completion_tokens", "total_tokens")
        return Answer(
            raw.decode(),
            completion.model or self._settings.model or model,
            reason,
            {name: getattr(usage, name, None) for name in counted},
        )

    def _refused(self, error: openai.APIStatusError) -> ToolFailed:
        status = error.status_code
        if status in (401, 403):
            # Providers repeat the key in what they say here.
            return self._failed(f"it does not accept [llm] api_key ({status})")
        again = (status in _LATER or status >= 500) and error.code not in _USED_UP
        body = error.body
        said = body.get("message") if isinstance(body, dict) else None
        return self._failed(f"{status}: {said or error.message}", again=again)

    def _failed(self, reason: str, *, again: bool = False) -> ToolFailed:
        if self._settings.api_key:
            reason = reason.replace(self._settings.api_key, "***")
        said = " ".join(reason.split())[:_SAID_CHARS_MAX]
        return ToolFailed(self._tool, f"{self.name}: {said}", again=again)


# The client would send what OPENAI_ORG_ID and OPENAI_PROJECT_ID say to whomever we ask, and a
# compressed answer could be larger than the bytes that are counted.
_HEADERS: Final[dict[str, Any]] = {
    "OpenAI-Organization": openai.Omit(),
    "OpenAI-Project": openai.Omit(),
    "Accept-Encoding": "identity",
}


@final
class _TooLong(openai.OpenAIError):
    """Raised in the client's own tree, because it tries anything else again."""


@final
class _NoUse(Exception):
    """An answer came, and is of no use; another may be."""


@final
class _Bounds:
    """Ends answers that take too long or become too large: the client's own timeout is for
    each piece, and a byte a minute would keep it waiting for ever. For one call at a time.

    At the deadline the connection is shut from outside, whatever is waited for on it then:
    that the request goes out, the head of the answer, or the rest of it.
    """

    def __init__(self, timeout_s: float, limit_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._limit_bytes = limit_bytes
        self._socket: socket.socket | None = None  # tries may share a connection
        self._deadline = _Deadline(0.0, lambda: None)

    @property
    def over(self) -> bool:
        """Whether the time of the last try was over."""
        return self._deadline.over

    def begin(self, request: httpx2.Request) -> None:
        """Each try has its whole time."""
        self._deadline.cancel()
        self._deadline = _Deadline(self._timeout_s, self._shut)
        request.extensions["trace"] = self._note
        self._deadline.start()

    def put_on(self, response: httpx2.Response) -> None:
        stream = cast(httpx2.SyncByteStream, response.stream)
        response.stream = _BoundedStream(stream, self._deadline, self._limit_bytes)

    def __enter__(self) -> _Bounds:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._deadline.cancel()

    def _note(self, event: str, info: dict[str, Any]) -> None:
        """Hears of each connection, and of the one that TLS makes of it."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self.over:
                self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # closed meanwhile
                # Past SSLSocket's own, which takes the encryption off a connection in use.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


@final
class _Deadline:
    """Calls once, from a thread of its own, when the time is over."""

    def __init__(self, after_s: float, shut: Callable[[], None]) -> None:
        self.over = False
        self._shut = shut
        self._timer = threading.Timer(after_s, self._end)
        self._timer.daemon = True

    def start(self) -> None:
        self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        self._shut()


@final
class _BoundedStream(httpx2.SyncByteStream):
    def __init__(self, inner: httpx2.SyncByteStream, deadline: _Deadline, limit_bytes: int) -> None:
        self._inner = inner
        self._deadline = deadline
        self._limit_bytes = limit_bytes

    def __iter__(self) -> Iterator[bytes]:
        size_bytes = 0
        for piece in self._inner:
            size_bytes += len(piece)
            if size_bytes > self._limit_bytes:
                raise _TooLong
            yield piece
        if self._deadline.over:  # it may be that it did not end, but was ended
            raise httpx2.ReadTimeout("the answer takes too long")

    def close(self) -> None:
        self._inner.close()
