"""A Hugging Face directory: safetensors shards that are read and written in runs of rows.

The file format is small (8 bytes with the header's length, a JSON header, the data). It is read here by ranges and not
through a memory map, because mapped pages count as resident memory. In a bucket the ranges are requests, and no shard
is copied to this machine. Nothing here unpickles or executes anything.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from phivision_jax.checkpoint import layout
from phivision_jax.config import typed
from phivision_jax.convert.mapping import Leaf, Shape, check, hf_shapes
from phivision_jax.io import atomic, storage
from phivision_jax.io.messages import shorten
from phivision_jax.io.read_json import parse_json, read_json, wrong_file
from phivision_jax.io.storage import Location

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 8 * 2**20
"""Bytes of a header: the released model's shards have 25 kB at most, and the format allows 100 MB."""
# Buffers without content of their own, which other versions of transformers save; they are checked and ignored.
_BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")
_BUFFER_DTYPES = DTYPES | {"I64": np.dtype(np.int64)}
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel"}
_WRAPPERS |= {"language_model.": "another version of transformers", "base_model.model.": "PEFT", "base_layer.": "PEFT"}
"""Parts of names that show who saved a wrapped model."""
_FOREIGN = {
    r"model\.safetensors(\.index\.json)?": "is a Hugging Face directory ({}): phivision convert to-jax converts it",
    r"snapshots/[^/]*/config\.json": "is the root of a hub cache: give its snapshot, {parent}",
    r"adapter_(config\.json|model\..*)": "holds a PEFT adapter ({}) without its model: merge it, and save the model",
    r"[^/]*\.gguf": "holds GGUF weights only ({}): give the safetensors that they were made from",
    r"[^/]*-of-\d+\.safetensors": f"holds shards ({{}}) without their index: copy {INDEX} as well",
    r"[^/]*\.safetensors": f"holds weights ({{}}), but lacks config.json, {SINGLE} or {INDEX}",
    r"[^/]*\.(bin|pt|pth|ckpt)": "holds pickled weights only ({}): loading them would run code",
}
"""Names of files → the end of a sentence about a directory that has no weights of the two readable kinds."""
_DESCRIPTION: dict[str, Any] = {"dtype": str, "shape": tuple[int, ...], "data_offsets": tuple[int, int]}
"""Types of the values in a tensor's entry of a safetensors header."""


class Entry(NamedTuple):
    """The place of one tensor."""

    file: Location
    dtype: np.dtype
    shape: Shape
    offset: int
    """Offset of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, count: int) -> tuple[int, int]:
        """Offset and number of the bytes of these rows."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self.offset + start * row_bytes, count * row_bytes


def parse_header(path: Location, header: bytes) -> dict[str, Entry]:
    """The tensors of a file that begins with ``header`` (length, JSON, padding).

    Raises:
      ValueError: when it is corrupt, or contains a dtype that weights do not have.
    """
    corrupt = f"{path}: the safetensors header is corrupt"
    entries: dict[str, Entry] = {}
    described = parse_json(header[8:], corrupt)
    described.pop("__metadata__", None)
    for name, value in typed(described, Mapping[str, Mapping[str, Any]], corrupt).items():
        what = f"{corrupt}: {shorten(name)}"
        code, shape, (begin, end) = (
            typed(value.get(key), hint, f"{what}: {key}") for key, hint in _DESCRIPTION.items()
        )
        dtypes = _BUFFER_DTYPES if _BUFFER.search(name) else DTYPES
        if code not in dtypes:
            raise ValueError(f"{path}: {shorten(name)} is {shorten(code)}; weights are {', '.join(DTYPES)}")
        entry = entries[name] = Entry(path, dtypes[code], shape, len(header) + begin)
        if min((begin, *shape)) < 0 or len(shape) > 8 or entry.nbytes != end - begin:
            raise ValueError(f"{what} has shape {shorten(shape)} in {end - begin} bytes")
    return entries


