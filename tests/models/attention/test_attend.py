"""``attend`` against attention written as loops over what a query may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from phivision_jax.models.attention.attend import attend, backend
from phivision_jax.models.attention.blockwise import _walks, blockwise
from phivision_jax.models.attention.plain import plain
from phivision_jax.models.remat import checkpoint
from phivision_jax.sharding import make_mesh, partition_spec


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


def packing(rng, B, T, bidirectional, ascending=True):
    """Segments and span_end: examples of 1 to T/2 columns, images at random places in them, padding behind."""
    segments, span = np.zeros((B, T), int), np.tile(np.arange(T), (B, 1))
    for b in range(B):
        start, segment, end = 0, 1, T - int(rng.integers(1, T // 4))
        while start < end:
            stop = min(start + int(rng.integers(1, T // 2)), end)
            segments[b, start:stop] = segment
            first, last = np.sort(rng.integers(start, stop, 2))
            if bidirectional:
                span[b, first : last + 1] = last
            start, segment = stop, segment + 1
        if not ascending:
            segments[b] = rng.permutation(segment)[segments[b]]  # padding anywhere, segments in any order
    return jnp.asarray(segments), jnp.asarray(span)


def grads(form, q, k, v, segments, kv_segments, span, weight):
    """Result and gradients, where queries are not padding."""

    def loss(q, k, v):
        out = form(q, k, v, segments, kv_segments, span) * (segments > 0)[..., None, None]
        return (out * weight).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def assert_alike(got, want, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


@pytest.mark.parametrize("span_mode", ["causal", "bidirectional", "whole"])
@pytest.mark.parametrize("T, ascending, heads", [(300, True, (4, 2)), (64, False, (3, 1)), (45, False, (2, 2))])
def test_blocks_change_nothing(T, ascending, heads, span_mode):
    """Results and gradients, whether or not the block divides the row, however segments lie."""
    rng = np.random.default_rng(T)
    segments, span = packing(rng, 3, T, span_mode == "bidirectional", ascending)
    if span_mode == "whole":
        span = jnp.full_like(segments, T + 9)  # beyond the row, where blocks are filled: nothing more to see
    args = *arrays(rng, 3, T, *heads, 8), segments, segments, span, rng.normal(size=(3, T, heads[0], 8))
    form = functools.partial(blockwise, block=128 if T > 256 else 16)
    assert_alike(grads(form, *args), grads(plain, *args), atol=1e-5)


@pytest.mark.parametrize("T, S, sizes", [(600, 600, (200, 200)), (256, 257, (256, 129)), (1, 300, (1, 150))])
def test_rows_are_cut_into_equal_blocks(T, S, sizes, monkeypatch):
    """As few as hold at most 256 columns each."""
    found = set()

    def walks(q_ids, k_ids, span_end):
        found.add((q_ids.shape[1], k_ids.shape[1]))
        return _walks(q_ids, k_ids, span_end)

    monkeypatch.setattr("phivision_jax.models.attention.blockwise._walks", walks)
    rng = np.random.default_rng(8)
    q, _, _ = arrays(rng, 2, T, 2, 1, 8)
    _, k, v = arrays(rng, 2, S, 2, 1, 8)
    segments, keys = (jnp.ones((2, n), jnp.int32) for n in (T, S))
    span = jnp.asarray(np.tile(np.arange(S - T, S), (2, 1)), jnp.int32)
    args = q, k, v, segments, keys, span, rng.normal(size=(2, T, 2, 8))
    assert_alike(grads(blockwise, *args), grads(plain, *args), atol=1e-5)
    assert found == {sizes}


def test_blocks_where_keys_have_columns_of_their_own():
    """A long prompt behind a cache: more keys than queries, and none written beyond column 28."""
    rng = np.random.default_rng(3)
    segments = jnp.ones((2, 20), int)
    kv_segments = jnp.asarray(np.repeat([[0, 1, 0]], 2, 0).repeat([4, 25, 12], 1))
    span = jnp.asarray(np.tile(np.arange(9, 29), (2, 1)))
    args = *arrays(rng, 2, 20, 4, 2, 4, S=41), segments, kv_segments, span, rng.normal(size=(2, 20, 4, 4))
    assert_alike(grads(functools.partial(blockwise, block=8), *args), grads(plain, *args), atol=1e-5)


def test_padding_is_zero_and_moves_nothing():
    rng = np.random.default_rng(4)
    segments = jnp.asarray([[1] * 10 + [0] * 30])
    q, k, v = arrays(rng, 1, 40, 2, 1, 4)
    form = functools.partial(blockwise, block=8)
    out, pull = jax.vjp(lambda *x: form(*x, segments, segments, jnp.arange(40)[None]), q, k, v)
    assert (out[:, 10:] == 0).all()
    for grad in pull(jnp.ones_like(out).at[:, :10].set(0)):
        assert (grad == 0).all()


def test_scores_far_from_zero():
    """Scores of ±1000, where exp overflows unless the largest is taken off; the largest comes last."""
    rng = np.random.default_rng(5)
    q, k, v = arrays(rng, 1, 48, 2, 2, 4)
    k *= np.linspace(1, 500, 48, dtype=np.float32)[None, :, None, None]
    segments, span = jnp.ones((1, 48), int), jnp.arange(48)[None]
    got = blockwise(q, k, v, segments, segments, span, block=8)
    np.testing.assert_allclose(got, plain(q, k, v, segments, segments, span), atol=1e-5)


def test_blocks_in_bf16_are_as_good_as_plain():
    """Both round their inputs to products; sums are fp32: neither is further from fp32 than the other by much."""
    rng = np.random.default_rng(6)
    segments, span = packing(rng, 2, 300, True)
    x, weight = arrays(rng, 2, 300, 4, 2, 8), rng.normal(size=(2, 300, 4, 8)).astype(np.float32)
    low = [jnp.asarray(a, jnp.bfloat16) for a in x]
    want = grads(plain, *[a.astype(jnp.float32) for a in low], segments, segments, span, weight)

    def error(form):
        leaves = jax.tree.leaves(grads(form, *low, segments, segments, span, weight))
        assert [a.dtype for a in leaves] == [jnp.bfloat16] * 4
        return [np.abs(np.asarray(a, np.float32) - b).max() for a, b in zip(leaves, jax.tree.leaves(want), strict=True)]

    for blocks, whole in zip(error(blockwise), error(plain), strict=True):
        assert blocks < 1.5 * whole


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2, "context": 2}, {"data": 4, "tensor": 2}])
def test_on_a_mesh(shape, kv_heads):
    """Each device has its own rows, heads and columns; images lie across the border of two devices' columns."""
    rng = np.random.default_rng(7)
    segments, span = packing(rng, 4, 300, True)
    args = *arrays(rng, 4, 300, 4, kv_heads, 8), segments, segments, span, rng.normal(size=(4, 300, 4, 8))

    def form(q, k, v, ids, kv_ids, span):
        return attend(q, k, v, segment_ids=ids, span_end=span)

    want = grads(plain, *args)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        axes = "batch", "length", "heads"
        placed = [jax.device_put(x, NamedSharding(mesh, partition_spec(axes[: min(x.ndim, 2)]))) for x in args]
        assert_alike(grads(form, *placed), want, atol=1e-5)


