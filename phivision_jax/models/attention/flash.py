"""Attention on Hopper and Blackwell GPUs (compute capability 9 and 10) with tokamax's kernels.

Where every segment is contiguous, a query sees the keys from ``first`` on that come before ``past``, and these two
integers per query replace a T×T mask:

    position      0  1  2  3  4  5
    segment       1  1  1  1  2  0
    span_end      0  2  2  3  4  5        positions 1 and 2 are an image
    first         0  0  0  0  4  5
    past          1  3  3  4  5  6

The forward pass skips blocks of keys before every ``first`` or after every ``past`` of a block of queries; the backward
pass visits all of them (in this version of tokamax). What the kernels do not support (other GPUs, other dtypes) is
computed as on a CPU.

The kernels are private modules of tokamax, without a stable API, hence the check of its version.
"""

import functools
import warnings
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import backend as jax_backend
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention.partition import shard_map_attention
from phivision_jax.models.remat import ATTENTION

TOKAMAX = "0.0.17"
"""The one version whose kernels are called, here and in ``splash.py``."""
HEAD_DIMS = range(64, 129)
"""Supported head dimensions: smaller ones would be mostly padding, not all larger ones have a backward pass on
Blackwell."""


def require_tokamax() -> None:
    """Raise ImportError unless tokamax is installed in the version that ``splash`` and ``flash`` are written for."""
    try:
        found = metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        found = "none"
    if found != TOKAMAX:
        raise ImportError(
            f"attention kernels need tokamax {TOKAMAX}, but the installed version is {found}; run "
            f"`pip install tokamax=={TOKAMAX}`, or disable kernels: models.attention.attend.backend('xla')"
        )


def supported(q: Float[Array, "*B T N H"], k: Float[Array, "*B T K H"], v: Float[Array, "*B T K H"]) -> bool:
    """Check that the kernels support JAX's default device, the dtype (bf16) and the head dimension.

    Warns when only tokamax is missing.
    """
    capability = str(getattr(jax_backend.get_default_device(), "compute_capability", ""))  # a name on AMD's
    if capability.partition(".")[0] not in ("9", "10"):
        return False
    if {x.dtype for x in (q, k, v)} != {jnp.dtype(jnp.bfloat16)} or q.shape[-1] not in HEAD_DIMS:
        return False
    try:
        require_tokamax()
        _operations()
    except ImportError as error:
        warnings.warn(f"attention is computed in blocks, without the GPU kernels: {error}", stacklevel=2)
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
    """Self-attention as ``models.attention.attend`` defines it, except in padding, of ``supported`` arrays.

    A padding position (segment 0) sees only itself; its result is finite but meaningless. Under a mesh each device
    computes its own rows, heads and queries, with all keys of the row (gathered along ``context``). Differentiable in
    reverse mode only.

    Args:
      segment_ids: contiguous segments, in any order, with padding anywhere.
      span_end: at least the query's own position.
      axes: as in ``attend``.
    """
    first, past = visible_keys(segment_ids, span_end)
    return shard_map_attention(_attention, q, k, v, (first, past), axes=axes)


def visible_keys(
    segment_ids: Int32[Array, "*B T"], span_end: Int32[Array, "*B T"] | None
) -> tuple[Int32[Array, "*B T"], Int32[Array, "*B T"]]:
    """The first key that each query sees, and the one after the last."""
    axis, T = segment_ids.ndim - 1, segment_ids.shape[-1]
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), segment_ids.shape)
    border = jnp.ones((*segment_ids.shape[:-1], 1), bool)
    changes = segment_ids[..., 1:] != segment_ids[..., :-1]
    begins, ends = (jnp.concatenate(sides, axis) for sides in ((border, changes), (changes, border)))
    first = jax.lax.cummax(jnp.where(begins, positions, 0), axis)
    past = jax.lax.cummin(jnp.where(ends, positions + 1, T), axis, reverse=True)
    if span_end is not None:
        past = jnp.minimum(past, span_end + 1)
    padding = segment_ids == 0
    return jnp.where(padding, positions, first), jnp.where(padding, positions + 1, past)


@jax.custom_vjp
def _attention(q, k, v, first, past) -> Float[Array, "*B T N H"]:
    return _forward(q, k, v, first, past)[0]


def _forward(q, k, v, first, past) -> tuple[jax.Array, tuple[Any, ...]]:
    forward, _, mask = _kernels(first, past)
    # tokamax's heuristic for block sizes. By default it looks in its tables first, which lack such masks, and warns.
    config = forward.bind(q, k, v, mask=mask, return_residuals=True).heuristics_config
    out, sums = forward.replace(config=config)(q, k, v, mask=mask, return_residuals=True)
    out, sums = jax.tree.map(lambda x: checkpoint_name(x, ATTENTION), (out, sums))  # else remat reruns the kernel
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
    """The forward operation, the backward operation, and the mask for both, which all heads share."""
    from tokamax._src.ops.attention import base

    forward, backward = _operations()
    return forward, backward, base.Mask(k_start=first[..., None, :], k_end=past[..., None, :])


@functools.cache
def _operations() -> tuple[Any, Any]:
    from tokamax._src.ops.attention import pallas_mosaic_gpu, pallas_mosaic_gpu_vjp

    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention(), pallas_mosaic_gpu_vjp.PallasMosaicGpuFlashAttentionVjp()
