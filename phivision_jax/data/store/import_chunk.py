"""One chunk of an import: its items read, checked and written, and all of it committed by one rename.

    source.read ──► with_bytes, measure ──► records-00007-000.array_record, …     closed at shard_bytes
                        └ bad ────────────► quarantine lines ┐
                     columns of the index, counts, shards ───┴► chunks/00007.msgpack: the chunk is done

A chunk's bytes depend on the source and the options alone. Files appear under their names whole: each is written in a
folder of its own under ``work`` and renamed, the chunk's own file last. So a process may die at any point, and two may
even do the same chunk.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.data.records import MODES, TASKS, mode_of
from phivision_jax.data.sources.source import Read, Source
from phivision_jax.data.store.dataset import describe_file
from phivision_jax.data.store.record_check import measure, with_bytes
from phivision_jax.io.workers import Stop, Stopped

if TYPE_CHECKING:
    from phivision_jax.processor import Processor

CHUNKS, WORK = "chunks", "work"
CHUNK, MOST_CHUNKS = 2048, 4096
"""Items per chunk, and how many chunks there may be before they become longer: a chunk's end closes its shard too."""
DTYPES = {"text_tokens": "<i4", "image_offsets": "<i8", "image_sizes": "<i4", "modes": "|i1", "tasks": "|u1"}
"""The columns of the index, as NumPy calls their types."""
IO_ATTEMPTS = 4
IO_FIRST_WAIT_S = 0.5
"""Seconds before the second attempt to read an item; doubled each time."""
# Waiting helps against none of these.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

_log = logging.getLogger(__name__)


