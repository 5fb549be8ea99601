"""``attend`` against loops over the keys that a query may see, and ``blockwise`` against ``plain``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from phivision_jax.models.attention.attend import attend, backend
from phivision_jax.models.attention.blockwise import _walks, blockwise, plain
from phivision_jax.models.remat import checkpoint
from phivision_jax.sharding import make_mesh, partition_spec
from tests.support.attention import arrays, assert_alike, by_plain, packing, with_gradients


def by_loops(q, k, v, visible):
    """Attention [B, T, N, H] in float64; ``visible(b, t, s)``: query t of row b sees key s."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(k.shape[1]) if visible(b, t, s)]
        scores = np.array([q[b, t, n] @ k[b, s, n // group] for s in seen]) / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ np.array([v[b, s, n // group] for s in seen]) / weights.sum()
    return out


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2]),
    bidirectional=st.booleans(),
)
def test_attend_equals_loops_on_random_packings(seed, lengths, kv_heads, group, bidirectional):
    rng = np.random.default_rng(seed)
    segments = np.repeat(np.arange(len(lengths) + 1), [*[0], *lengths])
    T = 17  # the most positions, and two of padding
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


def random_trees(rng, B, T):
    """``last_query`` [B, T] of rows in which each position may be the last of several branches that began before it."""
    last = np.full((B, T), T)
    for row in last:
        open_ = []
        for t in range(T):
            if open_ and rng.random() < 0.3:  # the newest branches end before t
                keep = rng.integers(len(open_))
                row[open_[keep:]] = t - 1
                del open_[keep:]
            open_.append(t)
    return last


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), context=st.integers(0, 5))
def test_attend_equals_loops_on_random_trees(seed, context):
    """Two segments, branches in each, and keys before the row that all of a segment see."""
    rng, T = np.random.default_rng(seed), 12
    segments = np.repeat([[1, 2, 0]], [6, 4, 2], 1)
    keys = np.concatenate([rng.integers(0, 3, (1, context)), segments], 1)
    last = np.concatenate([np.full((1, context), T), random_trees(rng, 1, T)], 1)
    span = np.arange(context, context + T)[None]
    q, k, v = arrays(rng, 1, T, 4, 2, 4, S=context + T)
    ids = {"segment_ids": segments, "kv_segment_ids": keys, "span_end": span, "last_query": last}
    got = attend(q, k, v, **{name: jnp.asarray(x) for name, x in ids.items()})
    want = by_loops(q, k, v, lambda _, t, s: segments[0, t] == keys[0, s] and s <= span[0, t] and t <= last[0, s])
    np.testing.assert_allclose(got[:, :10], want[:, :10], atol=1e-5)


def test_attend_without_span_end_sees_entire_segment():
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0]])
    q, k, v = arrays(rng, 2, 6, 2, 2, 8)
    got = attend(q, k, v, segment_ids=jnp.asarray(segments))
    want = by_loops(q, k, v, lambda b, t, s: segments[b, t] == segments[b, s])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_attend_with_cache():
    """One query at entry 3 of 5, in a row whose entry 1 is padding."""
    rng = np.random.default_rng(1)
    kv_segments = np.array([[1, 0, 1, 1, 0]])
    q, k, v = arrays(rng, 1, 1, 4, 2, 4, S=5)
    segments, span = jnp.ones((1, 1), int), jnp.asarray([[3]])
    got = attend(q, k, v, segment_ids=segments, kv_segment_ids=jnp.asarray(kv_segments), span_end=span)
    want = by_loops(q, k, v, lambda b, t, s: kv_segments[b, s] == 1 and s <= 3)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.isfinite(got).all()


def assert_equals_plain(form, rng, *args):
    """Result and gradients of ``form`` are those of ``plain``."""
    weight = rng.normal(size=args[0].shape)
    assert_alike(with_gradients(form, weight, *args), with_gradients(plain, weight, *args))


@pytest.mark.parametrize("span_mode", ["causal", "bidirectional", "unlimited"])
@pytest.mark.parametrize("T, ascending, heads", [(300, True, (4, 2)), (64, False, (3, 1)), (45, False, (2, 2))])
def test_blockwise_equals_plain(T, ascending, heads, span_mode):
    """Results and gradients, for rows that the block divides or not, and segments in any order."""
    rng = np.random.default_rng(T)
    segments, span = packing(rng, 3, T, span_mode == "bidirectional", ascending)
    if span_mode == "unlimited":
        span = jnp.full_like(segments, T + 9)  # beyond the row, where the last block is padded
    args = *arrays(rng, 3, T, *heads, 8), segments, segments, span
    assert_equals_plain(functools.partial(blockwise, block=128 if T > 256 else 16), rng, *args)


