"""`/docs`: the API for people, made from the same document that programs read.

One page without a script, rendered once: whatever an operation declares stands here, and
nothing else does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import falcon
from markupsafe import Markup, escape

from gateway.pages import environment
from gateway.upload_page import ASSETS_VERSION

JSON = Mapping[str, Any]

_POLICY: Final = (
    "default-src 'none'; style-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_JSON_TYPE: Final = "application/json"
# What stands for a value in the examples, where its name alone would not do.
_EXAMPLES: Final = {
    "Tus-Resumable": "1.0.0",
    "Upload-Offset": "0",
    "Upload-Length": "1048576",
    "X-HTTP-Method-Override": "HEAD",
}


@final
@dataclass(frozen=True, slots=True)
class Shown:
    """A parameter, a field or an answer: a name, its kind, and what is said of it."""

    name: str
    kind: str
    about: str
    required: bool = False


@final
@dataclass(frozen=True, slots=True)
class ShownForm:
    """What is sent or answered, as the page tells of it."""

    about: str
    fields: list[Shown]


@final
@dataclass(frozen=True, slots=True)
class Described:
    """One operation, as the page tells of it."""

    anchor: str
    method: str
    path: str
    summary: str
    paragraphs: list[str]
    parameters: list[Shown]
    sends: list[str]  # media types or forms of the body
    answers: list[Shown]
    refusals: list[Shown]
    example: str


@final
class DocsResource:
    """`/docs`; the same for everybody."""

    def __init__(self, document: JSON, public_url: str) -> None:
        """`public_url` is where people reach the server, "" where nobody has said."""
        templates = environment()
        templates.filters["marked"] = _marked
        self._text = templates.get_template("docs.html").render(
            about=document["info"],
            paths=dict(_paths(document)),
            forms=dict(_forms(document)),
            address=public_url or "http://127.0.0.1:8080",
            version=ASSETS_VERSION,
        )

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        resp.set_headers(_HEADERS)
        resp.content_type = "text/html; charset=utf-8"
        resp.text = self._text


def _paths(document: JSON) -> Iterator[tuple[str, list[Described]]]:
    for path, item in document["paths"].items():
        shared = item.get("parameters", [])
        methods = ((method, found) for method, found in item.items() if method != "parameters")
        yield path, [_described(method, path, shared, found) for method, found in methods]


def _described(method: str, path: str, shared: list[JSON], found: JSON) -> Described:
    parameters = [*shared, *found["parameters"]]
    body = found.get("requestBody", {})
    answers = [each for each in found["responses"].items() if not _refuses(each[0])]
    refusals = [each for each in found["responses"].items() if _refuses(each[0])]
    return Described(
        anchor=found["operationId"],
        method=method.upper(),
        path=path,
        summary=found["summary"],
        paragraphs=found["description"].split("\n\n"),
        parameters=[_parameter(parameter) for parameter in parameters],
        sends=[_content(body)] if body else [],
        answers=[Shown(status, _content(reply), reply["description"]) for status, reply in answers],
        refusals=[Shown(status, "", reply["description"]) for status, reply in refusals],
        example=_example(method, path, parameters, found),
    )


def _refuses(status: str) -> bool:
    return int(status) >= 400


def _parameter(parameter: JSON) -> Shown:
    kind = f"{parameter['in']}, {_kind(parameter['schema'])}"
    return Shown(parameter["name"], kind, parameter["description"], parameter["required"])


def _content(body: JSON) -> str:
    """The form or the media type of a body."""
    for media, content in body.get("content", {}).items():
        return _kind(content["schema"]) if media == _JSON_TYPE else str(media)
    return "no body"


def _forms(document: JSON) -> Iterator[tuple[str, ShownForm]]:
    for name, schema in document["components"]["schemas"].items():
        required = schema.get("required", [])
        fields = [
            Shown(field, _kind(kind), _about(kind), field in required)
            for field, kind in schema.get("properties", {}).items()
        ]
        yield name, ShownForm(schema.get("description", ""), fields)


def _about(schema: JSON) -> str:
    """What is said of a field, and what it is where it is left out."""
    told = [schema["description"]] if "description" in schema else []
    if "default" in schema:
        told.append(f"Default: `{json.dumps(schema['default'], ensure_ascii=False)}`.")
    return " ".join(told)


def _kind(schema: JSON) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items') or {})}"
    kinds = schema.get("type", "any")
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def _example(method: str, path: str, parameters: list[JSON], found: JSON) -> str:
    """A call with curl; what stands in angle brackets is the caller's."""
    wanted = [each for each in parameters if each["required"]]
    url = re.sub(r"{(\w+)}", r"<\1>", path)
    if query := "&".join(f"{each['name']}=<{each['name']}>" for each in wanted if _is_query(each)):
        url += f"?{query}"
    words = ["curl", *_method(method), *_headers(wanted, found), f'"$BLOBCASK{url}"']
    return " \\\n  ".join([" ".join(words[:-1]), words[-1], *_body(found)])


def _is_query(parameter: JSON) -> bool:
    return bool(parameter["in"] == "query")


def _method(method: str) -> list[str]:
    if method == "head":
        return ["--head"]
    return [] if method == "get" else ["-X", method.upper()]


def _headers(wanted: list[JSON], found: JSON) -> Iterator[str]:
    if "security" in found:
        yield '-H "Authorization: Bearer $TOKEN"'
    for each in wanted:
        if each["in"] == "header":
            value = _EXAMPLES.get(each["name"], f"<{each['name']}>")
            yield f"-H '{each['name']}: {value}'"


def _body(found: JSON) -> list[str]:
    for media, content in found.get("requestBody", {}).get("content", {}).items():
        data = "--data-binary @FILE"
        if media == _JSON_TYPE:
            data = f"--data '<{_kind(content['schema'])}>'"
        return [f"-H 'Content-Type: {media}' {data}"]
    return []


def _marked(text: str) -> Markup:
    """Text of the document, in which backticks set what is meant letter by letter."""
    parts = str(escape(text)).split("`")
    return Markup(  # noqa: S704  escaped above
        "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
    )
