"""Learning rates, schedules, AdamW and its moments, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from phivision_jax.sharding import make_mesh
from phivision_jax.training import optim
from phivision_jax.training.run_config import DataConfig, OptimConfig, RunConfig

PARAMS = {
    "vision": {"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "projector": {"fc1": {"kernel": jnp.ones((2, 2))}},
    "decoder": {"norm": {"scale": jnp.ones(2)}, "lm_head": {"kernel": jnp.ones((3, 2))}},
}


def test_multipliers_first_match():
    cfg = OptimConfig(lr_rules=(("vision.*bias", 0.5), ("vision", 0.0)))
    scale = {optim.path_name(path): m for path, m in optim.multipliers(PARAMS, cfg).items()}
    assert scale["vision/mlp/bias"] == 0.5 and scale["vision/mlp/kernel"] == 0.0 and scale["decoder/norm/scale"] == 1.0
    trainable, frozen = optim.partition(PARAMS, cfg)
    assert list(frozen) == [("vision", "mlp", "kernel")] and len(trainable) == 4


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("visoin", 0.0),), "'visoin' matches no parameter"),
        ((("(", 1.0),), "not a regular"),
        ((("a{9999999999}", 1.0),), "not a regular"),
        (((".", 0.0),), "every"),
    ],
)
def test_partition_refuses_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        optim.partition(PARAMS, OptimConfig(lr_rules=rules))


def test_schedule_by_hand():
    rate = optim.schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, final_lr_ratio=0.2), 110)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 0.5, 1.0, 0.6, 0.2], atol=1e-6)


def run_config(**optim_fields) -> RunConfig:
    """Steps of 4 · 256 = 1,024 tokens."""
    return RunConfig(data=DataConfig(batch_rows=4, length=256), optim=OptimConfig(**optim_fields))


def test_num_steps_from_tokens():
    cfg = run_config(tokens=100 * 1024 + 500, warmup_tokens=10 * 1024 - 500)
    assert optim.num_steps(cfg.in_steps(), 1000) == 100
    found = cfg.in_steps().optim
    assert (found.steps, found.warmup_steps, found.tokens, found.warmup_tokens) == (100, 10, 0, 0)
    assert optim.num_steps(run_config(tokens=1).in_steps(), 1000) == 1  # at least one
    assert optim.num_steps(run_config(tokens=100 * 1024 + 520).in_steps(), 1000) == 101
    assert optim.num_steps(run_config(), 1000) == 1000  # to the end of the plan
    assert optim.num_steps(run_config(steps=7), 1000) == 7
    # Twice the rows: half the steps, of both length and warm-up.
    twice = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_rows=8)).in_steps().optim
    assert (twice.steps, twice.warmup_steps) == (50, 5)


def test_schedule_with_warmup_tokens():
    cfg = run_config(learning_rate=1.0, tokens=110 * 1024, warmup_tokens=10 * 1024, final_lr_ratio=0.2).in_steps()
    rate = optim.schedule(cfg.optim, optim.num_steps(cfg, 200))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 0.5, 1.0, 0.6, 0.2], atol=1e-6)


def test_from_dict_turns_tokens_into_steps():
    values = dataclasses.asdict(run_config(tokens=50 * 1024, warmup_tokens=5 * 1024))
    read = RunConfig.from_dict(values)
    assert (read.optim.steps, read.optim.warmup_steps) == (50, 5)
    assert RunConfig.from_dict(dataclasses.asdict(read)) == read  # as in a run's metadata


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5, "tokens": 5000}, r"optim\.steps=5 excludes optim\.tokens=5000"),
        ({"tokens": -1}, r"optim\.tokens is -1"),
        ({"warmup_tokens": -1}, r"optim\.warmup_tokens is -1"),
    ],
)
def test_from_dict_refuses_lengths(fields, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(dataclasses.asdict(run_config(**fields)))


def test_num_steps_beyond_the_plan():
    with pytest.raises(ValueError, match=r"optim\.steps is 200, but data\.epochs=1 gives 150; raise data\.epochs"):
        optim.num_steps(run_config(steps=200), 150)


def test_optimizer_step_by_hand():
    """Adam's first step is the gradient's sign; decay adds to kernels but not to the head, norms and biases."""
    cfg = OptimConfig(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1e9, eps=0.0, lr_rules=(("projector", 2.0),)
    )
    tx = optim.make_optimizer(PARAMS, cfg, 1000)
    trainable, _ = optim.partition(PARAMS, cfg)
    grads = {path: 3.0 * jnp.ones_like(leaf) for path, leaf in trainable.items()}
    updates, _ = tx.update(grads, tx.init(trainable), trainable, step=0)
    new = {optim.path_name(p): float(v.ravel()[0]) for p, v in optax.apply_updates(trainable, updates).items()}
    assert new["vision/mlp/kernel"] == pytest.approx(1 - 0.1 * (1 + 0.5), abs=1e-6)
    assert new["projector/fc1/kernel"] == pytest.approx(1 - 0.2 * (1 + 0.5), abs=1e-6)
    for undecayed in ("vision/mlp/bias", "decoder/norm/scale", "decoder/lm_head/kernel"):
        assert new[undecayed] == pytest.approx(0.9, abs=1e-6)


def test_optimizer_rate_follows_the_run_s_step():
    cfg = OptimConfig(learning_rate=0.1, warmup_steps=4, weight_decay=0.0, clip_norm=1e9, eps=0.0)
    tx = optim.make_optimizer(PARAMS, cfg, 1000)
    trainable, _ = optim.partition(PARAMS, cfg)
    grads, state = {path: jnp.ones_like(leaf) for path, leaf in trainable.items()}, tx.init(trainable)
    for step, rate in ((0, 0.0), (3, 0.075), (1, 0.025)):
        updates, state = tx.update(grads, state, trainable, step=step)
        assert float(updates[("vision", "mlp", "bias")].ravel()[0]) == pytest.approx(-rate, rel=1e-4)


def test_clipping_by_global_norm():
    cfg = OptimConfig(clip_norm=1.0)
    trainable, _ = optim.partition(PARAMS, cfg)
    clipped, _ = optax.clip_by_global_norm(cfg.clip_norm).update(
        {path: jnp.full_like(leaf, 7.0) for path, leaf in trainable.items()}, optax.EmptyState()
    )
    assert float(optax.global_norm(clipped)) == pytest.approx(1.0, abs=1e-5)


def minimise(cfg, steps=200):
    """‖x − target‖² from zero; the optimizer's state and the distance left."""
    targets = {("fc1", "kernel"): jnp.linspace(-1, 1, 64), ("fc1", "bias"): jnp.linspace(1, 2, 8)}
    params = {path: jnp.zeros_like(x) for path, x in targets.items()}
    tx = optim.make_optimizer(optim.unflatten(params), cfg, steps)

    @jax.jit
    def step(params, state, i):
        grads = {path: 2 * (params[path] - x) for path, x in targets.items()}
        updates, state = tx.update(grads, state, params, step=i)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, i)
    adam = next(part for part in state if hasattr(part, "mu"))
    return adam, max(float(jnp.abs(params[path] - x).max()) for path, x in targets.items())


