"""Norms and activations against formulas and autodiff's gradients of them, and the values that they keep."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.scipy.special import erf

from phivision_jax.models.elementwise import gelu, layer_norm, rms_norm, swiglu

EPS = 1e-2  # large enough to be missed where it is left out


def plain_rms_norm(x, scale):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def plain_layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPS) * scale + bias


def plain_swiglu(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def plain_gelu(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMS = {
    "rms_norm": (lambda x, scale: rms_norm(x, scale, EPS), plain_rms_norm, (0, 1)),
    "layer_norm": (lambda x, scale, bias: layer_norm(x, scale, bias, EPS), plain_layer_norm, (0, 1, 1)),
    "swiglu": (swiglu, plain_swiglu, (0, 0)),
    "gelu": (gelu, plain_gelu, (0,)),
}
"""Our function, the formula, and a flag per argument: 1 for a vector of parameters, which is always fp32."""


def arguments(rng, name, shape, dtype=np.float64, scale=1.0):
    is_vector = FORMS[name][2]
    args = [scale * rng.normal(size=shape[-1:] if vector else shape) for vector in is_vector]
    return [
        np.asarray(a, np.float32 if v and dtype != np.float64 else dtype) for a, v in zip(args, is_vector, strict=True)
    ]


def with_gradients(form, args, weight):
    def run(args, weight):
        out, pull = jax.vjp(form, *args)
        return out, *pull(weight.astype(out.dtype))

    return jax.jit(run)(args, weight)


@pytest.mark.parametrize("shape, scale", [((7,), 1.0), ((3, 5), 1e-3), ((2, 3, 9), 6.0)])
@pytest.mark.parametrize("name", FORMS)
def test_equals_formula_and_its_gradient(name, shape, scale):
    rng = np.random.default_rng(0)
    args, weight = arguments(rng, name, shape, scale=scale), rng.normal(size=shape)
    ours, formula, _ = FORMS[name]
    found = with_gradients(ours, [a.astype(np.float32) for a in args], weight)
    with jax.enable_x64(True):
        wanted = with_gradients(formula, args, weight)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("name", FORMS)
def test_bf16_rounds_results_only(name):
    """Within a bf16 step of the formula in fp32 on the same rounded inputs; gradients of parameters are fp32.

    The forward pass of an activation is JAX's, which rounds between operations; only its gradient is ours.
    """
    rng = np.random.default_rng(0)
    args = arguments(rng, name, (64, 96), jnp.bfloat16)
    weight = np.asarray(rng.normal(size=(64, 96)), jnp.bfloat16)
    ours, formula, is_vector = FORMS[name]
    found = with_gradients(ours, args, weight)
    wanted = with_gradients(formula, [a.astype(np.float32) for a in args], weight.astype(np.float32))
    assert [a.dtype for a in found[1:]] == [jnp.float32 if v else jnp.bfloat16 for v in is_vector]
    own = slice(0 if "norm" in name else 1, None)
    for a, b in zip(found[own], wanted[own], strict=True):
        tolerance = 1e-5 if a.dtype == jnp.float32 else 2**-8
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("gate", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_activation_gradients_at_large_inputs(gate):
    """The gradient is the limit even where exp overflows: 0 on the left, the other factor on the right."""
    right = 0.5 if gate == 0 else float(gate > 0)
    d_gate, d_up = jax.grad(swiglu, (0, 1))(jnp.float32(gate), jnp.float32(3.0))
    np.testing.assert_allclose([d_gate, d_up], [3 * right, gate * right], atol=1e-10)
    np.testing.assert_allclose(jax.grad(gelu)(jnp.float32(gate)), right, atol=1e-10)


def test_gelu_is_tanh_approximation():
    x = jnp.linspace(-3, 3, 61)
    exact = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    assert 1e-4 < float(jnp.abs(gelu(x) - exact).max()) < 1e-3


KEPT = {
    "rms_norm": ["[4,8]", "[4,1]"],
    "layer_norm": ["[4,8]", "[4,1]", "[4,1]"],
    "swiglu": ["[4,8]", "[4,8]"],
    "gelu": ["[4,8]"],
}


@pytest.mark.parametrize("name", FORMS)
def test_keeps_inputs_only(name, capsys):
    args = [jnp.asarray(a, jnp.float32) for a in arguments(np.random.default_rng(0), name, (4, 8))]

    def run(first, *others):
        # JAX reports arguments without a shape: products turn the inputs into values of their own.
        vectors = FORMS[name][2][1:]
        return FORMS[name][0](2 * first, *(o if v else 2 * o for o, v in zip(others, vectors, strict=True)))

    print_saved_residuals(run, *args)
    lines = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    lines = [line for line in lines if not line.startswith("f32[] ")]
    assert sorted(re.match(r"f32(\[[\d,]+\])", line)[1] for line in lines) == sorted(KEPT[name]), "\n".join(lines)


@pytest.mark.parametrize("platform, barriers", [("cpu", 1), ("tpu", 0)])
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_gradient_is_not_fused_on_cpus(name, platform, barriers):
    args = arguments(np.random.default_rng(0), name, (4, 8), np.float32)
    traced = jax.jit(lambda *a: jax.vjp(FORMS[name][0], *a)[1](a[0])).trace(*args)
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == barriers
