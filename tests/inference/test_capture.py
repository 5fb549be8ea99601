"""Captured states and weights against a decoder written in NumPy; maps of weights against layouts known by hand."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from phivision_jax import sharding
from phivision_jax.images.layout import make_layout
from phivision_jax.inference import capture as capturing
from phivision_jax.inference.capture import capture, overlay, patch_maps
from phivision_jax.models import phivision
from phivision_jax.rows import batch_from_ids, expand
from tests.support import forward, image_layouts  # noqa: F401  registers layouts
from tests.support.batches import EXAMPLES, QUICK, TINY, random_rows

MESH = {"fsdp": 2, "tensor": 2, "context": 2}
QUERIES = np.array([[0, 7, 20], [31, 3, 12], [5, 5, 39]])


def batch_of(image_attention):
    config = dataclasses.replace(TINY, image_attention=image_attention)
    return random_rows(np.random.default_rng(3), config, [EXAMPLES[:2], EXAMPLES[2:4], EXAMPLES[3:5]], length=48)


def by_hand(model, batch):
    """Outputs [B, T, D] and weights [B, N, T, T] of each layer, in fp64 and loops over layers, rows and heads."""
    cfg = model.config.decoder
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.split()[1]["decoder"]["layers"])
    embeds = jax.jit(
        lambda params, batch: phivision.merge(model.split()[0], params).embeds(batch), compiler_options=QUICK
    )
    x = np.asarray(embeds(model.split()[1], batch), np.float64)
    B, T, _ = x.shape
    keys = np.arange(T)
    visible = batch.segment_ids[:, :, None] == batch.segment_ids[:, None]
    visible &= keys <= batch.span_end[:, :, None]
    turns = np.exp(
        1j * batch.positions[..., None] * cfg.rope_theta ** (-np.arange(cfg.head_dim // 2) * 2 / cfg.head_dim)
    )

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.rms_norm_eps) * scale

    def rotated(x):  # [B, T, H]
        a, b = np.split(x, 2, axis=-1)
        z = (a + 1j * b) * turns
        return np.concatenate([z.real, z.imag], -1)

    states, weights = [], []
    for i in range(cfg.num_layers):
        p = jax.tree.map(lambda x, i=i: x[i], params)
        h, attention, mlp = norm(x, p["input_layernorm"]["scale"]), p["self_attn"], p["mlp"]
        found = np.zeros((B, cfg.num_heads, T, T))
        for n in range(cfg.num_heads):
            k = n // (cfg.num_heads // cfg.num_kv_heads)
            query = rotated(h @ attention["q_proj"]["kernel"][:, n])
            key = rotated(h @ attention["k_proj"]["kernel"][:, k])
            scores = np.where(visible, query @ key.swapaxes(1, 2) / np.sqrt(cfg.head_dim), -np.inf)
            found[:, n] = np.exp(scores - scores.max(-1, keepdims=True))
            found[:, n] /= found[:, n].sum(-1, keepdims=True)
            x = x + found[:, n] @ (h @ attention["v_proj"]["kernel"][:, k]) @ attention["o_proj"]["kernel"][n]
        h = norm(x, p["post_attention_layernorm"]["scale"])
        gate = h @ mlp["gate_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"]
        states.append(x)
        weights.append(found)
    return states, weights


@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
def test_capture_equals_attention_by_hand(tiny, image_attention):
    batch = batch_of(image_attention)
    states, weights = by_hand(tiny, batch)
    layers = [1, 0]
    found = capture(tiny, batch, layers, QUERIES)
    rows = np.arange(3)[:, None]
    for got, layer in enumerate(layers):
        np.testing.assert_allclose(found.hidden[got], states[layer][rows, QUERIES], atol=2e-4, rtol=1e-4)
        want = weights[layer].swapaxes(1, 2)[rows, QUERIES].swapaxes(1, 2)  # [B, N, q, T]
        np.testing.assert_allclose(found.attention[got], want, atol=1e-5)
    assert found.attention.dtype == np.float32
    np.testing.assert_allclose(found.attention.sum(-1), 1, atol=1e-6)


def test_hidden_states_of_all_positions_equal_the_forward_pass(tiny):
    batch = batch_of("causal")
    found = capture(tiny, batch, [-1])
    assert found.attention is None and found.hidden.shape == (1, 3, 48, 32)
    logits = jax.jit(lambda x: tiny.decoder.lm_head(tiny.decoder.norm(x)), compiler_options=QUICK)(found.hidden[0])
    np.testing.assert_allclose(logits, forward.logits(*tiny.split(), batch), atol=1e-4)


def test_mask_modes_differ_in_what_image_tokens_see(tiny):
    causal, bidirectional = (batch_of(mode) for mode in ("causal", "bidirectional"))
    row, query = np.argwhere(causal.span_end < bidirectional.span_end)[0]
    later = []
    for batch in (causal, bidirectional):
        weights = capture(tiny, batch, [1, 0], np.full_like(QUERIES, query)).attention
        later.append(weights[1, row, :, 0, query + 1 :])
    assert (later[0] == 0).all() and (later[1].sum(-1) > 0).all()


def test_capture_on_a_mesh_equals_one_device(tiny):
    """Three rows do not divide over the axis of two."""
    batch = batch_of("bidirectional")
    want = capture(tiny, batch, [1, 0], QUERIES)
    graphdef, params = tiny.split()
    params = jax.device_put(params, sharding.param_shardings(phivision.abstract(TINY)[1], sharding.make_mesh(MESH)))
    got = capture(phivision.merge(graphdef, params), batch, [1, 0], QUERIES)
    assert len(got.attention.sharding.device_set) == 8
    np.testing.assert_allclose(got.hidden, want.hidden, atol=1e-4)
    np.testing.assert_allclose(got.attention, want.attention, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, pytest.param(MESH, marks=pytest.mark.slow)])
def test_memory_grows_with_the_length_of_the_row(mesh):
    """Scores of all queries would take four times as much for twice the length: 4 heads · T² · 4 bytes."""
    graphdef, params = phivision.abstract(TINY)
    temporary = []
    for length in (1024, 2048):
        args = nnx.to_pure_dict(params), batch_from_ids([[1, 2, 3]] * 2, config=TINY, length=length)
        args = (*args, np.zeros(2, np.int32), np.zeros((2, 2), np.int32))
        in_force = contextlib.nullcontext()
        if mesh:
            devices = sharding.make_mesh(mesh)
            on, rows = sharding.param_shardings(params, devices), sharding.row_sharding(devices)
            in_force, shardings = jax.set_mesh(devices), (on, rows, sharding.replicated(devices), rows)
            args = tuple(sharding.abstract(x, on) for x, on in zip(args, shardings, strict=True))
        with in_force:
            program = capturing._captured.lower(graphdef, 1, *args).compile()
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 2.2 * temporary[0] and temporary[1] < 2048**2 * 4


@pytest.mark.parametrize(
    ("layers", "queries", "message"),
    [
        ([], None, r"layers are \[\]"),
        ([2], None, r"layers are \[2\]: choose one or several different ones of 0 to 1"),
        ([1, -1], None, "different"),
        ([0], [-1], "queries must be positions from 0 to 47"),
        ([0], [48], "queries must be positions"),
        ([0], [0.5], "queries must be positions"),
    ],
)
def test_capture_rejects(tiny, layers, queries, message):
    with pytest.raises(ValueError, match=message):
        capture(tiny, batch_of("causal"), layers, queries)


def example_with(layout, size):
    merge_size = 2 if layout == "overview_and_detail" else 1
    projector = dataclasses.replace(TINY.projector, merge_size=merge_size)
    config = dataclasses.replace(TINY, image_layout=layout, projector=projector)
    patched = make_layout(config).encode(Image.new("RGB", size))
    return expand([5, -200, 6, -200, 7], [patched, patched])


def test_patch_maps_of_one_tile():
    example = example_with("naflex", (12, 6))
    (rows, columns), tokens = example.images[0].grids[0], example.images[0].size.tokens
    weights = np.random.default_rng(0).random((2, len(example.tokens)))
    for image, start in enumerate((1, 2 + tokens)):
        (heat,) = patch_maps(weights, example, image)
        assert heat.shape == (2, rows, columns)
        np.testing.assert_array_equal(heat.reshape(2, -1), weights[:, start : start + tokens])


def test_patch_maps_distribute_merged_tokens():
    example = example_with("thumbnail", (9, 9))
    (heat,) = patch_maps(np.arange(len(example.tokens)), example)  # tokens 1 to 4 are means of 2x2 patches
    np.testing.assert_allclose(heat, np.kron([[1, 2], [3, 4]], np.full((2, 2), 0.25)))

    example = example_with("overview_and_detail", (6, 4))  # a token: half its patch, a quarter each overview patch
    overview, detail = patch_maps(np.arange(len(example.tokens)), example)
    np.testing.assert_allclose(detail, np.array([[1, 2, 3], [4, 5, 6]]) / 2)
    np.testing.assert_allclose(overview, [[21 / 4, 21 / 4]])


def test_overlay_colours_the_cell():
    image = Image.new("RGB", (101, 53), "#406080")
    heat = np.zeros((2, 4))
    heat[1, 2] = 0.3
    shown = np.asarray(overlay(image, heat)).astype(int)
    changed = (shown != np.array([0x40, 0x60, 0x80])).any(-1)
    rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
    assert shown.shape == (53, 101, 3) and changed[rows.min() :, columns.min() : columns.max() + 1].all()
    assert abs(rows.min() - 26.5) <= 1 and rows.max() == 52
    assert abs(columns.min() - 50.5) <= 1 and abs(columns.max() - 75) <= 1
    assert shown[40, 60, 0] > 200  # yellow
    np.testing.assert_array_equal(overlay(image, np.zeros((3, 3))), image)
