"""The KV cache: keys and values of every layer.

Prompts are padded on the right to T tokens; in every row the generated tokens follow at index T, T+1, … of the cache.
Segments mark the entries in use, so padding between a short prompt and its answer is never seen, and RoPE positions
continue from the prompt's own length:

    index        0  1  2  3  4 | 5  6  7
    row 0        a  b  c  d  e | x  y  ·       positions  0 1 2 3 4 | 5 6
    row 1        a  b  ·  ·  · | x  y  ·       positions  0 1       | 2 3
    segments     1  1  0  0  0 | 1  1  0       (row 1)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from phivision_jax.config import DecoderConfig
from phivision_jax.models.phi4 import LayerCache


def empty_cache(cfg: DecoderConfig, rows: int, size: int, dtype: DTypeLike) -> LayerCache:
    """Keys and values, [L, B, S, K, H] each, with all ``size`` entries empty."""
    shape = (cfg.num_layers, rows, size, cfg.num_kv_heads, cfg.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
