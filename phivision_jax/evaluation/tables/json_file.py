"""Annotations as JSON (an object or an array of objects) or JSON lines, whose images are files beside them."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phivision_jax.evaluation.tables.row import Row
from phivision_jax.io.memory import limited_memory
from phivision_jax.io.read_json import parse_json, read_limited

LARGEST = 32 * 2**20
"""Bytes of a file, which is read entirely; the largest of a published benchmark has less than one million."""


@dataclasses.dataclass(frozen=True)
class JsonFile:
    """Rows of one file."""

    path: Path
    folder: Path
    """Folder of the images."""

    def __iter__(self) -> Iterator[Row]:
        """Read all of it.

        Raises:
          ValueError: for what is not JSON, or not objects.
        """
        if (size := self.path.stat().st_size) > LARGEST:
            raise ValueError(f"{self.path} has {size:,} bytes: annotations may have {LARGEST:,}")
        try:
            with limited_memory():  # empty lists take twenty times their text
                found = self._parse(read_limited(self.path))
        except MemoryError:
            raise ValueError(f"{self.path} takes more memory than annotations may") from None
        for number, values in enumerate(found, 1):
            if not isinstance(values, dict):
                raise ValueError(f"{self.path}, row {number}: not an object with columns")
            yield Row(self.path, number, values, partial(_load, values), self.folder)

    def _parse(self, content: bytes) -> list[Any]:
        if self.path.suffix == ".json":
            is_object = content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
            parsed = parse_json(content, str(self.path), dict if is_object else list)
            return [parsed] if is_object else parsed
        lines = [line for line in content.splitlines() if line.strip()]
        return [parse_json(line, f"{self.path}, row {k}") for k, line in enumerate(lines, 1)]


def _load(values: dict[str, Any], columns: Sequence[str]) -> list[Any]:
    return [values[column] for column in columns if values.get(column)]
