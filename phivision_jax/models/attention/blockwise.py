"""Attention in blocks of queries × keys, in plain JAX: memory grows with T, not with T², forward and backward.

The softmax is made while walking over the keys ("online", Milakov and Gimelshein 2018), and the backward pass makes its
weights again from their normaliser, as FlashAttention does (Dao et al. 2022, algorithms 1 and 4). A block of queries
walks from the first block of keys that it may see to the last; here segment 2 begins at column 8:

    keys       0-3   4-7   8-11
    queries 0-3  x                   nothing beyond the largest ``span_end`` of the block
            4-7  x     x
            8-11             x       nothing whose segments lie outside of the block's smallest and largest

Every pair is masked by its own segment and ``span_end`` as well: which blocks are walked over decides the time only,
least where segments ascend along the row. On CPUs this beats all scores at once, since a block stays in the cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from phivision_jax.models.attention.partition import by_device
from phivision_jax.models.remat import ATTENTION, name

BLOCK = 256
"""Most columns of a block, of queries and of keys: a row is cut into as few equal blocks as that allows. Scores of four
heads' queries, 1024 × 256, stay in a core's cache, and two cores can share a product of that size."""

MASKED = -1e30
"""Score of what a query may not see. Large and finite: infinities would make NaN of their differences."""

# Running maximum before the first key. Above MASKED, so that a masked score weighs exp(-1e30) = 0 from the start.
_LOWEST = -1e20

_NO_SEGMENT = 2**30

type _Residuals = tuple[jax.Array, ...]


def blockwise(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K H"],
    segment_ids: Int32[Array, "*B T"],
    kv_segment_ids: Int32[Array, "*B S"],
    span_end: Int32[Array, "*B T"],
    *,
    axes: tuple[str | None, ...] = ("batch", "length", "heads"),
    block: int = BLOCK,
) -> Float[Array, "*B T N H"]:
    """Attention as ``models.attention.attend`` defines it; zero for padding (segment 0) and where no key is visible.

    Under a mesh each device takes its own rows, heads and queries, with all keys of the row (gathered along
    ``context``). Scores and sums are fp32. Differentiable in reverse mode only.

    Args:
      segment_ids: from 0 to 2^30; cheapest where they do not decrease along the row, padding last.
      axes: as in ``attend``.
      block: most columns of a block; rows need not be multiples of it.
    """
    lead = q.ndim - 3
    span_end = jnp.minimum(span_end, k.shape[-3] - 1)  # a last block of keys is filled with columns from S on

    def local(q, k, v, segments, span_end, kv_segments):
        sizes = _block_size(q.shape[-3], block), _block_size(k.shape[-3], block)
        rows = (x.reshape(-1, *x.shape[lead:]) for x in (q, k, v, segments, kv_segments, span_end))
        return _attention(*rows, sizes).reshape(q.shape)

    return by_device(local, q, k, v, (segment_ids, span_end), (kv_segment_ids,), axes=axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int32[Array, "B T"],
    kv_segments: Int32[Array, "B S"],
    span_end: Int32[Array, "B T"],
    sizes: tuple[int, int],
) -> Float[Array, "B T N H"]:
    return _forward(q, k, v, segments, kv_segments, span_end, sizes)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    kv_segments: jax.Array,
    span_end: jax.Array,
    sizes: tuple[int, int],
) -> tuple[jax.Array, _Residuals]:
    inputs = q, k, v, segments, kv_segments, span_end
    # One row at a time: under vmap every row would walk over the blocks of all rows.
    out, normaliser = jax.lax.map(lambda row: _row(sizes, *row), inputs)
    out, normaliser = name(out, ATTENTION), name(normaliser, ATTENTION)
    return out, (*inputs, out, normaliser)


def _backward(sizes: tuple[int, int], residuals: _Residuals, d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    d_q, d_k, d_v = jax.lax.map(lambda row: _row_backward(sizes, *row), (*residuals, d_out))
    return d_q, d_k, d_v, None, None, None


_attention.defvjp(_forward, _backward)


def _row(
    sizes: tuple[int, int],
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    segments: Int32[Array, " T"],
    kv_segments: Int32[Array, " S"],
    span_end: Int32[Array, " T"],
) -> tuple[Float[Array, "T N H"], Float[Array, "I K C"]]:
    """The result, and log Σ exp(score) of each query, in blocks (I blocks, K groups of C queries)."""
    (T, N, _), K = q.shape, k.shape[1]
    block, key_block = sizes
    queries, keys, values = _query_blocks(q, K, block), _key_blocks(k, key_block), _key_blocks(v, key_block)
    q_ids, k_ids = _id_blocks(_ids(segments), block), _id_blocks(kv_segments, key_block)
    spans = _id_blocks(span_end, block)

    def one(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, q_ids, span_end, first, last = args

        def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            scores = _scores(q, keys[j], q_ids, k_ids[j], span_end, j)
            new_top = jnp.maximum(top, scores.max(-1))
            weights, keep = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            seen = jnp.einsum("KCS,KSH->KCH", weights.astype(v.dtype), values[j], preferred_element_type=jnp.float32)
            return new_top, total * keep + weights.sum(-1), out * keep[..., None] + seen

        top, total = jnp.full(q.shape[:2], _LOWEST), jnp.zeros(q.shape[:2])
        top, total, out = jax.lax.fori_loop(first, last, step, (top, total, jnp.zeros(q.shape, jnp.float32)))
        total = jnp.where(total == 0, 1, total)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, normaliser = jax.lax.map(one, (queries, q_ids, spans, *_walks(q_ids, k_ids, spans)))
    return _from_query_blocks(out, T, N, block), normaliser


def _row_backward(
    sizes: tuple[int, int],
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    segments: Int32[Array, " T"],
    kv_segments: Int32[Array, " S"],
    span_end: Int32[Array, " T"],
    out: Float[Array, "T N H"],
    normaliser: Float[Array, "I K C"],
    d_out: Float[Array, "T N H"],
) -> tuple[Float[Array, "T N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """Gradients of q, k and v."""
    (T, N, H), (S, K, _) = q.shape, k.shape
    block, key_block = sizes
    queries, keys, values = _query_blocks(q, K, block), _key_blocks(k, key_block), _key_blocks(v, key_block)
    q_ids, k_ids = _id_blocks(_ids(segments), block), _id_blocks(kv_segments, key_block)
    spans = _id_blocks(span_end, block)
    # What a query's scores have in common: the softmax's gradient is weights · (d_weights - this).
    common = (d_out.astype(jnp.float32) * out).sum(-1)

    def one(carry: tuple[jax.Array, jax.Array], args: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        q, q_ids, span_end, first, last, d_out, common, normaliser = args

        def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            scores = _scores(q, keys[j], q_ids, k_ids[j], span_end, j)
            weights = jnp.exp(scores - normaliser[..., None])
            d_weights = jnp.einsum("KCH,KSH->KCS", d_out, values[j], preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - common[..., None])).astype(q.dtype)
            weights = weights.astype(v.dtype)
            d_v = d_v.at[j].add(jnp.einsum("KCS,KCH->KSH", weights, d_out, preferred_element_type=jnp.float32))
            d_k = d_k.at[j].add(jnp.einsum("KCS,KCH->KSH", d_scores, q, preferred_element_type=jnp.float32))
            d_q += jnp.einsum("KCS,KSH->KCH", d_scores, keys[j], preferred_element_type=jnp.float32)
            return d_q, d_k, d_v

        d_q, *carry = jax.lax.fori_loop(first, last, step, (jnp.zeros(q.shape, jnp.float32), *carry))
        return tuple(carry), (d_q * H**-0.5).astype(q.dtype)

    blocks = queries, q_ids, spans, *_walks(q_ids, k_ids, spans), _query_blocks(d_out, K, block)
    zeros = jnp.zeros(keys.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(one, (zeros, zeros), (*blocks, _query_blocks(common, K, block), normaliser))
    d_k, d_v = (jnp.swapaxes(x, 1, 2).reshape(-1, K, H)[:S] for x in (d_k * H**-0.5, d_v))
    return _from_query_blocks(d_q, T, N, block), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _scores(
    q: Float[Array, "K C H"],
    k: Float[Array, "K S H"],
    q_ids: Int32[Array, " Q"],
    k_ids: Int32[Array, " S"],
    span_end: Int32[Array, " Q"],
    j: Int32[Array, ""],
) -> Float[Array, "K C S"]:
    """fp32 scores of a block of queries (C = Q columns of every head of a group) and the j-th block of keys."""
    scores = jnp.einsum("KCH,KSH->KCS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    columns = j * len(k_ids) + jnp.arange(len(k_ids))
    visible = (q_ids[:, None] == k_ids) & (columns <= span_end[:, None])
    by_head = scores.reshape(len(scores), -1, *visible.shape)
    return jnp.where(visible, by_head, MASKED).reshape(scores.shape)


def _walks(
    q_ids: Int32[Array, "I Q"], k_ids: Int32[Array, "J S"], span_end: Int32[Array, "I Q"]
) -> tuple[Int32[Array, " I"], Int32[Array, " I"]]:
    """The first block of keys that a block of queries may see, and the one after the last; equal if there is none."""
    q_first, k_first = (jnp.where(ids > 0, ids, _NO_SEGMENT).min(1) for ids in (q_ids, k_ids))
    q_last, k_last = q_ids.max(1), k_ids.max(1)
    J, S = k_ids.shape
    may = (q_first[:, None] <= k_last) & (q_last[:, None] >= k_first)
    may &= jnp.arange(0, J * S, S) <= span_end.max(1)[:, None]
    first, last = may.argmax(1), J - may[:, ::-1].argmax(1)
    return first, jnp.where(may.any(1), last, first)


def _block_size(columns: int, block: int) -> int:
    return -(-columns // -(-columns // block))


def _ids(segments: Int32[Array, " T"]) -> Int32[Array, " T"]:
    """Segments of queries: padding's is one that no key has."""
    return jnp.where(segments == 0, -1, segments)


