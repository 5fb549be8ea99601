"""The parameters of a model, in the arrays and the order in which the programs of generation read them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout

from phivision_jax.inference.programs import Weights
from phivision_jax.models import few_rows
from phivision_jax.models.layers import Linear
from phivision_jax.models.phivision import PhiVision


def place(model: PhiVision, platform: str, slots: int) -> tuple[Weights, nnx.GraphDef | None, Any]:
    """Arrange the parameters of a model for the programs of a platform; the mesh must be in force.

    Returns:
      The parameters, the structure of one layer where layers are separate arrays, and the dtype in which decoding
      computes.
    """
    params = model.split()[1]
    if platform == "cpu":
        return _for_cpu(model, params, slots)
    laid_out = jax.tree.map_with_path(_laid_out, params) if platform == "tpu" else params
    return Weights(laid_out, None), None, model.decoder.dtype


def _for_cpu(model: PhiVision, params: Any, slots: int) -> tuple[Weights, nnx.GraphDef, Any]:
    """Arrange the parameters for CPUs: layers are separate arrays.

    Decoding computes in fp32. Where rows are multiplied one by one, and in int8, matrices stay as they are. Otherwise
    those of the layers and the head are in fp32, and those of the layers have their outputs first, as the head's
    always has.
    """
    dtypes = {x.dtype for x in jax.tree.leaves(params)}
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    compute = jnp.dtype(jnp.float32)
    widened = jnp.dtype(jnp.int8) not in dtypes and not few_rows.are_single(slots, narrowest, compute)

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(compute) if widened else x

    stacked, state = nnx.split(model.decoder.layers, nnx.Param)
    layers = []
    for i in range(model.config.decoder.num_layers):
        layer = nnx.merge(stacked, jax.tree.map(lambda x, i=i: widen(x[i]), state))
        for _, module in nnx.iter_modules(layer):
            if widened and isinstance(module, Linear):
                module.put_outputs_first()
        structure, kept = nnx.split(layer, nnx.Param)
        layers.append(nnx.to_pure_dict(kept))
    head = jax.tree.map(widen, params["decoder"]["lm_head"])
    weights = Weights(params | {"decoder": params["decoder"] | {"lm_head": head}}, layers)
    return weights, structure, compute


def _laid_out(path: tuple, x: Any) -> Any:
    """The parameter in the order in which programs for TPUs read it."""
    name = "/".join(key.key for key in path)
    if not re.fullmatch(r"decoder/layers/self_attn/[qkv]_proj/kernel", name):
        return x
    # [L, D, N, H] as L · N matrices D × H, which every call of ``decode`` would otherwise copy it to.
    order = Format(Layout((0, 2, 1, 3)), x.sharding)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=order)
    return jax.device_put(x, order)
