"""Parameter trees of small models, in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from phivision_jax.config import ModelConfig
from phivision_jax.convert.mapping import Leaf, check, model_leaves

type Tree = dict[str, Any]


def abstract_params(config: ModelConfig, dtype: Any = np.float32, *, vision_tail: bool = True) -> Tree:
    """The parameter tree of a checkpoint as ``jax.ShapeDtypeStruct``."""
    return build_tree(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), config, vision_tail)


def tree_from_hf(get_tensor: Callable[[str], np.ndarray], config: ModelConfig, *, vision_tail: bool = False) -> Tree:
    """The parameter tree in NumPy, from Hugging Face tensors by name."""

    def make(leaf: Leaf) -> np.ndarray:
        layers = [leaf.to_ours(get_tensor(name)[leaf.start : leaf.start + leaf.num_rows]) for name in leaf.names]
        return np.stack(layers) if leaf.stacked else np.ascontiguousarray(layers[0])

    return build_tree(make, config, vision_tail)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and leaves of a nested dict: ``("decoder/norm/scale", array)`` …"""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def build_tree(make: Callable[[Leaf], Any], config: ModelConfig, vision_tail: bool) -> Tree:
    """The parameter tree with ``make(leaf)`` as leaves.

    Args:
      vision_tail: include the part of the encoder that never runs.
    """
    tree: Tree = {}
    for leaf in model_leaves(config):
        *parents, last = leaf.path.split("/")
        if vision_tail or parents[0] != "vision_tail":
            functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = make(leaf)
    return tree


def hf_tensors(params: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the Hugging Face tensors, in table order, of a parameter tree (or of its gradients).

    The tensors of ``vision_tail`` are left out if the tree has none.

    Raises:
      ValueError: when the tree has other leaves or shapes than the table.
    """
    flat = dict(flatten(params))
    leaves = [leaf for leaf in model_leaves(config) if "vision_tail" in params or "vision_tail" not in leaf.path]
    check(
        {path: tuple(array.shape) for path, array in flat.items()},
        {leaf.path: leaf.shape for leaf in leaves},
        "hf_tensors",
    )
    rows: dict[str, list[np.ndarray]] = {}
    for leaf in leaves:
        layers = flat[leaf.path] if leaf.stacked else [flat[leaf.path]]
        for name, layer in zip(leaf.names, layers, strict=True):
            rows.setdefault(name, []).append(leaf.to_theirs(np.asarray(layer)))
    return ((name, np.concatenate(parts)) for name, parts in rows.items())
