"""The model `local/extractive`: picks the sentences of a text that say most of it.

It writes nothing of its own. Sentences are ranked by LexRank (how much each has in common
with all others), the best are taken until there are as many words as the prompt asks for, and
they are put in the order in which they stood. Of several texts each gets its share and a
paragraph of its own, so that none is left out. No network, no training data, and the same
answer to the same question.

Nobody knows how long that takes for a text that was made to take long: it runs in a process of
its own, see `text_process`, and `local` is the way there.

Made for languages that put spaces between words. A text in another one, or a prompt that
asks for anything else than a shorter text, gets sentences all the same: it is no mind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, final

import numpy
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence
from sumy.nlp.stemmers import Stemmer
from sumy.summarizers.lex_rank import LexRankSummarizer
from sumy.utils import get_stop_words

WORDS: Final = 200  # of an answer, when the prompt asks for no number
WORDS_A_TEXT: Final = 120  # the same, where there are several texts to be put together
WORDS_MAX: Final = 20_000
_ENOUGH: Final = 0.9  # of the words; from there on no shorter sentence is looked for

# LexRank compares every sentence with every other. Longer texts are ranked in parts of so
# many sentences, and what is best of each part once more.
_PART_SENTENCES: Final = 150
_KEPT_OF_A_PART: Final = 50
_WORDS_OF_A_PART: Final = 400  # what needs more than so many of each part takes them there
_PRECISION: Final = 1e-4  # of the ranks; LexRank's own 0.1 stops before they differ
_SAME: Final = 0.6  # share of common words from which two sentences say the same

# Not from the middle of a longer number: time in proportion to the text, whatever it is.
_ASKED_WORDS: Final = re.compile(
    r"(?<!\w)(?<!\d,)(\d{1,3}(?:,\d{3}){1,2}|\d{1,6})[ \u00a0-]?words?\b", re.IGNORECASE
)
_ASKED_CHARS: Final = 4 << 10  # of a prompt's beginning, and of its end, that say how long
_WORD: Final = re.compile(r"[^\W\d_](?:[^\W_]|['\u2019-](?=\w))*")
_SENTENCE_END: Final = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019\u00bb)\]]*$")
_SENTENCE_WORDS_MIN: Final = 5
_SENTENCE_WORDS_MAX: Final = 80  # more are a table or a list whose ends were lost
_REFERENCES: Final = re.compile(
    r"(\d+\.? )?(references|bibliography|literature cited)", re.IGNORECASE
)
_JSON_START: Final = re.compile(r"[\[{]")
_SHORT_LINE: Final = 0.75  # of the usual line: what ends before that, ends on purpose
_TITLE_WORDS_MAX: Final = 30
_JSON_STARTS_MAX: Final = 64  # places in a prompt where JSON may begin that are looked at

# What ends with a point that ends no sentence. Punkt learns these from training data, which
# would have to be downloaded; these are those of academic and business English and some of
# its neighbours.
_ABBREVIATIONS: Final = frozenset(
    "al approx bzw ca cf ch chap corp dept dr ed eds eq eqs e.g et etc fig figs ff g.e"
    " hr i.e inc jr lat ltd mr mrs ms mt nr p.ex pp prof ref refs resp sec"
    " sect sr st tab u.a univ viz vol vols vs z.b".split()
)
# Takes from what LexRank ranked, best first, each with its `sentence`; sumy has no types.
_Choice = Callable[[Sequence[Any]], Sequence[Any]]

_LANGUAGES: Final = ("english", "french", "german", "italian", "portuguese", "spanish", "swedish")


@final
class NothingToShorten(ValueError):
    """There is no text to pick sentences from."""


@final
@dataclass(frozen=True, slots=True)
class Source:
    """One text, with its title where that is known from elsewhere."""

    text: str
    title: str = ""


@final
@dataclass(frozen=True, slots=True)
class Extract:
    """The sentences that were picked."""

    content: str
    input_words: int
    output_words: int


def extract(prompt: str, sources: Sequence[Source] = (), words_max: int = WORDS_MAX) -> Extract:
    """What `prompt` asks for, of the `sources`; of the prompt's own texts without them.

    Raises NothingToShorten.
    """
    if not sources:
        sources = list(_sources_in(prompt))
    texts = [one for one in map(_Text.of, sources) if one.sentences]
    if not texts:
        raise NothingToShorten("there is no text to shorten")
    asked = _ASKED_WORDS.search(prompt[:_ASKED_CHARS]) or _ASKED_WORDS.search(
        prompt[-_ASKED_CHARS:]
    )
    if asked is not None:
        words = int(asked[1].replace(",", ""))
    else:
        words = WORDS if len(texts) == 1 else WORDS_A_TEXT * len(texts)
    share = max(1, min(words, words_max, WORDS_MAX) // len(texts))
    parts = [one.shortened(share) for one in texts]
    content = "\n\n".join(parts)
    return Extract(content, sum(_words(one.text) for one in sources), _words(content))


# --- what there is to shorten


def _sources_in(prompt: str) -> Iterable[Source]:
    """The texts in a prompt: of JSON in it (the results of other steps) the contents, else all
    but its first paragraph, which is the instruction."""
    found = [text for value in _json_in(prompt) for text in _contents(value)]
    if found:
        return [Source(text) for text in found]
    _, _, rest = prompt.strip().partition("\n\n")
    if _sentences(rest):
        return [Source(rest)]
    return [Source(prompt)] if len(_sentences(prompt)) > 2 else []


def _json_in(prompt: str) -> Iterable[Any]:
    """The JSON lists and objects in a text."""
    decoder = json.JSONDecoder()
    position = 0
    for _ in range(_JSON_STARTS_MAX):
        start = _JSON_START.search(prompt, position)
        if start is None:
            return
        try:
            value, position = decoder.raw_decode(prompt, start.start())
        except (ValueError, RecursionError):
            position = start.end()
        else:
            yield value


def _contents(value: Any) -> Iterable[str]:
    """The texts of a step's result, or of a list of them."""
    if isinstance(value, list):
        for one in value:
            yield from [one] if isinstance(one, str) else _contents(one)
    elif isinstance(value, dict):
        for name in ("content", "results", "text", "summary"):
            if name in value:
                yield from [value[name]] if isinstance(value[name], str) else _contents(value[name])
                return