@pytest.mark.parametrize("T", [300, 64, 45])
def test_blockwise_equals_plain_on_trees(T):
    rng = np.random.default_rng(T)
    segments, span = packing(rng, 3, T, True, True)
    args = *arrays(rng, 3, T, 4, 2, 8), segments, segments, span, jnp.asarray(random_trees(rng, 3, T))
    assert_equals_plain(functools.partial(blockwise, block=64 if T > 256 else 16), rng, *args)


@pytest.mark.parametrize("T, S, sizes", [(300, 300, (100, 100)), (128, 129, (128, 65)), (1, 150, (1, 75))])
def test_blockwise_uses_equal_blocks(T, S, sizes, monkeypatch):
    """As few as hold at most 128 queries or keys each."""
    found = set()

    def walks(q_ids, k_ids, *others):
        found.add((q_ids.shape[1], k_ids.shape[1]))
        return _walks(q_ids, k_ids, *others)

    monkeypatch.setattr("phivision_jax.models.attention.blockwise._walks", walks)
    rng = np.random.default_rng(8)
    q, _, _ = arrays(rng, 2, T, 2, 1, 8)
    _, k, v = arrays(rng, 2, S, 2, 1, 8)
    segments, keys = (jnp.ones((2, n), jnp.int32) for n in (T, S))
    span = jnp.asarray(np.tile(np.arange(S - T, S), (2, 1)), jnp.int32)
    assert_equals_plain(blockwise, rng, q, k, v, segments, keys, span)
    assert found == {sizes}


def test_blockwise_with_cache():
    """A long prompt behind a cache: more keys than queries, and empty entries from 29 on."""
    rng = np.random.default_rng(3)
    segments = jnp.ones((2, 20), int)
    kv_segments = jnp.asarray(np.repeat([[0, 1, 0]], 2, 0).repeat([4, 25, 12], 1))
    span = jnp.asarray(np.tile(np.arange(9, 29), (2, 1)))
    args = *arrays(rng, 2, 20, 4, 2, 4, S=41), segments, kv_segments, span
    assert_equals_plain(functools.partial(blockwise, block=8), rng, *args)


def test_blockwise_padding_is_zero_without_gradient():
    rng = np.random.default_rng(4)
    segments = jnp.asarray([[1] * 10 + [0] * 30])
    q, k, v = arrays(rng, 1, 40, 2, 1, 4)
    form = functools.partial(blockwise, block=8)
    out, pull = jax.vjp(lambda *x: form(*x, segments, segments, jnp.arange(40)[None]), q, k, v)
    assert (out[:, 10:] == 0).all()
    for grad in pull(jnp.ones_like(out).at[:, :10].set(0)):
        assert (grad == 0).all()


def test_blockwise_with_large_scores():
    """Scores of ±1000, where exp overflows unless the largest is subtracted; the largest comes last."""
    rng = np.random.default_rng(5)
    q, k, v = arrays(rng, 1, 48, 2, 2, 4)
    k *= jnp.linspace(1, 500, 48, dtype=jnp.float32)[None, :, None, None]
    segments, span = jnp.ones((1, 48), int), jnp.arange(48)[None]
    got = blockwise(q, k, v, segments, segments, span, block=8)
    np.testing.assert_allclose(got, plain(q, k, v, segments, segments, span), atol=1e-5)


def test_blockwise_bf16_is_as_accurate_as_plain():
    """Both round the inputs of products and sum in fp32, so their errors against fp32 are similar."""
    rng = np.random.default_rng(6)
    segments, span = packing(rng, 2, 300, True)
    x, weight = arrays(rng, 2, 300, 4, 2, 8), rng.normal(size=(2, 300, 4, 8)).astype(np.float32)
    low = [jnp.asarray(a, jnp.bfloat16) for a in x]
    want = with_gradients(plain, weight, *[a.astype(jnp.float32) for a in low], segments, segments, span)

    def error(form):
        leaves = jax.tree.leaves(with_gradients(form, weight, *low, segments, segments, span))
        assert [a.dtype for a in leaves] == [jnp.bfloat16] * 4
        return [np.abs(np.asarray(a, np.float32) - b).max() for a, b in zip(leaves, jax.tree.leaves(want), strict=True)]

    for ours, reference in zip(error(blockwise), error(plain), strict=True):
        assert ours < 1.5 * reference


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2, "context": 2}, {"data": 4, "tensor": 2}])
def test_attend_on_mesh(shape, kv_heads):
    """Each device has its own rows, heads and queries; images extend over the border between two devices."""
    rng = np.random.default_rng(7)
    segments, span = packing(rng, 4, 300, True)
    args, weight = (*arrays(rng, 4, 300, 4, kv_heads, 8), segments, span), rng.normal(size=(4, 300, 4, 8))

    def form(q, k, v, ids, span):
        return attend(q, k, v, segment_ids=ids, span_end=span)

    want = with_gradients(by_plain, weight, *args)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
        assert_alike(with_gradients(form, weight, *jax.device_put(args, sharding)), want)


