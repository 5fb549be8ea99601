"""Choice of the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def sample(
    logits: Float[Array, "B V"], key: jax.Array, *, temperature: float = 0.0, top_p: float = 1.0
) -> Int32[Array, " B"]:
    """Greedy at temperature 0, else sampled from the nucleus: the fewest tokens whose probability reaches ``top_p``."""
    if temperature == 0.0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token is in the nucleus if the tokens before it have not reached top_p; the first always is, as top_p > 0.
        kept = jnp.cumsum(probability, axis=-1) - probability < top_p
        threshold = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
