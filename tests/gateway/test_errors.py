"""The table of errors: every error of the store has a row, and rows tell nothing inside."""

from __future__ import annotations

from pathlib import Path

import falcon
import pytest
from falcon import testing

from cas import errors as cas
from cas.errors import BlobcaskError
from gateway import errors


def kinds(kind: type[BlobcaskError]) -> list[type[BlobcaskError]]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in kinds(below))]


# What other packages raise among themselves never reaches a request.
OWN = [kind for kind in kinds(BlobcaskError)[1:] if not kind.__module__.startswith("replicator.")]


def answered(error: Exception, path: str = "/") -> testing.Result:
    """What a client is told when a resource raises `error`."""

    class Resource:
        def on_get(self, _req: falcon.Request, _resp: falcon.Response) -> None:
            raise error

    app: falcon.App[falcon.Request, falcon.Response] = falcon.App(middleware=[errors.RequestIds()])
    errors.install(app, reopen=lambda: None)
    app.add_route(path, Resource())
    return testing.TestClient(app).simulate_get(path)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_every_error_raised_on_purpose_has_a_row_of_its_own_or_its_kind(
    kind: type[BlobcaskError],
) -> None:
    remote = (cas.AccessDenied, cas.ServerRefused, cas.ServerUnreachable)
    elsewhere = ("cas.adoption", "cas.remote.wire", "cas.remote.bodies")
    starting = (cas.InvalidSetting, cas.TargetNeeded)
    faults = (cas.WrongProcess, cas.ToolFailed)
    if kind in (*starting, *faults, *remote) or kind.__module__ in elsewhere:
        return  # stops the start; a fault of ours, a run's; a client's; never leaves its module
    row = next(errors.TABLE[one] for one in kind.__mro__ if one in errors.TABLE)
    assert row.status != 500
    assert row.code != "internal"


def test_a_code_means_one_status() -> None:
    statuses: dict[str, set[int]] = {}
    for row in errors.TABLE.values():
        statuses.setdefault(row.code, set()).add(row.status)
    assert all(len(one) == 1 for one in statuses.values())


def test_a_full_store_tells_numbers_but_no_paths() -> None:
    answer = answered(cas.StoreFull(10, 200, Path("/srv/secret")))
    assert answer.status_code == 507
    assert (answer.json["free_bytes"], answer.json["needed_bytes"]) == (10, 200)
    assert "secret" not in answer.text


def test_a_fault_of_ours_tells_nothing() -> None:
    answer = answered(RuntimeError("secret"))
    assert (answer.status_code, answer.json["code"]) == (500, "internal")
    assert "secret" not in answer.text


def test_what_is_not_there_is_told_alike_whatever_was_asked_for() -> None:
    one = answered(cas.NotFound("upload", "AAAAAAAA"))
    other = answered(cas.NotFound("file", "hwy://uploads/other/…"))
    forged = answered(cas.BadSignature())
    assert one.json == other.json == forged.json


def test_refused_files_are_listed() -> None:
    answer = answered(cas.FilesRefused([(0, "a.pdf", "is a ZIP archive")]))
    assert answer.status_code == 422
    assert answer.json["reasons"] == [
        {"index": 0, "filename": "a.pdf", "reason": "is a ZIP archive"}
    ]


# --- where workflows are spoken to


@pytest.mark.parametrize("path", errors.WORKFLOW_PATHS)
@pytest.mark.parametrize("below", ["", "/one", "/one/two"])
def test_workflows_are_refused_in_the_form_of_the_requirement(path: str, below: str) -> None:
    answer = answered(cas.NoWaitingWorkflow("paid"), path + below)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
    assert answer.json == {
        "status": "error",
        "code": "NO_WAITING_WORKFLOW",
        "message": "No workflow waiting for this event",
        "event_name": "paid",
    }


def test_a_path_that_only_begins_alike_has_the_usual_form() -> None:
    answer = answered(cas.NotFound("thing", ""), "/api/v1/eventsx")
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_fact_never_takes_the_place_of_the_form_s_own_members() -> None:
    ended = cas.RunEnded("completed")
    there, elsewhere = answered(ended, "/api/v1/workflows/x").json, answered(ended).json
    assert (there["status"], there["state"]) == ("error", "completed")
    assert (elsewhere["status"], elsewhere["state"]) == (409, "completed")


def test_a_fault_of_ours_tells_nothing_there_either() -> None:
    answer = answered(RuntimeError("secret"), "/api/v1/events/default")
    assert (answer.status_code, answer.json["code"]) == (500, "INTERNAL")
    assert "secret" not in answer.text


def test_an_unavailable_store_says_when_to_come_back() -> None:
    answer = answered(cas.CatalogFailed("disk at /srv/secret"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "secret" not in answer.text
