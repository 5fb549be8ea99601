"""Linear layers: gradients against autodiff's, the order of their products, and declarations that are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phivision_jax.models.layers import Linear, project


def arrays(inputs, outputs, dtype, batch=(2, 3)):
    rng = np.random.default_rng(0)
    shapes = (*batch, *inputs), (*inputs, *outputs), (*batch, *outputs)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inputs, outputs", [((5,), (7,)), ((5,), (2, 3)), ((2, 3), (5,)), ((2, 3), (4, 5))], ids=str)
def test_project_gradients_equal_autodiff(inputs, outputs, dtype):
    x, kernel, dy = arrays(inputs, outputs, dtype)
    n = len(inputs)

    def with_gradients(form):
        out, pull = jax.vjp(form, x, kernel)
        return out, *pull(dy)

    found = with_gradients(lambda x, kernel: project(x, kernel, n))
    wanted = with_gradients(lambda x, kernel: jnp.tensordot(x, kernel, n))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (a, b)), rtol=tolerance, atol=tolerance)


def test_project_kernel_gradient_needs_no_transpose():
    x, kernel, dy = arrays((5,), (7,), jnp.float32)
    jaxpr = str(jax.make_jaxpr(lambda dy: jax.vjp(lambda w: project(x, w, 1), kernel)[1](dy))(dy))
    assert "dot_general" in jaxpr and "transpose" not in jaxpr


@pytest.mark.parametrize("equation", ["BTD,HND->BTNH", "BTD,NHD->BTNH", "BDT,DNH->BTNH", "BTD,DN->BTN"])
def test_linear_rejects_other_contractions(equation):
    with pytest.raises(ValueError, match="does not contract the last axes of x with the first of a kernel"):
        Linear(equation, (4, 2, 3), ("embed", "heads", "head_dim"), rngs=nnx.Rngs(0))


def test_linear_contracts_as_declared():
    layer = Linear("BTNH,NHD->BTD", (2, 3, 4), ("heads", "head_dim", "embed"), bias=True, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)), jnp.float32)  # other leading axes than B, T
    np.testing.assert_allclose(layer(x), jnp.einsum("BNH,NHD->BD", x, layer.kernel[...]), rtol=1e-5)
    assert layer.bias.shape == (4,) and layer.bias.get_metadata()["out_sharding"] == ("embed",)
