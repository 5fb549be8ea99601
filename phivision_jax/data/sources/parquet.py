"""Parquet as the Hugging Face hub stores data sets: a file or a folder of files, images as structs of bytes and path.

The numbers of rows come from the files' footers, so opening reads no data. A row group can only be read from its
beginning, a few rows at a time. So that consecutive chunks do not read a large one again and again, the position after
the last range stays open for the next.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phivision_jax.data.quarantine import Quarantined, describe_failure
from phivision_jax.data.sources.files import FileSource
from phivision_jax.data.sources.row_groups import Row, RowGroup, row_groups, rows_of
from phivision_jax.data.sources.source import Read


class ParquetSource(FileSource[RowGroup]):
    """Rows of parquet files."""

    format = "parquet"

    _cursor: tuple[RowGroup, int, Iterator[Row]] | None = None
    """The row group of the last range, the row after it, and the rows from there on."""

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here: another process opens its own.
        return vars(self) | {"_cursor": None}

    def _open(self, file: Path) -> list[tuple[RowGroup, int]]:
        try:
            return list(row_groups(file))
        except Exception as error:  # of Arrow, or UnicodeDecodeError for names of columns
            problem = describe_failure(error)
            raise ValueError(f"{file} is not a parquet file, or is damaged or cut short: {problem}") from None

    def _read_part(self, part: RowGroup, start: int, stop: int) -> Iterator[Read | Quarantined]:
        row = start

        def place(row: int) -> tuple[str, str]:
            number = part.first + row + 1
            return f"{part.file.name}:{number}", f"{part.file.name}, row {number}"

        # Taken away while in use, so that it is kept only after its range has been read to the end.
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor[0] != part or cursor[1] > start:
            cursor = part, 0, rows_of(part)
        _, position, rows = cursor
        try:
            for item, failed in itertools.islice(rows, start - position, stop - position):
                if failed:
                    yield self._reader.undecoded(failed, "the row cannot be read", *place(row), item)
                else:
                    yield self._reader.read(item, *place(row))
                row += 1
            if row == stop:
                self._cursor = part, stop, rows
                return
            reason, problem = "syntax", f"row group {part.number} has fewer rows than its footer counts"
        except Exception as error:  # of Arrow, or UnicodeDecodeError for names of columns
            reason, problem = "failed" if isinstance(error, MemoryError) else "syntax", describe_failure(error)
        for bad in range(row, stop):
            yield self._reader.bad(reason, f"the row group cannot be read: {problem}", *place(bad))
