"""``attend`` against attention written as loops over what a query may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.models.attention import attend, backend, chunked, plain


def by_loops(q, k, v, visible):
    """[B, T, N, H] in float64; ``visible(b, t, s)`` says whether query t of row b sees key s."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(k.shape[1]) if visible(b, t, s)]
        scores = np.array([q[b, t, n] @ k[b, s, n // group] for s in seen]) / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ np.array([v[b, s, n // group] for s in seen]) / weights.sum()
    return out


def arrays(rng, B, T, N, K, H, S=None):
    shapes = (B, T, N, H), (B, S or T, K, H), (B, S or T, K, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2]),
    bidirectional=st.booleans(),
)
def test_random_packings(seed, lengths, kv_heads, group, bidirectional):
    rng = np.random.default_rng(seed)
    segments = np.repeat(np.arange(len(lengths) + 1), [*[0], *lengths])
    T = 17  # the most columns, and two of padding
    segments = np.pad(segments, (0, T - len(segments)))[None]
    span = np.arange(T)
    if bidirectional:  # each example begins with an image of half its length
        start = 0
        for n in lengths:
            span[start : start + n // 2] = start + max(n // 2, 1) - 1
            start += n
    q, k, v = arrays(rng, 1, T, kv_heads * group, kv_heads, 4)
    got = attend(q, k, v, segment_ids=jnp.asarray(segments), span_end=jnp.asarray(span[None]))
    want = by_loops(q, k, v, lambda b, t, s: segments[b, t] == segments[b, s] and s <= span[t])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_without_span_a_segment_sees_itself_whole():
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0]])
    q, k, v = arrays(rng, 2, 6, 2, 2, 8)
    got = attend(q, k, v, segment_ids=jnp.asarray(segments))
    want = by_loops(q, k, v, lambda b, t, s: segments[b, t] == segments[b, s])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_keys_may_have_columns_of_their_own():
    """A cache: one query at column 3 of 5, whose row's column 1 is padding."""
    rng = np.random.default_rng(1)
    kv_segments = np.array([[1, 0, 1, 1, 0]])
    q, k, v = arrays(rng, 1, 1, 4, 2, 4, S=5)
    got = attend(
        q,
        k,
        v,
        segment_ids=jnp.ones((1, 1), int),
        kv_segment_ids=jnp.asarray(kv_segments),
        span_end=jnp.asarray([[3]]),
    )
    want = by_loops(q, k, v, lambda b, t, s: kv_segments[b, s] == 1 and s <= 3)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("T, chunk", [(7, 4), (12, 4)])
def test_chunks_change_nothing(T, chunk):
    """Results and gradients, whether or not the chunk divides the row; the keys are columns of their own."""
    rng = np.random.default_rng(T)
    S = 9
    q, k, v = arrays(rng, 2, T, 4, 2, 4, S=S)
    masks = rng.integers(0, 3, size=(2, T)), rng.integers(0, 3, size=(2, S)), rng.integers(0, S, size=(2, T))
    weight = rng.normal(size=q.shape).astype(np.float32)

    def grads(form, **options):
        def loss(q, k, v):
            out = form(q, k, v, *map(jnp.asarray, masks), **options)
            return (out * weight).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for got, want in zip(jax.tree.leaves(grads(chunked, chunk=chunk)), jax.tree.leaves(grads(plain)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_long_rows_need_little_memory():
    """4096 columns: all scores at once are 64 MiB, 512 queries' are 8, and backward holds a few of those."""

    def temporary(form):
        def loss(q):
            return form(q).sum()

        q = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes / 2**20

    ids = jnp.ones((1, 4096), jnp.int32)
    assert temporary(lambda x: attend(x, x, x, segment_ids=ids, span_end=jnp.arange(4096)[None])) < 40
    assert temporary(lambda x: plain(x, x, x, ids, ids, ids)) > 64


def test_a_backend_that_does_not_exist():
    q = jnp.ones((1, 128, 1, 8))
    with backend("gpu"), pytest.raises(ValueError, match="'gpu'"):
        attend(q, q, q, segment_ids=jnp.ones((1, 128), jnp.int32))
