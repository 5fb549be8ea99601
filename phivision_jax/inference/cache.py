"""The KV cache: keys and values of every layer, and which columns of it hold anything.

Prompts are padded on the right to T columns; generated tokens follow at column T, T+1, … in every row alike. Segments
say what is real, so padding between a short prompt and its answer is never seen, and RoPE positions go on from the
prompt's own length:

    column       0  1  2  3  4 | 5  6  7
    row 0        a  b  c  d  e | x  y  ·       positions  0 1 2 3 4 | 5 6
    row 1        a  b  ·  ·  · | x  y  ·       positions  0 1       | 2 3
    segments     1  1  0  0  0 | 1  1  0       (row 1)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from phivision_jax.config import DecoderConfig
from phivision_jax.models.phi4 import LayerCache


def empty_cache(cfg: DecoderConfig, rows: int, columns: int, dtype: DTypeLike) -> LayerCache:
    """Keys and values, [L, B, S, K, H] each, of nothing yet."""
    shape = (cfg.num_layers, rows, columns, cfg.num_kv_heads, cfg.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def extend_segments(segment_ids: Int32[Array, "B T"], new_columns: int) -> Int32[Array, "B S"]:
    """The prompt's segments, followed by columns that hold nothing yet."""
    return jnp.pad(segment_ids, ((0, 0), (0, new_columns)))


def write_segment(segments: Int32[Array, "B S"], column: jax.Array) -> Int32[Array, "B S"]:
    """Column ``column`` now belongs to each row's example."""
    return jax.lax.dynamic_update_slice_in_dim(segments, jnp.ones_like(segments[:, :1]), column, axis=1)
