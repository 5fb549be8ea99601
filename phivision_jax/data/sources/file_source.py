"""The common part of sources that are files: items in parts, one after the other."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.files import identify
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import ItemReader
from phivision_jax.data.sources.source import Read


class FileSource(abc.ABC):
    """A source whose items are in parts (files, row groups) with known numbers of items."""

    format: ClassVar[str]

    def __init__(
        self, path: Path, name: str | None, options: ItemOptions, files: Sequence[Path], counts: Sequence[int]
    ) -> None:
        """Set up the common part.

        Args:
          path: the file or folder that was opened.
          name: name of the source; default: the stem of the file or the name of the folder.
          options: how items become records.
          files: all files, for the key.
          counts: items of each part.

        Raises:
          ValueError: when there is no item.
        """
        self.name = name or (path.stem if path.is_file() else path.resolve().name)
        self._options, self._begins = options, np.cumsum([0, *counts])
        self._reader = ItemReader(self.name, path if path.is_dir() else path.parent, options)
        self._files_key = identify(files)
        if not len(self):
            raise ValueError(f"{path} has no items")

    def __len__(self) -> int:
        return int(self._begins[-1])

    def key(self) -> Any:
        return {"format": self.format, "name": self.name, "files": self._files_key, "options": self._options.key()}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        for part, (begin, end) in enumerate(itertools.pairwise(self._begins.tolist())):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield from self._read_part(part, first - begin, last - begin)

    @abc.abstractmethod
    def _read_part(self, part: int, start: int, stop: int) -> Iterator[Read | Quarantined]:
        """Items ``start`` … ``stop − 1`` of a part."""
