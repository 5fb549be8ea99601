"""The reference implementation of attention: all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

MASKED = -1e30
"""Score of an invisible key. Large and finite: a difference of infinities would be NaN."""


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int32[Array, "B T"],
    kv_segment_ids: Int32[Array, "B S"],
    span_end: Int32[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attention as ``models.attention.attend`` defines it, with O(T·S) memory."""
    visible = segment_ids[:, :, None] == kv_segment_ids[:, None, :]  # [B, T, S]
    visible &= jnp.arange(k.shape[1]) <= span_end[:, :, None]
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return rearrange(out, "B T K G H -> B T (K G) H")
