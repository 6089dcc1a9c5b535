"""The API's document: complete, valid, and true of the server that publishes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import CHECKOUT
from tests.gateway.served import Answer, Served, serving
from tests.gateway.test_workflows import finished
from workflows.signatures import KINDS, Scheme

# What every answer is held to, whatever was sent; the first only where there is room.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")
EXAMPLES = 30  # for each operation and mode
UNLIMITED = {
    "LIMITS__ADDRESS_REQUESTS": "0/m",
    "LIMITS__TENANT_REQUESTS": "0/m",
    "LIMITS__GUESSES": "0/m",
    "LIMITS__ALL_GUESSES": "0/m",
    "STORE__MIN_FREE": "0B",
    "EVENTS__POLL_MAX": "1s",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("openapi"), **UNLIMITED) as server:
        yield server


@pytest.fixture(scope="module")
def api(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.address}/api/v1/openapi.json")


@pytest.fixture(scope="module")
def things(served: Served) -> dict[str, str]:
    """One real thing for each kind of path parameter, so that not everything is a 404."""
    upload = served.request_upload(max_files=3)
    token = upload["upload_token"]
    stored = served.ask("POST", "/api/v1/storage?filename=a.txt", b"words", token=served.admin)
    reference = stored.form["storage_ref"]
    url = served.ask(
        "GET", f"/api/v1/storage/{quote(reference, safe='')}/url", token=served.admin
    ).form["url"]
    question = b'{"approval_key": "k", "title": "?"}'
    asked = served.ask("POST", "/api/v1/approvals", question, token=served.admin)
    secret = [sys.executable, "-m", "cas", "secret", "set", "s"]
    subprocess.run(secret, env=served.environ, cwd=CHECKOUT, input=b"x", check=True)
    expected = b'{"name": "w", "kind": "github", "secret_id": "s"}'
    webhook = served.ask("POST", "/api/v1/webhooks", expected, token=served.admin)
    begun = served.ask(
        "POST",
        f"/api/v1/uploads/{token}/tus/",
        headers={"Tus-Resumable": "1.0.0", "Upload-Length": "100"},
    )
    return {
        "token": token,
        "index": "1",
        "ref": reference,
        "partial_id": begun.headers["location"].rpartition("/")[2],
        "file_id": stored.form["file_id"],
        "filename": urlsplit(url).path.rpartition("/")[2],
        "tenant_id": "default",
        "run_id": finished(served, {("keep", ""): {"text": "words"}}),
        "step_id": "keep",
        "approval_id": asked.form["approval_id"],
        **{
            f"approval {key}": value
            for key, [value] in parse_qs(
                urlsplit(asked.form["links"][0]["approve_url"]).query
            ).items()
        },
        "webhook_id": webhook.form["webhook_id"],
        **{f"download {key}": value for key, [value] in parse_qs(urlsplit(url).query).items()},
        **{
            f"slot {key}": value
            for key, [value] in parse_qs(urlsplit(upload["presigned_urls"][1]).query).items()
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_one_that_the_document_tells_of(
    api: Any, served: Served, things: dict[str, str], mode: GenerationMode
) -> None:
    hold_to_the_document(api, served, things, mode, EXAMPLES, CHECKS)


# Where nearly everything is refused.
TINY = {
    "bytes": {"LIMITS__ADDRESS_BYTES": "8B/s"},
    "rates": {"LIMITS__ADDRESS_REQUESTS": "20/s", "LIMITS__GUESSES": "2/s"},
    "room": {"STORE__MIN_FREE": "4096TiB", "UPLOADS__PARTIAL_EXPIRY": "1m"},
    "quota": {"LIMITS__QUOTA_BYTES": "1B", "LIMITS__QUOTA_FILES": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", TINY)
def test_every_refusal_of_a_tiny_server_is_told_of_too(
    tmp_path: Path, things: dict[str, str], what: str
) -> None:
    with serving(tmp_path, **{**UNLIMITED, **TINY[what]}) as server:
        found = schemathesis.openapi.from_url(f"{server.address}/api/v1/openapi.json")
        there = things if what == "bytes" else {**things, **slot_of(server.request_upload())}
        hold_to_the_document(found, server, there, GenerationMode.POSITIVE, 8, CHECKS[1:])


def slot_of(upload: dict[str, Any]) -> dict[str, str]:
    """An upload's token, and what its first slot is signed with."""
    query = parse_qs(urlsplit(upload["presigned_urls"][0]).query)
    signed = {f"slot {key}": value for key, [value] in query.items()}
    return {"token": upload["upload_token"], "index": "0", **signed}


