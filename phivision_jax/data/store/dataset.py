"""The dataset directory: imported records, which the data engine reads whatever the format of the data was.

    DIR/manifest.json             schema, counts, hash of the tokenizer and template; bytes and sha256 of every file
    DIR/records-00000-000.array_record, …    one msgpack map per record: the fields of ``Record``, images as bytes
    DIR/index/text_tokens.npy     [N] i32: tokens of the conversation, images not counted
    DIR/index/image_offsets.npy   [N + 1] i64: the beginning of each record's images in image_sizes
    DIR/index/image_sizes.npy     [I, 2] i32: width and height in pixels, records in order
    DIR/index/modes.npy           [N] i8: position in MODES
    DIR/index/tasks.npy           [N] u8: position in the manifest's tasks, which begin with TASKS
    DIR/quarantine.jsonl          rejected items with their reasons
    DIR/work.json                 source and options of the import

A plan needs the lengths of millions of records and must not decode an image for them, so import writes the lengths. The
index is memory-mapped: the processes of a machine share one copy, and load only the parts that they use. A directory is
self-contained: it has the bytes of its images, and a record, file name or link that leads out of it is refused, so
datasets of strangers can be opened. ``importing`` writes it under another name and renames it at the end, so a
directory that exists is complete.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from phivision_jax.config import check_types
from phivision_jax.data.image_check import MAX_SIDE
from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import MODES, TASKS, Record
from phivision_jax.data.store.shard_files import READERS, Shard
from phivision_jax.io.files import locate, read_array
from phivision_jax.io.read_json import read_json
from phivision_jax.processor import Processor

SCHEMA = 4
MANIFEST = "manifest.json"
ARRAYS = {"text_tokens": "<i4", "image_offsets": "<i8", "image_sizes": "<i4", "modes": "|i1", "tasks": "|u1"}
"""The files of an index, and their types."""
_ENTRIES = tuple[Mapping[str, Any], ...]
_TYPES = dict.fromkeys(("records", "images", "text_tokens"), int) | {
    "text": str, "shards": _ENTRIES, "index": _ENTRIES, "tasks": tuple[str, ...], "counts": Mapping[str, Any]
}  # fmt: skip
_FILE_TYPES = {"file": str, "bytes": int, "sha256": str}
_COUNT_TYPES = {"quarantined": Mapping[str, int], "mode_from": Mapping[str, int], "system_messages": int}
_AT_ONCE = 32  # files checked at a time: on network storage each takes milliseconds


@dataclasses.dataclass(frozen=True)
class Index:
    """Sizes of N records with I images in total, for planning without decoding an image."""

    text_tokens: np.ndarray
    """[N] i32: tokens of the conversation, images not counted."""
    image_offsets: np.ndarray
    """[N + 1] i64: record i owns ``image_sizes[image_offsets[i]:image_offsets[i + 1]]``."""
    image_sizes: np.ndarray
    """[I, 2] i32: width and height in pixels, records in order."""
    modes: np.ndarray
    """[N] i8: position in ``MODES``."""
    tasks: np.ndarray
    """[N] u8: position in ``task_names``."""
    task_names: tuple[str, ...] = TASKS
    """``TASKS``, and the other tasks of the records."""

    @classmethod
    def open(cls, directory: Path, manifest: Mapping[str, Any]) -> Index:
        """The index of a dataset; it stays on disk (memory-mapped) until used.

        Raises:
          ValueError: for arrays of other types or lengths than the manifest's.
        """
        shapes = {"image_offsets": (manifest["records"] + 1,), "image_sizes": (manifest["images"], 2)}
        arrays: dict[str, Any] = {"task_names": tuple(manifest["tasks"])}
        for name, dtype in ARRAYS.items():
            shape = shapes.get(name, (manifest["records"],))
            arrays[name] = read_array(locate(directory, f"index/{name}.npy"), dtype, *shape)
        return cls(**arrays)

    def check(self, directory: Path) -> None:
        """Check every value.

        Raises:
          ValueError: for values that no import has written, naming the dataset.
        """
        limits = {"text_tokens": 2**31, "modes": len(MODES), "tasks": len(self.task_names), "num_images": 2**31}
        ranges = {"image_sizes": (1, MAX_SIDE + 1)} | {name: (0, end) for name, end in limits.items()}
        arrays = {name: getattr(self, name) for name in ranges}
        wrong = [k for k, (low, end) in ranges.items() if not np.all((low <= arrays[k]) & (arrays[k] < end))]
        if wrong or self.image_offsets[[0, -1]].tolist() != [0, len(self.image_sizes)]:
            name = wrong[0] if wrong else "image_offsets"
            raise ValueError(f"the index of {directory} is damaged: {name} out of range; copy or import it again")

    def __len__(self) -> int:
        return len(self.text_tokens)

    @property
    def num_images(self) -> np.ndarray:
        """[N] i64, computed at each access."""
        return np.diff(self.image_offsets)

    def sum_images(self, values: np.ndarray) -> np.ndarray:
        """[N] i64: the sum over each record's images of values [I]."""
        return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[self.image_offsets])

    def sizes_of(self, i: int) -> list[tuple[int, int]]:
        """Width and height of each image of record ``i``."""
        return [(w, h) for w, h in self.image_sizes[slice(*self.image_offsets[i : i + 2])].tolist()]


