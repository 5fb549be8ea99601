"""Parquet as the Hugging Face hub stores data sets: a file or a folder of files, images as structs of bytes and path.

The numbers of rows come from the files' footers, so opening reads no data. A row group can only be read from its
beginning, a few rows at a time. So that consecutive chunks do not read a large one again and again, the position after
the last range stays open for the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.files import FileSource
from phivision_jax.data.sources.items import IDS
from phivision_jax.data.sources.source import Read

BATCH_BYTES = 64 * 2**20
"""Approximate bytes decoded at once; a row may have many images. A page, which is decoded entirely, may be larger."""
_ROWS = 64  # decoded at once, at most


@dataclasses.dataclass(frozen=True)
class _Group:
    """A row group."""

    file: Path
    number: int
    first: int
    """Number of its first row in the file."""
    at_once: int
    """Rows decoded at once."""


@dataclasses.dataclass
class _Cursor:
    """A position in a row group."""

    group: _Group
    row: int
    """The next row."""
    rows: Iterator[pa.RecordBatch]
    """The rows from there on, each by itself."""


class ParquetSource(FileSource[_Group]):
    """Rows of parquet files."""

    format = "parquet"

    _cursor: _Cursor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here: another process opens its own.
        return vars(self) | {"_cursor": None}

    def _open(self, file: Path) -> Iterator[tuple[_Group, int]]:
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            _raise_if_of_file_system(error)
            raise ValueError(f"{file} is not a parquet file, or is cut short: {error}") from None
        first = 0
        for number in range(metadata.num_row_groups):
            rows, size = metadata.row_group(number).num_rows, metadata.row_group(number).total_byte_size
            yield _Group(file, number, first, max(1, min(_ROWS, BATCH_BYTES * rows // max(size, 1)))), rows
            first += rows

    def _read_part(self, part: _Group, start: int, stop: int) -> Iterator[Read | Quarantined]:
        row = start

        def place(row: int) -> tuple[str, str]:
            number = part.first + row + 1
            return f"{part.file.name}:{number}", f"{part.file.name}, row {number}"

        try:
            cursor = self._cursor_at(part, start)
            while row < stop and (one := next(cursor.rows, None)) is not None:
                cursor.row += 1
                try:
                    item = one.to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield self._reader.bad("encoding", f"not UTF-8: {error.reason}", *place(row), self._ids(one))
                else:
                    yield self._reader.read(item, *place(row))
                row += 1
            if row == stop:
                self._cursor = cursor
                return
        except (pa.ArrowException, OSError) as error:
            _raise_if_of_file_system(error)
            problem = str(error)
        else:
            problem = f"row group {part.number} has fewer rows than its footer counts"
        for bad in range(row, stop):
            yield self._reader.bad("syntax", f"the row group cannot be read: {problem}", *place(bad))

    def _cursor_at(self, group: _Group, row: int) -> _Cursor:
        """A cursor at a row of a group or at its end: the one that is kept, if it is at or before that row."""
        # Taken away while in use, so that it is kept only after its range has been read to the end.
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor.group != group or cursor.row > row:
            cursor = _Cursor(group, 0, _rows(group))
        while cursor.row < row and next(cursor.rows, None) is not None:
            cursor.row += 1
        return cursor

    def _ids(self, row: pa.RecordBatch) -> dict[str, Any]:
        """The fields of a row that may be its id, as far as they can be read."""
        found = {}
        for name in {*IDS, *self._options.renames} & set(row.schema.names):
            with contextlib.suppress(UnicodeDecodeError):
                found[name] = row.column(name)[0].as_py()
        return found


def _rows(group: _Group) -> Iterator[pa.RecordBatch]:
    # Through a small buffer: a row group may be larger than memory.
    with pq.ParquetFile(group.file, buffer_size=2**20, pre_buffer=False) as file:
        for batch in file.iter_batches(group.at_once, row_groups=[group.number]):
            for k in range(len(batch)):
                yield batch.slice(k, 1)


def _raise_if_of_file_system(error: Exception) -> None:
    """Raise an ``OSError`` with a number, which the file system reports; Arrow's own errors about content have none."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
