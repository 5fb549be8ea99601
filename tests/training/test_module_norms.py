"""Norms and learning rates of modules, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phivision_jax.training.optim import learning_rates, module_norms, multipliers
from phivision_jax.training.run_config import OptimConfig

FLAT = {
    ("decoder", "norm", "scale"): jnp.array([3.0, 4.0]),
    ("decoder", "lm_head", "kernel"): jnp.full((2, 6), 1.0),
    ("projector", "fc1", "bias"): jnp.array([2.0], jnp.bfloat16),
}


def test_module_norms_by_hand():
    norms = jax.jit(lambda flat: module_norms(flat, "grad_norm"))(FLAT)
    assert {name: float(norm) for name, norm in norms.items()} == pytest.approx(
        {"grad_norm/decoder": np.sqrt(25 + 12), "grad_norm/projector": 2.0}
    )
    assert float(optax.global_norm(list(norms.values()))) == pytest.approx(float(optax.global_norm(FLAT)))
    assert {norm.dtype for norm in norms.values()} == {jnp.dtype("float32")}


def test_learning_rates_by_rules():
    params = {
        "vision": {"patch_embedding": {"kernel": 0}, "layers": {"mlp": {"kernel": 0}}},
        "projector": {"fc1": {"kernel": 0}},
        "decoder": {"embed_tokens": {"embedding": 0}, "layers": {"kernel": 0}, "norm": {"scale": 0}},
    }
    rules = (("vision", 0.0), ("projector", 5.0), ("embed_tokens", 0.0), ("norm", 0.5))
    scale = multipliers(params, OptimConfig(lr_rules=rules))
    assert learning_rates(1e-4, scale) == pytest.approx(
        {"lr/decoder": 1e-4, "lr/decoder/min": 0.5e-4, "lr/projector": 5e-4, "lr/vision": 0.0}
    )
