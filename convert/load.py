"""A Hugging Face directory straight into sharded jax arrays, without a checkpoint in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.hf import HFDirectory, HFSource
from convert.mapping import Leaf, Tree, build_tree, flatten, model_leaves
from phivision_jax.config import ModelConfig


def load_hf_params(
    directory: str | Path,
    config: ModelConfig,
    shardings: Mapping[str, Any] | None = None,
    dtype: Any = None,
    *,
    vision_tail: bool = False,
) -> Tree:
    """The parameters {vision, projector, decoder} of a released-layout directory, leaf by leaf.

    The host holds one device's share of one leaf at a time, besides what its own devices hold.

    Args:
      directory: holds config.json and safetensors.
      config: what the tensors must fit.
      shardings: a nested dict of ``jax.sharding.Sharding`` as the parameters are nested; default: the default device.
      dtype: what to cast to, layer by layer; default: as stored.
      vision_tail: also the block, norm and head that never run (they belong to checkpoints).

    Raises:
      ValueError: when the directory does not hold exactly this model, naming the tensors.
    """
    source = HFSource(HFDirectory(Path(directory)), model_leaves(config))
    by_path = dict(flatten(shardings or {}))
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def make(leaf: Leaf) -> jax.Array:
        target = np.dtype(dtype or source.dtype(leaf))

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # jax's type; it passes slices to any sharding but a scalar's
            return read_region(source, leaf, index, target)

        return jax.make_array_from_callback(leaf.shape, by_path.get(leaf.path, default), read)

    try:
        return build_tree(make, config, vision_tail)
    finally:
        source.close()


def read_region(source: HFSource, leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """``leaf[index]``, reading only the rows of theirs that it touches and casting layer by layer."""
    spans = [range(size)[cut] for size, cut in zip(leaf.shape, index, strict=True)]
    layers = spans.pop(0) if leaf.stacked else range(1)
    axis, per = leaf.row_axis, leaf.rows_per_index
    rows = range(spans[axis].start * per, spans[axis].stop * per)
    rest = tuple(slice(None) if i == axis else slice(s.start, s.stop) for i, s in enumerate(spans))
    out = np.empty((len(layers), *(len(span) for span in spans)), dtype)
    for i, layer in enumerate(layers):
        (block,) = source.read(leaf, range(layer, layer + 1), rows)
        out[i] = leaf.to_ours(block)[rest]
    return out if leaf.stacked else out[0]
