"""A client of workflows over HTTP alone: submits, looks, uploads, reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final
from urllib.parse import urlencode

from cas.records import ENDED, Step
from tests.end_to_end.article_summarization import get_workflow
from tests.end_to_end.nodes import looking, until
from tests.gateway.served import Served
from workflows.run_view import steps_of


def acceptance() -> str:
    """The article summarization as JSON."""
    return str(get_workflow().to_json())  # type: ignore[no-untyped-call]


PATIENCE_S = 120.0


def steps_in(root: Path, run_id: str) -> list[Step]:
    """The steps of a run as the catalog has them: their times are µs there."""
    with looking(root) as store, store.catalog.read() as snapshot:
        return steps_of(snapshot, run_id)


@final
class Client:
    """Whoever works with a gateway and has a token for it. `served` may be started anew."""

    def __init__(self, served: Served, token: str = "") -> None:
        self.served = served
        self.token = token or served.admin

    def submit(self, definition: str, inputs: dict[str, Any] | None = None, key: str = "") -> str:
        """The run's identifier."""
        body = json.dumps({"definition": definition, "inputs": inputs or {}})
        headers = {"Idempotency-Key": key} if key else {}
        answer = self.served.ask(
            "POST", "/api/v1/workflows", body, token=self.token, headers=headers
        )
        assert answer.status == 201, answer.body
        return str(answer.form["run_id"])

    def run(self, run_id: str) -> dict[str, Any]:
        answer = self.served.ask("GET", f"/api/v1/workflows/{run_id}", token=self.token)
        assert answer.status == 200, answer.body
        return answer.form

    def variable(self, run_id: str, name: str) -> Any:
        """A variable of the run, once it is there."""
        found: dict[str, Any] = {}

        def there() -> bool:
            run = self.run(run_id)
            assert run["status"] not in ("failed", "cancelled"), run
            found.update(run["variables"])
            return name in found

        until(f"the run has {name}", there, PATIENCE_S)
        return found[name]

    def waits(self, run_id: str, step: str) -> None:
        """Until the step waits for somebody."""

        def waiting() -> bool:
            run = self.run(run_id)
            assert run["status"] not in ENDED, run
            return any(s["step"] == step and s["status"] == "waiting" for s in run["steps"])

        until(f"{step} waits", waiting, PATIENCE_S)

    def end(self, run_id: str, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """The run, once it has ended."""
        until("the run has ended", lambda: self.run(run_id)["status"] in ENDED, seconds)
        return self.run(run_id)

    # --- a person with a link: no login

    def info(self, upload_token: str) -> dict[str, Any]:
        answer = self.served.ask("GET", f"/api/v1/uploads/{upload_token}/info")
        assert answer.status == 200, answer.body
        return answer.form

    def send(self, upload_token: str, files: Sequence[tuple[str, bytes]]) -> None:
        """PUT each file to the signed URL of its slot."""
        urls = self.info(upload_token)["presigned_urls"]
        for (name, data), url in zip(files, urls, strict=False):
            named = f"{url}&{urlencode({'filename': name})}"
            answer = self.served.ask(
                "PUT", named, data, headers={"Content-Type": "application/pdf"}
            )
            assert answer.status == 200, answer.body

    def complete(self, upload_token: str) -> dict[str, Any]:
        answer = self.served.ask("POST", f"/api/v1/uploads/{upload_token}/complete")
        assert answer.status == 200, answer.body
        return answer.form