def hold_to_the_document(
    api: Any,
    served: Served,
    things: dict[str, str],
    mode: GenerationMode,
    examples: int,
    checks: list[Any],
) -> None:
    """Half of the cases ask with wild values, half for things that are there."""
    headers = {"Authorization": f"Bearer {served.admin}"}

    @settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        case = data.draw(found.as_strategy(generation_mode=mode))
        if data.draw(st.booleans()):
            point_at(case, things)
        case.call_and_validate(headers=headers, checks=checks)

    asked = 0
    wrong: dict[str, BaseException] = {}
    for result in api.get_all_operations():
        found = result.ok()
        try:
            ask()
        except Unsatisfiable:  # it takes nothing that could be wrong
            continue
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001  told of below, after all were asked
            wrong[found.label] = error
        asked += 1
    assert asked >= 20
    assert not wrong, "\n\n".join(f"{label}: {told(error)}" for label, error in wrong.items())


def told(error: BaseException) -> str:
    """What went wrong, of all failures in a group."""
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(map(told, error.exceptions))
    return str(error)


def point_at(case: Any, things: dict[str, str]) -> None:
    """Make a case speak of things that are there."""
    for name in list(case.path_parameters):
        case.path_parameters[name] = things[name]
    if case.path.endswith("/respond"):
        case.query.update({key: things[f"approval {key}"] for key in ("decision", "token")})
    if "signature" in case.query:
        kind = "download" if "file_id" in case.path_parameters else "slot"
        case.query["signature"] = things[f"{kind} signature"]
        case.query["expires"] = things[f"{kind} expires"]


