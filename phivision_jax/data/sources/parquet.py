"""Parquet as the Hugging Face hub stores data sets: a file or a folder of files, images as structs of bytes and path.

The numbers of rows come from the files' footers, so opening reads no data. A row group can only be read from its
beginning, a few rows at a time. So that consecutive chunks do not read a large one again and again, the position after
the last range stays open for the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.file_source import FileSource
from phivision_jax.data.sources.files import files_of_split
from phivision_jax.data.sources.item_options import ItemOptions
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

    part: int
    row: int
    """The next row."""
    rows: Iterator[pa.RecordBatch]
    """The rows from there on, each by itself."""


class ParquetSource(FileSource):
    """Rows of parquet files."""

    format = "parquet"

    def __init__(self, path: Path, options: ItemOptions, *, split: str = "train", name: str | None = None) -> None:
        """Find the files and count their rows.

        Args:
          path: a file, or a folder of which ``split`` chooses the files.
          options: how rows become records.
          split: of a folder's files, see ``files_of_split``.
          name: name of the source; default: the stem of the file or the name of the folder.

        Raises:
          ValueError: when there is no row, or for a file whose footer cannot be read.
        """
        self.files = files_of_split(path, "parquet", split)
        self._cursor: _Cursor | None = None
        self._groups: list[_Group] = []
        counts = []
        for file in self.files.read:
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                _raise_if_of_file_system(error)
                raise ValueError(f"{file} is not a parquet file, or is cut short: {error}") from None
            first = 0
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                at_once = max(1, min(_ROWS, BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
                self._groups.append(_Group(file, number, first, at_once))
                counts.append(group.num_rows)
                first += group.num_rows
        super().__init__(path, name, options, self.files.read, counts)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here: another process opens its own.
        return vars(self) | {"_cursor": None}

    def _read_part(self, part: int, start: int, stop: int) -> Iterator[Read | Quarantined]:
        group, row = self._groups[part], start

        def place(row: int) -> tuple[str, str]:
            number = group.first + row + 1
            return f"{group.file.name}:{number}", f"{group.file.name}, row {number}"

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
            problem = f"row group {group.number} has fewer rows than its footer counts"
        for bad in range(row, stop):
            yield self._reader.bad("syntax", f"the row group cannot be read: {problem}", *place(bad))

    def _cursor_at(self, part: int, row: int) -> _Cursor:
        """A cursor at a row of a part or at its end: the one that is kept, if it is at or before that row."""
        # Taken away while in use, so that it is kept only after its range has been read to the end.
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor.part != part or cursor.row > row:
            cursor = _Cursor(part, 0, _rows(self._groups[part]))
        while cursor.row < row and next(cursor.rows, None) is not None:
            cursor.row += 1
        return cursor

    def _ids(self, row: pa.RecordBatch) -> dict[str, Any]:
        """The fields of a row that may be its id, as far as they can be read."""
        found = {}
        for name in {*IDS, *self._options.renames} & set(row.schema.names):
            try:
                found[name] = row.column(name)[0].as_py()
            except UnicodeDecodeError:
                continue
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
