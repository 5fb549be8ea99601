"""Moving weights from a source to a sink in blocks, and comparing two sources: memory does not grow with the model.

A block is a run of rows of one Hugging Face tensor in one layer, at most 32 MB (`ours.BLOCK_BYTES`), and a few are in
flight at a time. Where a training run stored larger chunks a block is as many rows and layers as one chunk spans, so
training should save stacked arrays with ``SaveArgs(chunk_byte_size=…, shard_axes=(0,))``: one layer to a chunk.

Sources and sinks are `hf.HFSource`, `hf.HFSink`, `ours.OursSource`, `ours.OursSink`. All speak Hugging Face's layout,
rows first, so none knows another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from phivision_jax.convert.mapping import Leaf
from phivision_jax.convert.ours import BLOCK_BYTES, block_rows

WORKERS = 4


class Source(Protocol):
    def dtype(self, leaf: Leaf) -> np.dtype: ...

    def grain(self, leaf: Leaf) -> tuple[int, int]:
        """Layers and rows that are best read together."""

    def read(self, leaf: Leaf, layers: range, rows: range) -> list[np.ndarray]:
        """Their rows [rows, …], one array per layer."""

    def close(self) -> None: ...


class Sink(Protocol):
    def write(self, leaf: Leaf, layer: int, start: int, block: np.ndarray) -> None: ...


class FreshProjector:
    """A projector that was never trained: LeCun-normal kernels (standard deviation 1/√inputs), biases of zero.

    A pure function of (seed, leaf), in float32 drawn by NumPy's PCG64 and rounded to ``dtype``.
    """

    def __init__(self, dtype: np.dtype, seed: int) -> None:
        self._dtype, self._seed = dtype, seed

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._dtype

    def grain(self, leaf: Leaf) -> tuple[int, int]:
        return 1, leaf.num_rows

    def read(self, leaf: Leaf, layers: range, rows: range) -> list[np.ndarray]:
        shape = (leaf.num_rows, *leaf.row_shape)
        if not leaf.is_linear:
            return [np.zeros(shape, self._dtype)[rows.start : rows.stop]]
        rng = np.random.default_rng([self._seed, *leaf.path.encode()])
        kernel = rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(leaf.row_shape))
        return [kernel.astype(self._dtype)[rows.start : rows.stop]]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Parts:
    """One source out of several, by the first word of a leaf's path (``vision_tail`` goes with ``vision``)."""

    by_module: Mapping[str, Source]

    def _of(self, leaf: Leaf) -> Source:
        return self.by_module[leaf.path.split("/")[0].removesuffix("_tail")]

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._of(leaf).dtype(leaf)

    def grain(self, leaf: Leaf) -> tuple[int, int]:
        return self._of(leaf).grain(leaf)

    def read(self, leaf: Leaf, layers: range, rows: range) -> list[np.ndarray]:
        return self._of(leaf).read(leaf, layers, rows)

    def close(self) -> None:
        for source in self.by_module.values():
            source.close()


def blocks(leaf: Leaf, itemsize: int, *grains: tuple[int, int]) -> Iterator[tuple[range, range]]:
    """Cut a leaf into (layers, rows), in steps that hold whole multiples of the largest grain."""
    group = max(layers for layers, _ in grains)
    unit = max(rows for _, rows in grains)
    step = max(unit, block_rows(leaf, itemsize) // group // unit * unit)
    for layer in range(0, len(leaf.names), group):
        layers = range(layer, min(layer + group, len(leaf.names)))
        for row in range(0, leaf.num_rows, step):
            yield layers, range(row, min(row + step, leaf.num_rows))


def copy(
    source: Source, sink: Sink, leaves: Iterable[Leaf], dtypes: Mapping[str, np.dtype], advance: Callable[[int], Any]
) -> None:
    """Every leaf of ``source`` into ``sink`` as ``dtypes[path]``; ``advance`` is told the bytes as they are written."""

    def move(leaf: Leaf, layers: range, rows: range) -> int:
        written = 0
        for layer, block in zip(layers, source.read(leaf, layers, rows), strict=True):
            cast = block.astype(dtypes[leaf.path], copy=False)
            sink.write(leaf, layer, rows.start, cast)
            written += cast.nbytes
        return written

    for written in _in_parallel(move, leaves, lambda leaf: (dtypes[leaf.path].itemsize, source.grain(leaf))):
        advance(written)


@dataclass
class Difference:
    """What is known of one Hugging Face tensor in two checkpoints."""

    same_bytes: bool = True
    same_values: bool = True
    max_error: float = 0.0

    def add(self, other: Difference) -> None:
        self.same_bytes &= other.same_bytes
        self.same_values &= other.same_values
        self.max_error = max(self.max_error, other.max_error)


def compare(a: Source, b: Source, leaves: Iterable[Leaf], advance: Callable[[int], Any]) -> dict[str, Difference]:
    """Tensor by tensor, the bytes themselves (no hash says more); where they differ, the largest absolute error."""

    def difference(leaf: Leaf, layers: range, rows: range) -> tuple[int, dict[str, Difference]]:
        pairs = zip(layers, a.read(leaf, layers, rows), b.read(leaf, layers, rows), strict=True)
        found = {leaf.names[layer]: _difference(x, y) for layer, x, y in pairs}
        return len(layers) * len(rows) * math.prod(leaf.row_shape) * a.dtype(leaf).itemsize, found

    table: dict[str, Difference] = {}
    for size, found in _in_parallel(difference, leaves, lambda leaf: (4, a.grain(leaf), b.grain(leaf))):
        for name, one in found.items():
            table.setdefault(name, Difference()).add(one)
        advance(size)
    return table


def _difference(x: np.ndarray, y: np.ndarray) -> Difference:
    if x.dtype == y.dtype:
        bits = np.dtype(f"u{x.dtype.itemsize}")
        if np.array_equal(x.view(bits), y.view(bits)):
            return Difference()
    x, y = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(invalid="ignore"):
        error = np.abs(x - y)
    error[(x == y) | (np.isnan(x) & np.isnan(y))] = 0  # infinities and NaNs that agree
    # NaN on one side only is as wrong as can be.
    max_error = math.inf if np.isnan(error).any() else float(error.max())
    return Difference(False, max_error == 0, max_error)


def _in_parallel[R](
    work: Callable[[Leaf, range, range], R], leaves: Iterable[Leaf], cut: Callable[[Leaf], tuple[Any, ...]]
) -> Iterator[R]:
    """``work`` over every block of every leaf, a few in flight and none queued; the first error ends it.

    Stored chunks larger than a block come one at a time, so that what is in flight does not grow with them.
    """
    todo = ((leaf, *block, cut(leaf)[0]) for leaf in leaves for block in blocks(leaf, *cut(leaf)))
    running: dict[Future[R], int] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for leaf, layers, rows, itemsize in todo:
            size = len(layers) * len(rows) * math.prod(leaf.row_shape) * itemsize
            while running and (len(running) >= WORKERS or sum(running.values()) + size > WORKERS * BLOCK_BYTES):
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    yield future.result()
            running[pool.submit(work, leaf, layers, rows)] = size
        for future in wait(running).done:
            yield future.result()