def test_attend_to_trees_on_mesh():
    """Queries are split over devices, and numbered over all of them."""
    rng = np.random.default_rng(7)
    segments, span = packing(rng, 4, 300, True)
    last = jnp.asarray(random_trees(rng, 4, 300))
    q, k, v = arrays(rng, 4, 300, 4, 2, 8)

    def form(q, k, v):
        return attend(q, k, v, segment_ids=segments, span_end=span, last_query=last)

    want = plain(q, k, v, segments, segments, span, last) * (segments > 0)[..., None, None]
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})):
        np.testing.assert_allclose(jax.jit(form)(q, k, v), want, atol=1e-5)


def test_attend_with_vision_rows():
    """Inputs [B, R, P, N, H]."""
    rng = np.random.default_rng(8)
    segments, _ = packing(rng, 6, 300, False)
    q, k, v = (x.reshape(2, 3, *x.shape[1:]) for x in arrays(rng, 6, 300, 2, 2, 4))
    ids = segments.reshape(2, 3, 300)
    got = attend(q, k, v, segment_ids=ids, axes=("batch", "vision_rows", None, "patch_heads"))
    want = jax.vmap(plain)(q, k, v, ids, ids, jnp.full_like(ids, 299))
    np.testing.assert_allclose(got * (ids > 0)[..., None, None], want * (ids > 0)[..., None, None], atol=1e-5)


def test_walks_end_after_last_visible_block():
    """Two examples of two blocks each, the last of them half padding, then a block of padding."""
    segments = jnp.asarray([1] * 8 + [2] * 6 + [0] * 6).reshape(-1, 4)
    ids, positions = jnp.where(segments == 0, -1, segments), jnp.arange(20).reshape(-1, 4)
    for span, ends in ((positions, [1, 2, 3, 4]), (jnp.full_like(positions, 19), [2, 2, 4, 4])):
        first, last = _walks(ids, segments, span)
        assert (first[:4].tolist(), last[:4].tolist()) == ([0, 0, 2, 2], ends)
        assert first[4] == last[4]


def test_walks_cover_visible_blocks():
    """300 rows of 4 blocks of 3: segments, padding and spans in any order, some spans ending where a block begins."""
    rng = np.random.default_rng(9)
    k_ids = rng.choice([0, 1, 2, 3], (300, 4, 3), p=[0.1, 0.4, 0.4, 0.1])
    q_ids = np.where(k_ids == 0, -1, k_ids)
    spans, positions = rng.integers(0, 12, (300, 4, 3)), np.arange(12).reshape(4, 3)
    visible = q_ids[:, :, :, None, None] == k_ids[:, None, None]  # [rows, i, t, j, s]
    visible = (visible & (positions <= spans[..., None, None])).any((2, 4))
    first, last = (np.asarray(x)[..., None] for x in jax.vmap(_walks)(q_ids, k_ids, spans))
    assert ((first <= np.arange(4)) & (np.arange(4) < last))[visible].all()


def test_walks_skip_branches_that_have_ended():
    """One segment of four blocks: a trunk, three branches behind it, and the same where the trunk has ended, too."""
    positions = jnp.arange(16).reshape(4, 4)
    last_query = jnp.asarray([15] * 4 + [7] * 4 + [11] * 4 + [15] * 4).reshape(4, 4)
    ones = jnp.ones((4, 4), int)
    for trunk, begins in ((15, [0, 0, 0, 0]), (3, [0, 1, 2, 3])):
        first, last = _walks(ones, ones, positions, positions, last_query.at[0].set(trunk))
        assert (first.tolist(), last.tolist()) == (begins, [1, 2, 3, 4])


def test_attention_policy_does_not_rerun_blockwise():
    """The backward pass has one walk (for d_q, d_k, d_v); without kept results it repeats the forward one."""

    def loops(policy):
        def layer(x, _):
            return attend(x, x, x, segment_ids=jnp.ones((1, 300), jnp.int32), span_end=jnp.arange(300)[None]), None

        def loss(x):
            return jax.lax.scan(checkpoint(layer, policy), x, length=2)[0].sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 300, 2, 8))))
        return text.count("while[")

    assert (loops("attention"), loops("full")) == (2, 3)


def test_attend_long_rows_need_little_memory():
    """4096 positions: all scores at once are 64 MiB; blocks need a few rows' worth of 128 KiB."""

    def temporary(form):
        def loss(q):
            return form(q).sum()

        q = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes / 2**20

    ids = jnp.ones((1, 4096), jnp.int32)
    assert temporary(lambda x: attend(x, x, x, segment_ids=ids, span_end=jnp.arange(4096)[None])) < 4
    assert temporary(lambda x: plain(x, x, x, ids, ids, ids)) > 64


def test_attend_rejects_unknown_backend():
    q = jnp.ones((1, 128, 1, 8))
    with backend("cuda"), pytest.raises(ValueError, match="'cuda'"):
        attend(q, q, q, segment_ids=jnp.ones((1, 128), jnp.int32))
