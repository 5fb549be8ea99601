"""The steps from records to a dataset directory: check and measure each, write shards, then index and manifest.

    Read | Quarantined ──► CheckRecord ──► Accepted | Quarantined ──► RecordSink ──► records-00007-000.array_record, …
                                                                          │ summary of the chunk
                       index/, quarantine.jsonl, manifest.json ◄── write_index_and_manifest

Import runs exactly these (``importing``); a step that filters or rewrites records runs before ``CheckRecord``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.data import quarantine
from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.data.records import MODES, TASKS, mode_of
from phivision_jax.data.sources.source import Read
from phivision_jax.data.store.dataset import MANIFEST, SCHEMA, Index, describe_file
from phivision_jax.data.store.record_check import RecordSize, measure_record
from phivision_jax.io import atomic
from phivision_jax.io.work import Summary
from phivision_jax.processor import Processor

DTYPES = {"text_tokens": "<i4", "num_images": "<i4", "image_sizes": "<i4", "modes": "|i1", "tasks": "|u1"}
"""Columns of a chunk's summary. They become the index, where ``image_offsets`` replaces ``num_images``."""


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A checked record with its size for the index; its mode and lineage are set."""

    read: Read
    size: RecordSize


@dataclasses.dataclass(frozen=True)
class CheckRecord:
    """Step: check and measure what a source has read."""

    processor: Processor
    decode: bool

    def __call__(self, item: Read | Quarantined) -> list[Accepted | Quarantined]:
        if isinstance(item, Quarantined):
            return [item]
        record = item.record
        try:
            size = measure_record(record, self.processor, decode=self.decode)
        except BadRecord as bad:
            return [Quarantined(record.id, record.source, bad.reason, str(bad), item.where)]
        lineage = record.lineage or (f"import: {item.where}",)
        record = dataclasses.replace(record, mode=mode_of(record), lineage=lineage)
        return [Accepted(dataclasses.replace(item, record=record), size)]


class RecordSink:
    """ArrayRecord files of about ``shard_bytes`` payload bytes each; the last one of a chunk is smaller."""

    def __init__(self, folder: Path, chunk: str, *, shard_bytes: int) -> None:
        self._folder, self._chunk, self._limit = folder, chunk, shard_bytes
        self._columns: dict[str, list[Any]] = {name: [] for name in DTYPES}
        self._counts = {name: collections.Counter[str]() for name in ("modes", "mode_from", "tasks", "sources")}
        self._quarantine: list[bytes] = []
        self._system_messages = 0
        self._shards: list[dict[str, Any]] = []
        self._writer: ArrayRecordWriter | None = None
        self._name, self._bytes, self._records = "", 0, 0

    def add(self, result: Accepted | Quarantined) -> None:
        if isinstance(result, Quarantined):
            self._quarantine.append(result.to_line())
            return
        record, size = result.read.record, result.size
        assert record.mode is not None
        self._write(record.to_bytes())
        self._columns["text_tokens"].append(size.text_tokens)
        self._columns["num_images"].append(len(size.image_sizes))
        self._columns["image_sizes"] += size.image_sizes
        self._columns["modes"].append(MODES.index(record.mode))
        self._columns["tasks"].append(TASKS.index(record.task))
        names = (record.mode, result.read.mode_from, record.task, record.source)
        for counter, name in zip(self._counts.values(), names, strict=True):
            counter[name] += 1
        self._system_messages += result.read.system

    def close(self) -> Summary:
        self._close_shard()
        return {
            "columns": {name: np.asarray(values, DTYPES[name]).tobytes() for name, values in self._columns.items()},
            "shards": self._shards,
            "quarantine": self._quarantine,
            "counts": self._counts,
            "system_messages": self._system_messages,
        }

    def _write(self, payload: bytes) -> None:
        with self._as_os_error():
            if self._writer is None:
                self._name = f"records-{self._chunk}-{len(self._shards):03d}.array_record"
                self._bytes = self._records = 0
                # group_size:1 stores records one by one: random access reads no neighbours.
                self._writer = ArrayRecordWriter(str(self._folder / self._name), "group_size:1")
            self._writer.write(payload)
        self._bytes += len(payload)
        self._records += 1
        if self._bytes >= self._limit:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._as_os_error():
                writer.close()
            self._shards.append({**describe_file(self._folder, self._name), "records": self._records})

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        """The writer raises RuntimeError("write() failed: No space left on device; writing …") for any error."""
        try:
            yield
        except RuntimeError as error:
            self._writer = None
            reason = str(error).partition("failed: ")[2].partition(";")[0] or str(error)
            raise OSError(f"{self._name} cannot be written: {reason}") from None


def write_quarantine(directory: Path, summaries: Iterator[Summary]) -> Path:
    """Write ``quarantine.jsonl``: every rejected item of these chunks."""
    with atomic.new_file(directory / quarantine.FILE) as file:
        for summary in summaries:
            file.writelines(summary["quarantine"])
    return directory / quarantine.FILE


def write_index_and_manifest(directory: Path, summaries: Callable[[], Iterator[Summary]], text: str) -> None:
    """Complete a dataset whose chunks are committed; the complete index is in memory, some 20 bytes per record.

    Args:
      directory: of the shards.
      summaries: iterates over the summaries of ``RecordSink`` in order.
      text: hash of the tokenizer and template that counted tokens.

    Raises:
      ValueError: when there are no records.
    """
    quarantined = write_quarantine(directory, summaries())
    shards: list[dict[str, Any]] = []
    columns: dict[str, list[bytes]] = {name: [] for name in DTYPES}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    system_messages = 0
    for summary in summaries():
        shards += summary["shards"]
        for name, column in columns.items():
            column.append(summary["columns"][name])
        for name, counter in summary["counts"].items():
            counts[name].update(counter)
        counts["quarantined"].update(json.loads(line)["reason"] for line in summary["quarantine"])
        system_messages += summary["system_messages"]
    index: dict[str, np.ndarray] = {
        name: np.frombuffer(b"".join(column), DTYPES[name]) for name, column in columns.items()
    }
    index["image_sizes"] = index["image_sizes"].reshape(-1, 2)
    index["image_offsets"] = np.concatenate([[0], np.cumsum(index.pop("num_images"), dtype=np.int64)])
    if not len(index["modes"]):
        raise ValueError(f"there are no records to import: all items are bad; {quarantined} lists them")
    (directory / "index").mkdir(exist_ok=True)
    for name, array in index.items():
        with atomic.new_file(directory / "index" / f"{name}.npy") as file:
            np.save(file, array)
    manifest = {
        "schema": SCHEMA,
        "records": len(index["modes"]),
        "images": len(index["image_sizes"]),
        "text_tokens": int(index["text_tokens"].sum(dtype=np.int64)),
        "text": text,
        "shards": shards,
        "index": [describe_file(directory, f"index/{f.name}.npy") for f in dataclasses.fields(Index)],
        "counts": {
            **{name: dict(sorted(counter.items())) for name, counter in sorted(counts.items())},
            "system_messages": system_messages,
        },
    }
    atomic.write(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")
