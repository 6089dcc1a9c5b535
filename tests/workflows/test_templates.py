"""Templates: values stay values, texts become texts, and nothing else can be reached."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cas.errors import InvalidTemplate, InvalidWorkflow
from workflows import templates

KNOWN: dict[str, Any] = {
    "name": "ann",
    "n": 3,
    "half": 0.5,
    "yes": True,
    "nothing": None,
    "files": [{"name": "a.pdf", "size": 1}, {"name": "b.pdf", "size": 2}],
    "deep": {"er": {"list": [1, [2, 3]]}},
    "braces": "{{name}}",
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("{{name}}", "ann"),
        ("{{ name }}", "ann"),
        ("{{n}}", 3),
        ("{{nothing}}", None),
        ("{{files}}", KNOWN["files"]),
        ("{{files[1].name}}", "b.pdf"),
        ("{{files.0.name}}", "a.pdf"),
        ("{{files[-1]['size']}}", 2),
        ("{{deep.er.list[1][0]}}", 2),
        ("<{{name}}>", "<ann>"),
        ("{{name}}{{n}}", "ann3"),
        ("{{deep.er}} {{half}} {{yes}} {{nothing}}", '{"list":[1,[2,3]]} 0.5 true null'),
        ("{{n + 1}}", 4),
        ("{{n * 2 - 1}}", 5),
        ("{{ -n }}", -3),
        ("{{name ~ '-' ~ n}}", "ann-3"),
        ("{{files | length}}", 2),
        ("{{files | first}}", {"name": "a.pdf", "size": 1}),
        ("{{unknown | default('none')}}", "none"),
        ("{{nothing | default(7)}}", 7),
        ("{{deep.missing.more | default([])}}", []),
        ("{{['a', n] | join('-')}}", "a-3"),
        ("{{files | tojson}}", '[{"name":"a.pdf","size":1},{"name":"b.pdf","size":2}]'),
        ("{{name | upper}}", "ANN"),
        ("{{'12' | int}}", 12),
        ("{{unknown is defined}}", False),
        ("{{nothing is none}}", True),
        ("{{n > 2 and 'a' in name}}", True),
        # What a template gave is not looked at again.
        ("{{braces}}", "{{name}}"),
        ("<{{braces}}>", "<{{name}}>"),
        # Statements and comments of Jinja are texts like any other.
        ("{% if name %} {# no #} {{n}}\r\n", "{% if name %} {# no #} 3\n"),
        ("a\r\nb {%", "a\r\nb {%"),
    ],
)
def test_a_template_is_filled_in(text: str, value: Any) -> None:
    templates.check(text)
    found = templates.Rendering(KNOWN).text(text)
    assert found == value
    assert type(found) is type(value)


def test_a_template_without_a_value_is_told_as_one() -> None:
    with pytest.raises(InvalidTemplate, match=r"^template '\{\{typo\}\}': ") as refused:
        templates.render("{{typo}}", KNOWN)
    assert isinstance(refused.value, InvalidWorkflow)


def test_texts_are_filled_in_however_deep() -> None:
    value = {"a": ["{{n}}", {"b": "<{{name}}>"}], "c": 1, "d": None, "{{n}}": True}
    assert templates.render(value, KNOWN) == {
        "a": [3, {"b": "<ann>"}], "c": 1, "d": None, "{{n}}": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{unknown}}", "nothing is named 'unknown'; there are braces, deep"),
        ("{{files.name}}", "there is no 'name' in a list"),
        ("{{files[2]}}", "there is no element 2; there are 2"),
        ("{{deep.other}}", "there is no 'other'; there are er"),
        ("{{name.upper}}", "there is no 'upper' in a text"),
        ("{{n + name}}", "a text is no number"),
        ("{{name < n}}", "it has no value"),
        ("{{n | length}}", "it has no value"),
        ("{{'x' | int}}", "it has no value"),
        ("{{files | join('-', 1, 2)}}", "it has no value"),
    ],
)
def test_a_template_without_a_value_says_why(text: str, why: str) -> None:
    templates.check(text)
    with pytest.raises(InvalidWorkflow) as error:
        templates.Rendering(KNOWN).text(text)
    assert why in str(error.value)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{",
        "{{}}",
        "{{name",
        "{{name | nofilter}}",
        "{{name is odd}}",
        "{{name.upper()}}",
        "{{range(10)}}",
        "{{n ** n}}",
        "{{n / 2}}",
        "{{n // 2}}",
        "{{n % 2}}",
        "{{ {'a': 1} }}",
        "{{files[0:1]}}",
        "{{name if n else n}}",
        "{{''.__class__.__mro__()}}",
        "{{name | attr('upper')}}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    ],
)
def test_what_is_no_template_of_ours_is_refused(text: str) -> None:
    with pytest.raises(InvalidWorkflow):
        templates.check(text)
    with pytest.raises(InvalidWorkflow):
        templates.Rendering(KNOWN).text(text)


@pytest.mark.parametrize("text", ["{{name.__class__}}", "{{files.__len__}}", "{{n.real}}"])
def test_nothing_of_python_is_reached(text: str) -> None:
    with pytest.raises(InvalidWorkflow):
        templates.Rendering(KNOWN).text(text)


@pytest.mark.parametrize(
    ("condition", "held"),
    [
        ("{{n}} > 2", True),
        ("n > 2", True),
        ("{{n > 2}}", True),
        ("{{n}} == 3 and {{name}} == 'ann'", True),
        ("'{{name}}' == 'ann'", True),
        ('"{{ name }}" != "ann"', False),
        ("{{files | length}} == 2 or {{unknown}}", True),
        ("not {{yes}}", False),
        ("{{name}} in ['ann', 'bob']", True),
        ("{{name}} not in ['bob']", True),
        ("{{nothing}}", False),
        ("{{name}}", True),
        ("'false'", False),
        ("true", True),
        ("1 < {{n}} < 5", True),
    ],
)
def test_a_condition_holds_or_not(condition: str, held: bool) -> None:
    templates.check_condition(condition)
    assert templates.holds(condition, KNOWN) is held


@pytest.mark.parametrize(
    "condition", ["", "{{n}} >", "'a {{name}}' == 'a ann'", "{{n}} === 3", "n; n", "}} {{"]
)
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(InvalidWorkflow):
        templates.check_condition(condition)


def test_a_text_does_not_grow_without_end() -> None:
    known = {"long": "x" * (1 << 20)}
    with pytest.raises(InvalidWorkflow, match="too long"):
        templates.Rendering(known).text("{{long}}" * 17)


LONG = {"a": "x" * 1_000_000, "many": ["x" * 1_000_000] * 3}


@pytest.mark.parametrize(
    "value",
    [
        "{{ " + " ~ ".join(["a"] * 3000) + " }}",
        {"data": ["{{a}}"] * 3000},
        {f"k{number}": "{{many}}" for number in range(100)},
        ["<{{a}}>"] * 100,
        ["{{a | upper}}"] * 100,
        ["{{many | tojson}}"] * 100,
        "{{ [" + "a, " * 3000 + "] }}",
        "{{ [[a, a, a, a], [a, a, a, a], [a, a, a, a], [a, a, a, a], [a, a, a, a]] | length }}",
        "{{ ['', '', '', '', '', '', '', '', '', '', '', '', '', '', '', '', '', ''] | join(a) }}",
        "{{ [many | string, many | string, many | string] | join('-') }}",
        {"a": [{"b": "{{a}}"}] * 9, "c": "{{a}}{{a}}{{a}}{{a}}{{a}}{{a}}{{a}}{{a}}{{a}}"},
    ],
)
def test_all_that_templates_give_together_has_a_limit(value: Any) -> None:
    templates.check(value)
    tracemalloc.start()
    try:
        with pytest.raises(
            InvalidWorkflow, match="too long: the templates give or compare more than 16777216"
        ):
            templates.render(value, LONG)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "one",
    ["2 in many", "'z' not in a", "many == many", "a < a", "'y' ~ '' in a", "n | int", "n | float"],
)
def test_what_is_compared_counts_too(one: str) -> None:
    known = {"a": "x" * (1 << 20), "n": "0" * 4_000 + " " * (1 << 20), "many": [1] * (1 << 19)}
    condition = " or ".join([f"({one}) == 'never'"] * 20)
    templates.check_condition(condition)
    templates.holds(one, known)
    with pytest.raises(InvalidWorkflow, match="give or compare more than 16777216"):
        templates.holds(condition, known)


def test_what_cannot_be_alike_and_what_a_name_is_looked_up_in_cost_nothing() -> None:
    rendering = templates.Rendering({"many": [1] * 100, "named": {"k": [1] * 100}}, bytes_max=50)
    assert not rendering.holds("many == 1 or many == none")
    assert rendering.holds("'k' in named and named.k")


def test_what_is_not_there_is_told_only_to_whom_asks() -> None:
    told = []

    class Known(dict[str, Any]):
        def __iter__(self) -> Iterator[str]:
            told.append("names")
            return super().__iter__()

    known = Known(inner=Known(a=1))
    assert templates.holds("b is undefined and inner.b is undefined", known)
    assert templates.Rendering(known).text("{{ inner.b | default(1) }}") == 1
    assert told == []
    with pytest.raises(InvalidWorkflow, match="there are a"):
        templates.Rendering(known).text("{{ inner.b }}")


def test_what_is_only_asked_for_is_not_looked_up() -> None:
    class Known(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            pytest.fail(f"{name} was looked up")

    known = Known(a=1)
    text = "{{[a is defined, a is undefined, b is defined, b is undefined]}}"
    assert templates.Rendering(known).text(text) == [True, False, False, True]


def test_texts_that_are_filled_in_one_by_one_share_a_limit() -> None:
    rendering = templates.Rendering({"a": "x" * 10}, bytes_max=25)
    assert [rendering.text("{{a}}"), rendering.text("{{a}}")] == ["x" * 10] * 2
    with pytest.raises(InvalidWorkflow, match="too long"):
        rendering.text("{{a}}")


def test_what_is_known_is_given_whole_however_long_it_is() -> None:
    known = {"each": {"results": ["x" * (1 << 20)] * 20}}
    assert templates.render("{{each.results}}", known) is known["each"]["results"]
    assert templates.render("{{each['results'][19]}}", known) == "x" * (1 << 20)
    assert templates.holds("{{each.results}}", known)
    assert templates.render(["{{each.results | length}}"], known) == [20]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ " + "9" * 5000 + " }}", "digits"),
        ("{{ " + "9" * 4000 + " }}", "too many digits"),
        ("{{ 1e999 }}", "not finite"),
        (r"{{ '\ud800' }}", "surrogates not allowed"),
        ("{{ " + "n + " * 5000 + "n }}", "bytes of templates in one text"),
        ("{{n}}" * 5000, "bytes of templates in one text"),
        ("{{ '}}' ~ " + "n ~ " * 5000 + "'{{' }}", "bytes of templates in one text"),
        ("{{ {'a': {'b': 1}} ~ " + "n ~ " * 5000 + "n }}", "bytes of templates in one text"),
        ("\0{% if " + "n ~ " * 5000 + "n %}\0 {{n}} \0{% endif %}\0", "only {{…}} is known"),
    ],
)
def test_a_template_that_costs_too_much_is_refused_before_it_runs(text: str, why: str) -> None:
    with pytest.raises(InvalidWorkflow, match=why):
        templates.check(text)
    with pytest.raises(InvalidWorkflow, match=why):
        templates.Rendering(KNOWN).text(text)


@pytest.mark.parametrize("text", ["{{big * big}}", "{{'1e400' | float}}", "{{1e300 * 1e300}}"])
def test_numbers_do_not_grow_without_end(text: str) -> None:
    templates.check(text)
    with pytest.raises(InvalidWorkflow, match="it has no value: a number"):
        templates.Rendering({"big": 10**1000}).text(text)


def test_a_sum_of_many_is_too_deep_and_nothing_worse() -> None:
    text = "{{ " + "1 + " * 3000 + "1 }}"
    templates.check(text)
    with pytest.raises(InvalidWorkflow, match="too deep"):
        templates.Rendering({}).text(text)


def test_long_texts_may_stand_around_short_templates() -> None:
    text = "{ } " * 100_000 + "{{n}}"
    assert templates.check(text).size_bytes == len("{{n}}")
    assert templates.Rendering(KNOWN).text(text) == "{ } " * 100_000 + "3"


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("plain {% set a = b %}", []),
        ("{{a}} {{b.c[d]}}", ["a", "b", "d"]),
        ("{{'{{a}}' ~ b}}", ["b"]),
        ("{{a + b * -c}} {{[d, not e]}}", ["a", "b", "c", "d", "e"]),
        ("{{a | join(b) | upper}}", ["a", "b"]),
        ("{{a is none}}", ["a"]),
        ("{{a is defined}} {{a.b is undefined}}", []),
        ("{{a.b | default(c)}} {{(a ~ b) | default}}", ["c"]),
        ("{{a and b or c}}", ["a"]),
        ("{{a is defined and a > 3}}", []),
        ("{{a < b < c}}", ["a", "b"]),
        ("{{a in b}}", ["a", "b"]),
    ],
)
def test_the_names_that_a_template_cannot_do_without(text: str, reads: list[str]) -> None:
    found = templates.check([{"x": text}]).reads
    assert sorted(found) == reads
    assert set(found.values()) <= {text}
    for name in reads:  # as it is when they are filled in
        known = {one: 1 for one in reads if one != name}
        with pytest.raises(InvalidWorkflow):
            templates.Rendering(known).text(text)


def test_the_names_that_a_condition_cannot_do_without() -> None:
    assert sorted(templates.check_condition("{{a}} == 'x' and {{b}} > 3").reads) == ["a"]
    assert sorted(templates.check_condition("'{{a}}' != b").reads) == ["a", "b"]


def test_a_long_condition_is_refused_at_once() -> None:
    with pytest.raises(InvalidWorkflow, match="a condition of more than"):
        templates.check_condition("{{" * 500_000)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=json_values)
def test_any_value_comes_through_as_it_is(value: Any) -> None:
    assert templates.render("{{value}}", {"value": value}) == value


@given(text=st.text())
def test_any_text_is_filled_in_or_refused(text: str) -> None:
    try:
        templates.Rendering(KNOWN).text("{{" + text)
    except InvalidWorkflow:
        pass