def _id_blocks(ids: Int32[Array, " T"], block: int) -> Int32[Array, "I Q"]:
    # The last column again, which lengthens no walk; keys beyond the row are masked by their columns.
    return jnp.pad(ids, (0, -len(ids) % block), mode="edge").reshape(-1, block)


def _filled(x: Float[Array, "T ..."], block: int) -> Float[Array, "I Q ..."]:
    """Zeros beyond the row: d_out of such a query changes no gradient."""
    return jnp.pad(x, ((0, -len(x) % block), *((0, 0),) * (x.ndim - 1))).reshape(-1, block, *x.shape[1:])


def _key_blocks(x: Float[Array, "S K H"], block: int) -> Float[Array, "J K S H"]:
    return jnp.swapaxes(_filled(x, block), 1, 2)


def _query_blocks(x: Float[Array, "T N ..."], K: int, block: int) -> Float[Array, "I K C ..."]:
    """The heads of a group below each other: C = N/K · block."""
    x = _filled(x, block)
    I, _, N, *rest = x.shape  # noqa: E741
    return jnp.moveaxis(x.reshape(I, block, K, N // K, *rest), 1, 3).reshape(I, K, -1, *rest)


def _from_query_blocks(x: Float[Array, "I K C H"], T: int, N: int, block: int) -> Float[Array, "T N H"]:
    I, K, _, H = x.shape  # noqa: E741
    return jnp.moveaxis(x.reshape(I, K, N // K, block, H), 3, 1).reshape(-1, N, H)[:T]
