"""Attention, one function: ``attend``. Both towers and the KV cache go through it.

A query may see a key when both are in the same segment and the key's column is not past the query's ``span_end``:

    span_end = own column        causal
    span_end = end of the image  bidirectional inside an image, causal elsewhere
    span_end = None              everything in the segment (the vision tower)

    column        0  1  2  3  4  5           key  0 1 2 3 4 5
    token         a  ▢  ▢  b  c  ·     query a    x
    segment       1  1  1  1  2  0           ▢    x x x            span_end 2: the image sees itself whole
    span_end      0  2  2  3  4  5           ▢    x x x
                                             b    x x x x
                                             c            x        another example: nothing before it
                                             ·              x      padding sees padding, so no softmax is empty

One definition, four ways to compute it, chosen when tracing:

    splash       the TPU's kernel (``splash.py``), for self-attention
    flash        kernels for Hopper and Blackwell GPUs (``flash.py``), likewise, of what they take
    blockwise    blocks of queries x keys (``blockwise.py``), for other long rows: no memory for their scores
    plain        all scores at once, the definition in code, for short rows and one new token behind a cache

Padding's own result is finite everywhere and means nothing: kernels let it see itself only, blockwise gives zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention.blockwise import MASKED, blockwise
from phivision_jax.models.attention.flash import flash, takes
from phivision_jax.models.remat import ATTENTION, name

backend = jax.make_user_context("auto")
"""``with backend("xla"):`` computes without kernels, ``"tpu"`` and ``"gpu"`` as on those, ``"auto"`` as the platform
has it: that of the mesh in force (``jax.set_mesh``; its devices need not be here), else JAX's default. Part of jit's
cache key."""

PLAIN = 256
"""The most queries whose scores are held at once."""


def attend(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    *,
    segment_ids: Int32[Array, "*B T"],
    kv_segment_ids: Int32[Array, "*B S"] | None = None,
    span_end: Int32[Array, "*B T"] | None = None,
    axes: tuple[str | None, ...] = ("batch", "length", "heads"),
) -> Float[Array, "*B T N H"]:
    """Softmax attention with grouped heads: N query heads share K key heads, N/K neighbours each.

    Args:
      q, k, v: not yet scaled; scores are scaled by H^-1/2. Softmax in fp32, result in q's dtype.
      segment_ids: segment of each query; ``kv_segment_ids`` of each key (default: the same columns). On GPUs each
        segment is one run of columns, as in every Batch.
      span_end: last key column that each query may see; None for all. Never before the query's own column.
      axes: logical names of q's axes but the last: kernels and blocks run on each device's own part.

    Raises:
      ValueError: for a backend that does not exist.
      ImportError: on TPUs, without the version of tokamax that ``models/attention/tokamax_version.py`` names.
    """
    T, S = q.shape[-3], k.shape[-3]
    if kv_segment_ids is None:
        platform = _platform() if T >= 128 else None  # shorter rows do not fill a block
        if platform == "tpu":
            from phivision_jax.models.attention.splash import splash  # needs packages that only TPUs need

            return splash(q, k, v, segment_ids=segment_ids, span_end=span_end, axes=axes)
        if platform == "gpu" and takes(q, k, v):
            return flash(q, k, v, segment_ids=segment_ids, span_end=span_end, axes=axes)
        kv_segment_ids = segment_ids
    if span_end is None:
        span_end = jnp.full_like(segment_ids, S - 1)
    if T > PLAIN:
        return blockwise(q, k, v, segment_ids, kv_segment_ids, span_end, axes=axes)
    form = plain
    for _ in range(q.ndim - 4):
        form = jax.vmap(form)
    return name(form(q, k, v, segment_ids, kv_segment_ids, span_end), ATTENTION)


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int32[Array, "B T"],
    kv_segment_ids: Int32[Array, "B S"],
    span_end: Int32[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """``attend`` with all scores at once."""
    B, T, N, H = q.shape
    K = k.shape[2]
    visible = segment_ids[:, :, None] == kv_segment_ids[:, None, :]  # [B, T, S]
    visible &= jnp.arange(k.shape[1]) <= span_end[:, :, None]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, H)


def _platform() -> str:
    if backend.value not in ("auto", "tpu", "gpu", "xla"):
        raise ValueError(f"attention backend {backend.value!r} does not exist; choose 'auto', 'tpu', 'gpu' or 'xla'")
    return target_device().platform if backend.value == "auto" else backend.value


def target_device() -> jax.Device | AbstractDevice:
    """A device (or what describes one) of the mesh in force, else JAX's first: the chip being compiled for."""
    mesh = jax.sharding.get_abstract_mesh()
    return (None if mesh.empty else mesh.abstract_device) or jax.devices()[0]
