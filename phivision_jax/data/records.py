"""Records, and the directory that holds them: what the data engine reads, whatever the data once looked like.

    DIR/manifest.json             counts, bytes, sha256 of every file, schema version, text fingerprint
    DIR/index.npz                 per record: text tokens, image sizes, mode, task
    DIR/records-00000.array_record, …

The plan needs lengths of millions of records and must not decode an image for them, so lengths are written at import
(``index.npz``). A directory is self-contained: it holds the images' bytes, whatever paths they came from. It is written
under another name and renamed at the end, so a directory that exists is whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import grain
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import Progress

from phivision_jax.batch import IMAGE_TOKEN
from phivision_jax.images.decode import image_size
from phivision_jax.text import chat

if TYPE_CHECKING:
    from phivision_jax.processor import Processor

SCHEMA = 1
SHARD_BYTES = 256 * 2**20
"""A shard is closed once it holds this many payload bytes: large enough for few files, small enough to copy."""

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


def mode_of(record: Record) -> Mode:
    """The record's mode; where it states none, "think" if an assistant turn holds ``<think>``, else "nothink"."""
    if record.mode is not None:
        return record.mode
    thinks = any("<think>" in message["content"] for message in record.messages if message["role"] == "assistant")
    return "think" if thinks else "nothink"


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
            if _describe(self.directory / file["file"])["sha256"] != file["sha256"]:
                raise ValueError(f"{self.directory / file['file']}: sha256 differs from the manifest; import again")


def write_dataset(
    directory: str | os.PathLike[str],
    records: Iterable[Record],
    processor: Processor,
    *,
    total: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Dataset:
    """Write records and their index; ``total`` is for the progress bar when ``records`` has no length.

    The same records and processor give the same bytes in every file.

    Raises:
      FileExistsError: when ``directory`` is there already (nothing is overwritten).
      ValueError: naming the record that cannot be measured (broken image, markers and images that do not match).
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists; remove it or choose another name")
    if total is None and isinstance(records, Sized):
        total = len(records)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an import that was killed
    partial.mkdir(parents=True)
    try:
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task(f"Writing {directory.name}", total=total)
            counted = bar.track(records, task_id=task)
            columns = _write_shards(partial, counted, processor, shard_bytes)
        index = Index(
            text_tokens=np.asarray(columns["text_tokens"], np.int32),
            num_images=np.asarray([len(sizes) for sizes in columns["sizes"]], np.int32),
            image_sizes=np.asarray([s for sizes in columns["sizes"] for s in sizes], np.int32).reshape(-1, 2),
            modes=np.asarray(columns["modes"], np.int8),
            tasks=np.asarray(columns["tasks"], np.uint8),
        )
        np.savez(partial / "index.npz", **{f.name: getattr(index, f.name) for f in dataclasses.fields(Index)})
        manifest = {
            "schema": SCHEMA,
            "records": len(index.text_tokens),
            "images": len(index.image_sizes),
            "text_tokens": int(index.text_tokens.sum(dtype=np.int64)),
            "text": processor.text_fingerprint,
            "shards": [_describe(path) for path in sorted(partial.glob("*.array_record"))],
            "index": _describe(partial / "index.npz"),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Dataset.open(directory)


def _write_shards(
    directory: Path, records: Iterable[Record], processor: Processor, shard_bytes: int
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"text_tokens": [], "sizes": [], "modes": [], "tasks": []}
    writer, written, shards = None, 0, 0
    try:
        for record in records:
            if writer is None:
                # group_size:1 stores records one by one: random access reads no neighbours.
                writer = ArrayRecordWriter(str(directory / f"records-{shards:05d}.array_record"), "group_size:1")
                shards, written = shards + 1, 0
            try:
                images = tuple(Path(i).read_bytes() if isinstance(i, str) else i for i in record.images)
                columns["sizes"].append([image_size(image, f"image {k}") for k, image in enumerate(images)])
                columns["text_tokens"].append(count_text_tokens(record, processor))
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"record {record.id!r} of {record.source!r}: {error}") from error
            columns["modes"].append(MODES.index(record.mode) if record.mode else -1)
            columns["tasks"].append(TASKS.index(record.task))
            payload = dataclasses.replace(record, images=images).to_bytes()
            writer.write(payload)
            written += len(payload)
            if written >= shard_bytes:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    if not columns["modes"]:
        raise ValueError("there are no records to write")
    return columns


def count_text_tokens(record: Record, processor: Processor) -> int:
    """Tokens of the conversation, image columns not counted; no image is opened.

    Raises:
      ValueError: for messages that cannot be encoded, or not as many markers as images.
    """
    ids, _ = chat.encode(processor.tokenizer, processor.template, record.messages, mode=mode_of(record))
    markers = ids.count(IMAGE_TOKEN)
    if markers != len(record.images):
        raise ValueError(f"{markers} {chat.IMAGE_MARKER} markers in the messages, but {len(record.images)} images")
    return len(ids) - markers


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
