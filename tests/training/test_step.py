"""The training step: frozen parameters, dtypes, errors. ``test_meshes.py`` compares meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phivision_jax.models import phivision
from phivision_jax.training.loss import batch_loss
from phivision_jax.training.step import init_params
from tests.support.batches import TINY
from tests.support.train_steps import RUN, SPEC, T, compile_quickly, first_moments, rows_across, run, step_on


def with_optim(**changes):
    return dataclasses.replace(RUN, optim=dataclasses.replace(RUN.optim, **changes))


@pytest.fixture(scope="module")
def params(tiny):
    return jax.tree.map(np.asarray, tiny.split()[1])


def test_step_keeps_frozen_parameters(params):
    step = step_on(with_optim(lr_rules=(("projector", 1.0), (".", 0.0))), {"fsdp": 2}, 2)
    compiled = compile_quickly(step)
    losses, _, state = run(step, compiled, params, [rows_across(0, "causal")] * 4)
    assert losses[-1] < losses[0]
    after = jax.tree.map(np.asarray, state["params"])
    for name in ("vision", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, params[name], after[name])
    assert np.abs(params["projector"]["fc1"]["kernel"] - after["projector"]["fc1"]["kernel"]).max() > 1e-4
    trained = sum(x.size for x in jax.tree.leaves(after["projector"]))
    assert sum(x.size for x in jax.tree.leaves(state["opt_state"])) <= 2 * trained + 9  # and counters
    empty = rows_across(0, "causal")
    empty = empty._replace(loss_weights=np.zeros_like(empty.loss_weights))
    _, _, kept = run(step, compiled, params, [rows_across(0, "causal")] * 4 + [empty])
    jax.tree.map(np.testing.assert_array_equal, after, kept["params"])  # neither weight decay nor momentum moves them
    assert int(kept["opt_state"].skipped) == 1 and int(kept["step"]) == 5
    other = jax.tree.map(lambda x: x[:, : T // 2] if x.shape[1] == T else x, rows_across(0, "causal"))
    with pytest.raises(TypeError):  # compiled for one shape
        compiled(state, other)


def test_step_in_bfloat16_trains(params):
    cfg = dataclasses.replace(with_optim(moment_dtype="bfloat16", clip_norm=1.0), dtype="bfloat16", remat="attention")
    step = step_on(cfg, {}, 1)
    batch = rows_across(0, "causal")
    losses, _, state = run(step, compile_quickly(step), params, [batch] * 8)
    exact = jax.jit(lambda p, b: batch_loss(phivision.merge(phivision.abstract(TINY)[0], p), b)[0])(
        params, jax.tree.map(jnp.asarray, batch)
    )
    assert losses[0] == pytest.approx(float(exact), rel=0.02)
    assert losses[-1] < losses[0] - 0.5
    assert {x.dtype for x in first_moments(state).values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    assert int(state["step"]) == 8


@pytest.mark.slow  # sampling truncated normals takes long to compile
def test_init_params_on_any_mesh():
    one, eight = (init_params(RUN, step_on(RUN, shape, n)) for shape, n in (({}, 1), ({"fsdp": 4, "tensor": 2}, 8)))
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    kernel = eight["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // 4, 48 // 2)


def test_lower_refuses_rows():
    step = step_on(dataclasses.replace(RUN, microbatches=3), {"fsdp": 4}, 4)

    with pytest.raises(ValueError, match=r"data\.batch_rows is 8, .* 4 devices .* x 3 microbatches; .* multiple of 12"):
        step.lower(SPEC)


def test_lower_refuses_unknown_remat_policy():
    for change in ({"remat": "half"}, {"vision_remat": "half"}):
        with pytest.raises(ValueError, match=r"remat policy 'half' does not exist; choose one of full"):
            step_on(dataclasses.replace(RUN, **change), {}, 1).lower(SPEC)
