"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685): added beside kernels, and merged into them.

    decoder/layers/mlp/up_proj/   kernel [L, D, F]        frozen
                                  lora_a [L, D, rank]     random;  x · kernel + alpha / rank · (x · A) · B
                                  lora_b [L, rank, F]     initially zero

Adapters are recognised by these parameter names alone: they decide what trains (``training/optim.py``) and what an
export merges (``convert/ours.py``). ``alpha`` is not in the tree: it is metadata.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from phivision_jax.config import LoraConfig, matching
from phivision_jax.models.layers import Linear

A, B = "lora_a", "lora_b"


def is_adapter(path: tuple) -> bool:
    """True for the path of an adapter's parameter."""
    return path[-1] in (A, B)


def add(model: nnx.Module, cfg: LoraConfig, rngs: nnx.Rngs) -> None:
    """Attach an adapter to every ``Linear`` of ``model`` whose path ``cfg.targets`` matches anywhere.

    Args:
      rngs: for A, whose values depend on the matched layers but not on the mesh.

    Raises:
      ValueError: for a rank below 1; for a pattern that is not a regular expression or matches no linear layer.
    """
    if cfg.rank < 1:
        raise ValueError(f"lora.rank is {cfg.rank}; give at least 1, or 0 for no adapters")
    linears = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Linear)}
    for name in sorted(matching("lora.targets", cfg.targets, list(linears), "linear layer")):
        linears[name].adapt(cfg.rank, cfg.alpha, rngs)


def without(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without its adapters, unmerged: the parameters that a base checkpoint has to provide."""
    flat = nnx.traversals.flatten_mapping(params)
    return nnx.traversals.unflatten_mapping({path: leaf for path, leaf in flat.items() if not is_adapter(path)})


def merge(params: Mapping[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    """The equivalent tree without adapters: kernels become W + alpha / rank · A · B.

    Args:
      params: nested dict of arrays, or any part of one; not modified.
      cfg: the rank and alpha of the training run.

    Returns:
      Kernels in their own dtype; sums and products are fp32.

    Raises:
      ValueError: when an adapter's rank is not that of ``cfg``.
    """
    flat = nnx.traversals.flatten_mapping(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path, a in flat.items():
        if path[-1] == A:
            if a.shape[-1] != cfg.rank:
                name = "/".join(map(str, path))
                raise ValueError(f"{name} has rank {a.shape[-1]}, lora.rank is {cfg.rank}; give the training run's")
            layer = path[:-1]
            merged[*layer, "kernel"] = _merge_kernel(flat[*layer, "kernel"], a, flat[*layer, B], cfg.alpha / cfg.rank)
    return nnx.traversals.unflatten_mapping(merged)


def _merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel [(L,) in…, out…], a [(L,) in…, rank], b [(L,) rank, out…]."""
    if a.ndim + b.ndim - 2 > kernel.ndim:  # stacked: one layer at a time, as A · B is as large as the kernel
        return jax.lax.map(lambda layer: _merge_kernel(layer[0], layer[1], layer[2], scale), (kernel, a, b))
    # Products on TPUs are bf16 by default.
    product = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