class Dataset:
    """A directory of records with random access. Safe to read from several threads."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self._index = Index.open(directory, manifest)
        # The source of the data and rejected items do not count.
        decisive = [manifest[key] for key in ("schema", "text", "shards", "index")]
        self.hash = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        """Datasets with the same hash have the same records with the same token counts."""
        self._shards = [Shard(locate(directory, s["file"]), s["records"]) for s in manifest["shards"]]
        # Number of each shard's first record.
        self._firsts = list(itertools.accumulate((s.records for s in self._shards), initial=0))[:-1]

    @functools.cached_property
    def index(self) -> Index:
        """Sizes of the records; every value is checked at the first access.

        Raises:
          ValueError: as ``Index.check``.
        """
        self._index.check(self.directory)
        return self._index

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Dataset:
        """Open a dataset; the index stays on disk (memory-mapped) until used.

        The size of every file is compared with the manifest, which finds incomplete copies. ``validate`` also checks
        the content.

        Raises:
          FileNotFoundError: when the directory, its manifest or one of its files is missing.
          ValueError: for another schema version, or a file that is not what the manifest describes.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(functools.partial(check_size, directory), (*manifest["shards"], *manifest["index"])))
        return cls(directory, manifest)

    def __len__(self) -> int:
        return int(self.manifest["records"])

    def __getitem__(self, i: int) -> Record:
        """Record ``i``.

        Raises:
          IndexError: when there is no such record.
          BadRecord: "unreadable", naming file and record, for bytes that are not what was written.
          OSError: when the file cannot be opened or read.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {self.directory}, which has {len(self)}")
        number = bisect.bisect_right(self._firsts, i) - 1
        shard, position = self._shards[number], int(i) - self._firsts[number]
        try:
            return Record.from_bytes(READERS.read(shard, position))
        except (OSError, MemoryError):
            raise
        except Exception as error:  # bytes that are not what was written can raise anything
            problem = f"record {position} of {shard.path} cannot be read: {error!s:.300}; see phivision data validate"
            raise BadRecord("unreadable", problem) from None


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset.

    Raises:
      FileNotFoundError: when there is none.
      ValueError: when it cannot be parsed, or has another schema version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no dataset in {directory} (no {MANIFEST}); make one with phivision data import")
    manifest = read_json(path)
    if (schema := manifest.get("schema")) != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r:.100}, this program reads {SCHEMA}; import the data again")
    manifest.setdefault("tasks", [*TASKS])  # versions without other tasks name none
    check_types(manifest, _TYPES, path)
    check_types(manifest["counts"], _COUNT_TYPES, path)
    for entry in (*manifest["shards"], *manifest["index"]):
        check_types({"records": 0} | entry, _FILE_TYPES | {"records": int}, path)
    counts = [shard.get("records", 0) for shard in manifest["shards"]]
    if min(counts, default=1) < 1 or sum(counts) != manifest["records"]:
        raise ValueError(f"{path}: its shards do not add up to its records; copy or import the dataset again")
    return manifest


def check_size(directory: Path, file: Mapping[str, Any]) -> None:
    """Compare the size of a file with its entry in the manifest.

    Raises:
      FileNotFoundError: when it is missing.
      ValueError: when they differ.
    """
    path = locate(directory, file["file"])
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; copy or import the dataset again") from None
    if size != file["bytes"]:
        raise ValueError(f"{path} has {size} bytes, not {file['bytes']}: a cut-off copy? Copy or import it again")


def check_processor(dataset: Dataset, processor: Processor) -> None:
    """Raise ValueError when the dataset's tokens were counted with another tokenizer or chat template."""
    if dataset.manifest["text"] != processor.text_fingerprint:
        remedy = "import the records again with this one, or name the checkpoint that they were imported with"
        raise ValueError(f"{dataset.directory}: tokens were counted with another tokenizer or chat template; {remedy}")


def describe_file(directory: Path, name: str) -> dict[str, Any]:
    """The manifest's entry of a file in the dataset: its name, bytes and sha256."""
    with (directory / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": name, "bytes": file.tell(), "sha256": digest}
