"""The reader for a file or folder, chosen by its names or by ``format``."""

import itertools
import os
import re
from pathlib import Path
from typing import Any, Literal

from phivision_jax.data.sources.array_record import ArrayRecordSource
from phivision_jax.data.sources.files import PATTERNS, FileSource, files_directly_in, files_of_format
from phivision_jax.data.sources.item_options import Format, ItemOptions
from phivision_jax.data.sources.json_files import JsonSource
from phivision_jax.data.sources.parquet import ParquetSource
from phivision_jax.data.sources.source import Source

_READERS: dict[str, type[FileSource[Any]]] = {r.format: r for r in (JsonSource, ParquetSource, ArrayRecordSource)}

_LOOKED_FOR = "looked for .json, .jsonl, .ndjson, .parquet, .array_record, dataset_info.json (TFDS); --format chooses"
_OTHERS = {
    r"\.(gz|zst|bz2|xz|lz4)$": "is compressed: unpack it first (gunzip, unzstd, ...)",
    r"\.(zip|tar|tgz|7z|rar)$": "is an archive: unpack it first, and import the files with --images FOLDER",
    r"\.(csv|tsv|xlsx?|ods)$": "is a table: write JSON lines (pandas: to_json(FILE, orient='records', lines=True))",
    r"\.(arrow|feather)$|^dataset_dict\.json$": "is of datasets.save_to_disk: write each split with to_parquet(FILE)",
    r"\.tfrecords?(-\d+-of-\d+)?$": "is a file of TensorFlow: import its TFDS data set, by its folder",
}
"""Regular expressions of names, and the end of a sentence about such a file."""


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
      format: how to read it; "auto" decides by the file's extension or the folder's files.
      split: of a TFDS data set, or of a folder of JSON or parquet files (see ``files_of_split``).
      options: how items become records.
      name: name of the source; default: the stem of the file or the name of the folder.

    Raises:
      FileNotFoundError: when there is no such file or folder.
      ValueError: when the format is not clear, or the data cannot be read in it; for bad options.
      ModuleNotFoundError: for TFDS when its package is not installed.
    """
    options.check()
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
    if format == "tfds":
        from phivision_jax.data.sources.tfds import TfdsSource  # TFDS takes a second to import, and is an extra

        return TfdsSource(spec.removeprefix("tfds:"), options, split=split, name=name)
    if format not in _READERS:
        raise ValueError(f"format must be one of auto, tfds, {', '.join(_READERS)}, not {format!r}")
    return _READERS[format](path, options, split=split, name=name)


def _format_of(path: Path) -> Format:
    # Our own datasets and those of TFDS have files of other formats too.
    if (path / "manifest.json").is_file() and any(path.glob("*.array_record")):
        return "array-record"
    if (path / "dataset_info.json").is_file() and not any(path.glob("*.arrow")):
        return "tfds"
    if path.is_file():
        names, found = [path.name], [format for format, pattern in PATTERNS.items() if pattern.search(path.name)]
    else:
        names, found = sorted(os.listdir(path)), [format for format in PATTERNS if files_directly_in(path, format)]
        found = found or [format for format in PATTERNS if files_of_format(path, format)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} has files of more than one format ({', '.join(found)}): choose one with --format")
    for name, (pattern, known) in itertools.product(names, _OTHERS.items()):
        if re.search(pattern, name, re.IGNORECASE):
            raise ValueError(f"{path if path.is_file() else path / name} {known}")
    problem = (
        f"the format of {path} is not clear from its name" if path.is_file() else f"{path} has nothing that can be read"
    )
    raise ValueError(f"{problem}: {_LOOKED_FOR}")
