"""Attention on GPUs: its masks and gradients against ``plain``, and its kernels as far as they need no GPU.

Where results are compared, tokamax's reference replaces the kernels: it computes the same function of the same masks,
with the same residuals, on any backend. The kernels are lowered to GPU programs, which are not run.
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
from phivision_jax.models.remat import checkpoint
from phivision_jax.sharding import MESH_AXES, make_mesh, partition_spec
from tests.support.attention import arrays, assert_alike, by_plain, packing, with_gradients

base = pytest.importorskip("tokamax._src.ops.attention.base")


@pytest.fixture
def reference(monkeypatch):
    operations = base.DotProductAttention(), base.DotProductAttentionVjp()
    monkeypatch.setattr(module, "_operations", lambda: operations)


@dataclasses.dataclass(frozen=True)
class Chip:
    compute_capability: str
    platform: str = "gpu"
    core_count: int = 132
    device_kind: str = "NVIDIA H100 80GB HBM3"


def chip(monkeypatch, capability="9.0"):
    """Make JAX's default device such a GPU, as far as lowering is concerned."""
    monkeypatch.setattr(jax_backend, "get_default_device", lambda: Chip(capability))


def by_flash(q, k, v, segments, span):
    return flash(q, k, v, segment_ids=segments, span_end=span)


def test_visible_keys_by_hand():
    segments, span = jnp.asarray([[1, 1, 1, 1, 2, 0, 0]]), jnp.asarray([[0, 2, 2, 3, 4, 5, 6]])
    first, past = visible_keys(segments, span)
    assert (first.tolist(), past.tolist()) == ([[0, 0, 0, 0, 4, 5, 6]], [[1, 3, 3, 4, 5, 6, 7]])
    first, past = visible_keys(segments, None)
    assert (first.tolist(), past.tolist()) == ([[0, 0, 0, 0, 4, 5, 6]], [[4, 4, 4, 4, 5, 6, 7]])


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**16),
    T=st.sampled_from([4, 5, 16, 37]),
    mode=st.sampled_from(["causal", "bidirectional", "unlimited"]),
)
def test_visible_keys_equal_mask(seed, T, mode):
    segments, span = packing(np.random.default_rng(seed), 3, T, mode == "bidirectional", ascending=False)
    first, past = visible_keys(segments, None if mode == "unlimited" else span)
    position = np.arange(T)
    found = (first[..., None] <= position) & (position < past[..., None])
    visible = segments[:, :, None] == segments[:, None, :]
    if mode != "unlimited":
        visible &= position <= span[..., None]
    visible = jnp.where((segments == 0)[..., None], np.eye(T, dtype=bool), visible)
    np.testing.assert_array_equal(found, visible)


@pytest.mark.parametrize("mode", ["causal", "bidirectional", "unlimited"])
@pytest.mark.parametrize("heads, H", [((4, 1), 8), ((4, 2), 16), ((2, 2), 72)])
def test_flash_equals_plain(reference, heads, H, mode):
    rng = np.random.default_rng(H)
    segments, span = packing(rng, 3, 100, mode == "bidirectional", ascending=False)
    args = *arrays(rng, 3, 100, *heads, H), segments, None if mode == "unlimited" else span
    weight = rng.normal(size=(3, 100, heads[0], H))
    assert_alike(with_gradients(by_flash, weight, *args), with_gradients(by_plain, weight, *args))


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2, "context": 2}, {"data": 4, "tensor": 2}])
def test_flash_on_mesh(reference, shape, kv_heads):
    """Each device has its own rows, heads and queries; segments and images extend over the border of two devices."""
    rng = np.random.default_rng(7)
    segments, span = packing(rng, 4, 96, True, ascending=False)
    span = span.at[0, 40:56].set(55)
    segments = segments.at[0, 30:70].set(1000)
    args, weight = (*arrays(rng, 4, 96, 4, kv_heads, 8), segments, span), rng.normal(size=(4, 96, 4, 8))
    want = with_gradients(by_plain, weight, *args)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
        assert_alike(with_gradients(by_flash, weight, *jax.device_put(args, sharding)), want)


