"""Parquet, as the Hugging Face hub keeps data sets: one file or a folder of parts, images as structs of bytes and path.

The numbers of rows come from the files' footers, so opening reads no data. A range is read from the beginning of its
row group, a few rows at a time: parquet has no finer places to start from. So that chunk after chunk of a large row
group does not read it again and again, the place where the last range ended is kept open for one that lies behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.files import files_of_split, identify
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import IDS, ItemReader
from phivision_jax.data.sources.source import Read

BATCH_BYTES = 64 * 2**20
"""Decoded at once, about; a row may hold many images. A page, which parquet unpacks whole, may be larger."""
_ROWS = 64  # At once, however small they are.


@dataclasses.dataclass
class _Cursor:
    """A place in a row group."""

    k: int
    """Of which, over all files."""
    row: int
    """The next one."""
    rows: Iterator[pa.RecordBatch]
    """From there on, each by itself."""


class ParquetSource:
    """Rows of parquet files."""

    def __init__(self, path: Path, options: ItemOptions, *, split: str = "train", name: str | None = None) -> None:
        """Find the files and count their rows.

        Args:
          path: a file, or a folder of which ``split`` chooses the files.
          options: how rows become records.
          split: of a folder's files, see ``files_of_split``.
          name: of the source; default: the stem of the file or the name of the folder.

        Raises:
          ValueError: when there is no row, or for a file whose footer cannot be read.
        """
        self.name = name or (path.stem if path.is_file() else path.resolve().name)
        self._options = options
        self._folder = path if path.is_dir() else path.parent
        self.files = files_of_split(path, "parquet", split)
        self._files = self.files.read
        self._cursor: _Cursor | None = None
        groups: list[tuple[int, int, int, int]] = []  # file, row group of it, rows, bytes
        for number, file in enumerate(self._files):
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise ValueError(f"{file} is not a parquet file, or is cut short: {error}") from None
            for g in range(metadata.num_row_groups):
                groups.append((number, g, metadata.row_group(g).num_rows, metadata.row_group(g).total_byte_size))
        self._groups = [
            (number, g, max(1, min(_ROWS, BATCH_BYTES * rows // max(size, 1)))) for number, g, rows, size in groups
        ]
        self._begins = np.cumsum([0, *(rows for _, _, rows, _ in groups)])
        self._key = identify(self._files)
        if not len(self):
            raise ValueError(f"{path} holds no rows")

    def __len__(self) -> int:
        return int(self._begins[-1])

    def key(self) -> Any:
        return {"format": "parquet", "name": self.name, "files": self._key, "options": self._options.key()}

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay where they are: another process opens its own.
        return vars(self) | {"_cursor": None}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        file_begins = 0
        for k, (_, group, _) in enumerate(self._groups):
            begin, end = int(self._begins[k]), int(self._begins[k + 1])
            if group == 0:
                file_begins = begin
            first, last = max(start, begin) - begin, min(stop, end) - begin
            if first < last:
                yield from self._read_group(k, first, last, begin - file_begins)

    def _read_group(self, k: int, start: int, stop: int, above: int) -> Iterator[Read | Quarantined]:
        """Rows ``start`` … ``stop − 1`` of the k-th row group, with ``above`` rows of its file before it."""
        path, group = self._files[self._groups[k][0]], self._groups[k][1]
        reader = ItemReader(self.name, self._folder, self._options)
        names = [theirs for theirs, ours in self._options.renames.items() if ours in IDS]
        row = start

        def place(row: int) -> tuple[str, str]:
            return f"{path.name}:{above + row + 1}", f"{path.name}, row {above + row + 1}"

        try:
            cursor = self._cursor_at(k, start)
            while row < stop and (one := next(cursor.rows, None)) is not None:
                cursor.row += 1
                try:
                    item = one.to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield reader.bad("encoding", f"not UTF-8: {error.reason}", *place(row), _ids(one, names))
                else:
                    yield reader.read(item, *place(row))
                row += 1
            if row == stop:
                self._cursor = cursor
                return
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = str(error)
        else:
            problem = f"row group {group} has fewer rows than the footer says"
        for bad in range(row, stop):
            yield reader.bad("syntax", f"the row group cannot be read: {problem}", *place(bad))

    def _cursor_at(self, k: int, row: int) -> _Cursor:
        """Of the k-th row group, at a row of it or at its end; the one that is kept, if it stands before that row."""
        # One reader at a time: it is put back when its range has been read to the end.
        cursor, self._cursor = self._cursor, None
        if cursor is None or cursor.k != k or cursor.row > row:
            number, group, at_once = self._groups[k]
            cursor = _Cursor(k, 0, _rows(self._files[number], group, at_once))
        while cursor.row < row and next(cursor.rows, None) is not None:
            cursor.row += 1
        return cursor


def _rows(path: Path, group: int, at_once: int) -> Iterator[pa.RecordBatch]:
    # Through a small buffer: a row group may be larger than memory.
    with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        for batch in file.iter_batches(at_once, row_groups=[group]):
            for k in range(len(batch)):
                yield batch.slice(k, 1)


def _ids(row: pa.RecordBatch, names: list[str]) -> dict[str, Any]:
    """The fields of a row that may be its id, as far as they can be read."""
    found = {}
    for name in (*IDS, *names):
        if name in row.schema.names:
            try:
                found[name] = row.column(name)[0].as_py()
            except UnicodeDecodeError:
                continue
    return found
