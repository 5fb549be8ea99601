"""ArrayRecord: payloads that are our records, or items as JSON or msgpack.

A dataset can be imported again with other options; its shards are then read in its own order.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_module import ArrayRecordReader

from phivision_jax.config import typed
from phivision_jax.data.quarantine import Quarantined
from phivision_jax.data.sources.files import Files, FileSource, files_of_format
from phivision_jax.data.sources.items import LARGE, ItemReader
from phivision_jax.data.sources.source import Read
from phivision_jax.io.files import locate
from phivision_jax.io.memory import LIMIT, limited_memory
from phivision_jax.io.read_json import read_json

LARGEST = 256 * 2**20
"""Bytes of a payload; twice the images of a record."""
# No buffers for reading ahead: their threads would outnumber the cores.
_BROKEN = (ValueError, RecursionError, msgpack.UnpackException)
_READER = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecordSource(FileSource[Path]):
    """Payloads of ArrayRecord files."""

    format = "array-record"

    def _find(self, path: Path, split: str) -> Files:
        return Files(_files(path), [])

    def _open(self, file: Path) -> Iterator[tuple[Path, int]]:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {file.with_name('manifest.json')} names it")
        reader = ArrayRecordReader(str(file), _READER)
        if not reader.ok():
            raise ValueError(f"{file} is not an ArrayRecord file, or is cut short")
        yield file, reader.num_records()
        reader.close()

    def _read_part(self, part: Path, start: int, stop: int) -> Iterator[Read | Quarantined]:
        memory = LIMIT + 2 * min(part.stat().st_size, LIMIT)  # twice what is stored, which is not compressed then
        with contextlib.closing(ArrayRecordReader(str(part), _READER)) as reader:
            for k in range(start, stop):
                place, where = f"{part.name}:{k + 1}", f"{part.name}, payload {k + 1}"
                try:
                    with limited_memory(memory):
                        (payload,) = reader.read([k])
                    if len(payload) > LARGEST:
                        raise MemoryError
                except (RuntimeError, MemoryError) as error:
                    yield self._reader.undecoded(error, "the payload cannot be read", place, where)
                else:
                    yield _read(payload, self._reader, place, where)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    manifest = path / "manifest.json"
    if manifest.is_file():
        shards = typed(read_json(manifest).get("shards"), tuple[Mapping[str, Any], ...], f"{manifest}: shards")
        return [locate(path, typed(shard.get("file"), str, f"{manifest}: file")) for shard in shards]
    if not (files := files_of_format(path, "array-record")):
        raise ValueError(f"{path} holds no .array_record file")
    return files


def _read(payload: bytes, items: ItemReader, place: str, where: str) -> Read | Quarantined:
    # The first field of a protobuf message, and a byte that no text has.
    if payload[:1] == b"\x0a" and re.search(rb"[\x00-\x08\x0e-\x1f]", payload[:64]):
        return items.bad("syntax", "neither JSON nor msgpack; a tf.train.Example? Read it as TFDS", place, where)
    if payload[:64].lstrip()[:1] == b"{":
        return items.read_json(payload, place, where)
    try:
        with limited_memory() if len(payload) > LARGE else contextlib.nullcontext():
            item = msgpack.unpackb(payload)
    except (*_BROKEN, MemoryError) as error:
        item = None
        with contextlib.suppress(*_BROKEN):
            item = msgpack.unpackb(payload, unicode_errors="replace") if isinstance(error, UnicodeDecodeError) else None
        return items.undecoded(error, "neither JSON nor msgpack", place, where, item)
    return items.read(item, place, where)
