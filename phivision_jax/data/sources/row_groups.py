"""Rows of parquet files within a limit on memory, row group by row group, all columns or some."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phivision_jax.io.memory import LIMIT, limited_memory

BATCH_BYTES = 64 * 2**20
"""Approximate bytes decoded at once; a row may have many images. A page, which is decoded entirely, may be larger."""
_ROWS = 64  # decoded at once, at most

type Row = tuple[dict[str, Any], Exception | None]
"""The fields of a row; and the error of one of them that cannot be decoded, whose value it is too."""


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """A row group."""

    file: Path
    number: int
    first: int
    """Number of its first row in the file."""
    at_once: int
    """Rows decoded at once."""
    memory: int
    """Bytes that decoding may take: a page is decoded entirely, and may be as long as the file."""


def row_groups(file: Path) -> Iterator[tuple[RowGroup, int]]:
    """The row groups of a file, with their numbers of rows.

    Raises:
      pyarrow.ArrowException, ValueError, OSError: for a file that is not parquet, or is damaged.
    """
    first, length, metadata = 0, file.stat().st_size, pq.read_metadata(file)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows, size = group.num_rows, group.total_byte_size
        if not 0 <= rows <= 2**20 + length:
            raise ValueError(f"row group {number} has {rows:,} rows by its footer")
        at_once = max(1, min(_ROWS, BATCH_BYTES * rows // max(size, 1)))
        # Not the length of its columns: where a footer is damaged, asking for it aborts the process.
        yield RowGroup(file, number, first, at_once, LIMIT + 2 * min(length, LIMIT)), rows
        first += rows


def rows_of(group: RowGroup, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a group, with all columns or these.

    From a batch that exceeds the limit on memory on, one by one: one alone may be within it.
    """
    done = 0
    with contextlib.suppress(*[MemoryError] * (group.at_once > 1)):
        for row in _decoded(group, group.at_once, columns):
            if group.at_once > 1 and isinstance(row[1], MemoryError):
                break
            yield row
            done += 1
        else:
            return
    # Here all that the first attempt took is free again, as no error refers to it.
    yield from itertools.islice(_decoded(group, 1, columns), done, None)


def _decoded(group: RowGroup, at_once: int, columns: Sequence[str] | None) -> Iterator[Row]:
    # Through a small buffer: a row group may be larger than memory.
    with pq.ParquetFile(group.file, buffer_size=2**20, pre_buffer=False) as file:
        batches = file.iter_batches(at_once, row_groups=[group.number], columns=columns)
        while True:
            with limited_memory(group.memory):
                if (batch := next(batches, None)) is None:
                    return
                rows = [_decode(batch.slice(k, 1)) for k in range(len(batch))]
            del batch  # before the next one is decoded
            while rows:
                yield rows.pop(0)


def _decode(row: pa.RecordBatch) -> Row:
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
