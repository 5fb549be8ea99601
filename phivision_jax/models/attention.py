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
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Large and finite: a query without a visible key averages instead of giving NaN, and its row is never weighed.
MASKED = -1e30


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int32[Array, "B T"],
    kv_segment_ids: Int32[Array, "B S"] | None = None,
    span_end: Int32[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads: N query heads share K key heads, N/K neighbours each.

    Args:
      q, k, v: not yet scaled; scores are scaled by H^-1/2. Softmax in fp32, result in q's dtype.
      segment_ids: segment of each query; ``kv_segment_ids`` of each key (default: the same columns).
      span_end: last key column that each query may see; None for all.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    visible = segment_ids[:, :, None] == kv_segment_ids[:, None, :]  # [B, T, S]
    if span_end is not None:
        visible &= jnp.arange(k.shape[1]) <= span_end[:, :, None]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return out.reshape(B, T, N, H)
