"""Stream weights from a source to a sink in blocks, and compare two sources, in bounded memory.

A block is a run of rows of one Hugging Face tensor in one layer, at most 32 MB (``ours.BLOCK_BYTES``), and a few are in
flight at a time. Where a training run stored larger chunks, a block has as many rows and layers as one chunk spans, so
training should save stacked arrays with ``SaveArgs(chunk_byte_size=…, shard_axes=(0,))``: one layer to a chunk.

Sources and sinks are ``hf.HFSource``, ``hf.HFSink``, ``ours.OursSource``, ``ours.OursSink``. All use the layout of
Hugging Face, rows first, so none of them knows another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np

from phivision_jax.convert.hf import HFSink, HFSource
from phivision_jax.convert.mapping import Leaf
from phivision_jax.convert.ours import BLOCK_BYTES, OursSink, OursSource, block_rows

WORKERS = 4


class FreshProjector:
    """A projector before training: LeCun-normal kernels (standard deviation 1/√inputs) and zero biases.

    It is a pure function of seed and leaf: float32 from NumPy's PCG64, rounded to ``dtype``.
    """

    def __init__(self, leaves: Sequence[Leaf], dtype: np.dtype, seed: int) -> None:
        self.leaves, self._dtype, self._seed = leaves, dtype, seed

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._dtype

    def grain(self, leaf: Leaf) -> tuple[int, int]:
        return 1, leaf.num_rows

    def read(self, leaf: Leaf, layers: range, rows: range) -> list[np.ndarray]:
        shape = (leaf.num_rows, *leaf.row_shape)
        if not leaf.row_axis:  # a bias
            return [np.zeros(shape, self._dtype)[rows.start : rows.stop]]
        rng = np.random.default_rng([self._seed, *leaf.path.encode()])
        kernel = rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(leaf.row_shape))
        return [kernel.astype(self._dtype)[rows.start : rows.stop]]


type Source = HFSource | OursSource | FreshProjector
"""Leaves, with the dtype of each (``dtype``), the fewest layers and rows to read together (``grain``), and ``read``."""
type Sink = HFSink | OursSink
"""A checkpoint that is written row by row, in any order; ``folder`` holds the files beside the weights."""


def blocks(leaf: Leaf, itemsize: int, *grains: tuple[int, int]) -> Iterator[tuple[range, range]]:
    """Split a leaf into blocks (layers, rows) that are multiples of the largest grain."""
    group, unit = map(max, zip(*grains, strict=True))
    step = max(unit, block_rows(leaf, itemsize) // group // unit * unit)
    for layer in range(0, len(leaf.names), group):
        layers = range(layer, min(layer + group, len(leaf.names)))
        for row in range(0, leaf.num_rows, step):
            yield layers, range(row, min(row + step, leaf.num_rows))


def copy(source: Source, sink: Sink, dtypes: Mapping[Leaf, np.dtype], advance: Callable[[int], Any]) -> None:
    """Copy every leaf, cast to its dtype; ``advance`` receives the bytes of each block once it is written."""

    def move(leaf: Leaf, layers: range, rows: range) -> int:
        for layer, block in zip(layers, source.read(leaf, layers, rows), strict=True):
            sink.write(leaf, layer, rows.start, block.astype(dtypes[leaf], copy=False))
        return len(layers) * len(rows) * math.prod(leaf.row_shape) * dtypes[leaf].itemsize

    with ThreadPoolExecutor(WORKERS) as pool:
        for written in in_parallel(pool, move, source.leaves, lambda leaf: (dtypes[leaf].itemsize, source.grain(leaf))):
            advance(written)


class Difference(NamedTuple):
    """The difference of a tensor between two checkpoints."""

    blocks: int = 0
    """The number of blocks with other bytes."""
    absolute: float = 0.0
    """The largest error; infinity for a NaN on one side."""
    relative: float = 0.0
    """The largest error as a share of the larger of the two values."""
    values: int = 0
    """The number of values that differ."""
    first: tuple[int, ...] = ()
    """The index of the first of them."""

    def __add__(self, other: Difference) -> Difference:  # type: ignore[override]
        first = min(filter(None, (self.first, other.first)), default=())
        absolute, relative = max(self.absolute, other.absolute), max(self.relative, other.relative)
        return Difference(self.blocks + other.blocks, absolute, relative, self.values + other.values, first)


def compare(a: Source, b: Source, advance: Callable[[int], Any]) -> dict[str, Difference]:
    """The difference of each Hugging Face tensor."""

    def errors(leaf: Leaf, layers: range, rows: range) -> tuple[int, dict[str, Difference]]:
        pairs = zip(layers, a.read(leaf, layers, rows), b.read(leaf, layers, rows), strict=True)
        found = {leaf.names[layer]: _difference(x, y, leaf.start + rows.start) for layer, x, y in pairs}
        return len(layers) * len(rows) * math.prod(leaf.row_shape) * a.dtype(leaf).itemsize, found

    merged = defaultdict[str, Difference](Difference)
    with ThreadPoolExecutor(WORKERS) as pool:
        for size, found in in_parallel(pool, errors, a.leaves, lambda leaf: (4, a.grain(leaf), b.grain(leaf))):
            for name, difference in found.items():
                merged[name] += difference
            advance(size)
    return merged


def _difference(x: np.ndarray, y: np.ndarray, start: int) -> Difference:
    """``start`` is the index of the first of these rows."""
    bits = f"u{x.dtype.itemsize}"
    if x.dtype == y.dtype and np.array_equal(x.view(bits), y.view(bits)):
        return Difference()
    x, y = x.astype(np.float32), y.astype(np.float32)
    differ = ~((x == y) | (np.isnan(x) & np.isnan(y)))  # infinities and NaNs that agree do not
    if not differ.any():
        return Difference(blocks=1)
    with np.errstate(all="ignore"):
        error = np.abs(x - y)[differ]
        relative = error / np.maximum(np.abs(x), np.abs(y))[differ]
    first = np.unravel_index(differ.argmax(), differ.shape)
    most, share = (float(np.nan_to_num(e, nan=math.inf, posinf=math.inf).max()) for e in (error, relative))
    return Difference(1, most, share, int(differ.sum()), (start + int(first[0]), *map(int, first[1:])))


def in_parallel[R](
    pool: ThreadPoolExecutor,
    work: Callable[[Leaf, range, range], R],
    leaves: Sequence[Leaf],
    sizes: Callable[[Leaf], tuple[Any, ...]],
) -> Iterator[R]:
    """Run ``work`` on every block of every leaf, a few at a time and none queued; the first error ends it.

    Stored chunks that are larger than a block are processed one at a time, which bounds the memory in flight.

    Args:
      pool: of ``WORKERS`` threads. New ones for each call would each keep memory that they have freed.
      sizes: for a leaf, the bytes of an element and the grains that blocks must respect.
    """
    running: dict[Future[R], int] = {}
    todo = ((leaf, *block) for leaf in leaves for block in blocks(leaf, *sizes(leaf)))
    for leaf, layers, rows in todo:
        size = len(layers) * len(rows) * math.prod(leaf.row_shape) * sizes(leaf)[0]
        while running and (len(running) >= WORKERS or sum(running.values()) + size > WORKERS * BLOCK_BYTES):
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                yield future.result()
        running[pool.submit(work, leaf, layers, rows)] = size
    for future in wait(running).done:
        yield future.result()
