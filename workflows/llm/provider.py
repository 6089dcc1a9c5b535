"""Asks an OpenAI-compatible server for a chat completion, within the limits of `[llm]`.

Overload, silence and broken connections are met by the client's own retries, with backoff,
or after as long as the server says; all tries of a call carry one Idempotency-Key. What is
left is ToolFailed, which knows whether another attempt of the step may help.

An answer counts when it is whole: one that ended because it became too long is refused,
unless the caller set `max_tokens` and so asked for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
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
        key: str,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Answer:
        """Its answer; raises ToolFailed."""
        settings = self._settings
        timeout_s = settings.timeout / SECOND_US
        limit_bytes = _ESCAPED * settings.answer_max + _AROUND_BYTES
        given: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        bounds = _Bounds(timeout_s, limit_bytes)
        with (
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
                completion = client.chat.completions.create(
                    model=settings.model or model,
                    messages=cast(Any, messages),
                    extra_headers={"Idempotency-Key": key},
                    **{name: value for name, value in given.items() if value is not None},
                )
            except _TooLong:
                raise self._failed(f"an answer of over {limit_bytes} bytes") from None
            except openai.APIStatusError as error:
                raise self._refused(error) from None
            except openai.APITimeoutError:
                raise self._failed(f"no answer within {timeout_s:g} s", again=True) from None
            except openai.APIConnectionError as error:
                reason = f"cannot be reached: {error.__cause__ or error}"
                raise self._failed(reason, again=True) from None
            except (openai.OpenAIError, ValueError) as error:
                # ValueError: what says it is JSON and is none.
                raise self._failed(f"no answer: {error}", again=True) from None
        return self._answer(completion, model, shortened=max_tokens is not None)

    def _answer(self, completion: Any, model: str, *, shortened: bool) -> Answer:
        # The client hands on whatever came, typed or not.
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            raise self._failed("what it said is no chat completion", again=True)
        choice = completion.choices[0]
        # Its types promise what no server has to keep.
        message: Any = choice.message
        reason = str(getattr(choice, "finish_reason", None) or "stop")
        content = getattr(message, "content", None)
        refusal = getattr(message, "refusal", None)
        if refusal or reason == "content_filter":
            raise self._failed(f"it refuses to answer: {refusal or 'its content filter'}")
        if not isinstance(content, str) or not content.strip():
            raise self._failed(f"an empty answer (finish_reason {reason})", again=True)
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
class _Bounds:
    """Ends answers that take too long or become too large: the client's own timeout is for
    each piece, and a byte a minute would keep it waiting for ever. For one call at a time."""

    def __init__(self, timeout_s: float, limit_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._limit_bytes = limit_bytes
        self._deadline = 0.0

    def begin(self, _request: httpx2.Request) -> None:
        """Each try has its whole time."""
        self._deadline = time.monotonic() + self._timeout_s

    def put_on(self, response: httpx2.Response) -> None:
        stream = cast(httpx2.SyncByteStream, response.stream)
        response.stream = _BoundedStream(stream, self._deadline, self._limit_bytes)


@final
class _BoundedStream(httpx2.SyncByteStream):
    def __init__(self, inner: httpx2.SyncByteStream, deadline: float, limit_bytes: int) -> None:
        self._inner = inner
        self._deadline = deadline
        self._limit_bytes = limit_bytes

    def __iter__(self) -> Iterator[bytes]:
        size_bytes = 0
        for piece in self._inner:
            size_bytes += len(piece)
            if size_bytes > self._limit_bytes:
                raise _TooLong
            if time.monotonic() > self._deadline:
                raise httpx2.ReadTimeout("the answer takes too long")
            yield piece

    def close(self) -> None:
        self._inner.close()
