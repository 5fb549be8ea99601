"""The same step on any mesh, in microbatches, and with any rematerialization."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phivision_jax import sharding
from phivision_jax.models import phivision, remat
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.step import microbatches
from tests.support.batches import TINY
from tests.support.train_steps import (
    QUICK,
    ROWS,
    RUN,
    SPEC,
    P,
    R,
    T,
    compile_quickly,
    rows_across,
    run,
    step_on,
    with_mode,
)

MODES = ("causal", "bidirectional")
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 2 x tensor 2 x context 2": {"fsdp": 2, "tensor": 2, "context": 2},
    "slice 2 x fsdp 4": {"slice": 2, "fsdp": 4},
}
STEPS = 10


def batches(mode):
    return [rows_across(seed % 2, mode) for seed in range(STEPS)]  # two in turn, so that the loss falls


@pytest.fixture(scope="module")
def params(tiny):
    return jax.tree.map(np.asarray, tiny.split()[1])


@pytest.fixture(scope="module")
def alone(params):
    """Losses and first gradients on one device, by mode."""
    step = step_on(RUN, {}, 1)
    compiled = compile_quickly(step)
    return {mode: run(step, compiled, params, batches(mode))[:2] for mode in MODES}


def assert_same_gradients(got, expected, tolerance):
    assert got.keys() == expected.keys() and len(got) > 30
    for path, grad in expected.items():
        # A bias of the keys changes no softmax: its gradient is rounding, measured by that of the queries' bias.
        like = (*path[:-2], "q_proj", "bias") if path[-2:] == ("k_proj", "bias") else path
        scale = np.linalg.norm(expected[like])
        assert scale > 0, path
        assert np.linalg.norm(got[path] - grad) <= tolerance * scale, (path, np.linalg.norm(got[path] - grad) / scale)


def test_rows_across_suit_these_tests():
    """One program serves both modes, and a border between shards along context cuts images."""
    programs = [step_on(with_mode(RUN, mode), {}, 1).lower(SPEC).as_text() for mode in MODES]
    assert programs[0] == programs[1]
    for seed in range(2):
        causal, both = (rows_across(seed, mode) for mode in MODES)
        left, right = causal.vision_index[:, T // 2 - 1], causal.vision_index[:, T // 2]
        assert (left >= 0).all() and (right == left + 1).all()
        assert (both.span_end[:, T // 2 - 1] > T // 2).all()  # attends beyond the border
        assert (causal.segment_ids.max(1) == 3).all()
        assert (causal.patch_segments.max(2) >= 1).all()  # both vision rows of every row have images


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_step_on_eight_devices_equals_one(alone, params, shape):
    step = step_on(RUN, shape, 8)
    compiled = compile_quickly(step)
    for mode in MODES:
        losses, grads, state = run(step, compiled, params, batches(mode))
        np.testing.assert_allclose(losses, alone[mode][0], rtol=0, atol=1e-5)
        assert_same_gradients(grads, alone[mode][1], 1e-4)
        assert losses[-1] < losses[0] - 0.5
    assert jax.tree.map(lambda x: x.sharding, state) == step.shardings
    # Numbers do not show placement, the program does: a device holds its own rows and vision rows, not those of others.
    rows, shards = ROWS // sharding.num_shards(step.mesh, "batch"), shape.get("context", 1)
    program = compiled.as_text()
    tokens, patches = f"f32[{rows},{T // shards},{TINY.decoder.hidden_size}]", f"[{rows},{R // shards},{P},"
    assert tokens in program and f"f32{patches}{TINY.vision.hidden_size}]" in program and f"u8{patches}12]" in program
    if shards > 1:
        assert f"f32[{rows},{R},{P},{TINY.vision.hidden_size}]" not in program and f"u8[{rows},{R},{P}," not in program


def test_sharding_rules_change_placement_only(alone, params):
    """Two key heads and two vision heads on tensor 4 need rules of the run's own; the result is that of one device."""
    shape, rules = {"fsdp": 2, "tensor": 4}, (("kv_heads", ""), ("patch_heads", ""), ("batch", "data,fsdp"))
    with pytest.raises(ValueError, match="does not divide over mesh axes"):
        step_on(RUN, shape, 8)
    step = step_on(dataclasses.replace(RUN, sharding_rules=rules), shape, 8)
    losses, grads, state = run(step, compile_quickly(step), params, batches("causal")[:2])
    np.testing.assert_allclose(losses, alone["causal"][0][:2], rtol=0, atol=1e-5)
    assert_same_gradients(grads, alone["causal"][1], 1e-4)
    attention = state["params"]["decoder"]["layers"]["self_attn"]
    assert attention["k_proj"]["kernel"].sharding.shard_shape((2, 32, 2, 8)) == (2, 16, 2, 8)
    assert attention["q_proj"]["kernel"].sharding.shard_shape((2, 32, 4, 8)) == (2, 16, 1, 8)