def default_chunk(items: int) -> int:
    """Items per chunk: ``CHUNK``, or of more than ``CHUNK * MOST_CHUNKS`` items as many times that as are needed."""
    return CHUNK * max(1, -(-items // (CHUNK * MOST_CHUNKS)))


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides a chunk's bytes, besides the source and the processor; and where they go."""

    directory: Path
    chunk: int
    """Items per chunk."""
    shard_bytes: int
    decode: bool


@dataclasses.dataclass
class Chunk:
    """What is done of a chunk: the content of its own file."""

    columns: dict[str, bytes]
    """Of the index, by name; see ``DTYPES``. Of ``image_offsets`` the ends, counted from the chunk's first image."""
    shards: list[dict[str, Any]]
    """As in the manifest: file, bytes, sha256, records."""
    quarantine: list[bytes]
    """Lines of JSON."""
    counts: dict[str, Any]
    """How many records, images, text_tokens, system_messages; modes, mode_from, tasks, sources, quarantined by name."""

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(msgpack.packb(vars(self)))
            file.flush()
            _to_disk(file.fileno())

    @classmethod
    def load(cls, directory: Path, number: int) -> Chunk | None:
        """A chunk that is done, its shards there at their full size; None: it has to be done (again)."""
        try:
            chunk = cls(**msgpack.unpackb(name_of(directory, number).read_bytes()))
            whole = all((directory / s["file"]).stat().st_size == s["bytes"] for s in chunk.shards)
        except (FileNotFoundError, ValueError, TypeError, msgpack.UnpackException):
            return None
        return chunk if whole else None


def name_of(directory: Path, number: int) -> Path:
    return directory / CHUNKS / f"{number:05d}.msgpack"


def write_chunk(
    source: Source, processor: Processor, options: Options, number: int, stopped: Stopped
) -> tuple[int, int]:
    """Do chunk ``number`` and commit it.

    Returns:
      the number, and how many of its items are bad.

    Raises:
      OSError: when the source cannot be read, after further attempts, or the directory cannot be written.
      Stop: when stopped.
    """
    start = number * options.chunk
    items = _items(source, start, min(start + options.chunk, len(source)), stopped)
    work = Path(tempfile.mkdtemp(prefix=f"{number:05d}-", dir=options.directory / WORK))
    try:
        chunk = _write(items, source.name, processor, options, f"records-{number:05d}", work, stopped)
        for shard in chunk.shards:
            os.replace(work / shard["file"], options.directory / shard["file"])
        chunk.save(work / "done")
        os.replace(work / "done", name_of(options.directory, number))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return number, len(chunk.quarantine)


def _write(
    items: Iterator[tuple[int, Read | Quarantined]],
    source_name: str,
    processor: Processor,
    options: Options,
    prefix: str,
    work: Path,
    stopped: Stopped,
) -> Chunk:
    columns: dict[str, list[Any]] = {name: [] for name in DTYPES}
    by_name = {name: collections.Counter[str]() for name in ("modes", "mode_from", "tasks", "sources", "quarantined")}
    quarantine: list[bytes] = []
    system_messages = 0
    shards = _Shards(work, prefix, options.shard_bytes)
    for i, item in items:
        if stopped():
            raise Stop
        if isinstance(item, Read):
            try:
                record = with_bytes(item.record)
                measured = measure(record, processor, decode=options.decode)
            except BadRecord as bad:
                where = item.where or f"{source_name}, item {i + 1}"
                item = Quarantined(item.record.id, item.record.source, bad.reason, str(bad), where)
        if isinstance(item, Quarantined):
            by_name["quarantined"][item.reason] += 1
            # A lone surrogate, in the id of a record say, becomes its JSON escape.
            quarantine.append(item.to_json().encode(errors="backslashreplace"))
            continue
        mode = mode_of(record)
        shards.write(dataclasses.replace(record, mode=mode).to_bytes())
        columns["text_tokens"].append(measured.text_tokens)
        columns["image_sizes"] += measured.image_sizes
        columns["image_offsets"].append(len(columns["image_sizes"]))
        columns["modes"].append(MODES.index(mode))
        columns["tasks"].append(TASKS.index(record.task))
        by_name["modes"][mode] += 1
        by_name["mode_from"][item.mode_from] += 1
        by_name["tasks"][record.task] += 1
        by_name["sources"][record.source] += 1
        system_messages += item.system
    shards.close()
    return Chunk(
        columns={name: np.asarray(values, DTYPES[name]).tobytes() for name, values in columns.items()},
        shards=shards.described,
        quarantine=quarantine,
        counts={
            "records": len(columns["modes"]),
            "images": len(columns["image_sizes"]),
            "text_tokens": sum(columns["text_tokens"]),
            "system_messages": system_messages,
            **by_name,
        },
    )


def _items(source: Source, start: int, stop: int, stopped: Stopped) -> Iterator[tuple[int, Read | Quarantined]]:
    """Items ``start`` … ``stop − 1`` with their numbers, trying again after an I/O error: most of them pass."""
    i, failures, wait = start, 0, IO_FIRST_WAIT_S
    while i < stop:
        try:
            for item in source.read(i, stop):
                yield i, item
                i, failures, wait = i + 1, 0, IO_FIRST_WAIT_S
            if i != stop:
                raise RuntimeError(f"source {source.name!r} ends before item {i:,} of {len(source):,}")
        except OSError as error:
            failures += 1
            if error.errno is None or isinstance(error, _LASTING) or failures == IO_ATTEMPTS or stopped():
                raise
            _log.warning("item %d of %s: %s; trying again in %.1f s", i + 1, source.name, error, wait)
            time.sleep(wait)
            wait *= 2


class _Shards:
    """ArrayRecord files of about ``shard_bytes`` each but the last, opened when there is something to write."""

    def __init__(self, directory: Path, prefix: str, shard_bytes: int) -> None:
        self.described: list[dict[str, Any]] = []
        self._directory, self._prefix, self._limit = directory, prefix, shard_bytes
        self._writer: ArrayRecordWriter | None = None
        self._name, self._bytes, self._records = "", 0, 0

    def write(self, payload: bytes) -> None:
        with self._as_os_error():
            if self._writer is None:
                self._name, self._bytes, self._records = f"{self._prefix}-{len(self.described):03d}.array_record", 0, 0
                # group_size:1 stores records one by one: random access reads no neighbours.
                self._writer = ArrayRecordWriter(str(self._directory / self._name), "group_size:1")
            self._writer.write(payload)
        self._bytes += len(payload)
        self._records += 1
        if self._bytes >= self._limit:
            self.close()

    def close(self) -> None:
        """Close the file that is open, if one is, and describe it."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        with self._as_os_error():
            writer.close()
        with (self._directory / self._name).open("rb") as file:
            _to_disk(file.fileno())
        self.described.append({**describe_file(self._directory, self._name), "records": self._records})

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        """The writer raises RuntimeError("write() failed: No space left on device; writing …"), whatever went wrong."""
        try:
            yield
        except RuntimeError as error:
            self._writer = None
            reason = str(error).partition("failed: ")[2].partition(";")[0] or str(error)
            raise OSError(f"{self._name} cannot be written: {reason}") from None


def _to_disk(descriptor: int) -> None:
    """A machine that is switched off loses what it has not been told to keep; the rename must not come before it."""
    os.fsync(descriptor)
