"""ArrayRecord: payloads that are records of ours, or items as JSON or msgpack.

A directory that an import wrote can be imported again, with other options; its shards are then read in its own order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from phivision_jax.data.quarantine import BadRecord, Quarantined
from phivision_jax.data.sources.files import files_of_format, identify
from phivision_jax.data.sources.item_options import ItemOptions
from phivision_jax.data.sources.items import ItemReader
from phivision_jax.data.sources.source import Read

# No buffers for reading ahead: their threads would outnumber the cores.
_READER = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecordSource:
    """Payloads of ArrayRecord files."""

    def __init__(self, path: Path, options: ItemOptions, *, name: str | None = None) -> None:
        """Find the files and count their payloads.

        Args:
          path: a file or a folder.
          options: how payloads become records.
          name: of the source; default: the stem of the file or the name of the folder.

        Raises:
          ValueError: when there is no payload, or a file is not ArrayRecord.
        """
        self.name = name or (path.name.partition(".")[0] if path.is_file() else path.resolve().name)
        self._options = options
        self._folder = path if path.is_dir() else path.parent
        self._files = _files(path)
        counts = []
        for file in self._files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, of which {path / 'manifest.json'} speaks")
            reader = ArrayRecordReader(str(file), _READER)
            if not reader.ok():
                raise ValueError(f"{file} is not an ArrayRecord file, or is cut short")
            counts.append(reader.num_records())
            reader.close()
        self._begins = np.cumsum([0, *counts])
        self._key = identify(self._files)
        if not len(self):
            raise ValueError(f"{path} holds no payloads")

    def __len__(self) -> int:
        return int(self._begins[-1])

    def key(self) -> Any:
        return {"format": "array-record", "name": self.name, "files": self._key, "options": self._options.key()}

    def read(self, start: int, stop: int) -> Iterator[Read | Quarantined]:
        items = ItemReader(self.name, self._folder, self._options)
        for file, begin, end in zip(self._files, self._begins, self._begins[1:], strict=False):
            first, last = max(start, int(begin)), min(stop, int(end))
            if first >= last:
                continue
            reader = ArrayRecordReader(str(file), _READER)
            try:
                for k in range(first - int(begin), last - int(begin)):
                    place, where = f"{file.name}:{k + 1}", f"{file.name}, payload {k + 1}"
                    try:
                        (payload,) = reader.read([k])
                    except RuntimeError as error:
                        yield items.bad("syntax", f"the payload cannot be read: {error}", place, where)
                        continue
                    try:
                        item = _item(payload)
                    except BadRecord as bad:
                        yield items.bad(bad.reason, str(bad), place, where, _replaced(payload))
                        continue
                    yield items.read(item, place, where)
            finally:
                reader.close()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    manifest = path / "manifest.json"
    if manifest.is_file():
        try:
            return [path / shard["file"] for shard in json.loads(manifest.read_text())["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest} does not name the shards of a data set ({error!r})") from None
    if not (files := files_of_format(path, "array-record")):
        raise ValueError(f"{path} holds no .array_record file")
    return files


def _item(payload: bytes) -> Any:
    """What a payload says.

    Raises:
      BadRecord: "encoding" or "syntax".
    """
    try:
        if payload[:64].lstrip()[:1] == b"{":
            return json.loads(payload.decode())
        return msgpack.unpackb(payload)
    except UnicodeDecodeError as error:
        raise BadRecord("encoding", f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        if payload[:1] == b"\x0a":  # The first field of a protobuf message.
            raise BadRecord("syntax", "neither JSON nor msgpack; a tf.train.Example? Read it as TFDS") from None
        raise BadRecord("syntax", f"neither JSON nor msgpack: {error}") from None


def _replaced(payload: bytes) -> Any:
    """What can be read of a payload with broken UTF-8."""
    try:
        if payload[:64].lstrip()[:1] == b"{":
            return json.loads(payload.decode("utf-8", "replace"))
        return msgpack.unpackb(payload, unicode_errors="replace")
    except (ValueError, RecursionError, msgpack.UnpackException):
        return None
