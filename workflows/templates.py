"""Templates: `{{…}}` in a workflow's definition, filled in with what its run knows.

A text that is one template and nothing else gives the value itself, such as a list; within a
text a string stands as it is and any other value as JSON.

    {{upload_request.event_name}}    members and numbers: {{files[0].name}}, {{files.0.name}}
    {{item}} {{index}}               inside of a foreach; `loop` has index (from 1), index0, length
    {{count > 3 and not done}}       comparisons, and, or, not, in, + - *, ~ joins texts
    {{names | length}}               default, first, int, float, join, last, length, lower, string,
                                     tojson, trim, upper; `is defined`, `is none`

The grammar is Jinja's, and so is the parser; what it parses is walked here and never becomes
code, nothing of Python can be reached from it, and there are no loops: whoever may submit a
workflow gets no more than the values of the run. What a template gave is not looked at again,
so a text with braces from outside stays a text.

A template of a kilobyte may name a megabyte a hundred times. All that the templates of one
rendering give together has a limit in bytes; a text is counted when it is made, and when it is
given. So is what is compared or searched, each time: a condition may do that as often.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar, final

import msgspec
from jinja2 import Environment, TemplateSyntaxError, nodes

from cas.errors import InvalidTemplate

RENDERED_BYTES_MAX: Final = 16 << 20  # of all that one rendering gives, as JSON
EXPRESSION_BYTES_MAX: Final = 16 << 10  # of all templates in one text: their trees take far more
CONDITION_CHARS_MAX: Final = 4 << 10
_NUMBER_BITS_MAX: Final = 4096
_CACHED_CHARS_MAX: Final = 2 << 10  # the tree of a longer text is not kept
_SHOWN_CHARS: Final = 120  # of a template, in an error
_NAMES_SHOWN: Final = 20

# Only expressions: statements and comments begin with what no text has.
_GRAMMAR: Final = Environment(
    block_start_string="\0{%",
    block_end_string="%}\0",
    comment_start_string="\0{#",
    comment_end_string="#}\0",
    keep_trailing_newline=True,
    autoescape=False,  # noqa: S701  it gives values, no HTML
)

_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda one, many: one in many,
    "notin": lambda one, many: one not in many,
}
_LONG: Final = (str, Mapping, Sequence)
# A template in a condition, or a text in quotes, whose templates are another matter.
_PIECES: Final = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|\{\{(.*?)\}\}", re.DOTALL)
# As far as a template goes, to its braces; ours have none inside of it but in quotes.
_EXPRESSION: Final = re.compile(
    r"\{\{(?:[^'\"{}]+|\}(?!\})|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")*+", re.DOTALL
)
_ONE_TEMPLATE: Final = re.compile(r"\s*\{\{((?:(?!\{\{|\}\}).)*)\}\}\s*", re.DOTALL)


_Made = TypeVar("_Made")


class _Unknown(Exception):
    """A name or member that is not there. `words` say which, and what there is: many names take
    their time, and `is defined` wants none of them."""

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__()
        self.words = words


class _TooMuch(Exception):
    """The templates of one rendering gave more than they may."""


@final
class Rendering:
    """Fills in templates with what is known; all that they give has one limit together."""

    def __init__(self, known: Mapping[str, Any], bytes_max: int = RENDERED_BYTES_MAX) -> None:
        self._known = known
        self._bytes_max = bytes_max
        self._left = bytes_max

    def value(self, value: Any) -> Any:
        """`value` with the templates in all its texts filled in, however deep they are.

        Raises InvalidTemplate with the template and the reason.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(member) for key, member in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            return [self.value(member) for member in value]
        return value

    def text(self, text: str) -> Any:
        """The value of a text that is one template; any other text with its templates filled in.

        Raises InvalidTemplate.
        """
        return self._filled(text, _parsed(text)) if "{{" in text else text

    def whole(self, value: Any) -> Any:
        """`value` filled in, as `Rendering.value` does it; where it is one name and nothing else,
        what is known is given as it is, however long: nothing is made, and nothing repeated."""
        if isinstance(value, str) and "{{" in value and _is_path(parts := _parsed(value)):
            return self._filled(value, parts, kept=False)
        return self.value(value)

    def holds(self, condition: str) -> bool:
        """Whether a condition holds, such as `{{total}} > 3 and {{state}} == 'ready'`.

        "" and "false" do not, as do not 0, null and what is empty. Raises InvalidTemplate.
        """
        value = self._filled(condition, (_expression(condition),), kept=False)
        return bool(value) and not (isinstance(value, str) and value.strip().lower() == "false")

    def _filled(self, text: str, parts: tuple[str | nodes.Expr, ...], *, kept: bool = True) -> Any:
        try:
            for part in parts:
                if not isinstance(part, str):
                    _check(text, part)
            walk = _Walk(self._known, self._spend)
            if len(parts) == 1 and not isinstance(parts[0], str):
                value = walk.of(parts[0])
                return walk.spent(value) if kept else value
            return "".join(
                walk.spent(part if isinstance(part, str) else spelt(walk.of(part)))
                for part in parts
            )
        except _Unknown as error:
            raise InvalidTemplate(_shown(text), error.words()) from None
        except _TooMuch:
            what = "the templates give or compare more than"
            reason = f"too long: {what} {self._bytes_max} bytes together"
            raise InvalidTemplate(_shown(text), reason) from None
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidTemplate(_shown(text), f"it has no value: {error}") from None
        except RecursionError:
            raise InvalidTemplate(_shown(text), "a template is too deep") from None

    def _spend(self, size_bytes: int) -> None:
        self._left -= size_bytes
        if self._left < 0:
            raise _TooMuch


