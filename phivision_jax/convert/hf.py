"""A Hugging Face directory: safetensors shards read by `pread`, and shards written in any order of tensors.

The file format is small (8 bytes of header length, a JSON header, the data), and reading it here rather than through a
memory map is what keeps memory flat: mapped pages count as resident. In a bucket the same ranges are requests, and no
shard is copied to this machine. Nothing here unpickles or executes anything.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from phivision_jax.convert.mapping import Leaf, Shape, check, hf_shapes
from phivision_jax.io import storage
from phivision_jax.io.storage import Location, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER_LIMIT = 100_000_000  # the format's own


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Location
    dtype: np.dtype
    shape: Shape
    offset: int
    """Of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Location, size: int) -> tuple[bytes, dict[str, Entry]]:
    """The bytes before the data (length, JSON, padding) of a file of ``size`` bytes, and what they say.

    Raises:
      ValueError: when the file is cut short, too long, not safetensors, or holds a dtype that weights do not have.
    """
    length = int.from_bytes(storage.read_range(path, 0, min(size, 8)), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _HEADER_LIMIT):
        raise ValueError(f"{path}: not safetensors, or cut short: {size} bytes with a header length of {length}")
    raw = storage.read_range(path, 8, length)
    entries = {}
    try:
        for name, value in json.loads(raw).items():
            if name == "__metadata__":
                continue
            if value["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {name} is {value['dtype']}; weights are {', '.join(DTYPES)}")
            begin, end = value["data_offsets"]
            entry = Entry(path, DTYPES[value["dtype"]], tuple(value["shape"]), 8 + length + begin)
            if end - begin != entry.nbytes:
                raise ValueError(f"{path}: {name} {value['shape']} {value['dtype']} does not take {end - begin} bytes")
            entries[name] = entry
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the safetensors header is corrupt ({type(error).__name__}: {error})") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != end:
            raise ValueError(f"{path}: {name} starts at byte {entry.offset}, not {end}: the header is corrupt")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"{path}: {size} bytes, but its header describes {end}: truncated or damaged")
    return length.to_bytes(8, "little") + raw, entries


class HFDirectory:
    """The tensors of a Hugging Face directory, found but not read.

    Raises:
      ValueError: when there is no safetensors checkpoint here, or index and shards do not agree.
    """

    def __init__(self, directory: Location) -> None:
        self.directory = directory
        self.files = storage.files(directory)
        """Every file below: name → bytes."""
        if not self.files and not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        index = directory / INDEX
        if INDEX in self.files:
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ValueError(f"{index} has no weight_map of tensor names to files")
            names = sorted(set(weight_map.values()))
        elif SINGLE in self.files:
            weight_map, names = None, [SINGLE]
        else:
            top = (name for name in self.files if "/" not in name)
            pickles = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in _PICKLES)]
            if pickles:
                raise ValueError(
                    f"{directory} holds pickled weights only ({pickles[0]}): refused, loading them runs code"
                )
            raise ValueError(f"{directory} has neither {INDEX} nor {SINGLE}")
        self.shards = tuple(directory / name for name in names)
        self.headers: dict[str, bytes] = {}
        self.entries: dict[str, Entry] = {}
        for name, path in zip(names, self.shards, strict=True):
            if "/" in name or name not in self.files:
                raise ValueError(f"{index} names {name}, which is not a file in {directory}")
            self.headers[name], entries = read_header(path, self.files[name])
            if twice := sorted(set(entries) & set(self.entries)):
                raise ValueError(f"{path}: {twice[0]} is also in {self.entries[twice[0]].file.name}")
            if weight_map is not None:
                named = {tensor for tensor, file in weight_map.items() if file == name}
                check(dict.fromkeys(entries, ()), dict.fromkeys(named, ()), f"{path} against {INDEX}")
            self.entries |= entries

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def sidecars(self) -> list[PurePosixPath]:
        """Every other file, relative to the directory: config, tokenizer, remote code … but no weights and no index."""
        found = (PurePosixPath(name) for name in self.files if name != INDEX and name not in self.headers)
        return [path for path in found if not {".git", ".cache"} & set(path.parts)]


