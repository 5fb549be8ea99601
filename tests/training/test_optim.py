import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phivision_jax.training import optim
from phivision_jax.training.config import OptimConfig

PARAMS = {
    "vision": {"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "projector": {"fc1": {"kernel": jnp.ones((2, 2))}},
    "decoder": {"norm": {"scale": jnp.ones(2)}, "lm_head": {"kernel": jnp.ones((3, 2))}},
}


def test_the_first_rule_that_matches_counts():
    cfg = OptimConfig(lr_rules=(("vision.*bias", 0.5), ("vision", 0.0)))
    scale = {optim.path_name(path): m for path, m in optim.multipliers(PARAMS, cfg).items()}
    assert scale["vision/mlp/bias"] == 0.5 and scale["vision/mlp/kernel"] == 0.0 and scale["decoder/norm/scale"] == 1.0
    trainable, frozen = optim.partition(PARAMS, cfg)
    assert list(frozen) == [("vision", "mlp", "kernel")] and len(trainable) == 4


@pytest.mark.parametrize(
    ("rules", "message"),
    [((("visoin", 0.0),), "'visoin' matches no parameter"), ((("(", 1.0),), "not a regular"), (((".", 0.0),), "every")],
)
def test_rules_that_cannot_be_meant(rules, message):
    with pytest.raises(ValueError, match=message):
        optim.partition(PARAMS, OptimConfig(lr_rules=rules))


def test_schedule_by_hand():
    at = optim.schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, final_lr_ratio=0.2), 110)
    np.testing.assert_allclose([at(0), at(5), at(10), at(60), at(110)], [0, 0.5, 1.0, 0.6, 0.2], atol=1e-6)


def test_one_step_by_hand():
    """Adam's first step is the gradient's sign; decay adds to kernels but not to the head, norms and biases."""
    cfg = OptimConfig(
        learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1e9, eps=0.0, lr_rules=(("projector", 2.0),)
    )
    tx = optim.make_optimizer(PARAMS, cfg, 1000)
    trainable, _ = optim.partition(PARAMS, cfg)
    grads = {path: 3.0 * jnp.ones_like(leaf) for path, leaf in trainable.items()}
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    new = {optim.path_name(p): float(v.ravel()[0]) for p, v in optax.apply_updates(trainable, updates).items()}
    assert new["vision/mlp/kernel"] == pytest.approx(1 - 0.1 * (1 + 0.5), abs=1e-6)
    assert new["projector/fc1/kernel"] == pytest.approx(1 - 0.2 * (1 + 0.5), abs=1e-6)
    for undecayed in ("vision/mlp/bias", "decoder/norm/scale", "decoder/lm_head/kernel"):
        assert new[undecayed] == pytest.approx(0.9, abs=1e-6)


def test_clipping_is_by_the_norm_over_everything():
    cfg = OptimConfig(clip_norm=1.0)
    trainable, _ = optim.partition(PARAMS, cfg)
    clipped, _ = optax.clip_by_global_norm(cfg.clip_norm).update(
        {path: jnp.full_like(leaf, 7.0) for path, leaf in trainable.items()}, optax.EmptyState()
    )
    assert float(optax.global_norm(clipped)) == pytest.approx(1.0, abs=1e-5)
