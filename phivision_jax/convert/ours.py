"""Our checkpoint directory, read and written in blocks with TensorStore, never holding a complete array.

    DIR/params/          Orbax PyTree: zarr arrays in an OCDBT store, as StandardCheckpointHandler reads and writes them
    DIR/meta/metadata    JSON (JsonCheckpointHandler), see checkpoint/layout.py
    DIR/assets/          the other files of the Hugging Face directory, unchanged
    DIR/opt_state/       in steps of a run only; not read here

Orbax saves arrays that exist in memory. This module writes the same files from blocks: a stacked leaf is chunked one
layer at a time and, within a layer, along the axis of Hugging Face's rows, so that a chunk is exactly one run of rows
of one tensor (see ``mapping``). The metadata that makes the directory a checkpoint to Orbax is written last.

Checksums of the arrays are computed from the blocks as they are written, and compared when all blocks of an array have
been read again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.checksums import StreamedChecksums, difference
from phivision_jax.checkpoint.layout import ASSETS, META, ORBAX_MARK, PARAMS, Array, DamagedError
from phivision_jax.config import ModelConfig
from phivision_jax.convert.adapters import Adapters
from phivision_jax.convert.mapping import Leaf, check
from phivision_jax.io.messages import first_line
from phivision_jax.io.storage import REMOTE, Location

BLOCK_BYTES = 32_000_000
"""The largest chunk; with a few in flight, it determines the memory that a conversion needs."""

_HANDLERS = "orbax.checkpoint._src.handlers"
_STANDARD = f"{_HANDLERS}.standard_checkpoint_handler.StandardCheckpointHandler"
_JSON = f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler"


def _context() -> ts.Context:
    # No cache: every chunk is used once. No fsync per write: ``io.atomic`` flushes everything before the rename. A
    # failed request is sent six times, like all others to a bucket; the default would take a quarter of an hour.
    retries = {"max_retries": 5}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False, "gcs_request_retries": retries})


def _kvstore(directory: Location) -> dict[str, Any]:
    """TensorStore's specification of a directory."""
    if isinstance(directory, Path):
        return {"driver": "file", "path": f"{directory.absolute()}/"}
    bucket, _, path = str(directory).removeprefix(REMOTE).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


class OursSource:
    """The leaves of a table, read from a checkpoint of ours, with adapters merged into their kernels.

    Args:
      directory: the checkpoint.
      meta: its metadata.
      leaves: the table.

    Raises:
      ValueError: when its arrays are not exactly those of the table and its adapters, in name and shape.
      DamagedError: when an array cannot be opened, or an adapter is not what was saved.
    """

    def __init__(self, directory: Location, meta: Mapping[str, Any], leaves: Sequence[Leaf]) -> None:
        self._directory, self._params = directory, directory / PARAMS
        self._saved, self._sums = layout.arrays_of(meta), StreamedChecksums()
        self.adapters = Adapters.find(directory, meta, self._saved)
        expected = {leaf.path: leaf.shape for leaf in leaves}
        adapters = {path: shape for leaf in leaves for path, shape in self.adapters.shapes(leaf).items()}
        check({path: array.shape for path, array in self._saved.items()}, expected | adapters, str(self._params))
        base = _kvstore(self._params)
        ocdbt = {"driver": "ocdbt", "base": base} if (self._params / "manifest.ocdbt").exists() else base
        context = _context()
        self._arrays = {path: self._open(path, ocdbt, context) for path in self._saved}
        for path, shape in adapters.items():  # they are read several times, so they are verified now
            step = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
            for start in range(0, shape[0], step):
                region = (slice(start, min(start + step, shape[0])),)
                self._verify(path, region, self._read(path, region))

    def _open(self, path: str, base: Mapping[str, Any], context: ts.Context) -> ts.TensorStore:
        kvstore = {**base, "path": f"{base.get('path', '')}{path.replace('/', '.')}/"}
        try:
            array = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, context=context).result()
        except ValueError as error:
            raise self._unreadable(path, error) from None
        found, saved = (array.dtype.name, tuple(array.shape)), self._saved[path]
        if found != saved[:2]:
            raise DamagedError(self._directory, f"its array {PARAMS}/{path} is stored as {found}, saved as {saved[:2]}")
        return array

    def _unreadable(self, path: str, error: Exception) -> DamagedError:
        return DamagedError(self._directory, f"its array {PARAMS}/{path} cannot be read: {first_line(error)}")

    def _verify(self, path: str, region: Sequence[slice], block: np.ndarray) -> None:
        """Add a block to its array's checksum; with the last block, compare it."""
        saved, name = self._saved[path], f"{PARAMS}/{path}"
        found = self._sums.add(path, block, _start(region), saved.shape)
        if found is not None and (problem := difference({name: saved}, {name: found})):
            raise DamagedError(self._directory, problem)

    def dtype(self, leaf: Leaf) -> np.dtype:
        return np.dtype(self._arrays[leaf.path].dtype.numpy_dtype)

    def grain(self, leaf: Leaf) -> tuple[int, int]:
        """The fewest layers and rows to read together: those of one stored chunk, so that none is decoded twice."""
        # A zarr array always has a chunk shape; TensorStore's types allow for drivers without one.
        chunk = [size or 1 for size in self._arrays[leaf.path].chunk_layout.read_chunk.shape or leaf.shape]
        rows = chunk[leaf.row_axis + leaf.stacked] * leaf.rows_per_index
        return min(chunk[0] if leaf.stacked else 1, len(leaf.names)), min(rows, leaf.num_rows)

    def read(self, leaf: Leaf, layers: range, rows: range) -> list[np.ndarray]:
        """Rows of ``leaf``, [rows, …] for each layer."""
        region = leaf.region(layers, rows)
        block = self._read(leaf.path, region)
        self._verify(leaf.path, region, block)
        kernels = [leaf.to_theirs(layer) for layer in (block if leaf.stacked else [block])]
        pairs = zip(layers, kernels, strict=True)
        return [self.adapters.merge(kernel, leaf, layer, rows, self._read) for layer, kernel in pairs]

    def _read(self, path: str, region: tuple[int | slice, ...]) -> np.ndarray:
        try:
            return self._arrays[path][region].read().result()
        except ValueError as error:
            raise self._unreadable(path, error) from None


