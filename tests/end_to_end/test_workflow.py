"""The article summarization, character for character: over HTTP alone, on real parts.

Real gateway, real runner, real Ceph as the mirror's bucket, three real PDFs. Once with the
model that needs nobody, once with an OpenAI-compatible server that answers none of the
summaries before it was asked for all three.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.end_to_end.nodes import settings_of, until
from tests.end_to_end.runs import Client, acceptance, steps_in
from tests.gateway.served import COMPLETE, Served, serving
from tests.s3.ceph import Bucket
from tests.workflows.llm_server import LlmServer
from tests.workflows.papers import papers

pytestmark = pytest.mark.slow

PAPERS = papers()

REFERENCE = re.compile(r"hwy://uploads/default/[0-9a-f-]+/([0-9a-f]{64})\.(pdf|txt)")
SHELL = {"WORKFLOWS__ALLOW_SHELL": "yes"}


@contextmanager
def serving_workflows(
    root: Path, bucket: Bucket, settings: Mapping[str, str]
) -> Iterator[tuple[Served, Client]]:
    with serving(root, COMPLETE, **settings_of(bucket), **SHELL, **settings) as served:
        yield served, Client(served)


def summarize(client: Client) -> dict[str, Any]:
    """The test procedure, step by step; the run when it has ended."""
    run_id = client.submit(acceptance())
    token = client.variable(run_id, "upload_request")["upload_token"]
    info = client.info(token)
    assert (info["status"], info["max_files"], info["allowed_types"]) == ("pending", 3, ["pdf"])
    assert len(info["presigned_urls"]) == 3
    client.send(token, [(paper.filename, paper.data) for paper in PAPERS])
    done = client.complete(token)
    assert [file["filename"] for file in done["files"]] == [paper.filename for paper in PAPERS]
    return client.end(run_id)


def judge(served: Served, bucket: Bucket, run: dict[str, Any]) -> str:
    """The success criteria, each of them; returns the digest's text."""
    assert run["status"] == "completed", run
    steps = steps_in(served.root, run["run_id"])
    summaries = [step for step in steps if step.step_id == "summarize_pdf"]
    assert {step.iteration for step in summaries} == {"0", "1", "2"}
    assert {step.status for step in summaries} == {"completed"}
    assert len(run["variables"]["summarize_papers"]["results"]) == 3
    stored = run["variables"]["stored_file"]
    references = [stored["storage_ref"]]
    references += [file["storage_ref"] for file in run["variables"]["uploaded_files"]["files"]]
    digests = []
    for reference in references:
        named = REFERENCE.fullmatch(reference)
        assert named is not None, reference
        digests.append(named[1])
    sent = {hashlib.sha256(paper.data).hexdigest() for paper in PAPERS}
    assert sent == set(digests[1:])
    # The public URL needs no login, and gives the text.
    url = run["variables"]["public_url"]
    assert f"Download your summary at: {url}" in run["variables"]["final_result"]["stdout"]
    answer = served.ask("GET", urlsplit(url)._replace(scheme="", netloc="").geturl())
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/plain")
    assert hashlib.sha256(answer.body).hexdigest() == digests[0]
    key = f"objects/{digests[0][:2]}/{digests[0]}"
    until("the digest is in the bucket", lambda: key in bucket.keys("objects/"))
    assert bucket.read(key) == answer.body
    return answer.body.decode()


def test_papers_become_a_digest_without_any_provider(root: Path, bucket: Bucket) -> None:
    with serving_workflows(root, bucket, {}) as (served, client):
        run = summarize(client)
        text = judge(served, bucket, run)
    summaries = run["variables"]["summarize_papers"]["results"]
    # It says which model it was, and passes for no other.
    assert {summary["model"] for summary in summaries} == {"local/extractive"}
    assert {summary["requested_model"] for summary in summaries} == {"gpt-4"}
    # Extracted: every sentence of a summary stands in its paper.
    for paper, summary in zip(PAPERS, summaries, strict=True):
        words = set(re.findall(r"[a-z]{5,}", summary["content"].lower()))
        assert words, summary
        assert words <= set(re.findall(r"[a-z]{5,}", f"{paper.title} {paper.text}".lower()))
    assert len(text.split()) > 50


def test_three_summaries_are_asked_for_at_once(root: Path, bucket: Bucket) -> None:
    with LlmServer(api_key="sk-test") as llm:
        llm.hold_until(3, "Summarize this academic paper")
        provider = {"LLM__BASE_URL": llm.url, "LLM__API_KEY": "sk-test"}
        with serving_workflows(root, bucket, provider) as (served, client):
            run = summarize(client)
            text = judge(served, bucket, run)
            steps = steps_in(served.root, run["run_id"])
        # In parallel: each one began before any had ended, for none was answered before.
        summaries = [step for step in steps if step.step_id == "summarize_pdf"]
        assert max(s.started_at for s in summaries) < min(s.ended_at or 0 for s in summaries)
        asked = llm.asked_for("Summarize this academic paper")
        assert len(asked) == 3
        # Each request has the text of its own paper.
        for paper in PAPERS:
            for mark in (paper.title, *paper.marks):
                assert sum(mark in " ".join(one.text.split()) for one in asked) == 1
        (combined,) = llm.asked_for("Combine these paper summaries")
        for summary in run["variables"]["summarize_papers"]["results"]:
            assert summary["model"].startswith("gpt-4")
            assert summary["content"][:60] in combined.text
        assert set(llm.answered.values()) == {1}
    assert text == run["variables"]["combined_summary"]["content"]