def render(value: Any, known: Mapping[str, Any]) -> Any:
    """`Rendering.value`, of one value alone.

    Raises InvalidTemplate with the template and the reason.
    """
    return Rendering(known).whole(value)


def holds(condition: str, known: Mapping[str, Any]) -> bool:
    """`Rendering.holds`, of one condition alone. Raises InvalidTemplate."""
    return Rendering(known).holds(condition)


@final
class Checked(NamedTuple):
    """What is known of templates before they are filled in."""

    size_bytes: int  # of the templates, without the texts around them
    # The names that they cannot do without, whatever the values are; each with the beginning of
    # a text that reads it. Not what is only asked for (`is defined`), nor what `default` stands
    # in for, nor what `and`, `or` and a row of comparisons may never come to.
    reads: Mapping[str, str]


def check(value: Any) -> Checked:
    """The templates in `value`; whether its names are known is looked at by nobody here.

    Raises InvalidTemplate where one of them cannot be read.
    """
    reads: dict[str, str] = {}
    return Checked(_check_all(value, reads), reads)


def _check_all(value: Any, reads: dict[str, str]) -> int:
    if isinstance(value, str):
        if "{{" not in value:
            return 0
        for part in _parsed(value):
            if not isinstance(part, str):
                _check(value, part)
                _take_reads(value, part, reads)
        return _expression_bytes(value)
    if isinstance(value, Mapping):
        return sum(_check_all(member, reads) for member in value.values())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return sum(_check_all(member, reads) for member in value)
    return 0


def divided(text: str) -> list[str]:
    """A text cut at its templates: every second piece is one, with its braces. One without an
    end is none."""
    pieces, begin = [], 0
    for start, end in _templates_in(text):
        if end < 0:
            break
        pieces += [text[begin:start], text[start:end]]
        begin = end
    return [*pieces, text[begin:]]


def check_condition(condition: str) -> Checked:
    """A condition, all of which counts; raises InvalidTemplate where it cannot be read."""
    expression = _expression(condition)
    _check(condition, expression)
    reads: dict[str, str] = {}
    _take_reads(condition, expression, reads)
    return Checked(len(condition.encode(errors="replace")), reads)