def test_modes_differ(alone):
    """By ten times the tolerance for meshes, so that a border that hides half an image would be noticed."""
    assert abs(alone["causal"][0][0] - alone["bidirectional"][0][0]) > 1e-4


def test_step_in_microbatches_equals_one_batch(alone, params):
    """The weights of the parts are 9 to 1, so that division by a part's own weight would be noticed."""
    batch = rows_across(0, "causal")
    weights = [part.sum() for part in microbatches(batch, 2).loss_weights]
    assert max(weights) > 9 * min(weights) > 0
    step = step_on(dataclasses.replace(RUN, microbatches=2), {"fsdp": 4}, 4)
    losses, grads, _ = run(step, compile_quickly(step), params, batches("causal"))
    # The initial zeros and each part's gradients are pinned to their parameters' shardings. In the traced program:
    # XLA:CPU shards sums this small by itself.
    kernel = "tensor<" + "x".join(map(str, params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"].shape)) + "xf32>"
    pinned = [line for line in step.lower(SPEC).as_text().splitlines() if "sharding_constraint" in line]
    assert sum(line.endswith(kernel) and '{"fsdp"}' in line for line in pinned) == 4  # gate_proj and up_proj, twice
    np.testing.assert_allclose(losses[:2], alone["causal"][0][:2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses, alone["causal"][0], rtol=0, atol=1e-5)
    assert_same_gradients(grads, alone["causal"][1], 1e-5)


def test_microbatches_keep_rows_on_their_device():
    parts = microbatches(rows_across(0, "causal"), 2)
    for part in range(2):
        for got, all_rows in zip(jax.tree.leaves(parts), jax.tree.leaves(rows_across(0, "causal")), strict=True):
            np.testing.assert_array_equal(got[part], all_rows[part::2])
    mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
    placed = sharding.abstract(SPEC, sharding.batch_shardings(mesh, SPEC))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda batch: microbatches(batch, 2)).lower(placed).compile().as_text()
    for collective in ("all-to-all", "collective-permute", "all-gather", "all-reduce"):
        assert collective not in program


def gradient(policy: str, vision_policy: str) -> Callable:
    graphdef, _ = phivision.abstract(TINY, remat=policy, vision_remat=vision_policy)

    def loss(params, batch):
        return batch_loss(phivision.merge(graphdef, params), batch)[0]

    return jax.jit(jax.grad(loss))


# Every policy in one tower or the other.
PAIRS = [("full", "dots"), ("attention", "offload"), ("offload_attention", "attention")]


@pytest.mark.parametrize(("policy", "vision_policy"), PAIRS)
def test_remat_policies_give_equal_gradients(alone, params, policy, vision_policy):
    batch = jax.tree.map(jnp.asarray, rows_across(0, "causal"))
    compiled = gradient(policy, vision_policy).lower(params, batch).compile(compiler_options=QUICK)
    grads = dict(jax.tree_util.tree_leaves_with_path(compiled(params, batch)))
    got = {tuple(part.key for part in path): np.asarray(leaf) for path, leaf in grads.items()}
    assert_same_gradients(got, alone["causal"][1], 1e-5)


def test_towers_have_policies_of_their_own():
    batch = jax.tree.map(jnp.asarray, rows_across(0, "causal"))
    _, state = phivision.abstract(TINY)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), phivision.nnx.to_pure_dict(state))

    def moves(policy, vision_policy):
        return str(jax.make_jaxpr(gradient(policy, vision_policy))(like, batch)).count("host")

    assert moves("none", "none") == 0 and moves("attention", "full") == 0
    assert 0 < moves("none", "offload") == moves("offload", "none") < moves("offload_attention", "none")
    assert moves("offload", "offload") == 2 * moves("offload", "none")
    assert set(remat.POLICIES) == {"none", "full", "attention", "dots", "offload", "offload_attention"}
