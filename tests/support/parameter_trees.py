"""Parameter trees of small models, in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from phivision_jax.config import ModelConfig
from phivision_jax.convert.mapping import Leaf, Tree, build_tree


def abstract_params(config: ModelConfig, dtype: Any = np.float32, *, vision_tail: bool = True) -> Tree:
    """The parameter tree of a checkpoint as ``jax.ShapeDtypeStruct``."""
    return build_tree(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), config, vision_tail)


def tree_from_hf(get_tensor: Callable[[str], np.ndarray], config: ModelConfig, *, vision_tail: bool = False) -> Tree:
    """The parameter tree in NumPy, from Hugging Face tensors by name."""

    def make(leaf: Leaf) -> np.ndarray:
        layers = [leaf.to_ours(get_tensor(name)[leaf.start : leaf.start + leaf.num_rows]) for name in leaf.names]
        return np.stack(layers) if leaf.stacked else np.ascontiguousarray(layers[0])

    return build_tree(make, config, vision_tail)