# --- reading


def _parsed(text: str) -> tuple[str | nodes.Expr, ...]:
    """Its texts and templates, in order."""
    return _kept_parts(text) if len(text) <= _CACHED_CHARS_MAX else _parts(text)


def _templates_in(text: str) -> Iterator[tuple[int, int]]:
    """Where its templates begin and end. An end of -1 is of what only Jinja can read, and the
    last."""
    start = text.find("{{")
    while start >= 0:
        found = _EXPRESSION.match(text, start)
        end = -1 if found is None else found.end()
        if not text.startswith("}}", end):
            yield start, -1
            return
        yield start, end + 2
        start = text.find("{{", end + 2)


def _expression_bytes(text: str) -> int:
    """How long its templates are together, known before they are read."""
    return sum(
        len(text[start : end if end >= 0 else None].encode(errors="replace"))
        for start, end in _templates_in(text)
    )


def _parts(text: str) -> tuple[str | nodes.Expr, ...]:
    if "\0{" in text:  # where statements and comments begin
        raise InvalidTemplate(_shown(text), "not a template: only {{…}} is known")
    if _expression_bytes(text) > EXPRESSION_BYTES_MAX:
        reason = f"more than {EXPRESSION_BYTES_MAX} bytes of templates in one text"
        raise InvalidTemplate(_shown(text), reason)
    try:
        template = _GRAMMAR.parse(text)
    except TemplateSyntaxError as error:
        raise InvalidTemplate(_shown(text), f"not a template: {error.message}") from None
    except (ValueError, ArithmeticError, SyntaxError) as error:  # of a literal, as Python reads it
        raise InvalidTemplate(_shown(text), f"not a template: {error}") from None
    except RecursionError:
        raise InvalidTemplate(_shown(text), "a template is too deep") from None
    parts: list[str | nodes.Expr] = []
    for output in template.body:
        if not isinstance(output, nodes.Output):
            raise InvalidTemplate(_shown(text), "not a template: only {{…}} is known")
        parts += (
            node.data if isinstance(node, nodes.TemplateData) else node for node in output.nodes
        )
    return tuple(parts)


_kept_parts: Final = lru_cache(maxsize=512)(_parts)


def _expression(condition: str) -> nodes.Expr:
    """The expression that a condition is. `{{x}} > 3`, `x > 3`, `{{x > 3}}` and
    `'{{state}}' == 'ready'` are all written by somebody."""

    def bare(piece: re.Match[str]) -> str:
        inside = piece[3]
        if inside is None:
            quoted = piece[1] if piece[1] is not None else piece[2]
            if "{{" not in quoted:
                return piece[0]
            whole = _ONE_TEMPLATE.fullmatch(quoted)
            if whole is None:
                raise InvalidTemplate(_shown(condition), "a template stands within a text")
            inside = whole[1]
        return f"({inside})"

    if len(condition) > CONDITION_CHARS_MAX:  # before the pattern, which looks ahead at each brace
        reason = f"a condition of more than {CONDITION_CHARS_MAX} characters"
        raise InvalidTemplate(_shown(condition), reason)
    parts = _parsed("{{" + _PIECES.sub(bare, condition) + "}}")
    if len(parts) != 1 or isinstance(parts[0], str):
        raise InvalidTemplate(_shown(condition), "not a condition")
    return parts[0]


def _is_path(parts: tuple[str | nodes.Expr, ...]) -> bool:
    """Whether it names one value that is known, such as `{{files[0].name}}`."""
    if len(parts) != 1 or isinstance(parts[0], str):
        return False
    node: nodes.Node = parts[0]
    while isinstance(node, nodes.Getattr | nodes.Getitem):
        node = node.node
    return isinstance(node, nodes.Name)


