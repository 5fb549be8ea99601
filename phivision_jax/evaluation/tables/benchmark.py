"""Benchmarks whose items are rows of tables: one class states the columns, the prompt and the rule."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, overload

from phivision_jax.evaluation.benchmark import Benchmark, Item, Scored
from phivision_jax.evaluation.tables.locate import Files, locate
from phivision_jax.evaluation.tables.row import Row
from phivision_jax.io.messages import prefix_errors, shorten

MOST_ROWS = 100_000
"""Rows of a benchmark, of which the largest here has less than 6,000."""
MOST_TEXT = 256 * 2**20
"""Characters of the texts of all rows, which stay in memory."""


class TableBenchmark(Benchmark):
    """A benchmark in one or more published forms of table."""

    files: ClassVar[Files]
    images: ClassVar[tuple[str, ...]] = ("image",)
    """Names of columns with images; of a parquet file, those with encoded images count."""

    def items(self, path: str) -> Sequence[Item]:
        """Read the texts of all rows and check them; images are read and checked when an item is indexed."""
        rows: list[tuple[Item, Row]] = []
        seen, size, table = dict[str, str](), 0, None
        for table in locate(path, self.files, title=self.title, download=self.download):
            for row in table:
                if (item := self.item(row)) is None:
                    continue
                where = f"{row.file.name}, row {row.number}"
                if seen.setdefault(item.id, where) != where:
                    raise row.error("id", f"{shorten(item.id)} is also that of {seen[item.id]}")
                rows.append((item, row))
                size += _size(row.values)
                if len(rows) > MOST_ROWS or size > MOST_TEXT:
                    limit = f"more than {MOST_ROWS:,} rows or {MOST_TEXT:,} characters"
                    raise ValueError(f"{row.file}, row {row.number}: {self.title} may not have {limit}")
        if not rows and table is not None:
            raise ValueError(f"{table.path} has no items of {self.title}")
        return Items(self, rows)

    @abc.abstractmethod
    def item(self, row: Row) -> Item | None:
        """The item in a row, without its images; None for a row that is not part of the benchmark."""

    def complete(self, item: Item, row: Row, images: tuple[bytes, ...]) -> Item:
        """The item with the images of its row, to which a subclass may fit question and record.

        Raises:
          ValueError: where they do not fit.
        """
        return dataclasses.replace(item, images=images)


class Items(Sequence[Item]):
    """Items whose images are read when they are indexed, and not kept."""

    def __init__(self, benchmark: TableBenchmark, rows: Sequence[tuple[Item, Row]]) -> None:
        self._benchmark, self._rows = benchmark, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Items": ...
    def __getitem__(self, index: int | slice) -> "Item | Items":
        if isinstance(index, slice):
            return Items(self._benchmark, self._rows[index])
        item, row = self._rows[index]
        images = row.images(self._benchmark.images)
        with prefix_errors(f"{row.file}, row {row.number}"):
            return self._benchmark.complete(item, row, images)

    @property
    def ids(self) -> list[str]:
        """The items' ids, for which no image is read."""
        return [item.id for item, _ in self._rows]


def means(scored: Iterable[Scored], group: str) -> dict[str, float]:
    """Mean scores in per cent of the items of each value of a group, in the order in which they appear."""
    values: dict[str, list[float]] = {}
    for each in scored:
        values.setdefault(each.item.groups.get(group, ""), []).append(each.score.value)
    return {name: 100 * sum(found) / len(found) for name, found in values.items() if name}


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 8 + sum(map(_size, inner))
