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
self-contained, since it has the bytes of its images. ``importing`` writes it under another name and renames it at the
end, so a directory that exists is complete.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from phivision_jax.data.quarantine import BadRecord
from phivision_jax.data.records import TASKS, Record
from phivision_jax.data.store.shard_files import READERS, Shard
from phivision_jax.io.read_json import read_json
from phivision_jax.processor import Processor

SCHEMA = 4
MANIFEST = "manifest.json"
ARRAYS = ("text_tokens", "image_offsets", "image_sizes", "modes", "tasks")
"""The files of an index."""
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
    def open(cls, directory: Path, tasks: Sequence[str]) -> Index:
        """The index of a dataset; it stays on disk (memory-mapped) until used."""
        arrays = {name: np.load(directory / "index" / f"{name}.npy", "r") for name in ARRAYS}
        return cls(**arrays, task_names=tuple(tasks))

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
        first, end = self.image_offsets[i : i + 2]
        return [(int(w), int(h)) for w, h in self.image_sizes[first:end]]


class Dataset:
    """A directory of records with random access. Safe to read from several threads."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], index: Index) -> None:
        self.directory = directory
        self.manifest = manifest
        self.index = index
        self.hash = content_hash(manifest)
        """Datasets with the same hash have the same records with the same token counts."""
        self._shards = [Shard(directory / s["file"], s["records"]) for s in manifest["shards"]]
        # Number of each shard's first record.
        self._firsts = list(itertools.accumulate((s.records for s in self._shards), initial=0))[:-1]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Dataset:
        """Open a dataset; the index stays on disk (memory-mapped) until used.

        The size of every file is compared with the manifest, which finds incomplete copies. ``validate`` also checks
        the content.

        Raises:
          FileNotFoundError: when the directory, its manifest or one of its files is missing.
          ValueError: for another schema version, or a file of another size than in the manifest.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(functools.partial(check_size, directory), (*manifest["shards"], *manifest["index"])))
        return cls(directory, manifest, Index.open(directory, task_names(manifest)))

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
            problem = f"record {position} of {shard.path} cannot be read: {error}; phivision data validate lists all"
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
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}, this program reads {SCHEMA}; import the data again")
    return manifest


def task_names(manifest: Mapping[str, Any]) -> Sequence[str]:
    """The names of the tasks that an index numbers; manifests of versions without other tasks have none."""
    return manifest.get("tasks", TASKS)


def check_size(directory: Path, file: Mapping[str, Any]) -> None:
    """Compare the size of a file with its entry in the manifest.

    Raises:
      FileNotFoundError: when it is missing.
      ValueError: when they differ.
    """
    path = directory / file["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; copy or import the dataset again") from None
    if size != file["bytes"]:
        raise ValueError(f"{path} has {size} bytes, not {file['bytes']}: a cut-off copy? Copy or import it again")


def check_processor(dataset: Dataset, processor: Processor) -> None:
    """Raise ValueError when the dataset's tokens were counted with another tokenizer or chat template."""
    if dataset.manifest["text"] != processor.text_fingerprint:
        raise ValueError(
            f"{dataset.directory}: tokens were counted with another tokenizer or chat template; import the records "
            "again with this one, or name the checkpoint that they were imported with"
        )


def content_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 over the hashes of all files, the order of shards and the schema.

    The source of the data and rejected items do not count.
    """
    decisive = [manifest["schema"], manifest["text"], manifest["shards"], manifest["index"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def describe_file(directory: Path, name: str) -> dict[str, Any]:
    """The manifest's entry of a file in the dataset: its name, bytes and sha256."""
    path = directory / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": name, "bytes": path.stat().st_size, "sha256": digest}
