"""Parts of messages: the nearest known name, the values in which two settings differ, the gist of an error."""

import contextlib
import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

type Log = Callable[[str], None]
"""Receives lines for the user."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: "did you mean 'rows'?", or else "choose from rows, length"."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"


def first_difference(ours: Any, theirs: Any) -> str | None:
    """The first of ``differences``, as "stages.0.epochs is 2.0 there, 1.0 here"; None for equal values."""
    found = next(differences(theirs, ours), None)
    return found and "{} is {} there, {} here".format(*map(shorten, found))


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Compare two nested structures of JSON values.

    Yields:
      (path, old value, new value) of each difference; paths look like "stages.0.epochs". An absent value is None.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".removeprefix("."))
    elif old != new:
        yield path, old, new


def shorten(value: object, limit: int = 100) -> str:
    """A value of unknown origin, safe to print: at most ``limit`` characters, control characters escaped."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text if len(text) <= limit else f"{text[: limit - 21]} … {text[-18:]}"
    return printable(text).replace("\n", "\\n")


def printable(text: str) -> str:
    """The text with its control characters, which a terminal would obey, as escapes; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def prefix_errors(what: str) -> Iterator[None]:
    """Put the name of what is being read or laid out in front of the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error message without TensorStore's specifications and source locations.

    A long line is shortened in the middle: the action is at its start, the cause at its end.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = re.split(r" \[(?:tensorstore_spec|source locations)=", line)[0].rstrip(" :.")
    return line if len(line) <= 300 else f"{line[:100]} … {line[-200:]}"
