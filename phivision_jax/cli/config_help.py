"""The fields of a configuration with their values and meanings, for ``--help``.

The meaning of a field is the string below it in its dataclass.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from docstring_parser import parse_from_object

from phivision_jax.config import field_types, without_none

WIDTH = 100


def text(cfg: Any, prefix: str = "--config") -> str:
    """Flag, value and meaning of every field. Nested groups come last, the model, which is long, after all others."""
    return "\n".join(_lines(cfg, prefix)).strip("\n")


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, on one line."""
    return {field.arg_name: _plain(field.description or "") for field in parse_from_object(cls).params}


def _plain(docstring: str) -> str:
    return re.sub(r"\s+", " ", docstring.replace("``", "")).strip()


def _lines(cfg: Any, prefix: str) -> Iterator[str]:
    docs, types = field_docs(type(cfg)), field_types(type(cfg))
    groups = {name for name, hint in types.items() if dataclasses.is_dataclass(without_none(hint))}
    for name in sorted(types, key=lambda name: (name == "model", name in groups)):
        value, flag = getattr(cfg, name), f"{prefix}.{name}"
        if name not in groups:
            yield f"  {flag}={value!r}"
            yield from textwrap.wrap(docs.get(name, ""), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
            continue
        group = without_none(types[name])() if value is None else value
        unset = "Not set here. If any of it is set, the other values are: " if value is None else ""
        yield from ("", *textwrap.wrap(f"{flag}: {unset}{_plain(inspect.getdoc(type(group)) or '')}", WIDTH), "")
        yield from _lines(group, flag)
