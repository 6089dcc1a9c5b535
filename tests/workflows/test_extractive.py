"""The model local/extractive: sentences of the text, about as many as asked for, in order."""

from __future__ import annotations

import json
import random

import pytest

from tests.workflows.papers import Paper, papers
from workflows.llm.documents import read_document
from workflows.llm.extractive import Extract, NothingToShorten, Source, extract

PROMPT = (
    "Summarize this academic paper in 200 words. Include: title, main contribution, methodology,"
    " and key findings."
)
COMBINE = "Combine these paper summaries into a cohesive research digest document:\n\n"


def source_of(paper: Paper) -> Source:
    found = read_document("acme", paper.data, "application/pdf", paper.filename, 1 << 20)
    return Source(found.text, found.title)


def sentences_of(content: str) -> list[str]:
    return [line for line in content.replace(". ", ".\n").splitlines() if line.endswith(".")]


def babble(sentences: int) -> str:
    """Different sentences of twelve words, as many as wanted; the same at every call."""
    chance = random.Random(7)
    words = papers()[1].text.replace(".", "").split()
    return " ".join(
        " ".join(chance.choices(words, k=11)).capitalize() + f" {number}."
        for number in range(sentences)
    )


def words_of(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("paper", papers(), ids=lambda paper: paper.filename)
def test_a_summary_is_made_of_the_papers_own_sentences_in_their_order(paper: Paper) -> None:
    found = extract(PROMPT, [source_of(paper)])
    title, _, prose = found.content.partition("\n\n")
    assert title == paper.title
    assert 160 <= words_of(prose) <= 200
    assert found.output_words == words_of(found.content)
    assert found.input_words > 600
    text = " ".join(paper.text.split())
    places = [text.index(sentence) for sentence in sentences_of(prose)]
    assert len(places) >= 5
    assert places == sorted(places)


def test_the_same_question_has_the_same_answer() -> None:
    source = source_of(papers()[1])
    assert extract(PROMPT, [source]) == extract(PROMPT, [source])


@pytest.mark.parametrize("words", [30, 80, 150, 400])
def test_the_prompt_says_how_long(words: int) -> None:
    source = source_of(papers()[2])
    assert words * 0.6 <= _prose_words(extract(f"A {words}-word summary!", [source])) <= words


def test_without_a_number_there_are_200_words() -> None:
    assert 160 <= _prose_words(extract("Summarize.", [source_of(papers()[0])])) <= 200


def test_what_the_prompt_asks_for_may_stand_behind_a_long_text() -> None:
    found = extract(f"Shorten this.\n\n{babble(300)}\n\nIn at most 50 words, please.")
    assert found.output_words <= 50


def test_thousands_may_have_a_comma() -> None:
    found = extract("In at most 1,000 words", [Source(babble(200))])
    assert 800 <= found.output_words <= 1000


def test_the_caller_may_allow_less() -> None:
    assert _prose_words(extract(PROMPT, [source_of(papers()[0])], words_max=40)) <= 40


def test_numbers_in_the_text_ask_for_nothing() -> None:
    text = f"Every one of these notes has 9 words at most. {babble(100)}"
    assert extract("Summarize.", [Source(text)]).output_words > 150


def test_results_of_other_steps_are_taken_out_of_the_prompt() -> None:
    results = [
        {"content": extract(PROMPT, [source_of(paper)]).content, "model": "local/extractive"}
        for paper in papers()
    ]
    found = extract(COMBINE + json.dumps(results))
    assert "Combine" not in found.content
    assert "local/extractive" not in found.content
    blocks = found.content.split("\n\n")
    assert blocks[::2] == [paper.title for paper in papers()]
    for paper, prose in zip(papers(), blocks[1::2], strict=True):
        text = " ".join(paper.text.split())
        assert sentences_of(prose)
        assert all(sentence in text for sentence in sentences_of(prose))


@pytest.mark.parametrize(
    "value",
    [
        ["First one sleeps all day long.", "Second one never sleeps at all."],
        [
            {"summary": "First one sleeps all day long."},
            {"text": "Second one never sleeps at all."},
        ],
        {"results": [["First one sleeps all day long."], ["Second one never sleeps at all."]]},
    ],
)
def test_results_may_have_several_forms(value: object) -> None:
    found = extract(f"Combine [these]:\n\n{json.dumps(value)}")
    first, second = found.content.split("\n\n")
    assert first == "First one sleeps all day long."
    assert second == "Second one never sleeps at all."


def test_a_text_in_the_prompt_follows_the_instruction() -> None:
    found = extract(f"Shorten this to 100 words, please do.\n\n{papers()[0].text}")
    assert "please do" not in found.content
    assert 60 <= found.output_words <= 100


@pytest.mark.parametrize(
    "prompt", ["Write a poem about spring.", "{}", "[1, 2]", "\n\n", "[" * 9999]
)
def test_what_has_no_text_to_shorten_is_refused(prompt: str) -> None:
    with pytest.raises(NothingToShorten):
        extract(prompt)


def test_notes_without_sentences_are_shortened_too() -> None:
    found = extract("Summarize.", [Source("buy milk\n\nfeed the cat\n\ncall home")])
    assert found.content == "buy milk\n\nfeed the cat call home"


def test_a_short_text_stays_as_it_is() -> None:
    text = "It is short, and says so. There is nothing to leave out of it."
    assert extract(PROMPT, [Source(text)]).content == text


def test_abbreviations_end_no_sentence() -> None:
    first = "We follow Doe et al. (2019), i.e. the rule of Dr. Smith in Fig. 3, to the letter."
    text = f"{first} {papers()[0].text}"
    found = extract("In 900 words", [Source(text)])
    assert first in found.content


def test_what_says_the_same_is_said_once() -> None:
    text = "\n".join(
        f"The {word} parrots of the valley sing every single morning before the sun is up."
        for word in ("red", "green", "blue", "old", "young", "quick")
    )
    found = extract("In 40 words", [Source(f"{text}\n{papers()[1].text}")])
    assert found.content.count("parrots") <= 1


def test_references_are_no_part_of_the_text() -> None:
    cited = "Doe, J. Parrots of the valley and what they mean to us all. Journal of Parrots."
    text = f"{papers()[0].text}\nReferences\n{cited}"
    assert "Parrots" not in extract("In 5,000 words", [Source(text)]).content


def test_sentences_that_share_no_word_are_taken_in_their_order() -> None:
    first = "Alpha bravo charlie delta echo foxtrot."
    second = "Golf hotel india juliett kilo lima."
    assert extract("In 6 words", [Source(f"{first} {second}")]).content == first


def test_other_languages_are_read_with_their_own_stop_words() -> None:
    text = (
        "Die Wiesen im Tal werden seit vielen Jahren nur einmal gemäht. "
        "Auf den Wiesen im Tal leben deshalb viele Hummeln und andere Insekten. "
        "Ein Zug fuhr vorbei und war gleich wieder verschwunden. "
        "Die Hummeln finden auf den Wiesen bis in den August hinein Nahrung."
    )
    assert "Wiesen" in extract("In 15 words", [Source(text)]).content


def test_a_long_text_is_ranked_in_parts() -> None:
    few = extract("In 100 words", [Source(babble(700))])
    assert 70 <= few.output_words <= 100
    many = extract("In 3,000 words", [Source(babble(700))])
    assert 2_500 <= many.output_words <= 3_000


def _prose_words(found: Extract) -> int:
    return words_of(found.content.partition("\n\n")[2])