@final
@dataclass(frozen=True, slots=True)
class _Text:
    title: str
    sentences: list[str]

    @classmethod
    def of(cls, source: Source) -> _Text:
        paragraphs = _paragraphs(source.text)
        title = source.title
        if not title and len(paragraphs) > 1 and not _SENTENCE_END.search(paragraphs[0]):
            title = paragraphs[0] if _words(paragraphs[0]) <= _TITLE_WORDS_MAX else ""
        sentences = _sentences_of(paragraphs)
        if not sentences:  # notes, lists, verses: what there is, but the title
            sentences = [text for text in paragraphs if text != title and _WORD.search(text)]
        return cls(title, sentences)

    def shortened(self, words_max: int) -> str:
        prose = " ".join(_best(self.sentences, words_max))
        return f"{self.title}\n\n{prose}" if self.title else prose


def _paragraphs(text: str) -> list[str]:
    """Paragraphs and headings, each as one line; none after the references begin."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lengths = sorted(len(line) for line in lines if line)
    usual = lengths[int(len(lengths) * 0.9)] if lengths else 0
    found: list[str] = []
    current: list[str] = []
    for line, following in pairwise([*lines, ""]):
        if _REFERENCES.fullmatch(line) and found:
            break
        if line:
            current.append(line)
        ends = not following or (
            len(line) < _SHORT_LINE * usual
            and (bool(_SENTENCE_END.search(line)) or not following[0].islower())
        )
        if ends and current:
            found.append(" ".join(current))
            current = []
    return [*found, " ".join(current)] if current else found


def _sentences(text: str) -> list[str]:
    return _sentences_of(_paragraphs(text))


def _sentences_of(paragraphs: Iterable[str]) -> list[str]:
    """The sentences, each once: headings, captions and rows of tables are none."""
    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS)
    splitter = PunktSentenceTokenizer(parameters)
    found: dict[str, None] = {}
    for paragraph in paragraphs:
        for sentence in splitter.tokenize(paragraph):
            count = _words(sentence)
            if (
                _SENTENCE_WORDS_MIN <= count <= _SENTENCE_WORDS_MAX
                and _SENTENCE_END.search(sentence)
                and len(_WORD.findall(sentence)) > count / 2
            ):
                found[sentence] = None
    return list(found)


def _words(text: str) -> int:
    return len(text.split())


# --- which of it is taken


def _best(sentences: list[str], words_max: int) -> list[str]:
    """The best sentences of at most so many words, but one at least, in their order."""
    if sum(map(_words, sentences)) <= words_max:
        return sentences
    ranking = _Ranking(_language(sentences))
    candidates = sentences
    while len(candidates) > _PART_SENTENCES:
        parts = [
            candidates[start : start + _PART_SENTENCES]
            for start in range(0, len(candidates), _PART_SENTENCES)
        ]
        share = words_max // len(parts)
        if share > _WORDS_OF_A_PART:
            return [one for part in parts for one in ranking.pick(part, _within(share))]
        kept = _first(_KEPT_OF_A_PART)
        candidates = [one for part in parts for one in ranking.pick(part, kept)]
    return ranking.pick(candidates, _within(words_max))


def _language(sentences: Iterable[str]) -> str:
    """The language whose stop words are most frequent; English where none is."""
    words = [word.lower() for sentence in sentences for word in _WORD.findall(sentence)][:5000]
    hits = {
        language: sum(word in stops for word in words)
        for language, stops in ((one, get_stop_words(one)) for one in _LANGUAGES)
    }
    return max(hits, key=lambda language: hits[language])


@final
class _Words:
    """What sumy's sentences ask for their words; its own Tokenizer wants downloaded data."""

    def to_words(self, text: str) -> tuple[str, ...]:
        return tuple(_WORD.findall(text))


