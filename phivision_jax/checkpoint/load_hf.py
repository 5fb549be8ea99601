"""Load a Hugging Face directory directly into sharded JAX arrays, without a checkpoint of ours in between.

Blocks of rows are read several at a time: in a bucket, each is a request that mostly waits.
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
    """The parameters {vision, projector, decoder} of a released-layout directory.

    Besides the arrays on its own devices, the host holds one device's shard of one leaf and a few blocks at a time.

    Args:
      directory: holds config.json and safetensors; may be a URL.
      config: the model that the tensors must fit.
      shardings: nested dict of ``jax.sharding.Sharding``, like the parameters; default: the first local device.
      dtype: dtype of the arrays; default: as stored.
      vision_tail: also load the block, norm and head that never run (they belong to checkpoints).

    Raises:
      ValueError: when the directory does not hold exactly this model, naming the tensors.
    """
    source = HFSource(HFDirectory(location(directory)), model_leaves(config))
    by_path = dict(flatten(shardings or {}))
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def make(leaf: Leaf) -> jax.Array:
        target = np.dtype(dtype or source.dtype(leaf))

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # only a scalar's sharding passes None
            return _read_region(source, leaf, index, target, pool)

        return jax.make_array_from_callback(leaf.shape, by_path.get(leaf.path, default), read)

    with ThreadPoolExecutor(WORKERS) as pool:
        return build_tree(make, config, vision_tail)


def _read_region(
    source: HFSource, leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype, pool: ThreadPoolExecutor
) -> np.ndarray:
    """``leaf[index]``: reads only the rows of Hugging Face tensors in it, and casts block by block."""
    spans = [range(size)[span] for size, span in zip(leaf.shape, index, strict=True)]
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
