"""Choose the next token of each sequence from its logits, each with settings of its own.

All settings are arrays: no setting needs a program of its own. What a batch does not need is skipped when it runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, UInt32

from phivision_jax.batch import Array
from phivision_jax.inference.requests import MAX_TOP_LOGPROBS


class Sampling(NamedTuple):
    """Settings of B sequences, as in ``requests.Request``."""

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int32[Array, " B"]
    key: UInt32[Array, "B 2"]
    """Data of a random key per sequence."""
    top: Bool[Array, " B"]
    """True for sequences that need the most likely tokens."""


class Chosen(NamedTuple):
    """The chosen tokens, and log-probabilities before temperature and truncation."""

    token: Int32[Array, " B"]
    logprob: Float[Array, " B"]
    top_ids: Int32[Array, "B 20"]
    top_logprobs: Float[Array, "B 20"]


def choose(
    logits: Float[Array, "B V"],
    settings: Sampling,
    count: Int32[Array, " B"],
    forced: Int32[Array, " B"],
    needed: Bool[Array, " B"],
) -> Chosen:
    """Choose a token for each sequence.

    Args:
      logits: fp32.
      count: number of the token in its answer: a sequence's random numbers depend only on its key and on this.
      forced: a token to be chosen whatever the logits, or −1.
      needed: False where the result is not used, so that settings there cost nothing.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    greedy = logits.argmax(-1).astype(jnp.int32)
    random = needed & (settings.temperature > 0)
    token = jax.lax.cond(
        random.any(), lambda: jnp.where(random, _sample(logits, settings, count), greedy), lambda: greedy
    )
    token = jnp.where(forced >= 0, forced, token)
    k = min(MAX_TOP_LOGPROBS, logits.shape[-1])

    def most_likely() -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(logits, k)
        return ids, values - normaliser[:, None]

    none = jnp.zeros((len(logits), k), jnp.int32), jnp.zeros((len(logits), k))
    ids, logprobs = jax.lax.cond((needed & settings.top).any(), most_likely, lambda: none)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return Chosen(token, chosen - normaliser, ids, logprobs)


def _sample(logits: jax.Array, settings: Sampling, count: jax.Array) -> Int32[Array, " B"]:
    """Sample from the truncated distribution, by adding Gumbel noise and taking the largest."""
    # The largest becomes 0 before the division, which then overflows for none but hopeless tokens.
    logits = (logits - logits.max(-1, keepdims=True)) / jnp.maximum(settings.temperature, 1e-30)[:, None]
    truncated = (settings.top_p < 1) | (settings.top_k > 0)
    logits = jax.lax.cond(truncated.any(), lambda: _truncate(logits, settings), lambda: logits)

    def noise(key: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key), count), logits.shape[-1:])

    return (logits + jax.vmap(noise)(settings.key, count)).argmax(-1).astype(jnp.int32)


def _truncate(logits: Float[Array, "B V"], settings: Sampling) -> Float[Array, "B V"]:
    """−inf for all but the top-k tokens, and of these all but the nucleus: the fewest whose probability is top-p."""
    V = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, V), V)
    ordered = jnp.where(jnp.arange(V) < k[:, None], ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    # A token is in the nucleus if the tokens before it have not reached top_p; the first always is, as top_p > 0.
    top_p = jnp.where(settings.top_p < 1, settings.top_p, jnp.inf)[:, None]  # sums in fp32 can reach 1 early
    kept = (jnp.cumsum(probability, axis=-1) - probability < top_p) & (ordered > -jnp.inf)
    threshold = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
