"""Attention in plain JAX: all scores at once (the reference), and in blocks of queries × keys.

In blocks, memory grows with T, not with T², forward and backward. The softmax is computed while walking over the keys
("online", Milakov and Gimelshein 2018), and the backward pass recomputes its weights from the normaliser, as
FlashAttention does (Dao et al. 2022, algorithms 1 and 4). A block of queries walks from the first block of keys that it
may see to the last; in this example segment 2 begins at position 8:

    keys       0-3   4-7   8-11
    queries 0-3  x                   no block beyond the largest ``span_end`` of the queries
            4-7  x     x
            8-11             x       no block without a segment between the queries' smallest and largest

Every pair is also masked by its own segment, ``span_end`` and ``last_query``: the choice of blocks affects the time
only, which is least where segments ascend along the row. On CPUs this is faster than all scores at once: a block stays
in the cache.

Axes beside the legend of ``models/layers.py``: a row is i blocks of t queries, and j blocks of s keys; r = G·t are the
queries of one block that share a key head.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention.partition import shard_map_attention
from phivision_jax.models.remat import ATTENTION

MASKED = -1e30
"""Score of an invisible key. Large and finite: a difference of infinities would be NaN."""
BLOCK = 128
"""Most queries, and most keys, of a block: a row is divided into as few equal blocks as that allows. On CPUs twice as
many take as long for a row of one segment, and nearly twice as long for a row of many short ones."""

# Running maximum before the first key. Above MASKED, so that a masked score weighs exp(-1e30) = 0 from the start.
_LOWEST = -1e20

_NO_SEGMENT = 2**30


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int32[Array, "B T"],
    kv_segment_ids: Int32[Array, "B S"],
    span_end: Int32[Array, "B T"],
    last_query: Int32[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention as ``models.attention.attend`` defines it, with O(T·S) memory."""
    weights = attention_weights(q, k, segment_ids, kv_segment_ids, span_end, last_query)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    return rearrange(out, "B T K G H -> B T (K G) H")


def attention_weights(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    segment_ids: Int32[Array, "B T"],
    kv_segment_ids: Int32[Array, "B S"],
    span_end: Int32[Array, "B T"],
    last_query: Int32[Array, "B S"] | None = None,
) -> Float[Array, "B K G T S"]:
    """The softmax of attention in fp32, for any T queries of a row; with ``last_query``, for all of them."""
    visible = segment_ids[:, :, None] == kv_segment_ids[:, None, :]  # [B, T, S]
    visible &= jnp.arange(k.shape[1]) <= span_end[:, :, None]
    if last_query is not None:
        visible &= jnp.arange(q.shape[1])[:, None] <= last_query[:, None, :]
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)


def blockwise(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    segment_ids: Int32[Array, "*B T"],
    kv_segment_ids: Int32[Array, "*B S"],
    span_end: Int32[Array, "*B T"],
    last_query: Int32[Array, "*B S"] | None = None,
    *,
    axes: tuple[str | None, ...] = ("batch", "length", "heads"),
    block: int = BLOCK,
) -> Float[Array, "*B T N H"]:
    """Attention as ``models.attention.attend`` defines it; zero for padding (segment 0) and where no key is visible.

    Under a mesh each device computes its own rows, heads and queries, with all keys of the row (gathered along
    ``context``). Scores and sums are fp32. Differentiable in reverse mode only.

    Args:
      segment_ids: from 0 to 2^30; fastest where they do not decrease along the row and padding comes last.
      last_query, axes: as in ``attend``.
      block: largest size of a block; rows need not be multiples of it.
    """
    lead = q.ndim - 3
    span_end = jnp.minimum(span_end, k.shape[-3] - 1)  # the last block of keys is padded with positions from S on
    numbers = None if last_query is None else jnp.broadcast_to(jnp.arange(q.shape[-3]), q.shape[:-2])

    def local(q, k, v, segments, span_end, numbers, kv_segments, last_query):
        sizes = _block_size(q.shape[-3], block), _block_size(k.shape[-3], block)
        given = q, k, v, segments, kv_segments, span_end, numbers, last_query
        return _attention(sizes, *(x if x is None else x.reshape(-1, *x.shape[lead:]) for x in given)).reshape(q.shape)

    query_args, key_args = (segment_ids, span_end, numbers), (kv_segment_ids, last_query)
    return shard_map_attention(local, q, k, v, query_args, key_args, axes=axes)


