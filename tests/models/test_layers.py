"""Products with weights: their gradients against autodiff's, and in which order they are made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phivision_jax.models.layers import project


def made(inputs, outputs, dtype, batch=(2, 3)):
    rng = np.random.default_rng(0)
    shapes = (*batch, *inputs), (*inputs, *outputs), (*batch, *outputs)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inputs, outputs", [((5,), (7,)), ((5,), (2, 3)), ((2, 3), (5,)), ((2, 3), (4, 5))], ids=str)
def test_gradients_are_those_of_autodiff(inputs, outputs, dtype):
    x, kernel, dy = made(inputs, outputs, dtype)
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


def test_the_kernel_s_gradient_needs_no_transpose():
    x, kernel, dy = made((5,), (7,), jnp.float32)
    jaxpr = str(jax.make_jaxpr(lambda dy: jax.vjp(lambda w: project(x, w, 1), kernel)[1](dy))(dy))
    assert "dot_general" in jaxpr and "transpose" not in jaxpr