def _check(text: str, node: nodes.Node) -> None:
    for each in _all_of(node):
        if isinstance(each, nodes.Filter):
            if each.name not in _FILTERS and each.name != "default":
                raise InvalidTemplate(_shown(text), f"there is no filter {each.name!r}")
        elif isinstance(each, nodes.Test):
            if each.name not in ("defined", "undefined", "none"):
                raise InvalidTemplate(_shown(text), f"there is no test {each.name!r}")
        elif isinstance(each, nodes.Const):
            _check_literal(text, each.value)
        elif not isinstance(each, _KNOWN):
            kind = type(each).__name__.lower()
            raise InvalidTemplate(_shown(text), f"a template has no {kind}")


def _take_reads(text: str, node: nodes.Node, reads: dict[str, str]) -> None:
    """Add the names that an expression reads in any case: see `Checked`, and `_Walk`."""
    rest = [node]
    while rest:
        match rest.pop():
            case nodes.Getattr() as each:  # most of what is long; `iter_child_nodes` takes longer
                rest.append(each.node)
            case nodes.Name() as each:
                reads.setdefault(each.name, _shown(text))
            case nodes.And() | nodes.Or() as each:
                rest.append(each.left)
            case nodes.Compare() as each:
                rest += (each.expr, each.ops[0].expr)
            case nodes.Filter(name="default") as each:
                rest += each.args
            case nodes.Test(name="defined" | "undefined"):
                pass
            case each:
                rest += each.iter_child_nodes()


def _check_literal(text: str, value: Any) -> None:
    try:
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _number(value)
    except (ValueError, ArithmeticError) as error:
        raise InvalidTemplate(_shown(text), f"not a template: {error}") from None


def _all_of(node: nodes.Node) -> Iterator[nodes.Node]:
    rest = [node]
    while rest:
        each = rest.pop()
        yield each
        rest += each.iter_child_nodes()


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


# --- the values


def spelt(value: Any) -> str:
    """A value as it stands within a text: a string as it is, any other as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _size_bytes(value: Any) -> int:
    """The size of a value as JSON, about."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, Mapping | Sequence):
        return len(msgspec.json.encode(value))
    return 8


