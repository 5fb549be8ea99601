"""The files of a format and of a split in a folder, by their names, and the common part of sources that are files."""

import abc
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.item_options import Format, ItemOptions
from phivision_jax.data.sources.items import ItemReader
from phivision_jax.data.sources.source import Read
from phivision_jax.io.read_json import wrong_file

PATTERNS: dict[Format, re.Pattern[str]] = {
    "json": re.compile(r"\.(json|jsonl|ndjson)$", re.IGNORECASE),
    "parquet": re.compile(r"\.(parquet|pq)$", re.IGNORECASE),
    # TFDS and Beam append the number of the shard: name-train.array_record-00000-of-00008.
    "array-record": re.compile(r"\.(array_record|arrayrecord)(-\d+-of-\d+)?$", re.IGNORECASE),
}
# JSON that describes data and holds none.
_DESCRIPTIONS = {
    "config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "features.json", "manifest.json",
    "state.json", "work.json",
}  # fmt: skip
# As a word of its own: "test-0" and "shapes_test", but not "testimony".
_SPLIT = re.compile(r"(?i)(?<![a-z])(train(ing)?|validation|valid|val|dev|test(ing)?|eval(uation)?)(?![a-z])")


class Files(NamedTuple):
    """Files of one format in a folder: those of the wanted split, and the others."""

    read: list[Path]
    left_out: list[Path]

    def __str__(self) -> str:
        count = f"{len(self.read):,} file{'s' * (len(self.read) > 1)}"
        left_out = f"; left out: {len(self.left_out):,} ({shorten(self.left_out)})" if self.left_out else ""
        return f"reading {count} of the folder ({shorten(self.read)}){left_out}"


def files_of_split(path: Path, format: Format, split: str) -> Files:
    """The files to read: ``path`` itself, or the files of a folder that belong to the split.

    A file belongs to the split in its name ("test-0.parquet", "shapes_test.json"), and to train if its name has none
    ("part-0.parquet"). Any other ``split`` is a prefix of file names.

    Raises:
      ValueError: when the folder has no such file; the message lists the files that it has.
    """
    if path.is_file():
        return Files([path], [])
    found = files_of_format(path, format)
    chosen = [file for file in found if _belongs_to(file.name, split)]
    if not chosen:
        raise ValueError(f"{path} has no {format} file of split {split!r}{f', only {shorten(found)}' * bool(found)}")
    return Files(chosen, [file for file in found if file not in chosen])


def files_of_format(folder: Path, format: Format) -> list[Path]:
    """The files of a format in a folder, in its subfolder ``data``, or in its one subfolder that has any.

    Raises:
      ValueError: when several subfolders have such files.
    """
    if files := files_directly_in(folder, format):
        return files
    subfolders = sorted(inner for inner in folder.iterdir() if inner.is_dir() and inner.name[0] != ".")
    found = {inner: files for inner in subfolders if (files := files_directly_in(inner, format))}
    if len(found) > 1:
        raise ValueError(f"{folder} has {format} files in {len(found)} subfolders ({shorten(found)}): give one of them")
    return next(iter(found.values()), [])


def files_directly_in(folder: Path, format: Format) -> list[Path]:
    """The files of a format in a folder or in its subfolder ``data``, sorted; hidden and descriptive files excluded."""
    for place in (folder, folder / "data"):
        names = [name for name in os.listdir(place) if PATTERNS[format].search(name)] if place.is_dir() else []
        if files := sorted(place / name for name in names if name not in _DESCRIPTIONS and name[0] != "."):
            return files
    return []


def _belongs_to(name: str, split: str) -> bool:
    if not _SPLIT.fullmatch(split):
        return name.startswith(split)
    named = _SPLIT.search(name)
    return named[0].lower().startswith(split.lower()) if named else split == "train"


def shorten(files: Collection[Path]) -> str:
    """The first five names."""
    return ", ".join(file.name for file in [*files][:5]) + (" …" if len(files) > 5 else "")


def identify(files: Sequence[Path]) -> dict[str, str]:
    """Path, size and modification time of each file, for ``Source.key``."""
    stats = {str(file.resolve()): file.stat() for file in files}
    return {name: f"{stat.st_size:,} bytes; {stat.st_mtime_ns}" for name, stat in stats.items()}


class FileSource[Part](abc.ABC):
    """A source whose items are in parts (files, row groups) with known numbers of items."""

    format: ClassVar[Format]

    def __init__(self, path: Path, options: ItemOptions, *, split: str = "train", name: str | None = None) -> None:
        """Find the files and count their items.

        Args:
          path: a file or a folder.
          options: how items become records.
          split: of a folder's files, see ``files_of_split``.
          name: name of the source; default: the stem of the file or the name of the folder.

        Raises:
          ValueError: when there is no item, or for a file that is not of the format.
        """
        self.name = name or (path.stem if path.is_file() else path.resolve().name)
        self._options = options
        self._reader = ItemReader(self.name, path if path.is_dir() else path.parent, options)
        self.files = self._find(path, split)
        for file in filter(Path.is_file, self.files.read):
            with file.open("rb") as content:
                if known := wrong_file(content.read(512)):
                    raise ValueError(f"{file} {known}")
        opened = [part for file in self.files.read for part in self._open(file)]
        self._parts = [part for part, _ in opened]
        self._begins = np.cumsum([0, *(count for _, count in opened)])
        self._files_key = identify(self.files.read)
        if not len(self):
            raise ValueError(f"{path} has no items")

    def __len__(self) -> int:
        return int(self._begins[-1])

    def key(self) -> Any:
        return {"format": self.format, "name": self.name, "files": self._files_key, "options": self._options.key()}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        for part, (begin, end) in zip(self._parts, itertools.pairwise(self._begins.tolist()), strict=True):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield from self._read_part(part, first - begin, last - begin)

    def _find(self, path: Path, split: str) -> Files:
        return files_of_split(path, self.format, split)

    @abc.abstractmethod
    def _open(self, file: Path) -> Iterable[tuple[Part, int]]:
        """The parts of a file, each with its number of items."""

    @abc.abstractmethod
    def _read_part(self, part: Part, start: int, stop: int) -> Iterator[Read | Quarantined]:
        """Items ``start`` … ``stop − 1`` of a part."""
