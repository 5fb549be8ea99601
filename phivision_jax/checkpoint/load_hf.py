"""A Hugging Face directory straight into sharded jax arrays, without a checkpoint in between.

Read a block of rows at a time, several at once: from a bucket each block is a request that mostly waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from phivision_jax.config import ModelConfig
from phivision_jax.convert.hf import HFDirectory, HFSource
from phivision_jax.convert.mapping import Leaf, Tree, build_tree, flatten, model_leaves
from phivision_jax.convert.ours import block_rows
from phivision_jax.convert.stream import WORKERS
from phivision_jax.io.storage import Location, location


def load_hf_params(
    directory: str | Location,
    config: ModelConfig,
    shardings: Mapping[str, Any] | None = None,
    dtype: Any = None,
    *,
    vision_tail: bool = False,
) -> Tree:
    """The parameters {vision, projector, decoder} of a released-layout directory, leaf by leaf.

    The host holds one device's share of one leaf and a few blocks at a time, besides what its own devices hold.

    Args:
      directory: holds config.json and safetensors; may be a URL.
      config: what the tensors must fit.
      shardings: a nested dict of ``jax.sharding.Sharding`` as the parameters are nested; default: the default device.
      dtype: what to cast to, layer by layer; default: as stored.
      vision_tail: also the block, norm and head that never run (they belong to checkpoints).

    Raises:
      ValueError: when the directory does not hold exactly this model, naming the tensors.
    """
    source = HFSource(HFDirectory(location(directory)), model_leaves(config))
    by_path = dict(flatten(shardings or {}))
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    pool = ThreadPoolExecutor(WORKERS)

    def make(leaf: Leaf) -> jax.Array:
        target = np.dtype(dtype or source.dtype(leaf))

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # jax's type; it passes slices to any sharding but a scalar's
            return read_region(source, leaf, index, target, pool)

        return jax.make_array_from_callback(leaf.shape, by_path.get(leaf.path, default), read)

    try:
        return build_tree(make, config, vision_tail)
    finally:
        pool.shutdown(cancel_futures=True)
        source.close()


def read_region(
    source: HFSource, leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype, pool: ThreadPoolExecutor
) -> np.ndarray:
    """``leaf[index]``, reading only the rows of theirs that it touches and casting block by block."""
    spans = [range(size)[cut] for size, cut in zip(leaf.shape, index, strict=True)]
    layers = spans.pop(0) if leaf.stacked else range(1)
    axis, per = leaf.row_axis, leaf.rows_per_index
    rows = range(spans[axis].start * per, spans[axis].stop * per)
    rest = tuple(slice(None) if i == axis else slice(s.start, s.stop) for i, s in enumerate(spans))
    out = np.empty((len(layers), *(len(span) for span in spans)), dtype)

    def fill(i: int, start: int) -> None:
        piece = range(start, min(start + step, rows.stop))
        (block,) = source.read(leaf, range(layers[i], layers[i] + 1), piece)
        place = slice((piece.start - rows.start) // per, (piece.stop - rows.start) // per)
        out[i][(slice(None),) * axis + (place,)] = leaf.to_ours(block)[rest]

    step = block_rows(leaf, source.dtype(leaf).itemsize)
    pieces = [(i, start) for i in range(len(layers)) for start in rows[::step]]
    for _ in pool.map(lambda piece: fill(*piece), pieces):
        pass
    return out if leaf.stacked else out[0]