class _QueryMasks(NamedTuple):
    """Arrays that decide which keys each query sees, in blocks [i, t]."""

    segments: Int32[Array, "i t"]
    span_end: Int32[Array, "i t"]
    numbers: Int32[Array, "i t"] | None


class _KeyMasks(NamedTuple):
    """Arrays that decide which queries see each key, in blocks [j, s]."""

    segments: Int32[Array, "j s"]
    last_query: Int32[Array, "j s"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sizes: tuple[int, int], *inputs: jax.Array | None) -> Float[Array, "B T N H"]:
    """``inputs`` are those of ``_row``, each with a leading B."""
    return _forward(sizes, *inputs)[0]


def _forward(sizes: tuple[int, int], *inputs: jax.Array | None) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    # One row at a time: under vmap every row would walk over the blocks of all rows.
    out, normaliser = jax.lax.map(lambda row: _row(sizes, *row), inputs)
    out, normaliser = checkpoint_name(out, ATTENTION), checkpoint_name(normaliser, ATTENTION)
    return out, (*inputs, out, normaliser)


def _backward(
    sizes: tuple[int, int], saved: tuple[jax.Array | None, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    d_q, d_k, d_v = jax.lax.map(lambda row: _row_backward(sizes, *row), (*saved, d_out))
    return d_q, d_k, d_v, None, None, None, None, None


_attention.defvjp(_forward, _backward)


def _row(sizes: tuple[int, int], *inputs: jax.Array | None) -> tuple[Float[Array, "T N H"], Float[Array, "i K r"]]:
    """The result, and log Σ exp(score) of each query in blocks, for one row.

    ``inputs`` are q [T, N, H], k and v [S, K, H], segments [T], kv_segments [S], span_end [T], and either the numbers
    of the queries [T] and last_query [S], or None twice; ``sizes`` are (t, s).
    """
    (q, _, v, *_), (queries, keys, values, masks, k_masks, walks) = cast(Any, inputs), _blocks(sizes, *inputs)

    def one(args: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        q, masks, first, last = args

        def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            scores = _scores(q, keys[j], masks, k_masks, j)
            new_top = jnp.maximum(top, scores.max(-1))
            weights, keep = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            seen = jnp.einsum("Krs,KsH->KrH", weights.astype(v.dtype), values[j], preferred_element_type=jnp.float32)
            return new_top, total * keep + weights.sum(-1), out * keep[..., None] + seen

        top, total = jnp.full(q.shape[:2], _LOWEST), jnp.zeros(q.shape[:2])
        top, total, out = jax.lax.fori_loop(first, last, step, (top, total, jnp.zeros(q.shape, jnp.float32)))
        total = jnp.where(total == 0, 1, total)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, normaliser = jax.lax.map(one, (queries, masks, *walks))
    return _from_query_blocks(out, q), normaliser


def _row_backward(
    sizes: tuple[int, int], *saved: jax.Array | None
) -> tuple[Float[Array, "T N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """Gradients of q, k and v, from the inputs and results of ``_row`` and the gradient of its first result."""
    *inputs, out, normaliser, d_out = cast(Any, saved)
    (q, k, v, *_), (queries, keys, values, masks, k_masks, walks) = inputs, _blocks(sizes, *inputs)
    (S, K, H), (block, _) = k.shape, sizes
    # A term that all scores of a query share: the softmax's gradient is weights · (d_weights - common).
    common = (d_out.astype(jnp.float32) * out).sum(-1)

    def one(carry: tuple[jax.Array, jax.Array], args: tuple[Any, ...]) -> tuple[tuple, jax.Array]:
        q, masks, first, last, d_out, common, normaliser = args

        def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            scores = _scores(q, keys[j], masks, k_masks, j)
            weights = jnp.exp(scores - normaliser[..., None])
            d_weights = jnp.einsum("KrH,KsH->Krs", d_out, values[j], preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - common[..., None])).astype(q.dtype)
            weights = weights.astype(v.dtype)
            d_v = d_v.at[j].add(jnp.einsum("Krs,KrH->KsH", weights, d_out, preferred_element_type=jnp.float32))
            d_k = d_k.at[j].add(jnp.einsum("Krs,KrH->KsH", d_scores, q, preferred_element_type=jnp.float32))
            d_q += jnp.einsum("Krs,KsH->KrH", d_scores, keys[j], preferred_element_type=jnp.float32)
            return d_q, d_k, d_v

        d_q, *carry = jax.lax.fori_loop(first, last, step, (jnp.zeros(q.shape, jnp.float32), *carry))
        return tuple(carry), (d_q * H**-0.5).astype(q.dtype)

    blocks = queries, masks, *walks, _query_blocks(d_out, K, block)
    zeros = jnp.zeros(keys.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(one, (zeros, zeros), (*blocks, _query_blocks(common, K, block), normaliser))
    d_k, d_v = (rearrange(x, "j K s H -> (j s) K H")[:S] for x in (d_k * H**-0.5, d_v))
    return _from_query_blocks(d_q, q), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _scores(
    q: Float[Array, "K r H"], k: Float[Array, "K s H"], masks: _QueryMasks, k_masks: _KeyMasks, j: jax.Array
) -> Float[Array, "K r s"]:
    """fp32 scores of a block of queries and the j-th block of keys."""
    scores = jnp.einsum("KrH,KsH->Krs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    k_ids = k_masks.segments[j]
    positions = j * len(k_ids) + jnp.arange(len(k_ids))
    # [t, s], the same for all heads
    visible = (masks.segments[:, None] == k_ids) & (positions <= masks.span_end[:, None])
    if masks.numbers is not None and k_masks.last_query is not None:
        visible &= masks.numbers[:, None] <= k_masks.last_query[j]
    by_head = rearrange(scores, "K (G t) s -> K G t s", t=len(masks.segments))
    return jnp.where(visible, by_head, MASKED).reshape(scores.shape)


def _walks(
    q_ids: Int32[Array, "i t"],
    k_ids: Int32[Array, "j s"],
    span_end: Int32[Array, "i t"],
    numbers: Int32[Array, "i t"] | None = None,
    last_query: Int32[Array, "j s"] | None = None,
) -> tuple[Int32[Array, " i"], Int32[Array, " i"]]:
    """The first block of keys that each block of queries may see, and the one after the last; equal if none."""
    q_first, k_first = (jnp.where(ids > 0, ids, _NO_SEGMENT).min(1) for ids in (q_ids, k_ids))
    q_last, k_last = q_ids.max(1), k_ids.max(1)
    j, s = k_ids.shape
    may = (q_first[:, None] <= k_last) & (q_last[:, None] >= k_first)
    may &= jnp.arange(0, j * s, s) <= span_end.max(1)[:, None]
    if numbers is not None and last_query is not None:
        may &= numbers.min(1)[:, None] <= last_query.max(1)
    first, last = may.argmax(1), j - may[:, ::-1].argmax(1)
    return first, jnp.where(may.any(1), last, first)


def _block_size(length: int, block: int) -> int:
    return -(-length // -(-length // block))


def _blocks(sizes, q, k, v, segments, kv_segments, span_end, numbers, last_query) -> tuple[Any, ...]:
    """The arguments of ``_row`` as blocks: queries, keys, values, masks of both, and which blocks to walk over."""
    t, s = sizes
    keys, values = (rearrange(_pad(x, s), "(j s) K H -> j K s H", s=s) for x in (k, v))
    q_segments = jnp.where(segments == 0, -1, segments)  # no key has the segment of padding's queries

    def padded(x: jax.Array | None, size: int) -> jax.Array | None:
        # Repeating the last id lengthens no walk; padded keys are masked by their positions.
        return None if x is None else _pad(x, size, mode="edge").reshape(-1, size)

    masks = _QueryMasks(*(padded(x, t) for x in (q_segments, span_end, numbers)))  # type: ignore[arg-type]
    k_masks = _KeyMasks(*(padded(x, s) for x in (kv_segments, last_query)))  # type: ignore[arg-type]
    walks = _walks(masks.segments, k_masks.segments, masks.span_end, masks.numbers, k_masks.last_query)
    return _query_blocks(q, k.shape[1], t), keys, values, masks, k_masks, walks


def _pad(x: Float[Array, "T ..."], block: int, mode: str = "constant") -> Float[Array, "it ..."]:
    """Fill the last block. Zeros as d_out of a padded query change no gradient."""
    return jnp.pad(x, ((0, -len(x) % block), *((0, 0),) * (x.ndim - 1)), mode=mode)


def _query_blocks(x: Float[Array, "T N ..."], K: int, block: int) -> Float[Array, "i K r ..."]:
    return rearrange(_pad(x, block), "(i t) (K G) ... -> i K (G t) ...", t=block, K=K)


def _from_query_blocks(x: Float[Array, "i K r H"], like: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
    G = like.shape[1] // x.shape[1]
    return rearrange(x, "i K (G t) H -> (i t) (K G) H", G=G)[: len(like)]