@final
class _Ranking:
    """LexRank for one language."""

    def __init__(self, language: str) -> None:
        self._lex_rank = LexRankSummarizer(Stemmer(language))
        self._lex_rank.stop_words = get_stop_words(language)
        self._lex_rank.epsilon = _PRECISION
        self._words = _Words()

    def pick(self, sentences: Sequence[str], choose: _Choice) -> list[str]:
        """Those that `choose` leaves of all, which it is given with the best first."""
        made = [Sentence(sentence, self._words) for sentence in sentences]
        # Where no two sentences share a word, all ranks are 0/0: the order decides then.
        with numpy.errstate(divide="ignore", invalid="ignore"):
            picked = self._lex_rank(ObjectDocumentModel([Paragraph(made)]), choose)
        return [str(one) for one in picked]


def _first(count: int) -> _Choice:
    return lambda ranked: ranked[:count]


def _within(words_max: int) -> _Choice:
    """The best whose words are not above the limit, leaving out what repeats a better one."""

    def choose(ranked: Sequence[Any]) -> list[Any]:
        taken: list[Any] = []
        seen: list[set[str]] = []
        total = 0
        for one in ranked:
            count = _words(str(one.sentence))
            words = {word.lower() for word in one.sentence.words}
            if taken and (total + count > words_max or any(_alike(words, old) for old in seen)):
                continue
            taken.append(one)
            seen.append(words)
            total += count
            if total >= _ENOUGH * words_max:
                break
        return taken

    return choose


def _alike(one: set[str], other: set[str]) -> bool:
    return len(one & other) > _SAME * min(len(one), len(other))