# --- the document itself


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    answer = served.ask("GET", "/api/v1/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return answer.form


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, found in item.items():
            if method != "parameters":
                yield method, path, found


def test_every_operation_has_a_name_of_its_own_and_a_summary(document: dict[str, Any]) -> None:
    found = [operation for _, _, operation in operations(document)]
    names = [operation["operationId"] for operation in found]
    assert len(set(names)) == len(names) >= 20
    assert all(re.fullmatch(r"[A-Z][^\n]{5,90}", operation["summary"]) for operation in found)


def test_what_needs_a_token_says_so_and_is_refused_without(
    document: dict[str, Any], served: Served
) -> None:
    guarded = [
        (method, path) for method, path, found in operations(document) if "security" in found
    ]
    assert len(guarded) >= 10
    for method, path in guarded:
        answer = served.ask(method.upper(), re.sub(r"{\w+}", "x", path))
        assert answer.status in (400, 401), (method, path, answer.status)
        assert answer.status == 401, (method, path)


def test_every_reference_in_it_leads_somewhere(document: dict[str, Any]) -> None:
    names = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert names == set(document["components"]["schemas"])


def test_every_route_of_the_design_is_in_it(document: dict[str, Any]) -> None:
    wanted = {
        "post /api/v1/uploads",
        "get /api/v1/uploads",
        "get /api/v1/uploads/{token}/info",
        "put /api/v1/uploads/{token}/files/{index}",
        "delete /api/v1/uploads/{token}/files/{index}",
        "post /api/v1/uploads/{token}/complete",
        "post /api/v1/uploads/{token}/cancel",
        "post /api/v1/storage",
        "get /api/v1/storage",
        "get /api/v1/storage/{ref}",
        "get /api/v1/storage/{ref}/meta",
        "get /api/v1/storage/{ref}/url",
        "delete /api/v1/storage/{ref}",
        "put /api/v1/storage/{ref}/hold",
        "delete /api/v1/storage/{ref}/hold",
        "get /d/{file_id}/{filename}",
        "get /healthz",
        "get /readyz",
        "patch /api/v1/uploads/{token}/tus/{partial_id}",
        "post /api/v1/events/{tenant_id}",
        "get /api/v1/events/{tenant_id}/wait",
        "post /api/v1/approvals",
        "get /api/v1/approvals/{approval_id}",
        "get /api/v1/approvals/{approval_id}/respond",
        "post /api/v1/approvals/{approval_id}/respond",
        "post /api/v1/webhooks",
        "post /api/v1/webhooks/{webhook_id}",
        "get /api/v1/workflows/{run_id}/steps",
        "get /api/v1/workflows/{run_id}/steps/{step_id}",
        "get /api/v1/workflows/{run_id}/steps/{step_id}/result",
    }
    assert wanted <= {f"{method} {path}" for method, path, _ in operations(document)}


def tells(document: dict[str, Any], method: str, path: str, answer: Answer) -> bool:
    """Whether the document tells of a refusal, by its status and code."""
    told = document["paths"][path][method]["responses"].get(str(answer.status), {})
    return f"`{answer.code}`" in told.get("description", "")


def test_a_slot_that_shall_be_filled_only_once_is_told_of(
    document: dict[str, Any], served: Served
) -> None:
    url = f"{served.request_upload()['presigned_urls'][0]}&filename=a.txt"
    first, second = (served.ask("PUT", url, b"x", headers={"If-None-Match": "*"}) for _ in range(2))
    assert (first.status, second.code) == (200, "slot_taken")
    path = "/api/v1/uploads/{token}/files/{index}"
    assert tells(document, "put", path, second)
    names = [each["name"] for each in document["paths"][path]["put"]["parameters"]]
    assert "If-None-Match" in names


def test_a_body_over_a_limit_of_bytes_is_told_of_wherever_it_comes(
    document: dict[str, Any], tmp_path: Path
) -> None:
    with serving(tmp_path, LIMITS__ADDRESS_BYTES="8B/s") as tiny:
        for method, path, found in operations(document):
            url = re.sub(r"{\w+}", "1", path)
            if path in ("/healthz", "/readyz") or method == "head":
                continue
            answer = tiny.ask(method.upper(), url, b"x" * 9)
            assert (answer.status, answer.code.lower()) == (413, "too_large"), (method, path)
            assert tells(document, method, path, answer), (method, path, found["operationId"])


# To wait for an event is to record that one waits; to open a link decides where `one_click` was
# asked for.
WRITING_READS = (
    "/readyz",
    "/api/v1/events/{tenant_id}/wait",
    "/api/v1/approvals/{approval_id}/respond",
)


def test_all_that_writes_tells_of_a_full_store(document: dict[str, Any]) -> None:
    for method, path, found in operations(document):
        description = found["responses"].get("507", {}).get("description", "")
        told = "`store_full`" in description.lower()
        writes = method in ("put", "post", "patch", "delete") or path in WRITING_READS
        assert told == writes, (method, path)


@pytest.mark.parametrize("method", ["get", "post"])
def test_what_a_link_of_an_approval_answers_is_told_of_for_programs_and_for_browsers(
    document: dict[str, Any], served: Served, method: str
) -> None:
    told = document["paths"]["/api/v1/approvals/{approval_id}/respond"][method]
    assert [each["name"] for each in told["parameters"]] == ["decision", "token"]
    question = json.dumps({"approval_key": f"link-{method}", "title": "?"})
    asked = served.ask("POST", "/api/v1/approvals", question, token=served.admin).form
    right = asked["links"][0]["approve_url"]
    for media in ("application/json", "text/html"):
        seen = set()
        for url in (right, right[:-1], right.replace("approved", "rejected"), right):
            answer = served.ask(method.upper(), url, headers={"Accept": media})
            seen.add(answer.status)
            content = told["responses"][str(answer.status)].get("content", {})
            sent = answer.headers.get("content-type", "").partition(";")[0]
            assert sent in content if answer.body else not content
            if answer.status >= 400 and media == "application/json":
                assert tells(document, method, "/api/v1/approvals/{approval_id}/respond", answer)
        assert 404 in seen
    if method == "post":
        assert set(told["requestBody"]["content"]) == {
            "application/json",
            "application/x-www-form-urlencoded",
        }


def test_how_a_webhook_may_be_signed_is_told_of(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    asked = schemas["RegistrationForm"]["properties"]
    assert asked["kind"]["enum"] == list(KINDS)
    assert {"$ref": "#/components/schemas/SignatureForm"} in asked["signature"]["anyOf"]
    kept = Scheme(header="X")
    told = schemas["SignatureForm"]
    assert list(told["properties"]) == list(kept.__struct_fields__)
    assert not told["additionalProperties"]
    for name, field in told["properties"].items():
        assert field["description"]
        assert name == "header" or field["default"] == getattr(kept, name)
    assert "webhook_path" in asked["name"]["description"]


def test_the_conditions_of_a_download_are_told_of(document: dict[str, Any]) -> None:
    for path in ("/d/{file_id}/{filename}", "/api/v1/storage/{ref}"):
        names = {each["name"] for each in document["paths"][path]["get"]["parameters"]}
        assert {"Range", "If-Range", "If-Match", "If-None-Match"} <= names


def test_what_the_first_piece_of_a_resumable_upload_meets_is_told_of(
    document: dict[str, Any],
) -> None:
    begin = document["paths"]["/api/v1/uploads/{token}/tus/"]["post"]
    assert not begin["requestBody"]["required"]
    said = " ".join(each["description"] for each in begin["responses"].values())
    for code in ("partial_busy", "partial_expired", "invalid_name", "quota_exceeded"):
        assert f"`{code}`" in said


def test_head_is_answered_wherever_get_is(served: Served, things: dict[str, str]) -> None:
    token = things["token"]
    for path in (
        "/api/v1/openapi.json", "/docs", "/metrics", "/healthz", "/readyz", "/api/v1/uploads",
        "/api/v1/storage", f"/api/v1/uploads/{token}", f"/api/v1/uploads/{token}/info",
        "/api/v1/receipts/keys", f"/u/{token}",
    ):  # fmt: skip
        got = served.ask("GET", path, token=served.admin)
        head = served.ask("HEAD", path, token=served.admin)
        assert (got.status, head.status, head.body) == (200, 200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
