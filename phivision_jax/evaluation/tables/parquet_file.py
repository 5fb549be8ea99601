"""A parquet file of a Hugging Face data set: the texts of all rows, and the images of one row at a time.

Rows are read forwards within a row group; a row before the last one reads its group again from the beginning.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phivision_jax.data.quarantine import describe_failure
from phivision_jax.data.sources import row_groups
from phivision_jax.evaluation.tables.row import Row


class ParquetFile:
    """Rows of one file."""

    _cursor: tuple[tuple[int, tuple[str, ...]], int, Iterator[row_groups.Row]] | None = None
    """Row group and columns of the last images, the row after it, and the rows from there on."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Read the footer.

        Raises:
          ValueError: for a file that is not parquet, or is damaged.
        """
        self.path, self.folder = path, folder
        try:
            found = list(row_groups.row_groups(path))
            schema = pq.read_schema(path)
        except Exception as error:  # of Arrow, or UnicodeDecodeError for names of columns
            problem = describe_failure(error)
            raise ValueError(f"{path} is not a parquet file, or is damaged or cut short: {problem}") from None
        self._groups = [group for group, _ in found]
        self._begins = np.cumsum([0, *(count for _, count in found)])
        self._images = frozenset(field.name for field in schema if _is_image(field.type))
        self._texts = [name for name in schema.names if name not in self._images]

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here: another process opens its own.
        return vars(self) | {"_cursor": None}

    def __iter__(self) -> Iterator[Row]:
        number = 0
        for group in self._groups:
            for values in self._read(row_groups.rows_of(group, self._texts), number):
                number += 1
                yield Row(self.path, number, values, partial(self._load, number - 1), self.folder)

    def _load(self, number: int, columns: Sequence[str]) -> list[Any]:
        """The images of a row, counted from 0: a column may have one or a list."""
        wanted = tuple(column for column in columns if column in self._images)
        if not wanted:
            return []
        index = int(np.searchsorted(self._begins, number, "right")) - 1
        row, key = number - int(self._begins[index]), (index, wanted)
        # Taken away while in use, so that two threads never share it.
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor[0] != key or cursor[1] > row:
            cursor = key, 0, row_groups.rows_of(self._groups[index], wanted)
        _, position, rows = cursor
        values = next(self._read(itertools.islice(rows, row - position, None), number), None)
        if values is None:
            raise ValueError(f"row group {index} has fewer rows than its footer counts")
        self._cursor = key, row + 1, rows
        found = [values[column] for column in wanted]
        return [image for value in found for image in (value if isinstance(value, list) else [value]) if image]

    def _read(self, rows: Iterator[row_groups.Row], number: int) -> Iterator[Mapping[str, Any]]:
        try:
            for values, failed in rows:
                number += 1
                if failed:
                    raise failed
                yield values
        except Exception as error:  # of Arrow, or MemoryError
            problem = describe_failure(error)
            raise ValueError(f"{self.path}, row {number}: cannot be read: {problem}") from None


def _is_image(kind: pa.DataType) -> bool:
    """True for an image, a struct of bytes and path, and for a list of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_image(kind.value_type)
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
