"""A jinja environment for templates of unknown origin, which renders in bounded time and memory.

Attributes and calls are those of jinja's immutable sandbox. Beyond it, everything that a template makes is paid for
from a budget of characters: what it prints and joins, containers and results of calls with all that they contain, and
before it exists what an operation can make of small operands. Every payment and every turn of a loop checks the time.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context, Namespace
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

SOURCE = 2**20
"""Most characters of a template."""
CHARACTERS, PER_CHARACTER = 2**24, 64
"""Characters that one rendering may make, and how many more for each of the conversation."""
SECONDS = 10.0
"""Longest time of one rendering."""
BITS = 2**17
"""Largest integer."""

_FORMATS = {"%", "format", "format_map"}
_GROWING = _FORMATS | {
    "*", "groupby", "indent", "join", "lstrip", "max", "min", "replace", "rsplit", "rstrip", "sort", "strip", "tojson",
    "trim", "unique",
}  # fmt: skip
"""Filters, methods and operators whose results, or times, can be as large as the product of their operands."""
_REFUSED = {
    "batch", "center", "encode", "expandtabs", "from_bytes", "ljust", "pprint", "rfind", "rindex", "rjust", "round",
    "rpartition", "slice", "striptags", "sum", "to_bytes", "translate", "urlize", "wordwrap", "xmlattr", "zfill",
}  # fmt: skip
"""The same or worse, of no use for conversations."""

_budget: ContextVar[list[float]] = ContextVar("budget")  # characters left, and the deadline


def start(characters: int) -> None:
    """Begin the rendering of a conversation of this many characters in this thread."""
    _budget.set([CHARACTERS + PER_CHARACTER * characters, time.monotonic() + SECONDS])


def spend(characters: int) -> int:
    """Take from the budget; returns what was taken.

    Raises:
      SecurityError: when it is used up.
    """
    left = _budget.get()
    left[0] -= characters
    if left[0] < 0:
        raise SecurityError(f"it would make more than {CHARACTERS:,} characters, the limit for a conversation")
    if time.monotonic() > left[1]:
        raise SecurityError(f"it takes longer than {SECONDS:g} seconds, the limit for a conversation")
    return characters


def _turns(items: Any) -> Iterator[Any]:
    for item in items:
        spend(1)
        yield item


def _size(value: Any, pay: Callable[[int], int] = int) -> int:
    """The characters of a value, each part paid for: with what it contains more than once, it can be endless."""
    size, rest = 0, [value]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple | range):
            rest.extend(value)
            size += pay(8 * len(value))
        else:
            size += pay(len(value) if isinstance(value, str | bytes) else 1)
    return size


def _pay(value: Any) -> Any:
    """The value, paid for; a list if it is an iterator or a view of a dict."""
    value = list(_turns(value)) if isinstance(value, Iterator | MappingView) else value
    _size(value, spend)
    return value


def _check(name: str, operand: Any, others: Iterable[Any]) -> None:
    """Spend what a filter, a method or an operator can make of small operands."""
    if name in _REFUSED:
        raise SecurityError(f"{name} is not available in chat templates")
    if name not in _GROWING:
        return
    if name in _FORMATS and re.search(r"\d{4}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", str(operand)):
        raise SecurityError("a format may have no width over 999, nor one from its values")
    factors = [abs(x) if isinstance(x, int) and name not in _FORMATS else _size(x) for x in (operand, *others)]
    # A width is below 1000. The text that is replaced has no part in the result.
    spend((factors[0] + 1) * (max([1000 * (name in _FORMATS), *factors[1 + (name == "replace") :]]) + 1))


class _Paying(NodeTransformer):
    """Inserts ``_pay`` and ``_turns`` as filters."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _filtered(node.iter, "_turns")
        elif isinstance(node, nodes.Concat):
            return _filtered(nodes.List(node.nodes), "join")
        elif isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) and getattr(node, "ctx", "load") == "load":
            return _filtered(node, "_pay")
        return node


def _filtered(node: Any, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None)


class Sandbox(ImmutableSandboxedEnvironment):
    """See the module's docstring; ``start`` must be called before a template is rendered."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(finalize=pass_context(lambda context, value: _pay(str(value))), **settings)
        self.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_pay": _pay, "_turns": _turns}
        # What a namespace refers to is not paid for, so it is not printed.
        self.globals["namespace"] = type("namespace", (Namespace,), {"__repr__": object.__repr__})
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Paying().visit(super()._parse(source, name, filename))

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        return "".join(map(_pay, pieces))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        _check(getattr(method, "__name__", ""), getattr(method, "__self__", None), (*args, *kwargs.values()))
        return _pay(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > BITS:
                raise SecurityError("a number is too large")
        elif not isinstance(left, float):
            _check(operator, left, (right,))
        return _pay(super().call_binop(context, operator, left, right))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is checked and pays for its result."""
    first = int(hasattr(function, "jinja_pass_arg"))  # before the value, such filters receive the context

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check(name, args[first], (*args[first + 1 :], *kwargs.values()))
        return _pay(function(*args, **kwargs))

    return bounded
