"""Access to the record that a rule reads, with errors that name the key."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(record: Mapping[str, Any], key: str) -> str:
    """A text of a record; numbers are written out.

    Raises:
      KeyError: for a missing key, naming it.
      ValueError: for a value that is no text and no number, naming the key.
    """
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key}: expected a text, found {type(value).__name__}")
    return str(value)


def texts_of(record: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts of a record, not empty; one text is a list of one.

    Raises:
      KeyError: for a missing key, naming it.
      ValueError: for an empty list, or a value that is no text and no number, naming the key.
    """
    value = record[key]
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return [text_of(record, key)]
    if not value:
        raise ValueError(f"{key}: expected at least one text, found an empty list")
    return [text_of({key: each}, key) for each in value]


def options_of(record: Mapping[str, Any], key: str) -> dict[str, str]:
    """Options of a record as letter → text, from such a mapping or from a list that A, B, C, … number.

    Raises:
      KeyError: for a missing key, naming it.
      ValueError: for no options, more than 26, or a letter that is not one of A to Z, naming the key.
    """
    value = record[key]
    if isinstance(value, str):
        raise ValueError(f"{key}: expected a mapping or a list of options, found a text")
    if not isinstance(value, Mapping):
        texts = texts_of(record, key)
        value = {chr(ord("A") + index): each for index, each in enumerate(texts)}
    if not value or not all(isinstance(each, str) and len(each) == 1 and "A" <= each <= "Z" for each in value):
        raise ValueError(f"{key}: expected options with letters from A to Z, found {list(value)[:30]}")
    return {letter: text_of(value, letter) for letter in value}


def numbers_of(record: Mapping[str, Any], key: str, count: int) -> list[float]:
    """A list of ``count`` numbers of a record.

    Raises:
      KeyError: for a missing key, naming it.
      ValueError: for another number of values, or a value that is no number, naming the key.
    """
    value = record[key]
    try:
        numbers = [float(each) for each in value]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or isinstance(value, str):
        raise ValueError(f"{key}: expected {count} numbers, found {value!r:.100}")
    return numbers
