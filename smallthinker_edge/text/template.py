"""Chat templates in Jinja2 as transformers runs them, but bounded in time and size.

Called by chat.py. A template is a program from a file: it runs in Jinja2's sandbox, which keeps it from everything
outside, and here also within limits: a clock that loops and calls look at, a count of the characters that it makes,
and estimates before what could make many at once (repeating, joining, padding, formatting). Knows nothing of tokens.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from smallthinker_edge.errors import ChatTemplateError
from smallthinker_edge.printable import printable

MAX_SOURCE = 1 << 17  # characters; the longest templates in use have 20,000
MAX_TEXT = 1 << 22  # characters of one value; 25 times what the released models' context holds
MAX_MADE = 1 << 26  # characters and items made in one rendering, all together
MAX_SECONDS = 5.0  # of this thread's processor time; templates in use take under 0.05
MAX_WIDTH = 10_000  # of padding, indentation and rows
MAX_BITS = 4096  # of an integer
SLOW = frozenset({"wordwrap", "urlize", "striptags", "pprint", "xmlattr"})
MAX_SLOW = 100_000
PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "round"})
WIDE = re.compile(r"\d{5}")
NESTED_FIELD = re.compile(r"\{[^{}]*\{")
STAR = re.compile(r"%[^%a-zA-Z]*\*")


class LimitExceeded(TemplateError):
    """A template ran too long or made too much."""


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.deadline = time.thread_time() + MAX_SECONDS
        self.left = MAX_MADE

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise LimitExceeded(f"it makes more than {MAX_MADE} characters")
        if time.thread_time() > self.deadline:
            raise LimitExceeded(f"it runs for more than {MAX_SECONDS:g} s")

    def made(self, value: Any) -> Any:
        """Counts a new value, shallowly: what it holds has been counted before."""
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise LimitExceeded("it computes with huge numbers")
        self.spend(len(value) if isinstance(value, str | bytes | list | tuple | dict | set) else 1)
        return value


_budget: ContextVar[Budget] = ContextVar("budget")


def weigh(values: Iterable[Any]) -> int:
    """Characters that values would have as text, about; LimitExceeded above MAX_TEXT, however they are nested."""
    total, waiting = 0, list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            total += len(value) + 2
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
            total += 2
        else:
            total += 8 * len(value) if isinstance(value, range) else 8
        _check_size(total + len(waiting))
    return total


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise LimitExceeded(f"it makes a text of more than {MAX_TEXT} characters")


def _check_call(name: str, subject: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raises LimitExceeded where a filter or a method of a text could make far more than it is given."""
    _budget.get().spend(1)
    values = [*arguments, *named.values()]
    weight = weigh([subject, *values])
    if name in PADDING:
        if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in values):
            raise LimitExceeded(f"{name} by more than {MAX_WIDTH}")
        text = subject if isinstance(subject, str) else ""
        widths = [value if isinstance(value, int) else len(value) for value in values if isinstance(value, int | str)]
        _check_size((text.count("\n") + text.count("\t") + 1) * max(widths, default=4))
    elif name == "replace" and isinstance(subject, str):
        texts = [value for value in values if isinstance(value, str)]
        found = subject.count(texts[0]) if texts else 0
        _check_size(len(subject) + found * (len(texts[1]) if len(texts) > 1 else 0))
    elif name == "join":
        parts = max((len(value) for value in (subject, *values) if isinstance(value, Sized)), default=0)
        separators = [value for value in (subject, *values) if isinstance(value, str)]
        _check_size(weight + parts * max(map(len, separators), default=0))
    elif name in ("format", "format_map"):  # the filter's marks are those of %
        _check_format(subject, "{", weight)
        _check_format(subject, "%", weight)
    elif name == "translate":
        raise LimitExceeded("translate is not allowed")
    elif name == "sum" and any(isinstance(value, list | tuple) for value in values):
        raise LimitExceeded("sum of lists")
    elif name == "wordwrap" and any(isinstance(value, str) and len(value) > 10 for value in values):
        raise LimitExceeded("wordwrap with a long text between the lines")
    if name in SLOW and weight > MAX_SLOW:
        raise LimitExceeded(f"{name} of more than {MAX_SLOW} characters")
    if name in ("tojson", "urlencode", "escape", "e", "forceescape"):
        _check_size(6 * weight)


