"""Rows of a benchmark's files: typed access whose errors name file, row and column."""

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phivision_jax.data.image_check import check_image
from phivision_jax.data.sources.fetch import fetch
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import MOST_BYTES
from phivision_jax.io.messages import prefix_errors, shorten

LARGEST_TEXT = 2**20
"""Characters of one value."""
LETTERS = "ABCDEFGH"
"""Columns of options in tables of VLMEvalKit, and the letters of options that are given as a list."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row without its images.

    Methods with several names read the first of these columns with a value, as tables of one benchmark differ in names.
    All of them raise ValueError for a value that is missing, or of another type.
    """

    file: Path
    number: int
    """From 1, without the header."""
    values: Mapping[str, Any]
    load: Callable[[Sequence[str]], Sequence[Any]] = dataclasses.field(repr=False, compare=False)
    """Reads images of the row by the names of their columns: paths, bytes, data URIs or structs of bytes and path."""
    folder: Path
    """Folder of the images, which no path may leave."""

    @property
    def id(self) -> str:
        """File and index of a row, or its number where the table has no index: "test-00000-of-00001:17"."""
        index = self.optional("index")
        return f"{self.file.stem}:{self.number if index is None else index}"

    def error(self, column: str, problem: str) -> ValueError:
        """The error about a value."""
        return ValueError(f"{self.file}, row {self.number}: column {column!r} {problem}")

    def optional(self, *columns: str) -> Any:
        """The first value that is given; None for none."""
        found = (self.values.get(column) for column in columns)
        return next((value for value in found if value is not None and value != "" and value == value), None)

    def value(self, *columns: str) -> Any:
        """The first value that is given."""
        if (value := self.optional(*columns)) is None:
            known = shorten(", ".join(self.values), 200)
            state = "is empty" if columns[0] in self.values else f"is missing; the columns are {known}"
            raise self.error(columns[0], state)
        return value

    def text(self, *columns: str) -> str:
        """A text, or an integer as a text."""
        value = self.value(*columns)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise self.error(columns[0], f"is {shorten(value)}, not a text")
        if len(text := str(value)) > LARGEST_TEXT:
            raise self.error(columns[0], f"has {len(text):,} characters, more than {LARGEST_TEXT:,}")
        return text

    def integer(self, *columns: str) -> int:
        """An integer, also one that is written as a text or as a float, such as 2.0."""
        value = self.value(*columns)
        try:
            number = float(value) if isinstance(value, str | float | int) and len(str(value)) < 20 else None
        except ValueError:
            number = None
        if number is None or number != number or number % 1:
            raise self.error(columns[0], f"is {shorten(value)}, not an integer")
        return int(number)

    def strings(self, *columns: str) -> list[str]:
        """A list of texts, also one that is written as a Python list in a text."""
        value = self.value(*columns)
        listed = python_list(value) if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(one, str | int | float) for one in listed):
            raise self.error(columns[0], f"is {shorten(value)}, not a list of texts")
        return [str(one) for one in listed]

    def options(self) -> dict[str, str]:
        """The options in columns A, B, …, as VLMEvalKit writes them; empty where there are none."""
        return {letter: str(value) for letter in LETTERS if (value := self.optional(letter)) is not None}

    def groups(self, *columns: str) -> dict[str, str]:
        """Groups of the names of these columns, of those with a value: a figure apart is not worth an error."""
        return {name: str(value) for name in columns if (value := self.optional(name)) is not None}

    @property
    def hint(self) -> str:
        """VLMEvalKit's hint, which it puts in front of a question; "" for none."""
        return self.text("hint") if self.optional("hint") is not None else ""

    def box(self, column: str) -> list[float]:
        """Four finite numbers, also written as a list in a text."""
        value = self.value(column)
        listed = python_list(value) if isinstance(value, str) else value
        listed = listed if isinstance(listed, list) else []
        if len(listed) != 4 or not all(type(one) in (int, float) and abs(one) < 1e6 for one in listed):
            raise self.error(column, f"is {shorten(value)}, not four coordinates")
        return [float(one) for one in listed]

    def images(self, columns: Sequence[str]) -> tuple[bytes, ...]:
        """The encoded images in these columns, in order; names without a column are ignored.

        Raises:
          ValueError: for a path that leaves the folder, a missing file, and what is no image.
        """
        with prefix_errors(f"{self.file}, row {self.number}"):
            return self.read(self.load(columns))

    def read(self, given: Sequence[Any]) -> tuple[bytes, ...]:
        """The encoded images that are given as paths, bytes, data URIs or structs of bytes and path.

        Raises:
          ValueError: as ``images``, without naming the row.
        """
        images: list[bytes] = []
        for number, image in enumerate(given):
            images.append(fetch(image, self.folder, ItemOptions()))
            check_image(images[-1], f"image {number}")
            if sum(map(len, images)) > MOST_BYTES:
                raise ValueError(f"its images have more than {MOST_BYTES:,} bytes together")
        return tuple(images)


def python_list(text: str) -> list[Any] | None:
    """The list in a text such as "['red', 'blue']"; None for any other text. Nothing is evaluated.

    Raises no error, whatever the text has.
    """
    if not text.strip().startswith("[") or len(text) > 2**16:
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options by letter.

    Raises:
      ValueError: for more than letters.
    """
    if len(options) > 26:
        raise ValueError(f"{len(options)} options, more than letters")
    return {chr(ord("A") + k): option for k, option in enumerate(options)}
