"""The TPU kernel, interpreted on the CPU, against ``plain``: small rows and blocks, all kinds of packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from phivision_jax.models.attention.attend import attend, backend
from phivision_jax.models.attention.blockwise import plain
from phivision_jax.sharding import MESH_AXES, make_mesh
from tests.support.attention import arrays, by_plain

pytest.importorskip("tokamax")
from phivision_jax.models.attention.splash import Blocks, _block, _mask_info, splash

SMALL = Blocks(128, 128, 128, 128, 128, 128)


def packing(rng, B, T, images):
    """Segments of random lengths, padding after them, and a span_end with up to ``images`` images per row.

    The first image extends over the middle of the row, where blocks meet, if a segment does.
    """
    segments, span = np.zeros((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for b in range(B):
        ends = np.sort(rng.choice(np.arange(1, T + 1), size=4, replace=False))
        starts = [0, *ends[:-1]]
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            segments[b, start:end] = i + 1
        for n in range(images):
            i = rng.integers(4)
            lo, hi = np.sort(rng.integers(starts[i], ends[i], size=2))
            if n == 0 and (i := np.searchsorted(ends, T // 2, side="right")) < 4:
                lo, hi = max(starts[i], T // 2 - 20), min(ends[i] - 1, T // 2 + 20)
            if (span[b, lo : hi + 1] == np.arange(lo, hi + 1)).all():  # images do not overlap
                span[b, lo : hi + 1] = hi
    return jnp.asarray(segments), jnp.asarray(span)


@functools.cache
def with_grads(options):
    """``plain`` without options, else ``splash``; compiled once for all packings."""

    def loss(q, k, v, segments, span, weight):
        if options is None:
            out = by_plain(q, k, v, segments, span)
        else:
            out = splash(q, k, v, segment_ids=segments, span_end=span, blocks=options, interpret=True)
        return (out * weight).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def assert_equals_plain(q, k, v, segments, span, rng, blocks=SMALL):
    """Results outside padding within 1e-5 and gradients within 1e-4 of ``plain``; everything finite."""
    weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32) * (segments > 0)[..., None, None]
    want_grads, want = with_grads(None)(q, k, v, segments, span, weight)
    got_grads, got = with_grads(blocks)(q, k, v, segments, span, weight)
    assert np.isfinite(got).all()
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)


@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), images=st.sampled_from([0, 3]))
def test_splash_equals_plain_on_random_packings(seed, images):
    """The decoder: four query heads per key head; images across the borders of blocks, and several in one block."""
    rng = np.random.default_rng(seed)
    segments, span = packing(rng, 2, 256, images)
    assert_equals_plain(*arrays(rng, 2, 256, 4, 1, 8), segments, span, rng)


@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), full=st.booleans())
def test_splash_without_span_end(seed, full):
    """The vision tower: heads of 72, which do not divide a register; a last block filled after padding or a segment."""
    rng = np.random.default_rng(seed)
    segments, _ = packing(rng, 2, 250, 0)
    if full:
        segments = jnp.where(segments == 0, 5, segments)
    assert_equals_plain(*arrays(rng, 2, 250, 1, 1, 72), segments, None, rng)


@pytest.mark.slow
@pytest.mark.parametrize("T", [200, 300])
def test_splash_pads_rows_to_blocks(T):
    """Different blocks forward and backward, products smaller than blocks, and a last block to fill."""
    rng = np.random.default_rng(T)
    segments, span = packing(rng, 1, T, 2)
    blocks = Blocks(128, 256, 128, 256, 128, 128)
    assert_equals_plain(*arrays(rng, 1, T, 2, 1, 8), segments, span, rng, blocks)


def test_splash_skips_blocks_of_other_segments():
    """NaN in the keys of segment 1 would reach segment 2 through any product, masked or not.

    All blocks of the other row, which is one segment, are needed: each row must have its own list of blocks. Padding
    shares a block with segment 2, and must not make that block visit others.
    """
    rng = np.random.default_rng(0)
    q, k, v = arrays(rng, 2, 256, 4, 1, 8)
    segments = jnp.ones((2, 256), jnp.int32).at[0, 128:192].set(2).at[0, 192:].set(0)
    k, v = k.at[0, :128].set(jnp.nan), v.at[0, :128].set(jnp.nan)
    span = jnp.tile(jnp.arange(256), (2, 1))
    weight = jnp.ones(q.shape).at[0, :128].set(0)
    (dq, _, _), out = with_grads(SMALL)(q, k, v, segments, span, weight)
    assert np.isnan(out[0, :128]).all()
    assert np.isfinite(out[0, 128:]).all() and np.isfinite(out[1]).all()
    assert np.isfinite(dq[0, 128:]).all() and np.isfinite(dq[1]).all()


@pytest.mark.parametrize("C", [128, pytest.param(384, marks=pytest.mark.slow)])
def test_splash_with_context(C):
    """Keys of prefixes before the row's own: segments with a context, without one, and blocks that end in padding."""
    rng, T = np.random.default_rng(C), 256
    segments, span = packing(rng, 2, T, 3)
    context = np.zeros((2, C), np.int32)
    context[0, :50], context[0, 64:120], context[1, 100:128] = 1, 3, 2
    segments = segments.at[:, -20:].set(0)
    keys = jnp.concatenate([jnp.asarray(context), segments], axis=1)
    q, k, v = arrays(rng, 2, T, 4, 2, 8, C + T)
    form = functools.partial(splash, blocks=SMALL, interpret=True)
    got = jax.jit(form)(q, k, v, segment_ids=segments, kv_segment_ids=keys, span_end=span + C)
    want = plain(q, k, v, segments, keys, span + C)
    real = np.asarray(segments) > 0
    alone = by_plain(q, k[:, C:], v[:, C:], segments, span)
    assert np.isfinite(got).all() and not np.allclose(alone[real], want[real])
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-5)


