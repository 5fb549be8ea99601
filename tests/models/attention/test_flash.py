"""The GPU's attention: what its kernels are told against ``plain``, and the kernels as far as no GPU is needed.

tokamax computes the same function on any backend, given the same masks and asked for the same residuals: it stands in
for the kernels where results are compared. The kernels are made into GPU programs, which are not run.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import backend as jax_backend
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from phivision_jax.models.attention import flash as module
from phivision_jax.models.attention.attend import attend, backend
from phivision_jax.models.attention.flash import flash, supported, visible_keys
from phivision_jax.models.attention.plain import plain
from phivision_jax.models.remat import checkpoint
from phivision_jax.sharding import MESH_AXES, make_mesh, partition_spec

base = pytest.importorskip("tokamax._src.ops.attention.base")


@pytest.fixture
def stand_in(monkeypatch):
    operations = base.DotProductAttention(), base.DotProductAttentionVjp()
    monkeypatch.setattr(module, "_operations", lambda: operations)


@dataclasses.dataclass(frozen=True)
class Chip:
    compute_capability: str
    platform: str = "gpu"
    core_count: int = 132
    device_kind: str = "NVIDIA H100 80GB HBM3"


def chip(monkeypatch, capability="9.0"):
    """JAX's default device is such a GPU, as far as programs are made for it."""
    monkeypatch.setattr(jax_backend, "get_default_device", lambda: Chip(capability))


def packing(rng, B, T, bidirectional):
    """Runs of 1 to T/2 columns in any order, padding anywhere between them, and up to one image in each."""
    segments, span = np.zeros((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for b in range(B):
        ids, start = list(rng.permutation(np.arange(1, T + 1))), 0
        while start < T:
            stop = min(start + int(rng.integers(1, T // 2)), T)
            if rng.random() < 0.8:
                segments[b, start:stop] = ids.pop()
                first, last = np.sort(rng.integers(start, stop, 2))
                if bidirectional:
                    span[b, first : last + 1] = last
            start = stop
    return jnp.asarray(segments), jnp.asarray(span)


def arrays(rng, B, T, N, K, H):
    return [jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K)]


def with_gradients(form, weight, *args):
    """Result and gradients, where queries are not padding."""

    def loss(q, k, v, segments, span):
        out = form(q, k, v, segments, span) * (segments > 0)[..., None, None]
        return (out * weight).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)


def by_flash(q, k, v, segments, span):
    return flash(q, k, v, segment_ids=segments, span_end=span)


def by_plain(q, k, v, segments, span):
    return plain(q, k, v, segments, segments, jnp.full_like(segments, q.shape[1]) if span is None else span)


def assert_alike(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_visible_columns_by_hand():
    segments, span = jnp.asarray([[1, 1, 1, 1, 2, 0, 0]]), jnp.asarray([[0, 2, 2, 3, 4, 5, 6]])
    first, past = visible_keys(segments, span)
    assert (first.tolist(), past.tolist()) == ([[0, 0, 0, 0, 4, 5, 6]], [[1, 3, 3, 4, 5, 6, 7]])
    first, past = visible_keys(segments, None)
    assert (first.tolist(), past.tolist()) == ([[0, 0, 0, 0, 4, 5, 6]], [[4, 4, 4, 4, 5, 6, 7]])


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**16),
    T=st.sampled_from([4, 5, 16, 37]),
    mode=st.sampled_from(["causal", "bidirectional", "whole"]),
)
def test_visible_columns_say_what_the_mask_says(seed, T, mode):
    segments, span = packing(np.random.default_rng(seed), 3, T, mode == "bidirectional")
    first, past = visible_keys(segments, None if mode == "whole" else span)
    column = np.arange(T)
    told = (first[..., None] <= column) & (column < past[..., None])
    visible = segments[:, :, None] == segments[:, None, :]
    if mode != "whole":
        visible &= column <= span[..., None]
    visible = jnp.where((segments == 0)[..., None], np.eye(T, dtype=bool), visible)
    np.testing.assert_array_equal(told, visible)


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "whole"])
@pytest.mark.parametrize("heads, H", [((4, 1), 8), ((4, 2), 16), ((2, 2), 72)])
def test_random_packings(stand_in, heads, H, mode):
    rng = np.random.default_rng(H)
    segments, span = packing(rng, 3, 100, mode == "bidirectional")
    args = *arrays(rng, 3, 100, *heads, H), segments, None if mode == "whole" else span
    weight = rng.normal(size=(3, 100, heads[0], H))
    assert_alike(with_gradients(by_flash, weight, *args), with_gradients(by_plain, weight, *args))


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2, "context": 2}, {"data": 4, "tensor": 2}])
def test_on_a_mesh(stand_in, shape, kv_heads):
    """Each device has its own rows, heads and columns; segments and images lie across the border of two devices."""
    rng = np.random.default_rng(7)
    segments, span = packing(rng, 4, 96, True)
    span = span.at[0, 40:56].set(55)
    segments = segments.at[0, 30:70].set(1000)
    args, weight = (*arrays(rng, 4, 96, 4, kv_heads, 8), segments, span), rng.normal(size=(4, 96, 4, 8))
    want = with_gradients(by_plain, weight, *args)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        axes = "batch", "length"
        placed = [jax.device_put(x, NamedSharding(mesh, partition_spec(axes))) for x in args]
        assert_alike(with_gradients(by_flash, weight, *placed), want)


