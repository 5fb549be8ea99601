"""From a source to a dataset directory: in parallel, within bounded memory, and safe to kill at any moment.

    .OUT.partial/import.json      the import's key: what it reads and how
    .OUT.partial/lock             held while an import runs
    .OUT.partial/work/            files that are not whole
    .OUT.partial/records-…        shards of finished chunks
    .OUT.partial/chunks/00007.msgpack  chunk 7 is finished; its part of the index

Started again with the same key, an import goes on with the chunks that are not finished; with another it is refused,
for what is finished may be hours of work. When all chunks are, the index, the quarantine and last the manifest are
written and the directory gets its name; what only the import needed goes then.
The same source and options give the same bytes, with however many workers and interruptions.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from phivision_jax.data import quarantine
from phivision_jax.data.quarantine import Quarantined, TooManyBadRecords
from phivision_jax.data.records import Record
from phivision_jax.data.sources.source import Source
from phivision_jax.data.store.dataset import MANIFEST, SCHEMA, Dataset, describe_file
from phivision_jax.data.store.import_chunk import CHUNKS, DTYPES, WORK, Chunk, Options, default_chunk, write_chunk
from phivision_jax.io import progress as bars
from phivision_jax.io import workers as processes
from phivision_jax.text import chat

if TYPE_CHECKING:
    from phivision_jax.processor import Processor

SHARD_BYTES = 256 * 2**20
"""A shard is closed once it holds this many payload bytes: large enough for few files, small enough to copy."""
KEY, LOCK = "import.json", "lock"
_MEANING = {"text": "hash of tokenizer and chat template"}
_SHOWN, _SHOWN_CHARACTERS = 10, 200


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
    """Import a source, or go on with an import that was stopped; an import that is there already is opened.

    Args:
      source: what to read; see ``formats.open_source``.
      out: the directory to make. Until it is whole it is called ``.NAME.partial``, beside it.
      processor: its tokenizer and template count tokens.
      workers: processes; default: one per core; 0: in this one. A script that asks for some needs a ``__main__`` guard.
      chunk: items that a worker does at a time, and that an interrupted import may have to do again; default:
        ``chunk.default_chunk``.
      shard_bytes: a shard is closed once it holds this many, or its chunk ends.
      decode: also decode every image, so that nothing is left for training to find.
      max_bad: the share of bad items that stops the import.
      restart: remove what an interrupted import has done, instead of going on with it.
      progress: show a bar, and say when an import goes on.

    Raises:
      FileExistsError: when ``out`` is there and was not made by this import, or an interrupted import of other data or
        with other options is under way there; nothing is removed.
      BlockingIOError: when another import into ``out`` is under way.
      TooManyBadRecords: as soon as it is certain; a larger ``max_bad`` then goes on at once.
      ValueError: when there is no record to import, or no record can be trained on with this template.
      OSError: when the source cannot be read or the directory cannot be written; what is finished stays.
      ChildProcessError: when a worker dies; what is finished stays.
    """
    count = os.cpu_count() or 1 if workers is None else workers
    partial = _partial(Path(out))
    key = _key(source, processor, chunk or default_chunk(len(source)), shard_bytes, decode)
    try:
        return _import(source, Path(out), partial, processor, key, count, max_bad, restart, progress)
    except (OSError, TooManyBadRecords, KeyboardInterrupt) as error:
        if (partial / KEY).is_file() and not isinstance(error, FileExistsError | BlockingIOError):
            how = ", with a larger max_bad (--max-bad)," if isinstance(error, TooManyBadRecords) else ""
            error.add_note(f"what is done stays in {partial}: the same import{how} goes on there")
        raise


def write_dataset(
    directory: str | os.PathLike[str],
    records: Iterable[Record],
    processor: Processor,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Dataset:
    """Write records that are in memory: all of them, or nothing.

    Raises:
      FileExistsError: when ``directory`` is there already (nothing is overwritten).
      BlockingIOError: when it is being written already.
      ValueError: naming the first bad record; when there are none.
    """
    from phivision_jax.data.sources.memory import RecordsSource

    directory, source = Path(directory), RecordsSource(list(records))
    if directory.exists():
        raise FileExistsError(f"{directory} exists; remove it or choose another name")
    # Not the name of an import's: what that has done is not to go, this always is.
    partial = directory.with_name(f".{directory.name}.writing")
    key = _key(source, processor, max(1, len(source)), shard_bytes, False)
    try:
        return _import(source, directory, partial, processor, key, 0, 0.0, True, progress)
    except BlockingIOError:
        raise
    except TooManyBadRecords:
        with (partial / quarantine.FILE).open("rb") as lines:
            bad = Quarantined(**json.loads(next(lines)))
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"record {bad.id!r} of {bad.source!r}: {bad.detail} ({bad.reason})") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partial(out: Path) -> Path:
    if not out.name:
        raise ValueError(f"{out} is no name for a new directory")
    return out.with_name(f".{out.name}.partial")


def _key(source: Source, processor: Processor, chunk: int, shard_bytes: int, decode: bool) -> dict[str, Any]:
    key = {
        "source": source.key(),
        "items": len(source),
        "text": processor.text_fingerprint,
        "max_positions": processor.config.decoder.max_positions,
        "chunk": chunk,
        "shard_bytes": shard_bytes,
        "decode": decode,
        "schema": SCHEMA,
    }
    return json.loads(json.dumps(key))  # As it will be read again.


def _import(
    source: Source,
    out: Path,
    partial: Path,
    processor: Processor,
    key: dict[str, Any],
    workers: int,
    max_bad: float,
    restart: bool,
    progress: bool,
) -> Dataset:
    if (dataset := _finished(out, key)) is not None:
        return dataset
    if not len(source):
        raise ValueError(f"there are no records to import: source {source.name!r} is empty")
    # A template that marks no answers would make every record bad: that is one error, not a million.
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.encode(processor.tokenizer, processor.template, probe)
    with _lock(partial, out):
        if (dataset := _finished(out, key)) is not None:  # by another import, since we looked
            shutil.rmtree(partial, ignore_errors=True)
            return dataset
        _prepare(partial, key, restart)
        _write_chunks(source, partial, processor, key, workers, max_bad, progress)
        _finish(partial, key)
        try:
            partial.rename(out)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(f"{out} has come to be meanwhile; remove it, then import again") from None
            raise
    _clean(out)
    return Dataset.open(out)


def _finished(out: Path, key: dict[str, Any]) -> Dataset | None:
    """The dataset that an import of this key has made; None: there is nothing of the name yet."""
    if not out.exists():
        return None
    try:
        there = json.loads((out / MANIFEST).read_bytes())["import"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{out} exists and is no imported dataset; remove it or choose another name") from None
    if there != key:
        raise FileExistsError(
            f"{out} exists and was imported from other data or with other options; remove it or choose another name:"
            + _changed(there, key)
        )
    _clean(out)
    return Dataset.open(out)


def _clean(out: Path) -> None:
    """Remove what only the import needed: a kill behind the renaming leaves it."""
    for name in (CHUNKS, WORK):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (KEY, LOCK):
        (out / name).unlink(missing_ok=True)


def _lock(partial: Path, out: Path) -> IO[str]:
    """The lock file of the partial directory (made if need be), locked until it is closed."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            file = (partial / LOCK).open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another import may have ended just now and taken the file with it.
                if os.fstat(file.fileno()).st_ino == (partial / LOCK).stat().st_ino:
                    return file
            except BlockingIOError:
                file.close()
                raise BlockingIOError(
                    f"another import into {out} is under way; wait for it, or choose another name"
                ) from None
            file.close()


