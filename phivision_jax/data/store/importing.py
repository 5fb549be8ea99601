"""Import: from a source to a dataset directory, on several processes, resumable after any kill (``io.work``).

    Read | Quarantined ──► CheckRecord ──► Accepted | Quarantined ──► RecordSink ──► records-00007-000.array_record, …
                                                                          │ summary of the chunk
                       index/, quarantine.jsonl, manifest.json ◄── write_index_and_manifest

The same source and options give the same bytes, with any number of workers and interruptions. A step that filters or
rewrites records runs before ``CheckRecord``.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.data import quarantine
from phivision_jax.data.quarantine import BadRecord, Quarantined, TooManyBadRecords, describe_failure
from phivision_jax.data.records import MODES, join_tasks, mode_of
from phivision_jax.data.sources.source import Read, Source
from phivision_jax.data.store.dataset import ARRAYS, MANIFEST, SCHEMA, Dataset, describe_file
from phivision_jax.data.store.record_check import ImageSizes, check_record, count_text_tokens
from phivision_jax.io import atomic, work
from phivision_jax.io.work import Summary, Work
from phivision_jax.processor import Processor
from phivision_jax.text import chat

SHARD_BYTES = 256 * 2**20
"""A shard is closed once it has this many payload bytes: large enough for few files, small enough to copy."""
_COLUMNS = {"text_tokens": "<i4", "num_images": "<i4", "image_sizes": "<i4", "modes": "|i1", "tasks": "<u2"}
"""Columns of a chunk's summary. They become the index, where ``image_offsets`` replaces ``num_images``, and tasks are
numbered over all chunks, in one byte each."""
_COUNTED = ("modes", "tasks", "sources", "mode_from")
_MOST_TASKS = 256
_MOST_UNREAD = 200


def import_source(
    source: Source,
    out: str | os.PathLike[str],
    processor: Processor,
    *,
    workers: int | None = None,
    chunk: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    decode: bool = False,
    max_bad: float = quarantine.MAX_SHARE,
    restart: bool = False,
    progress: bool = True,
) -> Dataset:
    """Import a source, or continue an interrupted import; a dataset that the same import has made is opened.

    Args:
      source: what to read; see ``open_source``.
      out: the directory to make.
      processor: its tokenizer and template count tokens.
      workers: worker processes; default: one per core; 0: this process. A script that uses workers needs a
        ``__main__`` guard.
      chunk: items that a worker commits at a time, the most that an interrupted import has to repeat; default:
        ``work.default_chunk``.
      shard_bytes: payload bytes at which a shard is closed; the end of a chunk closes it too.
      decode: also decode every image, so that training finds no broken ones.
      max_bad: share of bad items above which the import stops.
      restart: remove the chunks of an interrupted import instead of continuing.
      progress: show a progress bar.

    Raises:
      FileExistsError: when ``out`` exists and was not made by this import, or an interrupted import of other data or
        with other options is in progress there; nothing is removed.
      BlockingIOError: when another process is importing into ``out``.
      TooManyBadRecords: as soon as there are too many; the same import with a larger ``max_bad`` continues.
      ValueError: when there are no records, or the template marks no assistant text.
      OSError: when the source cannot be read or the directory cannot be written; committed chunks stay.
      ChildProcessError: when a worker dies; committed chunks stay.
    """
    if not len(source):
        raise ValueError(f"there are no records to import: source {source.name!r} is empty")
    # A template that marks no answers would make every record bad: that is one error, not a million.
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.encode(processor.tokenizer, processor.template, probe)
    bad = 0

    def check(directory: Path, summary: Summary) -> None:
        nonlocal bad
        bad += len(summary["quarantine"])
        if bad > max_bad * len(source):
            file = write_quarantine(directory, work.committed(directory))
            raise TooManyBadRecords.summarise(bad, len(source), max_bad, file)

    job = Work(
        source=source,
        step=functools.partial(check_item, processor, decode),
        open_sink=functools.partial(RecordSink, shard_bytes=shard_bytes),
        settings={
            "tokenizer and template": processor.text_fingerprint,
            "max_positions": processor.config.decoder.max_positions,
            "shard_bytes": shard_bytes,
            "decode": decode,
            "schema": SCHEMA,
        },
        chunk=chunk or work.default_chunk(len(source)),
    )
    finish = functools.partial(write_index_and_manifest, text=processor.text_fingerprint)
    title = f"import {source.name}" if progress else ""
    work.run(job, out, finish, check=check, processes=workers, restart=restart, progress=title)
    return Dataset.open(out)


class Accepted(NamedTuple):
    """A checked record, its mode and lineage set, with its size for the index."""

    read: Read
    text_tokens: int
    image_sizes: ImageSizes


def check_item(processor: Processor, decode: bool, item: Read | Quarantined) -> list[Accepted | Quarantined]:
    """The step of an import: check and measure what a source has read."""
    if isinstance(item, Quarantined):
        return [item]
    record = item.record
    try:
        image_sizes = check_record(record, decode=decode)
        text_tokens = count_text_tokens(record, processor)
    except BadRecord as bad:
        return [Quarantined(record.id, record.source, bad.reason, str(bad), item.where)]
    except BaseException as error:
        return [Quarantined(record.id, record.source, "failed", describe_failure(error), item.where)]
    lineage = record.lineage or (f"import: {item.where}",)
    record = dataclasses.replace(record, mode=mode_of(record), lineage=lineage)
    return [Accepted(dataclasses.replace(item, record=record), text_tokens, image_sizes)]


type Unread = dict[str, tuple[int, str]]
"""Names of keys that were not read, each with its number of occurrences and an example of its values."""


def count_unread(unread: Unread, name: str, example: str, count: int = 1) -> None:
    """Count a key; the first example stays. Beyond ``_MOST_UNREAD`` names, further ones are counted together."""
    name = "".join(c if c.isprintable() else "?" for c in name[:60])
    name = name if name in unread or len(unread) < _MOST_UNREAD else "other fields"
    before, first = unread.get(name, (0, example))
    unread[name] = (before + count, first)


class RecordSink:
    """ArrayRecord files of about ``shard_bytes`` payload bytes each; the last one of a chunk is smaller."""

    def __init__(self, folder: Path, chunk: str, *, shard_bytes: int) -> None:
        self._folder, self._chunk, self._limit = folder, chunk, shard_bytes
        self._accepted: list[tuple[Any, ...]] = []
        self._quarantine: list[bytes] = []
        self._unread: Unread = {}
        self._shards: list[dict[str, Any]] = []
        self._writer: ArrayRecordWriter | None = None
        self._name, self._bytes, self._records = "", 0, 0

    def add(self, result: Accepted | Quarantined) -> None:
        if isinstance(result, Quarantined):
            self._quarantine.append(result.to_line())
            return
        read, record = result.read, result.read.record
        self._write(record.to_bytes())
        names = (record.mode, record.task, record.source, read.mode_from)
        self._accepted.append((result.text_tokens, result.image_sizes, read.system, *names))
        for name, value in read.unread:
            count_unread(self._unread, name, reprlib.repr(value)[:60])

    def close(self) -> Summary:
        self._close_shard()
        text_tokens, sizes, system, *named = zip(*self._accepted, strict=True) if self._accepted else [()] * 7
        counts = {name: dict(collections.Counter(values)) for name, values in zip(_COUNTED, named, strict=True)}
        numbers = {task: number for number, task in enumerate(counts["tasks"])}
        modes, tasks = [*map(MODES.index, named[0])], [numbers[task] for task in named[1]]
        arrays = text_tokens, [*map(len, sizes)], [*itertools.chain(*sizes)], modes, tasks
        pairs = zip(_COLUMNS.items(), arrays, strict=True)
        return {
            "columns": {name: np.asarray(values, dtype).tobytes() for (name, dtype), values in pairs},
            "shards": self._shards,
            "quarantine": self._quarantine,
            "counts": counts,
            "system_messages": sum(system),
            "unread": self._unread,
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
    """Complete a dataset whose chunks are committed; the complete index is in memory, some 50 bytes per record.

    Args:
      directory: of the shards.
      summaries: iterates over the summaries of ``RecordSink`` in order.
      text: hash of the tokenizer and template that counted tokens.

    Raises:
      ValueError: when there are no records.
    """
    quarantined = write_quarantine(directory, summaries())
    shards: list[dict[str, Any]] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    unread: Unread = {}
    system_messages, tasks = 0, join_tasks(summary["counts"]["tasks"] for summary in summaries())
    if len(tasks) > _MOST_TASKS:
        remedy = "--rename task=dataset_task keeps them as metadata, and --task sets one for all"
        raise ValueError(f"the records have {len(tasks):,} tasks, an index at most {_MOST_TASKS}: {remedy}")
    for summary in summaries():
        shards += summary["shards"]
        for name, column in summary["columns"].items():
            columns[name].append(np.frombuffer(column, _COLUMNS[name]))
        numbers = np.array([tasks.index(task) for task in summary["counts"]["tasks"]], ARRAYS["tasks"])
        columns["tasks"][-1] = numbers[columns["tasks"][-1]]
        for name, counter in summary["counts"].items():
            counts[name].update(counter)
        counts["quarantined"].update(json.loads(line)["reason"] for line in summary["quarantine"])
        system_messages += summary["system_messages"]
        for name, (count, example) in summary["unread"].items():
            count_unread(unread, name, example, count)
    index = {name: np.concatenate(parts) for name, parts in columns.items()}
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
        "index": [describe_file(directory, f"index/{name}.npy") for name in ARRAYS],
        "tasks": tasks,
        "counts": {
            **{name: dict(sorted(counter.items())) for name, counter in sorted(counts.items())},
            "system_messages": system_messages,
            "unread": unread,
        },
    }
    atomic.write(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")