def test_attend_chooses_splash():
    """For rows that fill a block, on a TPU or by ``backend``; traced only."""

    def kernel_in(T, **options):
        shapes = [jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)] * 3
        ids = np.ones((1, T), np.int32)
        return "pallas_call" in str(jax.make_jaxpr(lambda *x: attend(*x, segment_ids=ids, **options))(*shapes))

    assert not kernel_in(256)  # this is a CPU
    with backend("tpu"):
        assert kernel_in(256)
        assert not kernel_in(64)
        assert kernel_in(256, kv_segment_ids=np.ones((1, 256), np.int32))  # a context, of no length here
    device, auto = AbstractDevice("TPU v5", 1, "tpu"), (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert kernel_in(256)
        with backend("xla"):
            assert not kernel_in(256)


@pytest.mark.parametrize(
    "N, K", [(6, 3), pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_splash_on_mesh(N, K):
    """Rows, heads and queries split in two each: 3 key heads are repeated first, 2 are not, 3 query heads not split."""
    rng = np.random.default_rng(N)
    segments, span = packing(rng, 2, 256, 3)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})):
        assert_equals_plain(*arrays(rng, 2, 256, N, K, 8), segments, span, rng)


def test_mask_info_by_hand():
    """Blocks of 2 queries and 2 keys; positions 1-4 are an image.

    span_end  0 4 | 4 4 | 4 5      keys      0 1 | 2 3 | 4 5
                                   queries 0-1  1     1     1      the first query sees key 0 only, the second 0-4
                                           2-3  2     2     1
                                           4-5  2     2     1
    """
    info = _mask_info(jnp.asarray([0, 4, 4, 4, 4, 5]), 6, 2, 2, False)
    assert info.block_mask.tolist() == [[1, 1, 1], [2, 2, 1], [2, 2, 1]]
    causal = _mask_info(jnp.arange(6), 6, 2, 2, False)
    assert causal.block_mask.tolist() == [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    backward = _mask_info(jnp.arange(6), 6, 2, 2, True)  # keys first
    assert backward.block_mask.tolist() == [[1, 2, 2], [0, 1, 2], [0, 0, 1]]


@pytest.mark.parametrize(
    "length, size", [(8192, 1024), (512, 512), (130, 256), (1536, 1024), (1000, 1024), (2200, 1024), (600, 1024)]
)
def test_block_size(length, size):
    assert _block(length, 1024, 512) == size


def test_splash_rounds_scale_once():
    """In bf16 the factors H^-1/2 and log2(e) are off by up to 0.3 %, and with them the temperature of every softmax.

    With v = identity the result is the softmax itself, whose logarithm has slope 1 over the scores.
    """
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 128, 1, 128)), jnp.bfloat16) for _ in range(2))
    v = jnp.eye(128, dtype=jnp.bfloat16)[None, :, None]
    got = splash(q, k, v, segment_ids=jnp.ones((1, 128), jnp.int32), blocks=SMALL, interpret=True)
    scores = jnp.einsum("BTNH,BSNH->TS", q, k, preferred_element_type=jnp.float32) * 128**-0.5
    scores -= scores.mean(1, keepdims=True)
    slope = (jnp.log(got[0, :, 0].astype(jnp.float32)) * scores).sum() / (scores**2).sum()
    assert abs(float(slope) - 1) < 5e-4, slope
