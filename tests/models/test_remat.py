"""The values that each policy keeps of a decoder layer, per token: counted by hand, against JAX's own report."""

import math
import re

import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals

from phivision_jax.config import DecoderConfig, VisionConfig
from phivision_jax.models import remat
from phivision_jax.models.attention.attend import backend
from phivision_jax.models.layers import Linear, rope_angles
from phivision_jax.models.phi4 import DecoderLayer, attend_in_row
from phivision_jax.models.siglip2 import EncoderLayer

T, D, F, N, K, H = 512, 384, 512, 3, 1, 128
CFG = DecoderConfig(
    vocab_size=64,
    hidden_size=D,
    intermediate_size=F,
    num_layers=1,
    num_heads=N,
    num_kv_heads=K,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)
INPUT, ATTENTION = D, (N + 2 * K) * H + N * H + N  # queries, keys, values; the result and a normaliser per head
KEPT = {
    "full": INPUT,
    "attention": INPUT + ATTENTION,
    "dots": INPUT + ATTENTION + D + 2 * F,  # o, gate, up; the last product is not needed: it only enters a sum
}


@pytest.mark.parametrize("platform", ["xla", "tpu"])
@pytest.mark.parametrize("policy", KEPT)
def test_policy_keeps_documented_values(policy, platform, capsys):
    layer = nnx.eval_shape(lambda: DecoderLayer(CFG, rngs=nnx.Rngs(0)))
    positions = jnp.arange(T)[None]
    rope, segments = rope_angles(positions, H, 10_000.0), jnp.ones((1, T), jnp.int32)

    def run(x, layer):
        return layer(x, rope, attend_in_row(segments, positions), None)[0]

    with backend(platform):
        assert kept(remat.checkpoint(run, policy), jnp.ones((1, T, D)), layer, capsys) == T * KEPT[policy]


def kept(run, x, layer, capsys):
    """The number of elements kept for the backward pass of ``run(x, layer)``, without parameters."""
    print_saved_residuals(run, x, layer)
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if "from the argument layer" not in line and "from a constant" not in line]
    return sum(math.prod(map(int, re.match(r"f32\[([\d,]+)\]", line)[1].split(","))) for line in lines)


def test_dots_keeps_products_of_vision_layer(capsys):
    cfg = VisionConfig(hidden_size=96, intermediate_size=160, num_layers=2, num_heads=2)
    layer, segments = nnx.eval_shape(lambda: EncoderLayer(cfg, rngs=nnx.Rngs(0))), jnp.ones((1, 1, T), jnp.int32)
    x, (C, F, N) = jnp.ones((1, 1, T, 96)), (96, 160, 2)
    with backend("tpu"):
        found = kept(remat.checkpoint(lambda x, layer: layer(x, segments), "dots"), x, layer, capsys)
    # x; q, k, v; attention's result and a normaliser per head; its projection; the wide product.
    assert found == T * (C + 3 * C + C + N + C + F)


@pytest.mark.parametrize("policy, wanted", [("full", D), ("dots", D + 2 * F + 4)])
def test_dots_keeps_products_of_adapters(policy, wanted, capsys):
    def adapted():
        linear = Linear("BTD,DF->BTF", (D, F), ("embed", "mlp"), rngs=nnx.Rngs(0))
        linear.adapt(4, 8.0, nnx.Rngs(1))
        return linear

    def run(x, layer):
        return jnp.square(layer(checkpoint_name(x, remat.INPUT)))

    assert kept(remat.checkpoint(run, policy), jnp.ones((1, T, D)), nnx.eval_shape(adapted), capsys) == T * wanted


def test_check_rejects_unknown_policy():
    with pytest.raises(ValueError, match=r"'some' does not exist; choose one of full, attention, dots"):
        remat.check("some")
