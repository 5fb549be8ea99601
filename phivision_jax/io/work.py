"""Long work over numbered items: on several processes, resumable after any kill, always with the same result.

    source ──► step ──► results ──► sink ──► files and a summary        one chunk of items, in one worker process
     item     0…n per item                         │
                                    finish ◄───────┘ the summaries of all chunks, in order

    .OUT.partial/work.json             key: what is read and how
    .OUT.partial/lock                  locked while the work runs
    .OUT.partial/work/                 files of chunks in progress
    .OUT.partial/<files>               files of committed chunks
    .OUT.partial/chunks/00007.msgpack  chunk 7 is committed: its summary, names and sizes of its files

A worker writes a chunk into a folder of its own below ``work/`` and commits it by renames, the chunk's own file last.
So a process may be killed at any moment, and two processes may even do the same chunk. Run again, the work continues
with the chunks that are not committed; with another key it is refused. When all are committed, ``finish`` writes what
is about all of them, and the directory gets its name. A later run recognises it by ``work.json``, which it keeps.

The files depend on source, step, sink and chunk length alone, not on the number of workers or on interruptions,
provided that a step depends on its item alone.

Importing is one use (``data.store.importing``). This module knows nothing about records: steps name why they reject an
item ("step/reason", see ``data.quarantine``) and where a result comes from (``Record.lineage``).
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgpack

from phivision_jax.io import atomic, workers
from phivision_jax.io.messages import differences, shorten
from phivision_jax.io.progress import bar
from phivision_jax.io.read_json import read_json
from phivision_jax.io.retry import Backoff
from phivision_jax.io.workers import Stop, Stopped

CHUNKS, WORK, KEY, LOCK = "chunks", "work", "work.json", "lock"
CHUNK, MOST_CHUNKS = 2048, 4096
"""Items per chunk, and the number of chunks above which they become longer: the end of a chunk also ends a file."""
IO_ATTEMPTS = 4
IO_FIRST_WAIT_S = 0.5
"""Seconds before the second attempt to read an item; doubled each time."""
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # waiting does not help
_SHOWN_DIFFERENCES = 10

_log = logging.getLogger(__name__)

type Summary = Mapping[str, Any]
"""Report of a sink about its chunk, in msgpack's types."""
type Check = Callable[[Path, Summary], None]
"""Called with the directory and the summary of each committed chunk, in any order; raises to stop the work."""


