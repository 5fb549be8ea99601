"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685): made beside kernels, and folded into them again.

    decoder/layers/mlp/up_proj/   kernel [L, D, F]        frozen
                                  lora_a [L, D, rank]     drawn;  x · kernel + alpha / rank · (x · A) · B
                                  lora_b [L, rank, F]     zero at first

A tree of parameters that holds adapters says so by their names alone: what trains (``training/optim.py``) and what an
export has to merge (``convert/adapters.py``) follow from that. ``alpha`` is not in the tree: it is metadata.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phivision_jax.config import LoraConfig
from phivision_jax.models.layers import Linear

A, B = "lora_a", "lora_b"


def is_adapter(path: tuple) -> bool:
    """Whether this path of a parameter is that of an adapter's."""
    return path[-1] in (A, B)


def add(model: nnx.Module, cfg: LoraConfig, rngs: nnx.Rngs) -> None:
    """Attach an adapter to every ``Linear`` of ``model`` whose path ``cfg.targets`` matches anywhere.

    Args:
      rngs: draws A; with the same linear layers matched, the same numbers on any mesh.

    Raises:
      ValueError: for a rank below 1, a pattern that is no regular expression, or that matches no linear layer.
    """
    if cfg.rank < 1:
        raise ValueError(f"lora.rank is {cfg.rank}; an adapter's is at least 1, and 0 in a configuration means none")
    linears = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Linear)}
    try:
        matched = [name for name in linears if re.search(cfg.targets, name)]
    except re.error as error:
        raise ValueError(f"lora.targets: {cfg.targets!r} is not a regular expression: {error}") from None
    if not matched:
        near = ", ".join(difflib.get_close_matches(cfg.targets, linears, n=1, cutoff=0.0))
        raise ValueError(f"lora.targets: {cfg.targets!r} matches no linear layer (they look like {near!r})")
    for name in sorted(matched):
        linears[name].adapt(cfg.rank, cfg.alpha, rngs)


def without(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree less its adapters, nothing merged: what a checkpoint without any has to give."""
    flat = nnx.traversals.flatten_mapping(params)
    return nnx.traversals.unflatten_mapping({path: leaf for path, leaf in flat.items() if not is_adapter(path)})


def merge(params: Mapping[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    """The tree without adapters that answers as the one with them: kernels are W + alpha / rank · A · B.

    Args:
      params: nested dict of arrays, or any part of one; left as it is.
      cfg: that of the training; its rank and alpha are used.

    Returns:
      Kernels in the dtype they had; sums and products are in fp32.

    Raises:
      ValueError: when an adapter has another rank than ``cfg``.
    """
    flat = nnx.traversals.flatten_mapping(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path, a in flat.items():
        if path[-1] == A:
            if a.shape[-1] != cfg.rank:
                name = "/".join(map(str, path))
                raise ValueError(f"{name} is of rank {a.shape[-1]}, lora.rank is {cfg.rank}; give the run's own lora")
            kernel = (*path[:-1], "kernel")
            merged[kernel] = _merge_kernel(flat[kernel], a, flat[*path[:-1], B], cfg.alpha / cfg.rank)
    return nnx.traversals.unflatten_mapping(merged)


def _merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel [(L,) in…, out…], a [(L,) in…, rank], b [(L,) rank, out…]."""
    if a.ndim + b.ndim - 2 > kernel.ndim:  # a layer axis: one layer at a time, as A · B is as large as the kernel
        return jax.lax.map(lambda layer: _merge_kernel(layer[0], layer[1], layer[2], scale), (kernel, a, b))
    # The default precision of a product on TPUs is bf16's.
    product = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
