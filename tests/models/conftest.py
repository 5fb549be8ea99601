"""A model of a few thousand parameters, every kind of layer in it."""

import jax
import numpy as np
import pytest
from flax import nnx

from phivision_jax.config import DecoderConfig, ModelConfig, VisionConfig
from phivision_jax.models.phivision import PhiVision

TINY = ModelConfig(
    vision=VisionConfig(
        hidden_size=24, intermediate_size=32, num_layers=3, num_heads=2, patch_size=2, num_positions=16
    ),
    decoder=DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        rope_theta=10_000.0,
        pad_token_id=63,
    ),
    min_patches=1,
    max_patches=64,
)


@pytest.fixture(scope="session")
def tiny() -> PhiVision:
    """Random weights in which every part matters: biases and scales are drawn too."""
    model = PhiVision(TINY, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state))
    return model