def _start(region: Sequence[slice]) -> list[int]:
    return [axis.start or 0 for axis in region]


def block_rows(leaf: Leaf, itemsize: int) -> int:
    """The number of rows in a chunk, at most ``BLOCK_BYTES``; chunks of equal size where the axis allows it."""
    length = leaf.layer_shape[leaf.row_axis]
    row_bytes = math.prod(leaf.layer_shape) // length * itemsize
    most = max(1, BLOCK_BYTES // row_bytes)
    even = next((n for n in range(min(most, length), most // 2, -1) if length % n == 0), min(most, length))
    return even * leaf.rows_per_index


class OursSink:
    """A new checkpoint of ours; rows are written in any order."""

    def __init__(self, directory: Path, dtypes: Mapping[str, np.dtype], leaves: Iterable[Leaf]) -> None:
        self._params, self._leaves = directory / PARAMS, list(leaves)
        self._sums = StreamedChecksums()
        self._written: dict[str, Array] = {}
        self._params.mkdir()
        context = _context()
        self._arrays: dict[str, ts.TensorStore] = {}
        for leaf in self._leaves:
            dtype = dtypes[leaf.path]
            chunk = list(leaf.shape)
            if leaf.stacked:
                chunk[0] = 1
            chunk[leaf.row_axis + leaf.stacked] = block_rows(leaf, dtype.itemsize) // leaf.rows_per_index
            # Weights hardly compress: zstd would cost more time than the bytes it saves.
            zarr = {"shape": leaf.shape, "chunks": chunk, "compressor": None, "fill_value": None, "order": "C"}
            zarr["dtype"] = "bfloat16" if dtype.name == "bfloat16" else dtype.str
            name = leaf.path.replace("/", ".")
            kvstore = {"driver": "ocdbt", "base": _kvstore(self._params), "path": f"{name}/"}
            spec = {"driver": "zarr", "kvstore": kvstore, "metadata": zarr, "store_data_equal_to_fill_value": True}
            self._arrays[leaf.path] = ts.open(spec, create=True, context=context).result()

    def write(self, leaf: Leaf, layer: int, start: int, block: np.ndarray) -> None:
        """Write rows [start, start + n) of ``leaf``."""
        region = leaf.region(range(layer, layer + 1), range(start, start + len(block)))
        ours = np.ascontiguousarray(leaf.to_ours(block))
        ours = ours[None] if leaf.stacked else ours
        if array := self._sums.add(leaf.path, ours, _start(region), leaf.shape):
            self._written[f"{PARAMS}/{leaf.path}"] = array
        self._arrays[leaf.path][region].write(ours).result()

    def finish(self, config: ModelConfig, meta: Mapping[str, Any]) -> None:
        """Make it an Orbax checkpoint by writing the metadata of tree, item and checkpoint."""
        tree = {}
        for leaf in self._leaves:
            keys = leaf.path.split("/")
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape)}
            tree[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": value,
            }
        metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
        metadata |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        _write_json(self._params / "_METADATA", metadata)
        _write_json(self._params / "_CHECKPOINT_METADATA", _item(_STANDARD))
        root = self._params.parent
        (root / META).mkdir()
        content = {"model": dataclasses.asdict(config), **meta, "arrays": self._written}
        content["assets"] = layout.crc_of_files(root / ASSETS)
        _write_json(root / META / "metadata", layout.with_crc(content))
        _write_json(root / "_CHECKPOINT_METADATA", _item({"meta": _JSON, "params": _STANDARD}))
        for folder in (root, self._params, root / META):  # without it, Orbax reads nothing in a bucket
            (folder / ORBAX_MARK).write_text("converted")


def _item(handlers: str | dict[str, str]) -> dict[str, Any]:
    now = time.time_ns()
    times = {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
    return {"item_handlers": handlers, "metrics": {}, "performance_metrics": {}, **times, "custom_metadata": {}}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