def read_header(path: Location, size: int) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file of ``size`` bytes, and its tensors.

    Raises:
      ValueError: when the file is truncated, too long or not safetensors, or as ``parse_header``.
    """
    head = storage.read_range(path, 0, min(size, 64))
    length = int.from_bytes(head[:8], "little")
    if known := wrong_file(head):
        raise ValueError(f"{path} {known}")
    if _HEADER_LIMIT < length <= size - 8:
        raise ValueError(f"{path}: its header has {length:,} bytes, more than the limit of {_HEADER_LIMIT:,}")
    if size < 8 or not 2 <= length <= size - 8:
        raise ValueError(f"{path}: not safetensors, or truncated: {size} bytes with a header length of {length}")
    header = storage.read_range(path, 0, 8 + length)
    entries = parse_header(path, header)
    end = len(header)
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != end:
            raise ValueError(f"{path}: the header is corrupt: {shorten(name)} is at {shorten(entry.offset)}, not {end}")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"{path}: {size} bytes, but its header describes {shorten(end)}: truncated or damaged")
    return header, entries


def refuse_foreign(directory: Location, names: Iterable[str]) -> None:
    """Raises ValueError for a directory with these files whose weights are of a known but unreadable kind."""
    for pattern, sentence in _FOREIGN.items():
        if found := min((name for name in names if re.fullmatch(pattern, name)), default=None):
            problem = sentence.format(shorten(found), parent=directory / PurePosixPath(found).parent)
            raise ValueError(f"{directory} {problem}")


def find_ours(path: Location) -> Location:
    """As ``layout.find``, with a sentence for directories of another known kind."""
    try:
        return layout.find(path)
    except ValueError:
        snapshots = [f"snapshots/{child.name}/config.json" for child in storage.children(path / "snapshots")]
        refuse_foreign(path, [*(child.name for child in storage.children(path)), *snapshots])
        raise


def is_asset(name: str) -> bool:
    """True for a file that belongs with the weights but holds none, and is kept when they are converted."""
    if {".git", ".cache"} & set(PurePosixPath(name).parts) or name.endswith((layout.ORBAX_MARK, ".safetensors", INDEX)):
        return False
    return "/" in name or not re.fullmatch(r".*\.(bin|pt|pth|ckpt|gguf|h5|msgpack)", name)


class HFDirectory:
    """The tensors of a Hugging Face directory, located but not read.

    Attributes:
      files: size in bytes of every file below the directory, by relative name.
      headers: the header of each shard, by file name.
      entries: the place of each tensor, by tensor name.
      buffers: names of tensors without content of their own, which are not among the entries.
      others: the files beside the weights, by relative name: index, config, tokenizer, remote code …

    Raises:
      ValueError: when there is no safetensors checkpoint, or the index and the shards disagree.
    """

    def __init__(self, directory: Location) -> None:
        self.directory, self.files = directory, storage.files(directory)
        if not self.files and not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")
        index = directory / INDEX
        weight_map = read_json(index).get("weight_map") if INDEX in self.files else {}
        weight_map = typed(weight_map, Mapping[str, str], f"{index}: weight_map")
        if not weight_map and INDEX in self.files:
            raise ValueError(f"{index} names no tensors: its weight_map is empty")
        if not weight_map and SINGLE not in self.files:
            refuse_foreign(directory, self.files)
            raise ValueError(f"{directory} is no Hugging Face directory: it has neither {INDEX} nor {SINGLE}")
        if weight_map and SINGLE in self.files and SINGLE not in weight_map.values():
            raise ValueError(f"{directory} holds {INDEX} and a {SINGLE} that it does not name: remove the old one")
        self.headers: dict[str, bytes] = {}
        entries: dict[str, Entry] = {}
        for name in sorted(set(weight_map.values())) or [SINGLE]:
            path = directory / name
            if "/" in name or name not in self.files:
                raise ValueError(f"{index} names {shorten(name)}, which is not a file in {directory}")
            self.headers[name], here = read_header(path, self.files[name])
            if weight_map:
                indexed = [tensor for tensor, file in weight_map.items() if file == name]
                check(dict.fromkeys(here, ()), dict.fromkeys(indexed, ()), f"{path} against {INDEX}")
            entries |= here
        self.buffers = [name for name in entries if _BUFFER.search(name)]
        self.entries = {name: entry for name, entry in entries.items() if name not in self.buffers}
        others = (name for name in self.files if name not in self.headers)
        self.others = [name for name in others if not {".git", ".cache"} & set(PurePosixPath(name).parts)]


class HFSource:
    """The leaves of a table, read from a Hugging Face directory.

    Args:
      unused: prefixes of tensors that the table does not contain.

    Raises:
      ValueError: when the directory does not hold exactly the table's tensors.
    """

    kind = "Hugging Face"

    def __init__(self, hf: HFDirectory, leaves: Sequence[Leaf], unused: tuple[str, ...] = ()) -> None:
        self.hf, self.leaves = hf, leaves
        self._entries = {name: entry for name, entry in hf.entries.items() if not name.startswith(unused)}
        expected = hf_shapes(leaves)
        for name in sorted(self._entries.keys() - expected.keys()) if expected.keys() - self._entries.keys() else ():
            if part := next((part for part in _WRAPPERS if f".{part}" in f".{name}"), None):
                problem = f"holds tensors as {_WRAPPERS[part]} names them ({shorten(name)})"
                raise ValueError(f"{hf.directory} {problem}: save the model itself, without {part!r} in the names")
        check({name: entry.shape for name, entry in self._entries.items()}, expected, str(hf.directory))

    def dtype(self, leaf: Leaf) -> np.dtype:
        dtypes = {self._entries[name].dtype for name in leaf.names}
        if len(dtypes) > 1:
            raise ValueError(f"{leaf.names[0]} … have several dtypes over layers; one array has one, pass --dtype")
        return dtypes.pop()

    def grain(self, leaf: Leaf) -> tuple[int, int]:
        """The fewest layers and rows to read together."""
        return 1, leaf.rows_per_index

    def read(self, leaf: Leaf, layers: range, rows: range) -> list[np.ndarray]:
        """Rows of ``leaf``, [rows, …] for each layer."""
        return [self._read(self._entries[leaf.names[layer]], leaf.start + rows.start, len(rows)) for layer in layers]

    def _read(self, entry: Entry, start: int, count: int) -> np.ndarray:
        offset, nbytes = entry.rows(start, count)
        data = storage.read_range(entry.file, offset, nbytes)
        if len(data) != nbytes:
            raise ValueError(f"{entry.file} ended while it was read: truncated meanwhile?")
        return np.frombuffer(data, entry.dtype).reshape(count, *entry.shape[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def plan_shards(tensors: Mapping[str, tuple[np.dtype, Shape]], max_bytes: int) -> tuple[dict[str, bytes], bytes | None]:
    """Headers of new shards by file name, and the index, named and laid out as by ``save_pretrained``.

    A tensor is never split: one larger than ``max_bytes`` has its own shard. A single shard has no index.
    """
    groups: list[list[str]] = [[]]
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > max_bytes:
            groups.append([])
        groups[-1].append(name)
    if len(groups) == 1:
        return {SINGLE: header_of(tensors)}, None
    headers, weight_map = dict[str, bytes](), dict[str, str]()
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        headers[file] = header_of({name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    count = sum(math.prod(shape) for _, shape in tensors.values())
    index = {"metadata": {"total_parameters": count, "total_size": sum(sizes.values())}, "weight_map": weight_map}
    return headers, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def header_of(tensors: Mapping[str, tuple[np.dtype, Shape]]) -> bytes:
    """The header of a new file: length, JSON and padding."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wider numbers first, so that every tensor is aligned; then by name, as the safetensors library writes.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


class HFSink:
    """New shards, which have their headers and full size from the start; rows are written in any order."""

    folder = ""

    def __init__(self, headers: Mapping[str, bytes], directory: Path) -> None:
        self._entries: dict[str, Entry] = {}
        for name, header in headers.items():
            path = directory / name
            entries = parse_header(path, header)
            path.write_bytes(header)
            os.truncate(path, len(header) + sum(entry.nbytes for entry in entries.values()))
            self._entries |= entries

    def write(self, leaf: Leaf, layer: int, start: int, block: np.ndarray) -> None:
        """Write rows [start, start + n) of ``leaf``."""
        entry = self._entries[leaf.names[layer]]
        assert block.dtype == entry.dtype, (leaf.path, block.dtype, entry.dtype)
        path = Path(entry.file)
        with atomic.with_filename(path), path.open("r+b") as file:
            file.seek(entry.rows(leaf.start + start, len(block))[0])
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))

    def finish(self) -> None:
        """Nothing is left to write."""
