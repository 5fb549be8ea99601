"""A jinja environment for templates of unknown origin, which renders in bounded time and memory.

Attributes and calls are those of jinja's immutable sandbox. Beyond it, everything that a template makes is paid for
from a budget of characters before it exists: what it puts into output, text and containers, and the most that a call or
an operator can return. Every payment and every turn of a loop looks at the clock.
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
from jinja2.visitor import NodeTransformer

SOURCE = 2**20
"""Most characters of a template."""
CHARACTERS, PER_CHARACTER = 2**24, 64
"""Characters that one rendering may make, and how many more for each of the conversation."""
SECONDS = 10.0
"""Longest time of one rendering."""
BITS = 2**17
"""Largest integer."""

_ITEM = 8  # characters for an item of a container
_FORMATS = frozenset(("%", "format", "format_map"))
# Filters and methods whose results, or times, can be as large as the product of their operands.
_GROWING = {*_FORMATS, "*", "batch", "center", "indent", "join", "ljust", "replace", "rfind", "rindex", "rjust"} | {
    *("round", "rpartition", "rsplit", "slice", "tojson", "zfill")
}
# Those that return at most an item or a reference for each of their operand's.
_CHEAP = {"count", "d", "default", "first", "get", "items", "keys", "last", "length", "list", "map", "max", "min"} | {
    *("reject", "rejectattr", "reverse", "select", "selectattr", "sort", "sum", "unique", "values")
}
# Slower than that, and of no use for conversations.
_REFUSED = {"expandtabs", "from_bytes", "pprint", "striptags", "to_bytes", "translate", "urlize", "wordwrap", "xmlattr"}

_budget: ContextVar[list[float]] = ContextVar("budget")  # characters left, and the deadline


@contextlib.contextmanager
def budget(characters: int) -> Iterator[None]:
    """Limits for the rendering inside the block, of a conversation of this many characters.

    Raises:
      SecurityError: when they are exceeded.
    """
    token = _budget.set([CHARACTERS + PER_CHARACTER * characters, time.monotonic() + SECONDS])
    try:
        yield
    finally:
        _budget.reset(token)


def spend(characters: int) -> None:
    """Take from the budget in force."""
    left = _budget.get()
    left[0] -= abs(characters)
    if left[0] < 0:
        raise SecurityError(f"it would make more than {CHARACTERS:,} characters, the limit for a conversation")
    if time.monotonic() > left[1]:
        raise SecurityError(f"it takes longer than {SECONDS:g} seconds, the limit for a conversation")


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_ITEM + _size(key) + _size(item) for key, item in value.items())
    return sum(_ITEM + _size(item) for item in value) if isinstance(value, list | tuple | set) else 1


def _pay(value: Any) -> Any:
    spend(len(value) if type(value) is str else _size(value))
    return value


def _pay_call(name: str, operand: Any, others: Iterable[Any]) -> None:
    """Spend what a filter, a method or an operator can at most return."""
    if name in _REFUSED:
        raise SecurityError(f"{name} is not available in chat templates")
    if name in _CHEAP:
        return spend(len(operand) if isinstance(operand, str | bytes | list | tuple) else 1)
    if name not in _GROWING:
        return spend(_size(operand))
    factors = [abs(x) if isinstance(x, int) and name not in _FORMATS else _size(x) for x in others]
    if name not in _FORMATS:
        # The text that is replaced has no part in the result.
        return spend((_size(operand) + 1) * (max(factors[name == "replace" :], default=0) + 1))
    text = str(operand)
    if re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", text):
        raise SecurityError("a format may not take widths from its values")
    factors += map(int, re.findall(r"\d{1,9}", text))
    return spend(len(text) + (text.count("%") + text.count("{")) * max(factors, default=0))


class _Paying(NodeTransformer):
    """Inserts ``_pay`` as a filter where values are printed, joined or put into containers, and into loops."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.Output | nodes.Concat):
            node.nodes = [_paid(child) for child in node.nodes]
        elif isinstance(node, nodes.List | nodes.Tuple) and getattr(node, "ctx", "load") == "load":
            node.items = [_paid(item) for item in node.items]
        elif isinstance(node, nodes.Pair):
            node.key, node.value = _paid(node.key), _paid(node.value)
        elif isinstance(node, nodes.For):
            text = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(nodes.Filter(nodes.Const(text), "_spend", [], [], None, None)))
        return node


def _paid(node: nodes.Expr) -> nodes.Expr:
    constant = isinstance(node, nodes.Const | nodes.TemplateData)
    return node if constant else nodes.Filter(node, "_pay", [], [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """See the module's docstring; templates must be rendered inside ``budget``."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_pay": _pay, "_spend": spend}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Paying().visit(super()._parse(source, name, filename))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        name, operand = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        if name == "join" and args and not isinstance(args[0], str | list | tuple):
            args = (list(args[0]), *args[1:])
        _pay_call(name, operand, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > BITS:
                raise SecurityError("a number is too large")
        elif operator == "+":
            spend(sum(len(x) for x in (left, right) if isinstance(x, str | bytes | list | tuple)))
        elif operator == "*" and isinstance(left, int):
            _pay_call("*", right, (left,))
        elif isinstance(left, str | bytes | list | tuple):
            _pay_call(operator, left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays before it is called."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        first = int(hasattr(function, "jinja_pass_arg"))  # before the value, such filters receive the context
        if name == "join" and not isinstance(args[first], str | list | tuple):
            args = (*args[:first], list(args[first]), *args[first + 1 :])
        _pay_call(name, args[first], (*args[first + 1 :], *kwargs.values()))
        return function(*args, **kwargs)

    return bounded