def test_bfloat16_moments_train():
    cfg = OptimConfig(learning_rate=0.05, warmup_steps=5, moment_dtype="bfloat16", b2=0.95)
    adam, left = minimise(cfg)
    assert {x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype("bfloat16")}
    _, left_fp32 = minimise(dataclasses.replace(cfg, moment_dtype="float32"))
    assert left < 0.02 and left_fp32 < 0.02


def test_bfloat16_moments_round_once_a_step():
    """g = 1, b1 = 0.9, b2 = 0.95: moments of 0.1 and 0.05 after a step, in fp32 until they are stored."""
    tx = optim.scale_by_adam(OptimConfig(moment_dtype="bfloat16", b2=0.95, eps=0.0))
    updates, state = tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.zeros(2)}))
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_allclose(updates["w"], 1.0, rtol=1e-6)  # mu / sqrt(nu), both corrected, before any rounding
    assert state.mu["w"][0] == jnp.bfloat16(0.1) and state.nu["w"][0] == jnp.bfloat16(0.05)


def test_bfloat16_moments_refuse_b2():
    """A relative change of 1 − b2 must exceed half of the last place, 2^-9."""
    with pytest.raises(ValueError, match=r"optim\.b2 <= 0\.99, not 0\.999"):
        optim.make_optimizer(PARAMS, OptimConfig(moment_dtype="bfloat16", b2=0.999), 10)
    optim.make_optimizer(PARAMS, OptimConfig(moment_dtype="float32", b2=0.999), 10)


def test_abstract_opt_state_shards_moments_as_their_parameters():
    tx = optim.make_optimizer(PARAMS, OptimConfig(moment_dtype="bfloat16"), 10)
    trainable, _ = optim.partition(PARAMS, OptimConfig())
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    shardings = {path: jax.NamedSharding(mesh, P("fsdp" if i % 2 else None)) for i, path in enumerate(trainable)}
    other = jax.NamedSharding(mesh, P())
    params = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in trainable.items()}
    found = optim.abstract_opt_state(tx, params, other)
    adam = next(part for part in found if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        assert {path: leaf.sharding for path, leaf in moments.items()} == shardings
        assert {leaf.dtype.name for leaf in moments.values()} == {"bfloat16"}
    assert adam.count.sharding == other
