"""Import: from a source to a dataset directory, on several processes, resumable after any kill (``io.work``).

The same source and options give the same bytes, with any number of workers and interruptions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phivision_jax.data import quarantine
from phivision_jax.data.quarantine import Quarantined, Tally
from phivision_jax.data.records import Record
from phivision_jax.data.sources.memory import RecordsSource
from phivision_jax.data.sources.source import Source
from phivision_jax.data.store.dataset import SCHEMA, Dataset
from phivision_jax.data.store.dataset_writer import (
    CheckRecord,
    RecordSink,
    write_index_and_manifest,
    write_quarantine,
)
from phivision_jax.io import work
from phivision_jax.io.work import Summary, Work
from phivision_jax.processor import Processor
from phivision_jax.text import chat

SHARD_BYTES = 256 * 2**20
"""A shard is closed once it has this many payload bytes: large enough for few files, small enough to copy."""


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
    bad = 0

    def check(directory: Path, summary: Summary) -> None:
        nonlocal bad
        bad += len(summary["quarantine"])
        if bad > max_bad * len(source):
            file = write_quarantine(directory, work.committed(directory))
            Tally(map(Quarantined.from_line, file.read_bytes().splitlines())).check(len(source), max_bad, file)

    job = _work(source, processor, chunk or work.default_chunk(len(source)), shard_bytes, decode)
    finish = functools.partial(write_index_and_manifest, text=processor.text_fingerprint)
    title = f"import {source.name}" if progress else ""
    work.run(job, out, finish, check=check, processes=workers, restart=restart, progress=title)
    return Dataset.open(out)


def write_dataset(
    directory: str | os.PathLike[str],
    records: Iterable[Record],
    processor: Processor,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Dataset:
    """Write records that are in memory, in this process: all of them, or nothing.

    Raises:
      FileExistsError: when ``directory`` exists (nothing is overwritten).
      BlockingIOError: when another process is writing it.
      ValueError: naming the first bad record; when there are no records.
    """

    def check(directory: Path, summary: Summary) -> None:
        for line in summary["quarantine"]:
            bad = Quarantined.from_line(line)
            raise ValueError(f"record {bad.id!r} of {bad.source!r}: {bad.detail} ({bad.reason})")

    if Path(directory).exists():
        raise FileExistsError(f"{directory} exists; remove it or choose another name")
    source = RecordsSource(list(records))
    job = _work(source, processor, max(1, len(source)), shard_bytes, False)
    finish = functools.partial(write_index_and_manifest, text=processor.text_fingerprint)
    title = f"write {Path(directory).name}" if progress else ""
    work.run(job, directory, finish, check=check, processes=0, keep=False, progress=title)
    return Dataset.open(directory)


def _work(source: Source, processor: Processor, chunk: int, shard_bytes: int, decode: bool) -> Work[Any, Any]:
    if not len(source):
        raise ValueError(f"there are no records to import: source {source.name!r} is empty")
    # A template that marks no answers would make every record bad: that is one error, not a million.
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.encode(processor.tokenizer, processor.template, probe)
    return Work(
        source=source,
        step=CheckRecord(processor, decode),
        open_sink=functools.partial(RecordSink, shard_bytes=shard_bytes),
        settings={
            "tokenizer and template": processor.text_fingerprint,
            "max_positions": processor.config.decoder.max_positions,
            "shard_bytes": shard_bytes,
            "decode": decode,
            "schema": SCHEMA,
        },
        chunk=chunk,
    )
