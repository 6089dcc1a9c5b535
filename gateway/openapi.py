"""`/api/v1/openapi.json`: the OpenAPI 3.1 document, made from the code that serves it.

Routes come from the app, operations from the declarations beside the responders, schemas
from the types that are answered, refusals from the table of errors.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, final

import falcon
import msgspec

from cas import __version__
from cas.errors import CatalogError, StoreFull, TooLarge
from gateway.errors import (
    TABLE,
    TooManyRequests,
    Unauthorized,
    of_workflows,
    problem_schema,
    refusal_schema,
)
from gateway.operations import (
    JSON_TYPE,
    PROBLEM_TYPE,
    Operation,
    Parameter,
    Reply,
    Right,
    declared,
)
from gateway.room import NoRoom
from gateway.route_names import route_name

JSON = dict[str, Any]

_METHODS: Final = ("get", "head", "put", "post", "patch", "delete", "options")
_WRITING: Final = ("put", "post", "patch", "delete")
_ABOUT: Final = (
    "Content-addressed storage with upload links, and what wakes workflows. Errors are RFC 9457 "
    "problems with a stable `code`, or where workflows are spoken to an object with `status` "
    '"error", `code` and `message`; what a caller may not see is told as if it were not there.'
)
_PATH_PARAMETERS: Final[dict[str, tuple[Any, str]]] = {
    "token": (str, "The upload's token."),
    "index": (int, "The slot, from 0."),
    "partial_id": (str, "The resumable upload, as its `Location` named it."),
    "ref": (str, "The reference, percent-encoded, or its part after `://`."),
    "file_id": (str, "The file's identifier."),
    "filename": (str, "The name that was signed with it."),
    "tenant_id": (str, "The tenant, which is the token's."),
    "run_id": (str, "The run's identifier."),
    "step_id": (str, "The step, which is the name of its task."),
    "approval_id": (str, "The approval's identifier."),
    "webhook_id": (str, "The webhook's identifier."),
}
_REF: Final = "#/components/schemas/{name}"


@final
class Routes:
    """Adds routes to an app and remembers them for the document."""

    def __init__(self, app: falcon.App[Any, Any]) -> None:
        self._app = app
        self._documented: list[tuple[str, str, Callable[..., Any]]] = []
        self._named: set[str] = set()

    def add(self, path: str, resource: Any, *, suffix: str | None = None) -> None:
        """Serve `path`; raises ValueError for a responder that declares no operation.

        A resource that tells its verbs apart itself names them in `documented`: (method,
        rest of the path) -> responder.
        """
        self._route(path, resource, suffix)
        own = getattr(resource, "documented", None)
        if own is not None:
            prefix = path.partition("{")[0].rstrip("/")
            found = [
                (method, prefix + rest, responder) for (method, rest), responder in own().items()
            ]
        else:
            responders = {
                method: responder
                for method in _METHODS
                if (responder := getattr(resource, _responder(method, suffix), None))
            }
            if responders.get("head") == responders.get("get"):  # as HTTP has it anyway
                responders.pop("head", None)
            shown = route_name(path)
            found = [(method, shown, responder) for method, responder in responders.items()]
        for method, shown, responder in found:
            operation = declared(responder)
            if operation is None:
                raise ValueError(f"{method} {shown} declares no operation")
            if operation.name not in self._named:  # told of once, where it was added first
                self._named.add(operation.name)
                self._documented.append((method, shown, responder))

    def hide(self, path: str, resource: Any, *, suffix: str | None = None) -> None:
        """Serve what the document does not tell of: pages for people and their files, which
        answer no program and whose doings have operations of their own; numbers for who watches
        the server, the document itself, and other spellings of a path."""
        self._route(path, resource, suffix)

    def _route(self, path: str, resource: Any, suffix: str | None) -> None:
        """HEAD is answered wherever GET is (RFC 9110, 9.1), by the same responder."""
        head, get = _responder("head", suffix), _responder("get", suffix)
        if hasattr(resource, get) and not hasattr(resource, head):
            setattr(resource, head, getattr(resource, get))
        self._app.add_route(path, resource, suffix=suffix)

    def document(self) -> JSON:
        """The OpenAPI document of all that was added."""
        return _document(self._documented)


def _responder(method: str, suffix: str | None) -> str:
    return f"on_{method}" + (f"_{suffix}" if suffix else "")


def _document(routes: Sequence[tuple[str, str, Callable[..., Any]]]) -> JSON:
    types = _types(routes)
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    paths: JSON = {}
    for method, path, responder in routes:
        found = declared(responder)
        assert found is not None
        item = paths.setdefault(path, {})
        if names := re.findall(r"{(\w+)}", path):
            item["parameters"] = [_path_parameter(name) for name in names]
        item[method] = _operation(method, path, found, responder)
    told: JSON = {"Problem": problem_schema()}
    if any(of_workflows(path) for path in paths):
        told["Refusal"] = refusal_schema()
    return {
        "openapi": "3.1.0",
        "info": {"title": "blobcask", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": {**components, **told},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
            },
        },
    }


def _types(routes: Sequence[tuple[str, str, Callable[..., Any]]]) -> list[Any]:
    """Every type that is sent or answered."""
    types: list[Any] = []
    for _, _, responder in routes:
        found = declared(responder)
        assert found is not None
        forms = [found.body, *(reply.form for reply in found.replies.values())]
        types += [form for form in forms if form is not None and not isinstance(form, str)]
        types += [parameter.kind for parameter in found.parameters]
    return list(dict.fromkeys(types))


def _operation(method: str, path: str, found: Operation, responder: Callable[..., Any]) -> JSON:
    text = inspect.getdoc(responder) or ""
    summary, _, rest = text.partition("\n")
    form: JSON = {
        "operationId": found.name,
        "summary": summary,
        "description": f"{rest.strip()}\n\n{found.right.value}".strip(),
        "parameters": [_parameter(parameter) for parameter in found.parameters],
        "responses": dict(_responses(method, path, found)),
    }
    if found.right is Right.BEARER:
        form["security"] = [{"bearer": []}]
    if found.body is not None:
        content = _content(found.body)
        content |= {media: {"schema": _schema(found.body)} for media in found.body_media}
        form["requestBody"] = {"required": found.body_required, "content": content}
    return form


def _responses(method: str, path: str, found: Operation) -> Iterator[tuple[str, JSON]]:
    for status, reply in found.replies.items():
        yield str(status), _reply(reply)
    refusals: dict[int, dict[str, str]] = {}
    # Whatever is asked for: a body longer than a limit of bytes, announced or sent.
    always: list[type[BaseException]] = [TooManyRequests, TooLarge, CatalogError]
    if found.right is Right.CALL or not (found.body is None or isinstance(found.body, str)):
        always.append(NoRoom)  # such a body is read whole
    if method in _WRITING:  # with the journal, which needs room too
        always.append(StoreFull)
    if found.right is Right.BEARER:
        always.append(Unauthorized)
    for kind in [*found.refuses, *always]:
        row = TABLE[kind]
        code = row.code.upper() if of_workflows(path) else row.code
        refusals.setdefault(row.status, {})[code] = row.title
    form, media = ("Refusal", JSON_TYPE) if of_workflows(path) else ("Problem", PROBLEM_TYPE)
    for status, codes in sorted(refusals.items()):
        about = "; ".join(f"`{code}`: {title}" for code, title in codes.items())
        schema = {
            "allOf": [
                {"$ref": _REF.format(name=form)},
                {"properties": {"code": {"enum": sorted(codes)}}},
            ]
        }
        content = {media: {"schema": schema}, **_texts(found.texts)}
        yield str(status), {"description": about, "content": content}


def _reply(reply: Reply) -> JSON:
    form: JSON = {"description": reply.about}
    if reply.form is not None:
        form["content"] = _content(reply.form)
        form["content"] |= _texts(reply.texts)
    if reply.headers:
        form["headers"] = {
            name: {"description": about, "schema": {"type": "string"}}
            for name, about in reply.headers.items()
        }
    return form


def _texts(medias: Sequence[str]) -> JSON:
    return {media: {"schema": {"type": "string"}} for media in medias}


def _content(form: Any) -> JSON:
    """A body: a JSON type, or a media type whose bytes are of any kind."""
    if isinstance(form, str):
        return {form: {"schema": {}}}
    return {JSON_TYPE: {"schema": _schema(form)}}


def _parameter(parameter: Parameter) -> JSON:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "required": parameter.required,
        "description": parameter.about,
        "schema": _schema(parameter.kind),
    }


def _path_parameter(name: str) -> JSON:
    kind, about = _PATH_PARAMETERS[name]
    return _parameter(Parameter(name, about, kind, "path", required=True))


def _schema(kind: Any) -> JSON:
    [schema], _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


@final
class DocumentResource:
    """`/api/v1/openapi.json`; the same for everybody, and made once."""

    def __init__(self, document: JSON) -> None:
        self._data = json.dumps(document, ensure_ascii=False).encode()

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """The OpenAPI document of this API."""
        resp.content_type = JSON_TYPE
        resp.data = self._data
        resp.set_header("Cache-Control", "no-cache")
