"""The decoder at long positions against the released computation (``tests/golden``)."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.config import DecoderConfig
from phivision_jax.models.layers import inverse_frequencies
from phivision_jax.models.phi4 import Phi4Decoder
from tests.golden import long_positions as golden

CASE = Path(__file__).parents[1] / "golden" / "cases" / "long_positions.npz"
LOGITS = 1e-4
"""As in ``test_golden.py``: never to be widened."""
CONFIG = DecoderConfig(
    vocab_size=golden.VOCAB,
    hidden_size=golden.WIDTH,
    intermediate_size=golden.MLP,
    num_layers=golden.LAYERS,
    num_heads=golden.HEADS,
    num_kv_heads=golden.KV_HEADS,
    rope_theta=golden.THETA,
    rms_norm_eps=golden.EPS,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)


def parameters() -> dict:
    """The weights of the golden decoder, as it holds them here."""
    files = golden.weights()

    def stacked(name: str, *shape: int) -> jax.Array:
        layers = [files[f"model.layers.{i}.{name}.weight"] for i in range(golden.LAYERS)]
        return jnp.stack([(w.T if w.ndim == 2 else w).reshape(shape) for w in layers])

    D, F, N, K, H = golden.WIDTH, golden.MLP, golden.HEADS, golden.KV_HEADS, golden.HEAD_DIM
    shapes = {"q_proj": (D, N, H), "k_proj": (D, K, H), "v_proj": (D, K, H), "o_proj": (N, H, D)}
    mlp = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
    norms = ("input_layernorm", "post_attention_layernorm")
    layers = {name: {"scale": stacked(name, D)} for name in norms} | {
        "self_attn": {name: {"kernel": stacked(f"self_attn.{name}", *shape)} for name, shape in shapes.items()},
        "mlp": {name: {"kernel": stacked(f"mlp.{name}", *shape)} for name, shape in mlp.items()},
    }
    return {
        "embed_tokens": {"embedding": jnp.asarray(files["model.embed_tokens.weight"])},
        "layers": layers,
        "norm": {"scale": jnp.asarray(files["model.norm.weight"])},
        "lm_head": {"kernel": jnp.asarray(files["lm_head.weight"])},
    }


@functools.cache
def logits() -> dict[str, np.ndarray]:
    """Logits of both golden rows at the stored positions."""
    rows = golden.inputs()
    ids, positions = (jnp.stack(arrays) for arrays in zip(*rows.values(), strict=True))
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Phi4Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, remat="none"))
    )
    assert jax.tree.map(jnp.shape, parameters()) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))

    @jax.jit
    def forward(params):
        decoder = nnx.merge(graphdef, params)
        span_end = jnp.broadcast_to(jnp.arange(golden.LENGTH), ids.shape)
        hidden = decoder(decoder.embed_tokens(ids), positions, span_end, jnp.ones_like(ids))
        return decoder.lm_head(hidden[:, golden.SHOWN])

    return dict(zip(rows, np.asarray(forward(parameters())), strict=True))


def test_inverse_frequencies_equal_the_released_bits():
    with np.load(CASE) as arrays:
        want = arrays["inverse_frequencies"]
    found = inverse_frequencies(golden.HEAD_DIM, golden.THETA)
    assert found.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("row", ["near", "far"])
def test_logits_at_long_positions(row):
    with np.load(CASE) as arrays:
        want = arrays[f"logits_{row}"]
    found = logits()[row]
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= LOGITS