class HFSource:
    """The leaves of a table, read from a Hugging Face directory.

    Raises:
      ValueError: when the directory does not hold exactly the table's tensors, ``unused`` prefixes apart.
    """

    def __init__(self, hf: HFDirectory, leaves: Iterable[Leaf], unused: tuple[str, ...] = ()) -> None:
        self.hf = hf
        self.unused = sorted(name for name in hf.entries if name.startswith(unused)) if unused else []
        have = {name: entry.shape for name, entry in hf.entries.items() if name not in set(self.unused)}
        check(have, hf_shapes(leaves), str(hf.directory))
        self._files = {path: os.open(path, os.O_RDONLY) for path in hf.shards if isinstance(path, Path)}

    def dtype(self, leaf: Leaf) -> np.dtype:
        dtypes = {self.hf.entries[name].dtype for name in leaf.names}
        if len(dtypes) > 1:
            raise ValueError(f"{leaf.names[0]} … are of several dtypes over layers; one array has one, pass --dtype")
        return dtypes.pop()

    def grain(self, leaf: Leaf) -> tuple[int, int]:
        """Layers and rows that are best read together; here any."""
        return 1, leaf.rows_per_index

    def read(self, leaf: Leaf, layers: range, rows: range) -> list[np.ndarray]:
        """Their rows [rows, …] of ``leaf``, one array per layer."""
        return [self._read(self.hf.entries[leaf.names[layer]], leaf.start + rows.start, len(rows)) for layer in layers]

    def _read(self, entry: Entry, start: int, count: int) -> np.ndarray:
        shape = (count, *entry.shape[1:])
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        if not isinstance(entry.file, Path):
            data = storage.read_range(entry.file, entry.offset + start * row_bytes, count * row_bytes)
            if len(data) != count * row_bytes:
                raise ValueError(f"{entry.file} ended while it was read: truncated meanwhile?")
            return np.frombuffer(data, entry.dtype).reshape(shape)
        out = np.empty(shape, entry.dtype)
        view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            n = os.preadv(self._files[entry.file], [view[done:]], entry.offset + start * row_bytes + done)
            if n == 0:
                raise ValueError(f"{entry.file} ended while it was read: truncated meanwhile?")
            done += n
        return out

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def plan_shards(tensors: Mapping[str, tuple[np.dtype, Shape]], max_bytes: int) -> tuple[dict[str, bytes], bytes | None]:
    """The headers of new shards, file by file, and the index; names and layout are those of `save_pretrained`.

    A tensor is never cut: one larger than ``max_bytes`` has a shard of its own. One shard alone has no index.
    """
    groups: list[list[str]] = [[]]
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = [SINGLE]
    headers = {}
    for file, names in zip(files, groups, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wider numbers first, so that every tensor is aligned; then by name, as the safetensors library writes.
        for name in sorted(names, key=lambda n: (-tensors[n][0].itemsize, n)):
            dtype, shape = tensors[name]
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        headers[file] = len(raw).to_bytes(8, "little") + raw
    if len(groups) == 1:
        return headers, None
    weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    count = sum(math.prod(shape) for _, shape in tensors.values())
    metadata = {"total_parameters": count, "total_size": sum(sizes.values())}
    index = {"metadata": metadata, "weight_map": weight_map}
    return headers, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


class HFSink:
    """Shards in the making: headers are there from the start, rows come in any order."""

    def __init__(self, directory: Path, headers: Mapping[str, bytes]) -> None:
        self._files: dict[Path, int] = {}
        self._entries: dict[str, Entry] = {}
        for name, header in headers.items():
            path = directory / name
            self._files[path] = file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(file, header)
            end = len(header)
            for tensor, value in json.loads(header[8:]).items():
                if tensor != "__metadata__":
                    entry = Entry(
                        path, DTYPES[value["dtype"]], tuple(value["shape"]), len(header) + value["data_offsets"][0]
                    )
                    self._entries[tensor] = entry
                    end = max(end, entry.offset + entry.nbytes)
            os.ftruncate(file, end)

    def write(self, leaf: Leaf, layer: int, start: int, block: np.ndarray) -> None:
        """Put their rows [start, start + n) of ``leaf`` where they belong."""
        entry = self._entries[leaf.names[layer]]
        data = np.ascontiguousarray(block)
        assert data.dtype == entry.dtype, (leaf.path, data.dtype, entry.dtype)
        view = memoryview(data.reshape(-1).view(np.uint8))
        offset, done = entry.offset + (leaf.start + start) * (data.nbytes // len(data)), 0
        while done < len(view):
            done += os.pwrite(self._files[entry.file], view[done:], offset + done)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
