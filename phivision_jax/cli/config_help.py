"""``train.py --help``: every field of the configuration with its value there and what it means.

What a field means stands once, in the string below it in its dataclass. Python does not keep those strings, so they are
read from the source.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

FLAGS = ("--help", "-help", "-h", "--helpfull")
WIDTH = 100


def asked_for(words: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in FLAGS for word in words)


def text(cfg: Any, prefix: str = "--config") -> str:
    """The fields of a configuration, one after the other: flag, value, meaning. What has fields of its own comes last,
    the model as the very last: few change it, and it is long."""
    return "\n".join(_lines(cfg, prefix)).strip("\n")


def docs_of(cls: type) -> dict[str, str]:
    """What the string below each field of a dataclass says, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = _plain(str(below.value.value))
    return found


def _plain(docstring: str) -> str:
    return re.sub(r"\s+", " ", docstring.replace("``", "")).strip()


def _lines(cfg: Any, prefix: str) -> Iterator[str]:
    docs = docs_of(type(cfg))
    names = [field.name for field in dataclasses.fields(cfg)]
    for name in sorted(names, key=lambda name: (name == "model", dataclasses.is_dataclass(getattr(cfg, name)))):
        value, flag = getattr(cfg, name), f"{prefix}.{name}"
        if dataclasses.is_dataclass(value):
            about = _plain(inspect.getdoc(type(value)) or "")
            yield from ("", *textwrap.wrap(f"{flag}: {about}", WIDTH), "")
            yield from _lines(value, flag)
        else:
            yield f"  {flag}={value!r}"
            yield from textwrap.wrap(docs.get(name, ""), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
