"""Parquet, as the Hugging Face hub keeps data sets: one file or a folder of parts, images as structs of bytes and path.

The numbers of rows come from the files' footers, so opening reads no data. A range is read from the beginning of its
row group, a few rows at a time: parquet has no finer places to start from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phivision_jax.data.formats import Read, describe, files_of
from phivision_jax.data.formats.items import IDS, ItemOptions, ItemReader
from phivision_jax.data.quarantine import Quarantined

_ROWS = 64  # In memory at once; a row may hold many images.


class ParquetSource:
    """Rows of parquet files."""

    def __init__(self, path: Path, options: ItemOptions, *, split: str = "train", name: str | None = None) -> None:
        """Find the files and count their rows.

        Args:
          path: a file, or a folder of which ``split`` chooses the files.
          options: how rows become records.
          split: what the names of a folder's files begin with.
          name: of the source; default: the stem of the file or the name of the folder.

        Raises:
          ValueError: when there is no row, or for a file whose footer cannot be read.
        """
        self.name = name or (path.stem if path.is_file() else path.resolve().name)
        self._options = options
        self._folder = path if path.is_dir() else path.parent
        self._files = files_of(path, "parquet", split)
        groups: list[tuple[int, int, int]] = []  # file, row group of it, rows
        for number, file in enumerate(self._files):
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise ValueError(f"{file} is not a parquet file, or is cut short: {error}") from None
            groups += ((number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups))
        self._groups = [(number, g) for number, g, _ in groups]
        self._begins = np.cumsum([0, *(rows for _, _, rows in groups)])
        self._key = describe(self._files)
        if not len(self):
            raise ValueError(f"{path} holds no rows")

    def __len__(self) -> int:
        return int(self._begins[-1])

    def key(self) -> Any:
        return {"format": "parquet", "name": self.name, "files": self._key, "options": self._options.key()}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        file_begins = 0
        for k, (number, group) in enumerate(self._groups):
            begin, end = int(self._begins[k]), int(self._begins[k + 1])
            if group == 0:
                file_begins = begin
            first, last = max(start, begin) - begin, min(stop, end) - begin
            if first < last:
                yield from self._read_group(self._files[number], group, first, last, begin - file_begins)

    def _read_group(self, path: Path, group: int, start: int, stop: int, above: int) -> Iterator[Read | Quarantined]:
        """Rows ``start`` … ``stop − 1`` of a row group with ``above`` rows of the file before it."""
        reader = ItemReader(self.name, self._folder, self._options)
        names = [theirs for theirs, ours in self._options.rename if ours in IDS]
        row = 0

        def place(row: int) -> tuple[str, str]:
            return f"{path.name}:{above + row + 1}", f"{path.name}, row {above + row + 1}"

        try:
            # Through a small buffer: a row group may be larger than memory.
            with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                for batch in file.iter_batches(_ROWS, row_groups=[group]):
                    for k in range(max(start - row, 0), min(stop - row, len(batch))):
                        one = batch.slice(k, 1)
                        try:
                            item = one.to_pylist()[0]
                        except UnicodeDecodeError as error:
                            problem = f"not UTF-8: {error.reason}"
                            yield reader.bad("encoding", problem, *place(row + k), _ids(one, names))
                        else:
                            yield reader.read(item, *place(row + k))
                    row += len(batch)
                    if row >= stop:
                        return
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            problem = str(error)
        else:
            problem = f"row group {group} has fewer rows than the footer says"
        for k in range(max(start, row), stop):
            yield reader.bad("syntax", f"the row group cannot be read: {problem}", *place(k))


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
