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

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from phivision_jax.checkpoint import layout
from phivision_jax.checkpoint.checksums import StreamedChecksums, difference
from phivision_jax.checkpoint.layout import ASSETS, META, ORBAX_MARK, PARAMS, Array, DamagedError
from phivision_jax.config import typed
from phivision_jax.convert.mapping import Leaf, Shape, check
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


def _zarr(base: Mapping[str, Any], path: str) -> dict[str, Any]:
    """TensorStore's specification of the array with this path below a directory or an OCDBT store."""
    return {"driver": "zarr", "kvstore": {**base, "path": f"{base.get('path', '')}{path.replace('/', '.')}/"}}


# ---------------------------------------------------------------------------------------------------------------------
# Adapters (LoRA) in a checkpoint of a run are merged into their kernels block by block:
#
#     at (layer, rows):   kernel [L, in…, out…]  +  alpha / rank · lora_a [L, in…, rank] · lora_b [L, rank, out…]
#
# The arrays of an adapter are small but A · B is as large as the kernel, so it is computed for one run of rows at a
# time. Sums and products are in fp32, as in training, in whatever dtype the kernel is stored.

_A, _B = "lora_a", "lora_b"  # as in models/lora.py, which imports JAX


class Adapters(NamedTuple):
    """The adapters of a checkpoint; ``kernels`` is empty if it has none."""

    rank: int
    alpha: float
    kernels: frozenset[str]
    """Paths of the leaves that have an adapter."""

    @classmethod
    def find(cls, checkpoint: Location, meta: Mapping[str, Any], paths: Iterable[str]) -> Adapters:
        """The adapters among the arrays of a checkpoint.

        Raises:
          ValueError: when there are some, and the metadata does not state their rank and alpha.
        """
        named = [path.rpartition("/") for path in paths]
        kernels = frozenset(f"{module}/kernel" for module, _, name in named if name in (_A, _B))
        where = f"{checkpoint / layout.METADATA}: run.lora"
        lora = typed((meta.get("run") or {}).get("lora") or {}, Mapping[str, Any], where)
        rank, alpha = typed(lora.get("rank", 0), int, where), typed(lora.get("alpha", 0.0), float, where)
        if kernels and (rank < 1 or "alpha" not in lora):
            problem = f"{min(kernels)} has an adapter, but meta/metadata lacks the run's lora (rank, alpha)"
            raise ValueError(f"{checkpoint}: {problem}")
        return cls(rank, alpha, kernels)

    def __str__(self) -> str:
        return f"adapters of rank {self.rank}, alpha {self.alpha:g}, on {len(self.kernels)} kernels"

    def shapes(self, leaf: Leaf) -> dict[str, Shape]:
        """Paths and shapes of the arrays of this leaf's adapter; empty if it has none."""
        if leaf.path not in self.kernels or not leaf.row_axis:
            return {}
        layers, inputs = leaf.shape[: leaf.stacked], leaf.layer_shape[: leaf.row_axis]
        a, b = adapter_paths(leaf.path)
        return {a: (*layers, *inputs, self.rank), b: (*layers, self.rank, *leaf.layer_shape[leaf.row_axis :])}


def adapter_paths(kernel: str) -> tuple[str, str]:
    """The paths of the arrays A and B of a kernel's adapter."""
    module = kernel.removesuffix("/kernel")
    return f"{module}/{_A}", f"{module}/{_B}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing.