class Source[Item](Protocol):
    """Numbered items. Pickled for the workers, so it opens files only inside ``read``."""

    name: str

    def __len__(self) -> int:
        """Number of items."""

    def key(self) -> Any:
        """JSON value that changes with the content or the reading options; work resumes only if it is the same.

        Names, sizes and modification times of files are enough, as "files": {path: "size; time"}; no content needs to
        be hashed.
        """

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Items ``start`` … ``stop − 1``, the same at every call. After an ``OSError`` it is called again."""


class Sink[Result](Protocol):
    """Writes the results of one chunk."""

    def add(self, result: Result) -> None: ...

    def close(self) -> Summary:
        """Close the files. Called once, after the last result."""


@dataclasses.dataclass(frozen=True)
class Work[Item, Result]:
    """Everything that decides the files of all chunks. Pickled for the workers."""

    source: Source[Item]
    step: Callable[[Item], Iterable[Result]]
    """Depends on its item alone."""
    open_sink: Callable[[Path, str], Sink[Result]]
    """(folder, chunk's name) → sink. It writes files only there, and the chunk's name is in theirs."""
    settings: Mapping[str, Any]
    """Options of step and sink as JSON; work resumes only if they are the same."""
    chunk: int
    """Items per chunk."""

    def key(self) -> dict[str, Any]:
        own = {"source": self.source.key(), "items": len(self.source), "chunk": self.chunk}
        return json.loads(json.dumps(own | dict(self.settings)))  # as it will be read again

    def chunks(self) -> dict[str, range]:
        """Name → items of every chunk, in order."""
        starts = range(0, len(self.source), self.chunk)
        return {f"{k:05d}": range(len(self.source))[start : start + self.chunk] for k, start in enumerate(starts)}


def default_chunk(items: int) -> int:
    """Items per chunk: ``CHUNK``, or the multiple of it that keeps ``items`` within ``MOST_CHUNKS`` chunks."""
    return CHUNK * max(1, -(-items // (CHUNK * MOST_CHUNKS)))


def run(
    work: Work[Any, Any],
    out: str | os.PathLike[str],
    finish: Callable[[Path, Callable[[], Iterator[Summary]]], None],
    *,
    check: Check = lambda directory, summary: None,
    processes: int | None = None,
    restart: bool = False,
    progress: str = "",
) -> bool:
    """Do the work, or continue work that was interrupted.

    Args:
      work: what to do.
      out: the directory to make. Until it is complete it is ``.OUT.partial`` in the same folder.
      finish: called with that directory and a function that iterates over all summaries in order; writes the files
        that are about all chunks. Called again if the process dies before the directory gets its name.
      processes: worker processes; default: one per core; 0: this process. A script that uses workers needs a
        ``__main__`` guard.
      restart: remove the chunks of an interrupted run instead of continuing.
      progress: title of a progress bar; "": none.

    Returns:
      False if ``out`` was made by the same work already.

    Raises:
      FileExistsError: when ``out`` exists and was not made by this work, or an interrupted run has another key;
        nothing is removed.
      BlockingIOError: when another process is making ``out``.
      OSError: when the source cannot be read or the directory cannot be written; committed chunks stay.
      ChildProcessError: when a worker dies; committed chunks stay.
      Exception: from ``read``, the step, the sink, ``check`` and ``finish``.
    """
    out, key = Path(out), work.key()
    if _made_before(out, key):
        return False
    partial = out.with_name(f".{out.name}.partial")
    try:
        lock = atomic.lock(partial / LOCK)
    except BlockingIOError:
        raise BlockingIOError(f"another process is making {out}; wait for it, or choose another name") from None
    with contextlib.ExitStack() as locked:
        locked.callback(os.close, lock)
        if _made_before(out, key):  # by another process in the meantime
            shutil.rmtree(partial, ignore_errors=True)
            return False
        _prepare(partial, key, restart)
        try:
            _do_chunks(work, partial, check, processes, progress)
            _remove_strays(partial, work.chunks())
            finish(partial, lambda: committed(partial))
            partial.rename(out)
        except BaseException as error:
            error.add_note(f"completed chunks are in {partial}; the same command continues from there")
            raise
    _remove_traces(out)
    return True


def committed(directory: Path) -> Iterator[Summary]:
    """The summaries of the chunks that are committed so far, in order; one is in memory at a time."""
    for name in sorted(path.stem for path in (directory / CHUNKS).glob("*.msgpack")):
        if (chunk := _load(directory, name)) is not None:
            yield chunk["summary"]


def _made_before(out: Path, key: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    try:
        made_by = read_json(out / KEY)
    except ValueError as error:
        raise FileExistsError(f"{out} exists, but {error}; remove it or choose another name") from None
    if made_by != key:
        problem = f"{out} exists and was made from other data or with other options"
        raise FileExistsError(f"{problem}; remove it or choose another name:{_changes(made_by, key)}")
    _remove_traces(out)
    return True


def _remove_traces(out: Path) -> None:
    """Remove what only the work needed; a kill after the renaming leaves it behind."""
    for name in (CHUNKS, WORK):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / LOCK).unlink(missing_ok=True)


def _prepare(partial: Path, key: dict[str, Any], restart: bool) -> None:
    """Keep the committed chunks of the same key; remove others only if ``restart`` asks for it."""
    before = None
    with contextlib.suppress(ValueError):
        before = read_json(partial / KEY)
    if before != key or restart:
        if before is not None and not restart and any((partial / CHUNKS).glob("*")):
            problem = f"{partial} has the chunks of an interrupted run with other data, options or program version"
            remedy = "to start over, give --restart (restart=True) or remove the directory"
            raise FileExistsError(f"{problem}; {remedy}; to continue it, restore these:{_changes(before, key)}")
        _remove_all_but({LOCK}, partial)
        atomic.write(partial / KEY, json.dumps(key, indent=2))
    shutil.rmtree(partial / WORK, ignore_errors=True)
    for name in (CHUNKS, WORK):
        (partial / name).mkdir(exist_ok=True)


def _changes(before: Any, now: Any) -> str:
    """A line for each difference between two keys, or for the first few."""
    lines = []
    for path, *values in differences(before, now):
        if path.startswith("source.files."):
            old, new = (shorten(str(value or "absent").partition(";")[0]) for value in values)
            lines.append(f"{shorten(path.rpartition('/')[2])} has changed ({old} → {new})")
        else:
            old, new = (shorten(json.dumps(value, ensure_ascii=False)) for value in values)
            lines.append(f"{path}: {old}, now {new}")
    if len(lines) > _SHOWN_DIFFERENCES:
        lines[_SHOWN_DIFFERENCES:] = [f"and {len(lines) - _SHOWN_DIFFERENCES:,} more"]
    return "".join(f"\n  {line}" for line in lines)


def _do_chunks(work: Work[Any, Any], partial: Path, check: Check, processes: int | None, progress: str) -> None:
    chunks = work.chunks()
    missing = dict(chunks)
    for name in chunks:
        if (chunk := _load(partial, name)) is not None:
            del missing[name]
            check(partial, chunk["summary"])
    if progress and len(missing) < len(chunks):
        print(f"continuing: {len(chunks) - len(missing):,} of {len(chunks):,} chunks are complete")
    results = workers.run(_do_chunk, (work, partial), missing.items(), processes)
    with bar(progress, len(work.source), shown=bool(progress)) as advance, contextlib.closing(results):
        advance(len(work.source) - sum(map(len, missing.values())))
        for name, summary in results:
            advance(len(missing[name]))
            check(partial, summary)


def _do_chunk(work: Work[Any, Any], directory: Path, chunk: tuple[str, range], stopped: Stopped) -> tuple[str, Summary]:
    """Do a chunk and commit it, in a worker."""
    name, items = chunk
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=directory / WORK))
    try:
        sink = work.open_sink(folder, name)
        for item in _read(work.source, items, stopped):
            if stopped():
                raise Stop
            for result in work.step(item):
                sink.add(result)
        summary = sink.close()
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        # The renames must not reach the disk before the content.
        atomic.sync_tree(folder)
        for file in files:
            os.replace(folder / file, directory / file)
        atomic.write(folder / name, msgpack.packb({"files": files, "summary": summary}))
        os.replace(folder / name, directory / CHUNKS / f"{name}.msgpack")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return name, summary


def _read[Item](source: Source[Item], items: range, stopped: Stopped) -> Iterator[Item]:
    """The items, retrying after I/O errors, most of which pass."""
    number, backoff = items.start, Backoff(IO_ATTEMPTS, IO_FIRST_WAIT_S, _log.warning)
    while number < items.stop:
        try:
            for item in source.read(number, items.stop):
                yield item
                number += 1
                backoff.reset()
            if number != items.stop:
                raise RuntimeError(f"source {source.name!r} ends before item {number:,} of {len(source):,}")
        except OSError as error:
            if error.errno is None or isinstance(error, _LASTING) or stopped():
                raise
            backoff.wait(error, f"item {number + 1} of {source.name}")


def _load(directory: Path, name: str) -> dict[str, Any] | None:
    """A committed chunk whose files have their full size; None: the chunk has to be done (again)."""
    try:
        chunk = msgpack.unpackb((directory / CHUNKS / f"{name}.msgpack").read_bytes())
        complete = all((directory / file).stat().st_size == size for file, size in chunk["files"].items())
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
        return None
    return chunk if complete else None


def _remove_strays(directory: Path, names: Iterable[str]) -> None:
    """Remove files that no chunk names: from an earlier ``finish``, or a chunk whose source had changed."""
    keep = {CHUNKS, WORK, KEY, LOCK}
    for name in names:
        if (chunk := _load(directory, name)) is None:
            raise OSError(f"chunk {name} in {directory} disappeared or changed after it was written; run this again")
        keep |= chunk["files"].keys()
    _remove_all_but(keep, directory)


def _remove_all_but(names: set[str], directory: Path) -> None:
    for path in directory.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
