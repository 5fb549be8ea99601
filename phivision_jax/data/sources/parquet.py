"""Parquet as the Hugging Face hub stores data sets: a file or a folder of files, images as structs of bytes and path.

The numbers of rows come from the files' footers, so opening reads no data. A row group can only be read from its
beginning, a few rows at a time. So that consecutive chunks do not read a large one again and again, the position after
the last range stays open for the next.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phivision_jax.data.quarantine import Quarantined, describe_failure
from phivision_jax.data.sources.files import FileSource
from phivision_jax.data.sources.items import IDS
from phivision_jax.data.sources.source import Read
from phivision_jax.io.memory import LIMIT, limited_memory

BATCH_BYTES = 64 * 2**20
"""Approximate bytes decoded at once; a row may have many images. A page, which is decoded entirely, may be larger."""
_ROWS = 64  # decoded at once, at most


type _Row = tuple[dict[str, Any], Exception | None]
"""The fields of a row; or, with the error of decoding it, those that may be its id, as far as they can be read."""


class _Undecoded:
    """A value that Python cannot represent, such as nanoseconds; only a field that is read needs its value."""

    def __init__(self, type: pa.DataType) -> None:
        self._type = type

    def __repr__(self) -> str:
        return f"<{self._type}>"


@dataclasses.dataclass(frozen=True)
class _Group:
    """A row group."""

    file: Path
    number: int
    first: int
    """Number of its first row in the file."""
    at_once: int
    """Rows decoded at once."""
    memory: int
    """Bytes that decoding may take: a page is decoded entirely, and may be as long as the file."""


class ParquetSource(FileSource[_Group]):
    """Rows of parquet files."""

    format = "parquet"

    _cursor: tuple[_Group, int, Iterator[_Row]] | None = None
    """The row group of the last range, the row after it, and the rows from there on."""

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here: another process opens its own.
        return vars(self) | {"_cursor": None}

    def _open(self, file: Path) -> list[tuple[_Group, int]]:
        try:
            return list(_groups(file))
        except Exception as error:  # of Arrow, or UnicodeDecodeError for names of columns
            problem = describe_failure(error)
            raise ValueError(f"{file} is not a parquet file, or is damaged or cut short: {problem}") from None

    def _read_part(self, part: _Group, start: int, stop: int) -> Iterator[Read | Quarantined]:
        row = start

        def place(row: int) -> tuple[str, str]:
            number = part.first + row + 1
            return f"{part.file.name}:{number}", f"{part.file.name}, row {number}"

        # Taken away while in use, so that it is kept only after its range has been read to the end.
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor[0] != part or cursor[1] > start:
            cursor = part, 0, _rows(part, {*IDS, *self._options.renames})
        _, position, rows = cursor
        try:
            for item, failed in itertools.islice(rows, start - position, stop - position):
                if isinstance(failed, MemoryError) and part.at_once > 1:
                    raise failed
                if failed:
                    yield self._reader.undecoded(failed, "the row cannot be read", *place(row), item)
                else:
                    yield self._reader.read(item, *place(row))
                row += 1
            if row == stop:
                self._cursor = part, stop, rows
                return
        except Exception as error:  # of Arrow, or UnicodeDecodeError for names of columns
            if isinstance(error, MemoryError) and part.at_once > 1:  # one row alone may be within the limit
                yield from self._read_part(dataclasses.replace(part, at_once=1), row, stop)
                return
            reason, problem = "failed" if isinstance(error, MemoryError) else "syntax", describe_failure(error)
        else:
            reason, problem = "syntax", f"row group {part.number} has fewer rows than its footer counts"
        for bad in range(row, stop):
            yield self._reader.bad(reason, f"the row group cannot be read: {problem}", *place(bad))


def _groups(file: Path) -> Iterator[tuple[_Group, int]]:
    """The row groups of a file, with their numbers of rows."""
    first, length, metadata = 0, file.stat().st_size, pq.read_metadata(file)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows, size = group.num_rows, group.total_byte_size
        if not 0 <= rows <= 2**20 + length:
            raise ValueError(f"row group {number} has {rows:,} rows by its footer")
        at_once = max(1, min(_ROWS, BATCH_BYTES * rows // max(size, 1)))
        # Not the length of its columns: where a footer is damaged, asking for it aborts the process.
        yield _Group(file, number, first, at_once, LIMIT + 2 * min(length, LIMIT)), rows
        first += rows


def _rows(group: _Group, ids: set[str]) -> Iterator[_Row]:
    # Through a small buffer: a row group may be larger than memory.
    with pq.ParquetFile(group.file, buffer_size=2**20, pre_buffer=False) as file:
        batches = file.iter_batches(group.at_once, row_groups=[group.number])
        while True:
            with limited_memory(group.memory):
                if (batch := next(batches, None)) is None:
                    return
                rows = [_decode(batch.slice(k, 1), ids) for k in range(len(batch))]
            yield from rows


def _decode(row: pa.RecordBatch, ids: set[str]) -> _Row:
    try:
        with contextlib.suppress(pa.ArrowException, ValueError, OverflowError):
            return row.to_pylist()[0], None
        return {name: _value(row.column(name)) for name in row.schema.names}, None
    except (UnicodeDecodeError, MemoryError) as error:
        found = {}
        for name in ids & set(row.schema.names):
            with contextlib.suppress(Exception):
                found[name] = row.column(name)[0].as_py()
        return found, error


def _value(cell: pa.Array) -> Any:
    try:
        return cell[0].as_py()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        return _Undecoded(cell.type)
