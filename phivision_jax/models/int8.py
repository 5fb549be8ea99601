"""Matrices in int8 with one scale per output channel, for inference: half the memory of bf16, a quarter of fp32's.

    decoder/layers/mlp/up_proj/   kernel [L, D, F]  int8, from −127 to 127       x · W  ≈  (x · kernel) * scale
                                  scale  [L, F]     max |W| / 127 over D

Products are computed in the dtype of the activations: only the matrices in memory are narrow, and the compiler converts
them as it multiplies. Norms, biases and the position table stay as they are. Scales are rounded to bf16 before they
divide, so parameters in bf16 hold the same scales as parameters in fp32.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from phivision_jax.models.layers import Linear
from phivision_jax.models.phi4 import Embed, Head

SCALE = "scale"
"""Name of the parameter beside ``kernel`` or ``embedding``."""


def quantise(weights: Any, axes: tuple[int, ...], xp: Any = jnp) -> tuple[Any, Any]:
    """Weights in int8, and their scales in fp32.

    Args:
      axes: those that a product sums over; the scales have the others.
      xp: the library of ``weights``: ``jax.numpy`` or ``numpy``.
    """
    weights = weights.astype(xp.float32)
    scale = (xp.abs(weights).max(axes, keepdims=True) / 127).astype(jnp.bfloat16).astype(xp.float32)
    return xp.rint(weights / xp.where(scale == 0, 1, scale)).astype(xp.int8), scale.squeeze(axes)


def quantise_model(model: nnx.Module) -> None:
    """Replace every matrix of ``model`` by its int8 form; only abstract and randomly initialised models need this."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embed | Head):
            name = "embedding" if isinstance(module, Embed) else "kernel"
            weights, names = getattr(module, name).get_value(), getattr(module, name).get_metadata()["out_sharding"]
            layers = names.count("layer")
            axes = tuple(range(layers, layers + module.num_inputs)) if isinstance(module, Linear) else (1,)
            rest = tuple(axis for i, axis in enumerate(names) if i not in axes)
            for field, value, kept in zip((name, SCALE), quantise(weights, axes), (names, rest), strict=True):
                setattr(module, field, nnx.Param(value, out_sharding=kept, eager_sharding=False))
