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
from phivision_jax.data.sources.source import Read
from phivision_jax.io.memory import LIMIT, limited_memory

BATCH_BYTES = 64 * 2**20
"""Approximate bytes decoded at once; a row may have many images. A page, which is decoded entirely, may be larger."""
_ROWS = 64  # decoded at once, at most


type _Row = tuple[dict[str, Any], Exception | None]
"""The fields of a row; and the error of one of them that cannot be decoded, whose value it is too."""


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
            cursor = part, 0, _rows(part)
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


def _rows(group: _Group) -> Iterator[_Row]:
    """The rows of a group; from a batch that exceeds the limit on memory on, one by one: one alone may be within it."""
    done = 0
    with contextlib.suppress(*[MemoryError] * (group.at_once > 1)):
        for row in _decoded(group, group.at_once):
            if group.at_once > 1 and isinstance(row[1], MemoryError):
                break
            yield row
            done += 1
        else:
            return
    # Here all that the first attempt took is free again, as no error refers to it.
    yield from itertools.islice(_decoded(group, 1), done, None)


def _decoded(group: _Group, at_once: int) -> Iterator[_Row]:
    # Through a small buffer: a row group may be larger than memory.
    with pq.ParquetFile(group.file, buffer_size=2**20, pre_buffer=False) as file:
        batches = file.iter_batches(at_once, row_groups=[group.number])
        while True:
            with limited_memory(group.memory):
                if (batch := next(batches, None)) is None:
                    return
                rows = [_decode(batch.slice(k, 1)) for k in range(len(batch))]
            del batch  # before the next one is decoded
            while rows:
                yield rows.pop(0)


def _decode(row: pa.RecordBatch) -> _Row:
    with contextlib.suppress(pa.ArrowException, ValueError, OverflowError, MemoryError):
        return row.to_pylist()[0], None
    values = {name: _value(row.column(name)) for name in row.schema.names}
    return values, next((value for value in values.values() if isinstance(value, Exception)), None)


def _value(cell: pa.Array) -> Any:
    """The value; its type where Python cannot represent it, such as nanoseconds: only a field that is read needs it."""
    try:
        return cell.to_pylist()[0]  # cell[0].as_py() aborts the process where its copy exceeds the limit
    except (UnicodeDecodeError, MemoryError) as error:
        return error.with_traceback(None)  # which would keep the batch in memory
    except (pa.ArrowException, ValueError, OverflowError):
        return cell.type
