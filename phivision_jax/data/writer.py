"""Writing a dataset directory (``records`` says what is in it).

It is written under another name and renamed at the end: a directory that exists is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import Progress

from phivision_jax.data.encode import count_text_tokens
from phivision_jax.data.records import MODES, SCHEMA, TASKS, Dataset, Index, Record, describe_file
from phivision_jax.images.decode import image_size
from phivision_jax.processor import Processor

SHARD_BYTES = 256 * 2**20
"""A shard is closed once it holds this many payload bytes: large enough for few files, small enough to copy."""


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
            "processor": processor.fingerprint,
            "shards": [describe_file(path) for path in sorted(partial.glob("*.array_record"))],
            "index": describe_file(partial / "index.npz"),
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