def _listed(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """For a join, what iterators among the arguments give: otherwise nobody knows how much that is."""
    if name != "join":
        return arguments
    return tuple(list(value) if isinstance(value, Iterator) else value for value in arguments)


def _check_format(text: Any, mark: str, weight: int) -> None:
    """Of a format text: no widths of five digits, none from elsewhere, and a result of bounded size."""
    if not isinstance(text, str | bytes):
        return
    source = text if isinstance(text, str) else text.decode("latin-1")
    if WIDE.search(source) or (NESTED_FIELD.search(source) if mark == "{" else STAR.search(source)):
        raise LimitExceeded("it formats with a width that is huge or computed")
    _check_size(len(source) + source.count(mark) * (weight + 10_000))


class Bounds(NodeTransformer):
    """Makes loops and macros count, and joins of texts (~) measurable."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._step(node.body))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._step(node.body))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._step(node.body))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("concat_texts"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Nested lists that share their parts are small to build and take forever to compare."""
        self.generic_visit(node)
        if sum(not isinstance(operand, nodes.Const) for operand in [node.expr, *(op.expr for op in node.ops)]) > 1:
            node.expr = self._weighed(node.expr)
            for op in node.ops:
                op.expr = self._weighed(op.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._weighed(node.key)
        return node

    def _weighed(self, node: nodes.Expr) -> nodes.Expr:
        if isinstance(node, nodes.Const):
            return node
        return nodes.Call(nodes.EnvironmentAttribute("weighed"), [node], [], None, None, lineno=node.lineno)

    def _step(self, body: list[nodes.Node]) -> nodes.Node:
        """A statement that spends as many characters as the body holds of plain text."""
        plain = sum(len(data.data) for node in body for data in [*node.find_all(nodes.TemplateData)])
        call = nodes.Call(nodes.EnvironmentAttribute("step"), [nodes.Const(plain + 1)], [], None, None)
        return nodes.ExprStmt(call).set_lineno(body[0].lineno if body else 1)


class Generation(Extension):
    """{% generation %} marks what a model said, for training; here it is a scope and nothing else."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox with limits, and with the names that transformers gives to templates."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, Generation],
            finalize=_finalize,
        )  # fmt: skip
        self.filters["tojson"] = _to_json
        for functions in (self.filters, self.tests):
            for name, function in list(functions.items()):
                functions[name] = _bounded(name, function)
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def compile_bounded(self, source: str) -> Template:
        code = self.compile(Bounds().visit(self.parse(source)))
        return self.template_class.from_code(self, code, self.make_globals(None))

    def step(self, plain: int) -> None:
        _budget.get().spend(plain)

    def weighed(self, value: Any) -> Any:
        weigh((value,))
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        weigh((argument,))
        return super().getitem(obj, argument)

    def concat_texts(self, *values: Any) -> str:
        weigh(values)
        return "".join(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        method = getattr(__obj, "__wrapped__", __obj)
        name = getattr(method, "__name__", "")
        args = _listed(name, args)
        _check_call(name, getattr(method, "__self__", None), args, kwargs)
        return _budget.get().made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        weight = weigh((left, right))
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(text, str | bytes | list | tuple):
                    _check_size(len(text) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > MAX_BITS:
                raise LimitExceeded("it computes with huge numbers")
        elif operator == "%":
            _check_format(left, "%", weight)
        return _budget.get().made(super().call_binop(context, operator, left, right))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that looks at the limits first, and counts what it made. Jinja2 may put its environment or
    context before the value."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*arguments: Any, **named: Any) -> Any:
        arguments = _listed(name, arguments)
        value, rest = arguments[skip : skip + 1], arguments[skip + 1 :]
        _check_call(name, value[0] if value else None, rest, named)
        return _budget.get().made(function(*arguments, **named))

    return bounded


def _finalize(value: Any) -> str:
    """What an expression shows, counted."""
    weigh((value,))
    text = str(value)
    _budget.get().spend(len(text))
    return text


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where Jinja2's own filter escapes it for HTML."""
    if indent is not None and (not isinstance(indent, int) or not 0 <= indent <= 16):
        raise TemplateError(f"tojson: indent must be 0 to 16, not {indent!r:.40}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 200 or re.search(r"\d{3}", format):
        raise TemplateError("strftime_now: a format of more than 200 characters, or a width of more than two digits")
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment()


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    if len(source) > MAX_SOURCE:
        raise LimitExceeded(f"it has more than {MAX_SOURCE} characters")
    return _environment().compile_bounded(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of plain data (what JSON can hold).

    Raises ChatTemplateError for whatever goes wrong in the template: its own raise_exception, a mistake in it, or one
    of the limits. Several threads may render at the same time.
    """
    token = _budget.set(Budget())
    try:
        return _compiled(source).render(variables)
    except Exception as error:  # a template is a program from a file: whatever it does wrong is its error
        message = " ".join(str(error).split()) or type(error).__name__
        raise ChatTemplateError(printable(f"the model's chat template failed: {message:.500}")) from error
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=8)
def mentioned(source: str) -> frozenset[str]:
    """Everything a template's program says: its kinds of statements and expressions, names, attributes and texts. What
    stands between its tags is left out.

    Raises ChatTemplateError where it cannot be read.
    """
    try:
        if len(source) > MAX_SOURCE:
            raise LimitExceeded(f"it has more than {MAX_SOURCE} characters")
        tree = _environment().parse(source)
        found = set()
        for node in tree.find_all(nodes.Node):
            found.add(type(node).__name__)
            if not isinstance(node, nodes.TemplateData):
                found |= {str(value) for _, value in node.iter_fields() if isinstance(value, str | int | float)}
    except Exception as error:
        raise ChatTemplateError(printable(f"the model's chat template failed: {error}")) from error
    return frozenset(found)
