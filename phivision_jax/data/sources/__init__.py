"""Where records come from: one reader per format, all of one shape.

A source is numbered items; ``read(start, stop)`` gives for each either a ``Read`` (a record, images as bytes) or a
``Quarantined``, in order, the same at every call. An import cuts the numbers into chunks and reads these in processes
of their own, so a source can be pickled, and opens files only inside ``read``.

    json_files    .json (an array, or one object per line), .jsonl, .ndjson
    parquet       .parquet, as the Hugging Face hub keeps it
    tfds          TensorFlow Datasets prepared as ArrayRecord or parquet, without TensorFlow
    array_record  payloads that are our records, JSON objects or msgpack maps
    memory        records that are in memory already
    easy_vqa      the small real data set of the demo

What an item of any of these may look like, and how it becomes a record, is said in ``items``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.records import Record

if TYPE_CHECKING:
    from phivision_jax.data.sources.items import ItemOptions

Format = Literal["json", "parquet", "tfds", "array-record"]
ModeFrom = Literal["stated", "inferred", "default"]


@dataclasses.dataclass(frozen=True)
class Read:
    """A record, and what the data did not say by itself: an import counts it."""

    record: Record
    """With a mode, and images as bytes."""
    mode_from: ModeFrom
    """Whether the mode was stated, inferred from how the answers begin, or neither."""
    system: bool
    """Whether the conversation came with a system message, kept or not."""
    where: str = ""
    """For a person: file and line, row or number; stands in the quarantine if the record turns out bad."""


class Source(Protocol):
    """What an import reads."""

    name: str
    """Goes into ``Record.source`` where the data says nothing else."""

    def __len__(self) -> int:
        """Items in all."""
        ...

    def key(self) -> Any:
        """A JSON value that changes when the content or the options of reading do: whether a resume may go on.

        Names, sizes and modification times of the files, the reading options; no content is hashed.
        """
        ...

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        """Items ``start`` … ``stop − 1``: exactly one result for each."""
        ...


def open_source(
    spec: str | os.PathLike[str],
    *,
    format: Format | Literal["auto"] = "auto",
    split: str = "train",
    options: ItemOptions,
    name: str | None = None,
) -> Source:
    """Open a file, a folder, or "tfds:NAME" for reading.

    Args:
      spec: what to read.
      format: how; "auto" looks at the file's extension or at what the folder holds.
      split: of a TFDS data set; of a folder of JSON or parquet files, see ``files_of``.
      options: how items become records.
      name: of the source; default: the stem of the file or the name of the folder.

    Raises:
      FileNotFoundError: when there is no such file or folder.
      ValueError: when the format cannot be told, or the data cannot be read in it.
      ModuleNotFoundError: for TFDS when its package is not installed.
    """
    spec = os.fspath(spec)
    path = Path(spec)
    if spec.startswith("tfds:"):
        if format not in ("auto", "tfds"):
            raise ValueError(f"{spec} is read as tfds, not as {format}")
        format = "tfds"
    elif not path.exists():
        raise FileNotFoundError(f"there is no file or folder {spec}")
    elif format == "auto":
        format = _format_of(path)
    # Only what is needed is imported: TFDS takes a second, and is an extra.
    if format == "json":
        from phivision_jax.data.sources.json_files import JsonSource

        return JsonSource(path, options, split=split, name=name)
    if format == "parquet":
        from phivision_jax.data.sources.parquet import ParquetSource

        return ParquetSource(path, options, split=split, name=name)
    if format == "tfds":
        from phivision_jax.data.sources.tfds import TfdsSource

        return TfdsSource(spec.removeprefix("tfds:"), options, split=split, name=name)
    if format == "array-record":
        from phivision_jax.data.sources.array_record import ArrayRecordSource

        return ArrayRecordSource(path, options, name=name)
    raise ValueError(f"format must be one of auto, {', '.join(get_args(Format))}, not {format!r}")


_LOOKED_FOR = (
    "looked for .json, .jsonl or .ndjson, .parquet, .array_record files, and for dataset_info.json (TFDS); "
    "say which with --format"
)
_PATTERNS: dict[Format, re.Pattern[str]] = {
    "json": re.compile(r"\.(json|jsonl|ndjson)$", re.IGNORECASE),
    "parquet": re.compile(r"\.(parquet|pq)$", re.IGNORECASE),
    # TFDS and Beam put the number of the shard behind: name-train.array_record-00000-of-00008.
    "array-record": re.compile(r"\.(array_record|arrayrecord)(-\d+-of-\d+)?$", re.IGNORECASE),
}
_COMPRESSED = re.compile(r"\.(json|jsonl|ndjson|parquet)\.(gz|zst|bz2|xz|zip|lz4)$", re.IGNORECASE)
# JSON that describes data and is none.
_DESCRIPTIONS = {
    "config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "features.json", "manifest.json",
    "state.json",
}  # fmt: skip


def _format_of(path: Path) -> Format:
    if path.is_file():
        for format, pattern in _PATTERNS.items():
            if pattern.search(path.name):
                return format
        _refuse_compressed([path.name], path)
        raise ValueError(f"the format of {path} cannot be told from its name: {_LOOKED_FOR}")
    # A data set of ours, or of TFDS, holds files of other kinds too.
    if (path / "manifest.json").is_file() and any(path.glob("*.array_record")):
        return "array-record"
    if (path / "dataset_info.json").is_file() and not any(path.glob("*.arrow")):
        return "tfds"
    found = [format for format in _PATTERNS if _held(path, format)]
    found = found or [format for format in _PATTERNS if candidates(path, format)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} holds files of more than one format ({', '.join(found)}): say which with --format")
    _refuse_compressed(sorted(os.listdir(path)), path)
    raise ValueError(f"{path} holds nothing that can be read: {_LOOKED_FOR}")


def _refuse_compressed(names: Iterable[str], path: Path) -> None:
    if name := next((name for name in names if _COMPRESSED.search(name)), None):
        where = path if path.is_file() else path / name
        raise ValueError(f"{where} is compressed: unpack it first (gunzip, unzstd, ...)")


def candidates(folder: Path, format: Format) -> list[Path]:
    """The files of a format that lie in a folder, or in its subfolder ``data``, or in its one subfolder with such.

    Raises:
      ValueError: when several subfolders hold such files.
    """
    if files := _held(folder, format):
        return files
    inside = sorted(inner for inner in folder.iterdir() if inner.is_dir() and inner.name[0] != ".")
    found = [files for inner in inside if (files := _held(inner, format))]
    if len(found) > 1:
        names = [files[0].relative_to(folder).parts[0] for files in found]
        shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        raise ValueError(f"{folder} holds {format} files in {len(names)} subfolders ({shown}): give one of them")
    return found[0] if found else []


def _held(folder: Path, format: Format) -> list[Path]:
    for where in (folder, folder / "data"):
        names = sorted(os.listdir(where)) if where.is_dir() else []
        files = [where / n for n in names if _PATTERNS[format].search(n) and n not in _DESCRIPTIONS and n[0] != "."]
        if files:
            return files
    return []


# As a word of its own: "test-0", "shapes_test", no "testimony".
_SPLIT = re.compile(
    r"(?<![a-z])(train(?:ing)?|validation|valid|val|dev|test(?:ing)?|eval(?:uation)?)(?![a-z])", re.IGNORECASE
)


class Files(NamedTuple):
    """What of a folder is read, and what of the same format is not."""

    read: list[Path]
    left_out: list[Path]


def files_of(path: Path, format: Format, split: str) -> Files:
    """The files to read: the one given, or those of a folder that are of the split.

    A file is of the split that stands in its name ("test-0.parquet", "shapes_test.json"), and of train where none does
    ("part-0.parquet"). Any other ``split`` is what names begin with.

    Raises:
      ValueError: when the folder holds none; with the names there are.
    """
    if path.is_file():
        return Files([path], [])
    found = candidates(path, format)
    chosen = [file for file in found if _is_of(file.name, split)]
    if not chosen:
        raise ValueError(
            f"{path} holds no {format} file of split {split!r}" + (f", only {shorten(found)}" if found else "")
        )
    return Files(chosen, [file for file in found if file not in chosen])


def _is_of(name: str, split: str) -> bool:
    if not _SPLIT.fullmatch(split):
        return name.startswith(split)
    named = _SPLIT.search(name)
    return named[0].lower().startswith(split.lower()) if named else split == "train"


def shorten(files: Sequence[Path]) -> str:
    """The first names."""
    return ", ".join(file.name for file in files[:5]) + (" …" if len(files) > 5 else "")


def describe(files: list[Path]) -> list[list[Any]]:
    """Path, size and modification time of each: the part of ``Source.key`` that is about files."""
    stats = [(file, file.stat()) for file in files]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
