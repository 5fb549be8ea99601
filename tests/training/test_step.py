"""The step on one device and on eight, frozen and not, and its one compilation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from phivision_jax import sharding
from phivision_jax.batch import batch_spec
from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.data.pipeline import to_device
from phivision_jax.training.config import OptimConfig, RunConfig
from phivision_jax.training.step import init_params, make_train_step
from tests.made import EXAMPLES, random_rows

CONFIG = ModelConfig(
    vision=VisionConfig(
        hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2, patch_size=2, num_positions=16
    ),
    decoder=DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, pad_token_id=63
    ),
    min_patches=1,
    max_patches=64,
)
ROWS, T, P = 8, 48, 24
RUN = RunConfig(
    model=CONFIG,
    dtype="float32",
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1),
)
SPEC = batch_spec(rows=ROWS, length=T, vision_rows=1, num_patches=P, patch_dim=12)


def batches(count):
    rng = np.random.default_rng(0)
    rows = [[EXAMPLES[i % len(EXAMPLES)]] for i in range(ROWS)]
    return [random_rows(rng, CONFIG, rows, length=T, num_patches=P) for _ in range(count)]


def train(cfg, mesh_shape, devices, steps=4):
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[:devices])
    step = make_train_step(cfg, mesh, steps=20)
    compiled = step.compile(SPEC)
    params = init_params(cfg, step)
    before = jax.tree.map(np.asarray, params)
    state = step.init(params)
    at = sharding.batch_shardings(mesh, SPEC)
    losses = []
    for batch in batches(steps):
        state, metrics = compiled(state, to_device(batch, at, ROWS))
        losses.append(float(metrics["loss"]))
    return losses, before, state, compiled


@pytest.fixture(scope="module")
def alone():
    return train(RUN, {}, 1)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_give_the_losses_of_one(alone, mesh):
    losses, _, state, _ = train(RUN, mesh, 8)
    np.testing.assert_allclose(losses, alone[0], atol=1e-5)
    assert losses[-1] < losses[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"]):
        if path[-1].key == "kernel":  # Adam turns the rounding in a gradient that is zero (key biases) into steps
            other = functools.reduce(lambda tree, part: tree[part.key], path, alone[2]["params"])
            np.testing.assert_allclose(np.asarray(leaf), np.asarray(other), atol=2e-4)
    kernel = state["params"]["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert not kernel.is_fully_replicated
    moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.shape == kernel.shape]
    assert len(moments) >= 2 and all(m.sharding == kernel.sharding for m in moments)


def test_what_is_frozen_stays_bit_for_bit_and_has_no_moments():
    cfg = dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, lr_rules=(("projector", 1.0), (".", 0.0))))
    _, before, state, _ = train(cfg, {}, 1, steps=2)
    after = jax.tree.map(np.asarray, state["params"])
    for name in ("vision", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    assert np.abs(before["projector"]["fc1"]["kernel"] - after["projector"]["fc1"]["kernel"]).max() > 1e-4
    trained = sum(x.size for x in jax.tree.leaves(after["projector"]))
    assert sum(x.size for x in jax.tree.leaves(state["opt_state"])) <= 2 * trained + 4


def test_a_compiled_step_refuses_other_shapes(alone):
    state, compiled = alone[2:]
    other = random_rows(np.random.default_rng(0), CONFIG, [[EXAMPLES[1]]] * ROWS, length=T + 1, num_patches=P)
    with pytest.raises(TypeError):
        compiled(state, other)


def test_bf16_compute_and_remat_train_too(alone):
    for change in ({"remat": "full"}, {"remat": "dots"}):
        losses, *_ = train(dataclasses.replace(RUN, **change), {}, 1, steps=2)
        np.testing.assert_allclose(losses, alone[0][:2], atol=1e-5)
    losses, *_ = train(dataclasses.replace(RUN, dtype="bfloat16"), {}, 1, steps=2)
    np.testing.assert_allclose(losses, alone[0][:2], rtol=0.02)
    with pytest.raises(ValueError, match="remat policy 'half' does not exist"):
        train(dataclasses.replace(RUN, remat="half"), {}, 1, steps=1)