class _Walk:
    """Finds the value of an expression; tells `spend` the size of each value that it makes."""

    def __init__(self, known: Mapping[str, Any], spend: Callable[[int], None]) -> None:
        self._known = known
        self._spend = spend

    def spent(self, made: _Made) -> _Made:
        """What was made, counted."""
        self._spend(_size_bytes(made))
        return made

    def of(self, node: nodes.Node) -> Any:
        match node:
            case nodes.Const():
                return node.value
            case nodes.Name():
                return self._named(node.name)
            case nodes.Getattr():
                return _member(self.of(node.node), node.attr)
            case nodes.Getitem():
                return _member(self.of(node.node), self.of(node.arg))
            case nodes.List() | nodes.Tuple():
                return [self.spent(self.of(item)) for item in node.items]
            case nodes.Compare():
                return self._compared(node)
            case nodes.And():
                return self.of(node.left) and self.of(node.right)
            case nodes.Or():
                return self.of(node.left) or self.of(node.right)
            case nodes.Not():
                return not self.of(node.node)
            case nodes.Neg():
                return -_number(self.of(node.node))
            case nodes.Add():
                return _number(_number(self.of(node.left)) + _number(self.of(node.right)))
            case nodes.Sub():
                return _number(_number(self.of(node.left)) - _number(self.of(node.right)))
            case nodes.Mul():
                return _number(_number(self.of(node.left)) * _number(self.of(node.right)))
            case nodes.Concat():
                return "".join(self.spent(spelt(self.of(part))) for part in node.nodes)
            case nodes.Test():
                return self._tested(node)
            case nodes.Filter() if node.node is not None:
                return self._filtered(node, node.node)
        raise TypeError(f"a template has no {type(node).__name__.lower()}")

    def _named(self, name: str) -> Any:
        if name in self._known:
            return self._known[name]

        def words() -> str:
            names = sorted(self._known)[:_NAMES_SHOWN]
            there = f"there are {', '.join(names)}" if names else "nothing is known yet"
            return f"nothing is named {name!r}; {there}"

        raise _Unknown(words)

    def _compared(self, node: nodes.Compare) -> bool:
        left = self.of(node.expr)
        for operand in node.ops:
            right = self.of(operand.expr)
            self._spend_on(operand.op, left, right)
            if not _COMPARISONS[operand.op](left, right):
                return False
            left = right
        return True

    def _spend_on(self, comparison: str, left: Any, right: Any) -> None:
        """Count what a comparison looks at: both sides, but not what a name is looked up in,
        nor what has another form than the other side."""
        if comparison in ("in", "notin"):
            self.spent(left)
            if not isinstance(right, Mapping):
                self.spent(right)
        elif isinstance(left, _LONG) and isinstance(right, _LONG):
            self.spent(left)
            self.spent(right)

    def _tested(self, node: nodes.Test) -> bool:
        if node.name != "none" and isinstance(node.node, nodes.Name):  # nothing needs to be read
            return (node.node.name in self._known) is (node.name == "defined")
        try:
            value = self.of(node.node)
        except _Unknown:
            if node.name == "none":
                raise
            return node.name == "undefined"
        return value is None if node.name == "none" else node.name == "defined"

    def _filtered(self, node: nodes.Filter, inner: nodes.Expr) -> Any:
        given = [self.of(argument) for argument in node.args]
        if node.name == "default":
            (other,) = given or [""]
            try:
                value = self.of(inner)
            except _Unknown:
                return other
            return other if value is None else value
        value = self.of(inner)
        if node.name == "join":
            return self._joined(value, *given)
        if node.name in ("int", "float"):  # of a text they read it all
            self.spent(value)
        found = _FILTERS[node.name](value, *given)
        return self.spent(found) if isinstance(found, str) else found

    def _joined(self, values: Any, between: Any = "") -> str:
        if not isinstance(values, list):
            raise TypeError(f"{_kind(values)} is no list")
        self._spend(_size_bytes(_text(between)) * len(values))
        return str(between.join(self.spent(spelt(value)) for value in values))


def _member(value: Any, name: Any) -> Any:
    """A member of an object, or an element of a list."""
    if isinstance(value, Mapping):
        if name in value:
            return value[name]
        raise _Unknown(lambda: f"there is no {name!r}; there are {_names_in(value)}")
    if isinstance(value, list) and isinstance(name, int) and not isinstance(name, bool):
        if -len(value) <= name < len(value):
            return value[name]
        raise _Unknown(lambda: f"there is no element {name}; there are {len(value)}")
    raise _Unknown(lambda: f"there is no {name!r} in {_kind(value)}")


def _names_in(value: Mapping[Any, Any]) -> str:
    return ", ".join(sorted(map(str, value))[:_NAMES_SHOWN]) or "no members"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "a list")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_kind(value)} is no number")
    if isinstance(value, int):
        if value.bit_length() > _NUMBER_BITS_MAX:
            raise ValueError("a number of too many digits")
    elif not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_kind(value)} is no text")
    return value


_FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "first": lambda values: _member(values, 0),
    "last": lambda values: _member(values, -1),
    "length": len,
    "lower": lambda text: _text(text).lower(),
    "upper": lambda text: _text(text).upper(),
    "trim": lambda text: _text(text).strip(),
    "string": spelt,
    "int": lambda value: _number(int(value)),
    "float": lambda value: _number(float(value)),
    "join": str,  # see `_Walk._joined`, which counts what it puts together
    "tojson": lambda value: msgspec.json.encode(value).decode(),
}
_KNOWN: Final = (
    nodes.Const,
    nodes.Name,
    nodes.Getattr,
    nodes.Getitem,
    nodes.List,
    nodes.Tuple,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Neg,
    nodes.Add,
    nodes.Sub,
    nodes.Mul,
    nodes.Concat,
)