def test_flash_with_vision_rows(reference):
    """Inputs [B, R, P, N, H]."""
    rng = np.random.default_rng(8)
    segments, _ = packing(rng, 6, 50, False, ascending=False)
    want = by_plain(*(x := arrays(rng, 6, 50, 2, 2, 8)), segments, None)
    q, k, v, ids = (a.reshape(2, 3, *a.shape[1:]) for a in (*x, segments))
    got = flash(q, k, v, segment_ids=ids, axes=("batch", "vision_rows", None, "patch_heads")).reshape(want.shape)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def gradient(policy, B=1, T=1024, N=4, K=2, H=128, span=True):
    """The gradient of a layer with ``attend``, traced."""
    positions = jnp.tile(jnp.arange(T), (B, 1))

    def loss(q, k, v, ids):
        def layer(q, k, v):
            return attend(jnp.sin(q), k, v, segment_ids=ids, span_end=positions if span else None)

        return checkpoint(layer, policy)(q, k, v).astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K, K)]
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, jax.ShapeDtypeStruct((B, T), jnp.int32))


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
@pytest.mark.parametrize(
    "widths", [{"N": 40, "K": 10, "H": 128}, {"N": 16, "K": 16, "H": 72, "span": False, "T": 1000}]
)
def test_kernels_lower_to_gpu_programs(monkeypatch, capability, widths):
    """For the decoder and the vision tower, on Hopper and Blackwell: one forward kernel, two backward."""
    chip(monkeypatch, capability)
    with backend("gpu"):
        text = gradient("attention", **widths).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


def test_kernels_run_on_each_devices_shard(monkeypatch):
    """Half of the rows, heads and queries, and all keys of these rows, by the shapes of the kernel's q and k."""
    chip(monkeypatch)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "context": 2})), backend("gpu"):
        text = gradient("attention", B=2, T=1024, N=4, K=2).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line.rsplit(" : ", 1)[1] for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 3
    assert calls[0].startswith("(tensor<512x2x128xbf16>, tensor<1024x1x128xbf16>, ")


@pytest.mark.parametrize("policy, calls", [("attention", 2), ("full", 3)])
def test_attention_policy_does_not_rerun_flash(monkeypatch, policy, calls):
    """The forward and the backward kernel; a second forward one only when nothing is kept."""
    chip(monkeypatch)
    with backend("gpu"):
        assert str(gradient(policy).jaxpr).count("custom_vjp_call[") == calls


def arrays_of(dtype=jnp.bfloat16, H=64):
    return [jnp.zeros((1, 128, 2, H), dtype)] * 3


def test_supported_by_device_dtype_and_head_dim(monkeypatch):
    assert not supported(*arrays_of())  # this is a CPU
    for capability, expected in (("8.0", False), ("9.0", True), ("10.3", True), ("12.0", False), ("gfx942", False)):
        chip(monkeypatch, capability)
        assert supported(*arrays_of()) == expected
    chip(monkeypatch)
    assert supported(*arrays_of(H=72)) and supported(*arrays_of(H=128))
    assert not supported(*arrays_of(H=32)) and not supported(*arrays_of(H=256))
    assert not supported(*arrays_of(jnp.float32)) and not supported(*arrays_of(jnp.float16))
    assert not supported(*arrays_of()[:2], jnp.zeros((1, 128, 2, 64)))


def test_supported_warns_without_tokamax(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'xprof'")

    with monkeypatch.context() as other:
        chip(other)
        other.setattr("phivision_jax.models.attention.flash.TOKAMAX", "9.9")
        with pytest.warns(match=r"in blocks, without the GPU kernels: .*pip install tokamax==9\.9"):
            assert not supported(*arrays_of())
    chip(monkeypatch)
    monkeypatch.setattr(module, "_operations", missing)
    with pytest.warns(match="in blocks, without the GPU kernels: No module named 'xprof'"):
        assert not supported(*arrays_of())
    chip(monkeypatch, "8.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning where kernels would not be used
        assert not supported(*arrays_of())


def test_attend_chooses_flash(monkeypatch):
    """For self-attention of rows that fill a block, on a supported GPU; traced only."""
    chip(monkeypatch)

    def kernels_in(T, dtype=jnp.bfloat16, **options):
        shapes = [jax.ShapeDtypeStruct((1, T, 2, 64), dtype)] * 3
        ids = np.ones((1, T), np.int32)
        return "mpmd_map" in str(jax.make_jaxpr(lambda *x: attend(*x, segment_ids=ids, **options))(*shapes))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels_in(256)  # JAX's own device is a CPU, and no mesh has another
        device, auto = AbstractDevice("NVIDIA H100", 132, "gpu"), (AxisType.Auto,) * len(MESH_AXES)
        mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, auto, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert kernels_in(256)
            assert not kernels_in(64)
            assert not kernels_in(256, jnp.float32)
            assert not kernels_in(256, kv_segment_ids=np.ones((1, 256), np.int32))  # a cache
            with backend("xla"):
                assert not kernels_in(256)