def _prepare(partial: Path, key: dict[str, Any], restart: bool) -> None:
    """Keep what an import of the same key has finished; nothing that is finished goes without being told to."""
    try:
        there = json.loads((partial / KEY).read_bytes())
    except (FileNotFoundError, ValueError):
        there = None
    if there != key or restart:
        if there is not None and not restart and any((partial / CHUNKS).glob("*")):
            if isinstance(there, dict) and there.get("schema") == SCHEMA:
                what = "of other data or with other options; to go on with it, give it those that it was begun with"
            else:
                what = "by another version of this program"
            raise FileExistsError(
                f"{partial} holds an interrupted import {what}; to begin anew, remove the directory or give --restart "
                f"(restart=True):{_changed(there, key)}"
            )
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        with _appearing(partial / KEY) as file:
            file.write(json.dumps(key, indent=2).encode())
    shutil.rmtree(partial / WORK, ignore_errors=True)
    for name in (CHUNKS, WORK):
        (partial / name).mkdir(exist_ok=True)


def _changed(then: Any, now: Any) -> str:
    """For a person: a line for each value in which two keys differ, or for the first few of them."""
    lines = list(_differences(then, now, ""))
    more = [f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:_SHOWN], *more])


def _differences(then: Any, now: Any, name: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for k in dict.fromkeys([*then, *now]):
            yield from _differences(then.get(k), now.get(k), f"{name}.{k}".lstrip("."))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from _differences(a, b, f"{name}[{i}]")
    elif then != now:
        old, new = (json.dumps(value, ensure_ascii=False) for value in (then, now))
        yield f"{_MEANING.get(name, name)}: {old[:_SHOWN_CHARACTERS]}, now {new[:_SHOWN_CHARACTERS]}"


def _write_chunks(
    source: Source,
    partial: Path,
    processor: Processor,
    key: dict[str, Any],
    workers: int,
    max_bad: float,
    progress: bool,
) -> None:
    items, chunk = key["items"], key["chunk"]
    sizes = [min(chunk, items - first) for first in range(0, items, chunk)]
    bad, todo = 0, []
    for number in range(len(sizes)):
        finished = Chunk.load(partial, number)
        if finished is None:
            todo.append(number)
        else:
            bad += len(finished.quarantine)
    there = len(sizes) - len(todo)
    if there and progress:
        print(f"going on: {there:,} of {len(sizes):,} chunks are there already")
    options = Options(partial, chunk, key["shard_bytes"], key["decode"])
    results = processes.run(write_chunk, (source, processor, options), todo, min(workers, len(todo)))
    with bars.bar(f"import {source.name}", items, shown=progress) as advance, contextlib.closing(results):
        advance(items - sum(sizes[n] for n in todo))
        _check_share(partial, bad, items, max_bad, len(sizes))
        for number, more_bad in results:
            advance(sizes[number])
            bad += more_bad
            _check_share(partial, bad, items, max_bad, len(sizes))


def _check_share(partial: Path, bad: int, items: int, max_bad: float, chunks: int) -> None:
    """``quarantine.check_share``; what is quarantined is only read again, and written for people, when it stops."""
    if bad <= max_bad * items:
        return
    finished = [chunk for n in range(chunks) if (chunk := Chunk.load(partial, n)) is not None]
    lines = [line for chunk in finished for line in chunk.quarantine]
    path = partial / quarantine.FILE
    with _appearing(path) as file:
        file.writelines(line + b"\n" for line in lines)
    quarantine.check_share([Quarantined(**json.loads(line)) for line in lines], items, max_bad, path)


def _finish(partial: Path, key: dict[str, Any]) -> None:
    """Index, quarantine and manifest out of finished chunks; one chunk is in memory at a time."""

    def chunks() -> Iterator[Chunk]:
        for number in range(-(-key["items"] // key["chunk"])):
            chunk = Chunk.load(partial, number)
            if chunk is None:
                raise OSError(f"chunk {number} in {partial} has gone or changed since it was written; import again")
            yield chunk

    totals: collections.Counter[str] = collections.Counter()
    by_name: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    shards: list[dict[str, Any]] = []
    with _appearing(partial / quarantine.FILE) as file:
        for chunk in chunks():
            shards += chunk.shards
            file.writelines(line + b"\n" for line in chunk.quarantine)
            for name, count in chunk.counts.items():
                if isinstance(count, int):
                    totals[name] += count
                else:
                    by_name[name].update(count)
    if not totals["records"]:
        raise ValueError(
            f"there are no records to import: all {key['items']:,} items are bad; {partial / quarantine.FILE}"
        )
    (partial / "index").mkdir(exist_ok=True)
    shapes = {
        "image_sizes": (totals["images"], 2),
        "image_offsets": (totals["records"] + 1,),
    }
    images = 0
    with contextlib.ExitStack() as stack:
        columns = {name: stack.enter_context(_appearing(partial / "index" / f"{name}.npy")) for name in DTYPES}
        for name, column in columns.items():
            shape = shapes.get(name, (totals["records"],))
            header = {"descr": DTYPES[name], "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(column, header)
        columns["image_offsets"].write(bytes(8))  # the first record's images begin at 0
        for chunk in chunks():
            ends = images + np.frombuffer(chunk.columns["image_offsets"], DTYPES["image_offsets"])
            for name, column in columns.items():
                column.write(ends.tobytes() if name == "image_offsets" else chunk.columns[name])
            images += chunk.counts["images"]
    named = {shard["file"] for shard in shards}
    for path in partial.glob("*.array_record"):
        if path.name not in named:  # of a chunk that was written before its source had changed
            path.unlink()
    manifest = {
        "schema": SCHEMA,
        "records": totals["records"],
        "images": totals["images"],
        "text_tokens": totals["text_tokens"],
        "text": key["text"],
        "shards": shards,
        "index": [describe_file(partial, f"index/{name}.npy") for name in DTYPES],
        "counts": {
            **{name: dict(sorted(counts.items())) for name, counts in sorted(by_name.items())},
            "system_messages": totals["system_messages"],
        },
        "import": key,
    }
    with _appearing(partial / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name, or takes the place of an older one, when it is whole and on the disk."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
