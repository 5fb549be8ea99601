"""Records, and the directory that holds them: what the data engine reads, whatever the data once looked like.

    DIR/manifest.json             counts, bytes, sha256 of every file, schema version, processor fingerprint
    DIR/index.npz                 per record: text tokens, image sizes, mode, task
    DIR/records-00000.array_record, …

The plan needs lengths of millions of records and must not decode an image for them, so lengths are written at import
(``index.npz``). A directory is self-contained: it holds the images' bytes, whatever paths they came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import grain
import msgpack
import numpy as np

SCHEMA = 1

Mode = Literal["think", "nothink"]
MODES: tuple[str, ...] = get_args(Mode)
# The index and the metrics hold positions in this tuple: append, never reorder.
TASKS: tuple[str, ...] = ("general", "math", "science", "gui", "ocr", "chart", "document", "caption", "text")


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation with its images, before any tokenizer or resizing.

    ``images`` are encoded files (bytes) or paths, in the order in which ``<image>`` stands in the messages.
    ``messages`` are ``{"role": …, "content": str}``. ``mode`` is how the assistant answers; None: to be inferred.

    Raises:
      ValueError: for an empty id, no messages, an unknown mode or an unknown task (with the closest known one).
    """

    id: str
    source: str
    images: tuple[bytes | str, ...]
    messages: tuple[Mapping[str, str], ...]
    mode: Mode | None = None
    task: str = "general"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError(f"a record of source {self.source!r} has an empty id; give each record a unique one")
        if not self.messages:
            raise ValueError(f"record {self.id!r} has no messages")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"record {self.id!r}: mode must be one of {MODES} or None, not {self.mode!r}")
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TASKS)}"
            raise ValueError(f"record {self.id!r}: unknown task {self.task!r}; {hint}")

    def to_bytes(self) -> bytes:
        """The payload of one ArrayRecord entry (msgpack)."""
        return msgpack.packb({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def from_bytes(cls, payload: bytes) -> Record:
        fields = msgpack.unpackb(payload)
        return cls(**{**fields, "images": tuple(fields["images"]), "messages": tuple(fields["messages"])})


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
    """[N] i8: position in ``MODES``, −1 for None."""
    tasks: np.ndarray
    """[N] u8: position in ``TASKS``."""

    @functools.cached_property
    def image_offsets(self) -> np.ndarray:
        """[N + 1] i64: record i owns ``image_sizes[image_offsets[i]:image_offsets[i + 1]]``."""
        return np.concatenate([[0], np.cumsum(self.num_images, dtype=np.int64)])


class Dataset:
    """A directory of records with random access. Safe to read from several threads."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], index: Index, digest: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.index = index
        self.hash = digest
        """sha256 of the manifest, hence of every file: two datasets of one hash hold the same records."""
        self._source = grain.sources.ArrayRecordDataSource([str(directory / s["file"]) for s in manifest["shards"]])

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Dataset:
        """Open what ``write_dataset`` wrote.

        Raises:
          FileNotFoundError: when the directory, its manifest or one of its files is missing.
          ValueError: for another schema version, or a file whose size is not the manifest's.
        """
        directory = Path(directory)
        path = directory / "manifest.json"
        if not directory.is_dir():
            raise FileNotFoundError(f"no dataset directory {directory}; import one first")
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no manifest.json: it is not a dataset, or its import was cut off")
        content = path.read_bytes()
        manifest = json.loads(content)
        if manifest.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {manifest.get('schema')!r}, this program reads {SCHEMA}; import again")
        for file in (*manifest["shards"], manifest["index"]):
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
        with np.load(directory / manifest["index"]["file"]) as arrays:
            index = Index(**{f.name: arrays[f.name] for f in dataclasses.fields(Index)})
        return cls(directory, manifest, index, hashlib.sha256(content).hexdigest())

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
        for file in (*self.manifest["shards"], self.manifest["index"]):
            if describe_file(self.directory / file["file"])["sha256"] != file["sha256"]:
                raise ValueError(f"{self.directory / file['file']}: sha256 differs from the manifest; import again")


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest's entry of a file: its name, bytes and sha256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