def test_leading_axes(stand_in):
    """Vision rows: [B, R, P, N, H]."""
    rng = np.random.default_rng(8)
    segments, _ = packing(rng, 6, 50, False)
    want = by_plain(*(x := arrays(rng, 6, 50, 2, 2, 8)), segments, None)
    q, k, v, ids = (a.reshape(2, 3, *a.shape[1:]) for a in (*x, segments))
    got = flash(q, k, v, segment_ids=ids, axes=("batch", "vision_rows", None, "patch_heads")).reshape(want.shape)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def gradient(policy, B=1, T=1024, N=4, K=2, H=128, span=True):
    """The gradient of a layer with ``attend``, traced."""

    columns = jnp.tile(jnp.arange(T), (B, 1))

    def loss(q, k, v, ids):
        def layer(q, k, v):
            return attend(jnp.sin(q), k, v, segment_ids=ids, span_end=columns if span else None)

        return checkpoint(layer, policy)(q, k, v).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K, K)]
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, jax.ShapeDtypeStruct((B, T), jnp.int32))


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
@pytest.mark.parametrize(
    "widths", [{"N": 40, "K": 10, "H": 128}, {"N": 16, "K": 16, "H": 72, "span": False, "T": 1000}]
)
def test_kernels_become_programs(monkeypatch, capability, widths):
    """The decoder's and the tower's, for Hopper and Blackwell: one forward, two backward."""
    chip(monkeypatch, capability)
    with backend("gpu"):
        text = gradient("attention", **widths).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


def test_each_device_has_kernels_for_its_own_part(monkeypatch):
    """Half of the rows, heads and queries, with all keys of its rows: the forward kernel's q and k by their shapes."""
    chip(monkeypatch)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})), backend("gpu"):
        text = gradient("attention", B=2, T=1024, N=4, K=2).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line.rsplit(" : ", 1)[1] for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 3
    assert calls[0].startswith("(tensor<512x2x128xbf16>, tensor<1024x1x128xbf16>, ")


@pytest.mark.parametrize("policy, calls", [("attention", 2), ("full", 3)])
def test_what_is_kept_is_not_made_twice(monkeypatch, policy, calls):
    """The forward kernel and the backward one; forward once more only where nothing is kept."""
    chip(monkeypatch)
    with backend("gpu"):
        assert str(gradient(policy).jaxpr).count("custom_vjp_call[") == calls


def arrays_of(dtype=jnp.bfloat16, H=64):
    return [jnp.zeros((1, 128, 2, H), dtype)] * 3


def test_what_the_kernels_take(monkeypatch):
    assert not supported(*arrays_of())  # this is a CPU
    for capability, there in (("8.0", False), ("9.0", True), ("10.3", True), ("12.0", False), ("gfx942", False)):
        chip(monkeypatch, capability)
        assert supported(*arrays_of()) == there
    chip(monkeypatch)
    assert supported(*arrays_of(H=72)) and supported(*arrays_of(H=128))
    assert not supported(*arrays_of(H=32)) and not supported(*arrays_of(H=256))
    assert not supported(*arrays_of(jnp.float32)) and not supported(*arrays_of(jnp.float16))
    assert not supported(*arrays_of()[:2], jnp.zeros((1, 128, 2, 64)))


def test_without_tokamax_there_are_blocks_and_a_warning(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'xprof'")

    with monkeypatch.context() as other:
        chip(other)
        other.setattr("phivision_jax.models.attention.tokamax_version.TOKAMAX", "9.9")
        with pytest.warns(match=r"in blocks, without the GPU kernels: .*pip install tokamax==9\.9"):
            assert not supported(*arrays_of())
    chip(monkeypatch)
    monkeypatch.setattr(module, "_operations", missing)
    with pytest.warns(match="in blocks, without the GPU kernels: No module named 'xprof'"):
        assert not supported(*arrays_of())
    chip(monkeypatch, "8.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing where nothing would be used
        assert not supported(*arrays_of())


def test_attend_takes_the_kernels_where_it_should(monkeypatch):
    """For self-attention of rows that fill a block, on such a GPU; traced only."""
    chip(monkeypatch)

    def kernels_in(T, dtype=jnp.bfloat16, **options):
        shapes = [jax.ShapeDtypeStruct((1, T, 2, 64), dtype)] * 3
        ids = np.ones((1, T), np.int32)
        return "mpmd_map" in str(jax.make_jaxpr(lambda *x: attend(*x, segment_ids=ids, **options))(*shapes))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels_in(256)  # the mesh's device decides, and JAX's own is a CPU
        device, auto = AbstractDevice("NVIDIA H100", 132, "gpu"), (AxisType.Auto,) * len(MESH_AXES)
        mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, auto, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert kernels_in(256)
            assert not kernels_in(64)
            assert not kernels_in(256, jnp.float32)
            assert not kernels_in(256, kv_segment_ids=np.ones((1, 256), np.int32))  # a cache
            with backend("xla"):
                assert not kernels_in(256)
