"""A jinja environment for templates of unknown origin, which renders in bounded time and memory.

Attributes and calls are those of jinja's immutable sandbox. Beyond it, everything that a template makes is paid for
from a budget of characters: values when they are printed, joined or put into a container, results of calls, and, before
it exists, what an operation can make of small operands. Every payment and every turn of a loop looks at the clock.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SOURCE = 2**20
"""Most characters of a template."""
CHARACTERS, PER_CHARACTER = 2**24, 64
"""Characters that one rendering may make, and how many more for each of the conversation."""
SECONDS = 10.0
"""Longest time of one rendering."""
BITS = 2**17
"""Largest integer."""
WIDTH = 1000
"""Digits of a width in a format string come to less than this."""

_FORMATS = {"%", "format", "format_map"}
_GROWING = {*_FORMATS, "*", "indent", "join", "replace", "rsplit", "tojson"}
"""Filters, methods and operators whose results, or times, can be as large as the product of their operands."""
_REFUSED = {"batch", "center", "expandtabs", "from_bytes", "ljust", "pprint", "rfind", "rindex", "rjust", "round"} | {
    *("rpartition", "slice", "striptags", "to_bytes", "translate", "urlize", "wordwrap", "xmlattr", "zfill")
}
"""The same, of no use for conversations."""

_budget: ContextVar[list[float]] = ContextVar("budget")  # characters left, and the deadline


@contextlib.contextmanager
def budget(characters: int) -> Iterator[None]:
    """The limits for rendering a conversation of this many characters inside the block.

    Outside of it nothing can be paid, so that jinja cannot replace payments by their results when it compiles.
    """
    token = _budget.set([CHARACTERS + PER_CHARACTER * characters, time.monotonic() + SECONDS])
    try:
        yield
    finally:
        _budget.reset(token)


def spend(characters: int) -> None:
    """Take from the budget.

    Raises:
      SecurityError: when it is used up.
    """
    left = _budget.get()
    left[0] -= abs(characters)
    if left[0] < 0:
        raise SecurityError(f"it would make more than {CHARACTERS:,} characters, the limit for a conversation")
    if time.monotonic() > left[1]:
        raise SecurityError(f"it takes longer than {SECONDS:g} seconds, the limit for a conversation")


def _size(value: Any) -> int:
    """Characters in a value, an item of a container counting as 8 more; for one over the budget, some that are."""
    if isinstance(value, str | bytes):
        return len(value)
    size, most, rest = 0, _budget.get()[0], [value]
    while rest and size <= most:
        value = rest.pop()
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple | range):
            size += 8 * len(value)
            rest.extend(value)
        else:
            size += len(value) if isinstance(value, str | bytes) else 1
    return size


def _pay(value: Any) -> Any:
    if type(value) is not str and isinstance(value, Iterator):  # the first is quick, and nearly all are
        value = list(value)
    spend(_size(value))
    return value


def _check(name: str, operand: Any, others: Iterable[Any]) -> None:
    """Spend what a filter, a method or an operator can make of small operands."""
    if name in _REFUSED:
        raise SecurityError(f"{name} is not available in chat templates")
    if name not in _GROWING:
        return
    if name in _FORMATS and re.search(r"\d{4}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", str(operand)):
        raise SecurityError("a format may have no width over 999, nor one from its values")
    factors = [abs(x) if isinstance(x, int) and name not in _FORMATS else _size(x) for x in others]
    # The text that is replaced has no part in the result.
    spend((_size(operand) + 1) * (max([WIDTH * (name in _FORMATS), *factors[name == "replace" :]]) + 1))


class _Paying(NodeTransformer):
    """Inserts ``_pay`` as a filter, and ``spend`` into loops."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.Output | nodes.Concat):
            node.nodes = [_paid(child) for child in node.nodes]
        elif isinstance(node, nodes.For):
            text = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(_paid(nodes.Const(text), "_spend")))
        elif isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) and getattr(node, "ctx", "load") == "load":
            return _paid(node)
        return node


def _paid(node: nodes.Expr, name: str = "_pay") -> nodes.Expr:
    return node if isinstance(node, nodes.TemplateData) else nodes.Filter(node, name, [], [], None, None)


class _Namespace(Namespace):
    __repr__ = object.__repr__  # jinja's shows all attributes, whose size is unknown


class Sandbox(ImmutableSandboxedEnvironment):
    """See the module's docstring; templates must be rendered inside ``budget``."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_pay": _pay, "_spend": spend}
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Paying().visit(super()._parse(source, name, filename))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        name, operand = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        _check(name, operand, (*args, *kwargs.values()))
        return _pay(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > BITS:
                raise SecurityError("a number is too large")
        elif not isinstance(left, float):
            _check(operator, *((right, (left,)) if isinstance(left, int) else (left, (right,))))
        return _pay(super().call_binop(context, operator, left, right))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is checked and pays for its result."""
    first = int(hasattr(function, "jinja_pass_arg"))  # before the value, such filters receive the context

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check(name, args[first], (*args[first + 1 :], *kwargs.values()))
        return _pay(function(*args, **kwargs))

    return bounded
