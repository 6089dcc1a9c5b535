"""README's workflow is the one that the tests run."""

from __future__ import annotations

from tests.conftest import CHECKOUT


def test_the_workflow_of_the_readme_is_the_one_that_is_tested() -> None:
    tested = (CHECKOUT / "tests/end_to_end/article_summarization.py").read_text()
    _, _, code = tested.partition('"""\n\n')
    assert code.strip() in (CHECKOUT / "README.md").read_text()
