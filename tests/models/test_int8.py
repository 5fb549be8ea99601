"""Matrices in int8: their values by hand, and what a model with them refuses."""

import importlib.util
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.config import LoraConfig
from phivision_jax.models import phivision
from phivision_jax.models.int8 import quantise, quantise_model
from phivision_jax.models.layers import Linear
from phivision_jax.rows import batch_from_ids
from phivision_jax.training.loss import batch_loss
from tests.support.batches import TINY
from tests.support.int8_decode import MATRIX
from tests.support.parameter_trees import flatten
from tests.support.paths import ROOT


@pytest.mark.parametrize("xp", [np, jnp])
def test_scale_is_largest_magnitude_over_127(xp):
    # Columns are outputs: 127 / 127 = 1 and 254 / 127 = 2 are exact in bf16, and a column of zeros stays zero.
    weights = xp.array([[127.0, -254.0, 0.0], [0.4, 2.9, 0.0], [-63.6, 1.1, 0.0]])
    quantised, scale = quantise(weights, (0,), xp)
    assert quantised.dtype == np.int8 and scale.dtype == np.float32
    assert quantised.tolist() == [[127, -127, 0], [0, 1, 0], [-64, 1, 0]] and scale.tolist() == [1.0, 2.0, 0.0]
    _, (rounded,) = quantise(xp.array([[1.0], [0.0]]), (0,), xp)
    assert float(rounded) == 129 * 2.0**-14  # of 1 / 127 = 129.008 · 2⁻¹⁴, the 8 digits that bf16 has


def test_errors_are_at_most_half_a_scale_in_every_channel():
    weights = np.random.default_rng(0).normal(size=(3, 50, 4, 7)).astype(np.float32) * np.logspace(-3, 3, 7)
    quantised, scale = quantise(weights, (1,), np)
    assert scale.shape == (3, 4, 7)
    error = np.abs(quantised * scale[:, None] - weights)
    assert (error <= 0.5 * scale[:, None] * (1 + 1e-5)).all() and (np.abs(quantised).max(1) >= 126).all()


def test_abstract_model_has_int8_matrices_and_scales_of_their_outputs():
    _, state = phivision.abstract(TINY, weights="int8")
    axes = {"/".join(map(str, path)): v.get_metadata()["out_sharding"] for path, v in nnx.to_flat_state(state)}
    leaves = dict(flatten(nnx.to_pure_dict(state)))
    narrow = {path for path, leaf in leaves.items() if leaf.dtype == jnp.int8}
    assert narrow == {path for path in leaves if path.endswith("/kernel")} | {"decoder/embed_tokens/embedding"}
    for module, shape, names in [
        ("decoder/layers/self_attn/q_proj", (2, 4, 8), ("layer", "heads", "head_dim")),
        ("decoder/layers/self_attn/o_proj", (2, 32), ("layer", "embed")),
        ("decoder/embed_tokens", (64,), ("vocab",)),
        ("vision/patch_embedding", (24,), ("patch_embed",)),
    ]:
        assert leaves[f"{module}/scale"].shape == shape and axes[f"{module}/scale"] == names


def test_int8_weights_are_not_trained():
    graphdef, state = phivision.abstract(TINY, weights="int8")
    model = phivision.merge(graphdef, nnx.to_pure_dict(state))
    with pytest.raises(ValueError, match="int8 weights has no loss and cannot be trained"):
        batch_loss(model, batch_from_ids([[1, 2, 3]], config=TINY))
    with pytest.raises(ValueError, match="'int8' cannot have adapters"):
        phivision.abstract(TINY, weights="int8", lora=LoraConfig(rank=2))
    with pytest.raises(ValueError, match="'int4' does not exist; choose int8 or None"):
        phivision.abstract(TINY, weights="int4")


def test_quantised_layer_is_near_the_layer():
    layer = Linear("BTD,DNH->BTNH", (6, 2, 4), ("embed", "heads", "head_dim"), rngs=nnx.Rngs(0), bias=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 6)), jnp.float32)
    exact = layer(x)
    quantise_model(layer)
    largest = 0.5 * layer.scale[...] * jnp.abs(x).sum(-1)[..., None, None]
    error = jnp.abs(layer(x) - exact)
    assert (error <= largest * 1.001 + 1e-6).all() and float(error.max()) > 1e-4


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux on x86-64")
def test_tpu_program_holds_no_matrix_in_bf16_and_copies_no_layer_of_the_cache():
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.support.int8_decode"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=True)
    temporaries, copies = json.loads(run.stdout)
    assert temporaries < 2 * MATRIX and copies == []
