"""The directory that holds imported records: what the data engine reads, whatever the data once looked like.

    DIR/manifest.json             schema, counts, hash of the tokenizer and template; bytes and sha256 of every file
    DIR/records-00000-000.array_record, …    one msgpack map per record: the fields of ``Record``, images as bytes
    DIR/index/text_tokens.npy     [N] i32: tokens of the conversation, images not counted
    DIR/index/num_images.npy      [N] i32
    DIR/index/image_sizes.npy     [I, 2] i32: width and height in pixels, records in order
    DIR/index/modes.npy           [N] i8: position in MODES
    DIR/index/tasks.npy           [N] u8: position in TASKS
    DIR/quarantine.jsonl          what was not imported, and why

The plan needs lengths of millions of records and must not decode an image for them, so lengths are written at import.
A directory is self-contained: it holds the images' bytes, whatever paths they came from. ``importing`` writes it under
another name and renames it at the end, so a directory that exists is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phivision_jax.data.records import Record

SCHEMA = 2
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Index:
    """What planning needs to know of N records holding I images in all; no image is decoded for it."""

    text_tokens: np.ndarray
    """[N] i32: tokens of the conversation, images not counted."""
    num_images: np.ndarray
    """[N] i32."""
    image_sizes: np.ndarray
    """[I, 2] i32: width and height in pixels, records in order."""
    modes: np.ndarray
    """[N] i8: position in ``MODES``."""
    tasks: np.ndarray
    """[N] u8: position in ``TASKS``."""

    @classmethod
    def open(cls, directory: Path) -> Index:
        """The index of a dataset; it stays on disk (memory-mapped) until used."""
        return cls(**{f.name: np.load(directory / "index" / f"{f.name}.npy", "r") for f in dataclasses.fields(cls)})

    def __len__(self) -> int:
        return len(self.text_tokens)

    @functools.cached_property
    def image_offsets(self) -> np.ndarray:
        """[N + 1] i64: record i owns ``image_sizes[image_offsets[i]:image_offsets[i + 1]]``."""
        return np.concatenate([[0], np.cumsum(self.num_images, dtype=np.int64)])

    def sizes_of(self, i: int) -> list[tuple[int, int]]:
        """Width and height of each image of record ``i``."""
        offsets = self.image_offsets
        return [(int(w), int(h)) for w, h in self.image_sizes[offsets[i] : offsets[i + 1]]]


class _Shard(NamedTuple):
    """What array_record calls a FileInstruction: with the number of records given, opening a dataset opens no shard."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Dataset:
    """A directory of records with random access. Safe to read from several threads."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], index: Index) -> None:
        self.directory = directory
        self.manifest = manifest
        self.index = index
        self.hash = content_hash(manifest)
        """Two datasets of one hash hold the same records, measured alike."""
        # Imported on first use: the workers of an import need this module, and not Grain.
        import grain

        shards = [(str(directory / s["file"]), s["records"]) for s in manifest["shards"]]
        self._source = grain.sources.ArrayRecordDataSource([_Shard(file, 0, n, n) for file, n in shards])

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Dataset:
        """Open what an import wrote; the index stays on disk (memory-mapped) until used.

        Raises:
          FileNotFoundError: when the directory, its manifest or one of its files is missing.
          ValueError: for another schema version, or a file whose size is not the manifest's.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        if not directory.is_dir():
            raise FileNotFoundError(f"no dataset directory {directory}; make one with phivision data import")
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {MANIFEST}: it is not a dataset; make one with phivision data import"
            )
        try:
            manifest = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); copy or import the dataset again") from None
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            found = manifest.get("schema") if isinstance(manifest, dict) else None
            raise ValueError(f"{path}: schema {found!r}, this program reads {SCHEMA}; import the data again")
        for file in (*manifest["shards"], *manifest["index"]):
            try:
                size = (directory / file["file"]).stat().st_size
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{directory / file['file']} is missing; copy or import the dataset again"
                ) from None
            if size != file["bytes"]:
                raise ValueError(
                    f"{directory / file['file']} holds {size} bytes, the manifest says {file['bytes']}: "
                    "a cut-off copy? Copy or import the dataset again"
                )
        return cls(directory, manifest, Index.open(directory))

    def __len__(self) -> int:
        return int(self.manifest["records"])

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {self.directory}, which holds {len(self)}")
        return Record.from_bytes(self._source[int(i)])

    def verify(self) -> None:
        """Read every byte and compare it with the manifest.

        Raises:
          ValueError: naming the first file whose sha256 differs.
        """
        for file in (*self.manifest["shards"], *self.manifest["index"]):
            if describe_file(self.directory, file["file"])["sha256"] != file["sha256"]:
                raise ValueError(f"{self.directory / file['file']}: sha256 differs from the manifest; import again")


def content_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 over what decides the records and their measures: every file's own, the order of shards, the schema.

    Where the data came from and what was left out of it do not count.
    """
    decisive = [manifest["schema"], manifest["text"], manifest["shards"], manifest["index"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def describe_file(directory: Path, name: str) -> dict[str, Any]:
    """The manifest's entry of a file in the dataset: its name, bytes and sha256."""
    path = directory / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": name, "bytes": path.stat().st_size, "sha256": digest}
