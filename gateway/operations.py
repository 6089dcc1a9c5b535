"""What each operation of the API takes, answers and refuses, declared beside its code.

    @operation(BEARER, replies={200: Reply("The record.", FileForm)}, refuses=[NotFound])
    def on_get(self, req, resp): ...

The document of the API (`gateway.openapi`) is made from these declarations, the responder's
docstring and the table of errors; a responder without one stops the start of the server, so
that no route can be left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeVar, final

Responder = TypeVar("Responder", bound=Callable[..., Any])

JSON_TYPE: Final = "application/json"
PROBLEM_TYPE: Final = "application/problem+json"
ANY_BYTES: Final = "application/octet-stream"  # to send
ANY_MEDIA: Final = "*/*"  # to receive: the type it was stored with


class Right(Enum):
    """What a caller must show. The value is what the document says of it."""

    BEARER = "A bearer token of the tenant."
    LINK = "The upload's token in the path is the right."
    SIGNATURE = "The signature in the query is the right."
    CALL = "The signature of the call, in a header, is the right."
    NONE = "Open to everybody."


@final
@dataclass(frozen=True, slots=True)
class Parameter:
    """A query parameter or header; `kind` is a type that msgspec can describe."""

    name: str
    about: str
    kind: Any = str
    where: str = "query"
    required: bool = False


@final
@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is no refusal: `form` is the type of its JSON, or its media type."""

    about: str
    form: Any = None  # None: no body
    headers: Mapping[str, str] | None = None  # name -> what it says
    texts: Sequence[str] = ()  # media types of text that it may have in place of `form`


@final
@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one route."""

    right: Right
    replies: Mapping[int, Reply]
    refuses: Sequence[type[BaseException]] = ()
    parameters: Sequence[Parameter] = ()
    body: Any = None  # the type of a JSON body, or a media type; None: no body
    body_required: bool = True
    name: str = ""  # operationId: what generated clients call it
    body_media: Sequence[str] = ()  # media types that a body of `body` may have in place of JSON
    texts: Sequence[str] = ()  # media types of text that a refusal may have in place of JSON


def operation(
    right: Right,
    *,
    name: str,
    replies: Mapping[int, Reply],
    refuses: Sequence[type[BaseException]] = (),
    parameters: Sequence[Parameter] = (),
    body: Any = None,
    body_required: bool = True,
    body_media: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Callable[[Responder], Responder]:
    """Declare what a responder takes and answers."""

    def declare(responder: Responder) -> Responder:
        declared = Operation(
            right,
            replies,
            refuses,
            parameters,
            body,
            body_required,
            name,
            body_media,
            texts,
        )
        responder.operation = declared  # type: ignore[attr-defined]
        return responder

    return declare


def declared(responder: Callable[..., Any]) -> Operation | None:
    """What was declared of a responder."""
    found = getattr(responder, "operation", None)
    return found if isinstance(found, Operation) else None
