"""Training continues on another mesh with the same losses."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from phivision_jax import sharding
from phivision_jax.checkpoint.manager import RunCheckpoints
from phivision_jax.data.feed.pipeline import to_device
from phivision_jax.models import phivision
from tests.support.batches import TINY
from tests.support.train_steps import ROWS, RUN, SPEC, compile_quickly, rows_across, step_on

# Heads that four devices along tensor can share.
MODEL = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(TINY.decoder, num_kv_heads=4),
    vision=dataclasses.replace(TINY.vision, num_heads=4),
)
CFG = dataclasses.replace(RUN, model=MODEL)
BEFORE, AFTER = 5, 50
HOME = ({"fsdp": 8}, 8)
TAIL = {"probe": np.arange(4, dtype=np.float32)}


def batches(first, last):
    return [rows_across(seed % 3, "bidirectional") for seed in range(first, last)]


def train(step, compiled, state, first, last):
    losses = []
    shardings = sharding.batch_shardings(step.mesh, SPEC)
    for batch in batches(first, last):
        state, metrics = compiled(state, to_device(batch, shardings, ROWS))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run saved on eight devices along fsdp, and the losses of its further steps there."""
    run = tmp_path_factory.mktemp("run")
    (run / "assets").mkdir()
    (run / "assets" / "tokenizer.json").write_text(json.dumps({}))
    step = step_on(CFG, *HOME, steps=BEFORE + AFTER)
    compiled = compile_quickly(step)
    params = jax.tree.map(np.asarray, phivision.PhiVision(MODEL, rngs=nnx.Rngs(3)).split()[1])
    state, _ = train(step, compiled, step.init(params), 0, BEFORE)
    checkpoints = RunCheckpoints(run, keep=2)
    checkpoints.save(state, TAIL, {"model": {}, "run": {}}, run / "assets")
    checkpoints.close()
    _, losses = train(step, compiled, state, BEFORE, BEFORE + AFTER)
    assert losses[-1] < 0.8 * losses[0]
    return run, losses


@pytest.mark.parametrize(
    ("shape", "devices"),
    [
        ({"fsdp": 2, "tensor": 4}, 8),
        pytest.param({"data": 8}, 8, marks=pytest.mark.slow),
        pytest.param({}, 1, marks=pytest.mark.slow),
        pytest.param({"slice": 2, "data": 2, "fsdp": 2}, 8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_continues_on_another_mesh(trained, shape, devices):
    run, expected = trained
    step = step_on(CFG, shape, devices, steps=BEFORE + AFTER)
    replicated = sharding.replicated(step.mesh)
    tail = {"probe": jax.ShapeDtypeStruct(TAIL["probe"].shape, TAIL["probe"].dtype, sharding=replicated)}
    state, found, meta = RunCheckpoints(run, keep=2).restore(step.abstract_state, tail)
    assert meta["step"] == int(state["step"]) == BEFORE
    assert np.array_equal(found["probe"], TAIL["probe"])
    assert all(
        leaf.sharding == want.sharding
        for leaf, want in zip(*map(jax.tree.leaves, (state, step.abstract_state)), strict=True)
    )
    _, losses = train(step, compile_quickly(step), state, BEFORE, BEFORE + AFTER)
    np.testing.assert_allclose(losses, expected, atol=1e-5, rtol=0)