class OursSource:
    """The leaves of a table, read from a checkpoint of ours, with adapters merged into their kernels.

    Args:
      directory: the checkpoint.
      meta: its metadata.
      leaves: the table.
      exact: refuse arrays that are not in the table; otherwise they are ignored.

    Raises:
      ValueError: when its arrays are not those of the table and its adapters, in name and shape.
      DamagedError: when an array cannot be opened, or an adapter is not what was saved.
    """

    kind = "phivision_jax"

    def __init__(
        self, directory: Location, meta: Mapping[str, Any], leaves: Sequence[Leaf], *, exact: bool = True
    ) -> None:
        self.leaves, self.meta, self._directory, self._params = leaves, meta, directory, directory / PARAMS
        self._saved, self._sums = layout.arrays_of(meta), StreamedChecksums()
        self.adapters = Adapters.find(directory, meta, self._saved)
        expected = {leaf.path: leaf.shape for leaf in leaves}
        adapters = {path: shape for leaf in leaves for path, shape in self.adapters.shapes(leaf).items()}
        if not exact:
            self._saved = {path: array for path, array in self._saved.items() if path in expected | adapters}
        check({path: array.shape for path, array in self._saved.items()}, expected | adapters, str(self._params))
        base = _kvstore(self._params)
        ocdbt = {"driver": "ocdbt", "base": base} if (self._params / "manifest.ocdbt").exists() else base
        context = _context()
        self._arrays = {path: self._open(path, ocdbt, context) for path in self._saved}
        for path in adapters:  # they are small and read several times, so they are verified now
            self._verify(path, (), self._read(path, ()))

    def _open(self, path: str, base: Mapping[str, Any], context: ts.Context) -> ts.TensorStore:
        try:
            array = ts.open(_zarr(base, path), open=True, context=context).result()
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
        found = self._sums.add(path, block, region, saved.shape)
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
        pairs = zip(layers, block if leaf.stacked else [block], strict=True)
        return [leaf.to_theirs(self._merge_adapter(kernel, leaf, layer, rows)) for layer, kernel in pairs]

    def _merge_adapter(self, kernel: np.ndarray, leaf: Leaf, layer: int, rows: range) -> np.ndarray:
        """Add the adapter of ``leaf``, if there is one, to rows of its kernel, [in…, part of out…]."""
        if leaf.path not in self.adapters.kernels:
            return kernel
        a, b = self.adapter(leaf, layer, rows)
        merged = (b @ a).T.reshape(kernel.shape)
        merged *= np.float32(self.adapters.alpha / self.adapters.rank)
        merged += kernel
        return merged.astype(kernel.dtype, copy=False)

    def adapter(self, leaf: Leaf, layer: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """A [rank, in] and B [n, rank] of these rows of a kernel, in fp32."""
        (path_a, path_b), rank = adapter_paths(leaf.path), self.adapters.rank
        at_layer = (layer,) if leaf.stacked else ()
        at_rows = slice(rows.start // leaf.rows_per_index, rows.stop // leaf.rows_per_index)
        a = self._read(path_a, at_layer).reshape(-1, rank).astype(np.float32)
        b = self._read(path_b, (*at_layer, slice(None), at_rows)).reshape(rank, -1).astype(np.float32)
        return a.T, b.T

    def _read(self, path: str, region: tuple[int | slice, ...]) -> np.ndarray:
        try:
            return self._arrays[path][region].read().result()
        except ValueError as error:
            raise self._unreadable(path, error) from None


def block_rows(leaf: Leaf, itemsize: int) -> int:
    """The number of rows in a chunk, at most ``BLOCK_BYTES``; chunks of equal size where the axis allows it."""
    length = leaf.layer_shape[leaf.row_axis]
    row_bytes = math.prod(leaf.layer_shape) // length * itemsize
    most = max(1, BLOCK_BYTES // row_bytes)
    even = next((n for n in range(min(most, length), most // 2, -1) if length % n == 0), min(most, length))
    return even * leaf.rows_per_index


class OursSink:
    """A new checkpoint of ours; rows are written in any order.

    Args:
      dtypes: the leaves of its table, and the dtype to store each in.
      meta: its metadata without ``arrays`` and ``assets``.
    """

    folder = ASSETS

    def __init__(self, dtypes: Mapping[Leaf, np.dtype], meta: Mapping[str, Any], directory: Path) -> None:
        self._params, self._meta = directory / PARAMS, meta
        self._sums, self._written = StreamedChecksums(), dict[str, Array]()
        self._params.mkdir()
        self._arrays: dict[Leaf, ts.TensorStore] = {}
        ocdbt, context = {"driver": "ocdbt", "base": _kvstore(self._params)}, _context()
        for leaf, dtype in dtypes.items():
            chunk = [1, *leaf.layer_shape] if leaf.stacked else [*leaf.shape]
            chunk[leaf.row_axis + leaf.stacked] = block_rows(leaf, dtype.itemsize) // leaf.rows_per_index
            # Weights hardly compress: zstd would cost more time than the bytes it saves.
            zarr = {"shape": leaf.shape, "chunks": chunk, "compressor": None, "fill_value": None, "order": "C"}
            zarr["dtype"] = "bfloat16" if dtype.name == "bfloat16" else dtype.str
            spec = {**_zarr(ocdbt, leaf.path), "metadata": zarr, "store_data_equal_to_fill_value": True}
            self._arrays[leaf] = ts.open(spec, create=True, context=context).result()

    def write(self, leaf: Leaf, layer: int, start: int, block: np.ndarray) -> None:
        """Write rows [start, start + n) of ``leaf``."""
        region = leaf.region(range(layer, layer + 1), range(start, start + len(block)))
        ours = np.ascontiguousarray(leaf.to_ours(block))
        ours = ours[None] if leaf.stacked else ours
        if array := self._sums.add(leaf.path, ours, region, leaf.shape):
            self._written[f"{PARAMS}/{leaf.path}"] = array
        self._arrays[leaf][region].write(ours).result()

    def finish(self) -> None:
        """Make it an Orbax checkpoint by writing the metadata of tree, item and checkpoint."""
        tree = {}
        for leaf in self._arrays:
            keys = leaf.path.split("/")
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape)}
            path = [{"key": key, "key_type": 2} for key in keys]
            tree[str(tuple(keys))] = {"key_metadata": path, "value_metadata": value}
        metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
        metadata |= {"store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        root = self._params.parent
        (root / META).mkdir()
        content = {**self._meta, "arrays": self._written, "assets": layout.crc_of_files(root / ASSETS)}
        _write_json(self._params / "_METADATA", metadata)
        _write_json(self._params / "_CHECKPOINT_METADATA", _item(_STANDARD))
        _write_json(root / layout.METADATA, layout.with_crc(content))
        _write_json(root / "_CHECKPOINT_METADATA", _item({"meta": _JSON, "params": _STANDARD}))
        for folder in (root, self._params, root / META):  # without it, Orbax reads nothing in a bucket
            (folder / ORBAX_MARK).write_text("converted")


def _item(handlers: str | dict[str, str]) -> dict[str, Any]:
    now = time.time_ns()
    times = {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now}
    return {"item_handlers": handlers, "metrics": {}, "performance_metrics": {}, **times, "custom_metadata": {}}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
