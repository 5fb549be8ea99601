"""Attention on Hopper and Blackwell GPUs (compute capability 9 and 10): tokamax's kernels, told two numbers a column.

Where every segment is one run of columns, a query sees the keys from ``first`` on that come before ``past``:

    column        0  1  2  3  4  5
    segment       1  1  1  1  2  0
    span_end      0  2  2  3  4  5        columns 1 and 2 are an image
    first         0  0  0  0  4  5
    past          1  3  3  4  5  6

Blocks of keys before every ``first`` and after every ``past`` of a block of queries are not visited forward; backward
all are (in this version of tokamax). What the kernels do not take is computed as on a CPU: other GPUs, other dtypes.

The kernels are private modules of tokamax (``models/attention/tokamax_version.py``).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend as jax_backend
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention.partition import by_device
from phivision_jax.models.attention.tokamax_version import require_tokamax
from phivision_jax.models.remat import ATTENTION, name

HEADS = range(64, 129)
"""Widths of a head: narrower ones would be mostly padding, not all wider ones have a backward pass on Blackwell."""


def takes(q: Float[Array, "*B T N H"], k: Float[Array, "*B T K H"], v: Float[Array, "*B T K H"]) -> bool:
    """Whether the kernels are there for these: by the kind of JAX's default device, by dtype (bf16) and by width."""
    capability = str(getattr(jax_backend.get_default_device(), "compute_capability", ""))  # of AMD's: a name
    if capability.partition(".")[0] not in ("9", "10"):
        return False
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)} or q.shape[-1] not in HEADS:
        return False
    try:
        require_tokamax()
        _operations()
    except ImportError as error:
        warnings.warn(f"attention is computed in blocks, without the GPU's kernels: {error}", stacklevel=2)
        return False
    return True


def flash(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K H"],
    *,
    segment_ids: Int32[Array, "*B T"],
    span_end: Int32[Array, "*B T"] | None = None,
    axes: tuple[str | None, ...] = ("batch", "length", "heads"),
) -> Float[Array, "*B T N H"]:
    """Self-attention as ``models.attention.attend`` defines it, except in padding, of arrays that ``takes`` takes.

    A column of padding (segment 0) sees only itself; its result is finite and means nothing. Under a mesh each device
    takes its own rows, heads and queries, with all keys of the row (gathered along ``context``). Differentiable in
    reverse mode only.

    Args:
      segment_ids: each segment is one run of columns; in any order, padding anywhere.
      span_end: at least the query's own column.
      axes: as in ``attend``.
    """
    first, past = visible_columns(segment_ids, span_end)
    return by_device(_attention, q, k, v, (first, past), axes=axes)


def visible_columns(
    segment_ids: Int32[Array, "*B T"], span_end: Int32[Array, "*B T"] | None
) -> tuple[Int32[Array, "*B T"], Int32[Array, "*B T"]]:
    """The first key that each query sees, and the one past the last."""
    axis, T = segment_ids.ndim - 1, segment_ids.shape[-1]
    columns = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), segment_ids.shape)
    border = jnp.ones((*segment_ids.shape[:-1], 1), bool)
    changes = segment_ids[..., 1:] != segment_ids[..., :-1]
    begins, ends = (jnp.concatenate(sides, axis) for sides in ((border, changes), (changes, border)))
    first = jax.lax.cummax(jnp.where(begins, columns, 0), axis)
    past = jax.lax.cummin(jnp.where(ends, columns + 1, T), axis, reverse=True)
    if span_end is not None:
        past = jnp.minimum(past, span_end + 1)
    padding = segment_ids == 0
    return jnp.where(padding, columns, first), jnp.where(padding, columns + 1, past)


@jax.custom_vjp
def _attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    first: Int32[Array, "*B T"],
    past: Int32[Array, "*B T"],
) -> Float[Array, "*B T N H"]:
    return _forward(q, k, v, first, past)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, past: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    forward, _, mask = _kernels(first, past)
    # tokamax's rule for blocks. Its tables, asked first otherwise, hold no such masks, and it warns of every miss.
    config = forward.bind(q, k, v, mask=mask, return_residuals=True).heuristics_config
    out, sums = forward.replace(config=config)(q, k, v, mask=mask, return_residuals=True)
    out, sums = jax.tree.map(lambda x: name(x, ATTENTION), (out, sums))  # else remat would run the kernel once more
    return out, (q, k, v, first, past, out, sums)


def _backward(residuals: tuple[Any, ...], d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, first, past, out, sums = residuals
    forward, backward, mask = _kernels(first, past)
    settings = dict(forward.bind(q, k, v, mask=mask).kwargs)
    del settings["return_residuals"]
    args = sums, out, d_out, q, k, v
    config = backward.bind(*args, **settings).heuristics_config
    gradients = backward.replace(config=config)(*args, **settings)
    return gradients["q"], gradients["k"], gradients["v"], None, None


_attention.defvjp(_forward, _backward)


def _kernels(first: jax.Array, past: jax.Array) -> tuple[Any, Any, Any]:
    """The forward pass, the backward pass, and the mask as both take it: the same for all heads."""
    from tokamax._src.ops.attention import base

    forward, backward = _operations()
    return forward, backward, base.Mask(k_start=first[..., None, :], k_end=past[..., None, :])


@functools.cache
def _operations() -> tuple[Any, Any]:
    from tokamax._src.ops.attention import pallas_mosaic_gpu, pallas_mosaic_gpu_vjp

    return (
        pallas_mosaic_gpu.PallasMosaicGpuFlashAttention(),
        pallas_mosaic_gpu_vjp.PallasMosaicGpuFlashAttentionVjp(),
    )
