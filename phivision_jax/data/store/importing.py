"""Import: from a source to a dataset directory, on several processes, resumable after any kill (``io.work``).

The same source and options give the same bytes, with any number of workers and interruptions.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from phivision_jax.data import quarantine
from phivision_jax.data.quarantine import TooManyBadRecords
from phivision_jax.data.sources.source import Source
from phivision_jax.data.store.dataset import SCHEMA, Dataset
from phivision_jax.data.store.dataset_writer import CheckRecord, RecordSink, write_index_and_manifest, write_quarantine
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
        step=CheckRecord(processor, decode),
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