def test_leading_axes():
    """Vision rows: [B, R, P, N, H]."""
    rng = np.random.default_rng(8)
    segments, _ = packing(rng, 6, 300, False)
    q, k, v = (x.reshape(2, 3, *x.shape[1:]) for x in arrays(rng, 6, 300, 2, 2, 4))
    ids = segments.reshape(2, 3, 300)
    got = attend(q, k, v, segment_ids=ids, axes=("batch", "vision_rows", None, "patch_heads"))
    want = jax.vmap(plain)(q, k, v, ids, ids, jnp.full_like(ids, 299))
    np.testing.assert_allclose(got * (ids > 0)[..., None, None], want * (ids > 0)[..., None, None], atol=1e-5)


def test_walks_end_where_nothing_is_visible():
    """Two examples of two blocks each, the last of them half padding, then a block of padding."""
    segments = jnp.asarray([1] * 8 + [2] * 6 + [0] * 6).reshape(-1, 4)
    ids, columns = jnp.where(segments == 0, -1, segments), jnp.arange(20).reshape(-1, 4)
    for span, ends in ((columns, [1, 2, 3, 4]), (jnp.full_like(columns, 19), [2, 2, 4, 4])):
        first, last = _walks(ids, segments, span)
        assert (first[:4].tolist(), last[:4].tolist()) == ([0, 0, 2, 2], ends)
        assert first[4] == last[4]


def test_walks_leave_out_nothing_that_is_visible():
    """300 rows of 4 blocks of 3: segments, padding and spans in any order, some spans ending where a block begins."""
    rng = np.random.default_rng(9)
    k_ids = rng.choice([0, 1, 2, 3], (300, 4, 3), p=[0.1, 0.4, 0.4, 0.1])
    q_ids = np.where(k_ids == 0, -1, k_ids)
    spans, columns = rng.integers(0, 12, (300, 4, 3)), np.arange(12).reshape(4, 3)
    visible = q_ids[:, :, :, None, None] == k_ids[:, None, None]  # [rows, I, Q, J, S]
    visible = (visible & (columns <= spans[..., None, None])).any((2, 4))
    first, last = (np.asarray(x)[..., None] for x in jax.vmap(_walks)(q_ids, k_ids, spans))
    assert ((first <= np.arange(4)) & (np.arange(4) < last))[visible].all()


def test_the_attention_policy_keeps_what_backward_needs():
    """Names inside of the forward: with them kept, backward has one walk (of d_q, d_k, d_v), not the forward's too."""

    def loops(policy):
        def layer(x, _):
            return attend(x, x, x, segment_ids=jnp.ones((1, 300), jnp.int32), span_end=jnp.arange(300)[None]), None

        def loss(x):
            return jax.lax.scan(checkpoint(layer, policy), x, length=2)[0].sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 300, 2, 8))))
        return text.count("while[")

    assert (loops("attention"), loops("full")) == (2, 3)


def test_long_rows_need_little_memory():
    """4096 columns: all scores at once are 64 MiB; blocks need a few rows' worth of 128 KiB."""

    def temporary(form):
        def loss(q):
            return form(q).sum()

        q = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes / 2**20

    ids = jnp.ones((1, 4096), jnp.int32)
    assert temporary(lambda x: attend(x, x, x, segment_ids=ids, span_end=jnp.arange(4096)[None])) < 4
    assert temporary(lambda x: plain(x, x, x, ids, ids, ids)) > 64


def test_a_backend_that_does_not_exist():
    q = jnp.ones((1, 128, 1, 8))
    with backend("cuda"), pytest.raises(ValueError, match="'cuda'"):
        attend(q, q, q, segment_ids=jnp.ones((1, 128), jnp.int32))
