"""Attention of one query per sequence over a cache of keys and values: decoding.

A sequence's keys are in two places. The cache holds those of earlier calls and is only read here, so that it is never
copied. The tokens of this call are in a small buffer, in the same column for all sequences; it is added to the cache
once per call.

    cache   [B, K, S, H]   a a a a a . . .    entries < length of the sequence are visible
    recent  [B, K, n, H]   b b .              columns <= column are visible; the query's own is the last of them

On CPUs all sequences walk over blocks of their keys together, so that time follows the longest, and slots of the cache
without a sequence are not read. Elsewhere sequences are computed at once over the first ``read`` entries. There the
cache is that of all layers: these entries of one layer are one slice, which is read within the product. Were the layer
sliced first and its entries then, it would be stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention.blockwise import MASKED
from phivision_jax.sharding import axis_size, dividing_rules, rule, target_device

BLOCKS = 64, 256
"""Fewest and most keys of a sequence per block on CPUs."""
BLOCK_KEYS = 2048
"""Keys of all sequences per block on CPUs: few enough for the caches, and enough for the cost of a step of a loop."""


class KV(NamedTuple):
    """Keys and values of a sequence of tokens in one layer; arrays may have leading axes.

    With int8, each token of each head has a scale, the largest magnitude / 127; without, the scales are None.
    """

    k: Float[Array, "*B K S H"]
    v: Float[Array, "*B K S H"]
    k_scale: Float[Array, "*B K S 1"] | None = None
    v_scale: Float[Array, "*B K S 1"] | None = None

    def values(self, dtype: jnp.dtype) -> tuple[Float[Array, "*B S K H"], Float[Array, "*B S K H"]]:
        """Keys and values in a dtype of the computation, in the order that layers compute them."""
        pairs = ((self.k, self.k_scale), (self.v, self.v_scale))
        k, v = (x.astype(dtype) if s is None else (x.astype(jnp.float32) * s).astype(dtype) for x, s in pairs)
        return jnp.swapaxes(k, -2, -3), jnp.swapaxes(v, -2, -3)


def store(k: Float[Array, "*B S K H"], v: Float[Array, "*B S K H"], dtype: jnp.dtype) -> KV:
    """Keys and values as a cache of this dtype holds them, heads first."""
    k, v = jnp.swapaxes(k, -2, -3), jnp.swapaxes(v, -2, -3)
    if dtype != jnp.int8:
        return KV(k.astype(dtype), v.astype(dtype))
    (k, k_scale), (v, v_scale) = _quantise(k), _quantise(v)
    return KV(k, v, k_scale, v_scale)


def _quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-12) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale


def attend_cached(
    q: Float[Array, "B N H"],
    cache: KV,
    lengths: Int32[Array, " B"],
    recent: KV,
    column: Int32[Array, ""],
    *,
    slots: Int32[Array, " B"] | None = None,
    layer: Int32[Array, ""] | None = None,
    read: int,
) -> Float[Array, "B N H"]:
    """Softmax attention of one query per sequence over its cache and the recent tokens.

    Args:
      q: unscaled; the softmax is fp32, the result has q's dtype.
      cache: [B, K, S, H], or [L, B, K, S, H] with ``layer``; entries from ``lengths`` on are not seen.
      lengths: at most ``read``.
      recent: [B, K, n, H]; columns after ``column`` are not seen.
      slots: those of the sequences, where the cache has other slots as well; on one device, and without ``layer``.
      layer: the layer of the cache to read, all entries at once; None to walk over blocks, as on CPUs.
      read: entries of the cache that any sequence may have in use; ignored without ``layer``.
    """
    K = recent.k.shape[1]
    if jax.sharding.get_abstract_mesh().empty:
        return _local(q, cache, lengths, recent, column, layer, slots, read=read)
    # Each device needs complete groups of heads; heads that do not divide are replicated.
    heads = rule("kv_heads") if K % axis_size("kv_heads") == 0 else None
    (rows,) = dividing_rules(("slots",), q.shape[:1])
    keys, replicated = PartitionSpec(rows, heads), PartitionSpec()
    stacked = keys if layer is None else PartitionSpec(None, *keys)
    run = jax.shard_map(
        functools.partial(_local, read=read),
        in_specs=(keys, stacked, PartitionSpec(rows), keys, replicated, replicated, replicated),
        out_specs=keys,
        check_vma=False,
    )
    return run(q, cache, lengths, recent, column, layer, slots)


def _local(q, cache, lengths, recent, column, layer, slots, *, read: int) -> Float[Array, "B N H"]:
    B, N, H = q.shape
    grouped = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype).reshape(B, recent.k.shape[1], -1, H)
    visible = jnp.arange(recent.k.shape[-2]) <= column
    state = _attend(grouped, recent, visible, None)
    if layer is None:
        state = _walk(grouped, cache, slots, lengths, state)
    else:
        used = jax.tree.map(lambda x: _first_entries(x, layer, read), cache)
        state = _attend(grouped, used, jnp.arange(read) < lengths[:, None, None, None], state)
    _, total, out = state
    return (out / total[..., None]).astype(q.dtype).reshape(B, N, H)


def _first_entries(x: Float[Array, "L B K S H"], layer: jax.Array, read: int) -> Float[Array, "B K s H"]:
    """The first entries of a layer of a cache."""
    _, B, K, _, H = x.shape
    return jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), (1, B, K, read, H))[0]


def _walk(
    q: Float[Array, "B K G H"], cache: KV, slots: jax.Array | None, lengths: Int32[Array, " B"], state: tuple
) -> tuple:
    """All sequences over blocks of their caches [B, K, S, H], up to the end of the longest."""
    B, S = len(q), cache.k.shape[-2]
    least, most = BLOCKS
    block = min(max(least, min(most, BLOCK_KEYS // B)), S)

    def step(j: jax.Array, state: tuple) -> tuple:
        # The last block of a cache that is not a multiple of a block begins earlier; entries before it are masked.
        start = jnp.minimum(j * block, S - block)
        keys = jax.tree.map(lambda x: _block(x, slots, start, block), cache)
        entries = start + jnp.arange(block)
        return _attend(q, keys, (entries >= j * block) & (entries < lengths[:, None, None, None]), state)

    return jax.lax.fori_loop(0, -(-lengths.max() // block), step, state)


def _block(x: Float[Array, "b K S H"], slots: jax.Array | None, start: jax.Array, size: int) -> jax.Array:
    """The entries from ``start`` to ``start + size`` of all slots, or of those in ``slots``."""
    if slots is None:
        return jax.lax.dynamic_slice_in_dim(x, start, size, 2)
    _, K, _, H = x.shape
    return jax.vmap(lambda slot: jax.lax.dynamic_slice(x, (slot, 0, start, 0), (1, K, size, H))[0])(slots)


def _attend(q: Float[Array, "*B K G H"], keys: KV, visible: jax.Array, state: tuple | None) -> tuple:
    """Online softmax: (maximum, sum, weighted values) in fp32, with these keys added to ``state``.

    Args:
      visible: broadcasts to the scores [*B, K, G, S].
      state: None if these are the first keys, of which at least one is visible.
    """
    # Scales are applied to scores and weights: int8 keys are converted where they are read, and nowhere else.
    scores = _scores(q, keys.k.astype(q.dtype))
    scores = jnp.where(visible, scores if keys.k_scale is None else scores * _per_key(keys.k_scale), MASKED)
    top = scores.max(-1) if state is None else jnp.maximum(state[0], scores.max(-1))
    weights = jnp.exp(scores - top[..., None])
    scaled = (weights if keys.v_scale is None else weights * _per_key(keys.v_scale)).astype(q.dtype)
    out = jnp.einsum("...KGS,...KSH->...KGH", scaled, keys.v.astype(q.dtype), preferred_element_type=jnp.float32)
    if state is None:
        return top, weights.sum(-1), out
    keep = jnp.exp(state[0] - top)
    return top, state[1] * keep + weights.sum(-1), state[2] * keep[..., None] + out


def _scores(q: Float[Array, "*B K G H"], k: Float[Array, "*B K S H"]) -> Float[Array, "*B K G S"]:
    if target_device().platform != "cpu":
        return jnp.einsum("...KGH,...KSH->...KGS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.einsum("...KSH,...KGH->...KSG", k, q, preferred_element_type=jnp.float32)
    return jnp.swapaxes(jax.lax.optimization_barrier(scores), -1, -2)  # as in ``few_rows.project_few``


def _per_key(scale: Float[Array, "*B K S 1"]) -> Float[Array, "*B K 1 S"]:
    if target_device().platform == "tpu":
        # Of one layer, in the order of the cache: TPUs multiply in another one, to which the compiler would otherwise
        # copy the scales of all layers at each call.
        scale = with_layout_constraint(scale, Layout((0, 1, 3, 2)))
    return jnp.swapaxes(scale, -1, -2)
